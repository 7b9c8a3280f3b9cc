"""Resolve a written layout: which layer writes which store, and which store each layer reads.

slot   what one cached position holds
store  the slots that exactly one owner layer writes, with a retention: all of them, a window, or a bounded state
read   each layer reads exactly one store: its own or an earlier layer's
plan   the tuple of stores and the tuple of reads, one per layer

Everything that depends on a layout (weights, data flow, masks, cache, bytes, export) asks the plan and nothing else.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from .config import (
    MAX_COUNT,
    MAX_LAYERS,
    MAX_NESTING,
    MAX_WIDTH,
    MLPS,
    NORMS,
    OUTPUT_GATES,
    QK_NORMS,
    STYLES,
    ModelConfig,
    SizeConfig,
    head_dim,
    style_of,
)
from .stores import LayoutError, StoreSpec, resolve_store, share_of


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


# The window of a store, and that of a layer which looks at fewer of its positions (None: the same).
ReadWindow = tuple[int | None, int | None]


@dataclass(frozen=True)
class KVPlan:
    """The resolved layout: `stores` in the order of their owners; layer i reads `stores[reads[i]]`.

    reader_windows   for each layer a window of its own, smaller than the store's; empty: no layer has one
    views            the stores, then those that layers read in a window of their own, with that window
    view_reads       layer i sees `views[view_reads[i]]`
    read_windows     of each view
    target_offset    a position's target is the token so many after it
    num_unpredicted  targets at the start of a sequence that the model does not predict
    block_length     tokens that one context predicts
    min_prompt       tokens after which it can predict the next one
    """

    stores: tuple[StoreSpec, ...]
    reads: tuple[int, ...]
    reader_windows: tuple[int | None, ...] = ()
    views: tuple[StoreSpec, ...] = field(init=False, repr=False, compare=False)
    view_reads: tuple[int, ...] = field(init=False, repr=False, compare=False)
    read_windows: tuple[ReadWindow, ...] = field(init=False, repr=False, compare=False)

    target_offset: ClassVar[int] = 1
    num_unpredicted: ClassVar[int] = 0
    block_length: ClassVar[int] = 1
    min_prompt: ClassVar[int] = 1

    def __post_init__(self) -> None:
        pairs = list(zip(self.reads, self.reader_windows, strict=True)) if self.reader_windows else []
        own = list(dict.fromkeys((read, window) for read, window in pairs if window is not None))
        seen = tuple(read if window is None else len(self.stores) + own.index((read, window)) for read, window in pairs)
        views = tuple(replace(self.stores[read], window=window) for read, window in own)
        windows: list[ReadWindow] = [(store.window, None) for store in self.stores]
        windows += [(self.stores[read].window, window) for read, window in own]
        for name, value in (
            ("views", self.stores + views),
            ("view_reads", seen or self.reads),
            ("read_windows", tuple(windows)),
        ):
            object.__setattr__(self, name, value)

    @property
    def stacks(self) -> tuple[StackPlan, ...]:
        return (StackPlan("", "token", self),)

    @property
    def num_layers(self) -> int:
        return len(self.reads)

    @property
    def owners(self) -> tuple[int, ...]:
        """The owner of the store that each layer reads; one layer index per layer."""
        return tuple(self.stores[read].owner for read in self.reads)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of what is read by a mask, in order of first use."""
        return tuple(dict.fromkeys(view.window for view in self.views if view.masked))

    def store(self, layer: int) -> StoreSpec:
        """The store that `layer` reads, in the window that it sees of it."""
        return self.views[self.view_reads[layer]]

    def own_window(self, layer: int) -> int | None:
        """The window of `layer` where it sees less than its store keeps."""
        return self.reader_windows[layer] if self.reader_windows else None

    def readers(self, store: StoreSpec) -> tuple[int, ...]:
        """The layers that read `store`, its owner first."""
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == store.owner)

    @property
    def last_owner(self) -> int:
        """The layer above which nothing is written."""
        return self.stores[-1].owner

    @property
    def tail(self) -> int:
        """The first of the layers that need the last position alone where nothing else is asked of the stack.

        The last owner, which writes at every position and then goes on with the last, and all above it; a layer that
        reads its store not by a mask needs every position, and so do those below it.
        """
        above = range(self.last_owner, self.num_layers)
        return max([self.last_owner, *(layer + 1 for layer in above if not self.store(layer).masked)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        own = {"reader_windows": self.reader_windows} if self.reader_windows else {}
        return {"stores": tuple(store.to_dict() for store in self.stores), "reads": self.reads, **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KVPlan":
        """Raises KeyError or TypeError where `values` are not those of a plan."""
        stores, reads = tuple(map(StoreSpec.from_dict, values["stores"])), tuple(values["reads"])
        own = tuple(values.get("reader_windows", ()))
        if own and (
            len(own) != len(reads)
            or not all(type(read) is int and 0 <= read < len(stores) for read in reads)
            or not all(window is None or (type(window) is int and window >= 1) for window in own)
        ):
            raise TypeError("reader_windows are no windows of its layers")
        return cls(stores, reads, own)

    def __str__(self) -> str:
        """The map in the notation of the MixAttention paper: the owner of each layer, `s` for sliding windows; and `b`
        for bounded stores, `d` for a matrix per head."""
        stores = map(self.store, range(self.num_layers))
        return " ".join(f"{store.owner}{store.mark}" for store in stores)


def resolve_stack(config: ModelConfig) -> KVPlan:
    """The plan of one stack of layers: a decoder, or one of the two of a Block Transformer.

    Raises LayoutError where the size is impossible, or else with every problem of the layout.
    """
    problems = _check_size(config.size)
    if config.arch.block is not None:
        problems.append("arch.block makes this a Block Transformer, no decoder: build it with arch.build")
    if problems:
        raise LayoutError(problems)
    problems += [
        f"arch.stores.{name}: a store type has a name of letters, digits, _ and -"
        for name in config.arch.stores
        if not re.fullmatch(r"[\w-]+", name)
    ]
    types = {name: resolve_store(name, store, config.size, problems) for name, store in config.arch.stores.items()}
    items = _expand(config, problems)
    if not any(store.window or store.slots for store in config.arch.stores.values()):
        problems += [
            f"arch.stores.{name}.sinks needs a window, of this store or of one beside it: sinks stand in for the "
            "positions that a window drops"
            for name, store in config.arch.stores.items()
            if store.sinks and store.matrix is None
        ]
    if problems:
        raise LayoutError(problems)

    stores: list[StoreSpec] = []
    reads: list[int] = []
    latest: dict[str, int] = {}
    own = _own_windows(config, types, items, problems)
    for layer, (verb, name, _) in enumerate(items):
        if verb == "new":
            latest[name] = len(stores)
            stores.append(replace(types[name], owner=layer))
        elif name not in latest:
            latest[name] = 0  # reported once; the plan is not built
            problems.append(
                f"layer {layer}: `reuse {name}` has nothing to reuse, no layer below it writes a {name} store; "
                f"put a `new {name}` at or below layer {layer}"
            )
            continue
        elif types[name].unshared:
            problems.append(f"layer {layer}: `reuse {name}` is impossible: {types[name].unshared}; write `new {name}`")
            continue
        reads.append(latest[name])
    if problems:
        raise LayoutError(problems)
    return KVPlan(tuple(stores), tuple(reads), own if any(own) else ())


def _own_windows(
    config: ModelConfig, types: dict[str, StoreSpec], items: list["Item"], problems: list[str]
) -> tuple[int | None, ...]:
    """The window of each layer that sees less than its store keeps. Adds to `problems` windows that cannot be."""
    for verb, name, window in dict.fromkeys(items):
        item, kept = f"arch.pattern: `{verb} {name} window={window}`", config.arch.stores[name].window
        if window is None:
            continue
        if not types[name].masked:
            problems.append(
                f"{item}: {name} {types[name].summary}, of which a layer reads all; leave window={window} out"
            )
        elif window > (kept or MAX_COUNT):
            problems.append(
                f"{item}: {name} keeps {kept:,} positions; a layer sees at most those"
                if kept
                else f"{item}: a window must be at most {MAX_COUNT:,}"
            )
    most = config.size.max_window or MAX_COUNT
    windows = [(types[item.name].window, item.window and min(item.window, most)) for item in items]
    return tuple(None if window is None or window >= (kept or MAX_COUNT + 1) else window for kept, window in windows)


def _check_size(size: SizeConfig) -> list[str]:
    largest = {"num_layers": MAX_LAYERS}
    largest |= dict.fromkeys(("d_model", "num_heads", "d_ff", "vocab_size", "head_dim"), MAX_WIDTH)
    largest |= dict.fromkeys(("seq_len", "batch_size", "tokens", "max_window"), MAX_COUNT)
    problems = []
    for name, limit in largest.items():
        value = getattr(size, name)
        if value is not None and value < 1 and name not in ("head_dim", "max_window"):  # which are told below
            problems.append(f"size.{name} is {value}; it must be at least 1")
        elif value is not None and value > limit:
            problems.append(f"size.{name} is {value}; it must be at most {limit:,}")
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
        f"size.{key} is {getattr(style, key)!r}; it is {', '.join(choices[:-1])} or {choices[-1]}"
        for key, choices in (("norm", NORMS), ("mlp", MLPS), ("qk_norm", QK_NORMS), ("output_gate", OUTPUT_GATES))
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


class Item(NamedTuple):
    """One layer of a pattern: `new` or `reuse`, the type of store, and a window of its own."""

    verb: str
    name: str
    window: int | None = None


def _expand(config: ModelConfig, problems: list[str]) -> list[Item]:
    """One item for each layer. Adds to `problems` what is wrong with the pattern."""
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

    layers = allot_layers(sections, depth, problems)
    items: list[Item] = []
    mentioned: set[str] = set()
    for number, section in enumerate(sections):
        where = "arch.pattern" if not any(has_section) else f"arch.pattern[{number}]"
        tile = _tile(where, section.get("pattern"), config.arch.stores, depth, problems)
        short = section.get("short_group", config.arch.short_group)
        if short not in ("first", "last"):
            problems.append(f"{where}: short_group is {short!r}; it is `first` or `last`")
        if tile:
            whole, rest = divmod(layers[number], len(tile))
            items += tile[:rest] + tile * whole if short == "first" else tile * whole + tile[:rest]
        mentioned.update(item.name for item in tile)
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


def allot_layers(sections: list[dict[str, Any]], depth: int, problems: list[str]) -> list[int]:
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


def _tile(
    where: str, entries: Any, stores: dict[str, Any], depth: int, problems: list[str], nesting: int = 1
) -> list[Item]:
    """The items of a pattern, groups flattened and `xN` repeats written out, as far as `depth` layers can tell."""
    items: list[Item] = []
    if nesting > MAX_NESTING:
        problems.append(f"{where}: lists lie more than {MAX_NESTING} deep in each other; they group items for the eye")
        return items
    if not isinstance(entries, list) or not entries:
        problems.append(f"{where}: a pattern is a list of `new X` and `reuse X`, not {entries!r}")
        return items
    for entry in entries:
        if isinstance(entry, list):
            items += _tile(where, entry, stores, depth, problems, nesting + 1)
            continue
        match = re.fullmatch(r"\s*(new|reuse)\s+(\S+)(?:\s+window=([1-9]\d{,17}))?(?:\s+x([1-9]\d*))?\s*", str(entry))
        if match is None:
            problems.append(
                f"{where}: cannot read {entry!r}; write `new X`, `reuse X` or `new X x3`, X from arch.stores, or "
                "`reuse X window=256`"
            )
        elif match[2] not in stores:
            problems.append(f"{where}: `{entry}` names no store type; arch.stores has {', '.join(stores) or 'none'}")
        else:
            repeats, item = match[4] or "1", Item(match[1], match[2], int(match[3]) if match[3] else None)
            items += [item] * (depth if len(repeats) > 9 else min(int(repeats), depth))
    return items
