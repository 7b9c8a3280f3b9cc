"""Stores of a matrix per head: the gated delta rule (Gated DeltaNet, Yang et al. 2024) and KDA (Kimi Linear, 2025).

A token lets the state of each head fade, corrects what the state says about its key, and reads it with its query:

    S' = a_t S_{t-1}        S_t = S' + k_t (b_t (v_t - S'^T k_t))^T        o_t = S_t^T q_t / sqrt(K)

a is a number per head (rule `gated_delta`) or per channel of the keys (rule `kda`), in (0, 1]; b = sigmoid(W x).
Queries, keys and values pass a short causal convolution and a SiLU; queries and keys then have length 1. What is read
is normalised and gated. The cache holds S and the last inputs of the convolution, in at least fp32. Nothing has a
position.

One token over a cache does just that. Several have an exact parallel form over chunks of C tokens (the WY form of the
delta rule, Yang et al. 2024, "Parallelizing linear transformers with the delta rule"). With G_i the sum of log a from
the chunk's start to i, D_ij = e^{G_i - G_j} for j <= i, and S the state before the chunk, the corrections u solve a
triangular system, and all else are products:

    u_i + b_i sum_{j<i} (k_i D_ij k_j) u_j = b_i (v_i - S^T e^{G_i} k_i)
    o_i = S^T e^{G_i} q_i + sum_{j<=i} (q_i D_ij k_j) u_j
    S_next = e^{G_C} S + sum_j D_Cj k_j u_j^T

Shapes: B batch, T new tokens, D model, X channels of the convolution, W its width; Z chunks, C (i, j) tokens of a
chunk, N states (value heads), J key heads, K and V their widths, A 1 or K (decays).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .buffers import StateBuffer, Step
from .config import SizeConfig
from .delta_spec import MatrixSpec, delta_chunk
from .init import OwnInit
from .layers import RMSNorm, Rope
from .positions import TokenPositions
from .precision import at_least_fp32, no_autocast
from .store_spec import StoreSpec

# Added to the squared length of queries and keys, as in the references.
LENGTH_EPS = 1e-6

# Exported folders carry a copy of this file. An operator that two copies define would leave the first one's dangling.
NAMESPACE = __name__.replace(".", "_")

States = tuple[Tensor, Tensor]


def apart(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """`x` with one axis as several."""
    out: Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return out


# --- from chunk to chunk


def run_states(
    kept_ZBNA: Tensor, k_ZBNCK: Tensor, erase_ZBNCK: Tensor, new_ZBNCV: Tensor, start_BNKV: Tensor
) -> States:
    """[Z + 1, B, N, K, V] s_0 = start, s_z+1 = kept_z s_z + k_z^T u_z, and all u_z = new_z - erase_z s_z."""
    length, batch, heads, _, width = new_ZBNCV.shape
    states = new_ZBNCV.new_empty(length + 1, batch * heads, start_BNKV.shape[-2], width)
    found = new_ZBNCV.flatten(1, 2).clone()
    states[0] = start_BNKV.flatten(0, 1)
    kept, k, erase = kept_ZBNA.flatten(1, 2).unsqueeze(-1), k_ZBNCK.flatten(1, 2), erase_ZBNCK.flatten(1, 2)
    for z in range(length):
        found[z].baddbmm_(erase[z], states[z], alpha=-1)
        torch.mul(states[z], kept[z], out=states[z + 1])
        states[z + 1].baddbmm_(k[z].mT, found[z])
    return apart(states, 1, batch, heads), apart(found, 1, batch, heads)


def run_states_backward(
    of_states: Tensor, of_found: Tensor, kept: Tensor, k: Tensor, erase: Tensor, states: Tensor, found: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the inputs of `run_states`, given those of its results."""
    batch, heads = found.shape[1:3]
    kept, k, erase, states, found = (x.flatten(1, 2) for x in (kept, k, erase, states, found))
    after = of_states.flatten(1, 2).clone()
    new = of_found.flatten(1, 2).clone()
    for z in reversed(range(len(new))):
        new[z].baddbmm_(k[z], after[z + 1])
        after[z].addcmul_(after[z + 1], kept[z].unsqueeze(-1))
        after[z].baddbmm_(erase[z].mT, new[z], alpha=-1)
    of_kept = (after[1:] * states[:-1]).sum(dim=-1)
    if kept.shape[-1] == 1:
        of_kept = of_kept.sum(dim=-1, keepdim=True)
    of_k = torch.matmul(found, after[1:].mT)
    of_erase = torch.matmul(new, states[:-1].mT).neg_()
    gradients = (apart(x, 1, batch, heads) for x in (of_kept, of_k, of_erase, new))
    return *gradients, apart(after[0].clone(), 0, batch, heads)


