"""Kinds of store, without torch: their configuration keys, cached tensors, parameters, FLOPs and labels.

Everything else asks the methods of StoreSpec. A new kind is a subclass here, listed in KINDS; its keys
in config.StoreConfig; a module with its writer and reader, listed in attention.STORE_MODULES; and the bytes that its
layers save for the backward pass, listed in train/memory.py.
"""

import math
import re
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from .config import MAX_COUNT, MAX_WIDTH, SizeConfig, StoreConfig, has_qkv_bias, head_dim, style_of

# Rules of bounded stores (bounded.py has the formulas), and whether they take a window. All are readings of the
# Bounded-Cache Transformer (Yi et al. 2024), whose update formula we could not obtain.
RULES = {"gated": False, "ring_slots": True, "ring_router": False}
# Tokens that the parallel form of a bounded store takes at a time; bounded.py says why not more.
CHUNK = 8
# Its scores that are made at a time on a CPU, so that they stay in a core's cache.
SCORES = 1 << 18
# Rules of stores of a matrix per head (delta.py), and tokens that their parallel form takes at a time, at most.
MATRIX_RULES = ("gated_delta", "kda")
DELTA_CHUNK = 64
# Forms in which keys and values are one tensor (tied.py).
TIED_FORMS = ("vector", "half", "projection")
# Blocks that a window's queries are taken in; each looks at its own positions and a window more, a fifth in vain.
WINDOW_BLOCKS = 4


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
class MatrixShape:
    """Properties of a store of a matrix per head besides its states; config.MatrixConfig explains them."""

    rule: str
    key_heads: int
    conv: int


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
    """Elements over which queries or keys of so many heads are normed at a time; 0: they are not."""
    return {"none": 0, "head": width, "all": heads * width}[style_of(size).qk_norm]


def gate_width(size: SizeConfig, width: int) -> int:
    """Factors by which a layer multiplies the outputs, of `width` each, of its heads; 0: it does not."""
    return size.num_heads * {"none": 0, "head": 1, "channel": width}[style_of(size).output_gate]


class Chunk(NamedTuple):
    """Chunks of `size` positions, of the current one of which a layer sees those up to its own."""

    size: int


# The positions that a layer sees up to its own: the last so many, those of a chunk, or all.
Span = int | Chunk | None


def visible_pairs(seq_len: int, window: Span) -> int:
    """Pairs (query, key) that causal attention over `seq_len` tokens looks at."""
    if isinstance(window, Chunk):
        whole, rest = divmod(seq_len, window.size)
        return (whole * window.size * (window.size + 1) + rest * (rest + 1)) // 2
    full = min(seq_len, window or seq_len)
    return full * (full + 1) // 2 + (seq_len - full) * full


class QueryBlocks(NamedTuple):
    """Blocks of queries beyond the first window, in which windowed attention is computed on a CPU (masks.Windowed).

    size    queries of a block
    number  of blocks
    looked  slots that a block looks at: the window before it and its own, in whole blocks
    """

    size: int
    number: int
    looked: int

    @property
    def queries(self) -> int:
        """Queries with those that fill the last block."""
        return self.size * self.number

    @property
    def slots(self) -> int:
        """Slots that all blocks together look at, from the first token on, with those that fill the last block."""
        return self.queries - self.size + self.looked


# Tokens below which a dense mask [T, T] costs no more than the calls that blocks take.
SHORT_ROW = 64
# Most queries of a block, the fastest of 16 to 512 for windows of 64 to 1,024.
QUERY_BLOCK = 64


