"""StoreSpec: the description of every kind of store, without torch. Each kind has a subclass in a file of its own.

Configuration keys, cached tensors, parameters, FLOPs and labels: everything else asks the methods of StoreSpec.
"""

import math
import re
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from .config import MAX_WIDTH, SizeConfig, StoreConfig, has_qkv_bias, style_of
from .rope_scaling import RopeScaling
from .spans import Chunk, Span, visible_pairs

# Arguments of rope_table after the positions.
RopeKey = tuple[int, float] | tuple[int, float, RopeScaling]


class LayoutError(ValueError):
    """A layout or size that cannot be built. The message lists every problem found, each with its fix."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class SlotShape:
    """Elements of one cached position: keys and values per head, or a latent and a rotary key for all heads."""

    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    latent_dim: int = 0
    rope_dim: int = 0

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.k_dim + self.v_dim) + self.latent_dim + self.rope_dim


class CacheTensor(NamedTuple):
    """A tensor of a store's cache: its shape for one sequence, and whether it holds sums, in at least fp32."""

    shape: tuple[int, ...]
    accumulates: bool = False

    def nbytes(self, itemsize: int) -> int:
        """Bytes, where other elements have `itemsize` bytes."""
        return math.prod(self.shape) * (state_itemsize(itemsize) if self.accumulates else itemsize)


@dataclass(frozen=True)
class QueryScale:
    """Factors of queries by their position; config.QueryScaleConfig explains them. A slope of None is learned."""

    slope: float | None
    tokens: int


class HeadShape(NamedTuple):
    """Key/value heads and widths that the attention kernel gets."""

    kv_heads: int
    k_dim: int
    v_dim: int


class ParamCount(NamedTuple):
    """Parameters that are factors of a matrix product, and the others (biases, norms, sinks, gates)."""

    matrices: int
    others: int


def state_itemsize(itemsize: int) -> int:
    """Bytes per element of merged slots: sums over all that was written, hence at least fp32."""
    return max(4, itemsize)


def norm_width(size: SizeConfig, heads: int, width: int) -> int:
    """Elements over which queries or keys of `heads` heads are normed together; 0: they are not normed."""
    return {"none": 0, "head": width, "all": heads * width}[style_of(size).qk_norm]


def gate_width(size: SizeConfig, width: int) -> int:
    """Number of factors by which a layer multiplies the outputs of its heads, each `width` wide; 0: it has no gate."""
    return size.num_heads * {"none": 0, "head": 1, "channel": width}[style_of(size).output_gate]


