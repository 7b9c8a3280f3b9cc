"""Keeps that score the positions of a prompt, and choose the best of each row and key/value head after it.

A store that several layers read is scored by the queries of all of them. What they tell is held beside the cache until
it is compressed.

Shapes: B batch, T queries, S slots, K key/value heads, C chosen slots.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..buffers import SlotBuffer, Tensors, repeat_row
from ..masks import Dense, visible
from ..precision import at_least_fp32
from .scores import (
    EMPTY,
    attention_weights,
    corm_kept,
    knorm_scores,
    observe,
    prefix_budgets,
    random_scores,
    scissorhands_scores,
    select,
    select_marked,
    snapkv_scores,
)
from .small_buffers import CodedBuffer, KeptBuffer
from .storage import POSITION_BYTES, Kept, kept_slots, position_heads

QUERIES = 256  # whose attention is computed at a time


class ScoredBuffer(KeptBuffer):
    """A KeptBuffer that chooses by `score`, besides the sinks."""

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        """[B, K, S] scores of the slots before the newest, high for those that should stay; as KeptBuffer.choose."""
        raise NotImplementedError

    def choose(self, candidates: Tensors, position_BKS: Tensor, kept: Kept) -> Tensor:
        """[B, K, C] slots as KeptBuffer.choose, those that hold nothing at the end."""
        assert self.method.keep is not None
        budget_B = torch.full((len(position_BKS),), kept.chosen, device=position_BKS.device)
        score = self.score(candidates, position_BKS, kept.newest)
        chosen = select(score, position_BKS, budget_B, sinks=self.method.keep.options["sinks"])
        return F.pad(chosen, (0, kept.chosen - chosen.shape[-1]), value=EMPTY)


class RandomBuffer(ScoredBuffer):
    """The control: positions are chosen by chance, which depends on seed, store, head and position alone."""

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        assert self.method.keep is not None
        return random_scores(position_BKS, self.method.keep.options["seed"] + (self.store.owner << 16))


class KnormBuffer(ScoredBuffer):
    """Keys of small norm stay. The key of a latent store is the latent and the rotated key, as its readers see it; of
    heads that have a part of their keys in common, that and the parts of all."""

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        slot, (first, *others) = self.store.slot, candidates
        if slot.kv_heads and not slot.rope_dim:
            return knorm_scores(first)
        parts = (first[..., : slot.k_dim - slot.rope_dim].flatten(2) if slot.kv_heads else first, *others)
        return knorm_scores(torch.cat(parts, dim=-1).unsqueeze(2))


class AttentionBuffer(ScoredBuffer):
    """Scores made of attention: rows of the last `window` queries, or their sum.

    seen  [B, K, W, S], for each of the last queries, summed over readers; W is 1 where all queries are summed
    end   tokens whose queries were seen
    offset, start_B  tokens before those that were written last, and the padding of the rows: where slots of a ring lie
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.seen: Tensor | None = None
        self.end = self.offset = 0
        self.start_B: Tensor | None = None

    @property
    def sees_queries(self) -> bool:  # type: ignore[override]
        return self.whole is not None or (self.kept is not None and self.kept.rows > 0)

    @property
    def tensors(self) -> Tensors:
        if self.whole is not None or self.kept is None or not self.kept.rows:
            return super().tensors
        assert self.seen is not None
        return *super().tensors, self.seen

    @property
    def notes(self) -> Tensors:
        return () if self.whole is None or self.seen is None else (self.seen,)

    @property
    def window(self) -> int | None:
        """Number of queries whose rows are held; None: they are summed."""
        raise NotImplementedError

    def row_type(self, dtype: torch.dtype) -> torch.dtype:
        """Type of `seen`, of keys of `dtype`."""
        return at_least_fp32(dtype)

    def row(self, weight_BNTS: Tensor, allowed: Tensor) -> Tensor:
        """[B, K, T, S] what the queries tell: by default their attention, a mean over the heads of a group."""
        return observe(weight_BNTS, allowed, position_heads(self.store)).weight

    def update(self, new: Tensors, offset: int) -> Tensors:
        self.offset = offset
        return super().update(new, offset)

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        self.start_B = start_B
        return super().allowed(offset, length, device, start_B)

    def see(self, q_BTNH: Tensor, k_BSKH: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None) -> None:
        if not self.sees_queries:
            return
        queries, slots, device = q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.device
        span, index_S = self.store.span, torch.arange(slots, device=device)
        ring = self.whole is not None and span is not None  # its slots are not in the order of tokens
        if ring:
            assert self.whole is not None
            index_S, slots = self.whole.indices(self.offset, queries, device), self.offset + queries
        if self.seen is None:
            shape = len(k_BSKH), position_heads(self.store), 0 if self.window else 1, 0
            self.seen = torch.zeros(shape, dtype=self.row_type(k_BSKH.dtype), device=device)
        if slots > self.end:  # the first reader of these tokens
            more = max(0, slots - self.seen.shape[-1])
            self.seen = F.pad(self.seen, (0, more, 0, queries if self.window else 0))
            self.seen = self.seen if self.window is None else self.seen[:, :, -self.window :].contiguous()
            self.end = slots
        first = 0 if self.window is None else max(0, queries - self.window)
        index_T = torch.arange(self.offset, self.offset + queries, device=device)
        for begin in range(first, queries, QUERIES):
            end = min(begin + QUERIES, queries)
            if ring:
                allowed = visible(index_T[begin:end], index_S, span, self.start_B)
            elif mask.allowed is None:
                allowed = index_S <= index_T[begin:end, None]
            else:
                allowed = mask.allowed[..., begin:end, :]
            weight = attention_weights(q_BTNH[:, begin:end], k_BSKH, allowed, scale, sinks_N)
            row = self.row(weight, allowed).to(self.seen.dtype)
            if self.start_B is not None:  # padding sees itself, which tells nothing
                row *= (index_T[begin:end] >= self.start_B[:, None])[:, None, :, None]
            if self.window is None:
                place, row = slice(None), row.sum(dim=2, keepdim=True)
            else:
                behind = self.seen.shape[2] - queries
                place = slice(behind + begin, behind + end)
            if ring:  # a slot that holds nothing gets nothing
                self.seen[:, :, place].index_add_(3, index_S.clamp(min=0), row)
            else:
                self.seen[:, :, place, :slots] += row

    def told(self, position_BKS: Tensor) -> Tensor:
        """[B, K, W, S'] what was seen, with the newest slots; nothing, where no reader ran."""
        if self.seen is None:
            return position_BKS.new_zeros(*position_BKS.shape[:2], 1, position_BKS.shape[-1]).float()
        return self.seen

    def compress(self, length: int, start_B: Tensor | None) -> KeptBuffer | CodedBuffer | SlotBuffer:
        if self.seen is not None and self.whole is not None:
            self.seen = self.seen[..., self.first(length) :]
        return super().compress(length, start_B)

    def carry(self, index_BKC: Tensor, count: int, kept: Kept, room: int) -> None:
        if not kept.rows:
            self.seen = None
            return
        assert self.seen is not None
        index = index_BKC.clamp(min=0).unsqueeze(2).expand(-1, -1, self.seen.shape[2], -1)
        chosen = self.seen.gather(-1, index) * (index_BKC != EMPTY).unsqueeze(2)
        seen = torch.cat((chosen, self.seen[..., count : count + kept.newest]), dim=-1)
        self.end = seen.shape[-1]
        self.seen = F.pad(seen, (0, room - self.end, kept.rows - seen.shape[2], 0))

    def repeat(self, rows: int) -> "KeptBuffer":
        copy = super().repeat(rows)
        assert isinstance(copy, AttentionBuffer)
        copy.seen = None if self.seen is None else repeat_row(self.seen, rows)
        return copy


