"""To and from the remote-code decoder that goes with an export: the layouts that no stock class holds.

It shares keys and values between layers as the plan says, with windows, heads and rotary bases of each store, attention
sinks and norms before keys and values. Its weights have Llama's names, so that export is a rename.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from .config import ArchConfig, ModelConfig, SizeConfig, StoreConfig, from_dict
from .convert import SIZES, UnsupportedModelError, not_llama, weights_to_hf
from .plan import KVPlan, StoreSpec, resolve_stack

T = TypeVar("T")

MODEL_TYPE = "kvfrontier"
ARCHITECTURE = "KVFrontierForCausalLM"
# The files that hold its classes.
FILES = ("configuration_kvfrontier.py", "modeling_kvfrontier.py")
AUTO_MAP = {
    "AutoConfig": "configuration_kvfrontier.KVFrontierConfig",
    "AutoModel": "modeling_kvfrontier.KVFrontierModel",
    "AutoModelForCausalLM": f"modeling_kvfrontier.{ARCHITECTURE}",
}
# Keys that do not say what the model computes.
UNREAD = ("architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id")


def remote_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the remote decoder that computes exactly what a Decoder of `config` does.

    It names no tensor type and no special token. Raises UnsupportedModelError with everything that it cannot hold, and
    LayoutError where the layout is impossible.
    """
    if config.arch.block is not None:
        raise UnsupportedModelError(["block: a Block Transformer is no stack of decoder layers over one cache"])
    plan = resolve_stack(config)
    reasons = _not_remote(config.size, plan)
    if reasons:
        raise UnsupportedModelError(reasons)
    windows = _each(plan, lambda store: store.window)
    heads = _each(plan, lambda store: store.slot.kv_heads)
    thetas = _each(plan, lambda store: store.rope_theta)
    sinks = _each(plan, lambda store: store.sinks)
    norms = [plan.store(i).kv_norm and owner == i for i, owner in enumerate(plan.owners)]
    sizes = sorted({window for window in windows if window is not None})
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config.size, ours) for ours, theirs in SIZES.items()},
        "head_dim": plan.stores[0].slot.k_dim,
        "num_key_value_heads": max(heads),
        "layer_key_value_heads": heads if len(set(heads)) > 1 else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": thetas[0]},
        "layer_rope_thetas": thetas if len(set(thetas)) > 1 else None,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": max(sizes, default=None),
        "layer_sliding_windows": windows if len(sizes) > 1 else None,
        "kv_source_layers": list(plan.owners),
        "layer_sinks": sinks if any(sinks) else None,
        "layer_kv_norms": norms if any(norms) else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _each(plan: KVPlan, value: Callable[[StoreSpec], T]) -> list[T]:
    """`value` of the store that each layer reads."""
    return [value(plan.store(layer)) for layer in range(plan.num_layers)]


def _not_remote(size: SizeConfig, plan: KVPlan) -> list[str]:
    """What the remote decoder cannot hold."""

    def stores(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(names))

    reasons = not_llama(size)
    latent = [store.name for store in plan.stores if store.slot.latent_dim]
    if latent:
        reasons.append(f"latent: {stores(latent)} holds latents; the remote decoder has key/value heads alone")
    bounded = [store.name for store in plan.stores if store.num_slots]
    if bounded:
        reasons.append(f"slots: {stores(bounded)} is bounded; the caches of transformers merge nothing")
    if any(store.window == 1 for store in plan.stores if not store.num_slots):
        reasons.append("window: the caches of transformers do not drop positions for a window of 1")
    return reasons


def remote_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that `hf`, a config.json of the remote decoder, describes; `remote_config` gives it back.

    Raises UnsupportedModelError with every key that is missing or says what cannot be, and LayoutError where widths are
    impossible.
    """
    if hf.get("model_type") != MODEL_TYPE:
        raise UnsupportedModelError([f"model_type is {hf.get('model_type')!r}; it must be {MODEL_TYPE}"])
    needed = (*SIZES.values(), "head_dim", "num_key_value_heads", "rope_parameters", "layer_types", "kv_source_layers")
    missing = [f"{key} is missing" for key in needed if hf.get(key) is None]
    if missing:
        raise UnsupportedModelError(missing)
    depth, sources = hf["num_hidden_layers"], hf["kv_source_layers"]
    window, theta = hf.get("sliding_window"), hf["rope_parameters"].get("rope_theta")
    lists: dict[str, list[Any]] = {
        "layer_sliding_windows": [window if kind == "sliding_attention" else None for kind in hf["layer_types"]],
        "layer_key_value_heads": [hf["num_key_value_heads"]] * depth,
        "layer_rope_thetas": [theta] * depth,
        "layer_sinks": [False] * depth,
        "layer_kv_norms": [False] * depth,
    }
    lists = {key: hf.get(key) or value for key, value in lists.items()}
    wrong = [key for key, values in (lists | {"kv_source_layers": sources}).items() if len(values) != depth]
    if wrong:
        raise UnsupportedModelError([f"{key} does not have {depth} entries, one for each layer" for key in wrong])
    if not all(0 <= source <= layer and sources[source] == source for layer, source in enumerate(sources)):
        raise UnsupportedModelError(
            [f"kv_source_layers is {sources}; layers read themselves, or an earlier one that does"]
        )
    stores = [
        StoreConfig(heads, window=span, sinks=sink, kv_norm=norm, rope_theta=base)
        for span, heads, base, sink, norm in zip(*lists.values(), strict=True)
    ]
    sizes = {ours: hf[theirs] for ours, theirs in SIZES.items()} | {"head_dim": hf["head_dim"], "rope_theta": theta}
    size = from_dict(SizeConfig, sizes)
    for by_kind in (True, False):
        config = ModelConfig(_layout(stores, sources, by_kind), size)
        again = remote_config(config)
        if all(hf.get(key) == value for key, value in again.items() if key not in UNREAD):
            return config
    raise UnsupportedModelError(
        [f"{key} is {hf.get(key)!r}; that cannot be" for key in again if hf.get(key) != again[key]]
    )


def _layout(stores: list[StoreConfig], sources: list[int], by_kind: bool) -> ArchConfig:
    """The layout in which layer i reads what layer `sources[i]` writes, a store like `stores[sources[i]]`.

    `by_kind` has one type for equal stores, which holds where layers read the latest of them; else each has its own.
    """
    types: dict[str, StoreConfig] = {}
    pattern = []
    for layer, source in enumerate(sources):
        store = stores[source]
        equal = [name for name, other in types.items() if by_kind and other == store]
        name = equal[0] if equal else f"kv{source}"
        types[name] = store
        pattern.append(f"{'new' if source == layer else 'reuse'} {name}")
    return ArchConfig(types, pattern)


def to_remote(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Decoder of `config` for the remote decoder: the same tensors. Tied embeddings are there once.

    Raises as `remote_config` does, and ConversionError with every tensor that is missing, unexpected or of another
    shape.
    """
    return weights_to_hf(config, remote_config(config), state_dict)
