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

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .attend import sdpa
from .bounded_spec import CHUNK, SCORES, WINDOW_BLOCKS, BoundedSpec
from .bounded_triton import kernels, triton_advance, triton_retreat
from .buffers import StateBuffer, Step
from .config import SizeConfig, has_qkv_bias, head_dim, style_of
from .grouped import GroupedKV
from .layers import Rope, build_head_norm, build_output_gate, gate_output, norm_heads, rotate, rotate_step
from .masks import Dense
from .positions import Near, TokenPositions, written_slots
from .precision import at_least_fp32, no_autocast
from .store_spec import StoreSpec

# How far write scores spread over the slots before training; equal scores would make all slots the same average.
SHARPNESS = 2.0
# The logit of lambda before training: half of a write goes to the ring. With more, what was merged fades before a
# router learns to keep it.
RING_LOGIT = 0.0
# The score of what is not seen. Finite: where nothing is seen, a softmax has no NaN, and its result no weight.
UNSEEN = -1e30


# --- the parallel form: chunks of C tokens
#
# e^{G_i - G_j}, never more than 1 where it counts, is a product of e^{G_i - R} and e^{R - G_j}, so that reads are plain
# matrix products. R lies in the middle of the values of G in the chunk. Of a slot a write leaves at least the type's
# resolution: with chunks of 8 no factor is more than e^64 in fp32, which ends at e^88.


# --- products
#
# Strengths, and the sums of their logarithms, are of fp32 everywhere. Products with keys and values that were of half
# precision need no more bits than these: tensor cores compute them, with 10 bits of each factor and sums of fp32. The
# switch for that is of a whole process, so that it is on within one operator alone.
#
# Exported folders carry a copy of this file. An operator that two copies define would leave the first one's dangling.
NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{NAMESPACE}::tf32_bmm", mutates_args=())
def tf32_bmm(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm in TF32, of matrices of fp32 on CUDA."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        return torch.bmm(left, right)
    finally:
        matmul.fp32_precision = before


@tf32_bmm.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:2], right.shape[2])


