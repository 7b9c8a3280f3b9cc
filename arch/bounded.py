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
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .chunks import Chunks, SlotRead, WindowRead, exact, softmax_read
from .config import SizeConfig
from .layers import Rope, at_least_fp32, rotate
from .masks import Sequences, document_starts
from .plan import Store, head_dim, is_neox
from .stores import Slots, StateStore

# How far write scores spread over the slots before training; equal scores would make all slots the same average.
SHARPNESS = 2.0
# The logit of lambda before training: half of a write goes to the ring. With more, what was merged fades before a
# router learns to keep it.
RING_LOGIT = 0.0


class Steps(NamedTuple):
    """Where the new tokens stand.

    place_BT   [1 or B, T] tokens before each in its document; negative: padding, which writes nothing
    kept_rope  rotary tables of the W positions that a cache keeps before the new tokens; None without a cache
    kernel     (q_BTNH, k_BTKH, v_BTKH, p_BTM, scale) -> [B, T, N, H], in place of the chunk form; None for that
    """

    place_BT: Tensor
    kept_rope: Rope | None = None
    kernel: Callable[..., Tensor] | None = None


def steps(sequences: Sequences) -> Steps:
    """Of tokens that attend to themselves, without a cache."""
    place_BT = torch.arange(sequences.length, device=sequences.device)[None]
    if sequences.documents_BT is not None:
        place_BT = place_BT - document_starts(sequences.documents_BT)
    return Steps(place_BT)


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

    The slots it hands to readers: what is written at each token (k [B, T, K, H], v, p [B, T, M]), and, where no other
    kernel takes the place of the chunk form, how slots fade within chunks (G [B, Z, C, M]), and the states before each
    chunk and after the last, keys beside values ([B, Z + 1, M, K, 2H]). In rule `ring_slots`, reading C, what is
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
            if steps.kernel is not None:
                return (k, v, p_BTM), ()
            decay, states = bring_up(k, v, p_BTM, place_BT, state)
            return (k, v, p_BTM, decay, states), (states[:, -1],)
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
        decay, states = bring_up(left_k, left_v, p_BTM, place_BT, state)
        after = (states[:, -1], live_k[:, -self.window :], live_v[:, -self.window :])
        return (left_k, left_v, p_BTM, decay, states, turned, live_v), after


def bring_up(k: Tensor, v: Tensor, p_BTM: Tensor, place_BT: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """How slots fade in each chunk, and the states between chunks, from the state `start`."""
    with exact(k):
        chunks = Chunks(place_BT)
        decay_BZCM = chunks.decay(p_BTM)
        return decay_BZCM, chunks.states(k, v, p_BTM, decay_BZCM, start)


# --- reading


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
            if steps.kernel is None:
                out_BTNH = self.read(q_BTNH, slots, rope, steps.place_BT)
            else:
                out_BTNH = steps.kernel(q_BTNH, *slots, scale=self.scale)
        out: Tensor = self.o_proj(rearrange(out_BTNH.to(q_BTNH.dtype), "b t n h -> b t (n h)"))
        return out

    def read(self, q_BTNH: Tensor, slots: Slots, rope: Rope, place_BT: Tensor) -> Tensor:
        dtype, slot_count, seen_BTM = slots[2].dtype, slots[2].shape[-1], None
        if self.ring:
            seen_BTM = reached(place_BT, slot_count)
        if self.window is not None:
            seen_BTM = (place_BT >= self.window).unsqueeze(-1)
        q_BTNH = q_BTNH.to(dtype) * self.scale
        reads: list[tuple[SlotRead | WindowRead, Tensor]] = [(SlotRead(slots, place_BT, seen_BTM), q_BTNH)]
        if self.window is not None:
            near = WindowRead(slots[5], slots[6], place_BT, self.window, dtype)
            reads.append((near, rotate(q_BTNH, rope)))
        sinks_BTN = None if self.sinks is None else self.sinks.to(dtype).expand(q_BTNH.shape[:3])
        return softmax_read(reads, sinks_BTN)
