"""Bounded stores: positions are merged into a fixed number of slots, so that the cache does not grow.

Readings of the Bounded-Cache Transformer (Yi et al. 2024, "A method for building LLMs with predefined KV cache
capacity"). Its update formula was in no text accessible to us: what is known is a fixed capacity, slot keys M_K, stored
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

from .config import SizeConfig
from .layers import Rope, at_least_fp32, rotate
from .masks import Sequences, document_starts
from .plan import CHUNK, Store, head_dim, is_neox
from .stores import Slots, StateStore

# How far write scores spread over the slots before training; equal scores would make all slots the same average.
SHARPNESS = 2.0
# The logit of lambda before training: most of a write goes to the ring.
RING_LOGIT = 2.0


class Steps(NamedTuple):
    """Where the new tokens stand.

    place_BT   [1 or B, T] tokens before each in its document; negative: padding, which writes nothing
    kept_rope  rotary tables of the W positions that a cache keeps before the new tokens; None without a cache
    """

    place_BT: Tensor
    kept_rope: Rope | None


def steps(sequences: Sequences) -> Steps:
    """Of tokens that attend to themselves, without a cache."""
    place_BT = torch.arange(sequences.length, device=sequences.device)[None]
    if sequences.documents_BT is not None:
        place_BT = place_BT - document_starts(sequences.documents_BT)
    return Steps(place_BT, None)


# --- writing


class Router(nn.Module):
    """Rule `gated`, reading A: write strengths by content, p = eta softmax_m(cos(a, M_K[m]) SHARPNESS sqrt(A)).

    a is the write query W_wq x, or in rule `ring_slots` the key itself, of all heads; eta = sigmoid(w a + b[m]) is how
    much of a slot is overwritten. Addressing by cosine is that of neural Turing machines (Graves et al. 2014, 3.3.1);
    erase and add share one strength.
    """

    def __init__(self, size: SizeConfig, store: Store):
        super().__init__()
        width = store.address_dim
        self.query_proj = None if store.window else nn.Linear(size.d_model, width, bias=False)
        self.slot_keys = nn.Linear(width, store.slots, bias=False)  # M_K
        self.gate = nn.Parameter(torch.empty(width))
        self.gate_bias = nn.Parameter(torch.empty(store.slots))

    def forward(self, source: Tensor, place_BT: Tensor) -> Tensor:
        """[B, T, M] strengths, in at least fp32, of tokens given by [B, T, D], or [B, T, A] in rule `ring_slots`."""
        a_BTA = source if self.query_proj is None else self.query_proj(source)
        dtype = at_least_fp32(a_BTA.dtype)
        with exact(a_BTA):
            a_BTA = a_BTA.to(dtype)
            unit_BTA, keys_MA = (F.normalize(x, dim=-1) for x in (a_BTA, self.slot_keys.weight.to(dtype)))
            score_BTM = F.linear(unit_BTA, keys_MA) * SHARPNESS * math.sqrt(a_BTA.shape[-1])
            gate_BTM = (a_BTA * self.gate.to(dtype)).sum(-1, keepdim=True) + self.gate_bias.to(dtype)
            return self.strengths(score_BTM, gate_BTM, place_BT) * (place_BT >= 0).unsqueeze(-1)

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, place_BT: Tensor) -> Tensor:
        return gate_BTM.sigmoid() * score_BTM.softmax(dim=-1)


class RingRouter(Router):
    """Rule `ring_router`, reading D: p = lambda onehot(t mod M) + (1 - lambda) r, r and lambda as in `Router`.

    lambda = 1 is a sliding window of M. Until the ring has come round, slots it has not reached are not written.
    """

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, place_BT: Tensor) -> Tensor:
        ring_BTM = F.one_hot(place_BT % score_BTM.shape[-1], score_BTM.shape[-1]).to(score_BTM.dtype)
        reached_BTM = reached(place_BT, score_BTM.shape[-1])
        content_BTM = score_BTM.masked_fill(~reached_BTM, -math.inf).softmax(dim=-1)
        share_BTM = (gate_BTM + RING_LOGIT).sigmoid()
        return share_BTM * ring_BTM + (1 - share_BTM) * content_BTM


def reached(place_BT: Tensor, slots: int) -> Tensor:
    """[B, T, M] slots that a ring has written by then."""
    return torch.arange(slots, device=place_BT.device) <= place_BT.clamp(min=0).unsqueeze(-1)


class BoundedWriter(nn.Module):
    """Keys and values, where they are written, and the states between chunks.

    The slots it hands to readers: what is written at each token (k [B, T, K, H], v, p [B, T, M]), and the states before
    each chunk and after the last, keys beside values ([B, Z + 1, M, K, 2H]). In rule `ring_slots`, reading C, what is
    written at a token is the one that leaves the window with it; then also the window's rotated keys and its values
    ([B, T, K, H], or [B, W + T, K, H] over a cache).
    """

    def __init__(self, size: SizeConfig, store: Store):
        super().__init__()
        slot = store.slot
        self.kv_heads, self.window = slot.kv_heads, store.window
        self.k_proj = nn.Linear(size.d_model, slot.kv_heads * slot.k_dim, bias=is_neox(size))
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=is_neox(size))
        self.router = (RingRouter if store.rule == "ring_router" else Router)(size, store)

    def forward(
        self, x_BTD: Tensor, rope: Rope, steps: Steps, store: StateStore | None = None, offset: int = 0
    ) -> Slots:
        """What readers get. A cache has then what is left after these tokens."""
        kept = () if store is None else store.tensors
        slots, after = self.write(x_BTD, rope, steps, kept)
        if store is not None:
            store.keep(after)
        return slots

    def write(self, x_BTD: Tensor, rope: Rope, steps: Steps, kept: Slots) -> tuple[Slots, Slots]:
        """What readers get, and what a cache that had `kept` keeps."""
        k, v = (rearrange(proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads) for proj in (self.k_proj, self.v_proj))
        place_BT, state = steps.place_BT, kept[0] if kept else None
        if self.window is None:
            p_BTM = self.router(x_BTD, place_BT)
            states = chunk_states(k, v, p_BTM, place_BT, state)
            return (k, v, p_BTM, states), (states[:, -1],)
        length = x_BTD.shape[1]
        live_k, live_v, turned = k, v, rotate(k, rope)
        if kept:
            assert steps.kept_rope is not None
            past_k, past_v = (tensor.to(k.dtype) for tensor in kept[1:])
            live_k, live_v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
            turned = torch.cat((rotate(past_k, steps.kept_rope), turned), dim=1)
        # Over a cache the first of the live ones is what leaves the window with the first new token.
        shift = 0 if kept else self.window
        left_k, left_v = (F.pad(x, (0, 0, 0, 0, shift, 0))[:, :length] for x in (live_k, live_v))
        p_BTM = self.router(left_k.flatten(2), place_BT - self.window)
        states = chunk_states(left_k, left_v, p_BTM, place_BT, state)
        after = (states[:, -1], live_k[:, -self.window :], live_v[:, -self.window :])
        return (left_k, left_v, p_BTM, states, turned, live_v), after


def chunk_states(k_BTKH: Tensor, v_BTKH: Tensor, p_BTM: Tensor, place_BT: Tensor, start: Tensor | None) -> Tensor:
    """[B, Z + 1, M, K, 2H] the state before each chunk (the first: `start`, None for nothing) and after the last."""
    with exact(k_BTKH):
        chunks = Chunks(p_BTM, place_BT)
        kv_BZCKE = chunks.split(torch.cat((k_BTKH, v_BTKH), dim=-1).to(p_BTM.dtype))
        held_BZM, weight_BZCM = (x.squeeze(2) for x in chunks.influence(slice(-1, None)))
        written = torch.einsum("bzjm,bzjke->bzmke", weight_BZCM, kv_BZCKE)
        start = torch.zeros_like(written[:, 0]) if start is None else start.to(written.dtype)
        states: Tensor = scan(held_BZM, written, start)
        return states


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

    def __init__(self, p_BTM: Tensor, place_BT: Tensor):
        self.length = p_BTM.shape[1]
        self.size = min(CHUNK, self.length)
        self.fill = -self.length % self.size
        more = torch.arange(1, self.fill + 1, device=place_BT.device)
        place_BT = torch.cat((place_BT, place_BT[:, -1:] + more), dim=1)
        self.place_BZC = rearrange(place_BT, "b (z c) -> b z c", c=self.size)
        self.p_BZCM = self.split(p_BTM)
        # The least that a write leaves keeps logarithms finite; an overwritten slot is not known more exactly.
        left = (1 - self.p_BZCM).clamp(min=torch.finfo(p_BTM.dtype).eps)
        index = torch.arange(self.size, device=p_BTM.device)
        distance = index[:, None] - index
        self.seen_BZCC1 = ((distance >= 0) & (distance <= self.place_BZC.unsqueeze(-1))).unsqueeze(-1)
        # Summed from the chunk's or the document's start: a cumulative sum would carry another document's rounding.
        self.log_BZCM = left.log().unsqueeze(2).where(self.seen_BZCC1, 0).sum(dim=3)

    def split(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.fill))
        return rearrange(padded, "b (z c) ... -> b z c ...", c=self.size)

    def join(self, x: Tensor) -> Tensor:
        return rearrange(x, "b z c ... -> b (z c) ...")[:, : self.length]

    def influence(self, reads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """For tokens `reads` of each chunk, what is left in each slot of the state before the chunk ([B, Z, i, M]) and
        of each of its tokens ([B, Z, i, j, M]): nothing of another document."""
        index = torch.arange(self.size, device=self.p_BZCM.device)
        log, seen = self.log_BZCM[:, :, reads], self.seen_BZCC1[:, :, reads]
        begun = (self.place_BZC[:, :, reads] > index[reads]).unsqueeze(-1)
        state = log.masked_fill(~begun, -math.inf).exp()
        faded = (log.unsqueeze(3) - self.log_BZCM.unsqueeze(2)).masked_fill(~seen, -math.inf)
        return state, faded.exp() * self.p_BZCM.unsqueeze(2)


# --- reading


class SlotRead:
    """The slots as each token finds them, never made: scores against them, and sums over them."""

    def __init__(self, slots: Slots, place_BT: Tensor):
        k_BTKH, v_BTKH, p_BTM, states = slots[:4]
        self.chunks = Chunks(p_BTM, place_BT)
        self.k_BZCKH, self.v_BZCKH = (self.chunks.split(x.to(p_BTM.dtype)) for x in (k_BTKH, v_BTKH))
        self.state_k, self.state_v = states[:, :-1].chunk(2, dim=-1)
        held, self.weight_BZCCM = self.chunks.influence()
        self.held = rearrange(held, "b z i m -> b z i 1 1 m")

    def scores(self, q_BTNH: Tensor) -> Tensor:
        """[B, T, N, M] q S^k."""
        q = self.chunks.split(rearrange(q_BTNH, "b t (k g) h -> b t k g h", k=self.k_BZCKH.shape[3]))
        pair = torch.einsum("bzikgh,bzjkh->bzikgj", q, self.k_BZCKH)
        new = torch.einsum("bzikgj,bzijm->bzikgm", pair, self.weight_BZCCM)
        old = torch.einsum("bzikgh,bzmkh->bzikgm", q, self.state_k) * self.held
        return self.chunks.join(rearrange(old + new, "b z i k g m -> b z i (k g) m"))

    def values(self, share_BTNM: Tensor) -> Tensor:
        """[B, T, N, H] share S^v."""
        share = self.chunks.split(rearrange(share_BTNM, "b t (k g) m -> b t k g m", k=self.k_BZCKH.shape[3]))
        pair = torch.einsum("bzikgm,bzijm->bzikgj", share, self.weight_BZCCM)
        new = torch.einsum("bzikgj,bzjkh->bzikgh", pair, self.v_BZCKH)
        old = torch.einsum("bzikgm,bzmkh->bzikgh", share * self.held, self.state_v)
        return self.chunks.join(rearrange(old + new, "b z i k g h -> b z i (k g) h"))


class WindowRead:
    """The last W positions, in blocks of queries that look at their own block and the W positions before it."""

    def __init__(self, k_BSKH: Tensor, v_BSKH: Tensor, place_BT: Tensor, window: int, dtype: torch.dtype):
        self.length, past = place_BT.shape[1], k_BSKH.shape[1] - place_BT.shape[1]
        self.block = min(window, self.length)
        fill = -self.length % self.block
        front = window if not past and self.length > self.block else 0
        before = past + front
        padded = (F.pad(x.to(dtype), (0, 0, 0, 0, front, fill)) for x in (k_BSKH, v_BSKH))
        self.k, self.v = (x.unfold(1, before + self.block, self.block) for x in padded)  # [B, Z, K, H, L]
        index = torch.arange(self.block, device=place_BT.device)[:, None]
        distance = index + before - torch.arange(before + self.block, device=place_BT.device)
        place = rearrange(F.pad(place_BT, (0, fill)).clamp(min=0), "b (z c) -> b z c 1", c=self.block)
        seen = (distance >= 0) & (distance < window) & (distance <= place)
        self.seen_BTNL = rearrange(seen, "b z c l -> b (z c) 1 l")[:, : self.length]
        self.fill = fill

    def scores(self, q_BTNH: Tensor) -> Tensor:
        """[B, T, N, L] q k, minus infinity where it is not visible."""
        score = torch.einsum("bzikgh,bzkhl->bzikgl", self.split(q_BTNH), self.k)
        joined = rearrange(score, "b z i k g l -> b (z i) (k g) l")[:, : self.length]
        return joined.masked_fill(~self.seen_BTNL, -math.inf)

    def values(self, share_BTNL: Tensor) -> Tensor:
        """[B, T, N, H] share v."""
        out = torch.einsum("bzikgl,bzkhl->bzikgh", self.split(share_BTNL), self.v)
        return rearrange(out, "b z i k g h -> b (z i) (k g) h")[:, : self.length]

    def split(self, x_BTNE: Tensor) -> Tensor:
        padded = F.pad(x_BTNE, (0, 0, 0, 0, 0, self.fill))
        return rearrange(padded, "b (z c) (k g) e -> b z c k g e", c=self.block, k=self.k.shape[2])


class BoundedReader(nn.Module):
    """Queries of this layer over shared slots and, in rule `ring_slots`, the window beside them, in one softmax.

    A sink is one more score per query head, of something worth nothing. Slots that hold nothing yet are not seen.
    """

    def __init__(self, size: SizeConfig, store: Store):
        super().__init__()
        self.num_heads, width = size.num_heads, head_dim(size)
        self.window, self.ring, self.scale = store.window, store.rule == "ring_router", width**-0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * width, bias=is_neox(size))
        self.o_proj = nn.Linear(self.num_heads * width, size.d_model, bias=is_neox(size))
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None

    def forward(self, x_BTD: Tensor, slots: Slots, rope: Rope, steps: Steps) -> Tensor:
        q_BTNH = rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads)
        with exact(x_BTD):
            out_BTNH = self.read(q_BTNH, slots, rope, steps.place_BT)
        out: Tensor = self.o_proj(rearrange(out_BTNH.to(q_BTNH.dtype), "b t n h -> b t (n h)"))
        return out

    def read(self, q_BTNH: Tensor, slots: Slots, rope: Rope, place_BT: Tensor) -> Tensor:
        dtype, slot_count = slots[2].dtype, slots[2].shape[-1]
        memory, window = SlotRead(slots, place_BT), None
        q_BTNH = q_BTNH.to(dtype) * self.scale
        parts = [memory.scores(q_BTNH)]
        if self.ring:
            parts[0] = parts[0].masked_fill(~reached(place_BT, slot_count).unsqueeze(2), -math.inf)
        if self.window is not None:
            parts[0] = parts[0].masked_fill((place_BT < self.window)[..., None, None], -math.inf)
            window = WindowRead(slots[4], slots[5], place_BT, self.window, dtype)
            parts.append(window.scores(rotate(q_BTNH, rope)))
        if self.sinks is not None:
            parts.append(self.sinks.to(dtype)[:, None].expand(*q_BTNH.shape[:3], 1))
        sizes = [part.shape[-1] for part in parts]
        share = torch.split(torch.cat(parts, dim=-1).softmax(dim=-1), sizes, dim=-1)
        out_BTNH = memory.values(share[0])
        return out_BTNH if window is None else out_BTNH + window.values(share[1])


def exact(like: Tensor) -> torch.autocast:
    """Nothing is cast inside: states and decays stay as they are."""
    return torch.autocast(like.device.type, enabled=False)
