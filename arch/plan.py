"""From a written layout to the resolved one: which layer writes which store, and which store each layer reads.

slot   what one cached position holds
store  the slots that exactly one owner layer writes, with a retention: all of them, a window, or a bounded state
read   each layer reads exactly one store: its own or an earlier layer's
plan   the tuple of stores and the tuple of reads, one per layer

Everything that depends on a layout (weights, data flow, masks, cache, bytes, export) asks the plan and nothing else.
"""

import math
import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from .config import MLPS, NORMS, STYLES, ModelConfig, SizeConfig, StoreConfig, head_dim, style_of

# Rules of bounded stores (bounded.py has the formulas), and whether they take a window. All are readings of the
# Bounded-Cache Transformer (Yi et al. 2024), whose own update formula was in no text accessible to us.
RULES = {"gated": False, "ring_slots": True, "ring_router": False}
# Tokens that the parallel form of a bounded store takes at a time.
CHUNK = 16


class LayoutError(ValueError):
    """A layout or size that cannot be built. The message lists every problem found, each with its fix."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class SlotShape:
    """Elements that one cached position holds: keys and values per head, or a latent and a rotary key for all heads."""

    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    latent_dim: int = 0
    rope_dim: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor of the slot, for one position."""
        if self.latent_dim:
            return ((self.latent_dim,), (self.rope_dim,))
        return ((self.kv_heads, self.k_dim), (self.kv_heads, self.v_dim))

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.k_dim + self.v_dim) + self.latent_dim + self.rope_dim

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a key."""
        return self.rope_dim if self.latent_dim else self.k_dim


@dataclass(frozen=True)
class StoreSpec:
    """The slots that layer `owner` writes. `window` counts the current position; None keeps every position.

    A bounded store merges positions into `num_slots` slots by `rule`; its window, if any, keeps the last positions
    whole beside them.
    `rotary_dim`: leading elements of a key that are rotated; None: all that the slot allows.
    """

    name: str
    owner: int
    slot: SlotShape
    window: int | None
    sinks: bool
    kv_norm: bool
    rope_theta: float
    rotary_dim: int | None = None
    num_slots: int = 0
    rule: str | None = None

    @property
    def rope_key(self) -> tuple[int, float]:
        """What decides the rotary table of its keys: (width, base)."""
        return self.rotary_dim or self.slot.rotary_dim, self.rope_theta

    @property
    def max_positions(self) -> int | None:
        """Positions and slots it never holds more of; None: it grows with the context."""
        return self.num_slots + (self.window or 0) if self.num_slots else self.window

    @property
    def address_dim(self) -> int:
        """Width of what a bounded store's router reads: a write query, or the kept keys of all heads."""
        return self.slot.kv_heads * self.slot.k_dim if self.window else self.slot.k_dim

    def positions(self, context: int) -> int:
        """Cached positions after `context` tokens. A bounded state is there whole from the first token on."""
        if self.max_positions is None or self.num_slots:
            return self.max_positions or context
        return min(context, self.max_positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, under the names that plan.json and checkpoint.json have always had."""
        return {"slots" if key == "num_slots" else key: value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StoreSpec":
        fields = {"num_slots" if key == "slots" else key: value for key, value in values.items()}
        return cls(**{**fields, "slot": SlotShape(**values["slot"])})


class StackPlan(NamedTuple):
    """One stack of layers of a model, and the positions it sees.

    title                its name, such as `block decoder`; empty in a model of one stack
    unit                 what a position is: token, block, or position (of a block)
    tokens_per_position  tokens of context that add one position
    fixed_positions      positions at any context; None: they grow with it
    num_cross_vectors    vectors that each layer attends to besides its own sequence, with keys and values of their own
    """

    title: str
    unit: str
    plan: "KVPlan"
    tokens_per_position: int = 1
    fixed_positions: int | None = None
    num_cross_vectors: int = 0

    def num_positions(self, context: int) -> int:
        """Positions after `context` tokens."""
        return context // self.tokens_per_position if self.fixed_positions is None else self.fixed_positions


@dataclass(frozen=True)
class KVPlan:
    """The resolved layout: `stores` in the order of their owners; layer i reads `stores[reads[i]]`.

    target_offset    a position's target is the token so many after it
    num_unpredicted  targets at the start of a sequence that the model does not predict
    block_length     tokens that one context predicts
    min_prompt       tokens after which it can predict the next one
    """

    stores: tuple[StoreSpec, ...]
    reads: tuple[int, ...]

    target_offset: ClassVar[int] = 1
    num_unpredicted: ClassVar[int] = 0
    block_length: ClassVar[int] = 1
    min_prompt: ClassVar[int] = 1

    @property
    def stacks(self) -> tuple[StackPlan, ...]:
        return (StackPlan("", "token", self),)

    @property
    def num_layers(self) -> int:
        return len(self.reads)

    @property
    def owners(self) -> tuple[int, ...]:
        """For each layer, the layer whose keys and values it reads."""
        return tuple(self.stores[read].owner for read in self.reads)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of stores that are not bounded, in order of first use."""
        return tuple(dict.fromkeys(store.window for store in self.stores if not store.num_slots))

    def store(self, layer: int) -> StoreSpec:
        """The store that `layer` reads."""
        return self.stores[self.reads[layer]]

    def readers(self, store: StoreSpec) -> tuple[int, ...]:
        """The layers that read `store`, its owner first."""
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == store.owner)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {"stores": tuple(store.to_dict() for store in self.stores), "reads": self.reads}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KVPlan":
        """Raises KeyError or TypeError where `values` are not those of a plan."""
        return cls(tuple(map(StoreSpec.from_dict, values["stores"])), tuple(values["reads"]))

    def __str__(self) -> str:
        """The map in the notation of the MixAttention paper: the owner of each layer, `s` for sliding windows; and `b`
        for bounded stores."""
        marks = (
            "b" if store.num_slots else "s" if store.window else "" for store in map(self.store, range(len(self.reads)))
        )
        return " ".join(f"{owner}{mark}" for owner, mark in zip(self.owners, marks, strict=True))


