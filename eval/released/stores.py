"""Stores of released models: those of ours, and states of the same bytes at any context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from arch import KVPlan
from arch.grouped_spec import GroupedSpec
from arch.latent_spec import LatentSpec
from arch.store_spec import CacheTensor, SlotShape, StoreSpec


@dataclass(frozen=True)
class StateSpec(StoreSpec):
    """A state of the same bytes at any context: matrices of all tokens, and the last inputs of a convolution."""

    tensors: tuple[CacheTensor, ...] = ()

    kind, key, summary = "state", "", "holds a state"
    masked, grows = False, False

    @property
    def max_positions(self) -> int | None:
        return 0

    def num_positions(self, context: int) -> int:
        return 0

    def cache_tensors(self, context: int) -> tuple[CacheTensor, ...]:
        return self.tensors

    def slot_bytes(self, itemsize: int) -> tuple[int, ...]:
        return tuple(tensor.nbytes(itemsize) for tensor in self.tensors)

    @property
    def mark(self) -> str:
        return "m"

    @property
    def slot_text(self) -> str:
        return " + ".join(" x ".join(f"{width:,}" for width in tensor.shape) for tensor in self.tensors)


Layer = StoreSpec | int  # a store that the layer writes, or the layer whose store it reads


def grouped(
    name: str, kv_heads: int, k_dim: int, v_dim: int | None = None, window: int | None = None, sinks: bool = False
) -> StoreSpec:
    """Keys and values per head, of every position or of a window."""
    return GroupedSpec(**_common(name, SlotShape(kv_heads, k_dim, k_dim if v_dim is None else v_dim), window, sinks))


def latent(name: str, width: int, rope: int) -> StoreSpec:
    """A latent and a rotary key for all heads."""
    return LatentSpec(**_common(name, SlotShape(latent_dim=width, rope_dim=rope)))


def state(name: str, *tensors: CacheTensor) -> StoreSpec:
    """A state of the same bytes at any context."""
    return StateSpec(**_common(name, SlotShape()), tensors=tensors)


def _common(name: str, slot: SlotShape, window: int | None = None, sinks: bool = False) -> dict[str, Any]:
    """Fields of a spec. Rotation and norms of keys change no byte, and are not said."""
    return {
        "name": name,
        "owner": -1,
        "slot": slot,
        "window": window,
        "sinks": sinks,
        "kv_norm": False,
        "rope_theta": 1.0,
    }


def assemble(layers: Sequence[Layer]) -> KVPlan:
    """The plan of `layers` in order."""
    stores: list[StoreSpec] = []
    reads: list[int] = []
    for number, layer in enumerate(layers):
        if isinstance(layer, int):
            reads.append(reads[layer])
        else:
            reads.append(len(stores))
            stores.append(replace(layer, owner=number))
    return KVPlan(tuple(stores), tuple(reads))
