"""Import of GPT-NeoX (Pythia): its config.json, and every weight under both names.

GPT-NeoX keeps queries, keys and values in one matrix, head by head. Here they are apart, so that layers can share keys
and values.
"""

from collections.abc import Mapping
from typing import Any

from .config import ArchConfig, ModelConfig, SizeConfig, StoreConfig, from_dict
from .convert import (
    SIZE_KEYS,
    UnsupportedModelError,
    Weight,
    is_positive,
    parameter_shapes,
    size_problems,
    value_problems,
)
from .plan import resolve_stack

MODEL_TYPE = "gpt_neox"
# Module of a Decoder, module of GPT-NeoX: of the model, and of one layer.
MODULES = {
    "embed": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "reader.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
FUSED_MODULE = "attention.query_key_value"
FUSED_PARTS = ("reader.q_proj", "writer.k_proj", "writer.v_proj")
TIED = ("embed_out.weight", "gpt_neox.embed_in.weight")

# The stock class's values of keys that a config.json lacks.
DEFAULTS: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
# Keys that, if present, must have the one value that style neox has.
REQUIRED_VALUES = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "rope_scaling": None,
    "quantization_config": None,
}
NEOX_SIZE_KEYS = SIZE_KEYS | {"norm_eps": "layer_norm_eps"}


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model in style neox that the config.json `hf` of a GPTNeoXForCausalLM describes.

    Raises UnsupportedModelError with every key whose value style neox does not have, and LayoutError if the widths
    are impossible.
    """
    values = DEFAULTS | dict(hf)
    problems = value_problems(values, REQUIRED_VALUES)
    theta = _rope_theta(values, problems)
    problems += size_problems(values, tuple(NEOX_SIZE_KEYS.values()))
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {key: values[hf_key] for key, hf_key in NEOX_SIZE_KEYS.items()}
    arch = ArchConfig({"kv": StoreConfig(kv_heads="all")}, ["new kv"])
    config = ModelConfig(arch, from_dict(SizeConfig, sizes | {"rope_theta": theta, "style": "neox"}))
    resolve_stack(config)
    return config


def _rope_theta(values: Mapping[str, Any], problems: list[str]) -> float:
    """Return the rotary base; appends to `problems` unless the first quarter of each head is rotated, unscaled."""
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters is {rope!r}; it must be unscaled, and the same in all layers")
        return 1.0
    old_keys = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    defaults = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    names = {key: f"rope_parameters.{key}" if key in rope else old for key, old in old_keys.items()}
    settings = {key: rope.get(key, values.get(old, defaults[key])) for key, old in old_keys.items()}
    fraction, theta = settings["partial_rotary_factor"], settings["rope_theta"]
    if fraction != 0.25:
        problems.append(f"{names['partial_rotary_factor']} is {fraction!r}; it must be 0.25")
    if not is_positive(theta):
        problems.append(f"{names['rope_theta']} is {theta!r}; it must be a positive number")
    return theta  # type: ignore[no-any-return]


def weights(config: ModelConfig, hf: Mapping[str, Any]) -> list[Weight]:
    """Every parameter of a Decoder of `config`, with its tensor in a GPTNeoXForCausalLM."""
    table = []
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            table.append(Weight(name, f"{MODULES[module]}.{kind}", shape))
            continue
        _, layer, module = module.split(".", 2)
        fused = (FUSED_PARTS.index(module), config.size.num_heads) if module in FUSED_PARTS else None
        hf_module = FUSED_MODULE if fused else LAYER_MODULES[module]
        table.append(Weight(name, f"gpt_neox.layers.{layer}.{hf_module}.{kind}", shape, fused=fused))
    return table
