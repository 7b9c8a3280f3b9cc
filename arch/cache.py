"""The KV cache: one plain object per store of the plan, and nothing per layer.

Shapes: B batch, T new tokens, S slots read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .attention import STORE_MODULES, allocate_buffer
from .buffers import (
    AppendBuffer,
    Buffer,
    Step,
    repeat_buffer,
    repeat_row,
    zero_slots,
)
from .masks import Dense, Run, Seen, SequenceBatch, Windowed, dense, visible
from .plan import KVPlan
from .positions import NextToken, TokenPositions
from .spans import Chunk, Span
from .store_spec import StoreSpec


@dataclass
class Cache:
    """The slots of `length` tokens. `start_B`, if given: row b is padding before token `start_B[b]`.

    cross_buffers  for each layer, keys and values of the vectors outside of its sequence that it attends to
    position       `length` as a tensor [1] on the device, for steps with the same shapes at every length; None: shapes
                   follow the length
    num_slots      slots that such steps read of buffers that hold every position; at most `capacity`
    """

    plan: KVPlan
    buffers: tuple[Buffer, ...]
    capacity: int
    start_B: Tensor | None = None
    length: int = 0
    cross_buffers: tuple[AppendBuffer, ...] = ()
    position: Tensor | None = None
    num_slots: int = 0

    @property
    def stacks(self) -> tuple["Cache", ...]:
        """The cache of each decoder of the model."""
        return (self,)

    @property
    def takes_rows(self) -> bool:
        """True if `take_row` may be called now."""
        return True

    @property
    def takes_steps(self) -> bool:
        """True if kernels for one query may decode a single token."""
        return True

    @property
    def takes_static_steps(self) -> bool:
        """True if `hold_position` may be called."""
        return True

    @property
    def sees_queries(self) -> bool:
        """True if the cache needs the queries of all layers at all positions, even if no output does."""
        return False

    def store_masks(self, masks: list[Any], length: int, device: torch.device) -> list[Any]:
        """Adapt the masks of the next `length` tokens, one per view, which `mask` made of the windows."""
        return masks

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the cache; a view counts with all of the storage it keeps alive."""
        tensors = [tensor for buffer in (*self.buffers, *self.cross_buffers) for tensor in buffer.tensors]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def pad_left(self, start_B: Tensor | None) -> None:
        """Set `start_B` of an empty cache. Raises ValueError if it is not empty."""
        if self.length:
            raise ValueError(f"the cache has {self.length} positions already; prompts need an empty one")
        self.start_B = start_B

    def check(self, plan: KVPlan, batch: int, length: int) -> None:
        """Raise ValueError if `length` more tokens for `batch` sequences of a model of `plan` cannot be added."""
        if plan != self.plan:
            raise ValueError("the cache was allocated for another layout; allocate it from the model's own plan")
        if torch.is_grad_enabled():
            raise ValueError("a cache keeps no gradients; decode under torch.no_grad() or torch.inference_mode()")
        rows = self.buffers[0].tensors[0].shape[0]
        if batch != rows:
            raise ValueError(f"the cache was allocated for {rows} sequences, the batch has {batch}")
        if self.length + length > self.capacity:
            raise ValueError(
                f"the cache holds up to {self.capacity} tokens; it has {self.length} and {length} more do not fit: "
                "allocate it with a larger capacity"
            )

    def take_row(self, row: int, other: "Cache") -> None:
        """Replace the tokens of row `row` by those of the only row of `other`, aligned at the end.

        Needs `start_B`, and at least as many tokens here as there.
        """
        assert self.start_B is not None and other.length <= self.length
        for buffer, source in zip(self.buffers, other.buffers, strict=True):
            buffer.take_row(row, source, other.length, self.length)  # type: ignore[arg-type]
        self.start_B[row] = self.length - other.length

    def copy_row(self, row: int, other: "Cache") -> None:
        """Copy the only row of `other`, a cache of equal length, into row `row`."""
        assert self.length == other.length
        for buffer, source in zip(self.buffers, other.buffers, strict=True):
            buffer.take_row(row, source, self.length, self.length)  # type: ignore[arg-type]
        for cross, source in zip(self.cross_buffers, other.cross_buffers, strict=True):
            num_vectors = cross.tensors[0].shape[1]
            cross.take_row(row, source, num_vectors, num_vectors)

    def repeat(self, rows: int) -> "Cache":
        """A cache of `rows` copies of the only sequence in this one."""
        return replace(
            self,
            buffers=tuple(repeat_buffer(buffer, rows) for buffer in self.buffers),
            cross_buffers=tuple(repeat_buffer(buffer, rows) for buffer in self.cross_buffers),
            start_B=None if self.start_B is None else repeat_row(self.start_B, rows),
            position=None,
        )

    def hold_position(self) -> None:
        """Keep the position on the device from now on, for steps with static shapes."""
        self.position = torch.tensor([self.length], device=self.buffers[0].tensors[0].device)
        self.num_slots = 0

    def drop(self, count: int) -> None:
        """Drop the first `count` tokens, which are padding in every row still in use."""
        assert self.start_B is not None
        for buffer in self.buffers:
            buffer.drop(count, self.length)
        self.length -= count
        self.start_B.sub_(count).clamp_(min=0)
        if self.position is not None:
            self.position.fill_(self.length)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the next `length` tokens: [T], or [B, T] with padding on the left, whose position is 0."""
        index = self.new_indices(length, device)
        return index if self.start_B is None else (index - self.start_B[:, None]).clamp(min=0)

    def new_indices(self, length: int, device: torch.device) -> Tensor:
        """[T] indices of the next `length` tokens, padding included."""
        if self.position is None:
            return torch.arange(self.length, self.length + length, device=device)
        assert length == 1
        return self.position

    def step(self) -> Step:
        """The next token of each row."""
        return Step(self.length, self.length + 1) if self.position is None else Step(self.position, self.num_slots)

    def buffer_of(self, window: Span) -> Any:
        """The first buffer with this window; tokens lie in the same slots in all of them."""
        stores = zip(self.plan.stores, self.buffers, strict=True)
        return next(buffer for store, buffer in stores if store.masked and store.span == window)

    def step_seen(self, window: Span, device: torch.device, own: int | None = None) -> Seen:
        """Slots that the next token sees among those that buffers of this window return, in layers with a window of
        their `own`.

        Such layers get only the last `own` slots of a buffer that holds every position, unless shapes are static.
        """
        step = self.step()
        newest = None if step.static or window is not None else own
        if self.start_B is None and not step.static and own == newest and not isinstance(window, Chunk):
            return Seen(None)
        buffer = self.buffer_of(window)
        position_1, run, looked = self.new_indices(1, device), None, own or window
        slots_S = buffer.step_indices(step, device)
        if newest is not None:
            slots_S = slots_S[-newest:]
        allowed = visible(position_1, slots_S, looked, self.start_B)
        if isinstance(window, Chunk):  # whose first token lies in the first slot of a ring, but in rows that begin late
            if self.start_B is None:
                rows, end_1 = buffer.tensors[0].shape[0], position_1 % window.size + 1
                run = Run(end_1.to(torch.int32).expand(rows).contiguous())
        elif window is None or (self.start_B is None and own is None):
            rows, slots = buffer.tensors[0].shape[:2]
            dropped = 0 if newest is None else max(0, self.length + 1 - newest)  # slots that the layer does not get
            end_1 = (position_1 + 1).clamp(max=slots) - dropped
            first = self.start_B
            if own is not None:
                first_1 = (position_1 + 1 - own).clamp(min=0)
                first = first_1.expand(rows) if first is None else torch.maximum(first, first_1)
                first = (first - dropped).clamp(min=0)
            first_B = None if first is None else first.to(torch.int32).contiguous()
            run = Run(end_1.to(torch.int32).expand(rows).contiguous(), first_B)
        return Seen(allowed, run, step.static)

    def mask(
        self,
        window: Span,
        length: int,
        device: torch.device,
        form: Callable[[SequenceBatch, Span], Dense | Windowed] = dense,
        own: int | None = None,
    ) -> Dense | Windowed:
        """Mask of the next `length` tokens over the slots that buffers of this window return, in layers with a window
        of their `own`.

        `form` makes the mask for an empty cache, over which tokens attend to themselves. Otherwise it is dense: no
        other kernel knows the order of slots in a ring, and a step has few tokens.
        """
        if self.length == 0:
            rows, ids_BT = self.buffers[0].tensors[0].shape[0], None
            if self.start_B is not None:  # padding is a segment of its own
                ids_BT = (torch.arange(length, device=device) >= self.start_B[:, None]).int()
            return form(SequenceBatch(rows, length, ids_BT, device), own or window)
        if self.start_B is None and window is None and own is None and length == 1:
            return Dense(causal=False, allowed=None)
        buffer = self.buffer_of(window)
        query = torch.arange(self.length, self.length + length, device=device)
        slots = buffer.indices(self.length, length, device)
        return Dense(causal=False, allowed=visible(query, slots, own or window, self.start_B))

    def token_positions(self, store: StoreSpec, length: int, device: torch.device) -> TokenPositions:
        """Positions of the next `length` tokens, for a store not read by a mask."""
        index = self.new_indices(length, device)
        position_BT = index[None] if self.start_B is None else index - self.start_B[:, None]
        make = STORE_MODULES[store.kind].cache.positions
        assert make is not None
        plain = self.length == 0 and self.start_B is None
        return make(store, position_BT, self.capacity, self.length)._replace(plain=plain)

    def step_positions(self, store: StoreSpec, device: torch.device, dtype: torch.dtype) -> TokenPositions:
        """Positions of the next token of each row, which is of `dtype`, for a store not read by a mask."""
        index, known = self.new_indices(1, device), self.start_B is None and self.position is None
        position_B1 = index[None] if self.start_B is None else index - self.start_B[:, None]
        make = STORE_MODULES[store.kind].cache.step
        assert make is not None
        offset, static = self.length if known else None, self.position is not None
        return make(store, NextToken(position_B1, offset, self.capacity, self.step().num_slots, static, dtype))


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

    buffers = tuple(allocate_buffer(store, batch, capacity, dtype, device) for store in plan.stores)
    cross_buffers = allocate_cross(plan, batch, num_cross_vectors, dtype, device)
    return Cache(plan, buffers, capacity, start_B, cross_buffers=cross_buffers)


def allocate_cross(
    plan: KVPlan, batch: int, num_cross_vectors: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[AppendBuffer, ...]:
    """Allocate a buffer for each layer for keys and values of the vectors outside of its sequence, if there are any."""
    cross = [
        [zero_slots((batch, num_cross_vectors, *shape), dtype, device) for shape in store.position_shapes]
        for store in map(plan.store, range(plan.num_layers if num_cross_vectors else 0))
    ]
    return tuple(AppendBuffer(tuple(tensors)) for tensors in cross)
