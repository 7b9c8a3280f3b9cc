"""The stock Hugging Face classes: their config.json, and every weight under both names.

grouped heads, no window       LlamaForCausalLM (MistralForCausalLM where Llama's config refuses the widths)
grouped heads, one window size MinistralForCausalLM, each layer sliding or full
... and layers without rotation SmolLM3ForCausalLM
... and biases of Q, K and V   Qwen2ForCausalLM
... and norms of Q and K heads Qwen3ForCausalLM
latent                         DeepseekV3ForCausalLM, dense layers and uncompressed queries

Import reads MistralForCausalLM with a window, too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .config import (
    STYLES,
    ArchConfig,
    LatentConfig,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    Style,
    from_dict,
    head_dim,
    style_of,
)
from .convert import (
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
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Properties of the style llama that these classes have otherwise.
OWN_STYLES: dict[str, dict[str, Any]] = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"}}
# Classes that have windows where layer_types says so; `use_sliding_window` turns all of them off.
SWITCHED_WINDOWS = ("smollm3", "qwen2", "qwen3")

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
LATENT_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
OPTIONAL_WIDTHS = ("num_key_value_heads", "head_dim", "sliding_window")
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


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the stock class that computes exactly what a Decoder of `config` does.

    It names no tensor type and no special token. Raises UnsupportedModelError with everything that no stock class
    holds, and LayoutError where the layout is impossible.
    """
    if config.arch.block is not None:
        raise UnsupportedModelError(["block: a Block Transformer is two decoders; a stock class is one"])
    plan = resolve_stack(config)
    problems = _unsupported(plan) + _style_problems(config.size, plan)
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
    if not problems and style_of(size) != STYLES["llama"]:
        model_type = next(name for name in OWN_STYLES if _own_style(name) == style_of(size))
        if any(store.kind != "grouped" or store.rotary_dim is not None for store in plan.stores):
            own = ", ".join(f"{key} {value}" for key, value in OWN_STYLES[model_type].items())
            problems = [f"size.style: {own} is {ARCHITECTURES[model_type]}, whose layers rotate keys per head"]
    return problems


def _without_names(plan: KVPlan) -> KVPlan:
    """`plan` without the names of its stores, which compute nothing."""
    return replace(plan, stores=tuple(replace(store, name="") for store in plan.stores))


def _stock_config(size: SizeConfig, plan: KVPlan) -> dict[str, Any]:
    """Return the config.json of a plan whose layers differ only in whether they have the window."""
    slot, theta = plan.stores[0].slot, max(store.rope_theta for store in plan.stores) or size.rope_theta
    windows = [plan.store(layer).window for layer in range(plan.num_layers)]
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
    elif style_of(size) != STYLES["llama"] or any(store.rotary_dim == 0 for store in plan.stores):
        model_type = next((name for name in OWN_STYLES if _own_style(name) == style_of(size)), "smollm3")
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
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,  # for readers older than rope_parameters
        **NO_SPECIAL_TOKENS,
    }


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
    thetas = sorted({store.rope_theta for store in plan.stores if store.rope_theta})
    if len(thetas) > 1:
        problems.append(f"rope_theta: bases of {', '.join(map(str, thetas))}; the stock classes have one")
    return problems


def own_windows_text(plan: KVPlan) -> str:
    """Name the layers of `plan` that have windows of their own."""
    layers = [str(layer) for layer in range(plan.num_layers) if plan.own_window(layer) is not None]
    return f"layers {', '.join(layers)} see fewer positions than their store keeps"


def second_reads_text(plan: KVPlan, how: str | None = None) -> str:
    """Name the layers of `plan` that read two stores; with `how`, those that do so in this way."""
    layers = [str(layer) for layer, second in enumerate(plan.second_reads) if second and how in (None, second.how)]
    return f"layers {', '.join(layers)} read keys and values of two stores"


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the config.json `hf` describes; `seq_len` is its `max_position_embeddings`.

    Raises UnsupportedModelError with every key whose value a Decoder cannot have, and LayoutError where the widths are
    impossible.
    """
    model_type = str(hf.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError([f"model_type is {model_type!r}; it must be one of {', '.join(ARCHITECTURES)}"])
    values = DEFAULTS | MODEL_DEFAULTS[model_type] | dict(hf)
    if model_type in SWITCHED_WINDOWS and not values["use_sliding_window"]:
        values["sliding_window"] = None
    latent = model_type == "deepseek_v3"
    problems = value_problems(values, REQUIRED_VALUES | {"architectures": [ARCHITECTURES[model_type]]})
    theta = _rope_theta(values, problems)
    widths = size_problems(values, (*SIZE_KEYS.values(), *(LATENT_WIDTHS if latent else ())), OPTIONAL_WIDTHS)
    if widths:  # the layout is read from them
        raise UnsupportedModelError(problems + widths)
    arch, width = (_latent_layout if latent else _grouped_layout)(values, problems)
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {key: values[hf_key] for key, hf_key in SIZE_KEYS.items()}
    sizes |= {"head_dim": width, "rope_theta": theta} | OWN_STYLES.get(model_type, {})
    config = ModelConfig(arch, from_dict(SizeConfig, sizes))
    resolve_stack(config)
    return config


def _rope_theta(values: dict[str, Any], problems: list[str]) -> float:
    """Return the rotary base, from where the stock classes look for it.

    Appends to `problems` every setting that scales the rotation or differs between layers or dimensions.
    """
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
    if not is_positive(theta):
        problems.append(f"rope_theta is {theta!r}; it must be a positive number")
    return theta  # type: ignore[no-any-return]


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


def _grouped_layout(values: dict[str, Any], problems: list[str]) -> tuple[ArchConfig, int]:
    """Return the layout and head width of a config of grouped heads; appends as `_latent_layout` does."""
    heads, depth, window = values["num_attention_heads"], values["num_hidden_layers"], values["sliding_window"]
    model_type, names = values["model_type"], {"full_attention": "global", "sliding_attention": "local"}
    uniform = "full_attention" if window is None else "sliding_attention"
    layer_types = [uniform] * depth if values["layer_types"] is None else values["layer_types"]
    turned = _rotated_layers(values, problems)
    if values["layer_types"] is None and window is not None:  # the defaults of classes that switch windows
        if model_type == "smollm3":
            layer_types = [uniform if not turns else "full_attention" for turns in turned]
        elif model_type in SWITCHED_WINDOWS:
            first = values["max_window_layers"]
            if type(first) is not int or first < 0:
                problems.append(f"max_window_layers is {first!r}; it must be a whole number, at least 0")
                first = 0
            first = min(depth, first)
            layer_types = ["full_attention"] * first + [uniform] * (depth - first)
    types = list(map(str, layer_types)) if isinstance(layer_types, list) else []
    if model_type == "llama" and window is not None:
        problems.append(f"sliding_window is {window}; Llama has no windows, so it must be None")
    allowed = list(names) if model_type in ("ministral", *SWITCHED_WINDOWS) else [uniform]
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
    stores = {
        labels[layer]: StoreConfig(kv_heads=kv_heads, window=windows[layer[0]], rope=None if layer[1] else "none")
        for layer in labels
        if layer in layers
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
    table = []
    for name, shape in parameter_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            hf_module = MODULES[module]
        else:
            _, layer, module = module.split(".", 2)
            hf_module = f"model.layers.{layer}.{LAYER_MODULES[module]}"
        table.append(Weight(name, f"{hf_module}.{kind}", shape, rotary.get(module)))
    return table
