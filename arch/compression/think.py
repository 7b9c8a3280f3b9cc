"""ThinK (Xu et al. 2024): channels of keys that the last queries of the prompt look at least are dropped.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H head, U channels that stay.
"""

import torch
from torch import Tensor

from ..buffers import SlotBuffer, Tensors
from ..masks import Dense
from ..precision import at_least_fp32
from .small_buffers import CodedBuffer, KeptBuffer
from .storage import kept_layouts, kept_slots


class ThinkBuffer(KeptBuffer):
    """Keys of all tokens of the prompt but the newest without some channels of each head; values, the newest and later
    tokens stay as they are.

    The score of a channel is the norm of its part of the scores of attention, of the last queries of all readers:
    sum of q^2, times sum of k^2.
    """

    sees_queries = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.queries: list[Tensor] = []  # squares of the last of each reader, [B, T, K, H]
        self.reader = 0
        self.channel_BKU: Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        if self.whole is not None:
            return self.whole.tensors
        assert self.later is not None and self.chosen is not None and self.channel_BKU is not None
        return *self.later.tensors, *self.chosen.tensors, self.channel_BKU

    @property
    def notes(self) -> Tensors:
        return tuple(self.queries)

    def see(self, q_BTNH: Tensor, k_BSKH: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None) -> None:
        if self.whole is None:
            return
        assert self.method.keep is not None
        window, heads = self.method.keep.options["window"], k_BSKH.shape[2]
        last = q_BTNH[:, -window:].to(at_least_fp32(q_BTNH.dtype))
        squares = last.square().reshape(*last.shape[:2], heads, -1, last.shape[-1]).sum(dim=3)
        if self.reader < len(self.queries):
            self.queries[self.reader] = torch.cat((self.queries[self.reader], squares), dim=1)[:, -window:]
        else:
            self.queries.append(squares)
        self.reader += 1

    def compress(self, length: int, start_B: Tensor | None) -> KeptBuffer | CodedBuffer | SlotBuffer:
        assert self.whole is not None and self.method.keep is not None
        keys, values = self.whole.tensors
        kept = kept_slots(self.store, self.method, length, keys.element_size(), self.capacity)
        if kept is None:
            self.queries = []
            return super().compress(length, start_B)
        self.base = length - kept.newest
        squares = torch.stack(self.queries).sum(dim=0)
        of_keys = keys[:, : self.base].to(squares.dtype).square()
        if start_B is not None:
            place_T = torch.arange(length - squares.shape[1], length, device=keys.device)
            squares = squares * (place_T >= start_B[:, None])[..., None, None]
            of_keys = of_keys * (torch.arange(self.base, device=keys.device) >= start_B[:, None])[..., None, None]
        score_BKH = squares.sum(dim=1) * of_keys.sum(dim=1)
        channel_BKU = score_BKH.topk(kept.channels, dim=-1).indices.sort(dim=-1).values
        chosen_layouts, later_layouts = kept_layouts(self.store, self.method.codec, kept, self.capacity, length)
        batch, dtype, device = len(keys), keys.dtype, keys.device
        self.later = CodedBuffer.allocate(later_layouts, batch, dtype, device)
        self.later.update((keys[:, self.base : length], values[:, self.base : length]), 0)
        self.chosen = CodedBuffer.allocate(chosen_layouts, batch, dtype, device)
        narrow = keys[:, : self.base].gather(-1, channel_BKU.unsqueeze(1).expand(-1, self.base, -1, -1))
        self.chosen.update((narrow, values[:, : self.base]), 0)
        self.channel_BKU = channel_BKU.to(torch.int32)
        self.whole, self.queries = None, []
        return self

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; dropped channels come back as zeros."""
        self.reader = 0
        if self.whole is not None:
            return self.whole.update(new, offset)
        assert self.later is not None and self.chosen is not None and self.channel_BKU is not None
        later_keys, later_values = self.later.update(new, offset - self.base)
        narrow, values = self.chosen.read(0, self.base)
        keys = narrow.new_zeros(*narrow.shape[:-1], self.store.slot.k_dim)
        keys.scatter_(-1, self.channel_BKU.long().unsqueeze(1).expand(narrow.shape), narrow)
        return torch.cat((keys, later_keys.to(keys.dtype)), 1), torch.cat((values, later_values.to(values.dtype)), 1)

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        """None: slots of all tokens come back, as before compression."""
        return None

    def repeat(self, rows: int) -> "ThinkBuffer":
        copy = super().repeat(rows)
        assert isinstance(copy, ThinkBuffer)
        copy.queries = [squares.repeat_interleave(rows, dim=0) for squares in self.queries]
        copy.channel_BKU = None if self.channel_BKU is None else self.channel_BKU.repeat_interleave(rows, dim=0)
        return copy
