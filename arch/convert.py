"""To and from the stock Hugging Face classes: their config.json, and every weight under both names.

grouped heads, no window       LlamaForCausalLM (MistralForCausalLM where Llama's config refuses the widths)
grouped heads, one window size MinistralForCausalLM, each layer sliding or full
latent                         DeepseekV3ForCausalLM, dense layers and uncompressed queries

Import (hf_import.py) reads MistralForCausalLM too. What a class on the other side cannot hold exactly is refused, never
approximated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .config import (
    STYLE_KEYS,
    STYLES,
    ArchConfig,
    LatentConfig,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    from_dict,
    head_dim,
    style_of,
)
from .decoder import Decoder
from .plan import KVPlan, resolve_stack

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}

# What a config.json says that lacks the key: the defaults of the stock classes.
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "layer_types": None,
}
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": MISTRAL_DEFAULTS,
    "ministral": MISTRAL_DEFAULTS,
    "deepseek_v3": {"num_key_value_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 3},
}
# Keys that, where present, must have the one value under which the stock class computes what ours does.
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "per_layer_config": None,
}
# Our size, their key.
SIZES = {
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
WIDEST = 2**20  # of anything that a weight is wide; what says more is no model, and its weights could not be counted
LATENT_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
OPTIONAL_WIDTHS = ("num_key_value_heads", "head_dim", "sliding_window")
# Our module, theirs: of the model, and of one layer.
MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "kv_norm": "kv_layernorm",
    "reader": "self_attn",
    "reader.q_proj": "self_attn.q_proj",
    "writer.k_proj": "self_attn.k_proj",
    "writer.v_proj": "self_attn.v_proj",
    "writer.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "writer.latent_norm": "self_attn.kv_a_layernorm",
    "reader.kv_up_proj": "self_attn.kv_b_proj",
    "reader.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. The message lists every problem found."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))


class UnsupportedModelError(ConversionError):
    """A model that nothing on the other side computes exactly."""


@dataclass(frozen=True)
class Weight:
    """One tensor under both names. Its shape is the same on both sides.

    `rotary`: the rows come in heads of (plain, rotated) rows, and the P rotated ones are ordered differently: we turn
    row i against row i + P/2 (half-split), they turn row 2i against row 2i + 1 (interleaved).
    """

    ours: str
    theirs: str
    shape: torch.Size
    rotary: tuple[int, int] | None = None

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Our tensor as theirs; itself where the order is the same."""
        return self._reorder(tensor, "g (two p) d -> g (p two) d")

    def from_hf(self, tensor: Tensor) -> Tensor:
        """Their tensor as ours, the inverse of `to_hf`."""
        return self._reorder(tensor, "g (p two) d -> g (two p) d")

    def _reorder(self, tensor: Tensor, order: str) -> Tensor:
        if self.rotary is None:
            return tensor
        heads, plain = rearrange(tensor, "(g h) d -> g h d", h=sum(self.rotary)), self.rotary[0]
        heads = torch.cat((heads[:, :plain], rearrange(heads[:, plain:], order, two=2)), dim=1)
        return rearrange(heads, "g h d -> (g h) d")


def hf_config(config: ModelConfig, plan: KVPlan) -> dict[str, Any]:
    """The config.json of the stock class that computes exactly what a Decoder of `config` does.

    It names no tensor type, and no special token: the stock defaults would end a generation at token 2. Raises
    UnsupportedModelError with everything that no stock class holds.
    """
    reasons = _not_stock(plan)
    reasons += not_llama(config.size)
    hf = {} if reasons else _stock_config(config.size, plan)
    # What the reasons above do not know of would be lost in silence.
    if not reasons and _layout(resolve_stack(model_config(hf))) != _layout(plan):
        reasons = [f"layout: {ARCHITECTURES[hf['model_type']]} comes closest and does something else"]
    if reasons:
        raise UnsupportedModelError(reasons)
    return hf