def _save_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_product(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    left, right = ctx.saved_tensors
    return tf32_bmm(gradient, right.mT), tf32_bmm(left.mT, gradient)


tf32_bmm.register_autograd(_backward_of_product, setup_context=_save_factors)


def product(left: Tensor, right: Tensor, tf32: bool) -> Tensor:
    return tf32_bmm(left, right) if tf32 else torch.bmm(left, right)


# --- states between chunks

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def advance(decay_ZBM: Tensor, written_ZBKME: Tensor, states_ZBKME: Tensor) -> None:
    """Fill in the states [Z + 1, ...] after the first, in place: s_z+1 = decay_z s_z + written_z."""
    parts, decays = states_ZBKME.unbind(), decay_ZBM[:, :, None, :, None].unbind()
    for z, new in enumerate(written_ZBKME.unbind()):
        torch.addcmul(new, decays[z], parts[z], out=parts[z + 1])


def retreat(decay_ZBM: Tensor, states_ZBKME: Tensor, sums_ZBKME: Tensor) -> Tensor:
    """Add to the gradient of each state what comes from later ones, in place; return that of `decay`."""
    sums, decays = sums_ZBKME.unbind(), decay_ZBM[:, :, None, :, None].unbind()
    for z in reversed(range(len(decays))):
        sums[z].addcmul_(decays[z], sums[z + 1])
    return (sums_ZBKME[1:] * states_ZBKME[:-1]).sum(dim=(2, 4))


@functools.cache
def recurrence(device_type: str) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """`advance` and `retreat`: one kernel each where the device is CUDA and Triton is installed."""
    if device_type == "cuda" and kernels() is not None:
        return triton_advance, triton_retreat
    return advance, retreat


def run_scan(
    decay_ZBM: Tensor, share_ZBCM: Tensor, k_ZBKCH: Tensor, v_ZBKCH: Tensor, start_BKME: Tensor, tf32: bool = False
) -> Tensor:
    """[Z + 1, B, K, M, E] s_0 = start, s_z+1 = decay_z s_z + share_z^T (k_z | v_z)."""
    shape = *k_ZBKCH.shape[:3], decay_ZBM.shape[-1], start_BKME.shape[-1]
    share = share_ZBCM.unsqueeze(2).expand(*shape[:3], -1, -1).flatten(0, 2)
    written = product(share.mT, torch.cat((k_ZBKCH, v_ZBKCH), dim=-1).flatten(0, 2), tf32).view(shape)
    states = written.new_empty(shape[0] + 1, *shape[1:])
    states[0] = start_BKME
    recurrence(states.device.type)[0](decay_ZBM, written, states)
    return states


def run_scan_backward(
    gradient: Tensor,
    decay_ZBM: Tensor,
    share_ZBCM: Tensor,
    k_ZBKCH: Tensor,
    v_ZBKCH: Tensor,
    states: Tensor,
    tf32: bool = False,
) -> Gradients:
    """Gradients of the inputs of `run_scan`; that of its result is overwritten."""
    decay = recurrence(states.device.type)[1](decay_ZBM, states, gradient)
    after = gradient[1:]
    shape = k_ZBKCH.shape[:3]
    kv = torch.cat((k_ZBKCH, v_ZBKCH), dim=-1).flatten(0, 2)
    share = product(kv, after.flatten(0, 2).mT, tf32).view(*shape, -1, decay.shape[-1]).sum(dim=2)
    shared = share_ZBCM.unsqueeze(2).expand(*shape, -1, -1).flatten(0, 2)
    k, v = product(shared, after.flatten(0, 2), tf32).view(*shape, -1, after.shape[-1]).chunk(2, dim=-1)
    return decay, share, k, v, gradient[0]


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=())
def scan(
    decay_ZBM: Tensor, share_ZBCM: Tensor, k_ZBKCH: Tensor, v_ZBKCH: Tensor, start_BKME: Tensor, tf32: bool = False
) -> Tensor:
    """`run_scan` as one operator, so that no compiler unrolls the loop."""
    return run_scan(decay_ZBM, share_ZBCM, k_ZBKCH, v_ZBKCH, start_BKME, tf32)


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=())
def scan_backward(
    gradient: Tensor,
    decay_ZBM: Tensor,
    share_ZBCM: Tensor,
    k_ZBKCH: Tensor,
    v_ZBKCH: Tensor,
    states: Tensor,
    tf32: bool = False,
) -> Gradients:
    """Gradients of the inputs of `scan`, given that of its result."""
    sums = gradient.clone(memory_format=torch.contiguous_format)
    decay, share, k, v, start = run_scan_backward(sums, decay_ZBM, share_ZBCM, k_ZBKCH, v_ZBKCH, states, tf32)
    # Outputs of an operator may not share a storage.
    return decay, share, k.contiguous(), v.contiguous(), start.clone()


@scan.register_fake
def _(
    decay_ZBM: Tensor, share_ZBCM: Tensor, k_ZBKCH: Tensor, v_ZBKCH: Tensor, start_BKME: Tensor, tf32: bool = False
) -> Tensor:
    return start_BKME.new_empty(decay_ZBM.shape[0] + 1, *start_BKME.shape)


@scan_backward.register_fake
def _(
    gradient: Tensor,
    decay_ZBM: Tensor,
    share_ZBCM: Tensor,
    k_ZBKCH: Tensor,
    v_ZBKCH: Tensor,
    states: Tensor,
    tf32: bool = False,
) -> Gradients:
    decay, share, k, v = (x.new_empty(x.shape) for x in (decay_ZBM, share_ZBCM, k_ZBKCH, v_ZBKCH))
    return decay, share, k, v, states.new_empty(states.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], output)
    ctx.tf32 = inputs[5]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    result: Gradients = scan_backward(gradient, *ctx.saved_tensors, ctx.tf32)
    return *result, None


scan.register_autograd(_backward, setup_context=_save)


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


class BoundedKV(NamedTuple):
    """Keys and values written to the slots at each token, and the strengths of the writes.

    In rule `ring_slots` they are those of the token that leaves the window, and `window` has the rotated keys and the
    values of the window, [B, T, K, H], or [B, W + T, K, H] over a cache. `chunks` is None where another kernel takes
    the place of the chunk form. Of one token over a cache it is the slots after its write, [B, K, M, 2H], and `window`
    is [B, K, W, H], in the order of a ring; the others lack T.
    """

    k_BTKH: Tensor
    v_BTKH: Tensor
    p_BTM: Tensor
    chunks: ChunkWrites | Tensor | None = None
    window: GroupedKV | None = None


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
    sinks_N: Tensor | None,
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
        out, total = Recomputed.apply(sight, q, sinks_N, *writes)  # type: ignore[no-untyped-call]
    elif torch.compiler.is_compiling():
        out, total = read_chunks(sight, q, sinks_N, writes, *split_states(scan(*writes[2:], tf32)))
    else:
        out, total, _ = read_pieces(sight, q, sinks_N, writes)
    return chunks.join(out), chunks.join(total.unsqueeze(-1)).squeeze(-1) if more else None


