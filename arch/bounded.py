"""Bounded stores: positions are merged into a fixed number of slots, so that the cache does not grow.

Readings of the Bounded-Cache Transformer (Yi et al. 2024, "A method for building LLMs with predefined KV cache
capacity"). We could not obtain its update formula: what is known is a fixed capacity, slot keys M_K, stored
vectors M_V, two write projections, and neural Turing machines as the model. Nothing here is verified against the paper.

A token writes its key and value to each slot with a strength p in [0, 1), and reads the slots by a softmax:

    S_t[m] = (1 - p_t[m]) S_{t-1}[m] + p_t[m] (k_t | v_t)        o_t = softmax_m(q_t S^k_t[m] / sqrt(H)) S^v_t

p depends on the token alone, so that the recurrence has an exact parallel form over chunks of C tokens: with G_t the
sum of log(1 - p) from the chunk's start to t,

    S_t[m] = e^{G_t} S_start[m] + sum_{j <= t} e^{G_t - G_j} p_j (k_j | v_j)        (G and p those of slot m)

(That form is the one of gated slot attention, Zhang et al. 2024.) All heads of a store share p. Slots know no
positions: averaged rotated keys would lose their phase. Slots are read and written in at least fp32.

Shapes: B batch, T new tokens, C (i reads, j writes) tokens of a chunk, Z chunks, D model, A address, N query heads,
K key/value heads, G query heads per key/value head, H head, M slots, W window, L positions a block of queries looks at.
"""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .buffers import StateBuffer, Tensors
from .config import SizeConfig, head_dim, style_of
from .grouped import GroupedKV
from .layers import Rope, rotate
from .positions import TokenPositions
from .precision import at_least_fp32, no_autocast
from .stores import CHUNK, BoundedSpec, StoreSpec

# How far write scores spread over the slots before training; equal scores would make all slots the same average.
SHARPNESS = 2.0
# The logit of lambda before training: half of a write goes to the ring. With more, what was merged fades before a
# router learns to keep it.
RING_LOGIT = 0.0


# --- the parallel form: chunks of C tokens
#
# A token's share of a slot, e^{G_i - G_j} p_j, is never more than 1 where it counts, and is made as one exponential:
# products of its parts would overflow.


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else minus infinity: unlike a filled mask, adding it keeps nothing for the backward pass."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -math.inf)


