"""Part of the GPU suite: prefill and decode over the cache, and the bytes that the cache really takes.

Shapes: B batch, T tokens, C vectors of an expanded context, D model, V vocabulary.

Both sides run eagerly, one Python step per token, greedily, in bf16: at a small batch that measures launches more than
memory, which is why several batches are measured. No side decodes with cuDNN's attention, as ours never does.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from arch import (
    BlockPlan,
    BlockTransformer,
    LanguageModel,
    ModelConfig,
    Plan,
    allocate,
    allocate_blocks,
    build,
    resolve,
)
from arch.attend import NOT_CUDNN
from arch.block_transformer import BlockCache
from arch.cache import Cache
from arch.footprint import allocated_bytes
from train.benchmarks.baselines import hugging_face, random_batch
from train.benchmarks.gpu_case import Case, Options, model_config
from train.benchmarks.timing import seconds, spread

ARCHS = ("mha", "gqa4", "mqa", "cla2", "mixattention", "mla", "block", "bct")
PEER_ARCHS = ("mha", "gqa4")
WARMUP, STEPS = 4, 32

# Feeds tokens [B, T] and returns the logits [B, 1, V] of the last.
Feed = Callable[[Tensor], Tensor]


def decode(options: Options) -> list[Case]:
    """Contexts and batches at size 1b: the large batch first, where layouts differ most."""
    shapes = [(12, 2)] if options.toy else [(4096, 64), (32768, 8), (4096, 1), (32768, 1)]
    cases = []
    for context, batch in shapes:
        for arch in ARCHS:
            for side in ("ours", "hugging_face") if arch in PEER_ARCHS else ("ours",):
                run = functools.partial(measure, side, model_config(arch, "1b", options), context, batch, options)
                cases.append(Case(f"{side}-{arch}-1b-{context}x{batch}", 12, run, _line))
    return cases


def _line(result: dict[str, Any]) -> str:
    return (
        f"prefill {result['prefill_tokens_per_second']:,.0f} tok/s, decode {result['decode_tokens_per_second']:,.0f} "
        f"tok/s, cache {result['cache_bytes'] / 2**20:,.1f} MiB"
    )


@torch.inference_mode()
def measure(side: str, config: ModelConfig, context: int, batch: int, options: Options) -> dict[str, Any]:
    """Prefill `context` tokens for each of `batch` sequences, then decode; warm, cache bytes at the end."""
    device = options.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, held = {"ours": our_decoder, "hugging_face": their_decoder}[side](config, context, batch, device)
    prompt, _ = random_batch(config.size.vocab_size, batch, context, device, seed=0)
    start()(prompt)  # kernels are loaded and chosen, for this very shape
    feed = start()
    found: list[Tensor] = []
    prefill = seconds(lambda: found.append(feed(prompt)), device)
    token = found[0][:, -1].argmax(dim=-1, keepdim=True)

    def step() -> None:
        nonlocal token
        token = feed(token)[:, -1].argmax(dim=-1, keepdim=True)

    with sdpa_kernel(NOT_CUDNN):
        for _ in range(WARMUP):
            step()
        times = spread(step_seconds(step, resolve(config), device))
    return {
        "context": context,
        "batch": batch,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * context / prefill,
        "step_seconds": times,
        "decode_tokens_per_second": batch / times["median"],
        "cache_bytes": held(),
        "formula_bytes": allocated_bytes(resolve(config), batch, context + WARMUP + STEPS),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def step_seconds(step: Callable[[], None], plan: Plan, device: torch.device) -> list[float]:
    """Seconds per step, over as many steps at a time as a block has tokens: one of them runs the block decoder."""
    length = plan.length if isinstance(plan, BlockPlan) else 1
    return [seconds(lambda: [step() for _ in range(length)], device) / length for _ in range(STEPS // length)]


def our_decoder(
    config: ModelConfig, context: int, batch: int, device: torch.device
) -> tuple[Callable[[], Feed], Callable[[], int]]:
    model = our_model(config, torch.bfloat16, device)
    caches: list[Any] = []

    def start() -> Feed:
        caches[:] = []
        feed, cache = feeding(model, batch, context + WARMUP + STEPS)
        caches.append(cache)
        return feed

    return start, lambda: caches[0].nbytes


def our_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    with torch.device("meta"):
        model = build(config, "auto", device.type)
    model = model.to(dtype).to_empty(device=device).eval()
    model.init_weights(0)
    return model


def feeding(model: LanguageModel, batch: int, capacity: int) -> tuple[Feed, Cache | BlockCache]:
    """An empty cache, of the weights' type, and what fills it; a Block Transformer's prompt is at least a block."""
    weight = next(model.parameters())
    if isinstance(model, BlockTransformer):
        blocks = allocate_blocks(model.plan, batch, capacity, dtype=weight.dtype, device=weight.device)
        return BlockFeed(model, blocks), blocks
    cache = allocate(model.plan, batch, capacity, dtype=weight.dtype, device=weight.device)
    return lambda tokens: model(tokens, cache, last_only=True), cache


class BlockFeed:
    """Feeds a Block Transformer as one feeds a decoder: what completes a block is encoded, and the next one begun."""

    def __init__(self, model: BlockTransformer, cache: BlockCache):
        self.model, self.cache = model, cache
        self.begun_BT: Tensor | None = None  # the block being said
        self.context_BCD: Tensor | None = None  # of that block

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        model, length = self.model, self.model.plan.length
        seen_BT = tokens_BT if self.begun_BT is None else torch.cat((self.begun_BT, tokens_BT), dim=1)
        whole = seen_BT.shape[1] // length * length
        if whole:
            self.context_BCD = model.expand(model.encode(seen_BT[:, :whole], self.cache.blocks)[:, -1])
            logits_BV = model.begin(self.context_BCD, seen_BT[:, whole:], self.cache.tokens)
        else:
            assert self.context_BCD is not None and self.begun_BT is not None
            logits_BV = model.step(self.context_BCD, tokens_BT, self.begun_BT.shape[1], self.cache.tokens)
        self.begun_BT = seen_BT[:, whole:]
        return logits_BV[:, None]


def their_decoder(
    config: ModelConfig, context: int, batch: int, device: torch.device
) -> tuple[Callable[[], Feed], Callable[[], int]]:
    """transformers' Llama over its DynamicCache, the steps that its `generate` takes."""
    model = hugging_face(config, device, False).model.to(torch.bfloat16).eval()
    from transformers import DynamicCache

    caches: list[Any] = []

    def start() -> Feed:
        caches[:] = [DynamicCache(config=model.config)]
        return lambda tokens: model(tokens, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits

    def held() -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers)

    return start, held
