"""Part of the GPU suite: prefill and decode over the cache, and the bytes that the cache really takes.

Both implementations decode greedily in bf16: ours with the steps that `generate` takes, captured in a CUDA graph,
theirs eagerly over a DynamicCache. Neither decodes with cuDNN's attention, as ours never does. The floor of a step is
the time in which the device's memory delivers the weights and the cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from arch import ModelConfig, Plan, resolve
from arch.attend import NOT_CUDNN
from arch.footprint import allocated_bytes, kv_bytes, num_params
from eval.hardware import GIGA, find_gpu
from train.benchmarks.baselines import hugging_face, random_batch
from train.benchmarks.decoding import DecodeFn, argmax_last, build_model, decode_fn
from train.benchmarks.gpu_case import Case, Options, model_config
from train.benchmarks.timing import seconds, summary_stats

ARCHS = ("mha", "gqa4", "mqa", "cla2", "mixattention", "mla", "block", "bct")
BASELINE_ARCHS = ("mha", "gqa4")
WARMUP, STEPS = 4, 32


class Session(NamedTuple):
    """Decoding over one cache, which is empty at first; `cache_bytes` is what its tensors take now."""

    decode: DecodeFn
    cache_bytes: Callable[[], int]


def decode(options: Options) -> list[Case]:
    """Contexts and batches at size 1b: the large batch first, where layouts differ most."""
    shapes = [(12, 2)] if options.toy else [(4096, 64), (32768, 8), (4096, 1), (32768, 1)]
    cases = []
    for context, batch in shapes:
        for arch in ARCHS:
            for name in SESSIONS if arch in BASELINE_ARCHS else ("ours",):
                run = functools.partial(measure, name, model_config(arch, "1b", options), context, batch, options)
                cases.append(Case(f"{name}-{arch}-1b-{context}x{batch}", 12, run, _line))
    return cases


def _line(result: dict[str, Any]) -> str:
    share = "" if result["share_of_floor"] is None else f" ({result['share_of_floor']:.0%} of the floor)"
    return (
        f"prefill {result['prefill_tokens_per_second']:,.0f} tok/s, decode {result['decode_tokens_per_second']:,.0f} "
        f"tok/s{share}, cache {result['cache_bytes'] / 2**20:,.1f} MiB"
    )


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

    with sdpa_kernel(NOT_CUDNN):
        for _ in range(WARMUP):
            step()
        times = summary_stats(step_seconds(step, resolve(config), device))
    floor = floor_seconds(config, batch, context, device)
    return {
        "floor_seconds": floor,
        "share_of_floor": floor and floor / times["median"],
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

    None on a device whose bandwidth is not listed, and for a Block Transformer, whose steps differ.
    """
    plan, size = resolve(config), config.size
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None or plan.block_length > 1:
        return None
    weights = num_params(config, plan) - (0 if size.tie_embeddings else size.vocab_size * size.d_model)
    return (2 * weights + batch * kv_bytes(plan, context).read) / (gpu.bandwidth * GIGA)


def step_seconds(step: Callable[[], None], plan: Plan, device: torch.device) -> list[float]:
    """Seconds per step, over as many steps at a time as a block has tokens: one of them runs the block decoder."""
    length = plan.block_length

    def steps() -> None:
        for _ in range(length):
            step()

    return [seconds(steps, device) / length for _ in range(STEPS // length)]


def our_sessions(config: ModelConfig, batch: int, capacity: int, device: torch.device) -> Callable[[], Session]:
    """Sessions of our model, each with an empty cache for `capacity` tokens."""
    model = build_model(config, torch.bfloat16, device)

    def start() -> Session:
        decode, cache = decode_fn(model, batch, capacity)
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


SESSIONS = {"ours": our_sessions, "hugging_face": hugging_face_sessions}
