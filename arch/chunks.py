"""The parallel form of bounded stores: what is left of each token in each slot, over chunks of C tokens; and softmax
attention to the window beside them.

A token's share of a slot, e^{G_i - G_j} p_j (bounded.py has the formulas), is never more than 1 where it counts, and is
made as one exponential: products of its parts would overflow.

Shapes: B batch, T new tokens, Z chunks, C (i reads, j writes) tokens of a chunk, N query heads, K key/value heads,
G query heads per key/value head, H head, M slots, W window, L positions that a block of queries looks at.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .plan import CHUNK
from .stores import Slots


def exact(like: Tensor) -> torch.autocast:
    """Nothing is cast inside: states and decays stay as they are."""
    return torch.autocast(like.device.type, enabled=False)


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else minus infinity: unlike a filled mask, adding it keeps nothing for the backward pass."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)


@torch.library.custom_op("kvfrontier::scan", mutates_args=())
def scan(held_BZM: Tensor, written_BZMKE: Tensor, start_BMKE: Tensor) -> Tensor:
    """[B, Z + 1, M, K, E] s_0 = start, s_z+1 = held_z s_z + written_z.

    One operator, so that no compiler unrolls the loop, and of all its steps the backward pass keeps the result alone.
    """
    batch, length, *tail = written_BZMKE.shape
    states = written_BZMKE.new_empty(batch, length + 1, *tail)
    states[:, 0] = start_BMKE
    for z in range(length):
        torch.addcmul(written_BZMKE[:, z], held_BZM[:, z, :, None, None], states[:, z], out=states[:, z + 1])
    return states


@torch.library.custom_op("kvfrontier::scan_backward", mutates_args=())
def scan_backward(gradient: Tensor, held_BZM: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `held`, `written` and `start`, given that of the states."""
    sums = gradient.clone(memory_format=torch.contiguous_format)  # of all that comes from a state
    for z in reversed(range(held_BZM.shape[1])):
        sums[:, z].addcmul_(held_BZM[:, z, :, None, None], sums[:, z + 1])
    held = (sums[:, 1:] * states[:, :-1]).sum(dim=(-2, -1))
    dense = torch.contiguous_format  # copies: outputs of an operator may not share a storage
    return held, sums[:, 1:].clone(memory_format=dense), sums[:, 0].clone(memory_format=dense)


@scan.register_fake
def _(held_BZM: Tensor, written_BZMKE: Tensor, start_BMKE: Tensor) -> Tensor:
    batch, length, *tail = written_BZMKE.shape
    return written_BZMKE.new_empty(batch, length + 1, *tail)