def resolve_stack(config: ModelConfig) -> KVPlan:
    """The plan of one stack of layers: a decoder, or one of the two of a Block Transformer.

    Raises LayoutError where the size is impossible, or else with every problem of the layout.
    """
    problems = _check_size(config.size)
    if config.arch.block is not None:
        problems.append("arch.block makes this a Block Transformer, no decoder: build it with arch.build")
    if problems:
        raise LayoutError(problems)
    types = {name: _resolve_store(name, store, config.size, problems) for name, store in config.arch.stores.items()}
    items = _expand(config, problems)
    if problems:
        raise LayoutError(problems)

    stores: list[StoreSpec] = []
    reads: list[int] = []
    latest: dict[str, int] = {}
    for layer, (verb, name) in enumerate(items):
        if verb == "new":
            latest[name] = len(stores)
            stores.append(StoreSpec(owner=layer, **types[name]))
        elif name not in latest:
            problems.append(
                f"layer {layer}: `reuse {name}` has nothing to reuse, no layer below it writes a {name} store; "
                f"put a `new {name}` at or below layer {layer}"
            )
            continue
        reads.append(latest[name])
    if problems:
        raise LayoutError(problems)
    return KVPlan(tuple(stores), tuple(reads))


def _check_size(size: SizeConfig) -> list[str]:
    problems = [
        f"size.{name} is {getattr(size, name)}; it must be at least 1"
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size", "seq_len", "batch_size", "tokens")
        if getattr(size, name) < 1
    ]
    if problems:
        return problems
    if size.head_dim is None and size.d_model % size.num_heads:
        problems.append(
            f"size.d_model {size.d_model} is not a multiple of size.num_heads {size.num_heads}; set size.head_dim, "
            "or change one of them"
        )
    elif head_dim(size) < 2 or head_dim(size) % 2:
        problems.append(f"the head dimension is {head_dim(size)}; rotary embeddings need an even one")
    problems += _check_style(size, rotates=not problems)
    if size.max_window is not None and size.max_window < 1:
        problems.append(f"size.max_window is {size.max_window}; it must be at least 1, or null for no limit")
    for name in ("rope_theta", "norm_eps", "init_std", "lr"):
        if not 0 < getattr(size, name) < math.inf:
            problems.append(f"size.{name} is {getattr(size, name)}; it must be positive and finite")
    return problems


