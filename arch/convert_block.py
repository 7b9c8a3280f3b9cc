"""Weights for a Block Transformer: of the authors' code, of RoBERTa, and of a decoder that is to become one."""

from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor

from .block_plan import block_config, embed_dim, split_config
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
# Of RoBERTa: its module, ours.
ENCODER_MODULES = {"embeddings.word_embeddings": "embed", "embeddings.LayerNorm": "encoder.norm"}
ENCODER_LAYER_MODULES = {
    "attention.self.query": "q_proj",
    "attention.self.key": "k_proj",
    "attention.self.value": "v_proj",
    "attention.output.dense": "o_proj",
    "attention.output.LayerNorm": "attn_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_norm",
}
# Tables that we add up to one; RoBERTa's positions count from the one after its padding token, 1.
ENCODER_TABLES = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
FIRST_POSITION = 2
ENCODER_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # of old checkpoints
UNUSED = "block_decoder.gpt_neox.embed_in.weight"  # in the authors' state, never read


def from_roberta(tensors: Mapping[str, Tensor], length: int, cls_tokens: int = 0) -> dict[str, Tensor]:
    """The state of the embedder of blocks of `length`, but for its linear map, from that of a RobertaModel.

    Its CLS tokens are token 0. Exact for blocks without token 1: RoBERTa's padding, which has no position whatever
    the mask. Raises as `from_neox`.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        number, _, part = module.removeprefix("encoder.layer.").partition(".")
        if module in ENCODER_MODULES:
            ours[f"{ENCODER_MODULES[module]}.{kind}"] = tensor
        elif module.startswith("encoder.layer.") and part in ENCODER_LAYER_MODULES:
            ours[f"encoder.layers.{number}.{ENCODER_LAYER_MODULES[part]}.{kind}"] = tensor
        elif name not in ENCODER_TABLES + ENCODER_BUFFERS:
            unknown.append(f"{name} is unexpected")
    unknown += [f"{name} is missing" for name in ENCODER_TABLES if name not in tensors]
    if unknown:
        raise ConversionError(unknown)
    position, kind_of_token = (tensors[name] for name in ENCODER_TABLES)
    position = position[FIRST_POSITION : FIRST_POSITION + cls_tokens + length] + kind_of_token[0]
    cls = tensors["embeddings.word_embeddings.weight"][0]
    ours["encoder.position.weight"] = torch.cat((position[:cls_tokens] + cls, position[cls_tokens:]))
    return ours


def from_official(
    tensors: Mapping[str, Tensor], block_heads: int, token_heads: int, length: int = 4, cls_tokens: int = 0
) -> dict[str, Tensor]:
    """The state of a BlockTransformer in style neox, from that of the authors' (itsnamgyu/block-transformer).

    `length` and `cls_tokens`: of an embedder that is an encoder. Raises as `from_neox`.
    """
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {"block_decoder.": {}, "token_decoder.": {}, "": {}}  # "": what is unknown
    encoder = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ADAPTERS and tensor.ndim == 3:  # a convolution whose kernel is the block, or 1
            ours[f"{ADAPTERS[module]}.{kind}"] = rearrange(tensor, "o i l -> o (l i)")
        elif module in ADAPTERS:
            ours[f"{ADAPTERS[module]}.{kind}"] = tensor
        elif name.startswith("embedder."):
            encoder[name.removeprefix("embedder.")] = tensor
        elif name != UNUSED:
            prefix = next(prefix for prefix in stacks if name.startswith(prefix))
            stacks[prefix][name.removeprefix(prefix)] = tensor
    for (prefix, stack), heads in zip(stacks.items(), (block_heads, token_heads, 1), strict=True):
        ours |= {f"{prefix}{name}": tensor for name, tensor in from_neox(stack, heads).items()}
    if encoder:
        ours |= {f"embedder.{name}": tensor for name, tensor in from_roberta(encoder, length, cls_tokens).items()}
    return ours


def from_vanilla(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the Block Transformer of `config`, from that of a Decoder of the same size: where uptraining starts.

    The lower layers become the block decoder, the upper ones the token decoder, which has the norm and the output
    matrix too. Every table of embeddings is the decoder's. A block is the mean of its tokens' embeddings, each vector
    of its expanded context is that context. What the decoder has no counterpart of is as in a new model: the block
    decoder's norm, and a start context, which is zero (Block Transformer, appendix P).

    Raises ConversionError with every part of `config` that these weights cannot fill.
    """
    block, (coarse, fine) = block_config(config), split_config(config)
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
