"""Greedy decoding over a cache, one token of each sequence per call, the same for every kind of model.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arch import LanguageModel, ModelConfig, build
from arch.convert import UnsupportedModelError
from arch.convert_stock import weights
from arch.convert_stock_export import to_hf_config
from arch.static_step import step_fn
from train.benchmarks.baselines import UnavailableError, importing

# Feeds tokens [B, T] to a model with a cache and returns the logits [B, 1, V] of the last.
DecodeFn = Callable[[Tensor], Tensor]


def build_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """A model in eval mode with the initial weights of seed 0."""
    with torch.device("meta"):
        model = build(config, device_type=device.type)
    model = model.to(dtype).to_empty(device=device).eval()
    model.init_weights(0)
    return model


def stock_model(config: ModelConfig, model: LanguageModel) -> Any:
    """The class of transformers that computes exactly what `model` does, in eval mode, sharing its weights.

    Raises UnavailableError if there is none.
    """
    with importing("transformers"):
        import transformers
    try:
        hf = to_hf_config(config)
    except UnsupportedModelError as error:
        raise UnavailableError(str(error).removeprefix("- ")) from error
    settings = transformers.AutoConfig.for_model(**hf, attn_implementation="sdpa")
    tensors = model.state_dict()
    with torch.device(model.output_weight.device):
        stock = getattr(transformers, hf["architectures"][0])(settings)
    renamed = {weight.hf_name: weight.to_hf(tensors[weight.name]) for weight in weights(config, hf)}
    missing, unexpected = stock.load_state_dict(renamed, strict=False, assign=True)
    stock.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return stock.eval()


def decode_fn(model: LanguageModel, batch: int, capacity: int, steps: str = "auto") -> tuple[DecodeFn, Any]:
    """A function that feeds an empty cache of the weights' type, and the cache; `steps` as in `generate`.

    The first call needs at least `plan.min_prompt` tokens; every later one feeds one token of each sequence.
    """
    cache, step = model.allocate_cache(batch, capacity), None

    def decode(tokens_BT: Tensor) -> Tensor:
        nonlocal step
        if step is not None:
            return step(tokens_BT)
        logits_B1V: Tensor = model(tokens_BT, cache, last_only=True)
        step = step_fn(model, cache, steps)
        return logits_B1V

    return decode, cache


@torch.inference_mode()
def greedy_steps(decode: DecodeFn, token_B1: Tensor, num_tokens: int) -> Tensor:
    """Feed the most likely next token `num_tokens` times; the last one, [B, 1]."""
    for _ in range(num_tokens):
        token_B1 = argmax_last(decode(token_B1))
    return token_B1


def argmax_last(logits_BTV: Tensor) -> Tensor:
    """The most likely token after the last position, [B, 1]."""
    return logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