@torch.library.custom_op(f"{NAMESPACE}::delta_states", mutates_args=())
def delta_states(kept: Tensor, k: Tensor, erase: Tensor, new: Tensor, start: Tensor) -> States:
    """`run_states` as one operator, so that no compiler unrolls the loop."""
    return run_states(kept, k, erase, new, start)


@torch.library.custom_op(f"{NAMESPACE}::delta_states_backward", mutates_args=())
def delta_states_backward(
    of_states: Tensor, of_found: Tensor, kept: Tensor, k: Tensor, erase: Tensor, states: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`run_states_backward` as one operator."""
    kept, k, erase, new, start = run_states_backward(of_states, of_found, kept, k, erase, states, found)
    return kept, k, erase, new, start


@delta_states.register_fake
def _(kept: Tensor, k: Tensor, erase: Tensor, new: Tensor, start: Tensor) -> States:
    return start.new_empty(new.shape[0] + 1, *start.shape), new.new_empty(new.shape)


@delta_states_backward.register_fake
def _(
    of_states: Tensor, of_found: Tensor, kept: Tensor, k: Tensor, erase: Tensor, states: Tensor, found: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = (x.new_empty(x.shape) for x in (kept, k, erase, found, states[0]))
    kept, k, erase, new, start = made
    return kept, k, erase, new, start


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: States) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


def _backward(ctx: Any, of_states: Tensor, of_found: Tensor) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = delta_states_backward(of_states, of_found, *ctx.saved_tensors)
    return result


delta_states.register_autograd(_backward, setup_context=_save)


# --- the parallel form: chunks of C tokens


class Chunks:
    """Tokens in chunks of a power of two, the last one filled up with tokens that write nothing.

    seen    [C, C], with segments [Z, B, 1, C, C]: where a token finds another of its chunk
    begun   with segments [Z, B, 1, C, 1]: where a token finds what was before its chunk; None: all do
    """

    def __init__(self, positions: TokenPositions, length: int):
        self.length, self.size = length, delta_chunk(length)
        self.fill = -length % self.size
        index = torch.arange(self.size, device=positions.position_BT.device)
        distance = index[:, None] - index
        self.seen, self.begun = distance >= 0, None
        if positions.segmented:
            place_ZBC = rearrange(F.pad(positions.position_BT, (0, self.fill)), "b (z c) -> z b c", c=self.size)
            self.seen = self.seen & (distance <= place_ZBC.unsqueeze(-1)).unsqueeze(2)
            self.begun = (place_ZBC > index)[:, :, None, :, None]

    def split(self, x_BTNH: Tensor) -> Tensor:
        padded = F.pad(x_BTNH, (0, 0, 0, 0, 0, self.fill)) if self.fill else x_BTNH
        return rearrange(padded, "b (z c) n h -> z b n c h", c=self.size).contiguous()

    def join(self, x_ZBNCH: Tensor) -> Tensor:
        joined = rearrange(x_ZBNCH, "z b n c h -> b (z c) n h")
        return joined[:, : self.length] if self.fill else joined


class Faded(NamedTuple):
    """Tokens of each chunk as others find them; sums of log a have no difference of large sums in them.

    q_of_k, k_of_k  [Z, B, N, C, C] q_i D_ij k_j and k_i D_ij k_j; 0 where i does not see j
    since           [Z, B, N, C, A] e^{G_i}: what a token finds of the state before the chunk
    until           [Z, B, N, C, A] D_Cj: what the chunk's end finds of a token
    """

    q_of_k: Tensor
    k_of_k: Tensor
    since: Tensor
    until: Tensor


def fade(q_ZBNCK: Tensor, k_ZBNCK: Tensor, log_ZBNCA: Tensor, chunks: Chunks) -> Faded:
    """Compute what is left of each token for later ones, given log a."""
    if log_ZBNCA.shape[-1] == 1:
        later = torch.ones_like(chunks.seen).tril(-1)
        sums_ZBNCC = torch.where(later, log_ZBNCA, 0.0).cumsum(dim=-2)
        left = sums_ZBNCC.masked_fill(~chunks.seen, -math.inf).exp()
        since, until = log_ZBNCA.cumsum(dim=-2).exp(), left[..., -1, :].unsqueeze(-1)
        q_of_k, k_of_k = q_ZBNCK @ k_ZBNCK.mT * left, k_ZBNCK @ k_ZBNCK.mT * left
    else:
        pairs, since, until = fade_by_halves(torch.stack((q_ZBNCK, k_ZBNCK)), k_ZBNCK, log_ZBNCA)
        q_of_k, k_of_k = pairs * chunks.seen
        since, until = since.exp(), until.exp()
        if chunks.begun is not None:
            until = until * chunks.seen[..., -1, :, None]
    return Faded(q_of_k, k_of_k, since if chunks.begun is None else since * chunks.begun, until)


def fade_by_halves(rows_2ZBNCK: Tensor, k_ZBNCK: Tensor, log_ZBNCK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[2, Z, B, N, C, C] row_i D_ij k_j for j <= i, where each channel fades on its own; and sums of log a, from a
    chunk's start to each token, it included, and from it to the end.

    e^{G_i} and e^{-G_j} by themselves overflow. A block is two halves: keys of the first fade until its end, rows of
    the second since then, by factors of at most 1; pairs within a half come of its own halves.
    """
    blocks = (rows_2ZBNCK * k_ZBNCK).sum(dim=-1)[..., None, None]
    since = log_ZBNCK.unsqueeze(-2)
    until, half = torch.zeros_like(since), 1
    while half < k_ZBNCK.shape[-2]:
        rows, k = (
            apart(rows_2ZBNCK, -2, -1, 2, half)[..., 1, :, :],
            apart(k_ZBNCK, -2, -1, 2, half)[..., 0, :, :],
        )
        (since_1, since_2), (until_1, until_2), (first, second) = (
            apart(x, -3, -1, 2).unbind(dim=-3) for x in (since, until, blocks)
        )
        across = (rows * since_2.exp()) @ (k * until_1.exp()).mT
        blocks = torch.cat((F.pad(first, (0, half)), torch.cat((across, second), dim=-1)), dim=-2)
        since, until = (
            torch.cat((since_1, since_2 + since_1[..., -1:, :]), dim=-2),
            torch.cat((until_1 + since_2[..., -1:, :], until_2), dim=-2),
        )
        half *= 2
    return blocks.squeeze(-3), since.squeeze(-3), until.squeeze(-3)


def read_chunks(
    q_BTNK: Tensor,
    k_BTNK: Tensor,
    v_BTNV: Tensor,
    log_BTNA: Tensor,
    b_BTN: Tensor,
    positions: TokenPositions,
    start_BNKV: Tensor | None,
) -> States:
    """[B, T, N, V] what scaled queries read, and [B, N, K, V] the state after the tokens; `log_BTNA` is log a."""
    chunks = Chunks(positions, q_BTNK.shape[1])
    q, k, v, log, b = (chunks.split(x) for x in (q_BTNK, k_BTNK, v_BTNV, log_BTNA, b_BTN.unsqueeze(-1)))
    faded = fade(q, k, log, chunks)
    wanted = b * torch.cat((k * faded.since, v), dim=-1)
    solved = torch.linalg.solve_triangular(b * faded.k_of_k, wanted, upper=False, unitriangular=True)
    erase, new = solved.split([k.shape[-1], v.shape[-1]], dim=-1)
    start = v.new_zeros(v.shape[1], v.shape[2], k.shape[-1], v.shape[-1]) if start_BNKV is None else start_BNKV
    alone = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    states, found = (run_states if alone else delta_states)(faded.since[..., -1, :], k * faded.until, erase, new, start)
    out = (q * faded.since) @ states[:-1] + faded.q_of_k @ found
    return chunks.join(out), states[-1]


# --- one token over a cache


def read_step(q_BNK: Tensor, k_BNK: Tensor, v_BNV: Tensor, a_BNA: Tensor, b_BN: Tensor, state_BNKV: Tensor) -> Tensor:
    """[B, N, V] what a scaled query reads of the state, which becomes that after the token.

    What query and key find of the faded state is one product; S_t^T q = S'^T q + (k q) u.
    """
    batch, heads, width = v_BNV.shape
    state = state_BNKV.flatten(0, 1)
    found = torch.bmm((torch.stack((q_BNK, k_BNK), dim=2) * a_BNA.unsqueeze(2)).flatten(0, 1), state)
    read, said = found.view(batch, heads, 2, width).unbind(dim=2)
    new_BNV = (v_BNV - said) * b_BN.unsqueeze(-1)
    state.mul_(a_BNA.flatten(0, 1).unsqueeze(-1))
    state.baddbmm_(k_BNK.flatten(0, 1).unsqueeze(-1), new_BNV.flatten(0, 1).unsqueeze(1))
    return torch.addcmul(read, (q_BNK * k_BNK).sum(dim=-1, keepdim=True), new_BNV)


# --- modules


class ShortConv(OwnInit):
    """A causal convolution of each channel by itself over the last `width` tokens, without a bias, then a SiLU."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))  # the newest token's factor comes last

    def draw(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Draw uniformly within 1 / sqrt(width), as torch's own convolutions and the references do."""
        bound = self.width**-0.5
        full.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTX: Tensor, before_BWX: Tensor | None, positions: TokenPositions) -> Tensor:
        """[B, T, X]. `before_BWX`: the W - 1 tokens before; None: there are none. No token sees another segment's."""
        reach, length = self.width - 1, x_BTX.shape[1]
        if before_BWX is None:
            padded = F.pad(x_BTX, (0, 0, reach, 0))
        else:
            padded = torch.cat((before_BWX.to(x_BTX.dtype), x_BTX), dim=1)
        factors = self.weight.to(x_BTX.dtype).unbind(dim=1)
        out = x_BTX * factors[-1]
        for back in range(1, self.width):
            term = padded[:, reach - back : reach - back + length] * factors[-1 - back]
            if positions.segmented:
                term = term * (positions.position_BT >= back).unsqueeze(-1)
            out = out + term
        return F.silu(out)

    def step(self, x_BX: Tensor, before_BWX: Tensor) -> Tensor:
        """[B, X] of one token of each row, which then is the newest of `before_BWX`."""
        seen_BWX = torch.cat((before_BWX.to(x_BX.dtype), x_BX.unsqueeze(1)), dim=1)
        before_BWX.copy_(seen_BWX[:, 1:])
        return F.silu((seen_BWX * self.weight.to(x_BX.dtype).mT).sum(dim=1))