# Exported folders carry a copy of this file. An operator that two copies define would leave the first one's dangling.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=())
def scan(decay_BZM: Tensor, written_BZMKE: Tensor, start_BMKE: Tensor) -> Tensor:
    """[B, Z + 1, M, K, E] s_0 = start, s_z+1 = decay_z s_z + written_z.

    One operator, so that no compiler unrolls the loop, and of all its steps the backward pass keeps the result alone.
    """
    batch, length, *tail = written_BZMKE.shape
    states = written_BZMKE.new_empty(batch, length + 1, *tail)
    states[:, 0] = start_BMKE
    for z in range(length):
        torch.addcmul(written_BZMKE[:, z], decay_BZM[:, z, :, None, None], states[:, z], out=states[:, z + 1])
    return states


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=())
def scan_backward(gradient: Tensor, decay_BZM: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `decay`, `written` and `start`, given that of the states."""
    sums = gradient.clone(memory_format=torch.contiguous_format)  # of all that comes from a state
    for z in reversed(range(decay_BZM.shape[1])):
        sums[:, z].addcmul_(decay_BZM[:, z, :, None, None], sums[:, z + 1])
    decay = (sums[:, 1:] * states[:, :-1]).sum(dim=(-2, -1))
    dense = torch.contiguous_format  # copies: outputs of an operator may not share a storage
    return decay, sums[:, 1:].clone(memory_format=dense), sums[:, 0].clone(memory_format=dense)


@scan.register_fake
def _(decay_BZM: Tensor, written_BZMKE: Tensor, start_BMKE: Tensor) -> Tensor:
    batch, length, *tail = written_BZMKE.shape
    return written_BZMKE.new_empty(batch, length + 1, *tail)


@scan_backward.register_fake
def _(gradient: Tensor, decay_BZM: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, *tail = gradient.shape
    written = gradient.new_empty(batch, length - 1, *tail)
    return decay_BZM.new_empty(decay_BZM.shape), written, gradient.new_empty(batch, *tail)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = scan_backward(gradient, *ctx.saved_tensors)
    return result


scan.register_autograd(_backward, setup_context=_save)


class Chunks:
    """Tokens in chunks of `stores.CHUNK`, the last one filled up with tokens that write nothing."""

    def __init__(self, position_BT: Tensor):
        self.length = position_BT.shape[1]
        self.size = min(CHUNK, self.length)
        self.fill = -self.length % self.size
        self.index = torch.arange(self.size, device=position_BT.device)
        more = torch.arange(1, self.fill + 1, device=position_BT.device)
        position_BT = torch.cat((position_BT, position_BT[:, -1:] + more), dim=1)
        self.position_BZC = rearrange(position_BT, "b (z c) -> b z c", c=self.size)
        distance = self.index[:, None] - self.index
        self.seen_BZCC = (distance >= 0) & (distance <= self.position_BZC.unsqueeze(-1))

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

    def decay_from_state(self, decay_BZCM: Tensor, reads: slice = slice(None)) -> Tensor:
        """[B, Z, i, M] what tokens `reads` of each chunk find of the state before it: nothing of another document."""
        begun_BZC = self.position_BZC[:, :, reads] > self.index[reads]
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
        states: Tensor = scan(self.decay_from_state(decay_BZCM, last).squeeze(2), written, start)
        return states


class ChunkStates(NamedTuple):
    """Log decay of the slots within chunks, and the states before each chunk and after the last, keys beside values."""

    decay_BZCM: Tensor
    state_BZMKE: Tensor


class BoundedKV(NamedTuple):
    """Keys and values written to the slots at each token, and the strengths of the writes.

    In rule `ring_slots` they are those of the token that leaves the window, and `window` has the rotated keys and the
    values of the window, [B, T, K, H], or [B, W + T, K, H] over a cache. `chunks` is None where another kernel takes
    the place of the chunk form; of one token over a cache they are the slots after its write, [B, M, K, 2H].
    """

    k_BTKH: Tensor
    v_BTKH: Tensor
    p_BTM: Tensor
    chunks: ChunkStates | Tensor | None = None
    window: GroupedKV | None = None


class SlotRead:
    """The slots as each token finds them, never made: scores against them, and sums over them.

    Its rows are [B, Z, C, K, G]. `seen_BTM`: [1 or B, T, 1 or M] slots to look at, None for all.
    """

    def __init__(self, kv: BoundedKV, position_BT: Tensor, seen_BTM: Tensor | None):
        assert isinstance(kv.chunks, ChunkStates)
        decay_BZCM, state_BZMKE = kv.chunks
        self.chunks, dtype = Chunks(position_BT), kv.p_BTM.dtype
        self.k_BZCKH, self.v_BZCKH = (self.chunks.split(x.to(dtype)) for x in (kv.k_BTKH, kv.v_BTKH))
        self.state_k, self.state_v = state_BZMKE[:, :-1].chunk(2, dim=-1)
        self.share_BZCCM = self.chunks.written(kv.p_BTM, decay_BZCM)
        self.state_share = rearrange(self.chunks.decay_from_state(decay_BZCM), "b z i m -> b z i 1 1 m")
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
        score = torch.addcmul(new, torch.einsum("bzikgh,bzmkh->bzikgm", q, self.state_k), self.state_share)
        return score if self.bias is None else score.add_(self.bias)

    def values(self, weight: Tensor) -> Tensor:
        """[B, T, N, H] weight S^v, of weights that are rows of M."""
        pair = torch.einsum("bzikgm,bzijm->bzikgj", weight, self.share_BZCCM)
        new = torch.einsum("bzikgj,bzjkh->bzikgh", pair, self.v_BZCKH)
        return self.tokens(new + torch.einsum("bzikgm,bzmkh->bzikgh", weight * self.state_share, self.state_v))


class WindowRead:
    """The last W positions, in blocks of queries that look at their own block and the W positions before it.

    Its rows are [B, Z, K, C, G], C tokens of a block. Blocks of half a window waste a third of the scores, as against
    half for whole windows, and copy a key three times.
    """

    def __init__(self, k_BSKH: Tensor, v_BSKH: Tensor, position_BT: Tensor, window: int, dtype: torch.dtype):
        self.length, past = position_BT.shape[1], k_BSKH.shape[1] - position_BT.shape[1]
        self.block = min(-(-window // 2), self.length)
        self.kv_heads, self.fill = k_BSKH.shape[2], -self.length % self.block
        front = window if not past and self.length > self.block else 0
        before = past + front
        padded = (F.pad(x.to(dtype), (0, 0, 0, 0, front, self.fill)) for x in (k_BSKH, v_BSKH))
        self.k, self.v = (x.unfold(1, before + self.block, self.block) for x in padded)  # [B, Z, K, H, L]
        index = torch.arange(self.block, device=position_BT.device)[:, None]
        distance = index + before - torch.arange(before + self.block, device=position_BT.device)
        place = rearrange(F.pad(position_BT, (0, self.fill)).clamp(min=0), "b (z c) -> b z c 1", c=self.block)
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


# --- writing


class Router(nn.Module):
    """Rule `gated`, reading A: write strengths by content, p = eta softmax_m(cos(a, M_K[m]) SHARPNESS sqrt(A)).

    a is the write query W_wq x, or in rule `ring_slots` the key itself, of all heads; eta = sigmoid(w a + b[m]) is how
    much of a slot is overwritten. Addressing by cosine is that of neural Turing machines (Graves et al. 2014, 3.3.1);
    erase and add share one strength.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, BoundedSpec)
        width = store.address_dim
        self.query_proj = None if store.window else nn.Linear(size.d_model, width, bias=False)
        self.slot_keys = nn.Linear(width, store.num_slots, bias=False)  # M_K
        self.gate = nn.Parameter(torch.empty(width))
        self.gate_bias = nn.Parameter(torch.empty(store.num_slots))

    def forward(self, source: Tensor, position_BT: Tensor) -> Tensor:
        """[B, T, M] strengths, in at least fp32, of tokens given by [B, T, D], or [B, T, A] in rule `ring_slots`."""
        a_BTA = source if self.query_proj is None else self.query_proj(source)
        dtype = at_least_fp32(a_BTA.dtype)
        with no_autocast(a_BTA):
            a_BTA = a_BTA.to(dtype)
            unit_BTA, keys_MA = (F.normalize(x, dim=-1) for x in (a_BTA, self.slot_keys.weight.to(dtype)))
            score_BTM = F.linear(unit_BTA, keys_MA) * SHARPNESS * math.sqrt(a_BTA.shape[-1])
            gate_BTM = (a_BTA * self.gate.to(dtype)).sum(-1, keepdim=True) + self.gate_bias.to(dtype)
            return self.strengths(score_BTM, gate_BTM, position_BT) * (position_BT >= 0).unsqueeze(-1)

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
        return gate_BTM.sigmoid() * score_BTM.softmax(dim=-1)


