"""Rules that read the configuration of each `model_type` and make its layers.

The rules are those of the configuration and attention classes of transformers 5.23.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from arch.store_spec import CacheTensor, StoreSpec
from eval.released.keys import Keys
from eval.released.stores import Layer, grouped, latent, state

Rule = Callable[[Keys], Sequence[Layer | None]]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# Names of layer types that configurations had before these.
OLD_NAMES = {"attention": FULL, "mamba": LINEAR, "mamba2": LINEAR, "linear": LINEAR}


def heads_of(keys: Keys) -> tuple[int, int]:
    """(query heads, key/value heads)."""
    heads = keys.count("num_attention_heads")
    kv_heads = keys.optional("num_key_value_heads") or heads
    if heads % kv_heads:
        raise keys.refuse("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} query heads")
    keys.same("num_attention_groups", kv_heads, "the number of key/value heads")
    return heads, kv_heads


def head_width(keys: Keys, heads: int) -> int:
    width = keys.optional("head_dim") or shared_width(keys, heads)
    for key in ("attention_head_dim", "v_head_dim"):
        keys.same(key, width, "the width of a key: of this type, values are as wide")
    return width


def shared_width(keys: Keys, heads: int) -> int:
    """Width of a head where all of them share the width of the model."""
    hidden = keys.count("hidden_size")
    if hidden % heads:
        raise keys.refuse(
            "hidden_size", f"is {hidden}, no multiple of the {heads} query heads, and head_dim is missing"
        )
    return hidden // heads


def own_width(keys: Keys, heads: int) -> int:
    """`shared_width` of classes that take no head_dim."""
    width = shared_width(keys, heads)
    keys.same("head_dim", width, "the width of the model over its query heads: this type takes no other")
    return width


def full(keys: Keys, width: Callable[[Keys, int], int] = head_width) -> StoreSpec:
    heads, kv_heads = heads_of(keys)
    return grouped("full", kv_heads, width(keys, heads))


def sliding(keys: Keys, sinks: bool = False) -> StoreSpec:
    """A window; one that no context fills is none, as of Phi-3 with 128k positions."""
    heads, kv_heads = heads_of(keys)
    window, positions = keys.count("sliding_window"), keys.get("max_position_embeddings")
    keys.same("sliding_window_size", window, "as sliding_window: of this type, both are one number")
    if isinstance(positions, int) and window >= positions:
        return grouped("full", kv_heads, head_width(keys, heads), sinks=sinks)
    return grouped("sliding", kv_heads, head_width(keys, heads), window=window, sinks=sinks)


def layer_types(keys: Keys, default: Callable[[int], str], known: Sequence[str] = (FULL, SLIDING)) -> list[str]:
    """The type of each layer: `layer_types`, or else the class's own pattern."""
    number = keys.count("num_hidden_layers")
    types = keys.entries("layer_types", number, str)
    types = [default(layer) for layer in range(number)] if types is None else [OLD_NAMES.get(t, t) for t in types]
    for kind in types:
        if kind not in known:
            raise keys.refuse("layer_types", f"has {kind!r:.60}; of this type, {', '.join(known)} are understood")
    return types


def of_types(keys: Keys, types: Sequence[str], made: Mapping[str, Callable[[], StoreSpec]]) -> list[Layer | None]:
    """A layer for each of `types`; a store is made where there is one of its type."""
    stores = {kind: made[kind]() for kind in dict.fromkeys(types)}
    return [stores[kind] for kind in types]


def every(period: int, layer: int, kind: str = FULL, other: str = SLIDING) -> str:
    """The pattern of most: the last of each `period` layers is full."""
    return other if (layer + 1) % period else kind


# Attention in every layer


def all_full(keys: Keys) -> Sequence[Layer | None]:
    return [full(keys)] * keys.count("num_hidden_layers")


def minimax_m2(keys: Keys) -> Sequence[Layer | None]:
    """The hub's file marks each layer: 1 is softmax attention, which all of these have."""
    marks = keys.entries("attn_type_list", keys.count("num_hidden_layers"), int)
    if marks is not None and set(marks) != {1}:
        raise keys.refuse("attn_type_list", "marks layers that are not full attention (1); of this type, all are")
    if keys.get("attn_window_size") is not None:
        raise keys.refuse("attn_window_size", "is set; of this type, no layer has a window")
    keys.ignore("swa_rope_theta")
    return all_full(keys)


