"""The parallel form of a bounded store: what chunks of C tokens write to the slots, and what each token reads of them.

e^{G_i - G_j}, never more than 1 where it counts, is a product of e^{G_i - R} and e^{R - G_j}, so that reads are plain
matrix products. R lies in the middle of the values of G in the chunk. Of a slot a write leaves at least the type's
resolution: with chunks of 8 no factor is more than e^64 in fp32, which ends at e^88.

Shapes: as in bounded.py.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bounded_scan import product, run_scan, run_scan_backward, scan
from .bounded_spec import CHUNK, SCORES
from .positions import TokenPositions
from .precision import no_autocast

# The score of what is not seen. Finite: where nothing is seen, a softmax has no NaN, and its result no weight.
UNSEEN = -1e30


class Chunks:
    """Tokens in chunks of `bounded_spec.CHUNK`, the last one filled up with tokens that write nothing.

    seen   [C, C], with segments [Z, B, C, C]: 1 where a token finds another of its chunk, else 0
    begun  with segments [Z, B, C]: 1 where a token finds what was before its chunk, else 0; None: all do
    """

    def __init__(self, positions: TokenPositions, length: int, dtype: torch.dtype):
        self.length, self.size = length, min(CHUNK, length)
        self.fill = -length % self.size
        index = torch.arange(self.size, device=positions.position_BT.device)
        distance = index[:, None] - index
        self.seen, self.begun = (distance >= 0).to(dtype), None
        if positions.segmented:
            place_ZBC = self.split(positions.position_BT)
            self.seen = self.seen * (distance <= place_ZBC.unsqueeze(-1))
            self.begun = (place_ZBC > index).to(dtype)

    def split(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.fill)) if self.fill else x
        return rearrange(padded, "b (z c) ... -> z b c ...", c=self.size)

    def join(self, x_ZBNCH: Tensor) -> Tensor:
        joined = rearrange(x_ZBNCH, "z b n c h -> b (z c) n h")
        return joined[:, : self.length] if self.fill else joined


class ChunkWrites(NamedTuple):
    """Writes of the tokens of each chunk, and what is left of them at each of these and at the chunk's end.

    faded_ZBCM        e^{G - R}: what a token finds of the state before the chunk, times e^R, and of a share
    share_ZBCM        e^{R - G} p
    kept_ZBM          what the end finds of the state before the chunk; states are held times e^R, each with its chunk's
    last_ZBCM         what the end finds of each token's key and value
    k_ZBKCH, v_ZBKCH  keys and values
    start_BKME        the state before all chunks
    """

    faded_ZBCM: Tensor
    share_ZBCM: Tensor
    kept_ZBM: Tensor
    last_ZBCM: Tensor
    k_ZBKCH: Tensor
    v_ZBKCH: Tensor
    start_BKME: Tensor


def chunk_writes(
    k_BTKH: Tensor, v_BTKH: Tensor, p_BTM: Tensor, positions: TokenPositions, state_BKME: Tensor | None, empty: bool
) -> ChunkWrites:
    """Compute the writes of tokens, which continue a cached state unless it is `empty`; that becomes the one after
    them."""
    with no_autocast(k_BTKH):
        chunks = Chunks(positions, p_BTM.shape[1], p_BTM.dtype)
        p_ZBCM = chunks.split(p_BTM)
        k, v = (chunks.split(x.to(p_BTM.dtype)).transpose(2, 3).contiguous() for x in (k_BTKH, v_BTKH))
        num_chunks, batch, size, num_slots = p_ZBCM.shape
        # The least that a write leaves keeps logarithms finite; an overwritten slot is not known more exactly.
        left = (1 - p_ZBCM).clamp(min=torch.finfo(p_BTM.dtype).eps).log().reshape(-1, size, num_slots)
        # Not a cumulative sum, which would carry another segment's rounding.
        seen = chunks.seen.reshape(-1, size, size).expand(left.shape[0], -1, -1)
        decay_ZBCM = torch.bmm(seen, left).view(num_chunks, batch, size, num_slots)
        with torch.no_grad():  # of any reference the result is the same, and so is its gradient
            middle_ZBM = decay_ZBCM.amin(dim=2) / 2
            following = torch.cat((middle_ZBM[1:], torch.zeros_like(middle_ZBM[:1])))
        from_middle = decay_ZBCM - middle_ZBM.unsqueeze(2)
        faded_ZBCM, share_ZBCM = from_middle.exp(), from_middle.neg().exp() * p_ZBCM
        end_ZBM = from_middle[:, :, -1]
        kept_ZBM = (end_ZBM + following).exp()
        last_ZBCM = share_ZBCM * kept_ZBM.unsqueeze(2)
        if chunks.begun is not None:
            last_ZBCM = last_ZBCM * chunks.seen[:, :, -1].unsqueeze(-1)
            kept_ZBM = kept_ZBM * chunks.begun[:, :, -1:]
        start = k.new_zeros(batch, k.shape[2], num_slots, 2 * k.shape[-1])
        if state_BKME is not None:
            if not empty:
                start += state_BKME * middle_ZBM[0].exp()[:, None, :, None]
            after = decay_ZBCM[:, :, -1].flip(0).cumsum(dim=0).flip(0)  # of each chunk and those after it
            share = share_ZBCM * (after - middle_ZBM).exp().unsqueeze(2)
            new = torch.einsum("zbcm,zbkch->bkmh", share, torch.cat((k, v), dim=-1))
            state_BKME.copy_(new if empty else new + state_BKME * after[0].exp()[:, None, :, None])
        return ChunkWrites(faded_ZBCM, share_ZBCM, kept_ZBM, last_ZBCM, k, v, start)


class Sight(NamedTuple):
    """Visibility, and how products are computed. `seen`, `begun`: as in Chunks; `bias` [Z, 1 or B, 1, C, 1 or M] is
    added to scores; `more`: something besides the slots is read; `tf32`: as in `product`."""

    seen: Tensor
    begun: Tensor | None
    bias: Tensor | None
    more: bool
    tf32: bool

    def part(self, chunks: slice) -> "Sight":
        seen = self.seen if self.begun is None else self.seen[chunks]
        begun, bias = (None if x is None else x[chunks] for x in (self.begun, self.bias))
        return self._replace(seen=seen, begun=begun, bias=bias)


def read_slots(
    q_BTNH: Tensor,
    writes: ChunkWrites,
    positions: TokenPositions,
    seen_BTM: Tensor | None,
    more: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[B, T, N, H] the slots as each token finds them, which are never made, weighted for scaled queries. Where `more`
    is read beside them, also [B, T, N] the logarithm of the sum that weights were divided by.

    `seen_BTM`: [1 or B, T, 1 or M] slots to look at, None for all. `tf32`: as in `product`.
    """
    chunks = Chunks(positions, q_BTNH.shape[1], q_BTNH.dtype)
    q = rearrange(chunks.split(q_BTNH), "z b c (k g) h -> z b k (g c) h", k=writes.k_ZBKCH.shape[2])
    bias = None
    if seen_BTM is not None:
        bias = torch.zeros(seen_BTM.shape, dtype=q.dtype, device=q.device).masked_fill(~seen_BTM, UNSEEN)
        bias = chunks.split(bias).unsqueeze(2).contiguous()  # results are laid out as it is
    sight = Sight(chunks.seen, chunks.begun, bias, more, tf32)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out, total = Recomputed.apply(sight, q, *writes)  # type: ignore[no-untyped-call]
    elif torch.compiler.is_compiling():
        out, total = read_chunks(sight, q, writes, *split_states(scan(*writes[2:], tf32)))
    else:
        out, total, _ = read_pieces(sight, q, writes)
    return chunks.join(out), chunks.join(total.unsqueeze(-1)).squeeze(-1) if more else None


