"""Bounded stores: positions are merged into a fixed number of slots, so that the cache does not grow.

Readings of the Bounded-Cache Transformer (Yi et al. 2024, "A method for building LLMs with predefined KV cache
capacity"). We could not obtain its update formula: what is known is a fixed capacity, slot keys M_K, stored
vectors M_V, two write projections, and neural Turing machines as the model. Nothing here is verified against the paper.

A token writes its key and value to each slot with a strength p in [0, 1), and reads the slots by a softmax:

    S_t[m] = (1 - p_t[m]) S_{t-1}[m] + p_t[m] (k_t | v_t)        o_t = softmax_m(q_t S^k_t[m] / sqrt(H)) S^v_t

One token over a cache does just that. p depends on the token alone, so that several have an exact parallel form over
chunks of C tokens: with G_t the sum of log(1 - p) from the chunk's start to t,

    S_t[m] = e^{G_t} S_start[m] + sum_{j <= t} e^{G_t - G_j} p_j (k_j | v_j)        (G and p those of slot m)

(That form is the one of gated slot attention, Zhang et al. 2024.) All heads of a store share p. Slots know no
positions: averaged rotated keys would lose their phase. Slots are read and written in at least fp32.

Shapes: B batch, T new tokens, C (i reads, j writes) tokens of a chunk, Z chunks, D model, A address, N query heads,
K key/value heads, G query heads per key/value head, H head, E 2 H (a key and its value), M slots, W window, R rows
(G C) of queries.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bounded_chunks import UNSEEN, ChunkWrites, chunk_writes, read_slots
from .bounded_spec import BoundedSpec
from .bounded_window import merge, read_window, run_near
from .buffers import StateBuffer, Step, Tensors
from .config import SizeConfig, has_qkv_bias, head_dim, style_of
from .grouped import GroupedKV
from .layers import Rope, build_head_norm, build_output_gate, gate_output, norm_heads, rotate, rotate_step
from .positions import StepPositions, TokenPositions, written_slots
from .precision import at_least_fp32, no_autocast
from .store_spec import StoreSpec

# How far write scores spread over the slots before training; equal scores would make all slots the same average.
SHARPNESS = 2.0
# The logit of lambda before training: half of a write goes to the ring. With more, what was merged fades before a
# router learns to keep it.
RING_LOGIT = 0.0


class BoundedKV(NamedTuple):
    """Keys and values written to the slots at each token, and the strengths of the writes.

    In rule `ring_slots` they are those of the token that leaves the window, T - W where rows begin and none does at
    first, and `window` has the rotated keys and the values of the window, [B, T, K, H], or [B, W + T, K, H] over a
    cache. `chunks` is None where another kernel takes the place of the chunk form. Of one token over a cache it is the
    slots after its write, [B, K, M, 2H], and `window` is [B, K, W, 2H], in the order of a ring; the others lack T.
    """

    k_BTKH: Tensor
    v_BTKH: Tensor
    p_BTM: Tensor
    chunks: ChunkWrites | Tensor | None = None
    window: GroupedKV | Tensor | None = None


# --- one token over a cache


def read_step(
    q_BNH: Tensor, rotated_BNH: Tensor | None, kv: BoundedKV, hidden_B1S: Tensor | None, sinks_N: Tensor | None
) -> Tensor:
    """[B, N, H] one softmax of one scaled query over the slots, the window (`rotated_BNH` is for it) and a sink."""
    assert isinstance(kv.chunks, Tensor)
    dtype, (batch, heads, width) = q_BNH.dtype, q_BNH.shape
    state_k, state_v = kv.chunks.to(dtype).flatten(0, 1).chunk(2, dim=-1)
    rows = batch * kv.chunks.shape[1]
    scores = [torch.bmm(q_BNH.view(rows, -1, width), state_k.mT)]
    window_v = None
    if rotated_BNH is not None:
        assert isinstance(kv.window, Tensor)
        window_k, window_v = kv.window.to(dtype).flatten(0, 1).chunk(2, dim=-1)
        scores.append(torch.bmm(rotated_BNH.view(rows, -1, width), window_k.mT))
    if sinks_N is not None:
        scores.append(sinks_N.expand(batch, -1).reshape(rows, -1, 1))
    score = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    if hidden_B1S is not None:
        some = score.view(batch, heads, -1)[..., : hidden_B1S.shape[-1]]
        some.masked_fill_(hidden_B1S, UNSEEN)
    weight, num_slots = score.softmax(dim=-1), state_k.shape[1]
    out = torch.bmm(weight[..., :num_slots], state_v)
    if window_v is not None:
        out.baddbmm_(weight[..., num_slots : num_slots + window_v.shape[1]], window_v)
    return out.view(batch, heads, width)


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

    def forward(self, source: Tensor, position_BT: Tensor, all_write: bool = False) -> Tensor:
        """[B, T, M] strengths, in at least fp32, of tokens given by [B, T, D], or [B, T, A] in rule `ring_slots`.

        Those of negative positions are 0; `all_write`: there is none.
        """
        a_BTA = source if self.query_proj is None else self.query_proj(source)
        dtype = at_least_fp32(a_BTA.dtype)
        with no_autocast(a_BTA):
            a_BTA = a_BTA.to(dtype)
            unit_BTA, keys_MA = (F.normalize(x, dim=-1) for x in (a_BTA, self.slot_keys.weight.to(dtype)))
            score_BTM = F.linear(unit_BTA, keys_MA) * (SHARPNESS * math.sqrt(a_BTA.shape[-1]))
            gate_BTM = (a_BTA * self.gate.to(dtype)).sum(-1, keepdim=True) + self.gate_bias.to(dtype)
            return self.strengths(score_BTM, gate_BTM, position_BT, all_write)

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor, all_write: bool) -> Tensor:
        p_BTM = self.spread(score_BTM, gate_BTM, position_BT)
        return p_BTM if all_write else p_BTM * (position_BT >= 0).unsqueeze(-1)

    def spread(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
        return gate_BTM.sigmoid() * score_BTM.softmax(dim=-1)

    def derive(self, dtype: torch.dtype) -> Tensors:
        """[2M, A] and [2M]: the product with an address, and what is added, for scores times its length and gates."""
        keys_MA = F.normalize(self.slot_keys.weight.to(dtype), dim=-1)
        keys_MA = keys_MA * (SHARPNESS * math.sqrt(keys_MA.shape[-1]))
        bias_M = self.gate_bias.to(dtype)
        weight = torch.cat((keys_MA, self.gate.to(dtype).expand_as(keys_MA)))
        return weight, torch.cat((torch.zeros_like(bias_M), bias_M))

    def step(self, source_BD: Tensor, positions: StepPositions, buffer: StateBuffer) -> Tensor:
        """[B, M] `forward` for one token of each row. What the weights are for all steps, `buffer` keeps."""
        a_BA = source_BD if self.query_proj is None else self.query_proj(source_BD)
        dtype = at_least_fp32(a_BA.dtype)
        with no_autocast(a_BA):
            a_BA = a_BA.to(dtype)
            if torch.compiler.is_compiling():  # it would be traced once more, for what is kept
                derived = self.derive(dtype)
            else:
                derived = buffer.derived = buffer.derived or self.derive(dtype)
            score_BM, gate_BM = F.linear(a_BA, *derived).chunk(2, dim=-1)
            length_B1: Tensor = torch.linalg.vector_norm(a_BA, dim=-1, keepdim=True)
            score_BM = score_BM / length_B1.clamp_(min=1e-12)
            return self.strengths(score_BM, gate_BM, positions.written_B, positions.all_write)


class RingRouter(Router):
    """Rule `ring_router`, reading D: p = lambda onehot(t mod M) + (1 - lambda) r, r and lambda as in `Router`.

    lambda = 1 is a sliding window of M. Until the ring has come round, slots it has not reached are not written.
    """

    def spread(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
        num_slots = score_BTM.shape[-1]
        slot_M = torch.arange(num_slots, device=position_BT.device)
        ring_BTM = (slot_M == (position_BT % num_slots).unsqueeze(-1)).to(score_BTM.dtype)
        written_BTM = written_slots(position_BT, num_slots)
        content_BTM = score_BTM.masked_fill(~written_BTM, -math.inf).softmax(dim=-1)
        share_BTM = (gate_BTM + RING_LOGIT).sigmoid()
        return share_BTM * ring_BTM + (1 - share_BTM) * content_BTM


class BoundedWriter(nn.Module):
    """Projects the residual stream to keys and values, and decides how strongly each slot is overwritten by them."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, BoundedSpec)
        slot = store.slot
        self.kv_heads, self.window = slot.kv_heads, store.window
        self.k_proj = nn.Linear(size.d_model, slot.kv_heads * slot.k_dim, bias=has_qkv_bias(size))
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=has_qkv_bias(size))
        self.k_norm = build_head_norm(size, slot.kv_heads, slot.k_dim)
        self.router = (RingRouter if store.rule == "ring_router" else Router)(size, store)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        positions: TokenPositions,
        buffer: StateBuffer | None = None,
        offset: int | Step = 0,
    ) -> BoundedKV:
        """Return what readers need of the tokens [B, T, D]; of one of each row, [B, D], where `offset` is a Step.

        With `buffer` the tokens continue the state it holds, which becomes the state after them; at `offset` 0 there is
        none yet, whatever it holds.
        """
        if isinstance(offset, Step):
            assert buffer is not None
            return self.step(x_BTD, rope, positions, buffer, offset.offset)
        empty = not offset
        if buffer is not None:
            buffer.derived = ()
        k, v = (proj(x_BTD).view(*x_BTD.shape[:2], self.kv_heads, -1) for proj in (self.k_proj, self.v_proj))
        k, window = norm_heads(self.k_norm, k), None
        if self.window is None:
            p_BTM = self.router(x_BTD, positions.position_BT)
        else:
            k, v, window = self.leave_window(k, v, rope, positions, buffer, empty)
            leaving_BT = positions.position_BT[:, x_BTD.shape[1] - k.shape[1] :] - self.window
            p_BTM = self.router(k.flatten(2), leaving_BT, all_write=k.shape[1] < x_BTD.shape[1])
        if positions.kernel is not None:
            return BoundedKV(k, v, p_BTM)
        state = None if buffer is None else buffer.tensors[0]
        return BoundedKV(k, v, p_BTM, chunk_writes(k, v, p_BTM, positions, state, empty), window)

    def leave_window(
        self, k: Tensor, v: Tensor, rope: Rope, positions: TokenPositions, buffer: StateBuffer | None, empty: bool
    ) -> tuple[Tensor, Tensor, GroupedKV]:
        """Return keys, not rotated, and values of the tokens that leave the window as these come, and those that are
        read, as BoundedKV has them. The buffer gets the window after them."""
        assert self.window is not None
        length, rotated_k, position_BT = k.shape[1], rotate(k, rope), positions.position_BT
        read = GroupedKV(rotated_k, v)
        if positions.plain and length > self.window:  # nothing leaves it as the first tokens come
            k, v = (x[:, : length - self.window] for x in (k, v))
        elif buffer is None or empty:
            k, v = (F.pad(x, (0, 0, 0, 0, self.window, 0))[:, :length] for x in (k, v))
        else:
            assert positions.evicted_rope is not None
            past = buffer.at(position_BT[:, :1] + torch.arange(self.window, device=k.device))
            past_k, past_v = past.transpose(1, 2).to(k.dtype).chunk(2, dim=-1)
            left_k = rotate(past_k[:, :length], positions.evicted_rope)
            read = GroupedKV(*(torch.cat(pair, dim=1) for pair in zip((past_k, past_v), read, strict=True)))
            k, v = (torch.cat(pair, dim=1)[:, :length] for pair in ((left_k, k), (past_v, v)))
        if buffer is not None:
            newest = min(length, self.window)
            kept = torch.cat((rotated_k[:, -newest:], read.v_BSKH[:, -newest:]), dim=-1)
            buffer.put(position_BT[:, -newest:], kept)
        return k, v, read

    def step(
        self, x_BD: Tensor, rope: Rope, positions: TokenPositions, buffer: StateBuffer, offset: int | Tensor
    ) -> BoundedKV:
        """`forward` for one token of each row. A tensor as `offset` is never 0."""
        assert positions.step is not None
        state_BKME = buffer.tensors[0]
        k, v = (proj(x_BD).view(len(x_BD), self.kv_heads, -1) for proj in (self.k_proj, self.v_proj))
        k = norm_heads(self.k_norm, k)
        new_BKE = torch.cat((k if self.window is None else rotate_step(k, rope), v), dim=-1)
        if self.window is None:
            written_BKE, source_BD = new_BKE, x_BD
        else:
            assert positions.evicted_rope is not None
            written_BKE = rotate_step(buffer.slot(positions.step.ring).to(k.dtype), positions.evicted_rope)
            k, v = written_BKE.chunk(2, dim=-1)
            source_BD = k.flatten(1)
        if isinstance(offset, int) and not offset:
            buffer.derived = ()
            state_BKME.zero_()
        p_BM = self.router.step(source_BD, positions.step, buffer)
        write_B1M1 = p_BM.to(state_BKME.dtype).view(len(x_BD), 1, -1, 1)
        state_BKME.lerp_(written_BKE.to(state_BKME.dtype).unsqueeze(2), write_B1M1)
        if self.window is None:
            return BoundedKV(k, v, p_BM, state_BKME)
        buffer.put_slot(positions.step.ring, new_BKE)  # only now: what leaves the window may be a view of its slot
        return BoundedKV(k, v, p_BM, state_BKME, buffer.tensors[1])


