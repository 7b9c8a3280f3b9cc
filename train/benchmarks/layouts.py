"""Layouts against each other on the CPU, at equal parameters: `python train/benchmarks/layouts.py +size=20m`.

Measures an optimizer step of each layout, and decoding over its cache. Layouts take turns in one process, so that other
work of the machine affects all of them; on a busy machine threads=1 and CPU seconds tell more than the clock. Beside
the speed in training stand the formula's FLOPs per token and FLOPs per CPU second, both relative to the first layout: a
slow layout with FLOP/s near 1 has more to compute, one below 1 has a slow implementation.

Parameters are made equal to the first layout's by d_ff, the nearest multiple of 8; d_model, heads and depth stay. In a
Block Transformer both decoders have that d_ff.

Shapes: B batch, T tokens.
"""

import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()
    import train  # noqa: F401  before torch

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from arch import ModelConfig, SizeConfig, resolve
from arch.footprint import kv_bytes, num_params, train_flops_per_token
from arch.named import load_arch, names
from data.cli import UsageError
from eval.cli import Choices, launch, require
from eval.console import PlainConsole
from eval.environment import hardware
from eval.results import write_result
from eval.units import bytes_text, count_text
from train.benchmarks.baselines import kvfrontier, random_batch, train_in_turns
from train.benchmarks.decoding import argmax_last, build_model, decode_fn, greedy_steps
from train.benchmarks.timing import Turns, summary_stats, take_turns, time_ratios

CPU = torch.device("cpu")
TOLERANCE = 0.02  # of the parameters
ITEMSIZE = 4  # fp32


@dataclass
class LayoutsConfig:
    """The command line.

    archs           names in configs/arch; the first is the baseline
    batch_size      sequences per training step
    repeats         timed rounds; in each, every layout takes one step in turn
    decode_batches  batch sizes for decoding
    decode_context  context of each sequence before decoding, in tokens
    decode_tokens   tokens decoded per sequence and round
    threads         torch threads; null: torch's default
    out             folder of layouts.json
    size            one item of the size
    """

    size: SizeConfig = field(default_factory=SizeConfig)
    archs: list[str] = field(default_factory=lambda: ["mha", "block", "bct"])
    batch_size: int = 2
    repeats: int = 7
    decode_batches: list[int] = field(default_factory=lambda: [1, 8])
    decode_context: int = 512
    decode_tokens: int = 32
    threads: int | None = None
    out: str = "docs/results/layouts-cpu"


def main(config: DictConfig, choices: Choices) -> None:
    require(size=choices.size)
    options = OmegaConf.to_object(config)
    assert isinstance(options, LayoutsConfig)
    check(options)
    models = equal_param_models(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "size": choices.size,
        "reference": options.archs[0],
        "options": asdict(options),
        "threads": torch.get_num_threads(),
        "precision": "fp32",
        "load": {"before": os.getloadavg()},
        "models": {arch: describe(model) for arch, model in models.items()},
    }
    result["training"] = training(models, options)
    result["decoding"] = {str(batch): decoding(models, batch, options) for batch in options.decode_batches}
    result["load"]["after"] = os.getloadavg()
    path = Path(options.out) / "layouts.json"
    write_result(path, result)
    print_tables(result)
    print(f"written to {path}")


def check(options: LayoutsConfig) -> None:
    """Raise UsageError for what is no layout or no count."""
    for arch in options.archs:
        if arch not in names("arch"):
            raise UsageError(f"archs has {arch}; choose of {', '.join(names('arch'))}")
    if len(set(options.archs)) < max(2, len(options.archs)):
        raise UsageError(f"archs is {options.archs}; name two layouts or more, each once")
    for name in ("batch_size", "repeats", "decode_context", "decode_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} is {getattr(options, name)}; it must be at least 1")
    if not options.decode_batches or min(options.decode_batches) < 1:
        raise UsageError(f"decode_batches is {options.decode_batches}; write at least one number, each at least 1")
    for arch in options.archs:
        block = load_arch(arch).block
        for name, value in (
            ("size.seq_len", options.size.seq_len),
            ("decode_context", options.decode_context),
            ("decode_tokens", options.decode_tokens),
        ):
            if block is not None and value % block.length:
                raise UsageError(f"{name} is {value}; {arch} needs a multiple of its block length {block.length}")


def equal_param_models(options: LayoutsConfig) -> dict[str, ModelConfig]:
    """Models of each layout with as many parameters as the first. Raises UsageError if no d_ff makes them equal."""
    first, *others = options.archs
    models = {first: ModelConfig(load_arch(first), options.size)}
    target = params(models[first])
    for arch in others:
        model = match_params(ModelConfig(load_arch(arch), options.size), target)
        if abs(params(model) / target - 1) > TOLERANCE:
            raise UsageError(
                f"{arch} has {params(model):,} parameters at d_ff {model.size.d_ff}, {first} has {target:,}: no d_ff "
                f"makes them equal within {TOLERANCE:.0%}; compare others, or another size"
            )
        models[arch] = model
    return models


