"""Prefill and decoding of every family on the CPU: `python train/benchmarks/decode_study.py size=20m`.

Layouts, and transformers on the same weights for those that a stock class computes, take turns in one process, so that
whatever else the machine does meets all of them; ratios are medians of ratios by round. Weights are random: speed does
not depend on them. A shape is PROMPTxBATCH. Every model prefills the prompts, then decodes `new` tokens per round, with
the steps that `generate` takes, greedily; the cache keeps growing.

Beside the times stand the bytes of the cache, measured and by the formula, and the largest batch whose cache fits into
`memory` beside the weights; and the floor of a step, the time in which one thread's memory delivers what a step reads,
weights without the embedding and the cache, at the bandwidth that a sum over a large tensor reaches. Writes
decode.json, decode.png and README.md.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()
    import train  # noqa: F401  before torch

import torch
from torch import Tensor
from torch.nn import functional as F

from arch import LanguageModel, ModelConfig, resolve
from arch.compression.checks import check_method
from arch.compression.compressed import allocate_compressed
from arch.compression.method import CacheMethod, parse_method
from arch.compression.storage import compressed_bytes, has_formula
from arch.config import head_dim
from arch.footprint import allocated_bytes, kv_bytes, max_batch, num_params
from arch.named import load_arch, load_size, names
from arch.static_step import step_fn
from data.cli import UsageError, parse
from eval.environment import ROOT
from eval.outcome import run_script
from eval.results import write_result
from eval.units import parse_bytes
from train.benchmarks.baselines import UnavailableError, random_batch
from train.benchmarks.decode_report import report
from train.benchmarks.decoding import DecodeFn, argmax_last, build_model, decode_fn, greedy_steps, stock_model
from train.benchmarks.timing import CPU, Turns, summary_stats, take_turns, time_ratios, timed

ITEMSIZE = 4  # fp32
MEASURED = ("mha", "gqa4", "mqa", "mla", "cla2", "mixattention", "swa", "yoco", "block", "bct", "bct_gated")
# transformers' caches; a name of a competitor is LAYOUT, LAYOUT/CACHE, or LAYOUT/compiled.
PEERS = ("dynamic", "static")


@dataclass(frozen=True)
class DecodeConfig:
    """Options; lists are written with commas.

    size     a name in configs/size
    archs    names in configs/arch; the first is what the others are compared with
    shapes   PROMPTxBATCH, in tokens and sequences
    new      tokens of each sequence per round; a multiple of the block length of every Block Transformer
    rounds   timed rounds of decoding, after one to warm up
    prefills rounds of prefill; the first is not counted where there are more
    peers    caches of transformers to decode with: dynamic, static; null: none
    cache    methods with which every layout decodes, too, as in `none,int8,int4`: what a smaller cache costs in time
             (arch/compression/method.py); null: none
    compiled layouts whose steps are also compiled, half a minute for each shape; null: none
    memory   what weights and caches may take together, for the largest batch
    threads  torch threads; null: torch's default
    out      folder of the results
    """

    size: str = "20m"
    archs: tuple[str, ...] = MEASURED
    shapes: tuple[str, ...] = ("512x1", "2048x1", "8192x1", "1024x8")
    new: int = 16
    rounds: int = 7
    prefills: int = 4
    peers: tuple[str, ...] | None = PEERS
    cache: tuple[str, ...] | None = None
    compiled: tuple[str, ...] | None = ("mha", "mqa", "cla2")
    memory: str = "16GiB"
    threads: int | None = 1
    out: Path = ROOT / "docs" / "results" / "decode-cpu"


class Shape(NamedTuple):
    prompt: int
    batch: int


class Session(NamedTuple):
    """Decoding over one cache, empty at first; `cache_bytes` is what its tensors take now."""

    decode: DecodeFn
    cache_bytes: Callable[[], int]


class Competitor(NamedTuple):
    """A model, and what opens a session of it for (batch, capacity)."""

    model: Any
    open: Callable[[int, int], Session]


def main(arguments: list[str]) -> None:
    options = parse(DecodeConfig, arguments)
    shapes = check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    configs = {arch: ModelConfig(load_arch(arch), load_size(options.size)) for arch in options.archs}
    result: dict[str, Any] = {
        "reference": options.archs[0],
        "options": asdict(options) | {"out": str(options.out.name)},
        "threads": torch.get_num_threads(),
        "precision": "fp32",
        "load": {"before": os.getloadavg()},
        "bandwidth": bandwidth(),
        "models": {arch: describe(config, shapes, options) for arch, config in configs.items()},
        "shapes": {},
    }
    rivals, result["without_peer"] = competitors(configs, options.peers or (), options.compiled or ())
    longest = max(capacity_of(shape, options) for shape in shapes.values())
    compressed, result["without_method"] = compressed_competitors(rivals, configs, options.cache or (), longest)
    rivals |= compressed
    for text, shape in shapes.items():
        print(f"{text}: {', '.join(rivals)}", flush=True)
        result["shapes"][text] = measure(rivals, configs, shape, options)
    result["shared_read"] = shared_read(options)
    result["load"]["after"] = os.getloadavg()
    write_result(options.out / "decode.json", result)
    print(report(json.loads((options.out / "decode.json").read_text()), options.out))
    print(f"written to {options.out}")


def check(options: DecodeConfig) -> dict[str, Shape]:
    """The shapes. Raises UsageError for what is no layout, size, shape or count."""
    for group, given in (("arch", options.archs), ("size", (options.size,))):
        if unknown := [name for name in given if name not in names(group)]:
            raise UsageError(f"{', '.join(unknown)} is not in configs/{group}; choose of {', '.join(names(group))}")
    if len(set(options.archs)) < len(options.archs) or not options.archs:
        raise UsageError(f"archs is {','.join(options.archs)}; name one layout or more, each once")
    for name in ("new", "rounds", "prefills"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} is {getattr(options, name)}; it must be at least 1")
    try:
        for text in options.cache or ():
            parse_method(text)
    except ValueError as error:
        raise UsageError(f"cache: {error}") from error
    if unknown := [arch for arch in options.compiled or () if arch not in names("arch")]:
        raise UsageError(f"compiled has {', '.join(unknown)}, which is not in configs/arch")
    if options.peers is not None and not set(options.peers) <= set(PEERS):
        raise UsageError(f"peers is {','.join(options.peers)}; choose of {', '.join(PEERS)}, or null")
    try:
        parse_bytes(options.memory)
    except ValueError as error:
        raise UsageError(f"memory: {error}") from error
    shapes = {}
    for text in options.shapes:
        numbers = text.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise UsageError(f"shapes has {text}; write PROMPTxBATCH, as in 2048x1")
        shapes[text] = Shape(*map(int, numbers))
    for arch in options.archs:
        block = load_arch(arch).block
        for name, length in (("new", options.new), *((text, shape.prompt) for text, shape in shapes.items())):
            if block is not None and length % block.length:
                raise UsageError(f"{name}: {length} tokens; {arch} needs a multiple of its block length {block.length}")
    return shapes


def bandwidth() -> float:
    """Bytes per second that a sum over a tensor of a quarter GiB reads, the best of several."""
    numbers = torch.ones(1 << 26)
    turns = take_turns({"sum": lambda _: float(numbers.sum())}, 5, warmup=1)
    return numbers.nbytes / min(turns.seconds["sum"])


def describe(config: ModelConfig, shapes: dict[str, Shape], options: DecodeConfig) -> dict[str, Any]:
    """Describe a model: its weights, and per shape the largest batch of prompts that fits into the memory."""
    plan = resolve(config)
    params = num_params(config, plan)
    memory = parse_bytes(options.memory)
    embedding = 0 if config.size.tie_embeddings else config.size.vocab_size * config.size.d_model
    return {
        "params": params,
        # None for a Block Transformer, whose steps differ.
        "weight_bytes_read": (params - embedding) * ITEMSIZE if plan.block_length == 1 else None,
        "largest_batch": {
            text: max_batch(plan, shape.prompt, memory, params * ITEMSIZE, ITEMSIZE) for text, shape in shapes.items()
        },
    }


def competitors(
    configs: dict[str, ModelConfig], peers: tuple[str, ...], compiled: tuple[str, ...]
) -> tuple[dict[str, Competitor], dict[str, str]]:
    """Every model, and for the layouts that no stock class of transformers computes, the reason."""
    found, reasons = {}, {}
    for arch, config in configs.items():
        model = build_model(config, torch.float32, CPU)
        found[arch] = Competitor(model, partial(our_session, model))
        if arch in compiled:
            found[f"{arch}/compiled"] = Competitor(model, partial(our_session, model, steps="compiled"))
        if not peers:
            continue
        try:
            stock = stock_model(config, model)
        except UnavailableError as error:
            reasons[arch] = str(error)
            continue
        for peer in peers:
            found[f"{arch}/{peer}"] = Competitor(stock, partial(stock_session, stock, peer))
    return found, reasons


def compressed_competitors(
    rivals: dict[str, Competitor], configs: dict[str, ModelConfig], methods: tuple[str, ...], capacity: int
) -> tuple[dict[str, Competitor], dict[str, str]]:
    """Every layout with each method on its cache, as LAYOUT/METHOD, and why where that cannot be in up to `capacity`
    tokens."""
    found, reasons = {}, {}
    for arch, config in configs.items():
        for method in map(parse_method, methods):
            try:
                check_method(resolve(config), method)
                compressed_bytes(resolve(config), method, 1, capacity, itemsize=ITEMSIZE)  # finds budgets too small
            except ValueError as error:
                reasons[f"{arch}/{method.text}"] = str(error)
                continue
            model = rivals[arch].model
            found[f"{arch}/{method.text}"] = Competitor(model, partial(compressed_session, model, method))
    return found, reasons


def compressed_session(model: LanguageModel, method: CacheMethod, batch: int, capacity: int) -> Session:
    """Decoding over a compressed cache, which is compressed after the prompt."""
    cache = allocate_compressed(model.plan, batch, capacity, dtype=model.output_weight.dtype, method=method)
    steps: list[DecodeFn] = []

    def decode(tokens_BT: Tensor) -> Tensor:
        if steps:
            return steps[0](tokens_BT)
        logits_B1V: Tensor = model(tokens_BT, cache, last_only=True)
        cache.compress()
        steps.append(step_fn(model, cache, "plain"))
        return logits_B1V

    return Session(decode, lambda: int(cache.nbytes))


def our_session(model: LanguageModel, batch: int, capacity: int, steps: str = "plain") -> Session:
    decode, cache = decode_fn(model, batch, capacity, steps)
    return Session(decode, lambda: int(cache.nbytes))


def stock_session(model: Any, peer: str, batch: int, capacity: int) -> Session:
    """Decoding by a model of transformers over its DynamicCache or StaticCache, with the steps of its `generate`."""
    from transformers import DynamicCache, StaticCache

    cache: Any = (
        DynamicCache(config=model.config)
        if peer == "dynamic"
        else StaticCache(config=model.config, max_cache_len=capacity)
    )
    return Session(
        lambda tokens: model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits,
        lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    )


def capacity_of(shape: Shape, options: DecodeConfig) -> int:
    """Tokens of a sequence at its end."""
    return shape.prompt + options.new * (1 + options.rounds)


def measure(
    rivals: dict[str, Competitor], configs: dict[str, ModelConfig], shape: Shape, options: DecodeConfig
) -> dict[str, Any]:
    """Times of every competitor at one shape. Raises RuntimeError if equal weights decode to other tokens."""
    capacity = capacity_of(shape, options)
    vocab_size = load_size(options.size).vocab_size
    prompt, _ = random_batch(vocab_size, shape.batch, shape.prompt, CPU, seed=0)
    sessions: dict[str, Session] = {}
    last: dict[str, Tensor] = {}

    @torch.inference_mode()
    def prefill(name: str, _: int) -> None:
        sessions.pop(name, None)  # its cache, before there is another
        sessions[name] = rivals[name].open(shape.batch, capacity)
        last[name] = argmax_last(sessions[name].decode(prompt))

    first_rounds: dict[str, float] = {}

    def step(name: str, number: int) -> None:
        last[name], took = timed(lambda: greedy_steps(sessions[name].decode, last[name], options.new))
        if number == 0:  # compiled steps are compiled in it
            first_rounds[name] = took

    warmup = min(1, options.prefills - 1)
    prefilled = take_turns({name: partial(prefill, name) for name in rivals}, options.prefills - warmup, warmup)
    decoded = take_turns({name: partial(step, name) for name in rivals}, options.rounds, warmup=1)
    results = {
        name: figures(name, prefilled, decoded, shape, options)
        | {"cache_bytes": sessions[name].cache_bytes(), "first_round_seconds": first_rounds[name]}
        for name in rivals
    }
    for name, values in results.items():
        arch, _, peer = name.partition("/")
        if peer == "compiled" and (static := f"{arch}/static") in rivals:
            values["decode_over_static"] = time_ratios(decoded, static, name)
        if not peer:
            plan = resolve(configs[arch])
            values["formula_bytes"] = allocated_bytes(plan, shape.batch, capacity, ITEMSIZE)
            values["read_bytes"] = shape.batch * kv_bytes(plan, capacity, ITEMSIZE).read
        elif peer in (options.cache or ()):
            method, plan = parse_method(peer), resolve(configs[arch])
            if has_formula(method):
                values["formula_bytes"] = compressed_bytes(
                    plan, method, shape.batch, capacity, prompt=shape.prompt, itemsize=ITEMSIZE
                )
        elif not torch.equal(last[name], last[arch]):
            values["tokens_differ"] = "equal weights, and the last token is another: a tie of rounding"
    return results


@torch.inference_mode()
def shared_read(options: DecodeConfig) -> dict[str, Any]:
    """Time what no decoder can do: attend from the queries of two layers that read one store (CLA2 with one key head)
    in one pass over it, against two passes. The second layer's queries depend on what the first one attends to.
    """
    size, context = load_size(options.size), max(shape.prompt for shape in check(options).values())
    width = head_dim(size)
    kv = [[torch.randn(1, 1, context, width) for _ in "kv"] for _ in range(size.num_layers // 2)]
    first, second = (torch.randn(1, 1, size.num_heads, width) for _ in range(2))
    both = torch.cat((first, second), dim=2)

    def apart(_: int) -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(first, k, v)
            F.scaled_dot_product_attention(second, k, v)

    def at_once(_: int) -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(both, k, v)

    turns = take_turns({"apart": apart, "at once": at_once}, options.rounds, warmup=1)
    return {"context": context, "saving": time_ratios(turns, "apart", "at once")}


def figures(name: str, prefilled: Turns, decoded: Turns, shape: Shape, options: DecodeConfig) -> dict[str, Any]:
    """Seconds and tokens/s; `over_reference` is speed over the first layout's, `ours_over` ours over this peer's."""
    arch, _, peer = name.partition("/")
    per_token = [seconds / options.new for seconds in decoded.seconds[name]]
    found: dict[str, Any] = {
        "prefill_seconds": summary_stats(prefilled.seconds[name]),
        "step_seconds": summary_stats(per_token),
        "tokens_per_second": shape.batch / statistics.median(per_token),
    }
    for what, turns in (("prefill", prefilled), ("decode", decoded)):
        if peer:
            found[f"{what}_ours_over"] = time_ratios(turns, name, arch)
        else:
            found[f"{what}_over_reference"] = time_ratios(turns, options.archs[0], name)
    return found


if __name__ == "__main__":
    run_script(main)