def query_blocks(seq_len: int, window: Span) -> QueryBlocks | None:
    """Blocks for `seq_len` tokens that attend to themselves; None: the mask is dense, or restricts nothing."""
    if window is None or isinstance(window, Chunk) or window >= seq_len or seq_len < SHORT_ROW:
        return None
    size = min(QUERY_BLOCK, max(16, window // 2), seq_len - window)
    return QueryBlocks(size, -(-(seq_len - window) // size), size * (1 + -(-window // size)))


@dataclass(frozen=True)
class StoreSpec:
    """The store that layer `owner` writes. `window` counts the current position; None keeps every position.

    rotary_dim  leading elements of a key that are rotated, 0 for none (rope_theta is 0 then, too); None: all that the
                slot allows
    num_slots   of a bounded store, the slots into which positions are merged by `rule`; its window, if any, keeps the
                last positions unmerged beside them
    query_scale factors of its readers' queries; None: they have none
    chunked     `window` is the size of chunks

    kind        name of the kind
    key         the key of StoreConfig that asks for it
    summary     completes "the store ..."
    masked      readers run an attention backend over slots that a mask selects; otherwise they take token positions
    grows       bytes depend on the context
    unshared    why no layer but its owner can read it; empty: others can
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

    kind: ClassVar[str]
    key: ClassVar[str]
    summary: ClassVar[str]
    masked: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    unshared: ClassVar[str] = ""

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        """The slot's shape. Adds to `problems` what is wrong with the keys that decide it."""
        raise NotImplementedError

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        """Adds to `problems` what else is wrong with the keys of this kind."""
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
    def rope_key(self) -> tuple[int, float]:
        """(width, base) of the rotary table of its keys."""
        return self.slot_rotary_dim if self.rotary_dim is None else self.rotary_dim, self.rope_theta

    @property
    def span(self) -> Span:
        """The positions that its readers see up to their own."""
        return Chunk(self.window) if self.chunked and self.window is not None else self.window

    @property
    def positions_key(self) -> tuple[Hashable, ...]:
        """All that positions of tokens over a cache depend on."""
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
        newer = ("query_scale", "chunked", "latents", "key_dim")
        return {key: value for key, value in fields.items() if value or key not in newer}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        """Return whether `fields`, those of a spec, are of this kind."""
        raise NotImplementedError

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "StoreSpec":
        """Raises KeyError or TypeError where `values` are not those of a spec."""
        fields = {"num_slots" if key == "slots" else key: value for key, value in values.items()}
        fields["slot"] = SlotShape(**values["slot"])
        if fields.get("matrix"):
            fields["matrix"] = MatrixShape(**fields["matrix"])
        if fields.get("query_scale"):
            fields["query_scale"] = QueryScale(**fields["query_scale"])
        return next(kind for kind in KINDS if kind.describes(fields))(**fields)


class GroupedSpec(StoreSpec):
    """Keys and values per head, of every position or of a window."""

    kind, key, summary = "grouped", "kv_heads", "has keys and values per head"

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        heads, width = size.num_heads, head_dim(size)
        share = "1/1" if store.kv_heads == "all" else store.kv_heads
        kv_heads = resolve_share(f"{where}.kv_heads", share, heads, "the query heads", problems)
        if kv_heads and heads % kv_heads:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            problems.append(f"{where}.kv_heads {kv_heads} does not divide the {heads} query heads; choose {divisors}")
        if store.head_dim is not None:
            width = resolve_share(f"{where}.head_dim", store.head_dim, width, "the head dimension", problems)
        k_dim, v_dim = (
            width
            if value is None
            else resolve_share(f"{where}.{key}", value, head_dim(size), "the head dimension", problems)
            for key, value in (("k_dim", store.k_dim), ("v_dim", store.v_dim))
        )
        return SlotShape(kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim)

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return True


class MixedSpec(GroupedSpec):
    """Two grouped stores as a layer sees them: a mix of their keys, and one of their values, per channel (mixed.py).

    No store is of this kind: it stands for both, with the properties of the one that the layer reads first.
    """

    kind, key, summary = "mixed", "kv_heads", "is a mix of two stores"

    def nbytes(self, context: int, itemsize: int) -> int:
        """Bytes of both stores after `context` tokens."""
        return 2 * super().nbytes(context, itemsize)

    @property
    def mixed_keys(self) -> int:
        """Weights of the keys of one store and head: one for each pair of elements that is rotated, or element."""
        return self.slot.k_dim - self.rope_key[0] // 2

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Also the weights of the mix."""
        matrices, others = super().reader_params(size)
        return ParamCount(matrices, others + 2 * self.slot.kv_heads * (self.mixed_keys + self.slot.v_dim))


@dataclass(frozen=True)
class LatentSpec(StoreSpec):
    """A latent and a rotary key for all heads (DeepSeek-V2, section 2.1), of every position or of a window.

    latents  into which the slot's latent is divided, each of which an equal part of the heads reads; None: one
    key_dim  width of the part of keys that is made of it; None: the head dimension
    """

    latents: int | None = None
    key_dim: int | None = None

    kind, key, summary = "latent", "latent", "holds latents"

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        assert store.latent is not None
        width = head_dim(size)
        problems += own_widths(
            where, store, "made of latents are as wide as size.head_dim; latent.dim is the latent's width"
        )
        latent_dim = resolve_share(f"{where}.latent.dim", store.latent.dim, width, "the head dimension", problems)
        rope_dim = 0
        if store.latent.rope_dim not in (0, "0"):
            rope_dim = resolve_share(
                f"{where}.latent.rope_dim", store.latent.rope_dim, width, "the head dimension", problems
            )
        if rope_dim % 2:
            problems.append(f"{where}.latent.rope_dim is {rope_dim}; rotary embeddings need an even number")
        if style_of(size).qk_norm != "none":
            problems.append(
                f"size.qk_norm is {style_of(size).qk_norm}, and {where} holds latents, of which no keys are made over "
                "a cache; the latent has a norm of its own: take size.qk_norm=none"
            )
        return SlotShape(latent_dim=latent_dim * max(1, store.latent.heads or 1), rope_dim=rope_dim)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        if store.latent is None:
            return {}  # reported above
        heads, k_dim = store.latent.heads, store.latent.k_dim
        if heads is not None and (heads < 1 or size.num_heads % heads):
            problems.append(
                f"{where}.latent.heads is {heads}; equal parts of the {size.num_heads} query heads read one each"
            )
        if k_dim is not None:
            width = head_dim(size)
            k_dim = resolve_share(f"{where}.latent.k_dim", k_dim, width, "the head dimension", problems)
            k_dim = None if k_dim == width else k_dim
        return {"latents": None if heads == 1 else heads, "key_dim": k_dim}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields["slot"].latent_dim)

    @property
    def num_latents(self) -> int:
        return self.latents or 1

    @property
    def one_latent_dim(self) -> int:
        """Width of what a query head reads of the latent."""
        return self.slot.latent_dim // self.num_latents

    def expanded_dim(self, size: SizeConfig) -> int:
        """Width of the part of each key that is made of the latent."""
        return head_dim(size) if self.key_dim is None else self.key_dim

    @property
    def slot_rotary_dim(self) -> int:
        return self.slot.rope_dim

    @property
    def position_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.slot.latent_dim,), (self.slot.rope_dim,))

    def kernel_heads(self, size: SizeConfig) -> HeadShape:
        """Latents are expanded to keys and values of every query head."""
        return HeadShape(size.num_heads, self.expanded_dim(size) + self.slot.rope_dim, head_dim(size))

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Also the expansion of latents to keys and values."""
        matrices, others = super().reader_params(size)
        expanded = size.num_heads * (self.expanded_dim(size) + head_dim(size))
        return ParamCount(matrices + self.one_latent_dim * expanded, others)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Also the norm of the latent."""
        matrices, others = super().writer_params(size)
        return ParamCount(matrices, others + self.slot.latent_dim)

    def step_flops(self, size: SizeConfig) -> int:
        """FLOPs per key of queries that are compared with latents."""
        return 2 * size.num_heads * (2 * self.one_latent_dim + self.slot.rope_dim)

    @property
    def slot_text(self) -> str:
        rope = f" + rope {self.slot.rope_dim}" if self.slot.rope_dim else ""
        several = f"{self.num_latents} x " if self.num_latents > 1 else ""
        return f"latent {several}{self.one_latent_dim}{rope}"


@dataclass(frozen=True)
class TiedSpec(GroupedSpec):
    """Keys and values per head made by one projection (tied.py), of every position or of a window.

    In the forms `vector` and `half` one cached vector, `slot.k_dim` wide, serves as both, and `slot.v_dim` is 0;
    `slot.rope_dim` is the width of what all heads have in common in `half`.
    """

    tied: str = "vector"

    kind, key, summary = "tied", "tied", "has one tensor for keys and values"

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        slot = super().resolve_slot(where, store, size, problems)
        if store.tied == "projection":
            return replace(slot, v_dim=slot.k_dim)
        if store.tied != "half":
            return replace(slot, v_dim=0)
        if slot.k_dim % 4:
            problems.append(
                f"{where}.tied is half, of keys of width {slot.k_dim}; half of it is rotated, which needs an even "
                "number: take a multiple of 4"
            )
        if style_of(size).qk_norm != "none":
            problems.append(
                f"size.qk_norm is {style_of(size).qk_norm}, and a half of the keys of {where} belongs to no head (tied "
                "half): take size.qk_norm=none, or tied vector"
            )
        return replace(slot, v_dim=0, rope_dim=slot.k_dim // 2)

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        super().check(where, store, problems)
        if store.tied not in TIED_FORMS:
            problems.append(f"{where}.tied is {store.tied!r}; it is {', '.join(TIED_FORMS[:-1])} or {TIED_FORMS[-1]}")
        if store.v_dim is not None:
            problems.append(f"{where}.v_dim is {store.v_dim}; tied values are as wide as keys: write head_dim or k_dim")
        if store.tied == "half" and store.rope is not None:
            problems.append(f"{where}.rope is {store.rope!r}; with tied half the shared half is rotated: leave it out")

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        return {"tied": store.tied}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("tied"))

    @property
    def slot_rotary_dim(self) -> int:
        return self.slot.rope_dim or self.slot.k_dim

    @property
    def turns_back(self) -> bool:
        """Outputs are rotated back by the position of the query."""
        return self.tied == "vector" and self.rotary_dim != 0

    @property
    def position_shapes(self) -> tuple[tuple[int, ...], ...]:
        vector = (self.slot.kv_heads, self.slot.k_dim)
        return {"vector": (vector,), "half": (vector, (self.slot.rope_dim,))}.get(self.tied, super().position_shapes)

    def kernel_heads(self, size: SizeConfig) -> HeadShape:
        return HeadShape(self.slot.kv_heads, self.slot.k_dim, self.slot.k_dim)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """One projection, whatever is cached of it."""
        width = self.slot.kv_heads * self.slot.k_dim + self.slot.rope_dim
        norm = norm_width(size, self.slot.kv_heads, self.slot.k_dim)
        return ParamCount(size.d_model * width, (width if has_qkv_bias(size) else 0) + norm)

    @property
    def slot_text(self) -> str:
        if self.slot.v_dim:
            return super().slot_text
        return f"{self.slot.kv_heads} x {self.slot.k_dim}" + (f" + rope {self.slot.rope_dim}" * (self.tied == "half"))


class BoundedSpec(GroupedSpec):
    """Keys and values of all positions merged into `num_slots` slots, and in some rules those of a window."""

    kind, key, summary = "bounded", "slots", "is bounded"
    masked, grows = False, False

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        if store.latent is not None:
            return SlotShape()  # reported by `check`
        return super().resolve_slot(where, store, size, problems)

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        assert store.slots is not None
        problems += own_widths(where, store, "are as wide as size.head_dim in a bounded store")
        if store.slots < 1:
            problems.append(f"{where}.slots is {store.slots}; a bounded store has at least 1 (null: not bounded)")
        if store.latent is not None:
            problems.append(f"{where}.slots cannot hold a latent; write kv_heads instead")
        if store.rule not in RULES:
            problems.append(f"{where}.rule is {store.rule!r}; stores with slots need one of {', '.join(RULES)}")
        elif RULES[store.rule] and store.window is None:
            problems.append(
                f"{where}.rule {store.rule} needs a window: the last positions, kept whole beside the slots"
            )
        elif not RULES[store.rule]:
            problems += [
                f"{where}.{key} is {getattr(store, key)}; rule {store.rule} has only slots, without positions: "
                "leave it out, or choose ring_slots"
                for key in ("window", "rope", "rope_theta")
                if getattr(store, key) is not None
            ]

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("num_slots"))

    @property
    def max_positions(self) -> int | None:
        return self.num_slots + (self.window or 0)

    @property
    def address_dim(self) -> int:
        """Width of what the router reads: a write query, or the merged keys of all heads."""
        return self.slot.kv_heads * self.slot.k_dim if self.window else self.slot.k_dim

    def num_positions(self, context: int) -> int:
        """The window, which is there in full from the first token on."""
        return self.window or 0

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """The state, keys beside values, and the window where there is one; heads first, as products take them."""
        heads = self.slot.kv_heads
        state = CacheTensor((heads, self.num_slots, self.slot.k_dim + self.slot.v_dim), True)
        if self.window is None:
            return (state,)
        return state, *(CacheTensor((heads, self.window, dim)) for dim in (self.slot.k_dim, self.slot.v_dim))

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        positions = super().slot_bytes(itemsize) if self.window else ()
        return (*positions, *super().slot_bytes(state_itemsize(itemsize)))

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Also the router: a write query where it does not read the keys, addresses, and the gate."""
        matrices, others = super().writer_params(size)
        query = 0 if self.window else size.d_model
        return ParamCount(
            matrices + self.address_dim * (self.num_slots + query), others + self.address_dim + self.num_slots
        )

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """In the form that trains: M slots, chunks of C tokens, heads of H.

        Per token and query head, scores and values against the state take 4 M H, against the chunk 4 C H, and what
        those weigh in the slots 4 C M; every reader makes the states between chunks, 4 M H per key/value head, and the
        owner the sums of log(1 - p), 2 C M. Whole chunks and all pairs in them are computed and counted, unlike the
        pairs of softmax attention.
        """
        chunk, slots, width = min(CHUNK, seq_len), self.num_slots, self.slot.k_dim
        per_token = size.num_heads * 4 * (slots * width + chunk * width + chunk * slots)
        per_token += self.slot.kv_heads * 4 * slots * width + (2 * chunk * slots if owner else 0)
        total = per_token * chunk * -(-seq_len // chunk)
        return total + (super().attention_flops(size, seq_len, owner) if self.window else 0)

    @property
    def mark(self) -> str:
        return "b"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return (*super().retention, (f"{self.num_slots:,} slots", self.num_slots))


@dataclass(frozen=True)
class StridedSpec(GroupedSpec):
    """Keys and values per head of a window, and of one entry for each `stride` positions (strided.py); where they are
    tied (form `vector` of tied.py), `slot.v_dim` is 0.

    An entry is complete with the last of its positions, and then seen. What the positions since then come to so far is
    kept as a sum with its weight. The ring of the window is there in full from the first token on.
    """

    stride: int = 1

    kind, key, summary = "strided", "stride", "pools positions"
    masked = False

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        if store.latent is not None:
            return SlotShape()  # reported by `check`
        slot = super().resolve_slot(where, store, size, problems)
        return slot if store.tied is None else replace(slot, v_dim=0)

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        assert store.stride is not None
        if store.tied not in (None, "vector"):
            problems.append(f"{where}.tied is {store.tied!r}; entries are pooled apart, or as one vector: write vector")
        if store.tied is not None and store.v_dim is not None:
            problems.append(f"{where}.v_dim is {store.v_dim}; tied values are as wide as keys: write head_dim or k_dim")
        if store.stride < 1:
            problems.append(f"{where}.stride is {store.stride}; an entry pools at least 1 position (null: no entries)")
        if store.latent is not None:
            problems.append(f"{where}.stride pools no latents; write kv_heads instead")
        if store.window is None:
            problems.append(f"{where}.stride needs a window: tokens that no entry has yet are seen there")
        super().check(where, store, problems)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        assert store.stride is not None
        return {"stride": min(store.stride, size.max_window or store.stride)}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("stride"))

    @property
    def positions_key(self) -> tuple[Hashable, ...]:
        # Without super(), which torch 2.11 does not trace in a property.
        return self.window, self.stride, self.rope_key, self.slot.k_dim, self.slot.v_dim

    @property
    def max_positions(self) -> int | None:
        return None

    @property
    def turns_back(self) -> bool:
        """Outputs are rotated back by the position of the query."""
        return not self.slot.v_dim and self.rotary_dim != 0

    @property
    def position_shapes(self) -> tuple[tuple[int, ...], ...]:
        return super().position_shapes[: 2 if self.slot.v_dim else 1]

    def kernel_heads(self, size: SizeConfig) -> HeadShape:
        return HeadShape(self.slot.kv_heads, self.slot.k_dim, self.slot.v_dim or self.slot.k_dim)

    def num_entries(self, context: int) -> int:
        """Complete entries after `context` tokens."""
        return context // self.stride

    def num_positions(self, context: int) -> int:
        """The window, and entries after it."""
        assert self.window is not None
        return self.window + self.num_entries(context)

    @property
    def state(self) -> CacheTensor:
        """Weights, as logarithms of their sums, and means of the positions that no entry has yet."""
        return CacheTensor((2, self.slot.kv_heads, self.slot.k_dim + self.slot.v_dim), True)

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        return (*super().cache_tensors(context), self.state)

    def read_bytes(self, context: int, itemsize: int, owner: bool) -> int:
        """Leave out, but for the owner, the positions that no entry has yet."""
        return self.nbytes(context, itemsize) - (0 if owner else self.state.nbytes(itemsize))

    def slope(self, itemsize: int) -> Fraction:
        return Fraction(self.slot.elements * itemsize, self.stride)

    def constant(self, itemsize: int) -> int:
        return self.nbytes(0, itemsize)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Also what is pooled, its weights with a bias for each place, and the norms of entries."""
        matrices, others = super().writer_params(size)
        pooled, slot = self.slot.elements, self.slot
        biases = (self.stride + has_qkv_bias(size)) * pooled
        return ParamCount(matrices + 2 * size.d_model * pooled, others + biases + slot.k_dim + slot.v_dim)

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """Pairs of tokens in the window, and of tokens and complete entries."""
        entries, rest = divmod(seq_len, self.stride)
        pairs = self.stride * (entries * (entries - 1) // 2) + entries * (rest + 1)
        return super().attention_flops(size, seq_len, owner) + self.pair_flops(size) * pairs

    @property
    def slot_text(self) -> str:
        return super().slot_text if self.slot.v_dim else f"{self.slot.kv_heads} x {self.slot.k_dim}"

    @property
    def mark(self) -> str:
        return "p"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return (*super().retention, (f"1 of {self.stride:,}", self.stride))


def own_widths(where: str, store: StoreConfig, why: str) -> list[str]:
    """A problem for each width of its own that a store has whose keys and values `why`."""
    keys = [key for key in ("head_dim", "k_dim", "v_dim") if getattr(store, key) is not None]
    return [f"{where}.{key} is {getattr(store, key)}; keys and values {why}: leave it out" for key in keys]


def delta_chunk(seq_len: int) -> int:
    """Tokens of a chunk of the delta rule: a power of two."""
    return min(DELTA_CHUNK, 1 << (seq_len - 1).bit_length())


@dataclass(frozen=True)
class MatrixSpec(StoreSpec):
    """A matrix per head, of `slot`'s widths, and the last inputs of a short convolution (delta.py)."""

    matrix: MatrixShape = MatrixShape("gated_delta", 0, 1)

    kind, key, summary = "matrix", "matrix", "holds a matrix per head"
    masked, grows = False, False
    unshared = "its queries pass a convolution, whose last inputs are cached with the store"

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        assert store.matrix is not None
        width = head_dim(size)
        heads = resolve_share(f"{where}.matrix.heads", store.matrix.heads, size.num_heads, "the query heads", problems)
        k_dim, v_dim = (
            resolve_share(f"{where}.matrix.{key}", getattr(store.matrix, key), width, "the head dimension", problems)
            for key in ("k_dim", "v_dim")
        )
        return SlotShape(kv_heads=heads, k_dim=k_dim, v_dim=v_dim)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        assert store.matrix is not None
        matrix, heads = store.matrix, slot.kv_heads
        key_heads = resolve_share(
            f"{where}.matrix.key_heads", matrix.key_heads, size.num_heads, "the query heads", problems
        )
        if heads and key_heads and heads % key_heads:
            problems.append(
                f"{where}.matrix.key_heads {key_heads} does not divide its {heads} heads; each serves as many states"
            )
        if matrix.rule not in MATRIX_RULES:
            problems.append(f"{where}.matrix.rule is {matrix.rule!r}; it is {' or '.join(MATRIX_RULES)}")
        if not 1 <= matrix.conv <= MAX_WIDTH:
            problems.append(
                f"{where}.matrix.conv is {matrix.conv}; it counts the current token, so at least 1, and at most "
                f"{MAX_WIDTH:,}"
            )
        return {"matrix": MatrixShape(matrix.rule, key_heads, matrix.conv)}

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        problems += [
            f"{where}.{key} is {getattr(store, key)}; a matrix per head has no positions, slots or scores: leave it out"
            for key in ("window", "slots", "rule", "rope", "rope_theta", "sinks")
            if getattr(store, key) not in (None, False)
        ]
        problems += own_widths(where, store, "of a matrix per head have the widths of matrix.k_dim and matrix.v_dim")

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("matrix"))

    @property
    def max_positions(self) -> int | None:
        return 0

    def num_positions(self, context: int) -> int:
        """None: a state is no position."""
        return 0

    @property
    def num_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.matrix.key_heads * self.slot.k_dim + self.slot.kv_heads * self.slot.v_dim

    @property
    def num_decays(self) -> int:
        """Decays of a token."""
        return self.slot.kv_heads * (self.slot.k_dim if self.matrix.rule == "kda" else 1)

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """The states, and what the convolution saw last. That is no sum, but the norm of what is read would amplify its
        rounding."""
        states = CacheTensor((self.slot.kv_heads, self.slot.k_dim, self.slot.v_dim), True)
        return states, CacheTensor((self.matrix.conv - 1, self.num_channels), True)

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        """Bytes of a state."""
        return (self.slot.k_dim * self.slot.v_dim * state_itemsize(itemsize),)

    def low_rank_params(self, size: SizeConfig, width: int) -> int:
        """Parameters of a projection to `width`, in rule `kda` through as many channels as a value has."""
        inner = self.slot.v_dim
        return (size.d_model + width) * inner if self.matrix.rule == "kda" else size.d_model * width

    def reader_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of the gate, the output and the norm before it."""
        values = self.slot.kv_heads * self.slot.v_dim
        return ParamCount(self.low_rank_params(size, values) + values * size.d_model, self.slot.v_dim)

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of queries, keys, values, strengths and decays, and the convolution."""
        matrices = size.d_model * (self.num_channels + self.slot.kv_heads)
        others = self.num_channels * self.matrix.conv + self.slot.kv_heads + self.num_decays
        return ParamCount(matrices + self.low_rank_params(size, self.num_decays), others)

    def pair_flops(self, size: SizeConfig) -> int:
        """None: no pair of tokens is looked at, but in chunks."""
        return 0

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """In the form that trains: whole chunks of C tokens, states of K V.

        Per token and state, products of queries and keys with keys take 4 C K (2 (C - 1) K where channels fade on their
        own, which are those of earlier tokens alone), the triangular system C (K + V), the state's part in corrections
        and reads and the state after the chunk 6 K V, and reads of the corrections 2 C V.
        """
        chunk, k_dim, v_dim = delta_chunk(seq_len), self.slot.k_dim, self.slot.v_dim
        pairs = 2 * (chunk - 1) if self.matrix.rule == "kda" else 4 * chunk
        per_token = pairs * k_dim + chunk * (k_dim + v_dim) + 6 * k_dim * v_dim + 2 * chunk * v_dim
        return self.slot.kv_heads * per_token * chunk * -(-seq_len // chunk)

    @property
    def mark(self) -> str:
        return "d"

    @property
    def slot_text(self) -> str:
        return f"{self.slot.kv_heads} x ({self.slot.k_dim} x {self.slot.v_dim})"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return ((f"{self.slot.kv_heads} states", self.slot.kv_heads),)


# In this order: the first kind whose key a configuration sets is the store's.
KINDS: tuple[type[StoreSpec], ...] = (MatrixSpec, BoundedSpec, StridedSpec, LatentSpec, TiedSpec, GroupedSpec)


def resolve_store(name: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> StoreSpec:
    """The store of an owner yet unknown (-1). Adds to `problems` what is wrong with it."""
    where = f"arch.stores.{name}"
    kind = next((kind for kind in KINDS if getattr(store, kind.key) is not None), GroupedSpec)
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
    if store.tied is not None and kind not in (TiedSpec, StridedSpec):
        problems.append(
            f"{where}.tied is {store.tied}; the store {kind.summary}, which is no such tensor: leave it out"
        )
    if store.stride is not None and kind is not StridedSpec:
        problems.append(f"{where}.stride is {store.stride}, and a store that {kind.summary} has no entries: drop it")
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
    rotary_dim = 0 if store.matrix is not None else resolve_rotary(where, store, slot, size, problems)
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
        **kind.resolve_more(where, store, slot, size, problems),
    )


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