def hunyuan(keys: Keys) -> Sequence[Layer | None]:
    """Keys of cross-layer attention are in the hub's files, whether it is used or not."""
    if keys.flag("use_cla"):
        raise keys.refuse("use_cla", "is true; transformers shares nothing between layers, and others not alike")
    keys.ignore("cla_share_factor")
    return all_full(keys)


def all_full_shared_width(keys: Keys) -> Sequence[Layer | None]:
    return [full(keys, own_width)] * keys.count("num_hidden_layers")


def multi_head(keys: Keys) -> Sequence[Layer | None]:
    heads = keys.count("num_attention_heads")
    keys.same("num_key_value_heads", heads, "as many as query heads: this type has no others")
    return [grouped("full", heads, own_width(keys, heads))] * keys.count("num_hidden_layers")


def one_window(keys: Keys) -> Sequence[Layer | None]:
    """`sliding_window`, if any, is the window of every layer."""
    keys.same("full_attn_mod", 1, "full attention in every layer: no other interval is understood")
    layer = full(keys) if keys.optional("sliding_window") is None else sliding(keys)
    return [layer] * keys.count("num_hidden_layers")


def optional_window(keys: Keys) -> Sequence[Layer | None]:
    """Qwen3-MoE: as `one_window`, where use_sliding_window is true."""
    layer = sliding(keys) if keys.flag("use_sliding_window") else full(keys)
    keys.ignore("sliding_window", "max_window_layers")
    return [layer] * keys.count("num_hidden_layers")


