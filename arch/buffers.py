"""Buffers: the cache of one store, and how it takes in new tokens. Writers pass their keys and values through them.

Shapes: B batch, T new tokens, S slots read, K key/value heads, H head, M slots, W window.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .precision import at_least_fp32
from .store_spec import StoreSpec

# What a writer hands to readers, as explicit arguments and results: a NamedTuple for each kind of store.
KV = tuple[Any, ...]
Tensors = tuple[Tensor, ...]


class Step(NamedTuple):
    """One new token of each row over a cache.

    offset     tokens before it: a number; or, if no shape may depend on it, a tensor [1] of int64
    num_slots  slots to read from a buffer that holds every position, the new one included
    """

    offset: int | Tensor
    num_slots: int

    @property
    def static(self) -> bool:
        """True if shapes are the same at every offset, and a mask hides the slots that are not used."""
        return isinstance(self.offset, Tensor)


def write_slot(tensors: Tensors, new: Tensors, slot: int | Tensor) -> None:
    """Write `new`, [B, ...] each, into one slot of `tensors`, [B, S, ...] each."""
    for tensor, value in zip(tensors, new, strict=True):
        if isinstance(slot, int):
            tensor.select(1, slot).copy_(value)
        elif tensor.ndim == 3:
            tensor.index_copy_(1, slot, value.unsqueeze(1).to(tensor.dtype))
        else:  # in the order of memory, or compiled code takes the result for another order and copies all of it
            tensor.transpose(1, 2).index_copy_(2, slot, value.unsqueeze(2).to(tensor.dtype))


class AppendBuffer:
    """Buffer of every position, in order. Its tensors are [B, capacity, ...]; each head's slots are contiguous."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write the slots [B, T, ...] of tokens `offset`, `offset` + 1, ...; return all [B, S, ...] up to the last."""
        end = offset + new[0].shape[1]
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[:, offset:end] = value
        return tuple(tensor[:, :end] for tensor in self.tensors)

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write the slots [B, ...] of one token; return the first `step.num_slots`, [B, S, ...]."""
        write_slot(self.tensors, new, step.offset)
        return tuple(tensor.narrow(1, 0, step.num_slots) for tensor in self.tensors)

    def take_row(self, row: int, other: "AppendBuffer", length: int, offset: int) -> None:
        """Copy the `length` tokens of the only row of `other` into row `row`, so that they end before `offset`."""
        for tensor, source in zip(self.tensors, other.tensors, strict=True):
            tensor[row, offset - length : offset] = source[0, :length]

    def drop(self, count: int, offset: int) -> None:
        """Drop the first `count` of `offset` tokens and move the others to the beginning."""
        for tensor in self.tensors:
            tensor[:, : offset - count] = tensor[:, count:offset].clone()

    def step_indices(self, step: Step, device: torch.device) -> Tensor:
        """[S] token index of each slot that `append` returns."""
        return torch.arange(step.num_slots, device=device)

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """[S] token index of each slot that `update` returns."""
        return torch.arange(offset + length, device=device)


class RingBuffer:
    """Buffer of the last `size` positions: token i is in slot i mod size. Its tensors are [B, size, ...], in the memory
    order of AppendBuffer's."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.size = tensors[0].shape[1]

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Return the cached window followed by the new slots, then overwrite the ring with the newest of them.

        At offset 0 only the new slots are returned; for a single token the ring itself, which then includes it.
        """
        length = new[0].shape[1]
        if offset == 0:
            visible = new
        elif length == 1:
            visible = self.tensors
        else:
            visible = tuple(torch.cat((t, n.to(t.dtype)), dim=1) for t, n in zip(self.tensors, new, strict=True))
        newest = min(length, self.size)
        index = torch.arange(offset + length - newest, offset + length, device=new[0].device) % self.size
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[:, index] = value[:, length - newest :].to(tensor.dtype)
        return visible

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write the slot [B, ...] of one token; return the slots [B, S, ...] that hold something, or the whole ring.

        Where `step` is static, it is always the ring.
        """
        write_slot(self.tensors, new, step.offset % self.size)
        if isinstance(step.offset, Tensor) or step.offset + 1 >= self.size:
            return self.tensors
        return tuple(tensor.narrow(1, 0, step.offset + 1) for tensor in self.tensors)

    def take_row(self, row: int, other: "RingBuffer", length: int, offset: int) -> None:
        """Take a row like AppendBuffer.take_row; each ring has slots for as many tokens, or for all of `other`."""
        newest = torch.arange(max(0, length - other.size), length)
        for tensor, source in zip(self.tensors, other.tensors, strict=True):
            tensor[row, (newest + offset - length) % self.size] = source[0, newest % other.size]

    def drop(self, count: int, offset: int) -> None:
        """Drop tokens like AppendBuffer.drop."""
        for tensor in self.tensors:
            tensor.copy_(tensor.roll(-count, dims=1))

    def step_indices(self, step: Step, device: torch.device) -> Tensor:
        """[S] token index of each slot that `append` returns; negative for one that holds nothing yet."""
        last = step.offset
        num_slots = self.size if isinstance(last, Tensor) else min(self.size, last + 1)
        return last - (last - torch.arange(num_slots, device=device)) % self.size

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """[S] token index of each slot that `update` returns; negative for a slot that holds nothing yet."""
        new = torch.arange(offset, offset + length, device=device)
        if offset == 0:
            return new
        last = offset if length == 1 else offset - 1
        cached = last - (last - torch.arange(self.size, device=device)) % self.size
        return cached if length == 1 else torch.cat((cached, new))