class Decay(OwnInit):
    """log a = -e^{A_log} softplus(W x + dt_bias), of each head; in rule `kda` of each channel, with W of low rank."""

    def __init__(self, size: SizeConfig, store: MatrixSpec):
        super().__init__()
        slot = store.slot
        self.heads, self.channels = slot.kv_heads, store.num_decays // slot.kv_heads
        self.proj = low_rank(size, store, store.num_decays)
        self.A_log = nn.Parameter(torch.empty(slot.kv_heads))
        self.dt_bias = nn.Parameter(torch.empty(store.num_decays))

    def draw(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Draw e^{A_log} uniformly in (0 or 1, 16), softplus(dt_bias) log-uniformly in (0.001, 0.1), as they do."""
        if name == "A_log":
            full.uniform_(0.01 if self.channels == 1 else 1.0, 16.0, generator=generator).log_()
        else:
            full.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
            full.add_((-torch.expm1(-full)).log())  # the inverse of softplus

    def forward(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., N, A] given `proj` of the tokens."""
        rate_NA = self.A_log.to(dtype).exp().unsqueeze(-1)
        steps = F.softplus(raw.to(dtype) + self.dt_bias.to(dtype))
        return -rate_NA * apart(steps, -1, self.heads, self.channels)


def low_rank(size: SizeConfig, store: MatrixSpec, width: int) -> nn.Module:
    """A projection of the residual stream; in rule `kda` through as many channels as a value has."""
    if store.matrix.rule == "gated_delta":
        return nn.Linear(size.d_model, width, bias=False)
    inner = store.slot.v_dim
    return nn.Sequential(nn.Linear(size.d_model, inner, bias=False), nn.Linear(inner, width, bias=False))


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of `inputs`, which alone are kept for the backward pass: a dozen tensors of fp32 lie between."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


class DeltaOut(NamedTuple):
    """Vectors that heads read of their states, in at least fp32: [B, T, N, V], or [B, N, V] of single tokens."""

    out: Tensor


class DeltaWriter(nn.Module):
    """Projects the residual stream to queries, keys, values, decays and strengths, and applies the rule.

    Queries are the writer's too: they pass the convolution, whose last inputs are cached with the store. Hence no other
    layer reads it. No projection has a bias in any style, as in the references.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, MatrixSpec)
        slot, self.key_heads = store.slot, store.matrix.key_heads
        self.heads, self.k_dim, self.v_dim = slot.kv_heads, slot.k_dim, slot.v_dim
        self.q_proj = nn.Linear(size.d_model, self.key_heads * slot.k_dim, bias=False)
        self.k_proj = nn.Linear(size.d_model, self.key_heads * slot.k_dim, bias=False)
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=False)
        self.beta_proj = nn.Linear(size.d_model, slot.kv_heads, bias=False)
        self.conv = ShortConv(store.num_channels, store.matrix.conv)
        self.decay = Decay(size, store)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        positions: TokenPositions,
        buffer: StateBuffer | None = None,
        offset: int | Step = 0,
    ) -> DeltaOut:
        """Return what the tokens [B, T, D] read; of one of each row, [B, D], where `offset` is a Step.

        With `buffer` the tokens continue the state it holds, which becomes the state after them; at `offset` 0 there is
        none yet, whatever it holds.
        """
        inputs = (
            *(proj(x_BTD) for proj in (self.q_proj, self.k_proj, self.v_proj, self.beta_proj)),
            self.decay.proj(x_BTD),
        )
        if isinstance(offset, Step):
            assert buffer is not None
            rule = functools.partial(self.step, positions, buffer, offset.offset)
        else:
            rule = functools.partial(self.rule, positions, buffer, not offset)
        return DeltaOut(recomputed(rule, *inputs))

    def rule(
        self,
        positions: TokenPositions,
        buffer: StateBuffer | None,
        empty: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        raw: Tensor,
    ) -> Tensor:
        """[B, T, N, V] given all that is projected."""
        dtype = at_least_fp32(q.dtype)
        with no_autocast(q):
            x_BTX = torch.cat((q, k, v), dim=-1).to(dtype)
            state_BNKV = before_BWX = None
            if buffer is not None:
                x_BTX = x_BTX * (positions.position_BT >= 0).unsqueeze(-1)
                if not empty:
                    state_BNKV, before_BWX = buffer.read_state(), buffer.tensors[-1]
            q_BTNK, k_BTNK, v_BTNV = self.heads_of(self.conv(x_BTX, before_BWX, positions))
            log_BTNA, b_BTN = self.decay(raw, dtype), beta.to(dtype).sigmoid()
            if positions.kernel is not None:
                return positions.kernel(q_BTNK, k_BTNK, v_BTNV, log_BTNA, b_BTN, dtype=q.dtype).to(dtype)
            out_BTNV, after_BNKV = read_chunks(q_BTNK, k_BTNK, v_BTNV, log_BTNA, b_BTN, positions, state_BNKV)
            if buffer is not None:
                buffer.write_state(after_BNKV)
                keep_last(x_BTX, buffer.tensors[-1], empty)
            return out_BTNV

    def step(
        self,
        positions: TokenPositions,
        buffer: StateBuffer,
        offset: int | Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        raw: Tensor,
    ) -> Tensor:
        """`rule` for one token of each row, [B, N, V]. A tensor as `offset` is never 0."""
        assert positions.step is not None
        dtype = at_least_fp32(q.dtype)
        with no_autocast(q):
            x_BX = torch.cat((q, k, v), dim=-1).to(dtype)
            if not positions.step.all_write:
                x_BX = x_BX * (positions.position_BT >= 0)
            if isinstance(offset, int) and not offset:
                for tensor in buffer.tensors:
                    tensor.zero_()
            state_BNKV = buffer.read_state()
            q_BNK, k_BNK, v_BNV = self.heads_of(self.conv.step(x_BX, buffer.tensors[-1]))
            a_BNA, b_BN = self.decay(raw, dtype).exp(), beta.to(dtype).sigmoid()
            q, k, v, a, b = (x.to(state_BNKV.dtype) for x in (q_BNK, k_BNK, v_BNV, a_BNA, b_BN))
            out_BNV = read_step(q, k, v, a, b, state_BNKV).to(dtype)
            buffer.write_state(state_BNKV)
            return out_BNV

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, scaled, keys, and values of each state, [..., N, K or V], given what leaves the convolution."""
        width = self.key_heads * self.k_dim
        q, k, v = x[..., :width], x[..., width : 2 * width], x[..., 2 * width :]
        q, k = (unit(apart(y, -1, self.key_heads, self.k_dim)) for y in (q, k))
        if self.heads > self.key_heads:
            q, k = (y.repeat_interleave(self.heads // self.key_heads, dim=-2) for y in (q, k))
        return q * self.k_dim**-0.5, k, apart(v, -1, self.heads, self.v_dim)


def unit(x: Tensor) -> Tensor:
    """`x` at length 1; at 0 if it is 0."""
    return x * (x.square().sum(dim=-1, keepdim=True) + LENGTH_EPS).rsqrt()


def keep_last(x_BTX: Tensor, before_BWX: Tensor, empty: bool) -> None:
    """Let `before_BWX` hold the last tokens, those that it has before the new ones included unless it is `empty`."""
    reach, length = before_BWX.shape[1], x_BTX.shape[1]
    if empty:
        before_BWX.zero_()
    if length < reach:
        before_BWX[:, : reach - length] = before_BWX[:, length:].clone()
    newest = min(length, reach)
    before_BWX[:, reach - newest :] = x_BTX[:, length - newest :]


class DeltaReader(nn.Module):
    """Normalises what each head reads, gates it, and projects it back.

    The gate is a SiLU in rule `gated_delta`, as in Qwen3-Next, and a sigmoid of a projection of low rank in rule `kda`.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, MatrixSpec)
        self.width = store.slot.v_dim
        values = store.slot.kv_heads * self.width
        self.activation = F.silu if store.matrix.rule == "gated_delta" else torch.sigmoid
        self.gate = low_rank(size, store, values)
        self.norm = RMSNorm(self.width, size.norm_eps)
        self.o_proj = nn.Linear(values, size.d_model, bias=False)

    def forward(self, x_BTD: Tensor, kv: DeltaOut, rope: Rope, positions: TokenPositions) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens."""
        out: Tensor = self.o_proj(recomputed(self.gated, kv.out, self.gate(x_BTD)))
        return out

    def gated(self, read: Tensor, gate: Tensor) -> Tensor:
        """[..., N V] given what heads read, [..., N, V], and the gate before its activation, of whose type it is."""
        with no_autocast(gate):
            normed = self.norm(read.flatten(0, -2)).view(gate.shape)
            out: Tensor = (normed * self.activation(gate.to(read.dtype))).to(gate.dtype)
            return out