# --- reading


class BoundedReader(nn.Module):
    """Queries of this layer over shared slots and, in rule `ring_slots`, the window beside them, in one softmax.

    A sink is one more score per query head, of something worth nothing. Slots that hold nothing yet are not seen.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.num_heads, width = size.num_heads, head_dim(size)
        self.window, self.ring, self.scale = store.window, store.rule == "ring_router", width**-0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * width, bias=has_qkv_bias(size))
        self.o_proj = nn.Linear(self.num_heads * width, size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None
        self.q_norm = build_head_norm(size, self.num_heads, width)
        self.gate_proj = build_output_gate(size, width)

    def forward(self, x_BTD: Tensor, kv: BoundedKV, rope: Rope, positions: TokenPositions) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens, whose `rope` and `positions` are of a step."""
        if x_BTD.ndim == 2:
            return self.step(x_BTD, kv, rope, positions)
        q_BTNH = norm_heads(self.q_norm, self.q_proj(x_BTD).view(*x_BTD.shape[:2], self.num_heads, -1))
        with no_autocast(x_BTD):
            if positions.kernel is None:
                out_BTNH = self.read(q_BTNH, kv, rope, positions)
            else:
                out_BTNH = positions.kernel(q_BTNH, kv.k_BTKH, kv.v_BTKH, kv.p_BTM, scale=self.scale)
        out_BTNH = gate_output(self.gate_proj, x_BTD, out_BTNH.to(q_BTNH.dtype))
        out: Tensor = self.o_proj(out_BTNH.flatten(2))
        return out

    def read(self, q_BTNH: Tensor, kv: BoundedKV, rope: Rope, positions: TokenPositions) -> Tensor:
        """[B, T, N, H] in the type of the strengths. In half precision products with slots are of TF32 on CUDA."""
        dtype, tf32 = kv.p_BTM.dtype, q_BTNH.is_cuda and q_BTNH.dtype.itemsize < 4
        scaled_BTNH = q_BTNH.to(dtype) * self.scale
        assert isinstance(kv.chunks, ChunkWrites)
        early, seen_BTM = q_BTNH.shape[1] - kv.p_BTM.shape[1], None  # tokens before any has left the window
        if self.ring:
            seen_BTM = written_slots(positions.position_BT, kv.p_BTM.shape[-1])
        elif self.window is not None and not early:
            seen_BTM = (positions.position_BT >= self.window).unsqueeze(-1)
        more = self.window is not None or self.sinks is not None
        out_BTNH, slots_BTN = read_slots(scaled_BTNH[:, early:], kv.chunks, positions, seen_BTM, more, tf32)
        if slots_BTN is None:
            return out_BTNH
        if early:
            out_BTNH = F.pad(out_BTNH, (0, 0, 0, 0, early, 0))
            slots_BTN = F.pad(slots_BTN, (0, 0, early, 0), value=UNSEEN)
        total_BTN = slots_BTN if self.sinks is None else torch.logaddexp(slots_BTN, self.sinks.to(dtype))
        share_BTN = (slots_BTN - total_BTN).exp()  # of the slots, where a sink takes some
        if self.window is None:
            return out_BTNH * share_BTN.unsqueeze(-1)
        assert isinstance(kv.window, GroupedKV)
        if positions.near is not None:
            near = run_near(rotate(q_BTNH, rope), kv.window, positions.near, self.scale)
            return merge(*near, out_BTNH * share_BTN.unsqueeze(-1), total_BTN)
        rotated_BTNH = rotate(scaled_BTNH, rope)
        near_BTNH, beside_BTN = read_window(rotated_BTNH, total_BTN, kv.window, positions, self.window)
        return torch.addcmul(near_BTNH, (beside_BTN * share_BTN).unsqueeze(-1), out_BTNH)

    def step(self, x_BD: Tensor, kv: BoundedKV, rope: Rope, positions: TokenPositions) -> Tensor:
        q_BNH = norm_heads(self.q_norm, self.q_proj(x_BD).view(len(x_BD), self.num_heads, -1))
        with no_autocast(x_BD):
            scaled_BNH = q_BNH.to(kv.p_BTM.dtype) * self.scale
            rotated_BNH = None if self.window is None else rotate_step(scaled_BNH, rope)
            assert positions.step is not None
            sinks_N = None if self.sinks is None else self.sinks.to(scaled_BNH.dtype)
            out_BNH = read_step(scaled_BNH, rotated_BNH, kv, positions.step.hidden_B1S, sinks_N)
        out: Tensor = self.o_proj(gate_output(self.gate_proj, x_BD, out_BNH.to(q_BNH.dtype)).flatten(1))
        return out
