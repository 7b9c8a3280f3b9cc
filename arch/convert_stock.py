"""The stock Hugging Face classes: their config.json, and every weight under both names.

grouped heads, no window       LlamaForCausalLM (MistralForCausalLM where Llama's config refuses the widths)
grouped heads, one window size MinistralForCausalLM, each layer sliding or full
... and layers without rotation SmolLM3ForCausalLM
... and biases of Q, K and V   Qwen2ForCausalLM
... and norms of Q and K heads Qwen3ForCausalLM
... of all Q, K, and of outputs Olmo2ForCausalLM; with one window size Olmo3ForCausalLM
the style of Gemma 3           Gemma3ForCausalLM
latent                         DeepseekV3ForCausalLM, dense layers and uncompressed queries

Olmo3ForCausalLM and Gemma3ForCausalLM have a rotary base for full layers, and one for sliding ones. Import reads
MistralForCausalLM with a window, too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from .config import (
    STYLES,
    ArchConfig,
    LatentConfig,
    ModelConfig,
    RopeScalingConfig,
    SizeConfig,
    StoreConfig,
    Style,
    from_dict,
    head_dim,
    style_of,
)
from .convert import (
    MAX_SEQ_LEN,
    NO_SPECIAL_TOKENS,
    SIZE_KEYS,
    UnsupportedModelError,
    Weight,
    is_positive,
    parameter_shapes,
    size_problems,
    style_problems,
    value_problems,
)
from .latent_spec import LatentSpec
from .plan import KVPlan, resolve_stack
from .rope_scaling import yarn_attention
from .store_spec import StoreSpec
from .tied_spec import TiedSpec

# The class of each model_type.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Properties of the style llama that these classes have otherwise.
OLMO = {"norm_placement": "after", "qk_norm": "all"}
GEMMA3 = {"norm_placement": "both", "qk_norm": "head", "mlp": "geglu", "scale_embeddings": True}
OWN_STYLES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": OLMO,
    "olmo3": OLMO,
    "gemma3_text": GEMMA3,
}
# Classes that have windows where layer_types says so; `use_sliding_window` turns all of them off.
SWITCHED_WINDOWS = ("smollm3", "qwen2", "qwen3")
# Classes in which layers of each kind have rotations of their own, and, where no key says so, the kind of each layer:
# the last of so many is full.
ROTATED_BY_KIND = {"olmo3": 4, "gemma3_text": 6}
KINDS = {"full_attention": "global", "sliding_attention": "local"}
# Classes that no Decoder is, and why; `eval/footprint.py hf=` counts the cache of most.
REFUSED = {
    "gemma3": "vision_config, images: load its language model as Gemma3ForCausalLM and save that",
    "gemma4": "vision_config, images, and what gemma4_text has",
    "gemma4_text": (
        "values that are normed in every layer, layer_scalar, and as it says hidden_size_per_layer_input, "
        "num_kv_shared_layers, enable_moe_block and final_logit_softcapping: a Decoder has none of these"
    ),
    "gpt_oss": "num_local_experts, experts in every layer: a Decoder has none",
}

# The stock classes' values of keys that a config.json lacks.
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
SWITCHED_DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 28}
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": MISTRAL_DEFAULTS,
    "ministral": MISTRAL_DEFAULTS,
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "qwen2": SWITCHED_DEFAULTS,
    "qwen3": SWITCHED_DEFAULTS | {"head_dim": 128},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096},
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {"num_key_value_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 3},
}
# Keys that, if present, must have the one value for which the stock class and a Decoder compute the same.
REQUIRED_VALUES = {
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
GEMMA3_VALUES = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
# Rotary bases of sliding layers, where no key of rope_parameters has them: a key of config.json, and its default.
LOCAL_BASES = {"olmo3": ("", 500000.0), "gemma3_text": ("rope_local_base_freq", 10000.0)}
LATENT_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
OPTIONAL_WIDTHS = ("num_key_value_heads", "head_dim", "sliding_window")
# Rules of scaled rotations: fields of RopeScalingConfig, and their keys in rope_parameters.
SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": {"factor": "factor", "low": "beta_slow", "high": "beta_fast", "attention": "attention_factor"},
}
YARN_KEYS = {"linear": (), "llama3": (), "yarn": ("mscale", "mscale_all_dim", "truncate")}
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Tied embeddings: the tensor that may be there as a copy, and the one it is a copy of.
TIED = ("lm_head.weight", "model.embed_tokens.weight")
# Module of a Decoder, module of the stock class: of the model, and of one layer.
MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "kv_norm": "kv_layernorm",
    "reader": "self_attn",
    "reader.q_proj": "self_attn.q_proj",
    "reader.q_norm": "self_attn.q_norm",
    "writer.k_proj": "self_attn.k_proj",
    "writer.v_proj": "self_attn.v_proj",
    "writer.kv_proj": "self_attn.kv_proj",
    "writer.k_norm": "self_attn.k_norm",
    "writer.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "writer.latent_norm": "self_attn.kv_a_layernorm",
    "reader.kv_up_proj": "self_attn.kv_b_proj",
    "reader.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
# Of classes that norm outputs.
OUTPUT_NORMS = {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


class Rotation(NamedTuple):
    """Base of a rotation, and how its frequencies are slowed down."""

    theta: float
    scaling: RopeScalingConfig | None = None


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the stock class that computes exactly what a Decoder of `config` does.

    It names no tensor type and no special token. Raises UnsupportedModelError with everything that no stock class
    holds, and LayoutError where the layout is impossible.
    """
    if config.arch.block is not None:
        raise UnsupportedModelError(["block: a Block Transformer is two decoders; a stock class is one"])
    plan = resolve_stack(config)
    problems = _unsupported(plan) + _rope_problems(config.size, plan) + _style_problems(config.size, plan)
    hf = {} if problems else _stock_config(config.size, plan)
    # A property that `_unsupported` does not know would be lost in silence.
    if not problems and _without_names(resolve_stack(from_hf_config(hf))) != _without_names(plan):
        problems = [f"layout: {ARCHITECTURES[hf['model_type']]} comes closest and does something else"]
    if problems:
        raise UnsupportedModelError(problems)
    return hf


