"""Weights of a decoder for the Block Transformer that it is to become."""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from .block_plan import block_config, embed_dim, split_config
from .config import ModelConfig
from .convert import ConversionError, parameter_shapes, tensor_problems


def from_vanilla(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the initial state of uptraining for the Block Transformer of `config` (Block Transformer, appendix P).

    `state` is that of a Decoder of the same size. Its lower layers become the block decoder, its upper ones, the norm
    and the output matrix the token decoder. Every embedding table is the decoder's. A block is the mean of its tokens'
    embeddings, and each vector of its expanded context is that context. Parameters without a counterpart are as in a
    new model: the block decoder's norm is one, and a start context is zero.

    Raises ConversionError with every part of `config` that these weights cannot fill.
    """
    block, (block_decoder, token_decoder) = block_config(config), split_config(config)
    width, num_lower = config.size.d_model, block_decoder.size.num_layers
    problems = [
        f"arch.block.{name} is {value!r}; it must be {expected!r} to start from a decoder"
        for name, value, expected in (
            ("embedder", block.embedder, "projection"),
            ("embed_dim", embed_dim(config), width),
            ("token.kind", block.token.kind, "prefix"),
            ("token.d_model", token_decoder.size.d_model, width),
        )
        if value != expected
    ]
    if problems:
        raise ConversionError(problems)
    converted = {_half(name, num_lower): tensor for name, tensor in state.items()}
    identity = torch.eye(width, dtype=state["embed.weight"].dtype)
    converted["embedder.embed.weight"] = state["embed.weight"].clone()
    converted["embedder.proj.weight"] = repeat(identity / block.length, "o i -> o (l i)", l=block.length)
    converted["expansion.weight"] = repeat(identity, "o i -> (c o) i", c=block.token.prefix)
    converted["block_decoder.norm.weight"] = torch.ones_like(state["norm.weight"])
    expected = parameter_shapes(config)
    for name in ("embedder.proj.bias", "expansion.bias", "block_decoder.norm.bias", "start"):
        if name in expected:
            converted[name] = torch.zeros(expected[name], dtype=identity.dtype)
    problems = tensor_problems(expected, {name: tensor.shape for name, tensor in converted.items()})
    if problems:
        raise ConversionError(problems)
    return converted


def _half(name: str, num_lower: int) -> str:
    """Return the name that a decoder's weight has if its lowest `num_lower` layers are the block decoder."""
    parts = name.split(".")
    if parts[0] != "layers":
        return f"token_decoder.{name}"
    layer = int(parts[1])
    stack, number = ("block_decoder", layer) if layer < num_lower else ("token_decoder", layer - num_lower)
    return ".".join((stack, "layers", str(number), *parts[2:]))
