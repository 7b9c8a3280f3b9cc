"""The stock class of transformers that computes exactly what a Decoder does, as its config.json."""

from dataclasses import replace
from itertools import chain
from typing import Any

from .config import STYLES, ModelConfig, SizeConfig, head_dim, style_of
from .convert import NO_SPECIAL_TOKENS, SIZE_KEYS, UnsupportedModelError, quoted, style_problems
from .convert_stock import (
    ARCHITECTURES,
    GEMMA3_VALUES,
    LOCAL_BASES,
    OWN_STYLES,
    ROTATED_BY_KIND,
    SCALING_KEYS,
    own_style,
)
from .convert_stock_import import from_hf_config
from .latent_spec import LatentSpec
from .plan import KVPlan, resolve_stack
from .store_spec import StoreSpec
from .tied_spec import TiedSpec


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of the stock class that computes exactly what a Decoder of `config` does.

    It names no tensor type and no special token. Raises UnsupportedModelError with everything that no stock class
    holds, and LayoutError if the layout is impossible.
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


def _style_problems(size: SizeConfig, plan: KVPlan) -> list[str]:
    """The style of `size` as a reason against every stock class, or against that which has it."""
    problems = style_problems(size, [own_style(model_type) for model_type in ARCHITECTURES])
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
    return [model_type for model_type in OWN_STYLES if own_style(model_type) == style_of(size)]


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
        problems.append(f"sinks: {quoted(sinks)} has attention sinks")
    if chunked := [store for store in plan.stores if store.chunked]:
        problems.append(f"chunk: {quoted(chunked)} keeps chunks, not a window")
    if scaled := [store for store in plan.stores if store.query_scale]:
        problems.append(f"query_scale: {quoted(scaled)} scales queries by their position")
    for kind in dict.fromkeys(type(store) for store in plan.stores if store.kind not in ("grouped", "latent")):
        stores = quoted([store for store in plan.stores if type(store) is kind])
        why = "stock classes cache every position or a window"
        if kind is TiedSpec:
            why = "stock classes that have that, of DeepSeek-V4 and Gemma 4, compute other things in other places"
        problems.append(f"{kind.key}: {stores} {kind.summary}; {why}")
    if norms := [store for store in plan.stores if store.kv_norm]:
        problems.append(f"kv_norm: {quoted(norms)} has a norm of its own")
    if parts := [store for store in plan.stores if store.kind == "latent" and _divided(store)]:
        problems.append(f"latent.heads, latent.k_dim: {quoted(parts)} has several latents, or keys of another width")
    if any(store.window and store.kind == "latent" for store in plan.stores):
        problems.append("window: latents are kept whole in the stock DeepSeek classes")
    if len({store.slot for store in plan.stores}) > 1:
        problems.append(f"kv_heads, latent: {quoted(plan.stores)} hold slots of different shapes")
    if uneven := [store for store in plan.stores if store.slot.k_dim != store.slot.v_dim]:
        problems.append(f"v_dim: {quoted(uneven)} has keys and values of different widths")
    windows = sorted({store.window for store in plan.stores if store.window})
    if len(windows) > 1:
        problems.append(f"window: windows of {', '.join(map(str, windows))}; a stock class has one size")
    if 1 in windows:
        problems.append("window: the stock cache does not drop positions for a window of 1")
    if part := [
        store for store in plan.stores if store.rotary_dim or (store.slot.latent_dim and not store.slot.rope_dim)
    ]:
        problems.append(f"rope: {quoted(part)} has keys that are not rotated in whole")
    return problems


def own_windows_text(plan: KVPlan) -> str:
    """Name the layers of `plan` that have windows of their own."""
    layers = [str(layer) for layer in range(plan.num_layers) if plan.own_window(layer) is not None]
    return f"layers {', '.join(layers)} see fewer positions than their store keeps"


def second_reads_text(plan: KVPlan, how: str | None = None) -> str:
    """Name the layers of `plan` that read two stores; with `how`, those that do so in this way."""
    layers = [str(layer) for layer, second in enumerate(plan.second_reads) if second and how in (None, second.how)]
    return f"layers {', '.join(layers)} read keys and values of two stores"
