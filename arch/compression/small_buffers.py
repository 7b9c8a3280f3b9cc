"""Buffers of compressed caches: with a codec, and with a keep.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H head, C chosen slots.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..buffers import SlotBuffer, StateBuffer, Step, Tensors, repeat_row, zero_slots
from ..masks import Dense, visible
from ..spans import Chunk, Span
from ..store_spec import StoreSpec
from .coding import decode, encode, zero_codes
from .method import CacheMethod
from .scores import EMPTY, merge_dropped
from .storage import Kept, TensorLayout, kept_layouts, kept_slots, position_heads, tensor_layouts


class CodedTensor:
    """One tensor of a store in the layout of `layout`: whole tokens in a ring, and blocks of earlier ones in another.

    Of `n` tokens the first `coded(n)` are in blocks. What lies where follows from the number of tokens alone.
    """

    def __init__(self, layout: TensorLayout, whole: Tensor, codes: Tensors):
        self.layout, self.whole, self.codes = layout, whole, codes

    @classmethod
    def allocate(cls, layout: TensorLayout, batch: int, dtype: torch.dtype, device: Any) -> "CodedTensor":
        whole = zero_slots((batch, layout.whole, *layout.shape), dtype, device)
        return cls(layout, whole, zero_codes(layout, batch, device))

    @property
    def tensors(self) -> Tensors:
        return self.whole, *self.codes

    def coded(self, count: int) -> int:
        """Number of the first tokens of `count` that are in blocks, or were."""
        layout = self.layout
        return max(0, count - layout.recent) // layout.block * layout.block if layout.blocks else 0

    def read(self, first: int, count: int, room: int = 0) -> Tensor:
        """[B, S + room, ...] tokens `first` to `count` - 1, of `count` that were written, and `room` for more."""
        layout, end = self.layout, self.coded(count)
        if first >= end and not room:
            return ring_slots(self.whole, first, count)
        begin, dtype = first // layout.block * layout.block if first < end else first, self.whole.dtype
        out = self.whole.new_empty(len(self.whole), count - begin + room, *layout.shape)
        if first < end:
            blocks = (ring_slots(codes, begin // layout.block, end // layout.block) for codes in self.codes)
            past = out[:, : end - begin].view(len(out), -1, layout.block, *layout.shape)
            decode(tuple(blocks), layout, dtype, past)
        rest = max(first, end)
        out[:, rest - begin : count - begin] = ring_slots(self.whole, rest, count)
        return out[:, first - begin :]

    def write(self, new: Tensor, offset: int) -> None:
        """Add tokens [B, T, ...] `offset`, `offset` + 1, ..."""
        layout, count = self.layout, offset + new.shape[1]
        before, after = self.coded(offset), self.coded(count)
        new = new.to(self.whole.dtype)
        if after > before:
            pending = torch.cat((ring_slots(self.whole, before, offset), new), dim=1)
            newest = max(before, after - layout.blocks * layout.block)  # a ring has no room for more
            if newest < after:
                blocks = pending[:, newest - before : after - before]
                blocks = blocks.reshape(len(blocks), -1, layout.block, *layout.shape)
                for codes, values in zip(self.codes, encode(blocks, layout), strict=True):
                    write_ring(codes, values, newest // layout.block)
            rest, first = pending[:, after - before :], after
        else:
            rest, first = new, offset
        kept = min(rest.shape[1], self.whole.shape[1])
        write_ring(self.whole, rest[:, rest.shape[1] - kept :], first + rest.shape[1] - kept)

    def begin(self, new: Tensor, offset: int) -> None:
        """Add tokens [B, T, ...] `offset`, `offset` + 1, ... to none.

        The first of them stands in for those before it in its block, so that the scales are those of tokens alone.
        """
        before = offset % self.layout.block
        self.write(torch.cat((new[:, :1].repeat_interleave(before, dim=1), new), dim=1), offset - before)

    def repeat(self, rows: int) -> "CodedTensor":
        whole, *codes = (repeat_row(tensor, rows) for tensor in self.tensors)
        return CodedTensor(self.layout, whole, tuple(codes))


def ring_slots(ring: Tensor, first: int, end: int) -> Tensor:
    """[B, end - first, ...] entries of a ring, which it holds: a view where they lie side by side."""
    size = ring.shape[1]
    if first >= end:
        return ring[:, :0]
    begin = first % size
    if begin + end - first <= size:
        return ring[:, begin : begin + end - first]
    return torch.cat((ring[:, begin:], ring[:, : begin + end - first - size]), dim=1)


def write_ring(ring: Tensor, new: Tensor, first: int) -> None:
    """Write entries `first`, `first` + 1, ... of a ring, no more than it has."""
    count, size = new.shape[1], ring.shape[1]
    if not count:
        return
    begin = first % size
    head = min(count, size - begin)
    ring[:, begin : begin + head] = new[:, :head]
    ring[:, : count - head] = new[:, head:]


class CodedBuffer:
    """The cache of a store with a codec. Readers get tokens in order, all up to the last, or those of a window."""

    def __init__(self, coded: tuple[CodedTensor, ...], window: int | None):
        self.coded, self.window = coded, window

    @classmethod
    def allocate(cls, layouts: tuple[TensorLayout, ...], batch: int, dtype: torch.dtype, device: Any) -> "CodedBuffer":
        coded = tuple(CodedTensor.allocate(layout, batch, dtype, device) for layout in layouts)
        return cls(coded, layouts[0].window)

    @property
    def tensors(self) -> Tensors:
        return tuple(tensor for coded in self.coded for tensor in coded.tensors)

    def first(self, offset: int) -> int:
        """The first token that token `offset` sees."""
        return 0 if self.window is None else max(0, offset + 1 - self.window)

    def read(self, first: int, count: int, room: int = 0) -> Tensors:
        """[B, S + room, ...] tokens `first` to `count` - 1 of `count`, and `room` for more."""
        return tuple(coded.read(first, count, room) for coded in self.coded)

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; the new tokens come back as they are, and those before them decoded."""
        first = self.first(offset)
        seen = new
        if first < offset:
            seen = self.read(first, offset, new[0].shape[1])
            for tensor, value in zip(seen, new, strict=True):
                tensor[:, offset - first :] = value
        for coded, value in zip(self.coded, new, strict=True):
            coded.write(value, offset)
        return seen

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write the slots [B, ...] of one token; return as `update`."""
        assert isinstance(step.offset, int)
        return self.update(tuple(value.unsqueeze(1) for value in new), step.offset)

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """[S] token index of each slot that `update` returns."""
        return torch.arange(self.first(offset), offset + length, device=device)

    def step_indices(self, step: Step, device: torch.device) -> Tensor:
        """[S] token index of each slot that `append` returns."""
        assert isinstance(step.offset, int)
        return self.indices(step.offset, 1, device)

    def repeat(self, rows: int) -> "CodedBuffer":
        return CodedBuffer(tuple(coded.repeat(rows) for coded in self.coded), self.window)


class CodedState(StateBuffer):
    """The cache of a store of a matrix per head with a codec: codes, scales and zeros of the state, which is whole
    within a step alone; and its other tensor, the last inputs of the convolution, as it is."""

    def __init__(self, layout: TensorLayout, tensors: Tensors):
        super().__init__(tensors)
        self.layout = layout

    @classmethod
    def empty(cls, layout: TensorLayout, whole: Tensors) -> "CodedState":
        """An empty cache in place of the tensors of a StateBuffer."""
        state, *others = whole
        return cls(layout, (*zero_codes(layout, len(state), state.device), *others))

    def read_state(self) -> Tensor:
        return decode(self.tensors[:-1], self.layout, self.tensors[-1].dtype)[:, 0, 0]

    def write_state(self, state: Tensor) -> None:
        for tensor, value in zip(self.tensors[:-1], encode(state[:, None, None], self.layout), strict=True):
            tensor.copy_(value)

    def repeat(self, rows: int) -> "CodedState":
        return CodedState(self.layout, tuple(repeat_row(tensor, rows) for tensor in self.tensors))


class KeptBuffer:
    """The cache of a store with a keep: whole until `compress`, then chosen slots, and the newest and later tokens.

    `see` is called with the queries of each reader of the store, in every forward pass; a keep that scores by queries
    overrides it, and sets `sees_queries`. `choose` says what stays.
    """

    sees_queries = False

    def __init__(self, store: StoreSpec, method: CacheMethod, capacity: int, whole: SlotBuffer):
        self.store, self.method, self.capacity = store, method, capacity
        self.whole: SlotBuffer | None = whole
        self.position_BKC: Tensor | None = None
        self.chosen: CodedBuffer | None = None
        self.later: CodedBuffer | None = None
        self.kept: Kept | None = None
        self.prompt = 0  # tokens that were there when it was compressed
        self.base = 0  # the token that is the first of `later`

    @property
    def tensors(self) -> Tensors:
        if self.whole is not None:
            return self.whole.tensors
        assert self.later is not None
        if self.chosen is None or self.position_BKC is None:
            return self.later.tensors
        return *self.later.tensors, *self.chosen.tensors, self.position_BKC

    @property
    def notes(self) -> Tensors:
        """Tensors that `see` filled for `compress`, which lets go of them."""
        return ()

    @property
    def chosen_slots(self) -> int | None:
        """Slots of positions that were chosen; None before compression."""
        if self.whole is not None:
            return None
        return 0 if self.position_BKC is None else self.position_BKC.shape[-1]

    def first(self, length: int) -> int:
        """The first of `length` tokens that the whole cache holds."""
        return 0 if self.store.window is None else max(0, length - self.store.window)

    def see(self, q_BTNH: Tensor, k_BSKH: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None) -> None:
        """Take note of the queries of one reader of the store, before compression or after it."""

    def join(self, q: Tensor, k: Tensor, v: Tensor, mask: Dense, scale: float) -> tuple[Tensor, Tensor, Dense]:
        """Keys, values and mask of one reader, from those that `update` and `allowed` gave, and its queries."""
        return k, v, mask

    def choose(self, candidates: Tensors, position_BKS: Tensor, kept: Kept) -> Tensor:
        """[B, K, C] slots that stay of those before the newest, negative where there are fewer.

        `candidates` [B, S, ...] are those slots, in order, and `position_BKS` their positions in their rows, EMPTY
        where they hold nothing. StreamingLLM's choice: the first of each row.
        """
        padding_BK1 = (position_BKS == EMPTY).sum(dim=-1, keepdim=True)
        index = torch.arange(kept.chosen, device=position_BKS.device) + padding_BK1
        return torch.where(index < position_BKS.shape[-1], index, EMPTY)

    def carry(self, index_BKC: Tensor, count: int, kept: Kept, room: int) -> None:
        """Take note that slots `index_BKC` of the first `count` were chosen, and that the newest follow them, with
        `room` for so many slots in all."""

    def compress(self, length: int, start_B: Tensor | None) -> "KeptBuffer | CodedBuffer | SlotBuffer":
        """Let go of what the keep does not choose of `length` tokens, and code the rest. Return the buffer that goes on
        with them: where everything stays, it is one without a keep."""
        assert self.whole is not None and self.method.keep is not None
        tensors, codec = self.whole.tensors, self.method.codec
        batch, dtype, device = tensors[0].shape[0], tensors[0].dtype, tensors[0].device
        kept = kept_slots(self.store, self.method, length, tensors[0].element_size(), self.capacity)
        first = self.first(length)
        if kept is None:
            if codec is None:
                return self.whole
            layouts = tensor_layouts(self.store, codec, self.capacity, self.store.window)
            buffer = CodedBuffer.allocate(layouts, batch, dtype, device)
            for coded, tensor in zip(buffer.coded, tensors, strict=True):
                coded.begin(ring_slots(tensor, first, length), first)
            return buffer
        place_BKS = self.places(max(0, length - first - kept.newest), start_B, first)
        self.kept, self.prompt = kept, length
        self.settle(tuple(ring_slots(tensor, first, length) for tensor in tensors), place_BKS, length, start_B)
        self.whole = None
        return self

    def places(self, count: int, start_B: Tensor | None, first: int = 0) -> Tensor:
        """[B, K, S] `count` tokens from number `first` on, as slots of the whole cache, EMPTY for padding."""
        assert self.whole is not None
        tensor = self.whole.tensors[0]
        index = torch.arange(first, first + count, device=tensor.device).expand(len(tensor), -1)
        if start_B is not None:
            index = torch.where(index >= start_B[:, None], index, EMPTY)
        return index[:, None].expand(-1, position_heads(self.store), -1)

    def settle(self, tensors: Tensors, place_BKS: Tensor, length: int, start_B: Tensor | None, new: int = 0) -> None:
        """Hold what is chosen of slots [B, S + newest, ...], of which the first S are of tokens `place_BKS` and the
        others the newest of `length` tokens, or all of fewer, with room for `new` tokens at least."""
        assert self.kept is not None and self.method.keep is not None
        kept, codec, count = self.kept, self.method.codec, place_BKS.shape[-1]
        batch, dtype, device = tensors[0].shape[0], tensors[0].dtype, tensors[0].device
        candidates = tuple(tensor[:, :count] for tensor in tensors)
        if self.store.window is not None:  # no later token sees them
            next_T = torch.tensor([length], device=device)
            place_BKS = place_BKS.masked_fill(~reached(self.store.span, next_T, place_BKS, start_B)[:, :, 0], EMPTY)
        position_BKS = place_BKS if start_B is None else in_rows(place_BKS, start_B)
        index_BKC = self.choose(candidates, position_BKS, kept) if count else place_BKS
        kept = replace(kept, chosen=index_BKC.shape[-1])
        chosen_layouts, later_layouts = kept_layouts(self.store, codec, kept, self.capacity, self.prompt)
        if kept.every:
            later_layouts = tuple(
                replace(layout, limit=max(layout.limit, kept.newest + new)) for layout in later_layouts
            )
        self.carry(index_BKC, count, kept, index_BKC.shape[-1] + later_layouts[0].limit)
        self.base = length - (tensors[0].shape[1] - count)
        self.chosen = self.position_BKC = None
        self.later = CodedBuffer.allocate(later_layouts, batch, dtype, device)
        self.later.update(tuple(tensor[:, count:] for tensor in tensors), 0)
        if index_BKC.shape[-1]:
            self.chosen = CodedBuffer.allocate(chosen_layouts, batch, dtype, device)
            merge = self.method.keep.options.get("merge", False)
            self.chosen.update(
                tuple(
                    merge_slots(tensor, position_BKS, index_BKC) if merge else gather_slots(tensor, index_BKC)
                    for tensor in candidates
                ),
                0,
            )
            place_BKC = place_BKS.gather(-1, index_BKC.clamp(min=0))
            self.position_BKC = torch.where(index_BKC >= 0, place_BKC, EMPTY).to(torch.int32)

    def is_due(self, offset: int, new: int) -> bool:
        """Return whether the keep acts again, as `new` tokens after `offset` need more room than there is."""
        if self.whole is not None or self.kept is None or not self.kept.every:
            return False
        assert self.later is not None
        return offset - self.base + new > self.later.coded[0].layout.limit

    def make_room(self, offset: int, new: int, start_B: Tensor | None) -> None:
        """Let the keep act again, if it is due. Called before the masks of a forward pass are made."""
        if not self.is_due(offset, new):
            return
        assert self.later is not None and self.kept is not None
        held = offset - self.base
        tensors, newest = self.later.read(0, held), min(held, self.kept.newest)
        place_S = torch.arange(self.base, offset - newest, device=tensors[0].device)
        place_BKS = place_S.expand(len(tensors[0]), position_heads(self.store), -1)
        if start_B is not None:
            place_BKS = torch.where(place_BKS >= start_B[:, None, None], place_BKS, EMPTY)
        if self.chosen is not None and self.position_BKC is not None:
            chosen = self.chosen.read(0, self.position_BKC.shape[-1])
            tensors = tuple(torch.cat(parts, dim=1) for parts in zip(chosen, tensors, strict=True))
            place_BKS = torch.cat((self.position_BKC.long(), place_BKS), dim=-1)
        self.settle(tensors, place_BKS, offset, start_B, new)

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; the chosen slots come back first, then the tokens from `base` on."""
        if self.whole is not None:
            return self.whole.update(new, offset)
        assert self.later is not None
        later = self.later.update(new, offset - self.base)
        if self.chosen is None or self.position_BKC is None:
            return later
        chosen = self.chosen.read(0, self.position_BKC.shape[-1])
        return tuple(torch.cat((old, value.to(old.dtype)), dim=1) for old, value in zip(chosen, later, strict=True))

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        """[1 or B, 1 or K, T, S] what each of `length` queries sees of the slots that `update` returns.

        None before compression, when slots are those of all tokens, and for the first of a window.
        """
        query, span = torch.arange(offset, offset + length, device=device), self.store.span
        if self.whole is not None:
            slots = self.whole.indices(offset, length, device)
            return visible(query, slots, span, start_B) if span is not None and offset else None
        assert self.later is not None
        slots = self.base + self.later.indices(offset - self.base, length, device)
        allowed = visible(query, slots, self.later.window if span is None else span, start_B)
        allowed = allowed if allowed.ndim == 4 else allowed[None, None]
        if self.position_BKC is None:
            return allowed
        batch, heads = self.position_BKC.shape[:2]
        chosen = (self.position_BKC >= 0).unsqueeze(2).expand(-1, -1, length, -1)
        if span is not None:
            chosen = chosen & reached(span, query, self.position_BKC, start_B)
        return torch.cat((chosen, allowed.expand(batch, heads, -1, -1)), dim=-1)

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """[S] token index of each slot that `update` returns before compression; after it `allowed` decides."""
        if self.whole is not None:
            return self.whole.indices(offset, length, device)
        return torch.arange(offset + length, device=device)

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write the slots [B, ...] of one token; return as `update`."""
        assert isinstance(step.offset, int)
        if self.whole is not None:
            return self.whole.append(new, step)
        return self.update(tuple(value.unsqueeze(1) for value in new), step.offset)

    def step_indices(self, step: Step, device: torch.device) -> Tensor:
        assert isinstance(step.offset, int)
        return self.indices(step.offset, 1, device)

    def repeat(self, rows: int) -> "KeptBuffer":
        copy = type(self)(self.store, self.method, self.capacity, self.whole)  # type: ignore[arg-type]
        copy.__dict__.update(self.__dict__)
        if self.whole is not None:
            copy.whole = type(self.whole)(tuple(repeat_row(tensor, rows) for tensor in self.whole.tensors))
        copy.chosen = None if self.chosen is None else self.chosen.repeat(rows)
        copy.later = None if self.later is None else self.later.repeat(rows)
        copy.position_BKC = None if self.position_BKC is None else repeat_row(self.position_BKC, rows)
        return copy


def reached(span: Span, query_T: Tensor, place_BKS: Tensor, start_B: Tensor | None) -> Tensor:
    """[B, K, T, S] what of the tokens `place_BKS` is not too far back for each query."""
    query_T1, place_BK1S = query_T[:, None], place_BKS.unsqueeze(2)
    if span is None:
        return place_BK1S >= EMPTY
    if isinstance(span, Chunk):
        begin = 0 if start_B is None else start_B[:, None, None, None]
        return place_BK1S >= begin + (query_T1 - begin) // span.size * span.size
    return place_BK1S > query_T1 - span


def gather_slots(tensor: Tensor, index_BKC: Tensor) -> Tensor:
    """[B, C, ...] slots of [B, S, K, H], or of [B, S, R]; those of a negative index are slot 0. One index, K = 1, is
    for all heads."""
    index = index_BKC.clamp(min=0).transpose(1, 2)
    index = index if tensor.ndim == 3 else index.unsqueeze(-1)
    return tensor.gather(1, index.expand(*index.shape[:2], *tensor.shape[2:]))


def in_rows(place_BKS: Tensor, start_B: Tensor) -> Tensor:
    """Positions in their rows of tokens, of rows that start at `start_B`."""
    return torch.where(place_BKS == EMPTY, EMPTY, place_BKS - start_B[:, None, None])


def merge_slots(tensor: Tensor, position_BKS: Tensor, index_BKC: Tensor) -> Tensor:
    """[B, C, ...] slots as `gather_slots`, each the mean of itself and of those to which it is the nearest."""
    x_BSKH = tensor.reshape(*tensor.shape[:2], position_BKS.shape[1], -1)
    return merge_dropped(x_BSKH, position_BKS, index_BKC).reshape(len(tensor), index_BKC.shape[-1], *tensor.shape[2:])