@dataclass(frozen=True)
class StoreSpec:
    """The store that layer `owner` writes. `window` counts the current position; None keeps every position.

    rotary_dim  leading elements of a key that are rotated; 0: none (then rope_theta is 0, too); None: all that the slot
                allows
    num_slots   slots of a bounded store, into which positions are merged by `rule`; its window, if any, keeps the last
                positions unmerged beside them
    query_scale factors of its readers' queries; None: no scaling
    chunked     `window` is the size of chunks
    rope_scaling  rule by which frequencies of the rotation are lowered; None: they are not

    kind        name of the kind
    key         the key of StoreConfig that asks for it
    summary     completes "the store ..."
    masked      readers run an attention backend over the slots that a mask selects; otherwise they take token positions
    grows       bytes depend on the context
    pools       a slot combines a fixed number of positions
    rotates     keys may be rotated by their position
    crosses     its readers can also attend to other vectors, with keys and values of the same heads and widths
    fades       rounding errors in its state fade, so that a codec can act on it
    unshared    reason why only its owner can read it; empty: others can, too
    takes       configuration keys of other kinds that it also takes
    stray       completes "NAME.key is value" if a kind named {kind} has this kind's key and does not take it
    newer       fields that are written only if they are set, since files of earlier versions lack them
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
    query_scale: QueryScale | None = None
    chunked: bool = False
    rope_scaling: RopeScaling | None = None

    kind: ClassVar[str]
    key: ClassVar[str]
    summary: ClassVar[str]
    masked: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    pools: ClassVar[bool] = False
    rotates: ClassVar[bool] = True
    crosses: ClassVar[bool] = False
    fades: ClassVar[bool] = False
    unshared: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()
    stray: ClassVar[str] = ""
    newer: ClassVar[tuple[str, ...]] = ("query_scale", "chunked", "rope_scaling")

    @classmethod
    def asked_by(cls, store: StoreConfig) -> bool:
        """Return whether a configuration asks for this kind, or for one that comes before it in stores.KINDS."""
        return getattr(store, cls.key) is not None

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        """The slot's shape. Adds to `problems` what is wrong with the keys that decide it."""
        raise NotImplementedError

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        """Add to `problems` what else is wrong with the keys of this kind."""
        if store.rule is not None:
            problems.append(f"{where}.rule {store.rule} needs slots, how many it may write; or leave the rule out")

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        """Fields of this kind alone. Adds to `problems` what is wrong with the keys that decide them."""
        return {}

    @property
    def slot_rotary_dim(self) -> int:
        """Width of the part of a key that can be rotated."""
        return self.slot.k_dim

    @property
    def rope_key(self) -> RopeKey:
        """(width, base) of the rotary table of its keys, and how its frequencies are slowed down."""
        width = self.slot_rotary_dim if self.rotary_dim is None else self.rotary_dim
        return (width, self.rope_theta) if self.rope_scaling is None else (width, self.rope_theta, self.rope_scaling)

    @property
    def span(self) -> Span:
        """The positions that its readers see up to their own."""
        return Chunk(self.window) if self.chunked and self.window is not None else self.window

    @property
    def positions_key(self) -> tuple[Hashable, ...]:
        """Key of the positions of tokens over a cache: stores of equal keys share them."""
        return self.window, self.num_slots, self.rule, self.rope_key

    @property
    def max_positions(self) -> int | None:
        """The most positions and slots it holds; None: it grows with the context."""
        return self.window

    def num_positions(self, context: int) -> int:
        """Unmerged positions in the cache after `context` tokens."""
        return context if self.window is None else min(context, self.window)

    @property
    def position_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor of one cached position."""
        return ((self.slot.kv_heads, self.slot.k_dim), (self.slot.kv_heads, self.slot.v_dim))

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """Tensors that the cache of one sequence of `context` tokens consists of."""
        positions = self.num_positions(context)
        return tuple(CacheTensor((positions, *shape)) for shape in self.position_shapes)

    def nbytes(self, context: int, itemsize: int) -> int:
        """Bytes after `context` tokens."""
        return sum(tensor.nbytes(itemsize) for tensor in self.cache_tensors(context))

    def read_bytes(self, context: int, itemsize: int, owner: bool) -> int:
        """Bytes that a layer, the owner or another, reads to decode the token at `context`."""
        return self.nbytes(context, itemsize)

    def slope(self, itemsize: int) -> Fraction:
        """Bytes that each further token adds, once windows are full."""
        return Fraction(self.nbytes(1, itemsize) if self.max_positions is None else 0)

    def constant(self, itemsize: int) -> int:
        """Bytes that do not grow with the context, once windows are full."""
        return 0 if self.max_positions is None else self.nbytes(self.max_positions, itemsize)

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        """Bytes of one position; where positions are merged, of a slot besides or instead."""
        return (self.slot.elements * itemsize,)

    def kernel_heads(self, size: SizeConfig) -> HeadShape:
        """Heads and widths of the keys and values that an attention kernel gets in training."""
        return HeadShape(self.slot.kv_heads, self.slot.k_dim, self.slot.v_dim)

    def dense_slots(self, length: int) -> int:
        """Slots of the dense mask of `length` tokens without a cache, where it is dense with any backend; else 0."""
        return 0

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of queries, their norm, output, its gate and sinks in each layer that reads the store."""
        heads, style, (_, k_dim, v_dim) = size.num_heads, style_of(size), self.kernel_heads(size)
        queries, gates = heads * k_dim, gate_width(size, v_dim)
        biases = (queries if has_qkv_bias(size) else 0) + (size.d_model + gates if style.bias else 0)
        others = biases + (heads if self.sinks else 0) + norm_width(size, heads, k_dim)
        if self.query_scale is not None and self.query_scale.slope is None:
            others += 2 * heads
        return ParamCount(size.d_model * (queries + heads * v_dim + gates), others)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters with which the owner writes the store, without a norm of its own."""
        biases = self.slot.elements if has_qkv_bias(size) else 0
        norm = norm_width(size, self.slot.kv_heads, self.slot.k_dim)
        return ParamCount(size.d_model * self.slot.elements, biases + norm)

    def pair_flops(self, size: SizeConfig) -> int:
        """FLOPs of one layer for the scores and weighted values of one (query, key) pair."""
        _, k_dim, v_dim = self.kernel_heads(size)
        return 2 * size.num_heads * (k_dim + v_dim)

    def step_flops(self, size: SizeConfig) -> int:
        """`pair_flops` of one token over a cache."""
        return self.pair_flops(size)

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """Forward FLOPs of attention over one sequence in one layer, the owner or another; projections aside."""
        return self.pair_flops(size) * visible_pairs(seq_len, self.span)

    @property
    def mark(self) -> str:
        """Letter in a layout's map of owners."""
        return "c" if self.chunked else "s" if self.window else ""

    @property
    def slot_text(self) -> str:
        """The slot's elements for tables."""
        return f"{self.slot.kv_heads} x ({self.slot.k_dim} + {self.slot.v_dim})"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        """(text, number) of what is retained, as ("last 1,024", 1024); empty: every position."""
        which = "chunk of" if self.chunked else "last"
        return ((f"{which} {self.window:,}", self.window),) if self.window else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, under the names that plan.json and checkpoint.json have always had."""
        fields = {"slots" if key == "num_slots" else key: value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if value or key not in self.newer}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        """Return whether `fields`, those of a spec, are of this kind."""
        raise NotImplementedError

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "StoreSpec":
        """The spec of these fields. Raises TypeError if they are not those of this kind."""
        return cls(**fields)


def own_widths(where: str, store: StoreConfig, why: str) -> list[str]:
    """A problem for each width of its own that a store has whose keys and values `why`."""
    keys = [key for key in ("head_dim", "k_dim", "v_dim") if getattr(store, key) is not None]
    return [f"{where}.{key} is {getattr(store, key)}; keys and values {why}: leave it out" for key in keys]


def resolve_share(where: str, value: int | str | None, whole: int, of: str, problems: list[str]) -> int:
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
    if amount > MAX_WIDTH:
        problems.append(f"{where} is {value}; it must be at most {MAX_WIDTH:,}")
        return 0
    return int(amount)


def share_of(value: Any, whole: int) -> Fraction | None:
    """A number as it stands, `a/b` as that share of `whole`, None for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18})\s*(?:/\s*([1-9]\d{,17})\s*)?", str(value))
    if match is None:
        return None
    return Fraction(int(match[1]), int(match[2])) * whole if match[2] else Fraction(int(match[1]))
