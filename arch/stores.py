"""The registry of kinds of store, without torch: which of them a configuration asks for, and what it comes to.

A kind has a declaration, a subclass of StoreSpec in NAME_spec.py, listed in KINDS; its keys in config.StoreConfig; its
cache, writer and reader in NAME.py, listed in attention.STORE_MODULES; and the bytes that its layers save for the
backward pass, listed in train/estimates/activations.py.
"""

import math
from typing import Any

from .bounded_spec import BoundedSpec
from .config import MAX_COUNT, MAX_WIDTH, SizeConfig, StoreConfig, style_of
from .delta_spec import MatrixSpec
from .grouped_spec import GroupedSpec
from .latent_spec import LatentSpec
from .rope_scaling import RopeScaling, resolve_rope_scaling
from .store_spec import QueryScale, SlotShape, StoreSpec, resolve_share
from .strided_latent_spec import StridedLatentSpec
from .strided_spec import StridedSpec
from .tied_spec import TiedSpec

# In this order: the first kind that a configuration asks for is the store's.
KINDS: tuple[type[StoreSpec], ...] = (
    MatrixSpec,
    BoundedSpec,
    StridedLatentSpec,
    StridedSpec,
    LatentSpec,
    TiedSpec,
    GroupedSpec,
)


def kind_of(store: StoreConfig) -> type[StoreSpec]:
    """The kind that a configuration asks for."""
    return next((kind for kind in KINDS if kind.asked_by(store)), GroupedSpec)


