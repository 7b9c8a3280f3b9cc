"""Resolve a written layout: which layer writes which store, and which store each layer reads.

slot   the content of one cached position
store  the slots that exactly one owner layer writes, and how long they are kept: all, a window, or a bounded state
read   the store that a layer reads: its own or an earlier layer's; or keys of one and values of another, or a mix
plan   the tuple of stores and the tuple of reads, one per layer

Everything that depends on a layout (weights, data flow, masks, cache, bytes, export) asks the plan and nothing else.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

from .config import (
    MAX_COUNT,
    MAX_LAYERS,
    MAX_NESTING,
    MAX_WIDTH,
    MLPS,
    NORM_PLACEMENTS,
    NORMS,
    OUTPUT_GATES,
    QK_NORMS,
    STYLES,
    ModelConfig,
    SizeConfig,
    head_dim,
    style_of,
)
from .mixed_spec import MixedSpec
from .spans import Span
from .store_spec import LayoutError, StoreSpec, share_of
from .stores import resolve_store, store_from_dict


class StackPlan(NamedTuple):
    """One stack of layers of a model, and the positions it sees.

    title                name of the stack, such as `block decoder`; empty in a model of one stack
    unit                 unit of its positions: token, block, or position (of a block)
    tokens_per_position  tokens of context per position
    fixed_positions      positions at any context; None: they grow with it
    num_cross_vectors    vectors outside of its sequence that each layer attends to, with keys and values of their own
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


class StackRun(NamedTuple):
    """The work of one stack of layers in a forward pass over one sequence.

    rows       rows of the stack
    positions  positions per row
    outputs    positions, over all rows, whose last residual stream is used
    """

    rows: int
    positions: int
    outputs: int


# The window of a store, and the smaller one of a layer that reads it (None: the same).
ReadWindow = tuple[Span, int | None]

# How a layer reads a second store: only its values, or its keys and values mixed with those of the first.
SECOND_READS = ("values", "mix")


class SecondRead(NamedTuple):
    """A store that a layer reads besides the one of its keys: one of SECOND_READS, and the number of the store."""

    how: str
    store: int


