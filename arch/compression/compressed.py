"""Caches that are kept smaller: made of buffers with a codec, or a keep, and of those that stay as they are.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H head.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..attend import Kernel, Mask
from ..attention import allocate_buffer
from ..block_plan import Plan
from ..block_transformer import BlockCache
from ..buffers import StateBuffer, repeat_row
from ..cache import Cache, allocate_cross
from ..masks import Dense, Run, Seen, Windowed, visible
from ..plan import StackPlan
from ..positions import TokenPositions
from ..spans import Chunk, Span
from .arkvale import ArkValeBuffer
from .checks import check_method
from .keeps import (
    CormBuffer,
    H2OBuffer,
    KnormBuffer,
    PrefixBuffer,
    RandomBuffer,
    ScissorhandsBuffer,
    SnapBuffer,
    share_budget,
)
from .method import CacheMethod
from .small_buffers import CodedBuffer, CodedState, KeptBuffer
from .storage import acts, of_stack, sharing_groups, state_layout, tensor_layouts, with_budget
from .think import ThinkBuffer
from .xkv import XkvBuffer, factorise, share_again
from .zipcache import ZipCacheBuffer

# Keeps by name: each a KeptBuffer that chooses by its own scores.
KEPT_BUFFERS: dict[str, type[KeptBuffer]] = {
    "streaming": KeptBuffer,
    "random": RandomBuffer,
    "knorm": KnormBuffer,
    "snapkv": SnapBuffer,
    "snapstream": SnapBuffer,
    "h2o": H2OBuffer,
    "scissorhands": ScissorhandsBuffer,
    "prefixkv": PrefixBuffer,
    "corm": CormBuffer,
    "think": ThinkBuffer,
    "zipcache": ZipCacheBuffer,
    "xkv": XkvBuffer,
    "arkvale": ArkValeBuffer,
}


@dataclass(frozen=True)
class KeptKernel:
    """Kernel of a mask of a store with a keep: shows the queries to its buffer, and runs the kernel within.

    After compression what is seen may differ between key/value heads, [B, K, T, S].
    """

    buffer: KeptBuffer
    kernel: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Dense, scale: float, sinks: Tensor | None) -> Tensor:
        self.buffer.see(q, k, mask, scale, sinks)
        k, v, mask = self.buffer.join(q, k, v, mask, scale)
        group, length, allowed = q.shape[2] // k.shape[2], q.shape[1], mask.allowed
        if isinstance(mask, Windowed) or allowed is None or allowed.ndim == 2 or allowed.shape[1] == 1 or group == 1:
            return self.kernel(q, k, v, mask, scale, sinks)
        if sinks is not None:  # one of each query head
            k, v = (repeat(x, "b s k h -> b s (k g) h", g=group) for x in (k, v))
            allowed = repeat(allowed, "b k t s -> b (k g) t s", g=group)
            return self.kernel(q, k, v, Dense(causal=False, allowed=allowed), scale, sinks)
        q = rearrange(q, "b t (k g) h -> b (g t) k h", g=group)  # heads that read the same keys are so many queries
        mask = Dense(causal=False, allowed=repeat(allowed, "b k t s -> b k (g t) s", g=group))
        return rearrange(self.kernel(q, k, v, mask, scale, None), "b (g t) k h -> b t (k g) h", t=length)


@dataclass
class CompressedCache(Cache):
    """A Cache with a codec, a keep, or both, on its stores. `compress` is called once, after the prompt."""

    method: CacheMethod = field(default_factory=CacheMethod)

    @property
    def kept(self) -> list[KeptBuffer]:
        buffers: tuple[Any, ...] = self.buffers
        return [buffer for buffer in buffers if isinstance(buffer, KeptBuffer)]

    @property
    def chosen_slots(self) -> tuple[int | None, ...]:
        """Slots of each store that its keep chose besides the newest; None where it did not act, or not yet."""
        buffers: tuple[Any, ...] = self.buffers
        return tuple(buffer.chosen_slots if isinstance(buffer, KeptBuffer) else None for buffer in buffers)

    @property
    def notes_nbytes(self) -> int:
        """Bytes that the keep holds beside the cache until it is compressed: attention, or queries, of the prompt."""
        return sum(tensor.untyped_storage().nbytes() for buffer in self.kept for tensor in buffer.notes)

    @property
    def offloaded_nbytes(self) -> int:
        """Bytes in another memory, which `nbytes` does not count."""
        offloaded = [tensor for buffer in self.kept if isinstance(buffer, ArkValeBuffer) for tensor in buffer.offloaded]
        return sum(tensor.untyped_storage().nbytes() for tensor in offloaded)

    @property
    def recalled_nbytes(self) -> int:
        """Bytes that were copied back from there since the compression."""
        return sum(buffer.recalled_bytes for buffer in self.kept if isinstance(buffer, ArkValeBuffer))

    @property
    def takes_rows(self) -> bool:
        return False

    @property
    def takes_steps(self) -> bool:
        kept = self.kept
        return all(x.whole is not None and x.store.window is None and not x.sees_queries for x in kept)

    def buffer_of(self, window: Span) -> Any:
        """The first buffer of slots of this window, without a keep where there is one: it has masks of its own."""
        stores = zip(self.plan.stores, self.buffers, strict=True)
        found: list[Any] = [buffer for store, buffer in stores if store.masked and store.span == window]
        return next((buffer for buffer in found if not isinstance(buffer, KeptBuffer)), found[0])

    @property
    def sees_queries(self) -> bool:
        return any(buffer.sees_queries for buffer in self.kept)

    def compress(self) -> None:
        """Apply the keep to the tokens that are there, and code what was whole until now."""
        buffers: list[Any] = list(self.buffers)
        shared = [buffer for buffer in self.kept if isinstance(buffer, PrefixBuffer) and buffer.drops(self.length)]
        if shared:
            share_budget(shared, self.length)
        by_store = dict(zip(self.plan.stores, buffers, strict=True))
        for group in sharing_groups(self.plan, self.method):
            whole = [buffer for buffer in map(by_store.get, group) if isinstance(buffer, XkvBuffer) and buffer.whole]
            if whole:
                factorise(whole, self.length, self.start_B)
        for place, buffer in enumerate(buffers):
            if isinstance(buffer, KeptBuffer) and buffer.whole is not None:
                buffers[place] = buffer.compress(self.length, self.start_B)
        self.buffers = tuple(buffers)

    def repeat(self, rows: int) -> "CompressedCache":
        plain = replace(self, buffers=())
        made = Cache.repeat(plain, rows)
        assert isinstance(made, CompressedCache)
        made.buffers = tuple(
            buffer.repeat(rows)
            if isinstance(buffer, CodedBuffer | CodedState | KeptBuffer)
            else type(buffer)(tuple(repeat_row(tensor, rows) for tensor in buffer.tensors))
            for buffer in self.buffers
        )
        share_again(made.buffers, self.buffers)
        return made

    @property
    def takes_static_steps(self) -> bool:
        return False

    def hold_position(self) -> None:
        """Raises ValueError: shapes follow the number of tokens."""
        raise ValueError("a compressed cache takes no steps in unchanging shapes; decode without compile")

    def step_seen(self, window: Span, device: torch.device, own: int | None = None) -> Seen:
        assert own is None  # check_method
        if self.start_B is None and not isinstance(window, Chunk):
            return Seen(None)
        buffer = self.buffer_of(window)
        if not isinstance(buffer, CodedBuffer):
            return super().step_seen(window, device)
        slots = buffer.indices(self.length, 1, device)
        allowed = visible(torch.tensor([self.length], device=device), slots, window, self.start_B)
        if self.start_B is None:
            return Seen(allowed)
        end_B = torch.full_like(self.start_B, len(slots), dtype=torch.int32)
        first_B = (self.start_B - buffer.first(self.length)).clamp(min=0).to(torch.int32)
        return Seen(allowed, None if isinstance(window, Chunk) else Run(end_B, first_B))

    def store_masks(
        self, masks: list[Mask | TokenPositions], length: int, device: torch.device
    ) -> list[Mask | TokenPositions]:
        """Masks of the views, with those of a keep in their place: that of the store of the keys."""
        made = list(masks)
        due = [
            buffer for buffer in self.kept if isinstance(buffer, PrefixBuffer) and buffer.is_due(self.length, length)
        ]
        if due:
            share_budget(due, self.length)
        for place, number in enumerate(self.plan.view_stores):
            buffer: Any = self.buffers[number]
            mask = masks[place]
            if isinstance(buffer, KeptBuffer):
                assert isinstance(mask, Mask)
                if place == number:
                    buffer.make_room(self.length, length, self.start_B)
                allowed = buffer.allowed(self.length, length, device, self.start_B)
                form = mask.form if allowed is None else Dense(causal=False, allowed=allowed)
                made[place] = Mask(KeptKernel(buffer, mask.kernel), form)
        return made


@dataclass
class CompressedBlockCache(BlockCache):
    """A BlockCache whose caches are compressed: a keep acts on the blocks, whose positions grow with the context."""

    @property
    def chosen_slots(self) -> tuple[int | None, ...]:
        """Chosen slots of the block decoder, as CompressedCache.chosen_slots."""
        assert isinstance(self.blocks, CompressedCache)
        return self.blocks.chosen_slots

    @property
    def notes_nbytes(self) -> int:
        """Bytes beside the blocks, as CompressedCache.notes_nbytes."""
        assert isinstance(self.blocks, CompressedCache)
        return self.blocks.notes_nbytes

    @property
    def offloaded_nbytes(self) -> int:
        """Bytes in another memory, as CompressedCache.offloaded_nbytes."""
        assert isinstance(self.blocks, CompressedCache)
        return self.blocks.offloaded_nbytes

    @property
    def recalled_nbytes(self) -> int:
        """Bytes that were copied back, as CompressedCache.recalled_nbytes."""
        assert isinstance(self.blocks, CompressedCache)
        return self.blocks.recalled_nbytes

    @property
    def takes_rows(self) -> bool:
        return False

    def compress(self) -> None:
        """Apply the keep to the blocks that are there, as CompressedCache.compress."""
        for cache in self.stacks:
            assert isinstance(cache, CompressedCache)
            cache.compress()

    def repeat(self, rows: int) -> "CompressedBlockCache":
        made = super().repeat(rows)
        return CompressedBlockCache(made.blocks, made.tokens, made.partial_BL, made.context_BCD)


def allocate_compressed(
    plan: Plan,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    method: CacheMethod,
    start_B: Tensor | None = None,
) -> CompressedCache | CompressedBlockCache:
    """Allocate an empty cache as `allocate` or `allocate_blocks`, with `method` on its stores, for a model of `plan`.

    A codec acts from the first token on; with a keep all tokens are whole until `compress`. Bytes are those of
    `storage.compressed_bytes`. Raises ValueError where `method` cannot act on `plan`.
    """
    check_method(plan, method)
    caches = [_allocate(stack, batch, capacity, dtype, device, method, start_B) for stack in plan.stacks]
    if len(caches) == 1:
        return caches[0]
    blocks, tokens = caches
    return CompressedBlockCache(blocks, tokens, torch.empty(batch, 0, dtype=torch.int64, device=device))


def _allocate(
    stack: StackPlan,
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str,
    method: CacheMethod,
    start_B: Tensor | None,
) -> CompressedCache:
    """The cache of one stack for `capacity` tokens; padding is none of the positions within a block."""
    buffers: list[Any] = []
    plan, capacity = stack.plan, stack.num_positions(capacity)
    method = with_budget(plan, of_stack(method, stack), dtype.itemsize, capacity)
    for store in plan.stores:
        keep = method.keep if acts(store, method, capacity, dtype.itemsize) else None
        if not store.masked or (method.codec is None and keep is None):
            buffer = allocate_buffer(store, batch, capacity, dtype, device)
            state = state_layout(store, method.codec)
            buffers.append(buffer if state is None else CodedState.empty(state, buffer.tensors))
        elif keep is not None:
            whole = allocate_buffer(store, batch, capacity, dtype, device)
            assert not isinstance(whole, StateBuffer)
            buffers.append(KEPT_BUFFERS[keep.name](store, method, capacity, whole))
        else:
            layouts = tensor_layouts(store, method.codec, capacity, store.window)
            buffers.append(CodedBuffer.allocate(layouts, batch, dtype, device))
    cross = allocate_cross(plan, batch, stack.num_cross_vectors, dtype, device)
    start_B = start_B if stack.fixed_positions is None else None
    return CompressedCache(plan, tuple(buffers), capacity, start_B, cross_buffers=cross, method=method)