def _own_style(model_type: str) -> Style:
    return replace(STYLES["llama"], **OWN_STYLES.get(model_type, {}))


def _style_problems(size: SizeConfig, plan: KVPlan) -> list[str]:
    """The style of `size` as a reason against every stock class, or against that which has it."""
    problems = style_problems(size, [_own_style(model_type) for model_type in ARCHITECTURES])
    if problems or style_of(size) == STYLES["llama"]:
        return problems
    model_type = _types_of(size)[-1]
    if any(store.kind != "grouped" or store.rotary_dim is not None for store in plan.stores):
        own = ", ".join(f"{key} {value}" for key, value in OWN_STYLES[model_type].items())
        problems.append(f"size.style: {own} is {ARCHITECTURES[model_type]}, whose layers rotate keys per head")
    if model_type in ROTATED_BY_KIND and size.d_model % size.num_heads:
        problems.append(f"size.d_model: {ARCHITECTURES[model_type]} takes a multiple of the query heads")
    elif model_type == "olmo3" and head_dim(size) != size.d_model // size.num_heads:
        problems.append(f"size.head_dim: {ARCHITECTURES[model_type]} has d_model / num_heads")
    return problems


def _types_of(size: SizeConfig) -> list[str]:
    """Every model_type that has the style of `size`, unless that is Llama's."""
    return [model_type for model_type in OWN_STYLES if _own_style(model_type) == style_of(size)]


def _by_kind(plan: KVPlan) -> dict[str, list[StoreSpec]]:
    """The stores that layers of each kind read, full and sliding ones, of those that are rotated."""
    return {
        kind: [store for store in plan.stores if store.rope_theta and (store.window is not None) == sliding]
        for kind, sliding in (("full_attention", False), ("sliding_attention", True))
    }


def _rope_problems(size: SizeConfig, plan: KVPlan) -> list[str]:
    """Rotations that differ where the stock classes have one."""
    kinds = list(_by_kind(plan).values())
    each = any(model_type in ROTATED_BY_KIND for model_type in _types_of(size))
    groups = kinds if each else [list(chain(*kinds))]
    have, problems = "one for each kind of layer" if each else "one", []
    if any(len({store.rope_theta for store in stores}) > 1 for stores in groups):
        thetas = sorted({store.rope_theta for stores in groups for store in stores})
        problems.append(f"rope_theta: bases of {', '.join(map(str, thetas))}; the stock classes have {have}")
    if any(len({store.rope_scaling for store in stores}) > 1 for stores in groups):
        problems.append(f"rope_scaling: layers scale their rotation differently; the stock classes have {have}")
    return problems