@scan_backward.register_fake
def _(gradient: Tensor, held_BZM: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, *tail = gradient.shape
    written = gradient.new_empty(batch, length - 1, *tail)
    return held_BZM.new_empty(held_BZM.shape), written, gradient.new_empty(batch, *tail)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = scan_backward(gradient, *ctx.saved_tensors)
    return result


scan.register_autograd(_backward, setup_context=_keep)


class Chunks:
    """Tokens in chunks of `plan.CHUNK`, the last one filled up with tokens that write nothing."""

    def __init__(self, place_BT: Tensor):
        self.length = place_BT.shape[1]
        self.size = min(CHUNK, self.length)
        self.fill = -self.length % self.size
        self.index = torch.arange(self.size, device=place_BT.device)
        more = torch.arange(1, self.fill + 1, device=place_BT.device)
        place_BT = torch.cat((place_BT, place_BT[:, -1:] + more), dim=1)
        self.place_BZC = rearrange(place_BT, "b (z c) -> b z c", c=self.size)
        distance = self.index[:, None] - self.index
        self.seen_BZCC = (distance >= 0) & (distance <= self.place_BZC.unsqueeze(-1))

    def split(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.fill)) if self.fill else x
        return rearrange(padded, "b (z c) ... -> b z c ...", c=self.size)

    def join(self, x: Tensor) -> Tensor:
        joined = rearrange(x, "b z c ... -> b (z c) ...")
        return joined[:, : self.length] if self.fill else joined

    def decay(self, p_BTM: Tensor) -> Tensor:
        """[B, Z, C, M] G, the sum of log(1 - p) from the start of the chunk, or of the document in it."""
        # The least that a write leaves keeps logarithms finite; an overwritten slot is not known more exactly.
        left_BZCM = (1 - self.split(p_BTM)).clamp(min=torch.finfo(p_BTM.dtype).eps)
        # Not a cumulative sum, which would carry another document's rounding.
        return self.seen_BZCC.to(p_BTM.dtype) @ left_BZCM.log()

    def held(self, decay_BZCM: Tensor, reads: slice = slice(None)) -> Tensor:
        """[B, Z, i, M] what tokens `reads` of each chunk find of the state before it: nothing of another document."""
        begun_BZC = self.place_BZC[:, :, reads] > self.index[reads]
        return decay_BZCM[:, :, reads].masked_fill(~begun_BZC.unsqueeze(-1), -math.inf).exp()

    def written(self, p_BTM: Tensor, decay_BZCM: Tensor, reads: slice = slice(None)) -> Tensor:
        """[B, Z, i, j, M] what tokens `reads` of each chunk find of each of its tokens."""
        p_BZCM = self.split(p_BTM)
        log_BZCM = p_BZCM.clamp(min=torch.finfo(p_BTM.dtype).tiny).log().masked_fill(p_BZCM == 0, -math.inf)
        bias = bias_of(self.seen_BZCC[:, :, reads], p_BTM.dtype).unsqueeze(-1)
        faded = decay_BZCM[:, :, reads].unsqueeze(3) + (log_BZCM - decay_BZCM).unsqueeze(2)
        return faded.add_(bias).exp_()

    def states(self, k_BTKH: Tensor, v_BTKH: Tensor, p_BTM: Tensor, decay_BZCM: Tensor, start: Tensor | None) -> Tensor:
        """[B, Z + 1, M, K, 2H] the state before each chunk, first `start` (None: nothing), and after the last."""
        last = slice(-1, None)
        kv_BZCKE = self.split(torch.cat((k_BTKH, v_BTKH), dim=-1).to(p_BTM.dtype))
        share_BZCM = self.written(p_BTM, decay_BZCM, last).squeeze(2)
        written = torch.einsum("bzjm,bzjke->bzmke", share_BZCM, kv_BZCKE)
        start = torch.zeros_like(written[:, 0]) if start is None else start.to(written.dtype)
        states: Tensor = scan(self.held(decay_BZCM, last).squeeze(2), written, start)
        return states


class SlotRead:
    """The slots as each token finds them, never made: scores against them, and sums over them.

    Its rows are [B, Z, C, K, G]. `seen_BTM`: [1 or B, T, 1 or M] slots to look at, None for all.
    """

    def __init__(self, slots: Slots, place_BT: Tensor, seen_BTM: Tensor | None):
        k_BTKH, v_BTKH, p_BTM, decay_BZCM, states = slots[:5]
        self.chunks, dtype = Chunks(place_BT), p_BTM.dtype
        self.k_BZCKH, self.v_BZCKH = (self.chunks.split(x.to(dtype)) for x in (k_BTKH, v_BTKH))
        self.state_k, self.state_v = states[:, :-1].chunk(2, dim=-1)
        self.share_BZCCM = self.chunks.written(p_BTM, decay_BZCM)
        self.held = rearrange(self.chunks.held(decay_BZCM), "b z i m -> b z i 1 1 m")
        self.bias = None
        if seen_BTM is not None:
            self.bias = rearrange(self.chunks.split(bias_of(seen_BTM, dtype)), "b z i m -> b z i 1 1 m")

    def rows(self, x: Tensor) -> Tensor:
        return self.chunks.split(rearrange(x, "b t (k g) ... -> b t k g ...", k=self.k_BZCKH.shape[3]))

    def tokens(self, x: Tensor) -> Tensor:
        return self.chunks.join(rearrange(x, "b z i k g ... -> b z i (k g) ..."))

    def scores(self, q_BTNH: Tensor) -> Tensor:
        """Rows of M: q S^k, minus infinity where it is not seen."""
        q = self.rows(q_BTNH)
        pair = torch.einsum("bzikgh,bzjkh->bzikgj", q, self.k_BZCKH)
        new = torch.einsum("bzikgj,bzijm->bzikgm", pair, self.share_BZCCM)
        score = torch.addcmul(new, torch.einsum("bzikgh,bzmkh->bzikgm", q, self.state_k), self.held)
        return score if self.bias is None else score.add_(self.bias)

    def values(self, weight: Tensor) -> Tensor:
        """[B, T, N, H] weight S^v, of weights that are rows of M."""
        pair = torch.einsum("bzikgm,bzijm->bzikgj", weight, self.share_BZCCM)
        new = torch.einsum("bzikgj,bzjkh->bzikgh", pair, self.v_BZCKH)
        return self.tokens(new + torch.einsum("bzikgm,bzmkh->bzikgh", weight * self.held, self.state_v))


