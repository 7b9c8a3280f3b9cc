"""Strided stores of latents, as a layout declares them; strided_latent.py has their modules."""

from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .config import SizeConfig, StoreConfig
from .latent_spec import LatentSpec
from .store_spec import ParamCount, SlotShape
from .strided_spec import check_stride, resolve_stride


@dataclass(frozen=True)
class StridedLatentSpec(LatentSpec):
    """One latent and rotary key for all heads for each `stride` positions: a sum of their latents, each times a learned
    share (multi-head temporal latent attention, strided_latent.py).

    The entry of the newest positions is a sum of those so far, and seen as that. So no window is needed, and there is
    none.
    """

    stride: int = 1

    kind, summary = "strided_latent", "pools latents"
    key = "stride"
    takes = ("stride",)
    masked, pools = False, True

    @classmethod
    def asked_by(cls, store: StoreConfig) -> bool:
        return store.latent is not None and store.stride is not None

    @classmethod
    def resolve_slot(cls, where: str, store: StoreConfig, size: SizeConfig, problems: list[str]) -> SlotShape:
        slot = super().resolve_slot(where, store, size, problems)
        if slot.latent_dim and (slot.latent_dim < 4 or slot.latent_dim % 2):
            problems.append(
                f"{where}.latent.dim comes to {slot.latent_dim}; with stride, chunks have a code of that width, sines "
                "and cosines, which needs an even number, at least 4"
            )
        return slot

    @classmethod
    def check(cls, where: str, store: StoreConfig, problems: list[str]) -> None:
        assert store.latent is not None
        check_stride(where, store, problems)
        for key, value in (("window", store.window), ("chunk", store.chunk)):
            if value is not None:
                problems.append(
                    f"{where}.{key} is {value}; entries of latents are of all positions, the newest too: leave it out"
                )
        if store.latent.heads not in (None, 1):
            problems.append(f"{where}.latent.heads is {store.latent.heads}; an entry is of one latent: leave it out")
        super().check(where, store, problems)

    @classmethod
    def resolve_more(
        cls, where: str, store: StoreConfig, slot: SlotShape, size: SizeConfig, problems: list[str]
    ) -> dict[str, Any]:
        more = super().resolve_more(where, store, slot, size, problems)
        return more | {"stride": resolve_stride(store, size)}

    @classmethod
    def describes(cls, fields: dict[str, Any]) -> bool:
        return bool(fields.get("stride")) and super().describes(fields)

    @property
    def positions_key(self) -> tuple[Hashable, ...]:
        return self.kind, self.stride, self.slot.latent_dim

    @property
    def share_dim(self) -> int:
        """Width in which latents and the codes of chunks are compared."""
        return self.slot.latent_dim // 4

    def num_positions(self, context: int) -> int:
        """Entries, the last of which may lack positions."""
        return -(-context // self.stride)

    def slope(self, itemsize: int) -> Fraction:
        return Fraction(self.slot.elements * itemsize, self.stride)

    def dense_slots(self, length: int) -> int:
        return length

    def writer_params(self, size: SizeConfig) -> ParamCount:
        """Parameters of the writer, with those that compute the shares, which have biases in any style."""
        matrices, others = super().writer_params(size)
        return ParamCount(matrices + 2 * self.slot.latent_dim * self.share_dim, others + 2 * self.share_dim)

    def attention_flops(self, size: SizeConfig, seq_len: int, owner: bool) -> int:
        """Pairs of tokens and entries, their own included."""
        entries, rest = divmod(seq_len, self.stride)
        pairs = self.stride * (entries * (entries + 1) // 2) + rest * (entries + 1)
        return self.pair_flops(size) * pairs

    @property
    def mark(self) -> str:
        return "p"

    @property
    def retention(self) -> tuple[tuple[str, int], ...]:
        return ((f"1 of {self.stride:,}", self.stride),)
