"""The Decoder that computes exactly what a stock class of transformers does, from its config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .config import ArchConfig, LatentConfig, ModelConfig, RopeScalingConfig, SizeConfig, StoreConfig, from_dict
from .convert import MAX_SEQ_LEN, SIZE_KEYS, UnsupportedModelError, is_positive, size_problems, value_problems
from .convert_stock import ARCHITECTURES, GEMMA3_VALUES, LOCAL_BASES, OWN_STYLES, ROTATED_BY_KIND, SCALING_KEYS
from .plan import resolve_stack
from .rope_scaling import yarn_attention

# Classes that have windows where layer_types says so; `use_sliding_window` turns all of them off.
SWITCHED_WINDOWS = ("smollm3", "qwen2", "qwen3")
LAYER_KINDS = {"full_attention": "global", "sliding_attention": "local"}
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
LATENT_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
OPTIONAL_WIDTHS = ("num_key_value_heads", "head_dim", "sliding_window")
YARN_KEYS = {"linear": (), "llama3": (), "yarn": ("mscale", "mscale_all_dim", "truncate")}
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


class Rotation(NamedTuple):
    """Base of a rotation, and how its frequencies are slowed down."""

    theta: float
    scaling: RopeScalingConfig | None = None


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the config.json `hf` describes; `seq_len` is its `max_position_embeddings`.

    Raises UnsupportedModelError with every key whose value a Decoder cannot have, and LayoutError if the widths are
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
        return dict.fromkeys(LAYER_KINDS, rotation)
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not set(rope) <= set(LAYER_KINDS):
        problems.append(f"rope_parameters is {rope!r}; it must be a mapping with {' and '.join(LAYER_KINDS)}")
        rope = {}
    key, base = LOCAL_BASES[model_type]
    rotations = {}
    for kind in LAYER_KINDS:
        where, own, base_key = f"rope_parameters.{kind}", rope.get(kind) or {}, "rope_theta"
        if kind == "sliding_attention":
            base_key, values = key, {key: base} | values
        elif values.get("rope_scaling"):
            where, scaling = "rope_scaling", values["rope_scaling"]
            if isinstance(scaling, dict) and "type" in scaling and "rope_type" not in scaling:
                problems.append(
                    f"{where}.type is {scaling['type']!r}; {ARCHITECTURES[model_type]} reads rope_type alone: name it "
                    "so if the model was trained so, or remove rope_scaling"
                )
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
    model_type, names = values["model_type"], LAYER_KINDS
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


def refusal(model_type: str) -> str:
    """Say why a class of REFUSED is none of ours."""
    return f"model_type is {model_type!r}, which has {REFUSED[model_type]}"
