"""Weights for a Block Transformer: of the authors' code, and of a decoder that is to become one."""

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor

from .block_plan import block_config, embed_dim, stages
from .block_transformer import BlockTransformer
from .config import ModelConfig
from .convert import ConversionError
from .convert_neox import from_neox

# Of the authors' state: their module, ours.
ADAPTERS = {
    "embedder.embeddings": "embedder.embed",
    "embedder.projection_layer": "embedder.proj",
    "token_decoder.expansion_layer": "expansion",
}
UNUSED = "block_decoder.gpt_neox.embed_in.weight"  # in the authors' state, never read


def from_official(tensors: Mapping[str, Tensor], block_heads: int, token_heads: int) -> dict[str, Tensor]:
    """The state of a BlockTransformer in style neox, from that of the authors' (itsnamgyu/block-transformer).

    Raises as `from_neox`.
    """
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {"block_decoder.": {}, "token_decoder.": {}, "": {}}  # "": what is unknown
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ADAPTERS and tensor.ndim == 3:  # a convolution whose kernel is the block, or 1
            ours[f"{ADAPTERS[module]}.{kind}"] = rearrange(tensor, "o i l -> o (l i)")
        elif module in ADAPTERS:
            ours[f"{ADAPTERS[module]}.{kind}"] = tensor
        elif name != UNUSED:
            prefix = next(prefix for prefix in stacks if name.startswith(prefix))
            stacks[prefix][name.removeprefix(prefix)] = tensor
    for (prefix, stack), heads in zip(stacks.items(), (block_heads, token_heads, 1), strict=True):
        ours |= {f"{prefix}{name}": tensor for name, tensor in from_neox(stack, heads).items()}
    return ours


def from_vanilla(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the Block Transformer of `config`, from that of a Decoder of the same size: where uptraining starts.

    The lower layers become the block decoder, the upper ones the token decoder, which has the norm and the output
    matrix too. Every table of embeddings is the decoder's. A block is the mean of its tokens' embeddings, each vector
    of its expanded context is that context. What the decoder has no counterpart of is as in a new model: the block
    decoder's norm, and a start context, which is zero (Block Transformer, appendix P).

    Raises ConversionError with every part of `config` that these weights cannot fill.
    """
    block, (coarse, fine) = block_config(config), stages(config)
    width, lower = config.size.d_model, coarse.size.num_layers
    problems = [
        f"arch.block.{name} is {value!r}; it must be {wanted!r} to start from a decoder"
        for name, value, wanted in (
            ("embedder", block.embedder, "projection"),
            ("embed_dim", embed_dim(config), width),
            ("token.kind", block.token.kind, "prefix"),
            ("token.d_model", fine.size.d_model, width),
        )
        if value != wanted
    ]
    if problems:
        raise ConversionError(problems)
    ours = {_half(name, lower): tensor for name, tensor in state.items()}
    identity = torch.eye(width, dtype=state["embed.weight"].dtype)
    ours["embedder.embed.weight"] = state["embed.weight"].clone()
    ours["embedder.proj.weight"] = repeat(identity / block.length, "o i -> o (l i)", l=block.length)
    ours["expansion.weight"] = repeat(identity, "o i -> (c o) i", c=block.token.prefix)
    ours["block_decoder.norm.weight"] = torch.ones_like(state["norm.weight"])
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in BlockTransformer(config).named_parameters()}
    zero = ["embedder.proj.bias", "expansion.bias", "block_decoder.norm.bias", "start"]
    ours |= {name: torch.zeros(wanted[name], dtype=identity.dtype) for name in zero if name in wanted}
    problems = [f"{name} is missing" for name in wanted if name not in ours]
    problems += [f"{name} is unexpected" for name in ours if name not in wanted]
    problems += [
        f"{name} has the shape {list(ours[name].shape)}; it must be {list(shape)}"
        for name, shape in wanted.items()
        if name in ours and ours[name].shape != shape
    ]
    if problems:
        raise ConversionError(problems)
    return ours


def _half(name: str, lower: int) -> str:
    """The name of a decoder's weight in a Block Transformer whose block decoder has the `lower` layers."""
    parts = name.split(".")
    if parts[0] != "layers":
        return f"token_decoder.{name}"
    layer = int(parts[1])
    stack, number = ("block_decoder", layer) if layer < lower else ("token_decoder", layer - lower)
    return ".".join((stack, "layers", str(number), *parts[2:]))
