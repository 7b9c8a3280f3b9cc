"""Stores of keys and values per head, as a layout declares them; grouped.py has their modules."""

from typing import Any

from .config import SizeConfig, StoreConfig, head_dim
from .store_spec import SlotShape, StoreSpec, resolve_share


class GroupedSpec(StoreSpec):
    """Keys and values per head, of every position or of a window."""

    kind, key, summary = "grouped", "kv_heads", "has keys and values per head"
    crosses = True

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
