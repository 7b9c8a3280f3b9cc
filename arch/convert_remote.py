"""The remote-code decoder of train/hf, for layouts that no stock class holds: its config.json and weights.

It shares keys and values between layers as the plan does, also values without their keys, with windows, heads, rotary
bases and widths per store, attention sinks, norms before keys and values, and keys and values of one projection;
scaled rotations, and norms, embeddings and MLP as OLMo 2 or Gemma 3 have them. Its weights have the names of
convert_stock.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from .config import STYLES, ArchConfig, ModelConfig, SizeConfig, StoreConfig, from_dict, style_of
from .convert import (
    MAX_SEQ_LEN,
    NO_SPECIAL_TOKENS,
    SIZE_KEYS,
    UnsupportedModelError,
    is_positive,
    quoted,
    size_problems,
    style_problems,
)
from .convert_stock import TIED, weights
from .convert_stock_export import own_windows_text, rope_parameters, second_reads_text
from .convert_stock_import import read_scaling
from .plan import KVPlan, resolve_stack
from .store_spec import StoreSpec
from .tied_spec import TiedSpec

__all__ = ["TIED", "from_hf_config", "to_hf_config", "weights"]

T = TypeVar("T")

MODEL_TYPE = "kvfrontier"
ARCHITECTURE = "KVFrontierForCausalLM"
# The files of train/hf that define its classes.
FILES = ("configuration_kvfrontier.py", "modeling_kvfrontier.py")
AUTO_MAP = {
    "AutoConfig": "configuration_kvfrontier.KVFrontierConfig",
    "AutoModel": "modeling_kvfrontier.KVFrontierModel",
    "AutoModelForCausalLM": f"modeling_kvfrontier.{ARCHITECTURE}",
    "AutoModelForSequenceClassification": "modeling_kvfrontier.KVFrontierForSequenceClassification",
}
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
STYLE_DEFAULTS = {"qk_norm": None, "norm_placement": "before", "hidden_act": "silu", "scale_embeddings": False}
# Keys that do not describe what the model computes.
IGNORED_KEYS = ("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id")


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the remote decoder that computes exactly what a Decoder of `config` does.

    It names no tensor type and no special token. Raises UnsupportedModelError with everything that it cannot hold, and
    LayoutError if the layout is impossible.
    """
    if config.arch.block is not None:
        raise UnsupportedModelError(["block: a Block Transformer is no stack of decoder layers over one cache"])
    plan = resolve_stack(config)
    problems = _unsupported(config.size, plan)
    if problems:
        raise UnsupportedModelError(problems)
    windows = _per_layer(plan, lambda store: store.window)
    heads = _per_layer(plan, lambda store: store.slot.kv_heads)
    base = next((store.rope_theta for store in plan.stores if store.rope_theta), config.size.rope_theta)
    thetas = _per_layer(plan, lambda store: store.rope_theta or base)
    rotary_dims = _per_layer(plan, lambda store: store.rope_key[0])
    sinks = _per_layer(plan, lambda store: store.sinks)
    tied = _per_layer(plan, _tied_form)
    scaling = _per_layer(plan, lambda store: _scaling(store, config.size))
    norms = [plan.store(i).kv_norm and owner == i for i, owner in enumerate(plan.owners)]
    distinct_windows = {window for window in windows if window is not None}
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **{hf_key: getattr(config.size, key) for key, hf_key in SIZE_KEYS.items()},
        "head_dim": plan.stores[0].slot.k_dim,
        "num_key_value_heads": max(heads),
        "layer_key_value_heads": heads if len(set(heads)) > 1 else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": thetas[0]},
        "layer_rope_thetas": thetas if len(set(thetas)) > 1 else None,
        **({"layer_rotary_dims": rotary_dims} if set(rotary_dims) != {plan.stores[0].slot.k_dim} else {}),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": max(distinct_windows, default=None),
        "layer_sliding_windows": windows if len(distinct_windows) > 1 else None,
        "kv_source_layers": list(plan.owners),
        **({"value_source_layers": _value_owners(plan)} if plan.second_reads else {}),
        "layer_sinks": sinks if any(sinks) else None,
        "layer_kv_norms": norms if any(norms) else None,
        **({"layer_tied": tied} if any(tied) else {}),
        **({"layer_rope_scaling": scaling} if any(scaling) else {}),
        **_style_keys(config.size),
        **NO_SPECIAL_TOKENS,
    }


def _style_keys(size: SizeConfig) -> dict[str, Any]:
    """Return the keys of what all layers have otherwise than Llama's."""
    style = style_of(size)
    keys = {
        "qk_norm": None if style.qk_norm == "none" else style.qk_norm,
        "norm_placement": style.norm_placement,
        "hidden_act": ACTIVATIONS[style.mlp],
        "scale_embeddings": style.scale_embeddings,
    }
    return {key: value for key, value in keys.items() if value != STYLE_DEFAULTS[key]}


def _scaling(store: StoreSpec, size: SizeConfig) -> dict[str, Any] | None:
    """Return how the rotation of `store` is slowed down; None: it is not."""
    keys = rope_parameters(store, size)
    del keys["rope_theta"]
    return keys if store.rope_scaling else None