def match_params(config: ModelConfig, target: int) -> ModelConfig:
    """`config` with the multiple of 8 as d_ff whose parameters are nearest to `target`; they are linear in d_ff."""
    at = {d_ff: params(ModelConfig(config.arch, replace(config.size, d_ff=d_ff))) for d_ff in (8, 16)}
    steps = max(0, round((target - at[8]) / (at[16] - at[8])))
    return ModelConfig(config.arch, replace(config.size, d_ff=8 + 8 * steps))


def params(config: ModelConfig) -> int:
    return num_params(config, resolve(config))


def describe(config: ModelConfig) -> dict[str, Any]:
    return {
        "d_ff": config.size.d_ff,
        "params": params(config),
        "train_flops_per_token": train_flops_per_token(config, resolve(config)),
    }


def training(models: dict[str, ModelConfig], options: LayoutsConfig) -> dict[str, Any]:
    """Time one optimizer step of each in turn, as cpu.py does. `flops` are per token, over the first's."""
    baselines = {arch: kvfrontier(config, CPU, False) for arch, config in models.items()}
    turns, losses = train_in_turns(baselines, options.size, options.batch_size, options.repeats)
    results = compare(turns, options.batch_size * options.size.seq_len)
    flops = {arch: describe(config)["train_flops_per_token"] for arch, config in models.items()}
    for arch, values in results.items():
        values["flops"] = flops[arch] / flops[options.archs[0]]
        values["flops_per_second"] = values["cpu"] * values["flops"]
        values["losses"] = losses[arch]
    return results


def decoding(models: dict[str, ModelConfig], batch: int, options: LayoutsConfig) -> dict[str, Any]:
    """Time `decode_tokens` of each sequence per round, after a prompt of `decode_context`; the cache keeps growing."""
    context, tokens = options.decode_context, options.decode_tokens
    total = context + (1 + options.repeats) * tokens
    calls, cache_bytes = {}, {}

    def decoder(config: ModelConfig) -> tuple[Callable[[int], None], int]:
        decode, cache = decode_fn(build_model(config, torch.float32, CPU), batch, total)
        with torch.inference_mode():
            prompt, _ = random_batch(config.size.vocab_size, batch, context, CPU, seed=0)
            last = argmax_last(decode(prompt))

        def call(number: int) -> None:
            nonlocal last
            last = greedy_steps(decode, last, tokens)

        return call, cache.nbytes

    for arch, config in models.items():
        calls[arch], cache_bytes[arch] = decoder(config)
    results = compare(take_turns(calls, options.repeats, warmup=1), batch * tokens)
    for arch, config in models.items():
        kv = kv_bytes(resolve(config), total, ITEMSIZE)
        results[arch] |= {
            "context": total,
            "kv_bytes_stored": kv.stored,
            "kv_bytes_read": kv.read,
            "cache_bytes": cache_bytes[arch] // batch,
        }
    return results


def compare(turns: Turns, tokens: int) -> dict[str, dict[str, Any]]:
    """Seconds and tokens/s of each layout in rounds of `tokens` tokens, and its speed over that of the first."""
    first = next(iter(turns.seconds))
    return {
        arch: {
            "seconds": summary_stats(turns.seconds[arch]),
            "cpu_seconds": summary_stats(turns.cpu_seconds[arch]),
            "tokens_per_second": tokens / statistics.median(turns.seconds[arch]),
            "tokens_per_cpu_second": tokens / statistics.median(turns.cpu_seconds[arch]),
            **time_ratios(turns, first, arch),
        }
        for arch in turns.seconds
    }


def print_tables(result: dict[str, Any]) -> None:
    console = PlainConsole()
    first, models, options = result["reference"], result["models"], result["options"]
    sections = {f"training, {options['batch_size']} x {options['size']['seq_len']} tokens": result["training"]}
    sections |= {f"decoding, batch {batch}": results for batch, results in result["decoding"].items()}
    for title, results in sections.items():
        table = Table("", title=f"{result['size']}, {title}, fp32, {hardware()}")
        for column in ("params", "tokens/s", "tokens/CPU s", f"speed / {first}", "in CPU s", "by round"):
            table.add_column(column, justify="right")
        trained = "flops" in results[first]
        for column in ("FLOPs", "FLOP/s") if trained else ("KV stored", "KV read"):
            table.add_column(column, justify="right")
        for arch, values in results.items():
            if trained:
                last = [f"{values[key]:.2f}" for key in ("flops", "flops_per_second")]
            else:
                last = [bytes_text(values[key]) for key in ("kv_bytes_stored", "kv_bytes_read")]
            table.add_row(
                arch,
                count_text(models[arch]["params"]),
                f"{values['tokens_per_second']:,.0f}",
                f"{values['tokens_per_cpu_second']:,.0f}",
                f"{values['speed']:.2f}",
                f"{values['cpu']:.2f}",
                "{min:.2f}-{max:.2f}".format(**values["cpu_by_round"]),
                *last,
            )
        console.print(table)


if __name__ == "__main__":
    launch(main, "bench_layouts", LayoutsConfig)
