"""GPT-NeoX (Pythia) under our names: what its config.json says, and its weights.

GPT-NeoX keeps queries, keys and values in one matrix, head by head. Ours are apart, so that layers can share keys and
values.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .config import ArchConfig, ModelConfig, SizeConfig, StoreConfig, from_dict
from .convert import SIZES, ConversionError, UnsupportedModelError, bad_sizes
from .decoder import Decoder
from .plan import resolve_stack

OUTER_MODULES = {
    "gpt_neox.embed_in": "embed",
    "gpt_neox.final_layer_norm": "norm",
    "embed_out": "lm_head",
}
LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.dense": "reader.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = "attention.query_key_value"
ATTENTION = ("reader.q_proj", "writer.k_proj", "writer.v_proj")
# Buffers of old checkpoints, made again from the configuration: masks and rotary frequencies.
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
# Of a GPTNeoXForCausalLM of transformers 5 in memory; its files have the old name.
RENAMED = {"lm_head.weight": "embed_out.weight"}

# What a config.json says that lacks the key, and what those keys must be that our style does not leave open.
DEFAULTS: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
NEUTRAL = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "rope_scaling": None,
    "quantization_config": None,
}
NEOX_SIZES = SIZES | {"norm_eps": "layer_norm_eps"}


def neox_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model in style neox that the config.json `hf` of a GPTNeoXForCausalLM describes.

    Raises UnsupportedModelError with every key that says something else, LayoutError where the widths are impossible.
    """
    values = DEFAULTS | dict(hf)
    problems = [
        f"{key} is {values[key]!r}; it must be {value!r}"
        for key, value in NEUTRAL.items()
        if values.get(key) not in (None, value)
    ]
    theta = _rope_theta(values, problems)
    problems += bad_sizes(values, tuple(NEOX_SIZES.values()))
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {ours: values[theirs] for ours, theirs in NEOX_SIZES.items()}
    arch = ArchConfig({"kv": StoreConfig(kv_heads="all")}, ["new kv"])
    config = ModelConfig(arch, from_dict(SizeConfig, sizes | {"rope_theta": theta, "style": "neox"}))
    resolve_stack(config)
    return config


def _rope_theta(values: Mapping[str, Any], problems: list[str]) -> float:
    """The rotary base. Adds to `problems` whatever does not rotate the first quarter of each head, unscaled."""
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters is {rope!r}; it must be unscaled, and the same in all layers")
        return 1.0
    old = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    wanted = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    names = {key: f"rope_parameters.{key}" if key in rope else old[key] for key in old}
    given = {key: rope.get(key, values.get(old[key], wanted[key])) for key in old}
    share, theta = given["partial_rotary_factor"], given["rope_theta"]
    if share != 0.25:
        problems.append(f"{names['partial_rotary_factor']} is {share!r}; it must be 0.25")
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        problems.append(f"{names['rope_theta']} is {theta!r}; it must be a positive number")
    return theta  # type: ignore[no-any-return]


def neox_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every weight of the GPTNeoXForCausalLM that is a Decoder of `config`."""
    outer, layers = ({ours: theirs for theirs, ours in names.items()} for names in (OUTER_MODULES, LAYER_MODULES))
    with torch.device("meta"):
        parameters = Decoder(config).named_parameters()
    shapes = {}
    for name, parameter in parameters:
        module, _, kind = name.rpartition(".")
        if module in outer:
            shapes[f"{outer[module]}.{kind}"] = parameter.shape
            continue
        _, layer, part = module.split(".", 2)
        theirs, rows = (FUSED, 3 * len(parameter)) if part in ATTENTION else (layers[part], len(parameter))
        shapes[f"gpt_neox.layers.{layer}.{theirs}.{kind}"] = torch.Size((rows, *parameter.shape[1:]))
    return shapes


def from_neox(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The state of a Decoder in style neox, from that of a GPTNeoXForCausalLM with `num_heads` heads, or from a part.

    Raises ConversionError with every name that it does not know; what is missing shows when the state is loaded.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = RENAMED.get(name, name).rpartition(".")
        prefix, _, rest = module.partition("gpt_neox.layers.")
        number, _, part = rest.partition(".")
        if module in OUTER_MODULES:
            ours[f"{OUTER_MODULES[module]}.{kind}"] = tensor
        elif not prefix and part in LAYER_MODULES:
            ours[f"layers.{number}.{LAYER_MODULES[part]}.{kind}"] = tensor
        elif not prefix and part == FUSED:
            fused = rearrange(tensor, "(n three h) ... -> three (n h) ...", n=num_heads, three=3)
            ours |= {f"layers.{number}.{o}.{kind}": t for o, t in zip(ATTENTION, fused.unbind(), strict=True)}
        elif not name.endswith(BUFFERS):
            unknown.append(f"{name} is unexpected")
    if unknown:
        raise ConversionError(unknown)
    return ours