def _value_owners(plan: KVPlan) -> list[int]:
    """List the layer that wrote the values which each layer reads."""
    return [plan.stores[plan.sources(layer)[1][0]].owner for layer in range(plan.num_layers)]


def _per_layer(plan: KVPlan, value: Callable[[StoreSpec], T]) -> list[T]:
    """List `value` of the store that each layer reads."""
    return [value(plan.store(layer)) for layer in range(plan.num_layers)]


# Forms of one tensor for keys and values that it has: of `half` a cache of transformers holds no two widths of heads.
TIED_FORMS = ("vector", "projection")


def _tied_form(store: StoreSpec) -> str | None:
    """The form in which keys and values of `store` are one tensor; None: they are two."""
    return store.tied if isinstance(store, TiedSpec) else None


def _unsupported(size: SizeConfig, plan: KVPlan) -> list[str]:
    """Every property of a model that the remote decoder does not have."""
    style = style_of(size)
    mlp = style.mlp if style.mlp not in ACTIVATIONS else "swiglu"
    plain = replace(style, qk_norm="none", norm_placement="before", scale_embeddings=False, mlp=mlp)
    problems = [] if plain == STYLES["llama"] else style_problems(size)
    heads = [store for store in plan.stores if store.kind == "grouped" or _tied_form(store) in TIED_FORMS]
    for kind in dict.fromkeys(type(store) for store in plan.stores if store not in heads):
        stores = quoted(store for store in plan.stores if type(store) is kind)
        problems.append(
            f"{kind.key}: {stores} {kind.summary}; the remote decoder has keys and values of every position"
        )
    if chunked := [store for store in plan.stores if store.chunked]:
        problems.append(f"chunk: {quoted(chunked)} keeps chunks; the remote decoder has windows")
    if scaled := [store for store in plan.stores if store.query_scale]:
        problems.append(f"query_scale: {quoted(scaled)} scales queries by their position; the remote decoder does not")
    if plan.reader_windows:
        problems.append(f"reader_windows: {own_windows_text(plan)}; in the remote decoder a window is the store's")
    if any(second and second.how == "mix" for second in plan.second_reads):
        problems.append(f"mix: {second_reads_text(plan, 'mix')}, mixed; the remote decoder reads them as they are")
    if len({width for store in heads for width in store.kernel_heads(size)[1:]}) > 1:
        problems.append(f"k_dim, v_dim: {quoted(heads)} have different widths; the remote decoder has one head_dim")
    if any(store.window == 1 for store in heads):
        problems.append("window: the caches of transformers do not drop positions for a window of 1")
    return problems


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model that `hf`, a config.json of the remote decoder, describes; the inverse of `to_hf_config`.

    Raises UnsupportedModelError with every key that is missing or has an impossible value (of scaled rotations once the
    other lists are right), and LayoutError if widths are impossible.
    """
    if hf.get("model_type") != MODEL_TYPE:
        raise UnsupportedModelError([f"model_type is {hf.get('model_type')!r}; it must be {MODEL_TYPE}"])
    problems = size_problems(hf, (*SIZE_KEYS.values(), "head_dim", "num_key_value_heads")) + _layer_problems(hf)
    stores = [] if problems else _read_stores(hf, problems)
    style = _read_style(hf, problems)
    if problems:
        raise UnsupportedModelError(problems)
    sizes = {key: hf[hf_key] for key, hf_key in SIZE_KEYS.items()}
    sizes |= {"head_dim": hf["head_dim"], "rope_theta": hf["rope_parameters"]["rope_theta"]}
    size, sources = from_dict(SizeConfig, sizes | style), hf["kv_source_layers"]
    value_sources = hf.get("value_source_layers") or sources
    for merge_equal in (True, False) if value_sources == sources else (False,):
        config = ModelConfig(_layout(stores, sources, value_sources, merge_equal), size)
        again = to_hf_config(config)
        if all(hf.get(key) == value for key, value in again.items() if key not in IGNORED_KEYS):
            return config
    raise UnsupportedModelError(
        [f"{key} is {hf.get(key)!r}; that cannot be" for key in again if hf.get(key) != again[key]]
    )


def _read_stores(hf: Mapping[str, Any], problems: list[str]) -> list[StoreConfig]:
    """The store that each layer writes, if it does. Adds to `problems` what is wrong with scaled rotations."""
    depth, window = hf["num_hidden_layers"], hf.get("sliding_window")
    lists: dict[str, list[Any]] = {
        "layer_sliding_windows": [window if kind == "sliding_attention" else None for kind in hf["layer_types"]],
        "layer_key_value_heads": [hf["num_key_value_heads"]] * depth,
        "layer_rope_thetas": [hf["rope_parameters"]["rope_theta"]] * depth,
        "layer_rotary_dims": [hf["head_dim"]] * depth,
        "layer_sinks": [False] * depth,
        "layer_kv_norms": [False] * depth,
        "layer_tied": [None] * depth,
        "layer_rope_scaling": [None] * depth,
    }
    lists = {key: hf.get(key) or default for key, default in lists.items()}
    return [
        StoreConfig(
            heads,
            window=span,
            sinks=sink,
            kv_norm=norm,
            rope=rotary_dims if 0 < rotary_dims < hf["head_dim"] else None if rotary_dims else "none",
            rope_theta=base if rotary_dims else None,
            tied=form,
            rope_scaling=scaling and read_scaling("layer_rope_scaling", scaling, hf, problems),
        )
        for span, heads, base, rotary_dims, sink, norm, form, scaling in zip(*lists.values(), strict=True)
    ]


def _read_style(hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Fields of SizeConfig in which the model is not of the style llama. Adds to `problems` what is wrong with keys."""
    style = STYLE_DEFAULTS | {key: hf[key] for key in STYLE_DEFAULTS if key in hf}
    mlps = {activation: mlp for mlp, activation in ACTIVATIONS.items()}
    for key, kinds in (("qk_norm", (str, type(None))), ("norm_placement", (str,)), ("scale_embeddings", (bool,))):
        if type(style[key]) not in kinds:
            problems.append(f"{key} is {style[key]!r}; that cannot be")
    activation = str(style["hidden_act"])
    if activation not in mlps:
        problems.append(f"hidden_act is {style['hidden_act']!r}; it must be {' or '.join(mlps)}")
    own = {"qk_norm": style["qk_norm"], "mlp": mlps.get(activation)}
    own |= {key: style[key] for key in ("norm_placement", "scale_embeddings")}
    llama = vars(STYLES["llama"])
    return {key: value for key, value in own.items() if value not in (None, llama[key])}


