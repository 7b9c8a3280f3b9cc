"""Greedy decoding over a cache, one token of each sequence per call, the same for every kind of model.

Shapes: B batch, T tokens, C vectors of an expanded context, D model, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arch import BlockTransformer, LanguageModel, ModelConfig, allocate, allocate_blocks, build
from arch.block_transformer import BlockCache
from arch.cache import Cache

# Feeds tokens [B, T] to a model with a cache and returns the logits [B, 1, V] of the last.
DecodeFn = Callable[[Tensor], Tensor]


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """A model in eval mode with the initial weights of seed 0."""
    with torch.device("meta"):
        model = build(config, "auto", device.type)
    model = model.to(dtype).to_empty(device=device).eval()
    model.init_weights(0)
    return model


def decode_fn(model: LanguageModel, batch: int, capacity: int) -> tuple[DecodeFn, Cache | BlockCache]:
    """A function that feeds an empty cache of the weights' type, and the cache.

    The first call of a Block Transformer's needs at least a block of tokens.
    """
    weight = next(model.parameters())
    if isinstance(model, BlockTransformer):
        blocks = allocate_blocks(model.plan, batch, capacity, dtype=weight.dtype, device=weight.device)
        return BlockDecoder(model, blocks), blocks
    cache = allocate(model.plan, batch, capacity, dtype=weight.dtype, device=weight.device)
    return lambda tokens: model(tokens, cache, last_only=True), cache


class BlockDecoder:
    """Feeds a Block Transformer token by token: a completed block is encoded and the next one begun."""

    def __init__(self, model: BlockTransformer, cache: BlockCache):
        self.model, self.cache = model, cache
        self.begun_BT: Tensor | None = None  # tokens of the unfinished block
        self.context_BCD: Tensor | None = None  # its context

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        model, length = self.model, self.model.plan.block_length
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


@torch.inference_mode()
def greedy_steps(decode: DecodeFn, token_B1: Tensor, num_tokens: int) -> Tensor:
    """Feed the most likely next token `num_tokens` times; the last one, [B, 1]."""
    for _ in range(num_tokens):
        token_B1 = argmax_last(decode(token_B1))
    return token_B1


def argmax_last(logits_BTV: Tensor) -> Tensor:
    """The most likely token after the last position, [B, 1]."""
    return logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