def pieces(q_ZBKRH: Tensor, num_slots: int) -> list[slice]:
    """Chunks that are read at a time, in order."""
    length = step = q_ZBKRH.shape[0]
    if not q_ZBKRH.is_cuda:
        step = max(1, SCORES * q_ZBKRH.shape[-1] // (q_ZBKRH[0].numel() * num_slots))
    return [slice(z, min(z + step, length)) for z in range(0, length, step)]


def read_pieces(
    sight: Sight, q_ZBKRH: Tensor, sinks_N: Tensor | None, writes: ChunkWrites
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """[Z, B, N, C, H] and [Z, B, N, C] of all chunks, and the states before each of the pieces they were read in."""
    results, starts = [], [writes.start_BKME]
    for part in pieces(q_ZBKRH, writes.share_ZBCM.shape[-1]):
        some = ChunkWrites._make((*(x[part] for x in writes[:-1]), starts[-1]))
        states = run_scan(*some[2:], sight.tf32)
        results.append(read_chunks(sight.part(part), q_ZBKRH[part], sinks_N, some, *split_states(states)))
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
    def forward(
        ctx: Any, sight: Sight, q_ZBKRH: Tensor, sinks_N: Tensor | None, *writes: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, total, starts = read_pieces(sight, q_ZBKRH, sinks_N, ChunkWrites(*writes))
        ctx.more, ctx.tf32, ctx.num_pieces = sight.more, sight.tf32, len(starts)
        ctx.save_for_backward(*sight[:-2], sinks_N, *starts, q_ZBKRH, *writes[:-1])
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, begun, bias, sinks_N, *saved = ctx.saved_tensors
        sight = Sight(seen, begun, bias, ctx.more, ctx.tf32)
        starts, inputs = saved[: ctx.num_pieces], saved[ctx.num_pieces :]
        found = [torch.empty_like(x) for x in inputs]
        of_sinks = None if sinks_N is None else torch.zeros_like(sinks_N)
        of_state = torch.zeros_like(starts[0])
        cuts = pieces(inputs[0], inputs[2].shape[-1])
        for part, start in zip(reversed(cuts), reversed(starts), strict=True):
            q, *some = (x[part] for x in inputs)
            writes = ChunkWrites._make((*some, start))
            given = [x[part] for x in gradients[: 1 + sight.more]]
            of_sink, of_state, new = backward_of_chunks(sight.part(part), q, sinks_N, writes, given, of_state)
            for whole, one in zip(found, new, strict=True):
                whole[part] = one
            if of_sinks is not None and of_sink is not None:
                of_sinks += of_sink
        return None, found[0], of_sinks, *found[1:], of_state


def backward_of_chunks(
    sight: Sight,
    q_ZBKRH: Tensor,
    sinks_N: Tensor | None,
    writes: ChunkWrites,
    gradients: list[Tensor],
    of_state: Tensor,
) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
    """Gradients of the sinks, of the state before the chunks, and of the queries and writes, given those of what was
    read and of the state after them."""
    with no_autocast(q_ZBKRH):
        states = run_scan(*writes[2:], sight.tf32)
        with torch.enable_grad():
            inputs = (q_ZBKRH, writes.faded_ZBCM, writes.share_ZBCM, writes.k_ZBKCH, writes.v_ZBKCH)
            leaves = [x.detach().requires_grad_() for x in (*inputs, *split_states(states))]
            q, faded, share, k, v, state_k, state_v = leaves
            sink = None if sinks_N is None else sinks_N.detach().requires_grad_()
            again = writes._replace(faded_ZBCM=faded, share_ZBCM=share, k_ZBKCH=k, v_ZBKCH=v)
            results = read_chunks(sight, q, sink, again, state_k, state_v)[: len(gradients)]
            wanted = leaves if sink is None else [*leaves, sink]
            of_q, of_faded, of_share, of_k, of_v, of_states_k, of_states_v, *of_sink = torch.autograd.grad(
                results, wanted, gradients
            )
        whole = torch.empty_like(states)
        torch.cat((of_states_k, of_states_v), dim=-1, out=whole[:-1])
        whole[-1] = of_state
        kept, last, more_k, more_v, start = run_scan_backward(whole, *writes[2:-1], states, sight.tf32)
    of_writes = of_faded, of_share, kept, last, of_k.add_(more_k), of_v.add_(more_v)
    return of_sink[0] if of_sink else None, start, (of_q, *of_writes)


def read_chunks(
    sight: Sight,
    q_ZBKRH: Tensor,
    sinks_N: Tensor | None,
    writes: ChunkWrites,
    state_k_ZBKMH: Tensor,
    state_v_ZBKMH: Tensor,
) -> tuple[Tensor, Tensor]:
    """`read_slots` of a few chunks, given the states before each: [Z, B, N, C, H] and [Z, B, N, C]."""
    faded, share, _, _, k, v, _ = writes
    seen, begun, bias, more, tf32 = sight
    (num_chunks, batch, kv_heads, rows, width), (size, num_slots) = q_ZBKRH.shape, share.shape[2:]
    heads = (num_chunks, batch, kv_heads * rows // size)  # then tokens of a chunk
    k, v, state_k, state_v = (x.flatten(0, 2) for x in (k, v, state_k_ZBKMH, state_v_ZBKMH))
    share, faded = share.flatten(0, 1), faded.unsqueeze(2)
    if begun is not None:
        seen, begun = seen.unsqueeze(2), begun[:, :, None, None, :, None]

    def of_begun(x: Tensor) -> Tensor:
        """Set rows of segments that begin in a chunk to 0: they find nothing of the state before it."""
        return x if begun is None else (x.view(num_chunks, batch, kv_heads, -1, size, width) * begun).view(x.shape)

    in_place = not torch.is_grad_enabled()
    times = Tensor.mul_ if in_place else Tensor.mul

    def add(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        if tf32:
            return x + product(left, right, tf32)
        return x.baddbmm_(left, right) if in_place else x.baddbmm(left, right)

    q = q_ZBKRH.flatten(0, 2)
    pair = times(product(q, k.mT, tf32).view(*heads, size, size), seen)
    score = product(of_begun(q), state_k.mT, tf32).view(share.shape[0], -1, num_slots)
    score = add(score, pair.view(share.shape[0], -1, size), share).view(*heads, size, num_slots)
    score = times(score, faded) if bias is None else torch.addcmul(bias, score, faded)
    if more or sinks_N is not None:
        total = score.logsumexp(dim=-1)
        if sinks_N is not None:
            total = torch.logaddexp(total, sinks_N.unsqueeze(-1))
        weight = (score - total.unsqueeze(-1)).exp()
    else:
        total, weight = score.new_zeros(heads[:1]), score.softmax(dim=-1)
    weight = times(weight, faded)
    pair = product(weight.view(share.shape[0], -1, num_slots), share.mT, tf32).view(*heads, size, size)
    new = product(times(pair, seen).view(-1, rows, size), v, tf32)
    weight = weight.view(-1, rows, num_slots)
    out = add(new, weight, state_v) if begun is None else new + of_begun(product(weight, state_v, tf32))
    return out.view(*heads, size, width), total


# --- the window beside the slots


def run_near(q_BTNH: Tensor, window: GroupedKV, near: Near, scale: float) -> tuple[Tensor, Tensor]:
    """[B, T, N, H] attention over the window by its kernel, in the type of its values, and [B, T, N] the logarithm of
    the sum that weights were divided by."""
    dtype = window.v_BSKH.dtype
    out_BTNH, lse_BNT = near.kernel(*(x.to(dtype) for x in (q_BTNH, *window)), near.form, scale)
    return out_BTNH, lse_BNT.transpose(1, 2)


def merge(near_BTNH: Tensor, lse_BTN: Tensor, far_BTNH: Tensor, total_BTN: Tensor) -> Tensor:
    """One softmax of two, each with the logarithm of its sum; [B, T, N, H] in the type of the second."""
    share_BTN1 = torch.sigmoid(total_BTN - lse_BTN).unsqueeze(-1)
    return torch.lerp(near_BTNH.to(far_BTNH.dtype), far_BTNH, share_BTN1)


def read_window(
    q_BTNH: Tensor, weight_BTN: Tensor, window: GroupedKV, positions: TokenPositions, length: int
) -> tuple[Tensor, Tensor]:
    """[B, T, N, H] attention over the last `length` positions, and [B, T, N] the share in its softmax of something else
    whose score is `weight_BTN`, which is worth nothing here. Queries are scaled; keys and values as in BoundedKV.

    The score is one more coordinate of a query, and the something else a key that has nothing but 1 there.
    """
    width, tokens = q_BTNH.shape[-1], q_BTNH.shape[1]
    pad = -(width + 1) % 8
    q = torch.cat((q_BTNH, weight_BTN.unsqueeze(-1), q_BTNH.new_zeros(()).expand(*weight_BTN.shape, pad)), dim=-1)
    k, v = (F.pad(x.to(q.dtype), (0, 1 + pad)) for x in window)
    other = (torch.arange(q.shape[-1], device=q.device) == width).to(q.dtype)
    plain = not positions.segmented and positions.position_BT.shape[0] == 1 and k.shape[1] == tokens
    first = min(length, tokens) if plain else 0
    outs = []
    if first:
        outs.append(read_first(q[:, :first], k[:, :first], v[:, :first], other))
    if first < tokens:
        outs.append(read_blocks(q[:, first:], k, v, other, None if plain else positions, length))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out[..., :width], out[..., width].contiguous()  # a view would keep all of it for the backward pass


def read_first(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    """Read what is before a token, no more than a window. The other key comes first, and a query for it."""
    q = F.pad(q, (0, 0, 0, 0, 1, 0))
    k, v = (torch.cat((other.expand_as(x[:, :1]), x), dim=1) for x in (k, v))
    return sdpa(q, k, v, Dense(causal=True, allowed=None), 1.0, None)[:, 1:]


def read_blocks(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, positions: TokenPositions | None, window: int
) -> Tensor:
    """Read windows, by blocks of queries that look at the positions of the block and the W before it.

    Of these, the first is too far from all, and its place is taken by the other key. `positions` None: all queries have
    a whole window before them, of those that come first in `k`.
    """
    batch, length = q.shape[:2]
    block = min(-(-window // WINDOW_BLOCKS), length)
    fill, before = -length % block, k.shape[1] - length
    front, looked = window - before, window + block
    key = torch.arange(looked, device=q.device)
    distance = torch.arange(window, looked, device=q.device)[:, None] - key
    allowed = (distance >= 0) & (distance < window)
    if positions is not None:
        place_BT = positions.position_BT[:, -length:]
        place = F.pad(place_BT.clamp(min=0), (0, fill)).view(place_BT.shape[0], -1, 1, block, 1)
        allowed = (allowed & (distance <= place)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    allowed = allowed | (key == 0)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, front, fill)).unfold(1, looked, block).permute(0, 1, 4, 2, 3)[:, :, 1:] for x in (k, v)
    )
    k, v = (torch.cat((other.expand_as(x[:, :, :1]), x), dim=2).flatten(0, 1) for x in (keys, values))
    q = rearrange(F.pad(q, (0, 0, 0, 0, 0, fill)), "b (z c) n h -> (b z) c n h", c=block)
    out = sdpa(q, k, v, Dense(causal=False, allowed=allowed), 1.0, None)
    return rearrange(out, "(b z) c n h -> b (z c) n h", b=batch)[:, :length]


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
        assert kv.window is not None
        window_k, window_v = (x.to(dtype).flatten(0, 1) for x in kv.window)
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
            score_BTM = F.linear(unit_BTA, keys_MA) * SHARPNESS * math.sqrt(a_BTA.shape[-1])
            gate_BTM = (a_BTA * self.gate.to(dtype)).sum(-1, keepdim=True) + self.gate_bias.to(dtype)
            p_BTM = self.strengths(score_BTM, gate_BTM, position_BT)
            return p_BTM if all_write else p_BTM * (position_BT >= 0).unsqueeze(-1)

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
        return gate_BTM.sigmoid() * score_BTM.softmax(dim=-1)


class RingRouter(Router):
    """Rule `ring_router`, reading D: p = lambda onehot(t mod M) + (1 - lambda) r, r and lambda as in `Router`.

    lambda = 1 is a sliding window of M. Until the ring has come round, slots it has not reached are not written.
    """

    def strengths(self, score_BTM: Tensor, gate_BTM: Tensor, position_BT: Tensor) -> Tensor:
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
        k, v = (proj(x_BTD).view(*x_BTD.shape[:2], self.kv_heads, -1) for proj in (self.k_proj, self.v_proj))
        k, window = norm_heads(self.k_norm, k), None
        if self.window is None:
            p_BTM = self.router(x_BTD, positions.position_BT)
        else:
            k, v, window = self.leave_window(k, v, rope, positions, buffer, empty)
            p_BTM = self.router(k.flatten(2), positions.position_BT - self.window)
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
        if buffer is None or empty:
            k, v = (F.pad(x, (0, 0, 0, 0, self.window, 0))[:, :length] for x in (k, v))
        else:
            assert positions.evicted_rope is not None
            past = buffer.at(position_BT[:, :1] + torch.arange(self.window, device=k.device))
            past_k, past_v = (x.transpose(1, 2).to(k.dtype) for x in past)
            left_k = rotate(past_k[:, :length], positions.evicted_rope)
            read = GroupedKV(*(torch.cat(pair, dim=1) for pair in zip((past_k, past_v), read, strict=True)))
            k, v = (torch.cat(pair, dim=1)[:, :length] for pair in ((left_k, k), (past_v, v)))
        if buffer is not None:
            newest = min(length, self.window)
            buffer.put(position_BT[:, -newest:], (rotated_k[:, -newest:], read.v_BSKH[:, -newest:]))
        return k, v, read

    def step(
        self, x_BD: Tensor, rope: Rope, positions: TokenPositions, buffer: StateBuffer, offset: int | Tensor
    ) -> BoundedKV:
        """`forward` for one token of each row. A tensor as `offset` is never 0."""
        assert positions.step is not None
        state_BKME, ring = buffer.tensors[0], positions.step.ring
        k, v = (proj(x_BD).view(len(x_BD), self.kv_heads, -1) for proj in (self.k_proj, self.v_proj))
        k = norm_heads(self.k_norm, k)
        source_BA, position_B1, window = x_BD, positions.position_BT, None
        if self.window is not None:
            assert positions.evicted_rope is not None
            new = rotate_step(k, rope), v
            past_k, past_v = (x.to(k.dtype) for x in buffer.slot(ring))
            k, v = rotate_step(past_k, positions.evicted_rope), past_v
            source_BA, position_B1, window = k.flatten(1), position_B1 - self.window, GroupedKV(*buffer.tensors[1:])
        written_BKE = torch.cat((k, v), dim=-1).to(state_BKME.dtype)
        if self.window is not None:
            buffer.put_slot(ring, new)  # only now: what leaves the window may be a view of its slot
        p_BM = self.router(source_BA.unsqueeze(1), position_B1, positions.step.all_write).squeeze(1)
        if isinstance(offset, int) and not offset:
            state_BKME.zero_()
        state_BKME.lerp_(written_BKE.unsqueeze(2), p_BM.to(state_BKME.dtype)[:, None, :, None])
        return BoundedKV(k, v, p_BM, state_BKME, window)


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
        sinks_N = None if self.sinks is None else self.sinks.to(dtype)
        scaled_BTNH = q_BTNH.to(dtype) * self.scale
        assert isinstance(kv.chunks, ChunkWrites)
        seen_BTM = None
        if self.ring:
            seen_BTM = written_slots(positions.position_BT, kv.p_BTM.shape[-1])
        if self.window is not None:
            seen_BTM = (positions.position_BT >= self.window).unsqueeze(-1)
        more = self.window is not None
        out_BTNH, total_BTN = read_slots(scaled_BTNH, kv.chunks, positions, seen_BTM, sinks_N, more, tf32)
        if self.window is None:
            return out_BTNH
        assert kv.window is not None and total_BTN is not None
        if positions.near is not None:
            near = run_near(rotate(q_BTNH, rope), kv.window, positions.near, self.scale)
            return merge(*near, out_BTNH, total_BTN)
        rotated_BTNH = rotate(scaled_BTNH, rope)
        near_BTNH, share_BTN = read_window(rotated_BTNH, total_BTN, kv.window, positions, self.window)
        return torch.addcmul(near_BTNH, share_BTN.unsqueeze(-1), out_BTNH)

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
