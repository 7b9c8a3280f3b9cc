"""Greedy decoding over a cache, one token of each sequence per call, the same for every kind of model.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arch import LanguageModel, ModelConfig, build

# Feeds tokens [B, T] to a model with a cache and returns the logits [B, 1, V] of the last.
DecodeFn = Callable[[Tensor], Tensor]


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """A model in eval mode with the initial weights of seed 0."""
    with torch.device("meta"):
        model = build(config, device_type=device.type)
    model = model.to(dtype).to_empty(device=device).eval()
    model.init_weights(0)
    return model


def decode_fn(model: LanguageModel, batch: int, capacity: int) -> tuple[DecodeFn, Any]:
    """A function that feeds an empty cache of the weights' type, and the cache.

    The first call needs at least `plan.min_prompt` tokens.
    """
    cache = model.allocate_cache(batch, capacity)
    return lambda tokens_BT: model(tokens_BT, cache, last_only=True), cache


@torch.inference_mode()
def greedy_steps(decode: DecodeFn, token_B1: Tensor, num_tokens: int) -> Tensor:
    """Feed the most likely next token `num_tokens` times; the last one, [B, 1]."""
    for _ in range(num_tokens):
        token_B1 = argmax_last(decode(token_B1))
    return token_B1


def argmax_last(logits_BTV: Tensor) -> Tensor:
    """The most likely token after the last position, [B, 1]."""
    return logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
