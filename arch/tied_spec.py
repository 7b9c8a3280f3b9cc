"""Stores in which keys and values are one tensor, as a layout declares them; tied.py has their modules."""

from dataclasses import dataclass, replace
from typing import Any

from .config import SizeConfig, StoreConfig, has_qkv_bias, style_of
from .grouped_spec import GroupedSpec
from .store_spec import HeadShape, ParamCount, SlotShape, norm_width

# Forms in which keys and values are one tensor (tied.py).
TIED_FORMS = ("vector", "half", "projection")


@dataclass(frozen=True)
class TiedSpec(GroupedSpec):
    """Keys and values per head made by one projection (tied.py), of every position or of a window.

    In the forms `vector` and `half` one cached vector, `slot.k_dim` wide, serves as both, and `slot.v_dim` is 0;
    `slot.rope_dim` is the width of what all heads have in common in `half`.
    """

    tied: str = "vector"

    kind, key, summary = "tied", "tied", "has one tensor for keys and values"
    crosses = False
    stray = "; the store {kind}, which is no such tensor: leave it out"

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
        """Parameters of the one projection that keys and values come from, whatever is cached."""
        width = self.slot.kv_heads * self.slot.k_dim + self.slot.rope_dim
        norm = norm_width(size, self.slot.kv_heads, self.slot.k_dim)
        return ParamCount(size.d_model * width, (width if has_qkv_bias(size) else 0) + norm)

    @property
    def slot_text(self) -> str:
        if self.slot.v_dim:
            return super().slot_text
        return f"{self.slot.kv_heads} x {self.slot.k_dim}" + (f" + rope {self.slot.rope_dim}" * (self.tied == "half"))