class SnapBuffer(AttentionBuffer):
    """SnapKV: pooled attention of the last queries. They are those of the newest tokens, which stay."""

    @property
    def window(self) -> int:
        assert self.method.keep is not None
        return int(self.method.keep.options["window"])

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        assert self.method.keep is not None
        slots = position_BKS.shape[-1]
        told = self.told(position_BKS)[:, :, -newest:, : slots + newest]
        empty = F.pad(position_BKS == EMPTY, (0, told.shape[-1] - slots)).unsqueeze(2)  # or left the window
        return snapkv_scores(told.masked_fill(empty, 0), self.method.keep.options["kernel"], newest)[..., :slots]


class H2OBuffer(AttentionBuffer):
    """H2O (Zhang et al. 2023): the attention of all queries of the prompt, summed."""

    @property
    def window(self) -> None:
        return None

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        return self.told(position_BKS)[:, :, 0, : position_BKS.shape[-1]]


class ScissorhandsBuffer(AttentionBuffer):
    """Scissorhands: the fewer of the last queries gave a position less than average, the better."""

    @property
    def window(self) -> int:
        assert self.method.keep is not None
        return int(self.method.keep.options["history"])

    def row(self, weight_BNTS: Tensor, allowed: Tensor) -> Tensor:
        return observe(weight_BNTS, allowed, position_heads(self.store)).below

    def row_type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int16

    def score(self, candidates: Tensors, position_BKS: Tensor, newest: int) -> Tensor:
        return scissorhands_scores(self.told(position_BKS)[..., : position_BKS.shape[-1]])