class RingRouter(Router):
    """Rule `ring_router`, reading D: p = lambda onehot(t mod M) + (1 - lambda) r, r and lambda as in `Router`.

    lambda = 1 is a sliding window of M. Until the ring has come round, slots it has not reached are not written.
    """

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
        ring_BTM = F.one_hot(position_BT % score_BTM.shape[-1], score_BTM.shape[-1]).to(score_BTM.dtype)
        written_BTM = written_slots(position_BT, score_BTM.shape[-1])
        content_BTM = score_BTM.masked_fill(~written_BTM, -math.inf).softmax(dim=-1)
        share_BTM = (gate_BTM + RING_LOGIT).sigmoid()
        return share_BTM * ring_BTM + (1 - share_BTM) * content_BTM


def written_slots(position_BT: Tensor, num_slots: int) -> Tensor:
    """[B, T, M] slots that a ring has written by then."""
    return torch.arange(num_slots, device=position_BT.device) <= position_BT.clamp(min=0).unsqueeze(-1)


class BoundedWriter(nn.Module):
    """Projects the residual stream to keys and values, and decides how strongly each slot is overwritten by them."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, BoundedSpec)
        slot = store.slot
        self.kv_heads, self.window = slot.kv_heads, store.window
        self.k_proj = nn.Linear(size.d_model, slot.kv_heads * slot.k_dim, bias=style_of(size).bias)
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=style_of(size).bias)
        self.router = (RingRouter if store.rule == "ring_router" else Router)(size, store)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        positions: TokenPositions,
        buffer: StateBuffer | None = None,
        offset: int = 0,
    ) -> BoundedKV:
        """Return what readers need of the tokens [B, T, D].

        With `buffer` the tokens continue the state it holds, which is replaced by the state after them.
        """
        k, v = (rearrange(proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads) for proj in (self.k_proj, self.v_proj))
        cached = None if buffer is None else buffer.tensors
        if self.window is not None:
            kv, after = self.write_evicted(k, v, rope, positions, cached)
        else:
            kv = self.write(k, v, self.router(x_BTD, positions.position_BT), positions, cached)
            after = ()
        if buffer is not None:
            assert kv.chunks is not None  # those of one token are the buffer's own
            state = kv.chunks if isinstance(kv.chunks, Tensor) else kv.chunks.state_BZMKE[:, -1]
            buffer.replace((state, *after))
        return kv

    def write(
        self, k: Tensor, v: Tensor, p_BTM: Tensor, positions: TokenPositions, cached: Tensors | None
    ) -> BoundedKV:
        """Write k and v [B, T, K, H] to the slots, of which `cached` has the state."""
        if positions.kernel is not None:
            return BoundedKV(k, v, p_BTM)
        state = None if cached is None else cached[0]
        if state is not None and k.shape[1] == 1:
            new_B1KE = torch.cat((k, v), dim=-1).to(state.dtype)
            state.masked_fill_(rearrange(positions.position_BT < 1, "b 1 -> b 1 1 1"), 0)  # what another row left
            state.lerp_(new_B1KE, rearrange(p_BTM, "b 1 m -> b m 1 1").to(state.dtype))
            return BoundedKV(k, v, p_BTM, state)
        return BoundedKV(k, v, p_BTM, chunk_states(k, v, p_BTM, positions.position_BT, state))

    def write_evicted(
        self, k: Tensor, v: Tensor, rope: Rope, positions: TokenPositions, cached: Tensors | None
    ) -> tuple[BoundedKV, Tensors]:
        """Write the tokens that leave the window; also return the keys, not rotated, and values of the window then."""
        assert self.window is not None
        length, rotated_k, visible_k, visible_v = k.shape[1], rotate(k, rope), k, v
        if cached is not None:
            assert positions.window_rope is not None
            past_k, past_v = (tensor.to(k.dtype) for tensor in cached[1:])
            visible_k, visible_v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
            rotated_k = torch.cat((rotate(past_k, positions.window_rope), rotated_k), dim=1)
        # With a cache, the first visible token is the one that leaves the window with the first new token.
        shift = self.window if cached is None else 0
        evicted_k, evicted_v = (F.pad(x, (0, 0, 0, 0, shift, 0))[:, :length] for x in (visible_k, visible_v))
        p_BTM = self.router(evicted_k.flatten(2), positions.position_BT - self.window)
        kv = self.write(evicted_k, evicted_v, p_BTM, positions, cached)
        window = visible_k[:, -self.window :], visible_v[:, -self.window :]
        return kv._replace(window=GroupedKV(rotated_k, visible_v)), window


def chunk_states(k: Tensor, v: Tensor, p_BTM: Tensor, position_BT: Tensor, start: Tensor | None) -> ChunkStates:
    """Compute the decay within chunks and the states between them, from the state `start` [B, M, K, 2H]."""
    with no_autocast(k):
        chunks = Chunks(position_BT)
        decay_BZCM = chunks.decay(p_BTM)
        return ChunkStates(decay_BZCM, chunks.states(k, v, p_BTM, decay_BZCM, start))


# --- reading


class BoundedReader(nn.Module):
    """Queries of this layer over shared slots and, in rule `ring_slots`, the window beside them, in one softmax.

    A sink is one more score per query head, of something worth nothing. Slots that hold nothing yet are not seen.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.num_heads, width = size.num_heads, head_dim(size)
        self.window, self.ring, self.scale = store.window, store.rule == "ring_router", width**-0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * width, bias=style_of(size).bias)
        self.o_proj = nn.Linear(self.num_heads * width, size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None

    def forward(self, x_BTD: Tensor, kv: BoundedKV, rope: Rope, positions: TokenPositions) -> Tensor:
        """[B, T, D] for the residual stream."""
        q_BTNH = rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads)
        with no_autocast(x_BTD):
            if positions.kernel is None:
                out_BTNH = self.read(q_BTNH, kv, rope, positions.position_BT)
            else:
                out_BTNH = positions.kernel(q_BTNH, kv.k_BTKH, kv.v_BTKH, kv.p_BTM, scale=self.scale)
        out: Tensor = self.o_proj(rearrange(out_BTNH.to(q_BTNH.dtype), "b t n h -> b t (n h)"))
        return out

    def read(self, q_BTNH: Tensor, kv: BoundedKV, rope: Rope, position_BT: Tensor) -> Tensor:
        """[B, T, N, H] in the type of the strengths, by the chunk form."""
        dtype, num_slots, seen_BTM = kv.p_BTM.dtype, kv.p_BTM.shape[-1], None
        if self.ring:
            seen_BTM = written_slots(position_BT, num_slots)
        if self.window is not None:
            seen_BTM = (position_BT >= self.window).unsqueeze(-1)
        q_BTNH = q_BTNH.to(dtype) * self.scale
        if isinstance(kv.chunks, Tensor):
            return self.read_one(q_BTNH, kv, rope, position_BT, seen_BTM)
        reads: list[tuple[SlotRead | WindowRead, Tensor]] = [(SlotRead(kv, position_BT, seen_BTM), q_BTNH)]
        if self.window is not None:
            assert kv.window is not None
            window_read = WindowRead(*kv.window, position_BT, self.window, dtype)
            reads.append((window_read, rotate(q_BTNH, rope)))
        sinks_BTN = None if self.sinks is None else self.sinks.to(dtype).expand(q_BTNH.shape[:3])
        return softmax_read(reads, sinks_BTN)

    def read_one(
        self, q_BTNH: Tensor, kv: BoundedKV, rope: Rope, position_BT: Tensor, seen_BTM: Tensor | None
    ) -> Tensor:
        """`read` of one token over a cache: one softmax over the slots, the window and the sink."""
        assert isinstance(kv.chunks, Tensor)
        dtype, kv_heads = q_BTNH.dtype, kv.k_BTKH.shape[2]
        k, v = kv.chunks.to(dtype).chunk(2, dim=-1)
        score = torch.einsum("bkgh,bmkh->bkgm", rearrange(q_BTNH, "b 1 (k g) h -> b k g h", k=kv_heads), k)
        if seen_BTM is not None:
            score = score.masked_fill(~seen_BTM.unsqueeze(1), -math.inf)
        scores, values = [score], [v]
        if self.window is not None:
            assert kv.window is not None
            k, v = (x[:, 1:].to(dtype) for x in kv.window)  # the first has left the window
            q = rearrange(rotate(q_BTNH, rope), "b 1 (k g) h -> b k g h", k=kv_heads)
            distance = torch.arange(self.window - 1, -1, -1, device=k.device)
            unseen = rearrange(distance > position_BT.clamp(min=0), "b w -> b 1 1 w")
            scores.append(torch.einsum("bkgh,bwkh->bkgw", q, k).masked_fill(unseen, -math.inf))
            values.append(v)
        if self.sinks is not None:
            sinks_NL = rearrange(self.sinks.to(dtype), "(k g) -> k g 1", k=kv_heads)
            scores.append(sinks_NL.expand(*score.shape[:3], 1))
        sizes = [score.shape[-1] for score in scores]
        weights = torch.split(torch.cat(scores, dim=-1).softmax(dim=-1), sizes, dim=-1)
        read = [torch.einsum("bkgs,bskh->bkgh", weight, v) for weight, v in zip(weights, values, strict=False)]
        return rearrange(sum(read[1:], read[0]), "b k g h -> b 1 (k g) h")