def not_llama(size: SizeConfig) -> list[str]:
    """The style of `size` as a reason against an export, unless it is the llama preset."""
    if style_of(size) == STYLES["llama"]:
        return []
    own = [f"{key} {getattr(size, key)}" for key in STYLE_KEYS if getattr(size, key) is not None]
    return [f"size.style: {', '.join([size.style, *own])} is not exported"]


def _layout(plan: KVPlan) -> KVPlan:
    """`plan` without the names of its stores, which compute nothing."""
    return replace(plan, stores=tuple(replace(store, name="") for store in plan.stores))


def _stock_config(size: SizeConfig, plan: KVPlan) -> dict[str, Any]:
    """The config.json of a plan whose layers differ in nothing but having the window or not."""
    slot, theta = plan.stores[0].slot, plan.stores[0].rope_theta
    windows = [plan.store(layer).window for layer in range(plan.num_layers)]
    own: dict[str, Any] = {"num_key_value_heads": slot.kv_heads, "head_dim": slot.k_dim}
    if slot.latent_dim:
        model_type = "deepseek_v3"
        own = {
            "num_key_value_heads": size.num_heads,
            "head_dim": slot.rope_dim,  # what its rotary tables are made for
            "kv_lora_rank": slot.latent_dim,
            "q_lora_rank": None,
            "qk_rope_head_dim": slot.rope_dim,
            "qk_nope_head_dim": head_dim(size),
            "v_head_dim": head_dim(size),
            "rope_interleave": True,  # the stock default; some engines read no other order
            "first_k_dense_replace": plan.num_layers,
            "num_nextn_predict_layers": 0,
            "attention_bias": False,
        }
    elif any(windows):
        model_type = "ministral"
        own["sliding_window"] = max(window for window in windows if window)
        own["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    elif size.d_model % size.num_heads:  # refused by Llama's config, although its modules would do
        model_type = "mistral"
        own["sliding_window"] = None
    else:
        model_type = "llama"
        own |= {"attention_bias": False, "mlp_bias": False}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{theirs: getattr(size, ours) for ours, theirs in SIZES.items()},
        **own,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,  # for readers older than rope_parameters
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _not_stock(plan: KVPlan) -> list[str]:
    """What of `plan` no stock class holds."""

    def stores(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(names))

    reasons = []
    readers = [layer for layer, owner in enumerate(plan.owners) if owner != layer]
    if readers:
        layers = ", ".join(map(str, readers))
        reasons.append(f"sharing: layers {layers} read what an earlier layer wrote; stock layers each write their own")
    if any(store.sinks for store in plan.stores):
        reasons.append(f"sinks: {stores([s.name for s in plan.stores if s.sinks])} has attention sinks")
    if any(store.num_slots for store in plan.stores):
        names = stores([s.name for s in plan.stores if s.num_slots])
        reasons.append(f"slots: {names} is bounded; stock caches merge nothing")
    if any(store.kv_norm for store in plan.stores):
        reasons.append(f"kv_norm: {stores([s.name for s in plan.stores if s.kv_norm])} has a norm of its own")
    if any(store.window and store.slot.latent_dim for store in plan.stores):
        reasons.append("window: latents are kept whole in the stock DeepSeek classes")
    if len({store.slot for store in plan.stores}) > 1:
        reasons.append(f"kv_heads, latent: {stores([s.name for s in plan.stores])} hold slots of different shapes")
    windows = sorted({store.window for store in plan.stores if store.window})
    if len(windows) > 1:
        reasons.append(f"window: windows of {', '.join(map(str, windows))}; a stock class has one size")
    if 1 in windows:
        reasons.append("window: the stock cache does not drop positions for a window of 1")
    thetas = sorted({store.rope_theta for store in plan.stores})
    if len(thetas) > 1:
        reasons.append(f"rope_theta: bases of {', '.join(map(str, thetas))}; the stock classes have one")
    return reasons


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that the config.json `hf` describes; `seq_len` is its `max_position_embeddings`.

    Raises UnsupportedModelError with every key that says what a Decoder cannot do, and LayoutError where the widths are
    impossible.
    """
    model_type = str(hf.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError([f"model_type is {model_type!r}; it must be one of {', '.join(ARCHITECTURES)}"])
    values = DEFAULTS | OWN_DEFAULTS[model_type] | dict(hf)
    latent = model_type == "deepseek_v3"
    problems = [
        f"{key} is {values[key]!r}; it must be {value!r}"
        for key, value in (NEUTRAL | {"architectures": [ARCHITECTURES[model_type]]}).items()
        if values.get(key) not in (None, value)
    ]
    theta = _rope_theta(values, problems)
    bad = bad_sizes(values, (*SIZES.values(), *(LATENT_WIDTHS if latent else ())), OPTIONAL_WIDTHS)
    if bad:
        raise UnsupportedModelError(problems + bad)
    arch, width = (_latent_layout if latent else _grouped_layout)(values, problems)
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {ours: values[theirs] for ours, theirs in SIZES.items()}
    config = ModelConfig(arch, from_dict(SizeConfig, sizes | {"head_dim": width, "rope_theta": theta}))
    resolve_stack(config)
    return config


def bad_sizes(values: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """What is wrong with the sizes of a config.json; those that are `optional` may be null."""
    found = []
    for key in (*needed, *optional):
        value, most = values.get(key), 2**40 if key == "max_position_embeddings" else WIDEST
        if value is None:
            found += [] if key in optional else [f"{key} is missing"]
        elif key == "tie_word_embeddings":
            found += [] if type(value) is bool else [f"{key} is {value!r}; it must be true or false"]
        elif key.endswith(("_eps", "_range")):
            fits = type(value) in (int, float) and 0 < value < math.inf
            found += [] if fits else [f"{key} is {value!r}; it must be a positive number"]
        elif type(value) is not int or not 1 <= value <= most:
            found.append(f"{key} is {value!r}; it must be a whole number from 1 to {most}")
    return found


def _rope_theta(values: dict[str, Any], problems: list[str]) -> float:
    """The rotary base, from where the stock classes look for it. Adds to `problems` what scales or splits rotation."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(key) or {}
    if not isinstance(rope, dict):
        problems.append(f"{key} is {rope!r}; it must be a mapping")
        return 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        problems.append(f"{key} is {rope!r}; it must be unscaled, and the same in all layers")
    elif rope.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(f"{key}.partial_rotary_factor is {rope['partial_rotary_factor']}; it must be 1.0")
    theta = rope.get("rope_theta", values["rope_theta"])
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        problems.append(f"rope_theta is {theta!r}; it must be a positive number")
    return theta  # type: ignore[no-any-return]


def _latent_layout(values: dict[str, Any], problems: list[str]) -> tuple[ArchConfig, int]:
    """The layout and head width of a DeepSeek-V3 config. Adds to `problems` what is not ours."""
    depth, width, rotary = (values[key] for key in ("num_hidden_layers", "qk_nope_head_dim", "qk_rope_head_dim"))
    wanted = {
        "v_head_dim": (width, "qk_nope_head_dim"),
        "num_key_value_heads": (values["num_attention_heads"], "num_attention_heads"),
        "head_dim": (rotary, "qk_rope_head_dim"),
    }
    for key, (value, reason) in wanted.items():
        if values[key] not in (None, value):
            problems.append(f"{key} is {values[key]}; it must be {value} like {reason}")
    dense = values["first_k_dense_replace"]
    if type(dense) is not int or dense < depth:
        problems.append(f"first_k_dense_replace is {dense}; it must be {depth}, all layers dense")
    for key in ("sliding_window", "layer_types"):
        if values[key] is not None:
            problems.append(f"{key} is {values[key]!r}; with latents it must be None")
    latent = LatentConfig(dim=values["kv_lora_rank"], rope_dim=rotary)
    return ArchConfig({"latent": StoreConfig(latent=latent)}, ["new latent"]), width


def _grouped_layout(values: dict[str, Any], problems: list[str]) -> tuple[ArchConfig, int]:
    """The layout and head width of a Llama, Mistral or Ministral config. Adds to `problems` what is not ours."""
    heads, depth, window = values["num_attention_heads"], values["num_hidden_layers"], values["sliding_window"]
    names = {"full_attention": "global", "sliding_attention": "local"}
    uniform = "full_attention" if window is None else "sliding_attention"
    given = [uniform] * depth if values["layer_types"] is None else values["layer_types"]
    types = list(map(str, given)) if isinstance(given, list) else []
    if values["model_type"] == "llama" and window is not None:
        problems.append(f"sliding_window is {window}; Llama has no windows, so it must be None")
    allowed = list(names) if values["model_type"] == "ministral" else [uniform]
    if len(types) != depth or not set(types) <= set(allowed):
        problems.append(f"layer_types is {given!r}; it must be {depth} times {' or '.join(allowed)}")
    elif window is None and "sliding_attention" in types:
        problems.append("sliding_window is None; it must be a number, since layer_types has sliding layers")
    if values["head_dim"] is None and values["hidden_size"] % heads:
        problems.append(f"head_dim is missing, and hidden_size {values['hidden_size']} is no multiple of {heads} heads")
    kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    windows = {"full_attention": None, "sliding_attention": window}
    stores = {names[kind]: StoreConfig(kv_heads=kv_heads, window=windows[kind]) for kind in names if kind in types}
    pattern = [f"new {names.get(kind)}" for kind in types]
    width = values["hidden_size"] // heads if values["head_dim"] is None else values["head_dim"]
    return ArchConfig(stores, pattern if len(stores) > 1 else pattern[:1]), width


def weight_map(config: ModelConfig, hf: Mapping[str, Any]) -> list[Weight]:
    """Every weight of a Decoder of `config` and of the class on the other side that the config.json `hf` describes.

    One weight is one tensor on either side, so that a checkpoint can be converted tensor by tensor.
    """
    slot = resolve_stack(config).stores[0].slot
    rotary: dict[str, tuple[int, int]] = {}
    if slot.latent_dim and hf.get("rope_interleave", True):
        rotary["reader.q_proj"] = (head_dim(config.size), slot.rope_dim)
        rotary["writer.kv_down_proj"] = (slot.latent_dim, slot.rope_dim)
    with torch.device("meta"):
        parameters = Decoder(config).named_parameters()
    table = []
    for name, parameter in parameters:
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            theirs = MODULES[module]
        else:
            _, layer, module = module.split(".", 2)
            theirs = f"model.layers.{layer}.{LAYER_MODULES[module]}"
        table.append(Weight(name, f"{theirs}.{kind}", parameter.shape, rotary.get(module)))
    return table


def to_hf(config: ModelConfig, plan: KVPlan, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Decoder of `config` for the stock class of `hf_config`. Tied embeddings are there once.

    Tensors whose rows keep their order are those of `state_dict`, not copies. Raises as `hf_config` does, and
    ConversionError with every tensor that is missing, unexpected or of another shape.
    """
    return weights_to_hf(config, hf_config(config, plan), state_dict)


def weights_to_hf(config: ModelConfig, hf: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `to_hf`, for the class that the config.json `hf` describes."""
    table = {weight.ours: weight for weight in weight_map(config, hf)}
    problems = [f"{name} is missing" for name in table if name not in state_dict]
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name not in table:
            problems.append(f"{name} is unexpected")
        elif tensor.shape != table[name].shape:
            problems.append(f"{name} has the shape {list(tensor.shape)}; it must be {list(table[name].shape)}")
        else:
            converted[table[name].theirs] = table[name].to_hf(tensor)
    if problems:
        raise ConversionError(problems)
    return converted