def resolve_store(name: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> StoreSpec:
    """The store of an owner yet unknown (-1). Adds to `problems` what is wrong with it."""
    where = f"arch.stores.{name}"
    kind = kind_of(store)
    slot = SlotShape()
    if store.matrix is not None and (store.kv_heads is not None or store.latent is not None):
        problems.append(f"{where} has matrix and kv_heads or latent; one store holds one of them")
    elif store.matrix is None and (store.kv_heads is None) == (store.latent is None):
        problems.append(f"{where} needs either kv_heads or latent, and not both")
    else:
        slot = kind.resolve_slot(where, store, size, problems)
    window, chunk = store.window, store.chunk
    if chunk is not None:
        if window is not None or not kind.grows:
            other = f"window is {window}" if kind.grows else f"the store {kind.summary}"
            problems.append(f"{where}.chunk is {chunk}, and {other}: a layer sees positions of one kind; leave one out")
        elif chunk < 1:
            problems.append(f"{where}.chunk is {chunk}; it must be at least 1 (null: no chunks)")
        window = chunk
    elif window is not None and window < 1:
        problems.append(f"{where}.window is {window}; it counts the current token, so at least 1 (null: no window)")
    kind.check(where, store, problems)
    problems += [
        f"{where}.{other.key} is {getattr(store, other.key)}{other.stray.format(kind=kind.summary)}"
        for other in KINDS
        if other.stray and kind is not other and getattr(store, other.key) is not None and other.key not in kind.takes
    ]
    for key, value, limit in (
        ("window" if chunk is None else "chunk", window, MAX_COUNT),
        ("slots", store.slots, MAX_WIDTH),
        ("stride", store.stride, MAX_WIDTH),
    ):
        if value is not None and value > limit:
            problems.append(f"{where}.{key} is {value}; it must be at most {limit:,}")
    if store.rope_theta is not None and not 0 < store.rope_theta < math.inf:
        problems.append(f"{where}.rope_theta is {store.rope_theta}; it must be positive and finite")
    if window is not None and size.max_window is not None:
        window = min(window, size.max_window)
    rotary_dim = resolve_rotary(where, store, slot, size, problems) if kind.rotates else 0
    return kind(
        name=name,
        owner=-1,
        slot=slot,
        window=window,
        sinks=store.sinks,
        kv_norm=store.kv_norm,
        rope_theta=0.0 if rotary_dim == 0 else float(store.rope_theta or size.rope_theta),
        num_slots=min(store.slots or 0, size.max_window or store.slots or 0),
        rule=store.rule,
        rotary_dim=rotary_dim,
        query_scale=resolve_query_scale(where, store, kind, size, problems),
        chunked=chunk is not None,
        rope_scaling=resolve_scaling(where, store, kind, rotary_dim, problems),
        **kind.resolve_more(where, store, slot, size, problems),
    )


def store_from_dict(values: dict[str, Any]) -> StoreSpec:
    """The store that `to_dict` of a spec describes. Raises KeyError or TypeError if `values` are not such."""
    fields = {"num_slots" if key == "slots" else key: value for key, value in values.items()}
    fields["slot"] = SlotShape(**values["slot"])
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    if fields.get("query_scale"):
        fields["query_scale"] = QueryScale(**fields["query_scale"])
    return next(kind for kind in KINDS if kind.describes(fields)).from_fields(fields)


def resolve_scaling(
    where: str, store: StoreConfig, kind: type[StoreSpec], rotary_dim: int | None, problems: list[str]
) -> RopeScaling | None:
    """The slowing of frequencies. Adds to `problems` where that cannot be."""
    if store.rope_scaling is None:
        return None
    if kind not in (GroupedSpec, TiedSpec) or store.tied not in (None, "projection"):
        what = f"tied is {store.tied}" if store.tied else f"the store {kind.summary}"
        problems.append(
            f"{where}.rope_scaling is of keys that are rotated per head, and values that are not; {what}: leave it out"
        )
    elif rotary_dim == 0:
        problems.append(f"{where}.rope_scaling: rope is none, and nothing turns; leave one of them out")
    return resolve_rope_scaling(f"{where}.rope_scaling", store.rope_scaling, problems)


def resolve_query_scale(
    where: str, store: StoreConfig, kind: type[StoreSpec], size: SizeConfig, problems: list[str]
) -> QueryScale | None:
    """The factors of queries. Adds to `problems` what is wrong with the keys that decide them."""
    rule = store.query_scale
    if rule is None:
        return None
    if not kind.masked:
        problems.append(f"{where}.query_scale scales scores of positions; the store {kind.summary}: leave it out")
    if not 1 <= rule.tokens <= MAX_COUNT:
        problems.append(
            f"{where}.query_scale.tokens is {rule.tokens}; it must be at least 1, and at most {MAX_COUNT:,}"
        )
    if rule.slope == "learned":
        return QueryScale(None, 1)
    if isinstance(rule.slope, bool) or not isinstance(rule.slope, int | float) or not 0 < rule.slope < math.inf:
        problems.append(f"{where}.query_scale.slope is {rule.slope!r}; write a positive number, or learned")
        return None
    return QueryScale(float(rule.slope), min(rule.tokens, size.max_window or rule.tokens))


def resolve_rotary(
    where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
) -> int | None:
    """The leading elements of a key that are rotated; None: all. Adds to `problems` what is wrong with the keys that
    decide it."""
    if not slot.k_dim or slot.rope_dim:
        if store.rope is not None and store.latent is not None:
            problems.append(
                f"{where}.rope is {store.rope!r}; latents have a rotary key: write latent.rope_dim, 0 for none"
            )
        return None
    if store.rope is None:
        fraction = style_of(size).rotary_fraction
        if abs(fraction * slot.k_dim / 2 - round(fraction * slot.k_dim / 2)) > 1e-6:
            problems.append(
                f"{where}: {fraction:g} of keys of width {slot.k_dim} is rotated, and rotary embeddings need an even "
                "number of elements: change k_dim, or set rope"
            )
        return round(fraction * slot.k_dim) if fraction < 1 else None
    if store.rope == "full":
        if slot.k_dim % 2:
            problems.append(
                f"{where}.rope is full, of keys of width {slot.k_dim}; rotary embeddings need an even number"
            )
        return None
    if store.rope == "none":
        if store.rope_theta is not None:
            problems.append(f"{where}.rope_theta is {store.rope_theta}, and rope is none: leave one of them out")
        return 0
    rotary = resolve_share(f"{where}.rope", store.rope, slot.k_dim, "the width of a key", problems)
    if rotary % 2 or rotary > slot.k_dim:
        problems.append(
            f"{where}.rope is {store.rope}, {rotary} of {slot.k_dim} elements; rotary embeddings need an even number "
            "of them: write full, none or another share"
        )
    return rotary if rotary < slot.k_dim else None