def pieces(q_ZBKRH: Tensor, num_slots: int) -> list[slice]:
    """Chunks that are read at a time, in order."""
    length = step = q_ZBKRH.shape[0]
    if not q_ZBKRH.is_cuda:
        step = max(1, SCORES * q_ZBKRH.shape[-1] // (q_ZBKRH[0].numel() * num_slots))
    return [slice(z, min(z + step, length)) for z in range(0, length, step)]


def read_pieces(sight: Sight, q_ZBKRH: Tensor, writes: ChunkWrites) -> tuple[Tensor, Tensor, list[Tensor]]:
    """[Z, B, N, C, H] and [Z, B, N, C] of all chunks, and the states before each of the pieces they were read in."""
    results, starts = [], [writes.start_BKME]
    for part in pieces(q_ZBKRH, writes.share_ZBCM.shape[-1]):
        some = ChunkWrites._make((*(x[part] for x in writes[:-1]), starts[-1]))
        states = run_scan(*some[2:], sight.tf32)
        results.append(read_chunks(sight.part(part), q_ZBKRH[part], some, *split_states(states)))
        starts.append(states[-1].clone())
    out, total = results[0] if len(results) == 1 else (torch.cat(parts) for parts in zip(*results, strict=True))
    return out, total, starts[:-1]


def split_states(states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [Z, B, K, M, H] of the states before each chunk."""
    state_k, state_v = states[:-1].chunk(2, dim=-1)
    return state_k, state_v


class Recomputed(torch.autograd.Function):
    """`read_pieces`, whose pieces are computed again in the backward pass: memory is slower than that."""

    @staticmethod
    def forward(ctx: Any, sight: Sight, q_ZBKRH: Tensor, *writes: Tensor) -> tuple[Tensor, Tensor]:
        out, total, starts = read_pieces(sight, q_ZBKRH, ChunkWrites(*writes))
        ctx.more, ctx.tf32, ctx.num_pieces = sight.more, sight.tf32, len(starts)
        ctx.save_for_backward(*sight[:-2], *starts, q_ZBKRH, *writes[:-1])
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, begun, bias, *saved = ctx.saved_tensors
        sight = Sight(seen, begun, bias, ctx.more, ctx.tf32)
        starts, inputs = saved[: ctx.num_pieces], saved[ctx.num_pieces :]
        found = [torch.empty_like(x) for x in inputs]
        of_state = torch.zeros_like(starts[0])
        cuts = pieces(inputs[0], inputs[2].shape[-1])
        for part, start in zip(reversed(cuts), reversed(starts), strict=True):
            q, *some = (x[part] for x in inputs)
            writes = ChunkWrites._make((*some, start))
            given = [x[part] for x in gradients[: 1 + sight.more]]
            of_state, new = backward_of_chunks(sight.part(part), q, writes, given, of_state)
            for whole, one in zip(found, new, strict=True):
                whole[part] = one
        return None, *found, of_state


def backward_of_chunks(
    sight: Sight, q_ZBKRH: Tensor, writes: ChunkWrites, gradients: list[Tensor], of_state: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of the state before the chunks, and of the queries and writes, given those of what was read and of the
    state after them. By hand: autograd takes a quarter more. To the bit they are its, which compiled code has."""
    with no_autocast(q_ZBKRH):
        states = run_scan(*writes[2:], sight.tf32)
        slots, (state_k, state_v) = Slots(sight, q_ZBKRH, writes), split_states(states)
        faded, k, v = writes.faded_ZBCM.unsqueeze(2), writes.k_ZBKCH, writes.v_ZBKCH
        unfaded, pair_k = slots.scores(q_ZBKRH, k, state_k)
        weight, _ = faded_softmax(unfaded, faded, sight.bias, False)
        slots.apart = True
        of_out = gradients[0].reshape(q_ZBKRH.shape)
        of_faded_weight, of_pair_v = slots.scores(of_out, v, state_v)
        weighted, of_total = of_faded_weight.mul_(weight).mul_(faded), gradients[1] if sight.more else None
        of_unfaded, of_faded = backward_of_softmax(unfaded, faded, weight, weighted, of_total)
        faded_weight = weight.mul_(faded)
        pair_v = slots.within(faded_weight)
        of_q, of_pair_k = slots.sums(of_unfaded, k, state_k)
        q, of_out, of_unfaded_k, faded_weight_v = map(slots.by_head, (q_ZBKRH, of_out, of_unfaded, faded_weight))
        of_share = slots.product(slots.by_chunk(faded_weight).mT, slots.by_chunk(of_pair_v)).mT
        of_share = of_share + slots.product(slots.by_chunk(pair_k).mT, slots.by_chunk(of_unfaded))
        of_k = slots.product(q.mT, slots.by_head(of_pair_k)).mT.reshape(k.shape)
        of_v = slots.product(slots.by_head(pair_v).mT, of_out).view(v.shape)
        of_state_k = slots.product(slots.of_begun(q).mT, of_unfaded_k).mT.reshape(state_k.shape)
        of_state_v = slots.product(faded_weight_v.mT, slots.of_begun(of_out)).view(state_v.shape)
        of_states = torch.empty_like(states)
        torch.cat((of_state_k, of_state_v), dim=-1, out=of_states[:-1])
        of_states[-1] = of_state
        kept, last, more_k, more_v, start = run_scan_backward(of_states, *writes[2:-1], states, sight.tf32)
    of_writes = (
        of_faded.squeeze(2),
        of_share.view_as(writes.share_ZBCM),
        kept,
        last,
        of_k.add_(more_k),
        of_v.add_(more_v),
    )
    return start, (of_q.view(q_ZBKRH.shape), *of_writes)


def faded_softmax(unfaded: Tensor, faded: Tensor, bias: Tensor | None, more: bool) -> tuple[Tensor, Tensor]:
    """[Z, B, N, C, M] softmax(unfaded faded + bias), and [Z, B, N, C] the logarithm of the sum that weights were
    divided by, where there is `more`."""
    score = unfaded * faded if bias is None else torch.addcmul(bias, unfaded, faded)
    weight = score.softmax(dim=-1)
    # One exponential less than logsumexp.
    return weight, score.amax(dim=-1) - weight.amax(dim=-1).log() if more else score.new_zeros(score.shape[:1])


def backward_of_softmax(
    unfaded: Tensor, faded: Tensor, weight: Tensor, weighted: Tensor, of_total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `unfaded` and `faded`, given those of the weights times these, `weighted`, which is overwritten, and
    of the logarithm of the sum. That of a score is t - weight sum(t), where t is `weighted`."""
    less = weighted.sum(dim=-1)
    if of_total is not None:
        less -= of_total
    of_faded = weighted.sum(dim=2, keepdim=True) / faded
    minus = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_  # which it would round otherwise
    of_score = minus(weighted, weight, less.unsqueeze(-1), value=-1)
    of_faded += (of_score * unfaded).sum(dim=2, keepdim=True)
    return of_score.mul_(faded), of_faded


class FadedSoftmax(torch.autograd.Function):
    """`faded_softmax` times `faded`, with fewer passes over scores in its backward pass than autograd's."""

    @staticmethod
    def forward(ctx: Any, unfaded: Tensor, faded: Tensor, bias: Tensor | None, more: bool) -> tuple[Tensor, Tensor]:
        weight, total = faded_softmax(unfaded, faded, bias, more)
        ctx.more = more
        ctx.save_for_backward(unfaded, faded, weight)
        return weight * faded, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_faded_weight: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:
        unfaded, faded, weight = ctx.saved_tensors
        weighted = (of_faded_weight * weight).mul_(faded)
        found = backward_of_softmax(unfaded, faded, weight, weighted, of_total if ctx.more else None)
        return *found, None, None


class Slots:
    """The slots as each token of a few chunks finds them, before they fade: a state before the chunk, and shares of the
    tokens up to it. Queries are [Z, B, K, R, H], weights [Z, B, N, C, M], keys, or values, [Z, B, K, C, H] and states
    [Z, B, K, M, H].

    apart  products are added after they are made
    """

    def __init__(self, sight: Sight, q_ZBKRH: Tensor, writes: ChunkWrites):
        num_chunks, batch, kv_heads, rows, _ = q_ZBKRH.shape
        self.size, self.num_slots = writes.share_ZBCM.shape[2:]
        self.heads = num_chunks, batch, kv_heads * rows // self.size  # then tokens of a chunk
        self.rows, self.share = rows, writes.share_ZBCM.flatten(0, 1)
        self.seen, self.begun, self.tf32 = sight.seen, sight.begun, sight.tf32
        if self.begun is not None:
            self.seen, self.begun = self.seen.unsqueeze(2), self.begun[:, :, None, None, :, None]
        self.in_place, self.apart = not torch.is_grad_enabled(), sight.tf32

    def by_head(self, x: Tensor) -> Tensor:
        """Rows of each key/value head."""
        return x.reshape(-1, self.rows, x.shape[-1])

    def by_chunk(self, x: Tensor) -> Tensor:
        """Rows of all heads of a chunk."""
        return x.view(self.share.shape[0], -1, x.shape[-1])

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right, self.tf32)

    def add(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if self.apart:
            return x + self.product(left, right)
        return x.baddbmm_(left, right) if self.in_place else x.baddbmm(left, right)

    def of_begun(self, x: Tensor) -> Tensor:
        """Set rows of segments that begin in a chunk to 0: they find nothing of the state before it."""
        if self.begun is None:
            return x
        return (x.view(*self.heads[:2], -1, self.rows // self.size, self.size, x.shape[-1]) * self.begun).view(x.shape)

    def where_seen(self, pair: Tensor) -> Tensor:
        """[Z, B, N, C, C] pairs of tokens of a chunk, of which the first finds the second."""
        pair = pair.view(*self.heads, self.size, self.size)
        return pair.mul_(self.seen) if self.in_place else pair * self.seen

    def within(self, weight: Tensor) -> Tensor:
        """[Z, B, N, C, C] what weights of slots are for the tokens of the chunk."""
        return self.where_seen(self.product(self.by_chunk(weight), self.share.mT))

    def scores(self, q: Tensor, k: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[Z, B, N, C, M] products of queries with slots, and [Z, B, N, C, C] with the tokens of the chunk."""
        q, state = self.by_head(q), state.flatten(0, 2)
        pair = self.where_seen(self.product(q, k.flatten(0, 2).mT))
        score = self.by_chunk(self.product(self.of_begun(q), state.mT))
        score = self.add(score, self.by_chunk(pair), self.share)
        return score.view(*self.heads, self.size, self.num_slots), pair

    def sums(self, weight: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """[Z, B, N, C, H] sums of weighted slots, and `within` of these weights."""
        pair, weight, state = self.within(weight), self.by_head(weight), state.flatten(0, 2)
        new = self.product(self.by_head(pair), v.flatten(0, 2))
        out = self.add(new, weight, state) if self.begun is None else new + self.of_begun(self.product(weight, state))
        return out.view(*self.heads, self.size, v.shape[-1]), pair


def read_chunks(
    sight: Sight,
    q_ZBKRH: Tensor,
    writes: ChunkWrites,
    state_k_ZBKMH: Tensor,
    state_v_ZBKMH: Tensor,
) -> tuple[Tensor, Tensor]:
    """`read_slots` of a few chunks, given the states before each: [Z, B, N, C, H] and [Z, B, N, C]."""
    slots = Slots(sight, q_ZBKRH, writes)
    score, _ = slots.scores(q_ZBKRH, writes.k_ZBKCH, state_k_ZBKMH)
    faded = writes.faded_ZBCM.unsqueeze(2)
    weight, total = FadedSoftmax.apply(score, faded, sight.bias, sight.more)  # type: ignore[no-untyped-call]
    out, _ = slots.sums(weight, writes.v_ZBKCH, state_v_ZBKMH)
    return out, total