class WindowRead:
    """The last W positions, in blocks of queries that look at their own block and the W positions before it.

    Its rows are [B, Z, K, C, G], C tokens of a block. Blocks of half a window waste a third of the scores, as against
    half for whole windows, and copy a key three times.
    """

    def __init__(self, k_BSKH: Tensor, v_BSKH: Tensor, place_BT: Tensor, window: int, dtype: torch.dtype):
        self.length, past = place_BT.shape[1], k_BSKH.shape[1] - place_BT.shape[1]
        self.block = min(-(-window // 2), self.length)
        self.kv_heads, self.fill = k_BSKH.shape[2], -self.length % self.block
        front = window if not past and self.length > self.block else 0
        before = past + front
        padded = (F.pad(x.to(dtype), (0, 0, 0, 0, front, self.fill)) for x in (k_BSKH, v_BSKH))
        self.k, self.v = (x.unfold(1, before + self.block, self.block) for x in padded)  # [B, Z, K, H, L]
        index = torch.arange(self.block, device=place_BT.device)[:, None]
        distance = index + before - torch.arange(before + self.block, device=place_BT.device)
        place = rearrange(F.pad(place_BT, (0, self.fill)).clamp(min=0), "b (z c) -> b z c 1", c=self.block)
        seen_BZCL = (distance >= 0) & (distance < window) & (distance <= place)
        self.bias = rearrange(bias_of(seen_BZCL, dtype), "b z c l -> b z 1 c 1 l")

    def rows(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.fill)) if self.fill else x
        return rearrange(padded, "b (z c) (k g) ... -> b z k c g ...", c=self.block, k=self.kv_heads)

    def tokens(self, x: Tensor) -> Tensor:
        joined = rearrange(x, "b z k c g ... -> b (z c) (k g) ...")
        return joined[:, : self.length] if self.fill else joined

    def scores(self, q_BTNH: Tensor) -> Tensor:
        """Rows of L: q k, minus infinity where it is not seen."""
        return torch.einsum("bzkigh,bzkhl->bzkigl", self.rows(q_BTNH), self.k) + self.bias

    def values(self, weight: Tensor) -> Tensor:
        """[B, T, N, H] weight v, of weights that are rows of L."""
        return self.tokens(torch.einsum("bzkigl,bzkhl->bzkigh", weight, self.v))


def softmax_read(reads: list[tuple[SlotRead | WindowRead, Tensor]], sinks_BTN: Tensor | None) -> Tensor:
    """[B, T, N, H] one softmax over all that is read with the queries beside it, and a sink that is worth nothing.

    Weights are divided by their sum at the end, so that each is kept once for the backward pass, where it was made.
    """
    scores = [read.scores(q_BTNH) for read, q_BTNH in reads]
    with torch.no_grad():
        tops = [read.tokens(score.amax(dim=-1)) for (read, _), score in zip(reads, scores, strict=True)]
        top_BTN = torch.stack(tops if sinks_BTN is None else [*tops, sinks_BTN]).amax(dim=0)
    total_BTN = torch.zeros_like(top_BTN) if sinks_BTN is None else (sinks_BTN - top_BTN).exp()
    out_BTNH = torch.zeros_like(reads[0][1])
    for (read, _), score in zip(reads, scores, strict=True):
        weight = score.sub_(read.rows(top_BTN).unsqueeze(-1)).exp_()
        total_BTN = total_BTN + read.tokens(weight.sum(dim=-1))
        out_BTNH = out_BTNH + read.values(weight)
    return out_BTNH / total_BTN.unsqueeze(-1)
