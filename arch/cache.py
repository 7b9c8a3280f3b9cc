"""The KV cache: one plain object per store of the plan, and nothing per layer.

Shapes: B batch, T new tokens, S slots read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .bounded import TokenPositions
from .buffers import AppendBuffer, Buffer, RingBuffer, Slots, StateBuffer
from .layers import at_least_fp32, rope_table
from .masks import Dense, Sequences, dense, visible
from .plan import KVPlan, StoreSpec


@dataclass
class Cache:
    """What a decoder remembers of `length` tokens. `start_B`, if given: row b is padding before token `start_B[b]`.

    context  of each layer, keys and values of the vectors outside of the sequence that it attends to
    origin   the token from which positions count; those before it have position 0 like it
    """

    plan: KVPlan
    stores: tuple[Buffer, ...]
    capacity: int
    start_B: Tensor | None = None
    length: int = 0
    context: tuple[AppendBuffer, ...] = ()
    origin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the cache; a view counts with all of the storage it keeps alive."""
        tensors = [tensor for store in (*self.stores, *self.context) for tensor in store.tensors]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def check(self, plan: KVPlan, batch: int, length: int) -> None:
        """Raises ValueError where `length` more tokens for `batch` sequences of a model of `plan` cannot be added."""
        if plan != self.plan:
            raise ValueError("the cache was allocated for another layout; allocate it from the model's own plan")
        if torch.is_grad_enabled():
            raise ValueError("a cache keeps no gradients; decode under torch.no_grad() or torch.inference_mode()")
        rows = self.stores[0].tensors[0].shape[0]
        if batch != rows:
            raise ValueError(f"the cache was allocated for {rows} sequences, the batch has {batch}")
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds up to {self.capacity} tokens; it has {self.length} and {length} more do not fit: "
                "allocate it with a larger capacity"
            )

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the next `length` tokens: [T], or [B, T] where rows start late. Padding has position 0."""
        index = torch.arange(self.length, self.length + length, device=device)
        if self.start_B is None:
            return (index - self.origin).clamp(min=0) if self.origin else index
        return (index - self.start_B[:, None] - self.origin).clamp(min=0)

    def mask(self, window: int | None, length: int, device: torch.device) -> Dense:
        """What the next `length` tokens see of the slots that stores of this window hand out.

        Always dense: slots of a ring lie in no order that another kernel knows, and the tokens of a step are few.
        """
        if self.start_B is None and self.length == 0:
            rows = self.stores[0].tensors[0].shape[0]
            return dense(Sequences(rows, length, None, device), window)
        if self.start_B is None and window is None and length == 1:
            return Dense(causal=False, allowed=None)
        alike = (s for s, spec in zip(self.stores, self.plan.stores, strict=True) if spec.window == window)
        store = next(s for s in alike if not isinstance(s, StateBuffer))
        query = torch.arange(self.length, self.length + length, device=device)
        slots = store.indices(self.length, length, device)
        return Dense(causal=False, allowed=visible(query, slots, window, self.start_B))

    def steps(self, store: StoreSpec, length: int, device: torch.device) -> TokenPositions:
        """Where the next `length` tokens stand, for the bounded store `store`."""
        before = torch.arange(self.length - (store.window or 0), self.length + length, device=device)
        place = before[None] if self.start_B is None else before - self.start_B[:, None]
        if store.window is None:
            return TokenPositions(place, None)
        past = place[:, : store.window].clamp(min=0)
        rope = rope_table(past[0] if self.start_B is None else past, *store.rope_key)
        return TokenPositions(place[:, store.window :], rope)


def allocate(
    plan: KVPlan,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start_B: Tensor | None = None,
    context: int = 0,
) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens, `footprint.allocated_bytes` in all.

    `start_B`: the batch is padded on the left, row b up to token `start_B[b]`.
    `context`: vectors outside of the sequence that every layer attends to, whose slots are in no plan.
    """

    def zeros(store: StoreSpec, positions: int) -> Slots:
        shapes = ((batch, positions, *tail) for tail in store.slot.shapes)
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)

    def make(store: StoreSpec) -> Buffer:
        tensors = zeros(store, store.positions(capacity) - store.num_slots)
        if store.num_slots:
            heads, width = store.slot.kv_heads, store.slot.k_dim + store.slot.v_dim
            state = torch.zeros(batch, store.num_slots, heads, width, dtype=at_least_fp32(dtype), device=device)
            return StateBuffer((state, *tensors) if store.window else (state,))
        return AppendBuffer(tensors) if store.window is None else RingBuffer(tensors)

    kept = [AppendBuffer(zeros(plan.store(layer), context)) for layer in range(plan.num_layers if context else 0)]
    return Cache(plan, tuple(make(store) for store in plan.stores), capacity, start_B, context=tuple(kept))