@dataclass(frozen=True)
class KVPlan:
    """The resolved layout: `stores` in the order of their owners; layer i reads `stores[reads[i]]`.

    reader_windows   for each layer a window of its own, smaller than the store's; empty: no layer has one
    second_reads     for each layer a second store, whose values it reads instead or mixes in; empty: no layer has one
    views            the stores, then the views of layers that read them in a smaller window or with a second store
    view_reads       layer i sees `views[view_reads[i]]`
    view_stores      for each view, the store of its keys
    read_windows     for each view, the window of its store and its own
    target_offset    a position predicts the token this many after it
    num_unpredicted  targets at the start of a sequence that the model does not predict
    block_length     tokens that one context predicts
    min_prompt       tokens that the model needs to predict the next one
    """

    stores: tuple[StoreSpec, ...]
    reads: tuple[int, ...]
    reader_windows: tuple[int | None, ...] = ()
    second_reads: tuple[SecondRead | None, ...] = ()
    views: tuple[StoreSpec, ...] = field(init=False, repr=False, compare=False)
    view_reads: tuple[int, ...] = field(init=False, repr=False, compare=False)
    view_stores: tuple[int, ...] = field(init=False, repr=False, compare=False)
    read_windows: tuple[ReadWindow, ...] = field(init=False, repr=False, compare=False)

    target_offset: ClassVar[int] = 1
    num_unpredicted: ClassVar[int] = 0
    block_length: ClassVar[int] = 1
    min_prompt: ClassVar[int] = 1

    def __post_init__(self) -> None:
        layers = range(len(self.reads))
        seen = [(self.reads[layer], self.own_window(layer), self.second_read(layer)) for layer in layers]
        own = list(dict.fromkeys(key for key in seen if key[1:] != (None, None)))
        for name, value in (
            ("views", (*self.stores, *(self._view(*key) for key in own))),
            ("view_reads", tuple(len(self.stores) + own.index(key) if key in own else key[0] for key in seen)),
            ("view_stores", (*range(len(self.stores)), *(read for read, *_ in own))),
            (
                "read_windows",
                (
                    *((store.span, None) for store in self.stores),
                    *((self.stores[read].span, window) for read, window, _ in own),
                ),
            ),
        ):
            object.__setattr__(self, name, value)

    def _view(self, read: int, window: int | None, second: SecondRead | None) -> StoreSpec:
        """The store as a layer sees it in a window of its own, or with a second store."""
        store = self.stores[read]
        if window is not None:
            store = replace(store, window=window)
        if second is None:
            return store
        if second.how == "mix":
            return MixedSpec(**{f.name: getattr(store, f.name) for f in fields(store)})
        return replace(store, slot=replace(store.slot, v_dim=self.stores[second.store].slot.v_dim))

    @property
    def stacks(self) -> tuple[StackPlan, ...]:
        return (StackPlan("", "token", self),)

    def forward_runs(self, seq_len: int) -> tuple[StackRun, ...]:
        """The work of each of `stacks` in a training pass over `seq_len` tokens."""
        return (StackRun(1, seq_len, seq_len),)

    def prefill_runs(self, context: int) -> tuple[StackRun, ...]:
        """The work of each of `stacks` for a prompt of `context` tokens and the logits of the next one."""
        return (StackRun(1, context, 1),)

    @property
    def num_layers(self) -> int:
        return len(self.reads)

    @property
    def owners(self) -> tuple[int, ...]:
        """The owner of the store that each layer reads, as a layer index."""
        return tuple(self.stores[read].owner for read in self.reads)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of views that are read by a mask, in order of first use."""
        return tuple(dict.fromkeys(view.window for view in self.views if view.masked))

    @property
    def spans(self) -> tuple[Span, ...]:
        """The distinct windows and chunks of views that are read by a mask, in order of first use."""
        return tuple(dict.fromkeys(view.span for view in self.views if view.masked))

    def store(self, layer: int) -> StoreSpec:
        """The store that `layer` reads, as it sees it."""
        return self.views[self.view_reads[layer]]

    def own_window(self, layer: int) -> int | None:
        """The window of `layer` if it is smaller than its store's; else None."""
        return self.reader_windows[layer] if self.reader_windows else None

    def second_read(self, layer: int) -> SecondRead | None:
        """The second store that `layer` reads; None: it reads one."""
        return self.second_reads[layer] if self.second_reads else None

    def sources(self, layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The stores whose keys `layer` reads, and the stores whose values it reads."""
        read, second = self.reads[layer], self.second_read(layer)
        if second is None:
            return (read,), (read,)
        mixed = (read, second.store)
        return (mixed, mixed) if second.how == "mix" else ((read,), (second.store,))

    def last_reader(self, number: int) -> int:
        """The last layer that reads keys or values of store `number`."""
        return max(layer for layer in range(self.num_layers) if any(number in half for half in self.sources(layer)))

    def readers(self, store: StoreSpec) -> tuple[int, ...]:
        """The layers that read the keys of `store`, its owner first."""
        return tuple(layer for layer, owner in enumerate(self.owners) if owner == store.owner)

    def second_readers(self, store: StoreSpec) -> tuple[int, ...]:
        """The layers that read `store` as a second store."""
        seconds = ((layer, self.second_read(layer)) for layer in range(self.num_layers))
        return tuple(layer for layer, second in seconds if second and self.stores[second.store].owner == store.owner)

    @property
    def last_owner(self) -> int:
        """The last layer that writes a store."""
        return self.stores[-1].owner

    @property
    def tail(self) -> int:
        """The first of the layers that need only the last position if only its output is wanted.

        It is the last owner, which writes every position and continues with the last one. But a layer that does not
        read its store by a mask needs every position, and so do the layers below it.
        """
        above = range(self.last_owner, self.num_layers)
        return max([self.last_owner, *(layer + 1 for layer in above if not self.store(layer).masked)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        own: dict[str, Any] = {"reader_windows": self.reader_windows} if self.reader_windows else {}
        own |= {"second_reads": self.second_reads} if self.second_reads else {}
        return {"stores": tuple(store.to_dict() for store in self.stores), "reads": self.reads, **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KVPlan":
        """Raise KeyError or TypeError if `values` are not those of a plan."""
        stores, reads = tuple(map(store_from_dict, values["stores"])), tuple(values["reads"])
        own = tuple(values.get("reader_windows", ()))
        if own and (
            len(own) != len(reads)
            or not all(type(read) is int and 0 <= read < len(stores) for read in reads)
            or not all(window is None or (type(window) is int and window >= 1) for window in own)
        ):
            raise TypeError("reader_windows are no windows of its layers")
        seconds = tuple(None if read is None else SecondRead(*read) for read in values.get("second_reads", ()))
        if seconds and (
            len(seconds) != len(reads)
            or not all(
                second is None
                or (second.how in SECOND_READS and type(second.store) is int and 0 <= second.store < len(stores))
                for second in seconds
            )
        ):
            raise TypeError("second_reads are no stores of its layers")
        return cls(stores, reads, own, seconds)

    def __str__(self) -> str:
        """The map in the notation of the MixAttention paper: for each layer the owner of the store it reads, with `s`
        for a sliding window; and `c` for chunks, `b` for bounded stores, `d` for a matrix per head, `p` for pooled
        positions. The owner of a second store follows: after a slash if its values are read, after a plus sign if it
        is mixed in."""
        parts = []
        for layer in range(self.num_layers):
            store, second = self.store(layer), self.second_read(layer)
            sign = {None: "", "values": "/", "mix": "+"}[second and second.how]
            parts.append(f"{store.owner}{store.mark}{sign}{self.stores[second.store].owner if second else ''}")
        return " ".join(parts)


def resolve_stack(config: ModelConfig) -> KVPlan:
    """The plan of one stack of layers: a decoder, or one of the two of a Block Transformer.

    Raises LayoutError if the size is impossible, or else with every problem of the layout.
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
    if not any(store.window or store.chunk or store.slots for store in config.arch.stores.values()):
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
    seconds: list[SecondRead | None] = []
    _check_seconds(config, types, items, problems)
    for layer, item in enumerate(items):
        verb, name = item.verb, item.name
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
        if item.second and item.second not in latest:
            latest[item.second] = 0
            problems.append(
                f"layer {layer}: `{item}` has nothing to reuse, no layer below it writes a {item.second} store; put a "
                f"`new {item.second}` below layer {layer}"
            )
        reads.append(latest[name])
        seconds.append(SecondRead(item.how, latest[item.second]) if item.second else None)
    if problems:
        raise LayoutError(problems)
    return KVPlan(tuple(stores), tuple(reads), own if any(own) else (), tuple(seconds) if any(seconds) else ())


def _own_windows(
    config: ModelConfig, types: dict[str, StoreSpec], items: list["Item"], problems: list[str]
) -> tuple[int | None, ...]:
    """The window of each layer that sees less than its store keeps. Adds impossible windows to `problems`."""
    for verb, name, window in dict.fromkeys(item[:3] for item in items):
        item, kept = f"arch.pattern: `{verb} {name} window={window}`", config.arch.stores[name].window
        if window is None:
            continue
        if not types[name].masked:
            problems.append(
                f"{item}: {name} {types[name].summary}, of which a layer reads all; leave window={window} out"
            )
        elif types[name].chunked:
            problems.append(f"{item}: {name} is read in chunks; leave window={window} out")
        elif window > (kept or MAX_COUNT):
            problems.append(
                f"{item}: {name} keeps {kept:,} positions; a layer sees at most those"
                if kept
                else f"{item}: a window must be at most {MAX_COUNT:,}"
            )
    most = config.size.max_window or MAX_COUNT
    windows = [(types[item.name].window, item.window and min(item.window, most)) for item in items]
    return tuple(None if window is None or window >= (kept or MAX_COUNT + 1) else window for kept, window in windows)


def _check_seconds(config: ModelConfig, types: dict[str, StoreSpec], items: list["Item"], problems: list[str]) -> None:
    """Add to `problems` pairs of stores that no layer can read together."""
    for item in dict.fromkeys(items):
        if not item.second:
            continue
        where, (one, other) = f"arch.pattern: `{item}`", (types[item.name], types[item.second])
        windows = [config.arch.stores[name].window for name in (item.name, item.second)]
        chunked = next((store for store in (one, other) if store.chunked), None)
        plain = next((store for store in (one, other) if store.kind != "grouped"), None)
        if item.verb == "new":
            problems.append(f"{where}: a layer that writes a store reads it whole; write `reuse` in a layer above it")
        elif item.second == item.name:
            problems.append(f"{where}: both are the same store; leave {item.how}={item.second} out")
        elif plain is not None:
            problems.append(
                f"{where}: {plain.name} {plain.summary}; only stores that have keys and values per head can be combined"
            )
        elif chunked is not None:
            problems.append(f"{where}: {chunked.name} is read in chunks; only windows, or all positions, are combined")
        elif windows[0] != windows[1]:
            kept = " and ".join("all" if window is None else f"the last {window:,}" for window in windows)
            problems.append(f"{where}: they keep {kept} positions; a key and its value must be of one position")
        elif one.slot.kv_heads != other.slot.kv_heads:
            heads = f"{one.slot.kv_heads} and {other.slot.kv_heads}"
            problems.append(f"{where}: they have {heads} key/value heads; give both as many")
        elif item.how == "mix" and (one.slot != other.slot or one.rope_key != other.rope_key):
            problems.append(
                f"{where}: their keys and values differ in width or rotation, and cannot be added; give both the same "
                "widths, rope and rope_theta"
            )


def _check_size(size: SizeConfig) -> list[str]:
    largest = {"num_layers": MAX_LAYERS}
    largest |= dict.fromkeys(("d_model", "num_heads", "d_ff", "vocab_size", "head_dim"), MAX_WIDTH)
    largest |= dict.fromkeys(("seq_len", "batch_size", "tokens", "max_window"), MAX_COUNT)
    problems = []
    for name, limit in largest.items():
        value = getattr(size, name)
        if value is not None and value < 1 and name not in ("head_dim", "max_window"):  # which are reported below
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
    """Problems of the style; `rotates`: the head dimension is possible, so the rotary fraction is checked, too."""
    if size.style not in STYLES:
        return [f"size.style is {size.style!r}; it is {' or '.join(STYLES)}"]
    style, width = style_of(size), head_dim(size)
    allowed = {
        "norm": NORMS,
        "mlp": MLPS,
        "qk_norm": QK_NORMS,
        "output_gate": OUTPUT_GATES,
        "norm_placement": NORM_PLACEMENTS,
    }
    problems = [
        f"size.{key} is {getattr(style, key)!r}; it is {', '.join(choices[:-1])} or {choices[-1]}"
        for key, choices in allowed.items()
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
    """One layer of a pattern: `new` or `reuse`, the type of store, and a window of its own; a second type of store, and
    how it is read."""

    verb: str
    name: str
    window: int | None = None
    how: str = ""
    second: str = ""

    def __str__(self) -> str:
        window = "" if self.window is None else f" window={self.window}"
        return f"{self.verb} {self.name}{window}" + (f" {self.how}={self.second}" if self.second else "")


def _expand(config: ModelConfig, problems: list[str]) -> list[Item]:
    """Expand the pattern to one item per layer. Adds its problems to `problems`."""
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
    """Number of layers of each section: counts and shares in order up to the depth, and the rest for the section
    without."""
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
    """The items of a pattern, with groups flattened and `xN` repeats written out, up to `depth` each."""
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
        match = re.fullmatch(r"\s*(new|reuse)\s+(\S+)((?:\s+\w+=\S+)*)(?:\s+x([1-9]\d*))?\s*", str(entry))
        item = match and _item(match[1], match[2], re.findall(r"(\w+)=(\S+)", match[3]))
        if match is None or item is None:
            problems.append(
                f"{where}: cannot read {entry!r}; write `new X`, `reuse X` or `new X x3`, X from arch.stores, or "
                "`reuse X window=256`, `reuse X values=Y`, `reuse X mix=Y`"
            )
        elif item.name not in stores or (item.second or item.name) not in stores:
            problems.append(f"{where}: `{entry}` names no store type; arch.stores has {', '.join(stores) or 'none'}")
        else:
            repeats = match[4] or "1"
            items += [item] * (depth if len(repeats) > 9 else min(int(repeats), depth))
    return items


def _item(verb: str, name: str, options: list[tuple[str, str]]) -> Item | None:
    """The item with these options; None if an item cannot have them."""
    window, how, second = None, "", ""
    for key, value in options:
        if key == "window" and window is None and re.fullmatch(r"[1-9]\d{,17}", value):
            window = int(value)
        elif key in SECOND_READS and not how:
            how, second = key, value
        else:
            return None
    return Item(verb, name, window, how, second)
