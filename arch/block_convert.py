"""Weights of GPT-NeoX, as a decoder or as the two stacks of the authors' Block Transformer, under our names.

GPT-NeoX keeps queries, keys and values in one matrix, head by head. Ours are apart, so that layers can share keys and
values.
"""

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from .convert import ConversionError

OUTER_MODULES = {
    "gpt_neox.embed_in": "embed",
    "gpt_neox.final_layer_norm": "norm",
    "embed_out": "lm_head",
    "lm_head": "lm_head",  # of transformers 5
}
LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.dense": "reader.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
ATTENTION = ("reader.q_proj", "writer.k_proj", "writer.v_proj")
# Of the authors' state: their module, ours.
ADAPTERS = {
    "embedder.embeddings": "embedder.embed",
    "embedder.projection_layer": "embedder.proj",
    "token_decoder.expansion_layer": "expansion",
}
# Buffers of old checkpoints, made again from the configuration: masks and rotary frequencies.
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
UNUSED = "block_decoder.gpt_neox.embed_in.weight"  # in the authors' state, never read


def from_neox(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The state of a Decoder in style neox, from that of a GPTNeoXForCausalLM with `num_heads` heads.

    Raises ConversionError with every name that it does not know; what is missing shows when the state is loaded.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        prefix, _, rest = module.partition("gpt_neox.layers.")
        number, _, part = rest.partition(".")
        if module in OUTER_MODULES:
            ours[f"{OUTER_MODULES[module]}.{kind}"] = tensor
        elif not prefix and part in LAYER_MODULES:
            ours[f"layers.{number}.{LAYER_MODULES[part]}.{kind}"] = tensor
        elif not prefix and part == "attention.query_key_value":
            fused = rearrange(tensor, "(n three h) ... -> three (n h) ...", n=num_heads, three=3)
            ours |= {f"layers.{number}.{o}.{kind}": t for o, t in zip(ATTENTION, fused.unbind(), strict=True)}
        elif not name.endswith(BUFFERS):
            unknown.append(f"{name} is unexpected")
    if unknown:
        raise ConversionError(unknown)
    return ours


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