class PrefixBuffer(H2OBuffer):
    """PrefixKV: chosen by the attention of all queries, as H2O; how many, `share_budget` says."""

    budget = 0

    def importance(self, length: int) -> Tensor:
        """[S] share of attention that the slots before the newest get, from the greatest: a mean over the rows, each
        of which sums to 1, of a sum over heads."""
        count = length - self.base - self.uniform(length).newest + (self.chosen_slots or 0)
        if self.seen is None:  # no reader ran
            return torch.zeros(count, dtype=torch.float64)
        ordered_BS = self.seen[:, :, 0, :count].double().sum(dim=1).sort(dim=-1, descending=True).values
        return (ordered_BS / ordered_BS.sum(dim=-1, keepdim=True).clamp(min=1e-30)).mean(dim=0)

    def drops(self, length: int) -> bool:
        """Return whether something of `length` tokens goes, or of later ones, if all stores have the same budget."""
        return self.whole is not None and self._kept(length) is not None

    def uniform(self, length: int) -> Kept:
        """The slots of the store if all had the same budget."""
        kept = self._kept(length) if self.kept is None else self.kept
        assert kept is not None
        return kept

    def _kept(self, length: int) -> Kept | None:
        assert self.whole is not None
        return kept_slots(self.store, self.method, length, self.whole.tensors[0].element_size(), self.capacity)

    def slot_bytes(self, length: int) -> int:
        """Bytes of a chosen slot without a codec, of its positions, and of what is held of its attention."""
        held, kept = self.whole or self.later, self.uniform(length)
        assert held is not None
        elements = self.store.slot.elements * held.tensors[0].element_size()
        return elements + position_heads(self.store) * (POSITION_BYTES + kept.rows * kept.row_bytes)

    def choose(self, candidates: Tensors, position_BKS: Tensor, kept: Kept) -> Tensor:
        return super().choose(candidates, position_BKS, replace(kept, chosen=self.budget))


def share_budget(buffers: Sequence[PrefixBuffer], length: int) -> None:
    """Set the budgets of the stores, of which each is about to drop some of `length` tokens.

    Together they have no more bytes than with that. All rows of a batch have the same budgets, as a tensor has one
    length.
    """
    even = [buffer.uniform(length).chosen for buffer in buffers]
    sizes = [buffer.slot_bytes(length) for buffer in buffers]
    keep = buffers[0].method.keep
    assert keep is not None
    budgets = prefix_budgets(
        [buffer.importance(length) for buffer in buffers],
        sizes,
        sum(count * size for count, size in zip(even, sizes, strict=True)),
        least=min(keep.options["sinks"], *even),
    )
    for buffer, budget in zip(buffers, budgets, strict=True):
        buffer.budget = budget


class CormBuffer(AttentionBuffer):
    """CORM: a position goes when none of the last queries gave it the average, whatever head of a group and reader.

    They are the queries of the newest tokens, which stay. There are as many slots as in the row and head with most.
    """

    @property
    def window(self) -> int:
        assert self.method.keep is not None
        return int(self.method.keep.options["window"])

    def row(self, weight_BNTS: Tensor, allowed: Tensor) -> Tensor:
        return observe(weight_BNTS, allowed, position_heads(self.store)).above

    def row_type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int16

    def choose(self, candidates: Tensors, position_BKS: Tensor, kept: Kept) -> Tensor:
        assert self.method.keep is not None
        marked = corm_kept(self.told(position_BKS)[..., : position_BKS.shape[-1]])
        return select_marked(marked | (position_BKS < self.method.keep.options["sinks"]), position_BKS)