def _layer_problems(hf: Mapping[str, Any]) -> list[str]:
    """Every key about layers that is missing, has an impossible value or has another number of entries."""
    number = (int, float)
    entries: dict[str, tuple[type, ...]] = {
        "layer_types": (str,),
        "kv_source_layers": (int,),
        "value_source_layers": (int,),
        "layer_sliding_windows": (int, type(None)),
        "layer_key_value_heads": (int,),
        "layer_rope_thetas": number,
        "layer_rotary_dims": (int,),
        "layer_sinks": (bool,),
        "layer_kv_norms": (bool,),
        "layer_tied": (str, type(None)),
        "layer_rope_scaling": (dict, type(None)),
    }
    problems, depth = [], hf.get("num_hidden_layers")
    lists: dict[str, list[Any]] = {}
    for key, kinds in entries.items():
        values = hf.get(key)
        if values is None:
            problems += [f"{key} is missing"] if key in ("layer_types", "kv_source_layers") else []
        elif not isinstance(values, list) or any(type(value) not in kinds for value in values):
            problems.append(f"{key} is {str(values)[:80]}; it must be a list of what each layer has")
        elif len(values) != depth:
            problems.append(f"{key} does not have {depth} entries, one for each layer")
        else:
            lists[key] = values
    if "kv_source_layers" in lists:
        problems += _source_problems(lists["kv_source_layers"], lists.get("value_source_layers", []))
    window, rope = hf.get("sliding_window"), hf.get("rope_parameters")
    if window is not None and (type(window) is not int or not 1 <= window <= MAX_SEQ_LEN):
        problems.append(f"sliding_window is {window!r}; it must be a whole number from 1 to {MAX_SEQ_LEN}, or null")
    if rope is None:
        problems.append("rope_parameters is missing")
    elif not isinstance(rope, dict) or not is_positive(rope.get("rope_theta")):
        problems.append(f"rope_parameters is {str(rope)[:80]}; it must have a positive rope_theta")
    return problems


def _source_problems(sources: list[int], value_sources: list[int]) -> list[str]:
    """List what is impossible about the layers whose keys, and whose values, each layer reads."""
    if not all(0 <= source <= layer and sources[source] == source for layer, source in enumerate(sources)):
        return [f"kv_source_layers is {sources}; layers read themselves, or an earlier one that does"]
    if not all(
        0 <= source <= layer and sources[source] == source and (source == layer or sources[layer] != layer)
        for layer, source in enumerate(value_sources)
    ):
        return [
            f"value_source_layers is {value_sources}; a layer that writes reads its own, others a layer that writes"
        ]
    return []


def _layout(stores: list[StoreConfig], sources: list[int], value_sources: list[int], merge_equal: bool) -> ArchConfig:
    """Return the layout in which layer i reads the store that layer `sources[i]` writes, `stores[sources[i]]`, or of it
    the keys and the values of layer `value_sources[i]`.

    `merge_equal` names equal stores alike, which is right if layers always read the latest of them; otherwise each
    written store has a name of its own.
    """
    types: dict[str, StoreConfig] = {}
    pattern = []
    for layer, source in enumerate(sources):
        store = stores[source]
        equal = [name for name, other in types.items() if merge_equal and other == store]
        name = equal[0] if equal else f"kv{source}"
        types[name] = store
        values = "" if value_sources[layer] == source else f" values=kv{value_sources[layer]}"
        pattern.append(f"{'new' if source == layer else 'reuse'} {name}{values}")
    return ArchConfig(types, pattern)
