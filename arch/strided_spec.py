"""Strided stores, as a layout declares them; strided.py has their modules."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from .config import SizeConfig, StoreConfig, has_qkv_bias
from .grouped_spec import GroupedSpec
from .store_spec import CacheTensor, HeadShape, ParamCount, SlotShape


def check_stride(where: str, store: StoreConfig, problems: list[str]) -> None:
    """Add to `problems` a stride that is none."""
    assert store.stride is not None
    if store.stride < 1:
        problems.append(f"{where}.stride is {store.stride}; an entry pools at least 1 position (null: no entries)")


def resolve_stride(store: StoreConfig, size: SizeConfig) -> int:
    """Positions of an entry, cut as windows are."""
    assert store.stride is not None
    return min(store.stride, size.max_window or store.stride)


@dataclass(frozen=True)
class StridedSpec(GroupedSpec):
    """Keys and values per head of a window, and of one entry for each `stride` positions (strided.py); where they are
    tied (form `vector` of tied.py), `slot.v_dim` is 0.

    An entry is complete with the last of its positions, and then seen. What the positions since then come to so far is
    kept as a sum with its weight. The ring of the window is there in full from the first token on.
    """

    stride: int = 1

    kind, key, summary = "strided", "stride", "pools positions"
    takes = ("tied",)
    stray = ", and a store that {kind} has no entries: drop it"
    masked, pools = False, True

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        slot = super().resolve_slot(where, store, size, problems)
        return slot if store.tied is None else replace(slot, v_dim=0)

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        if store.tied not in (None, "vector"):
            problems.append(f"{where}.tied is {store.tied!r}; entries are pooled apart, or as one vector: write vector")
        if store.tied is not None and store.v_dim is not None:
            problems.append(f"{where}.v_dim is {store.v_dim}; tied values are as wide as keys: write head_dim or k_dim")
        check_stride(where, store, problems)
        if store.window is None:
            problems.append(f"{where}.stride needs a window: tokens that no entry has yet are seen there")
        super().check(where, store, problems)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        return {"stride": resolve_stride(store, size)}

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

    def dense_slots(self, length: int) -> int:
        """Tokens and entries."""
        return length + self.num_entries(length)

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
        """Parameters of the writer, with those of the pooled vectors and their weights, which have a bias for each
        place, and the norms of entries."""
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