class StateBuffer:
    """Holds the state of a store that merges positions: [B, K, M, 2H], in at least fp32; and its last W positions,
    where it has a window: rotated keys beside values, [B, K, W, 2H]. Position i of a row lies in slot i mod W.

    derived  what a writer has made of its weights for the steps that follow each other; none after anything else
    """

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.derived: Tensors = ()

    def read_state(self) -> Tensor:
        """Return the state, which may be changed in place if `write_state` follows."""
        return self.tensors[0]

    def write_state(self, state: Tensor) -> None:
        """Store `state`, which may be the tensor that `read_state` returned."""
        if state is not self.tensors[0]:
            self.tensors[0].copy_(state)

    def at(self, position_BT: Tensor) -> Tensor:
        """[B, K, T, 2H] what lies in the slots of positions [1 or B, T]."""
        return self.tensors[1].gather(2, self.index(position_BT))

    def put(self, position_BT: Tensor, new_BTKE: Tensor) -> None:
        """Overwrite the slots of positions [1 or B, T], which are no more than W, with keys beside values."""
        window = self.tensors[1]
        window.scatter_(2, self.index(position_BT), new_BTKE.transpose(1, 2).to(window.dtype))

    def slot(self, ring: int | Tensor) -> Tensor:
        """[B, K, 2H] what lies in a slot [1 or B, 1] of each row's ring; a view where it is one number for all."""
        return self.tensors[1].select(2, ring) if isinstance(ring, int) else self.at(ring).squeeze(2)

    def put_slot(self, ring: int | Tensor, new_BKE: Tensor) -> None:
        """Overwrite what `slot` returns."""
        if isinstance(ring, int):
            self.tensors[1].select(2, ring).copy_(new_BKE)
        else:
            self.put(ring, new_BKE.unsqueeze(1))

    def index(self, position_BT: Tensor) -> Tensor:
        """[B, K, T, 2H] slots of the ring, for `gather` and `scatter`."""
        batch, heads, window, width = self.tensors[1].shape
        return (position_BT % window)[:, None, :, None].expand(batch, heads, -1, width)

    def take_row(self, row: int, other: "StateBuffer", length: int, offset: int) -> None:
        """Let row `row` hold the only row of `other`, which may have room for fewer entries: positions count from the
        start of a row."""
        for tensor, source in zip(self.tensors, other.tensors, strict=True):
            tensor[row, : source.shape[1]] = source[0]

    def drop(self, count: int, offset: int) -> None:
        """Do nothing: a state does not depend on the offset of its tokens."""


SlotBuffer = AppendBuffer | RingBuffer
Buffer = SlotBuffer | StateBuffer


def allocate_slots(
    store: StoreSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> SlotBuffer:
    """Allocate an empty buffer of a store that is read by a mask, for `batch` sequences of up to `capacity` tokens."""
    shapes = (tensor.shape for tensor in store.cache_tensors(capacity))
    tensors = tuple(zero_slots((batch, *shape), dtype, device) for shape in shapes)
    return AppendBuffer(tensors) if store.window is None else RingBuffer(tensors)


def allocate_state(
    store: StoreSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> StateBuffer:
    """Allocate an empty buffer of a store that is a state, as `allocate_slots`."""
    return StateBuffer(
        tuple(
            torch.zeros((batch, *shape), dtype=at_least_fp32(dtype) if accumulates else dtype, device=device)
            for shape, accumulates in store.cache_tensors(capacity)
        )
    )


def zero_slots(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros of `shape`, [B, S, K, H] with contiguous slots of a head, or [B, S, R].

    A kernel reads head by head: with interleaved heads it is 1.3 to 1.4 times as slow on a CPU.
    """
    if len(shape) < 4:
        return torch.zeros(shape, dtype=dtype, device=device)
    batch, slots, heads, width = shape
    return torch.zeros((batch, heads, slots, width), dtype=dtype, device=device).transpose(1, 2)


AnyBuffer = TypeVar("AnyBuffer", bound=Buffer)


def repeat_buffer(buffer: AnyBuffer, rows: int) -> AnyBuffer:
    """A buffer of `rows` copies of the only sequence in `buffer`."""
    return type(buffer)(tuple(repeat_row(tensor, rows) for tensor in buffer.tensors))


def repeat_row(tensor: Tensor, rows: int) -> Tensor:
    """Copies [rows, ...] of [1, ...], in the same order of memory."""
    return tensor.new_empty_strided((rows, *tensor.shape[1:]), tensor.stride()).copy_(tensor)