def _without_names(plan: KVPlan) -> KVPlan:
    """`plan` without the names of its stores, which compute nothing."""
    return replace(plan, stores=tuple(replace(store, name="") for store in plan.stores))


def _stock_config(size: SizeConfig, plan: KVPlan) -> dict[str, Any]:
    """Return the config.json of a plan whose layers differ only in whether they have the window."""
    slot = plan.stores[0].slot
    windows = [plan.store(layer).window for layer in range(plan.num_layers)]
    types = _types_of(size)
    layout: dict[str, Any] = {"num_key_value_heads": slot.kv_heads, "head_dim": slot.k_dim}
    if slot.latent_dim:
        model_type = "deepseek_v3"
        layout = {
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
    elif types and types[-1] in ROTATED_BY_KIND:
        model_type = "olmo2" if "olmo2" in types and not any(windows) else types[-1]
        layout |= {"attention_bias": False}
        if model_type != "olmo2":
            layout |= _window_keys(windows)
        if model_type == "gemma3_text":
            layout |= GEMMA3_VALUES | {"query_pre_attn_scalar": slot.k_dim}
            layout["sliding_window"] = layout["sliding_window"] or size.seq_len  # asked for also where no layer has one
        else:
            del layout["head_dim"]  # Olmo2Config has no such key
    elif types or any(store.rotary_dim == 0 for store in plan.stores):
        model_type = types[0] if types else "smollm3"
        layout |= _window_keys(windows) | {"use_sliding_window": any(windows), "max_window_layers": plan.num_layers}
        if model_type == "smollm3":
            del layout["max_window_layers"]
            layout["no_rope_layers"] = [int(plan.store(i).rotary_dim != 0) for i in range(plan.num_layers)]
            layout |= {"attention_bias": False, "mlp_bias": False}
    elif any(windows):
        model_type = "ministral"
        layout |= _window_keys(windows)
    elif size.d_model % size.num_heads:  # refused by Llama's config, although its modules would do
        model_type = "mistral"
        layout["sliding_window"] = None
    else:
        model_type = "llama"
        layout |= {"attention_bias": False, "mlp_bias": False}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{hf_key: getattr(size, key) for key, hf_key in SIZE_KEYS.items()},
        **layout,
        **({} if "hidden_activation" in layout else {"hidden_act": "silu"}),
        "attention_dropout": 0.0,
        **_rope_keys(model_type, size, plan),
        **NO_SPECIAL_TOKENS,
    }


def _rope_keys(model_type: str, size: SizeConfig, plan: KVPlan) -> dict[str, Any]:
    """Return the keys of rotary embeddings, with those for readers older than rope_parameters."""
    kinds = _by_kind(plan)
    ropes = {kind: rope_parameters(next(iter(stores), None), size) for kind, stores in kinds.items()}
    rope = ropes["full_attention" if kinds["full_attention"] or model_type in ROTATED_BY_KIND else "sliding_attention"]
    keys: dict[str, Any] = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if model_type in ROTATED_BY_KIND:
        keys["rope_parameters"] = ropes
        if local := LOCAL_BASES[model_type][0]:
            keys[local] = ropes["sliding_attention"]["rope_theta"]
    return keys


def rope_parameters(store: StoreSpec | None, size: SizeConfig) -> dict[str, Any]:
    """Return the rotation of `store`, or without one that of `size`, as transformers writes it."""
    if store is None or store.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": size.rope_theta if store is None else store.rope_theta}
    scaling = store.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.rule, "rope_theta": store.rope_theta}
    rope |= {key: getattr(scaling, ours) for ours, key in SCALING_KEYS[scaling.rule].items()}
    if scaling.rule != "linear":
        rope["original_max_position_embeddings"] = scaling.original
    return rope | ({"truncate": scaling.truncate} if scaling.rule == "yarn" else {})


def _divided(store: StoreSpec) -> bool:
    """Return whether a latent store is none of the stock classes."""
    return isinstance(store, LatentSpec) and (store.latents, store.key_dim) != (None, None)


