"""ZipCache (He et al. 2024): tokens that much attention falls on are stored with 4 bits, the others with 2.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H head, P probes.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ..buffers import SlotBuffer, Tensors, repeat_row
from ..masks import Dense
from ..precision import at_least_fp32
from .scores import attention_weights, observe
from .small_buffers import CodedBuffer, KeptBuffer, gather_slots
from .storage import kept_layouts, kept_slots


class Probes(NamedTuple):
    """Queries of one reader that may probe: they [B, P, N, H], their places [P], whether each row takes them [B, P],
    and the reader's sinks."""

    q_BPNH: Tensor
    place_P: Tensor
    taken_BP: Tensor
    sinks_N: Tensor | None


def is_random_probe(position: Tensor, share: Fraction) -> Tensor:
    """Mark the positions whose queries probe: a `share` of all, scattered by a hash of the position (Knuth's)."""
    return (position * 2654435761) % 2**32 < math.ceil(share * 2**32)


class ZipCacheBuffer(KeptBuffer):
    """Prompts in two parts, by saliency for each key/value head; the newest and later tokens have 4 bits once they are
    no longer among the newest, which are whole.

    Saliency is attention of the probes, over the number of probes that see a token: the last queries of the prompt and
    a share of the others, of all readers. Values are grouped within a token, without the paper's scales of channels.
    """

    sees_queries = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.probes: list[Probes] = []  # of each reader
        self.start_B: Tensor | None = None
        self.reader = self.offset = 0
        self.scale = 1.0
        self.salient = 0
        self.rest: CodedBuffer | None = None

    @property
    def tensors(self) -> Tensors:
        return super().tensors if self.rest is None else (*super().tensors, *self.rest.tensors)

    @property
    def notes(self) -> Tensors:
        return tuple(probes.q_BPNH for probes in self.probes)

    def see(self, q_BTNH: Tensor, k_BSKH: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None) -> None:
        if self.whole is None:
            return
        place_P = self.offset + torch.arange(q_BTNH.shape[1], device=q_BTNH.device)
        if self.reader < len(self.probes):
            before = self.probes[self.reader]
            q_BTNH, place_P = torch.cat((before.q_BPNH, q_BTNH), dim=1), torch.cat((before.place_P, place_P))
        taken_BP = self.is_probe(place_P, int(place_P[-1]) + 1).expand(len(q_BTNH), -1)
        some = taken_BP.any(dim=0)
        probes = Probes(q_BTNH[:, some], place_P[some], taken_BP[:, some], sinks_N)
        self.probes[self.reader : self.reader + 1] = [probes]
        self.reader, self.scale = self.reader + 1, scale

    def is_probe(self, place_P: Tensor, length: int) -> Tensor:
        """[1 or B, P] what of the queries at those places each row takes: the same of a padded row as of it alone."""
        assert self.method.keep is not None
        options = self.method.keep.options
        position_BP = place_P[None] if self.start_B is None else place_P - self.start_B[:, None]
        last: Tensor = place_P >= length - options["window"]
        return (last | is_random_probe(position_BP, options["random"])) & (position_BP >= 0)

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        self.start_B = start_B
        return super().allowed(offset, length, device, start_B)

    def saliency(self, length: int, start_B: Tensor | None) -> Tensor:
        """[B, K, S] of the tokens before `length`; those of padding get minus infinity."""
        assert self.whole is not None
        keys = self.whole.tensors[0][:, :length]
        dtype, (batch, _, heads, _) = at_least_fp32(keys.dtype), keys.shape
        slot_S = torch.arange(length, device=keys.device)
        start_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=keys.device) if start_B is None else start_B[:, None]
        total = torch.zeros(batch, heads, length, dtype=dtype, device=keys.device)
        number_BS = torch.zeros(batch, length, dtype=dtype, device=keys.device)
        for q_BPNH, place_P, taken_BP, sinks_N in self.probes:
            sees_BPS = (slot_S <= place_P[:, None]) & (slot_S >= start_B1)[:, None] & taken_BP[..., None]
            allowed = sees_BPS.unsqueeze(1)
            weight_BNPS = attention_weights(q_BPNH, keys, allowed, self.scale, sinks_N)
            total += observe(weight_BNPS, allowed, heads).weight.sum(dim=2)
            number_BS += sees_BPS.sum(dim=1)
        mean = total / number_BS.clamp(min=1)[:, None]
        return mean.masked_fill((slot_S < start_B1)[:, None], -torch.inf)

    def compress(self, length: int, start_B: Tensor | None) -> KeptBuffer | CodedBuffer | SlotBuffer:
        assert self.whole is not None and self.method.keep is not None
        tensors = self.whole.tensors
        batch, dtype, device = tensors[0].shape[0], tensors[0].dtype, tensors[0].device
        kept = kept_slots(self.store, self.method, length, tensors[0].element_size(), self.capacity)
        if kept is None:
            self.probes = []
            return super().compress(length, start_B)
        self.base = length - kept.newest
        order_BKS = self.saliency(length, start_B)[..., : self.base].argsort(dim=-1, descending=True, stable=True)
        sizes = [kept.salient, self.base - kept.salient]
        parts = torch.split(order_BKS, sizes, dim=-1)
        index_BKS = torch.cat([part.sort(dim=-1).values for part in parts], dim=-1)
        layouts = kept_layouts(self.store, None, kept, self.capacity, length)
        buffers = [CodedBuffer.allocate(layout, batch, dtype, device) for layout in layouts]
        for buffer, index in zip(buffers, torch.split(index_BKS, sizes, dim=-1), strict=False):
            buffer.update(tuple(gather_slots(tensor, index) for tensor in tensors), 0)
        self.chosen, self.rest, self.later = buffers
        self.later.update(tuple(tensor[:, self.base : length] for tensor in tensors), 0)
        padding = False if start_B is None else index_BKS < start_B[:, None, None]
        self.position_BKC = index_BKS.masked_fill(torch.as_tensor(padding, device=device), -1).to(torch.int32)
        self.salient = kept.salient
        self.whole, self.probes = None, []
        return self

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; salient slots come back first, then the others, then the tokens from `base`."""
        self.reader, self.offset = 0, offset
        if self.whole is not None:
            return self.whole.update(new, offset)
        assert self.later is not None and self.chosen is not None and self.rest is not None
        later = self.later.update(new, offset - self.base)
        salient, others = self.chosen.read(0, self.salient), self.rest.read(0, self.base - self.salient)
        return tuple(
            torch.cat((first, second, last.to(first.dtype)), dim=1)
            for first, second, last in zip(salient, others, later, strict=True)
        )

    def repeat(self, rows: int) -> "ZipCacheBuffer":
        copy = super().repeat(rows)
        assert isinstance(copy, ZipCacheBuffer)
        copy.probes = [
            probes._replace(q_BPNH=repeat_row(probes.q_BPNH, rows), taken_BP=repeat_row(probes.taken_BP, rows))
            for probes in self.probes
        ]
        copy.rest = None if self.rest is None else self.rest.repeat(rows)
        return copy
