"""Scores of cached positions, and what is kept of them: tensors in, scores or indices out, nothing of models or caches.

A score is high where a position should stay. What attention tells comes as *rows*, one for each query and key/value
head: `observe` makes them of queries and keys, and where several layers read one store, their rows are added.

Shapes: B batch, T queries, S slots, N query heads, K key/value heads, H head, M kept slots.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import at_least_fp32

EMPTY = -1  # position of a slot that holds nothing


class Rows(NamedTuple):
    """Attention of the queries of a reader to the slots, [B, K, T, S] each.

    weight  attention, mean over the query heads of a key/value head
    above   number of query heads that gave a slot at least the average over the slots that they saw
    below   number of those that gave less
    """

    weight: Tensor
    above: Tensor
    below: Tensor


def attention_weights(
    q_BTNH: Tensor, k_BSKH: Tensor, allowed: Tensor, scale: float, sinks_N: Tensor | None = None
) -> Tensor:
    """The softmax [B, N, T, S] of attention, in at least fp32; zero for a query that sees nothing.

    `allowed`: what a query sees, of a shape that broadcasts to [B, K, T, S], with K = 1 for all heads. `sinks_N` takes
    its share of each query.
    """
    batch, queries, heads, width = q_BTNH.shape
    kv_heads, dtype = k_BSKH.shape[2], at_least_fp32(q_BTNH.dtype)
    q_BKGTH = q_BTNH.to(dtype).view(batch, queries, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    score = q_BKGTH @ k_BSKH.to(dtype).permute(0, 2, 3, 1).unsqueeze(2) * scale
    seen = torch.broadcast_to(allowed.unsqueeze(-3), score.shape) if allowed.ndim > 2 else allowed.expand(score.shape)
    score = score.masked_fill(~seen, -math.inf)
    if sinks_N is not None:
        sink = sinks_N.to(dtype).view(1, kv_heads, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat((score, sink), dim=-1)
    weight = score.softmax(dim=-1)[..., : k_BSKH.shape[1]].nan_to_num(0.0)  # of a query that sees nothing
    out: Tensor = weight.flatten(1, 2)
    return out


def observe(weight_BNTS: Tensor, allowed: Tensor, kv_heads: int) -> Rows:
    """Rows of one reader, whose query heads are taken together for each of the store's `kv_heads`.

    `allowed` as for `attention_weights`. The average is that over the slots that a query sees.
    """
    batch, heads, queries, slots = weight_BNTS.shape
    weight = weight_BNTS.view(batch, kv_heads, heads // kv_heads, queries, slots)
    seen = (allowed if allowed.ndim == 4 else allowed.expand(1, 1, queries, slots)).unsqueeze(2)
    below = (weight * seen.sum(dim=-1, keepdim=True) < 1) & seen
    return Rows(weight.mean(dim=2), (~below & seen).sum(dim=2), below.sum(dim=2))


def snapkv_scores(weight_BKWS: Tensor, kernel: int, window: int) -> Tensor:
    """SnapKV (Li et al. 2024): the mean over the queries of a window, smoothed by average pooling over `kernel` slots.

    [B, K, S]. The last `window` slots, those of the queries, are not pooled with the others, and their score is above
    all. The group of heads is a mean, and pooling is linear, so that both can be taken in any order.
    """
    score_BKS = weight_BKWS.mean(dim=2)
    before = score_BKS[..., : max(0, score_BKS.shape[-1] - window)]
    if before.shape[-1]:
        pooled = F.avg_pool1d(before, kernel, stride=1, padding=kernel // 2)[..., : before.shape[-1]]
    else:
        pooled = before
    return F.pad(pooled, (0, score_BKS.shape[-1] - before.shape[-1]), value=math.inf)


def knorm_scores(k_BSKH: Tensor) -> Tensor:
    """Keys of small norm get much attention (Devoto et al. 2024), [B, K, S]."""
    norm_BSK: Tensor = torch.linalg.vector_norm(k_BSKH.to(at_least_fp32(k_BSKH.dtype)), dim=-1)
    return -norm_BSK.transpose(1, 2)


def random_scores(position_BKS: Tensor, seed: int) -> Tensor:
    """Numbers [B, K, S] in [0, 1) made of seed, head and position alone: the same on every device, and whatever else is
    in the batch."""
    head_K1 = torch.arange(position_BKS.shape[1], device=position_BKS.device)[:, None]
    mixed = scramble(position_BKS.long() + scramble(head_K1 + scramble(torch.full_like(head_K1, seed))))
    return mixed.to(torch.float64) / 2**32


def scramble(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers that looks random (lowbias32 of C. Wellons' hash prospector)."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = (x ^ (x >> 16)) * 0x7FEB352D & mask
    x = (x ^ (x >> 15)) * 0x846CA68B & mask
    return x ^ (x >> 16)


def scissorhands_scores(below_BKWS: Tensor) -> Tensor:
    """Scissorhands (Liu et al. 2023): minus the number of times that a slot got less than average over the history
    window, [B, K, S]."""
    return -below_BKWS.sum(dim=2).double()


def corm_kept(above_BKWS: Tensor) -> Tensor:
    """CORM (Dai et al. 2024): slots [B, K, S] to which a query of the window gave at least the average."""
    return above_BKWS.sum(dim=2) > 0


def select(score_BKS: Tensor, position_BKS: Tensor, budget_B: Tensor, sinks: int = 0) -> Tensor:
    """Indices [B, K, M] of the slots to keep, in the order of positions; M is the largest budget, and EMPTY fills up.

    position_BKS  position in its row of each slot; EMPTY: it holds nothing, and is never kept
    budget_B      slots of each row and head
    sinks         first positions, which stay whatever their score

    Of equal scores, the earlier slot is kept.
    """
    held = position_BKS != EMPTY
    budget_BK1 = torch.minimum(budget_B[:, None, None], held.sum(dim=-1, keepdim=True))
    most = int(budget_BK1.max()) if budget_BK1.numel() else 0
    is_sink = held & (position_BKS < sinks)
    # Ranks, from the least important key to the most: score, earlier slot (the sorts are stable), sink, held at all.
    order = score_BKS.argsort(dim=-1, descending=True, stable=True)
    for key in (is_sink.int(), held.int()):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    chosen = order[..., :most]
    wanted = torch.arange(most, device=chosen.device) < budget_BK1
    place = torch.where(wanted, position_BKS.gather(-1, chosen), torch.iinfo(position_BKS.dtype).max)
    by_position = place.argsort(dim=-1, stable=True)
    return torch.where(wanted, chosen.gather(-1, by_position), EMPTY)


def select_marked(kept_BKS: Tensor, position_BKS: Tensor) -> Tensor:
    """Indices [B, K, M] of marked slots that hold something, in the order of positions; M is the largest number of
    them in a head, and EMPTY fills up."""
    kept = kept_BKS & (position_BKS != EMPTY)
    most = int(kept.sum(dim=-1).max()) if kept.numel() else 0
    place = torch.where(kept, position_BKS, torch.iinfo(position_BKS.dtype).max)
    order = place.argsort(dim=-1, stable=True)[..., :most]
    return torch.where(kept.gather(-1, order), order, EMPTY)


def prefix_budgets(
    importance_XS: Sequence[Tensor], slot_bytes: Sequence[int], budget_bytes: int, least: int = 0
) -> list[int]:
    """PrefixKV (Wang et al. 2024): slots of each store, the fewest whose cumulative importance reaches one threshold.

    The threshold is the highest at which all stores together take no more than `budget_bytes`; every store keeps
    `least` of what it has in any case. `importance_XS`: a vector for each store; it is sorted and normalised here, and
    where it is zero all slots are as important. What is left of the budget, less than the next step of the threshold
    would take, is not used.
    """
    shares = []
    for importance_S in importance_XS:
        ordered = importance_S.double().sort(descending=True).values + torch.finfo(torch.float64).tiny
        shares.append((ordered.cumsum(0) / ordered.sum()).cpu())
    if sum(len(share) * size for share, size in zip(shares, slot_bytes, strict=True)) <= budget_bytes:
        return [len(share) for share in shares]
    thresholds = torch.cat([torch.zeros(1, dtype=torch.float64), *shares]).unique()  # type: ignore[no-untyped-call]

    def counts(threshold: Tensor) -> list[int]:
        reached = (int(torch.searchsorted(share, threshold)) + 1 if threshold > 0 else 0 for share in shares)
        return [min(max(count, least), len(share)) for count, share in zip(reached, shares, strict=True)]

    low, high = 0, len(thresholds)
    while high - low > 1:
        middle = (low + high) // 2
        taken = sum(n * size for n, size in zip(counts(thresholds[middle]), slot_bytes, strict=True))
        low, high = (middle, high) if taken <= budget_bytes else (low, middle)
    return counts(thresholds[low])


def merge_dropped(x_BSKH: Tensor, position_BKS: Tensor, chosen_BKM: Tensor) -> Tensor:
    """The chosen slots [B, M, K, H], each the mean of itself and of all dropped slots that are nearest to it.

    Elastic Cache (Liu et al. 2024): near in position; between two as near, the earlier. Where nothing is chosen,
    nothing is merged, and an EMPTY choice gives zeros.
    """
    x_BKSH = x_BSKH.transpose(1, 2)
    dtype = at_least_fp32(x_BKSH.dtype)
    filled = chosen_BKM != EMPTY
    index = chosen_BKM.clamp(min=0)
    out = x_BKSH.to(dtype).gather(2, index[..., None].expand(*index.shape, x_BKSH.shape[-1]))
    out = out * filled[..., None]
    if chosen_BKM.shape[-1]:
        far = torch.iinfo(position_BKS.dtype).max // 4
        place_BKM = torch.where(filled, position_BKS.gather(-1, index), far)
        distance = (position_BKS[..., None] - place_BKM[..., None, :]).abs()
        nearest_BKS = distance.argmin(dim=-1)
        is_chosen = torch.zeros_like(position_BKS, dtype=torch.int64)
        is_chosen.scatter_add_(-1, index, filled.long())
        merged = (is_chosen == 0) & (position_BKS != EMPTY) & filled.any(dim=-1, keepdim=True)
        weight = merged.to(dtype)[..., None]
        total = out.scatter_add(2, nearest_BKS[..., None].expand_as(x_BKSH), x_BKSH.to(dtype) * weight)
        count = torch.ones_like(chosen_BKM, dtype=dtype).scatter_add_(-1, nearest_BKS, weight.squeeze(-1))
        out = total / count[..., None]
    return out.to(x_BKSH.dtype).transpose(1, 2)