def _window_keys(windows: list[int | None]) -> dict[str, Any]:
    """Return the keys that say which layers have a window, and its size."""
    return {
        "sliding_window": max((window for window in windows if window), default=None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _unsupported(plan: KVPlan) -> list[str]:
    """Every property of `plan` that no stock class has."""

    def names(stores: Iterable[StoreSpec]) -> str:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(store.name for store in stores))

    problems = []
    readers = [layer for layer, owner in enumerate(plan.owners) if owner != layer]
    if readers:
        layers = ", ".join(map(str, readers))
        problems.append(f"sharing: layers {layers} read what an earlier layer wrote; stock layers each write their own")
    if plan.reader_windows:
        problems.append(f"reader_windows: {own_windows_text(plan)}; stock layers see what they cache")
    if plan.second_reads:
        problems.append(f"second_reads: {second_reads_text(plan)}; stock layers each read what they wrote")
    if sinks := [store for store in plan.stores if store.sinks]:
        problems.append(f"sinks: {names(sinks)} has attention sinks")
    if chunked := [store for store in plan.stores if store.chunked]:
        problems.append(f"chunk: {names(chunked)} keeps chunks, not a window")
    if scaled := [store for store in plan.stores if store.query_scale]:
        problems.append(f"query_scale: {names(scaled)} scales queries by their position")
    for kind in dict.fromkeys(type(store) for store in plan.stores if store.kind not in ("grouped", "latent")):
        stores = names([store for store in plan.stores if type(store) is kind])
        why = "stock classes cache every position or a window"
        if kind is TiedSpec:
            why = "stock classes that have that, of DeepSeek-V4 and Gemma 4, compute other things in other places"
        problems.append(f"{kind.key}: {stores} {kind.summary}; {why}")
    if norms := [store for store in plan.stores if store.kv_norm]:
        problems.append(f"kv_norm: {names(norms)} has a norm of its own")
    if parts := [store for store in plan.stores if store.kind == "latent" and _divided(store)]:
        problems.append(f"latent.heads, latent.k_dim: {names(parts)} has several latents, or keys of another width")
    if any(store.window and store.kind == "latent" for store in plan.stores):
        problems.append("window: latents are kept whole in the stock DeepSeek classes")
    if len({store.slot for store in plan.stores}) > 1:
        problems.append(f"kv_heads, latent: {names(plan.stores)} hold slots of different shapes")
    if uneven := [store for store in plan.stores if store.slot.k_dim != store.slot.v_dim]:
        problems.append(f"v_dim: {names(uneven)} has keys and values of different widths")
    windows = sorted({store.window for store in plan.stores if store.window})
    if len(windows) > 1:
        problems.append(f"window: windows of {', '.join(map(str, windows))}; a stock class has one size")
    if 1 in windows:
        problems.append("window: the stock cache does not drop positions for a window of 1")
    if part := [
        store for store in plan.stores if store.rotary_dim or (store.slot.latent_dim and not store.slot.rope_dim)
    ]:
        problems.append(f"rope: {names(part)} has keys that are not rotated in whole")
    return problems


def own_windows_text(plan: KVPlan) -> str:
    """Name the layers of `plan` that have windows of their own."""
    layers = [str(layer) for layer in range(plan.num_layers) if plan.own_window(layer) is not None]
    return f"layers {', '.join(layers)} see fewer positions than their store keeps"


def second_reads_text(plan: KVPlan, how: str | None = None) -> str:
    """Name the layers of `plan` that read two stores; with `how`, those that do so in this way."""
    layers = [str(layer) for layer, second in enumerate(plan.second_reads) if second and how in (None, second.how)]
    return f"layers {', '.join(layers)} read keys and values of two stores"


def refusal(model_type: str) -> str:
    """Say why a class of REFUSED is none of ours."""
    return f"model_type is {model_type!r}, which has {REFUSED[model_type]}"


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the config.json `hf` describes; `seq_len` is its `max_position_embeddings`.

    Raises UnsupportedModelError with every key whose value a Decoder cannot have, and LayoutError where the widths are
    impossible.
    """
    model_type = str(hf.get("model_type"))
    if model_type in REFUSED:
        raise UnsupportedModelError([refusal(model_type)])
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError([f"model_type is {model_type!r}; it must be one of {', '.join(ARCHITECTURES)}"])
    values = DEFAULTS | MODEL_DEFAULTS[model_type] | dict(hf)
    if model_type in SWITCHED_WINDOWS and not values["use_sliding_window"]:
        values["sliding_window"] = None
    latent = model_type == "deepseek_v3"
    required = REQUIRED_VALUES | {"architectures": [ARCHITECTURES[model_type]]}
    own: tuple[str, ...] = LATENT_WIDTHS if latent else ()
    if model_type == "gemma3_text":
        required, own = required | GEMMA3_VALUES, ("query_pre_attn_scalar",)
        del required["hidden_act"]  # not read
    problems = value_problems(values, required)
    rotations = _rotations(values, problems)
    widths = size_problems(values, (*SIZE_KEYS.values(), *own), OPTIONAL_WIDTHS)
    if widths:  # the layout is read from them
        raise UnsupportedModelError(problems + widths)
    if latent:
        arch, width = _latent_layout(values, problems)
    else:
        arch, width = _grouped_layout(values, rotations, problems)
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {key: values[hf_key] for key, hf_key in SIZE_KEYS.items()}
    sizes |= {"head_dim": width, "rope_theta": rotations["full_attention"].theta} | OWN_STYLES.get(model_type, {})
    config = ModelConfig(arch, from_dict(SizeConfig, sizes))
    resolve_stack(config)
    return config


def _rotations(values: dict[str, Any], problems: list[str]) -> dict[str, Rotation]:
    """Return how each kind of layer rotates, from where the stock classes look for it.

    Appends to `problems` every setting that differs between dimensions, or between layers where a class has one, and
    every scaling of another rule.
    """
    model_type = values["model_type"]
    if model_type not in ROTATED_BY_KIND:
        where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rotation = _rotation(where, values.get(where) or {}, "rope_theta", values, problems)
        return dict.fromkeys(KINDS, rotation)
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not set(rope) <= set(KINDS):
        problems.append(f"rope_parameters is {rope!r}; it must be a mapping with {' and '.join(KINDS)}")
        rope = {}
    key, base = LOCAL_BASES[model_type]
    rotations = {}
    for kind in KINDS:
        where, own, base_key = f"rope_parameters.{kind}", rope.get(kind) or {}, "rope_theta"
        if kind == "sliding_attention":
            base_key, values = key, {key: base} | values
        elif values.get("rope_scaling"):
            where, scaling = "rope_scaling", values["rope_scaling"]
            own = own | scaling if isinstance(own, dict) and isinstance(scaling, dict) else scaling
        rotations[kind] = _rotation(where, own, base_key, values, problems)
        if (scaling := rotations[kind].scaling) and not scaling.truncate:
            problems.append(f"{where}.truncate is False; {ARCHITECTURES[model_type]} reads it nowhere: it must be True")
    return rotations


def _rotation(where: str, rope: Any, key: str, values: Mapping[str, Any], problems: list[str]) -> Rotation:
    """Return the rotation that `rope` describes, whose base may also be `values[key]`; appends as `_rotations`."""
    if not isinstance(rope, dict):
        problems.append(f"{where} is {rope!r}; it must be a mapping")
        return Rotation(1.0)
    rule = rope.get("rope_type", rope.get("type", "default"))
    rules = ("default",) if values["model_type"] == "deepseek_v3" else ("default", *SCALING_KEYS)
    if rule not in rules or any(isinstance(value, dict) for value in rope.values()):
        which = "unscaled" if len(rules) == 1 else f"of rope_type {', '.join(rules[:-1])} or {rules[-1]}"
        problems.append(f"{where} is {rope!r}; it must be {which}, and the same in all layers")
        rule = "default"
    elif rope.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(f"{where}.partial_rotary_factor is {rope['partial_rotary_factor']}; it must be 1.0")
    theta = rope.get("rope_theta", values[key])
    if not is_positive(theta):
        key = f"{where}.rope_theta" if "rope_theta" in rope else key
        problems.append(f"{key} is {theta!r}; it must be a positive number")
        return Rotation(1.0)
    return Rotation(theta, None if rule == "default" else _scaling(where, rule, rope, values, problems))


def read_scaling(
    where: str, rope: dict[str, Any], values: Mapping[str, Any], problems: list[str]
) -> RopeScalingConfig | None:
    """Return the scaling in `rope`, as `rope_parameters` has it; appends whatever is wrong with it to `problems`."""
    rule = rope.get("rope_type")
    if rule not in SCALING_KEYS:
        problems.append(f"{where} is {rope!r}; its rope_type must be one of {', '.join(SCALING_KEYS)}")
        return None
    return _scaling(where, rule, rope, values, problems)


def _scaling(
    where: str, rule: str, rope: dict[str, Any], values: Mapping[str, Any], problems: list[str]
) -> RopeScalingConfig | None:
    """Return the scaling that `rope` describes; appends every number of it that is none, and every unknown key."""
    keys, before = SCALING_KEYS[rule], len(problems)
    unknown = [key for key in rope if key not in (*ROPE_KEYS, *keys.values(), *YARN_KEYS[rule])]
    problems += [f"{where}.{key} is {rope[key]!r}; it is no key of rope_type {rule}" for key in unknown]
    found: dict[str, Any] = {ours: rope.get(key) for ours, key in keys.items()}
    if rule != "linear":
        original, key = values.get("original_max_position_embeddings"), "original_max_position_embeddings"
        found["original"] = original or rope.get(key) or values.get("max_position_embeddings")
        if type(found["original"]) is not int or not 1 <= found["original"] <= MAX_SEQ_LEN:
            problems.append(f"{where}.{key} is {found['original']!r}; it must be a whole number, at least 1")
    if rule == "yarn" and len(problems) == before:
        found["factor"] = found["factor"] or values["max_position_embeddings"] / found["original"]
        found |= {key: found[key] or None for key in ("low", "high")}
        scales: list[Any] = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
        if found["attention"] is None and all(map(is_positive, scales)) and is_positive(found["factor"]):
            one, other = (yarn_attention(found["factor"], scale) for scale in scales)
            found["attention"] = one / other
    optional = ("low", "high", "attention") if rule == "yarn" else ()
    problems += [
        f"{where}.{key} is {rope.get(key)!r}; it must be a positive number"
        for ours, key in keys.items()
        if not is_positive(found[ours]) and not (ours in optional and found[ours] is None)
    ]
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        problems.append(f"{where}.truncate is {truncate!r}; it must be true or false")
    if len(problems) > before:
        return None
    whole = {key: value if key == "original" or value is None else float(value) for key, value in found.items()}
    return from_dict(RopeScalingConfig, {"rule": rule, "truncate": truncate} | whole)


def _latent_layout(values: dict[str, Any], problems: list[str]) -> tuple[ArchConfig, int]:
    """Return the layout and head width of a DeepSeek-V3 config; appends to `problems` what a Decoder cannot do."""
    depth, width, rotary = (values[key] for key in ("num_hidden_layers", "qk_nope_head_dim", "qk_rope_head_dim"))
    expected = {
        "v_head_dim": (width, "qk_nope_head_dim"),
        "num_key_value_heads": (values["num_attention_heads"], "num_attention_heads"),
        "head_dim": (rotary, "qk_rope_head_dim"),
    }
    for key, (value, reason) in expected.items():
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


def _layer_types(values: dict[str, Any], turned: list[bool], problems: list[str]) -> Any:
    """Return `layer_types`, or what the class makes of its other keys; appends as `_latent_layout` does."""
    depth, window, model_type = values["num_hidden_layers"], values["sliding_window"], values["model_type"]
    uniform = "full_attention" if window is None else "sliding_attention"
    if values["layer_types"] is not None:
        return values["layer_types"]
    if model_type in ROTATED_BY_KIND:
        every = values.get("sliding_window_pattern", 6) if model_type == "gemma3_text" else ROTATED_BY_KIND[model_type]
        if type(every) is not int or every < 1:
            problems.append(f"sliding_window_pattern is {every!r}; it must be a whole number, at least 1")
            every = 1
        return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)]
    if window is not None and model_type == "smollm3":
        return [uniform if not turns else "full_attention" for turns in turned]
    if window is not None and model_type in SWITCHED_WINDOWS:
        first = values["max_window_layers"]
        if type(first) is not int or first < 0:
            problems.append(f"max_window_layers is {first!r}; it must be a whole number, at least 0")
            first = 0
        first = min(depth, first)
        return ["full_attention"] * first + [uniform] * (depth - first)
    return [uniform] * depth


def _grouped_layout(
    values: dict[str, Any], rotations: dict[str, Rotation], problems: list[str]
) -> tuple[ArchConfig, int]:
    """Return the layout and head width of a config of grouped heads; appends as `_latent_layout` does."""
    heads, depth, window = values["num_attention_heads"], values["num_hidden_layers"], values["sliding_window"]
    model_type, names = values["model_type"], KINDS
    uniform = "full_attention" if window is None else "sliding_attention"
    turned = _rotated_layers(values, problems)
    layer_types = _layer_types(values, turned, problems)
    types = list(map(str, layer_types)) if isinstance(layer_types, list) else []
    if model_type in ("llama", "olmo2") and window is not None:
        problems.append(f"sliding_window is {window}; {ARCHITECTURES[model_type]} has no windows, so it must be None")
    allowed = list(names) if model_type in ("ministral", *SWITCHED_WINDOWS, *ROTATED_BY_KIND) else [uniform]
    if len(types) != depth or not set(types) <= set(allowed):
        problems.append(f"layer_types is {layer_types!r}; it must be {depth} times {' or '.join(allowed)}")
    elif window is None and "sliding_attention" in types:
        problems.append("sliding_window is None; it must be a number, since layer_types has sliding layers")
    if values["head_dim"] is None and values["hidden_size"] % heads:
        problems.append(f"head_dim is missing, and hidden_size {values['hidden_size']} is no multiple of {heads} heads")
    kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    windows = {"full_attention": None, "sliding_attention": window}
    layers = list(zip(types, turned, strict=False))
    labels = {(kind, turns): names[kind] + ("" if turns else "_nope") for kind in names for turns in (True, False)}
    theta = rotations["full_attention"].theta
    bases = {kind: None if own.theta == theta else own.theta for kind, own in rotations.items()}
    stores = {
        labels[kind, turns]: StoreConfig(
            kv_heads=kv_heads,
            window=windows[kind],
            rope=None if turns else "none",
            rope_theta=bases[kind] if turns else None,
            rope_scaling=rotations[kind].scaling if turns else None,
        )
        for kind, turns in labels
        if (kind, turns) in layers
    }
    pattern = [f"new {labels.get(layer)}" for layer in layers]
    width = values["hidden_size"] // heads if values["head_dim"] is None else values["head_dim"]
    return ArchConfig(stores, pattern if len(stores) > 1 else pattern[:1]), width


def _rotated_layers(values: dict[str, Any], problems: list[str]) -> list[bool]:
    """Return whether each layer rotates its keys; appends to `problems` where `no_rope_layers` is no such list."""
    depth, marks = values["num_hidden_layers"], values.get("no_rope_layers")
    if values["model_type"] != "smollm3":
        return [True] * depth
    if marks is None:
        interval = values["no_rope_layer_interval"]
        if type(interval) is not int or interval < 1:
            problems.append(f"no_rope_layer_interval is {interval!r}; it must be a whole number, at least 1")
            interval = 1
        return [(layer + 1) % interval != 0 for layer in range(depth)]
    if not isinstance(marks, list) or len(marks) < depth or any(mark not in (0, 1) for mark in marks):
        problems.append(f"no_rope_layers is {str(marks)[:80]}; it must be {depth} times 1 (rotated) or 0")
        return [True] * depth
    return [bool(mark) for mark in marks[:depth]]


def weights(config: ModelConfig, hf: Mapping[str, Any]) -> list[Weight]:
    """Every parameter of a Decoder of `config`, with its tensor in the class that the config.json `hf` describes."""
    slot = resolve_stack(config).stores[0].slot
    rotary: dict[str, tuple[int, int]] = {}
    if slot.latent_dim and hf.get("rope_interleave", True):
        rotary["reader.q_proj"] = (head_dim(config.size), slot.rope_dim)
        rotary["writer.kv_down_proj"] = (slot.latent_dim, slot.rope_dim)
    modules = LAYER_MODULES | (OUTPUT_NORMS if style_of(config.size).norm_placement != "before" else {})
    offset = 1.0 if hf.get("model_type") == "gemma3_text" else 0.0
    scalar = hf.get("query_pre_attn_scalar", 256) if offset else slot.k_dim
    table = []
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            hf_module = MODULES[module]
        else:
            _, layer, module = module.split(".", 2)
            hf_module = f"model.layers.{layer}.{modules[module]}"
        factor = (slot.k_dim / scalar) ** 0.5 if module == "reader.q_norm" else 1.0  # scores have the head's scale here
        less = offset if module.endswith("norm") else 0.0
        table.append(Weight(name, f"{hf_module}.{kind}", shape, rotary.get(module), offset=less, factor=factor))
    return table
