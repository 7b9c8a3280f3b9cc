"""Parts of the GPU suite: prefill and decode over the cache, and the bytes that the cache really takes.

Both implementations decode greedily in bf16: ours with the steps that `generate` takes, captured in a CUDA graph,
theirs eagerly over a DynamicCache. Neither decodes with cuDNN's attention, as ours never does. The floor of a step is
the time in which the device's memory delivers the weights and the cache.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from arch import ModelConfig, Plan, attend_step, resolve
from arch.attend import NOT_CUDNN
from arch.block_plan import stack_configs
from arch.footprint import allocated_bytes, between_matrices, kv_bytes, stack_layer_params
from eval.hardware import GIGA, find_gpu
from train.benchmarks.baselines import hugging_face, random_batch
from train.benchmarks.decoding import DecodeFn, argmax_last, build_model, decode_fn
from train.benchmarks.gpu_case import Case, Options, case_config
from train.benchmarks.timing import seconds, summary_stats

ARCHS = ("mha", "gqa4", "mqa", "cla2", "mixattention", "mla", "block", "bct")
BASELINE_ARCHS = ("mha", "gqa4")
OTHER_ARCHS = ("mha", "cla2", "mixattention", "bct")
WARMUP, STEPS = 4, 32


class Session(NamedTuple):
    """Decoding over one cache, which is empty at first; `cache_bytes` is what its tensors take now."""

    decode: DecodeFn
    cache_bytes: Callable[[], int]


def decode(options: Options) -> list[Case]:
    """Contexts and batches at size 1b: the large batch first, where layouts differ most."""
    shapes = [(12, 2)] if options.toy else [(4096, 64), (32768, 8), (4096, 1), (32768, 1)]
    chosen = {arch: ("ours", *["hugging_face"] * (arch in BASELINE_ARCHS)) for arch in ARCHS}
    return [_case(name, arch, *shape, options) for shape in shapes for arch in ARCHS for name in chosen[arch]]


def decode_steps(options: Options) -> list[Case]:
    """The ways to take a step, at batch 1: static ones without a graph, and plain ones, beside what `decode` has."""
    context = 12 if options.toy else 4096
    return [_case(name, arch, context, 1, options) for arch in OTHER_ARCHS for name in ("ours_static", "ours_plain")]


def _case(name: str, arch: str, context: int, batch: int, options: Options) -> Case:
    run = functools.partial(measure, name, case_config(arch, "1b", options), context, batch, options)
    return Case(f"{name}-{arch}-1b-{context}x{batch}", 12, run, _line)


def _line(result: dict[str, Any]) -> str:
    share = "" if result["share_of_floor"] is None else f" ({result['share_of_floor']:.0%} of the floor)"
    kernels = f", {' and '.join(result['kernels'])}" if result["kernels"] else ""
    return (
        f"prefill {result['prefill_tokens_per_second']:,.0f} tok/s, decode {result['decode_tokens_per_second']:,.0f} "
        f"tok/s{share}{kernels}, cache {result['cache_bytes'] / 2**20:,.1f} MiB"
    )


@contextmanager
def kernels_of_steps() -> Iterator[set[str]]:
    """Collect the names of the attention kernels that steps choose."""
    names: set[str] = set()
    select = attend_step.select_step_kernel

    def selecting(*arguments: Any, **options: Any) -> attend_step.StepKernel:
        chosen = select(*arguments, **options)
        names.add(chosen.name)
        return chosen

    with patch.object(attend_step, "select_step_kernel", selecting):
        yield names


@torch.inference_mode()
def measure(name: str, config: ModelConfig, context: int, batch: int, options: Options) -> dict[str, Any]:
    """Prefill `context` tokens for each of `batch` sequences, then decode; warm, cache bytes at the end."""
    device = options.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = SESSIONS[name](config, batch, context + WARMUP + STEPS, device)
    prompt, _ = random_batch(config.size.vocab_size, batch, context, device, seed=0)
    start().decode(prompt)  # kernels are loaded and chosen, for this very shape
    session = start()
    logits: list[Tensor] = []
    prefill = seconds(lambda: logits.append(session.decode(prompt)), device)
    token = argmax_last(logits.pop())

    def step() -> None:
        nonlocal token
        token = argmax_last(session.decode(token))

    with sdpa_kernel(NOT_CUDNN), kernels_of_steps() as kernels:
        for _ in range(WARMUP):
            step()
        times = summary_stats(step_seconds(step, resolve(config), device))
    floor = floor_seconds(config, batch, context, device)
    return {
        "floor_seconds": floor,
        "share_of_floor": floor and floor / times["median"],
        "kernels": sorted(kernels),
        "context": context,
        "batch": batch,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * context / prefill,
        "step_seconds": times,
        "decode_tokens_per_second": batch / times["median"],
        "cache_bytes": session.cache_bytes(),
        "formula_bytes": allocated_bytes(resolve(config), batch, context + WARMUP + STEPS),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def floor_seconds(config: ModelConfig, batch: int, context: int, device: torch.device) -> float | None:
    """Seconds in which the memory delivers what one step reads: weights in bf16, without the embedding, and the cache.

    Of a Block Transformer on average over the tokens of a block. None on a device whose bandwidth is not listed.
    """
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else floor_bytes(config, batch, context) / (gpu.bandwidth * GIGA)


def floor_bytes(config: ModelConfig, batch: int, context: int) -> float:
    """Bytes of weights and cache that one step reads."""
    plan, configs = resolve(config), stack_configs(config)
    *outer, inner = (
        sum(params for params, _ in stack_layer_params(part, stack))
        for part, stack in zip(configs, plan.stacks, strict=True)
    )
    weights = float(inner + config.size.vocab_size * configs[-1].size.d_model)
    once = sum(outer) + between_matrices(config)
    return 2 * (weights + once / plan.block_length) + batch * kv_bytes(plan, context).read


def step_seconds(step: Callable[[], None], plan: Plan, device: torch.device) -> list[float]:
    """Seconds per step, over as many steps at a time as a block has tokens: one of them runs the block decoder."""
    length = plan.block_length

    def steps() -> None:
        for _ in range(length):
            step()

    return [seconds(steps, device) / length for _ in range(STEPS // length)]


def our_sessions(
    config: ModelConfig, batch: int, capacity: int, device: torch.device, steps: str = "auto"
) -> Callable[[], Session]:
    """Sessions of our model, each with an empty cache for `capacity` tokens; `steps` as in `generate`."""
    model = build_model(config, torch.bfloat16, device)

    def start() -> Session:
        decode, cache = decode_fn(model, batch, capacity, steps)
        return Session(decode, lambda: cache.nbytes)

    return start


def hugging_face_sessions(
    config: ModelConfig, batch: int, capacity: int, device: torch.device
) -> Callable[[], Session]:
    """Sessions of transformers' Llama over its DynamicCache, with the steps that its `generate` takes."""
    model: Any = hugging_face(config, device, False).model.to(torch.bfloat16).eval()
    from transformers import DynamicCache

    def start() -> Session:
        cache: Any = DynamicCache(config=model.config)
        return Session(
            lambda tokens: model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits,
            lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        )

    return start


SESSIONS: dict[str, Callable[[ModelConfig, int, int, torch.device], Callable[[], Session]]] = {
    "ours": our_sessions,
    "ours_plain": functools.partial(our_sessions, steps="plain"),
    "ours_static": functools.partial(our_sessions, steps="static"),
    "hugging_face": hugging_face_sessions,
}
