"""Conversions that only tests need: whole state dicts, in memory, from and to other projects' models."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from arch import ModelConfig
from arch.convert import BUFFERS, ConversionError, StateDict, tensor_problems
from arch.convert_formats import FORMATS, ImportedTensors, read_config
from arch.convert_neox import FUSED_MODULE, FUSED_PARTS, LAYER_MODULES, MODULES


def from_hf(hf: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model that the config.json `hf` describes, and the weights `tensors` for it."""
    model = read_config(hf)
    reader = ImportedTensors(model, StateDict(tensors))
    return model.config, {name: reader.get(name) for name in reader.shapes}


def to_hf(target: str, config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model of `config` in the format `target`. Tied embeddings are there once."""
    _, weights = FORMATS[target].to_hf(config)
    problems = tensor_problems({weight.name: weight.shape for weight in weights}, StateDict(state_dict).shapes)
    if problems:
        raise ConversionError(problems)
    return {weight.hf_name: weight.to_hf(state_dict[weight.name]) for weight in weights}


# A GPTNeoXForCausalLM of transformers 5 in memory; its files have the old name.
RENAMED = {"lm_head.weight": "embed_out.weight"}


def from_neox(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The state of a Decoder in style neox, from that of a GPTNeoXForCausalLM with `num_heads` heads, or from a part.

    Raises ConversionError with every name that it does not know; what is missing shows when the state is loaded.
    """
    outer, layers = ({theirs: ours for ours, theirs in table.items()} for table in (MODULES, LAYER_MODULES))
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = RENAMED.get(name, name).rpartition(".")
        prefix, _, rest = module.partition("gpt_neox.layers.")
        number, _, part = rest.partition(".")
        if module in outer:
            ours[f"{outer[module]}.{kind}"] = tensor
        elif not prefix and part in layers:
            ours[f"layers.{number}.{layers[part]}.{kind}"] = tensor
        elif not prefix and part == FUSED_MODULE:
            fused = rearrange(tensor, "(n three h) ... -> three (n h) ...", n=num_heads, three=3)
            ours |= {f"layers.{number}.{o}.{kind}": t for o, t in zip(FUSED_PARTS, fused.unbind(), strict=True)}
        elif not name.endswith(BUFFERS):
            unknown.append(f"{name} is unexpected")
    if unknown:
        raise ConversionError(unknown)
    return ours


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