def _check_style(size: SizeConfig, rotates: bool) -> list[str]:
    """Problems of the style; of its rotary fraction where the head dimension is a possible one (`rotates`)."""
    if size.style not in STYLES:
        return [f"size.style is {size.style!r}; it is {' or '.join(STYLES)}"]
    style, width = style_of(size), head_dim(size)
    problems = [
        f"size.{key} is {getattr(style, key)!r}; it is {' or '.join(choices)}"
        for key, choices in (("norm", NORMS), ("mlp", MLPS))
        if getattr(style, key) not in choices
    ]
    rotary = style.rotary_fraction * width
    if not 0 < style.rotary_fraction <= 1:
        problems.append(f"size.rotary_fraction is {style.rotary_fraction}; it must be above 0 and at most 1")
    elif rotates and abs(rotary - 2 * round(rotary / 2)) > 1e-6:
        problems.append(
            f"size.rotary_fraction {style.rotary_fraction:g} of the head dimension {width} is {rotary:g}; rotary "
            f"embeddings need an even number: take a multiple of {2 / style.rotary_fraction:g} as head dimension"
        )
    return problems


def _resolve_store(name: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> dict[str, Any]:
    """The fields of `StoreSpec` that do not depend on the layer. Adds to `problems` what is wrong with them."""
    where = f"arch.stores.{name}"
    width, heads, rotary = head_dim(size), size.num_heads, style_of(size).rotary_fraction
    slot = SlotShape()
    if (store.kv_heads is None) == (store.latent is None):
        problems.append(f"{where} needs either kv_heads or latent, and not both")
    elif store.latent is not None:
        latent_dim = _share(f"{where}.latent.dim", store.latent.dim, width, "the head dimension", problems)
        rope_dim = _share(f"{where}.latent.rope_dim", store.latent.rope_dim, width, "the head dimension", problems)
        if rope_dim % 2:
            problems.append(f"{where}.latent.rope_dim is {rope_dim}; rotary embeddings need an even number")
        slot = SlotShape(latent_dim=latent_dim, rope_dim=rope_dim)
    else:
        wanted = "1/1" if store.kv_heads == "all" else store.kv_heads
        kv_heads = _share(f"{where}.kv_heads", wanted, heads, "the query heads", problems)
        if kv_heads and heads % kv_heads:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            problems.append(f"{where}.kv_heads {kv_heads} does not divide the {heads} query heads; choose {divisors}")
        slot = SlotShape(kv_heads=kv_heads, k_dim=width, v_dim=width)
    window = store.window
    if window is not None and window < 1:
        problems.append(f"{where}.window is {window}; it counts the current token, so at least 1 (null: no window)")
    if window is None and store.slots is None and store.sinks:
        problems.append(f"{where}.sinks needs a window: sinks stand in for the positions that a window drops")
    _check_bounded(where, store, problems)
    if store.rope_theta is not None and not 0 < store.rope_theta < math.inf:
        problems.append(f"{where}.rope_theta is {store.rope_theta}; it must be positive and finite")
    if window is not None and size.max_window is not None:
        window = min(window, size.max_window)
    return {
        "name": name,
        "slot": slot,
        "window": window,
        "sinks": store.sinks,
        "kv_norm": store.kv_norm,
        "rope_theta": float(store.rope_theta or size.rope_theta),
        "num_slots": min(store.slots or 0, size.max_window or store.slots or 0),
        "rule": store.rule,
        "rotary_dim": round(rotary * width) if slot.k_dim and rotary < 1 else None,
    }


def _check_bounded(where: str, store: StoreConfig, problems: list[str]) -> None:
    """Adds to `problems` what is wrong with the slots and the rule of a bounded store."""
    rules = ", ".join(RULES)
    if store.slots is None:
        if store.rule is not None:
            problems.append(f"{where}.rule {store.rule} needs slots, how many it may write; or leave the rule out")
        return
    if store.slots < 1:
        problems.append(f"{where}.slots is {store.slots}; a bounded store has at least 1 (null: not bounded)")
    if store.latent is not None:
        problems.append(f"{where}.slots cannot hold a latent; write kv_heads instead")
    if store.rule not in RULES:
        problems.append(f"{where}.rule is {store.rule!r}; stores with slots need one of {rules}")
    elif RULES[store.rule] and store.window is None:
        problems.append(f"{where}.rule {store.rule} needs a window: the last positions, kept whole beside the slots")
    elif not RULES[store.rule]:
        for key in ("window", "rope_theta"):
            if getattr(store, key) is not None:
                problems.append(
                    f"{where}.{key} is {getattr(store, key)}; rule {store.rule} has only slots, without positions: "
                    "leave it out, or choose ring_slots"
                )


def _share(where: str, value: int | str | None, whole: int, of: str, problems: list[str]) -> int:
    """`value` as a count: itself, or the share `a/b` of `whole`. Adds to `problems` and returns 0 if it is neither."""
    amount = share_of(value, whole)
    if amount is None:
        problems.append(f"{where} is {value!r}; write a number, or a share of {of} such as 1/4")
        return 0
    if amount < 1 or amount.denominator != 1:
        problems.append(
            f"{where} is {value}, {amount} with {whole} as {of}; it must come to a whole number, at least 1"
        )
        return 0
    return int(amount)


def share_of(value: Any, whole: int) -> Fraction | None:
    """A number as it stands, `a/b` as that share of `whole`, None for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:/\s*([1-9]\d*)\s*)?", str(value))
    if match is None:
        return None
    return Fraction(int(match[1]), int(match[2])) * whole if match[2] else Fraction(int(match[1]))


Item = tuple[str, str]


def _expand(config: ModelConfig, problems: list[str]) -> list[Item]:
    """One (verb, store type) for each layer. Adds to `problems` what is wrong with the pattern."""
    pattern, depth = list(config.arch.pattern), config.size.num_layers
    if not pattern:
        problems.append("arch.pattern is empty; write at least `[new kv]`, with kv one of the names under arch.stores")
        return []
    has_section = [isinstance(entry, dict) for entry in pattern]
    if not any(has_section):
        sections: list[dict[str, Any]] = [{"pattern": pattern}]
    elif all(has_section):
        sections = pattern
    else:
        problems.append(
            "arch.pattern mixes items and sections; put all items into sections {layers: n, pattern: [...]}"
        )
        return []

    layers = _allot(sections, depth, problems)
    items: list[Item] = []
    mentioned: set[str] = set()
    for number, section in enumerate(sections):
        where = "arch.pattern" if not any(has_section) else f"arch.pattern[{number}]"
        tile = _tile(where, section.get("pattern"), config.arch.stores, problems)
        short = section.get("short_group", config.arch.short_group)
        if short not in ("first", "last"):
            problems.append(f"{where}: short_group is {short!r}; it is `first` or `last`")
        if tile:
            whole, rest = divmod(layers[number], len(tile))
            items += tile[:rest] + tile * whole if short == "first" else tile * whole + tile[:rest]
        mentioned.update(name for _, name in tile)
    for name in config.arch.stores:
        if name not in mentioned:
            problems.append(
                f"arch.stores.{name} is in no item of arch.pattern; use it, or remove it (~arch.stores.{name})"
            )
    if not problems and len(items) != depth:
        problems.append(
            f"arch.pattern covers {len(items)} layers, the model has {depth}; leave `layers` out of one section, "
            "which then takes the rest"
        )
    return items


def _allot(sections: list[dict[str, Any]], depth: int, problems: list[str]) -> list[int]:
    """Layers of each section: counts and shares in order while the depth lasts, the rest to the section without."""
    layers = [0] * len(sections)
    left = depth
    open_section = None
    for number, section in enumerate(sections):
        where = f"arch.pattern[{number}]"
        unknown = sorted(set(section) - {"layers", "pattern", "short_group"})
        if unknown:
            problems.append(f"{where} has no {', '.join(unknown)}; a section's keys are layers, pattern, short_group")
        wanted = section.get("layers")
        amount = share_of(wanted, depth)
        if wanted is None and open_section is None:
            open_section = number
        elif wanted is None:
            problems.append(f"{where} and arch.pattern[{open_section}] both lack `layers`; only one can take the rest")
        elif amount is None:
            problems.append(f"{where}.layers is {wanted!r}; write a number, or a share of the depth such as 1/2")
        else:
            layers[number] = min(int(amount), left)
            left -= layers[number]
    if open_section is not None:
        layers[open_section] = left
    return layers


def _tile(where: str, entries: Any, stores: dict[str, Any], problems: list[str]) -> list[Item]:
    """The items of a pattern, groups flattened and `xN` repeats written out."""
    items: list[Item] = []
    if not isinstance(entries, list) or not entries:
        problems.append(f"{where}: a pattern is a list of `new X` and `reuse X`, not {entries!r}")
        return items
    for entry in entries:
        if isinstance(entry, list):
            items += _tile(where, entry, stores, problems)
            continue
        match = re.fullmatch(r"\s*(new|reuse)\s+(\S+)(?:\s+x([1-9]\d*))?\s*", str(entry))
        if match is None:
            problems.append(
                f"{where}: cannot read {entry!r}; write `new X`, `reuse X` or `new X x3`, X from arch.stores"
            )
        elif match[2] not in stores:
            problems.append(f"{where}: `{entry}` names no store type; arch.stores has {', '.join(stores) or 'none'}")
        else:
            items += [(match[1], match[2])] * int(match[3] or 1)
    return items