def upper_window(keys: Keys) -> Sequence[Layer | None]:
    """Qwen2, Qwen3: layers from max_window_layers on, where use_sliding_window is true."""
    used, first = keys.flag("use_sliding_window"), keys.count("max_window_layers", 0)
    keys.ignore("sliding_window")
    types = layer_types(keys, lambda layer: SLIDING if used and layer >= first else FULL)
    if SLIDING in types and not used:
        raise keys.refuse("layer_types", "has sliding_attention, and use_sliding_window is false")
    return of_types(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def odd_window(keys: Keys) -> Sequence[Layer | None]:
    """Qwen2-MoE: every second layer below max_window_layers, where use_sliding_window is true."""
    used, first = keys.flag("use_sliding_window"), keys.count("max_window_layers", 0)
    keys.ignore("sliding_window")
    types = layer_types(keys, lambda layer: SLIDING if used and (layer + 1) % 2 and layer < first else FULL)
    return of_types(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def nope_window(keys: Keys) -> Sequence[Layer | None]:
    """SmolLM3: layers without rotary positions, where use_sliding_window is true."""
    number, period = keys.count("num_hidden_layers"), keys.count("no_rope_layer_interval")
    rotary = keys.entries("no_rope_layers", number, int)
    used = keys.flag("use_sliding_window") and keys.optional("sliding_window") is not None

    def default(layer: int) -> str:
        rotates = (layer + 1) % period if rotary is None else rotary[layer]
        return SLIDING if used and not rotates else FULL

    types = layer_types(keys, default)
    return of_types(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def interleaved(period: int, sinks: bool = False, pattern_key: str | None = None) -> Rule:
    """Sliding layers, and a full one at the end of each `period`, or of as many as the key `pattern_key` says."""

    def rule(keys: Keys) -> Sequence[Layer | None]:
        if keys.get("use_bidirectional_attention") not in (None, False, "vision"):
            raise keys.refuse("use_bidirectional_attention", "is set; such a model has no cache to decode from")
        length = (keys.optional(pattern_key) if pattern_key else None) or period
        types = layer_types(keys, lambda layer: every(length, layer))
        heads, kv_heads = heads_of(keys)
        made = {
            FULL: lambda: grouped("full", kv_heads, head_width(keys, heads), sinks=sinks),
            SLIDING: lambda: sliding(keys, sinks),
        }
        return of_types(keys, types, made)

    return rule


def windows_or_none(keys: Keys) -> Sequence[Layer | None]:
    """Ministral: layer_types, or the window in every layer if there is one."""
    window = keys.optional("sliding_window")
    types = layer_types(keys, lambda layer: FULL if window is None else SLIDING)
    return of_types(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def exaone4(keys: Keys) -> Sequence[Layer | None]:
    """EXAONE 4: every layer is full without a window; the pattern is a number of layers or a string of letters."""
    window, pattern = keys.optional("sliding_window"), keys.get("sliding_window_pattern")
    if pattern is not None and not isinstance(pattern, int) and keys.get("layer_types") is None:
        raise keys.refuse("sliding_window_pattern", f"is {pattern!r:.60}; without layer_types, a number is understood")
    period = pattern if isinstance(pattern, int) and pattern and window else 1
    types = layer_types(keys, lambda layer: every(period, layer))
    return of_types(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def llama4(keys: Keys) -> Sequence[Layer | None]:
    """Layers with rotary positions attend within chunks; a cache keeps as many positions as the longest has."""
    number, period = keys.count("num_hidden_layers"), keys.count("no_rope_layer_interval")
    rotary = keys.entries("no_rope_layers", None, int) or [int((layer + 1) % period != 0) for layer in range(number)]
    if len(rotary) != number:
        raise keys.refuse("no_rope_layers", f"has {len(rotary)} entries for {number} layers")
    chunked = "chunked_attention"
    types = layer_types(keys, lambda layer: chunked if rotary[layer] else FULL, (FULL, chunked))
    heads, kv_heads = heads_of(keys)

    def chunk() -> StoreSpec:
        return grouped("chunk", kv_heads, head_width(keys, heads), window=keys.count("attention_chunk_size"))

    return of_types(keys, types, {FULL: lambda: full(keys), chunked: chunk})


def falcon(keys: Keys) -> Sequence[Layer | None]:
    heads = keys.count("num_attention_heads")
    grouped_heads, single = keys.flag("new_decoder_architecture"), keys.flag("multi_query")
    kv_heads = keys.optional("num_kv_heads") or heads
    if not grouped_heads and single:
        kv_heads = 1
    return [grouped("full", kv_heads, own_width(keys, heads))] * keys.count("num_hidden_layers")


def gpt_bigcode(keys: Keys) -> Sequence[Layer | None]:
    heads = keys.count("num_attention_heads")
    kv_heads = 1 if keys.flag("multi_query") else heads
    keys.same("num_key_value_heads", kv_heads, "which follows from multi_query")
    return [grouped("full", kv_heads, own_width(keys, heads))] * keys.count("num_hidden_layers")


# Gemma 3n and 4: the last layers write nothing


def shared_tail(keys: Keys, types: Sequence[str], made: Mapping[str, Callable[[], StoreSpec]]) -> list[Layer | None]:
    """The last `num_kv_shared_layers` read the last layer of their type below them."""
    tail = keys.optional("num_kv_shared_layers", 0) or 0
    first = len(types) - tail
    if first < 1:
        raise keys.refuse("num_kv_shared_layers", f"is {tail}, of {len(types)} layers; one at least has to write")
    layers = of_types(keys, types[:first], made)
    for kind in types[first:]:
        if kind not in types[:first]:
            raise keys.refuse("num_kv_shared_layers", f"is {tail}: no layer below those has the type {kind}")
        layers.append(first - 1 - types[:first][::-1].index(kind))
    return layers


def gemma3n(keys: Keys) -> Sequence[Layer | None]:
    types = layer_types(keys, lambda layer: every(5, layer))
    return shared_tail(keys, types, {FULL: lambda: full(keys), SLIDING: lambda: sliding(keys)})


def gemma4(keys: Keys) -> Sequence[Layer | None]:
    """Full layers have heads of another width, and another number of them where values are made of the keys.

    With `attention_k_eq_v` only the projection is one: keys are normed and rotated, values are not, and both cached.
    """
    if keys.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise keys.refuse("use_bidirectional_attention", "is set; such a model has no cache to decode from")
    types = layer_types(keys, lambda layer: every(6, layer))
    types[-1] = FULL
    _, kv_heads = heads_of(keys)
    width, full_heads = keys.optional("global_head_dim") or 512, keys.optional("num_global_key_value_heads")
    full_heads = full_heads if keys.flag("attention_k_eq_v") and full_heads else kv_heads
    if keys.get("per_layer_config") is not None:  # as transformers writes it
        width, full_heads = by_layer(keys, types, kv_heads)
        keys.same("global_head_dim", width, "as per_layer_config says")
    made = {FULL: lambda: grouped("full", full_heads, width), SLIDING: lambda: sliding(keys)}
    return shared_tail(keys, types, made)


def by_layer(keys: Keys, types: Sequence[str], kv_heads: int) -> tuple[int, int]:
    """(head width, key/value heads) of full layers from `per_layer_config`, which names them all and no other."""
    section = keys.get("per_layer_config")
    if not isinstance(section, dict) or not all(re.fullmatch(r"\d{1,6}", key) for key in section):
        raise keys.refuse("per_layer_config", f"is {section!r:.60}; a section for each number of a layer belongs there")
    given = {int(key): value for key, value in section.items()}  # transformers pads numbers with zeros
    fulls = {layer for layer, kind in enumerate(types) if kind == FULL}
    found = {json.dumps(given.get(layer, {}), sort_keys=True) for layer in fulls}
    inner = Keys(f"{keys.where}, per_layer_config", json.loads(min(found)), {})
    width, heads = inner.count("head_dim"), inner.optional("num_key_value_heads") or kv_heads
    if len(found) > 1 or set(given) - fulls or set(inner.values) - inner.read:
        raise keys.refuse(
            "per_layer_config", "does not say head_dim, or num_key_value_heads too, alike for full layers"
        )
    return width, heads


# Keys and values of other widths, and latents


def mimo(keys: Keys) -> Sequence[Layer | None]:
    """Keys wider than values; sliding layers have twice as many heads of them."""
    number = keys.count("num_hidden_layers")
    marked = keys.entries("hybrid_layer_pattern", number, int)  # of the hub's file: 1 slides

    def default(layer: int) -> str:
        if marked is not None:
            return SLIDING if marked[layer] else FULL
        return FULL if layer == 0 else every(6, layer)

    types = layer_types(keys, default)
    if marked is not None and [kind == SLIDING for kind in types] != [bool(mark) for mark in marked]:
        raise keys.refuse("hybrid_layer_pattern", "and layer_types say different things")
    _, kv_heads = heads_of(keys)
    k_dim, v_dim, behind = keys.count("head_dim"), keys.count("v_head_dim"), keys.optional("sliding_window_size")
    window = keys.count("sliding_window") if behind is None else behind + 1
    keys.ignore("sliding_window", "attention_chunk_size", "swa_num_attention_heads", "swa_rope_theta")
    keys.ignore("add_swa_attention_sink_bias", "hybrid_block_size")
    for key, value in (("num_key_value_heads", 2 * kv_heads), ("head_dim", k_dim), ("v_head_dim", v_dim)):
        keys.same(f"swa_{key}", value, "as transformers builds the sliding layers")
    made = {
        FULL: lambda: grouped("full", kv_heads, k_dim, v_dim),
        SLIDING: lambda: grouped("sliding", 2 * kv_heads, k_dim, v_dim, window=window, sinks=True),
    }
    return of_types(keys, types, made)


def one_latent(keys: Keys) -> StoreSpec:
    keys.ignore("num_key_value_heads", "head_dim", "v_head_dim")
    return latent("latent", keys.count("kv_lora_rank"), keys.count("qk_rope_head_dim"))


def latents(keys: Keys) -> Sequence[Layer | None]:
    return [one_latent(keys)] * keys.count("num_hidden_layers")


def longcat(keys: Keys) -> Sequence[Layer | None]:
    """Two attentions in each layer."""
    return [one_latent(keys)] * (2 * keys.count("num_layers"))


# States


def gated_delta(keys: Keys, heads: int | None = None, k_dim: int | None = None) -> StoreSpec:
    """A matrix per value head, and the last inputs of a convolution of queries, keys and values."""
    k_heads = keys.optional("linear_num_key_heads") or heads
    v_heads = keys.optional("linear_num_value_heads") or heads
    k_dim = keys.optional("linear_key_head_dim") or k_dim
    v_dim = keys.optional("linear_value_head_dim") or (2 * k_dim if k_dim else None)
    if k_heads is None or v_heads is None or k_dim is None or v_dim is None:
        raise keys.refuse("linear_num_key_heads", "or another width of linear layers is missing")
    inputs = CacheTensor((2 * k_heads * k_dim + v_heads * v_dim, keys.count("linear_conv_kernel_dim")))
    return state("delta", CacheTensor((v_heads, k_dim, v_dim), True), inputs)


def qwen_next(keys: Keys) -> Sequence[Layer | None]:
    if keys.get("mamba_ssm_dtype") not in (None, "float32"):
        raise keys.refuse("mamba_ssm_dtype", "is not float32, as states are figured")
    period = keys.optional("full_attention_interval") or 4
    types = layer_types(keys, lambda layer: every(period, layer, other=LINEAR), (FULL, LINEAR))
    return of_types(keys, types, {FULL: lambda: full(keys), LINEAR: lambda: gated_delta(keys)})


def olmo_hybrid(keys: Keys) -> Sequence[Layer | None]:
    number = keys.count("num_hidden_layers")
    types = layer_types(keys, lambda i: FULL if i % 4 == 3 or i == number - 1 < 3 else LINEAR, (FULL, LINEAR))
    heads, hidden = keys.count("num_attention_heads"), keys.count("hidden_size")
    k_heads = keys.optional("linear_num_key_heads") or heads
    made = {FULL: lambda: full(keys), LINEAR: lambda: gated_delta(keys, heads, int(0.75 * hidden / k_heads))}
    return of_types(keys, types, made)


def kimi_linear(keys: Keys) -> Sequence[Layer | None]:
    """Layers in linear_attn_config are counted from 1."""
    number, parts = keys.count("num_hidden_layers"), keys.get("linear_attn_config") or {}
    if not isinstance(parts, dict):
        raise keys.refuse("linear_attn_config", f"is {parts!r:.60}; a section belongs there")
    names = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    inner = Keys(f"{keys.where}, linear_attn_config", parts, {old: keys.get(new) for old, new in names.items()})
    fulls, linears = inner.entries("full_attn_layers", None, int), inner.entries("kda_layers", None, int)
    if fulls is not None and linears is not None and sorted(fulls + linears) != list(range(1, number + 1)):
        raise inner.refuse("full_attn_layers", f"and kda_layers are not the layers 1 to {number}, each once")

    def default(layer: int) -> str:
        if fulls is not None and linears is not None:
            return FULL if layer + 1 in fulls else LINEAR
        return FULL if layer and layer % 4 == 0 else LINEAR

    types = layer_types(keys, default, (FULL, LINEAR))

    def kda() -> StoreSpec:
        heads, width = inner.count("num_heads"), inner.count("head_dim")
        inputs = CacheTensor((3 * heads * width, inner.count("short_conv_kernel_size")))
        return state("kda", CacheTensor((heads, width, width), True), inputs)

    keys.ignore("mla_use_nope")  # what has no positions is as wide
    return of_types(keys, types, {FULL: lambda: one_latent(keys), LINEAR: kda})


def minimax(keys: Keys) -> Sequence[Layer | None]:
    """Lightning attention: a matrix per head, of the model's own precision."""
    types = layer_types(keys, lambda layer: every(2, layer, LINEAR, other=FULL), (FULL, LINEAR))
    heads, _ = heads_of(keys)
    width = head_width(keys, heads)
    lightning = state("lightning", CacheTensor((heads, width, width)))
    return of_types(keys, types, {FULL: lambda: full(keys), LINEAR: lambda: lightning})


def mamba_state(inner: int, width: int, kernel: int) -> StoreSpec:
    return state("mamba", CacheTensor((inner, width), True), CacheTensor((inner, kernel)))


def mamba2_state(heads: int, width: int, size: int, groups: int, kernel: int) -> StoreSpec:
    inputs = CacheTensor((heads * width + 2 * groups * size, kernel))
    return state("mamba2", CacheTensor((heads, width, size), True), inputs)


def mamba(keys: Keys) -> Sequence[Layer | None]:
    inner = keys.count("expand") * keys.count("hidden_size")
    keys.same("intermediate_size", inner, "expand times hidden_size")
    return [mamba_state(inner, keys.count("state_size"), keys.count("conv_kernel"))] * keys.count("num_hidden_layers")


def mamba2(keys: Keys) -> Sequence[Layer | None]:
    heads, width = keys.count("num_heads"), keys.count("head_dim")
    if heads * width != keys.count("expand") * keys.count("hidden_size"):
        raise keys.refuse("num_heads", f"{heads} x head_dim {width} is not expand times hidden_size")
    store = mamba2_state(heads, width, keys.count("state_size"), keys.count("n_groups"), keys.count("conv_kernel"))
    return [store] * keys.count("num_hidden_layers")


def jamba(keys: Keys) -> Sequence[Layer | None]:
    period, offset = keys.count("attn_layer_period"), keys.count("attn_layer_offset", 0)
    types = layer_types(keys, lambda layer: FULL if layer % period == offset else LINEAR, (FULL, LINEAR))
    inner = keys.count("mamba_expand") * keys.count("hidden_size")
    store = mamba_state(inner, keys.count("mamba_d_state"), keys.count("mamba_d_conv"))
    keys.ignore("layers_block_type", "sliding_window")
    return of_types(keys, types, {FULL: lambda: full(keys), LINEAR: lambda: store})


def bamba_state(keys: Keys) -> StoreSpec:
    heads, width = keys.count("mamba_n_heads"), keys.get("mamba_d_head")
    inner = keys.count("mamba_expand") * keys.count("hidden_size")
    width = inner // heads if width in ("auto", None) else keys.count("mamba_d_head")
    if heads * width != inner:
        raise keys.refuse("mamba_d_head", f"{width} x mamba_n_heads {heads} is not mamba_expand times hidden_size")
    size, groups = keys.count("mamba_d_state"), keys.count("mamba_n_groups")
    return mamba2_state(heads, width, size, groups, keys.count("mamba_d_conv"))


def bamba(keys: Keys) -> Sequence[Layer | None]:
    fulls = keys.entries("attn_layer_indices", None, int) or []
    types = layer_types(keys, lambda layer: FULL if layer in fulls else LINEAR, (FULL, LINEAR))
    keys.ignore("layers_block_type")
    return of_types(keys, types, {FULL: lambda: full(keys), LINEAR: lambda: bamba_state(keys)})


def granite_hybrid(keys: Keys) -> Sequence[Layer | None]:
    types = layer_types(keys, lambda layer: LINEAR, (FULL, LINEAR))
    keys.ignore("layers_block_type")
    return of_types(keys, types, {FULL: lambda: full(keys), LINEAR: lambda: bamba_state(keys)})


NEMOTRON = {"M": LINEAR, "*": FULL, "E": "moe", "-": "mlp"}


def nemotron_h(keys: Keys) -> Sequence[Layer | None]:
    """Layers of one kind each; those that are MLPs or experts cache nothing."""
    pattern = keys.get("hybrid_override_pattern")
    types = keys.entries("layer_types", None, str) or keys.entries("layers_block_type", None, str)
    if pattern is not None and (not isinstance(pattern, str) or set(pattern) - set(NEMOTRON)):
        raise keys.refuse("hybrid_override_pattern", f"is {pattern!r:.60}; letters {' '.join(NEMOTRON)} are understood")
    if types is None:
        if pattern is None:
            raise keys.refuse("hybrid_override_pattern", "is missing: it says what each layer is")
        types = [NEMOTRON[letter] for letter in pattern]
    types = [OLD_NAMES.get(kind, kind) for kind in types]
    for kind in types:
        if kind not in NEMOTRON.values():
            raise keys.refuse("layer_types", f"has {kind!r:.60}; {', '.join(NEMOTRON.values())} are understood")
    keys.same("num_hidden_layers", len(types), "the number of layers that are listed")
    keys.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "mamba_num_groups")
    if keys.optional("sliding_window") is not None:
        raise keys.refuse("sliding_window", "is set; of this type it is not understood")
    made: dict[str, StoreSpec | None] = {"moe": None, "mlp": None}
    if FULL in types:
        made[FULL] = full(keys)
    else:
        keys.ignore("head_dim", "attention_head_dim")
    if LINEAR in types:
        groups = keys.optional("mamba_n_groups") or keys.count("n_groups")
        kernel = keys.optional("mamba_d_conv") or keys.count("conv_kernel")
        heads, width, size = keys.count("mamba_num_heads"), keys.count("mamba_head_dim"), keys.count("ssm_state_size")
        if keys.get("mamba_ssm_cache_dtype") not in (None, "float32"):
            raise keys.refuse("mamba_ssm_cache_dtype", "is not float32, as states are figured")
        keys.ignore("mamba_expand")
        made[LINEAR] = mamba2_state(heads, width, size, groups, kernel)
    return [made[kind] for kind in types]


def lfm2(keys: Keys) -> Sequence[Layer | None]:
    """Short convolutions between layers of attention."""
    number, fulls = keys.count("num_hidden_layers"), keys.entries("full_attn_idxs", None, int)
    listed = range(number) if fulls is None else fulls
    types = layer_types(keys, lambda layer: FULL if layer in listed else "conv", (FULL, "conv"))

    def conv() -> StoreSpec:
        return state("conv", CacheTensor((keys.count("hidden_size"), keys.count("conv_L_cache"))))

    return of_types(keys, types, {FULL: lambda: full(keys), "conv": conv})


GPT = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}
RULES: dict[Rule, str] = {
    all_full: "apertus arcee bitnet cohere ernie4_5 ernie4_5_moe gemma glm glm4 glm4_moe granite granitemoe helium"
    " hy_v3 llama nemotron olmo olmo2 olmoe phi seed_oss",
    hunyuan: "hunyuan_v1_dense hunyuan_v1_moe",
    minimax_m2: "minimax_m2",
    all_full_shared_width: "stablelm",
    multi_head: "gpt_neox opt gpt2 gptj",
    one_window: "ministral3 mistral mixtral phi3 phimoe starcoder2",
    optional_window: "qwen3_moe",
    upper_window: "qwen2 qwen3",
    odd_window: "qwen2_moe",
    nope_window: "smollm3",
    interleaved(2): "gemma2",
    interleaved(2, sinks=True): "gpt_oss",
    interleaved(4): "olmo3",
    interleaved(4, pattern_key="sliding_window_pattern"): "cohere2",
    interleaved(6, pattern_key="sliding_window_pattern"): "gemma3_text",
    windows_or_none: "ministral",
    exaone4: "exaone4",
    llama4: "llama4_text",
    falcon: "falcon",
    gpt_bigcode: "gpt_bigcode",
    gemma3n: "gemma3n_text",
    gemma4: "gemma4_text",
    mimo: "mimo_v2_flash",
    latents: "deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 mistral4",
    longcat: "longcat_flash",
    qwen_next: "qwen3_next qwen3_5_text qwen3_5_moe_text",
    olmo_hybrid: "olmo_hybrid",
    kimi_linear: "kimi_linear",
    minimax: "minimax",
    mamba: "mamba",
    mamba2: "mamba2",
    jamba: "jamba",
    bamba: "bamba",
    granite_hybrid: "granitemoehybrid",
    nemotron_h: "nemotron_h",
    lfm2: "lfm2 lfm2_moe",
}
TYPES: dict[str, tuple[Rule, dict[str, str]]] = {
    kind: (rule, GPT if kind in ("gpt2", "gptj", "gpt_bigcode") else {})
    for rule, kinds in RULES.items()
    for kind in kinds.split()
}
# Types of whole models whose language model has another, and names that mean a type above.
TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "kimi_k2": "deepseek_v3",
    "kimi_k25": "deepseek_v3",
}
_INDEXED = "an indexer keeps keys of its own and chooses which slots are read, which a plan cannot say"
UNFIGURED = {
    "deepseek_v32": _INDEXED,
    "deepseek_v4": "it pools tokens into entries (CSA, HCA), which a plan cannot say",
    "falcon_h1": "a layer has both a state and keys and values, which a plan cannot say",
    "glm5_next": _INDEXED,
    "glm5_next_text": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "mistral_large4": _INDEXED,
    "mistral_large4_text": _INDEXED,
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "zaya": "keys and values go through convolutions with states of their own, which a plan cannot say",
}
