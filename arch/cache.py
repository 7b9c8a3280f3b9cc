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
    """The slots of `length` tokens. `start_B`, if given: row b is padding before token `start_B[b]`.

    cross_buffers  for each layer, keys and values of the vectors that it attends to besides its own sequence
    """

    plan: KVPlan
    stores: tuple[Buffer, ...]
    capacity: int
    start_B: Tensor | None = None
    length: int = 0
    cross_buffers: tuple[AppendBuffer, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the cache; a view counts with all of the storage it keeps alive."""
        tensors = [tensor for store in (*self.stores, *self.cross_buffers) for tensor in store.tensors]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def pad_left(self, start_B: Tensor | None) -> None:
        """Set `start_B` of an empty cache. Raises ValueError where it is not empty."""
        if self.length:
            raise ValueError(f"the cache has {self.length} positions already; prompts need an empty one")
        self.start_B = start_B

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
        return index if self.start_B is None else (index - self.start_B[:, None]).clamp(min=0)

    def mask(self, window: int | None, length: int, device: torch.device) -> Dense:
        """Mask of the next `length` tokens over the slots that buffers of this window return.

        It is always dense: no other kernel knows the order of slots in a ring, and a step has few tokens.
        """
        if self.start_B is None and self.length == 0:
            rows = self.stores[0].tensors[0].shape[0]
            return dense(Sequences(rows, length, None, device), window)
        if self.start_B is None and window is None and length == 1:
            return Dense(causal=False, allowed=None)
        same_window = (s for s, spec in zip(self.stores, self.plan.stores, strict=True) if spec.window == window)
        store = next(s for s in same_window if not isinstance(s, StateBuffer))
        query = torch.arange(self.length, self.length + length, device=device)
        slots = store.indices(self.length, length, device)
        return Dense(causal=False, allowed=visible(query, slots, window, self.start_B))

    def token_positions(self, store: StoreSpec, length: int, device: torch.device) -> TokenPositions:
        """Positions of the next `length` tokens, for the bounded store `store`, with rotary tables of its window."""
        index = torch.arange(self.length - (store.window or 0), self.length + length, device=device)
        positions = index[None] if self.start_B is None else index - self.start_B[:, None]
        if store.window is None:
            return TokenPositions(positions, None)
        past = positions[:, : store.window].clamp(min=0)
        rope = rope_table(past[0] if self.start_B is None else past, *store.rope_key)
        return TokenPositions(positions[:, store.window :], rope)


def allocate(
    plan: KVPlan,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start_B: Tensor | None = None,
    num_cross_vectors: int = 0,
) -> Cache:
    """Allocate an empty cache for `batch` sequences of up to `capacity` tokens, `footprint.allocated_bytes` in all.

    `start_B`: the batch is padded on the left, row b up to token `start_B[b]`.
    `num_cross_vectors`: as in StackPlan.
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

    layers = range(plan.num_layers if num_cross_vectors else 0)
    cross_buffers = tuple(AppendBuffer(zeros(plan.store(layer), num_cross_vectors)) for layer in layers)
    return Cache(plan, tuple(make(store) for store in plan.stores), capacity, start_B, cross_buffers=cross_buffers)
