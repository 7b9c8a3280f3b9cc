"""Latent stores (multi-head latent attention, DeepSeek-V2, section 2.1): their writer and reader.

Shapes: B batch, T new tokens, S slots read, D model, N query heads, H head (of keys, or of values), G latents, R one
latent, or in a slot all of them, P rotary part.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attend import Mask, attend
from .buffers import SlotBuffer, Step
from .config import SizeConfig, has_qkv_bias, head_dim, style_of
from .latent_spec import LatentSpec
from .layers import RMSNorm, Rope, build_output_gate, gate_output, rotate, rotate_step
from .precision import at_least_fp32
from .query_scale import build_head_scale, scale_queries
from .store_spec import StoreSpec

# Fixed by the stock DeepSeek classes whatever their rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class LatentKV(NamedTuple):
    """The normalised latent and the rotated key, both for all heads."""

    latent_BSR: Tensor
    k_rope_BSP: Tensor


class LatentsNorm(RMSNorm):
    """RMSNorm of each of `number` latents that lie side by side."""

    def __init__(self, dim: int, number: int, eps: float):
        super().__init__(dim, eps)
        self.number = number

    def forward(self, x_BTR: Tensor) -> Tensor:
        wide = at_least_fp32(x_BTR.dtype)
        x_BTGR = rearrange(x_BTR.to(wide), "... (g r) -> ... g r", g=self.number)
        normed_BTR = F.rms_norm(x_BTGR, x_BTGR.shape[-1:], None, self.eps).flatten(-2)
        return (normed_BTR * self.weight.to(wide)).to(x_BTR.dtype)


class LatentWriter(nn.Module):
    """Projects [B, T, D] to a latent and a rotated key for all heads; with a buffer, those before come first."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, LatentSpec)
        self.widths = [store.slot.latent_dim, store.slot.rope_dim]
        self.kv_down_proj = nn.Linear(size.d_model, sum(self.widths), bias=has_qkv_bias(size))
        self.latent_norm = (
            RMSNorm(store.slot.latent_dim, LATENT_NORM_EPS)
            if store.num_latents == 1
            else LatentsNorm(store.slot.latent_dim, store.num_latents, LATENT_NORM_EPS)
        )

    def forward(self, x_BTD: Tensor, rope: Rope, buffer: SlotBuffer | None = None, offset: int | Step = 0) -> LatentKV:
        if isinstance(offset, Step):
            assert buffer is not None
            return self.step(x_BTD, rope, buffer, offset)
        latent_BTR, k_rope_BTP = self.kv_down_proj(x_BTD).split(self.widths, dim=-1)
        kv = LatentKV(self.latent_norm(latent_BTR), rotate(k_rope_BTP.unsqueeze(2), rope).squeeze(2))
        return kv if buffer is None else LatentKV(*buffer.update(kv, offset))

    def step(self, x_BD: Tensor, rope: Rope, buffer: SlotBuffer, step: Step) -> LatentKV:
        latent_BR, k_rope_BP = self.kv_down_proj(x_BD).split(self.widths, dim=-1)
        k_rope_BP = rotate_step(k_rope_BP.unsqueeze(1), rope).squeeze(1)
        return LatentKV(*buffer.append((self.latent_norm(latent_BR), k_rope_BP), step))


class LatentReader(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    Over the tokens at hand it expands the latents to keys and values of every head. Over a cache it never does: the key
    expansion is absorbed into the query and the value expansion into the output, so that attention is multi-query
    over latents of width R + P, or with several latents grouped-query. For that the expansion has no bias in any style.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, LatentSpec)
        self.num_heads, self.num_latents, self.rope_dim = size.num_heads, store.num_latents, store.slot.rope_dim
        self.widths = [store.expanded_dim(size), head_dim(size)]
        self.q_widths = [self.widths[0], self.rope_dim]
        self.scale = sum(self.q_widths) ** -0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * sum(self.q_widths), bias=has_qkv_bias(size))
        self.kv_up_proj = nn.Linear(store.one_latent_dim, self.num_heads * sum(self.widths), bias=False)
        self.o_proj = nn.Linear(self.num_heads * head_dim(size), size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None
        self.gate_proj = build_output_gate(size, head_dim(size))
        self.head_scale = build_head_scale(size, store)

    def forward(self, x_BTD: Tensor, kv: LatentKV, rope: Rope, mask: Mask, query_table: Tensor | None = None) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens, whose `rope` and `mask` are those of a step."""
        if x_BTD.ndim == 2:
            return self.step(x_BTD, kv, rope, mask, query_table)
        q = rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads)
        q = scale_queries(q, query_table, self.head_scale)
        q_BTNH, q_rope_BTNP = torch.split(q, self.q_widths, dim=-1)
        read = self.expanded if kv.latent_BSR.shape[1] == x_BTD.shape[1] else self.absorbed
        kv = LatentKV(*(tensor.to(q.dtype) for tensor in kv))  # a cache may hold another type
        out_BTNH = gate_output(self.gate_proj, x_BTD, read(q_BTNH, rotate(q_rope_BTNP, rope), kv, mask))
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out

    def expanded(self, q_BTNH: Tensor, q_rope_BTNP: Tensor, kv: LatentKV, mask: Mask) -> Tensor:
        """[B, T, N, H] attention to keys and values of every head, expanded from the latents."""
        latent_BSR, k_rope_BSP = kv
        if self.num_latents == 1:
            expanded = self.kv_up_proj(latent_BSR)
        else:
            up_GHR = rearrange(self.kv_up_proj.weight.to(latent_BSR.dtype), "(g h) r -> g h r", g=self.num_latents)
            expanded = torch.einsum("bsgr,ghr->bsgh", self.latents(latent_BSR), up_GHR).flatten(-2)
        k_BSNH, v_BSNH = torch.split(rearrange(expanded, "b s (n h) -> b s n h", n=self.num_heads), self.widths, dim=-1)
        k_rope_BSNP = k_rope_BSP.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        q = torch.cat((q_BTNH, q_rope_BTNP), dim=-1)
        k = torch.cat((k_BSNH, k_rope_BSNP), dim=-1)
        return attend(q, k, v_BSNH, mask, self.scale, self.sinks)

    def absorbed(self, q_BTNH: Tensor, q_rope_BTNP: Tensor, kv: LatentKV, mask: Mask) -> Tensor:
        """[B, T, N, H] attention to the latents, with both expansions applied on the side of the queries."""
        latent_BSR, k_rope_BSP = kv
        up = rearrange(self.kv_up_proj.weight, "(n h) r -> n h r", n=self.num_heads)
        up_NHR, up_v_NHR = torch.split(up, self.widths, dim=1)
        q_BTNR = torch.einsum("btnh,nhr->btnr", q_BTNH, up_NHR.to(q_BTNH.dtype))
        q = torch.cat((q_BTNR, q_rope_BTNP), dim=-1)
        latent_BSGR = self.latents(latent_BSR)
        k = torch.cat((latent_BSGR, k_rope_BSP.unsqueeze(2).expand(-1, -1, self.num_latents, -1)), dim=-1)
        out_BTNR = attend(q, k, latent_BSGR, mask, self.scale, self.sinks)
        return torch.einsum("btnr,nhr->btnh", out_BTNR, up_v_NHR.to(out_BTNR.dtype))

    def step(self, x_BD: Tensor, kv: LatentKV, rope: Rope, mask: Mask, query_table: Tensor | None = None) -> Tensor:
        """`absorbed`, without a copy of the cache: scores are those of the latents, and added to them those of the
        rotated keys."""
        q = scale_queries(self.q_proj(x_BD).view(len(x_BD), self.num_heads, -1), query_table, self.head_scale)
        q_BNH, q_rope_BNP = torch.split(q, self.q_widths, dim=-1)
        latent_BSR, k_rope_BSP = (tensor.to(q.dtype) for tensor in kv)  # a cache may hold another type
        up = self.kv_up_proj.weight.to(q.dtype).view(self.num_heads, sum(self.widths), -1)
        up_NHR, up_v_NHR = torch.split(up, self.widths, dim=1)
        q_BNR = torch.bmm(q_BNH.transpose(0, 1), up_NHR).transpose(0, 1)
        q_rope_BNP = rotate_step(q_rope_BNP, rope)
        rotated_BNS = torch.bmm(q_rope_BNP, k_rope_BSP.transpose(1, 2))
        score_BNS = self.latent_scores(q_BNR, latent_BSR, rotated_BNS).to(at_least_fp32(q.dtype)) * self.scale
        if mask.form.seen.allowed is not None:
            score_BNS = score_BNS.masked_fill(~mask.form.seen.allowed.flatten(0, -2).unsqueeze(1), -math.inf)
        if self.sinks is not None:
            sink = self.sinks.to(score_BNS.dtype)[None, :, None].expand(len(x_BD), -1, 1)
            score_BNS = torch.cat((score_BNS, sink), dim=-1)
        weight_BNS = score_BNS.softmax(dim=-1)[..., : latent_BSR.shape[1]].to(q.dtype)
        out_BNR = self.weighted_latents(weight_BNS, latent_BSR)
        out_BNH = torch.bmm(out_BNR.transpose(0, 1), up_v_NHR.transpose(1, 2)).transpose(0, 1)
        out: Tensor = self.o_proj(gate_output(self.gate_proj, x_BD, out_BNH).flatten(1))
        return out

    def latents(self, latent_BSR: Tensor) -> Tensor:
        """[B, S, G, R] the latents of a slot, which lie side by side."""
        return rearrange(latent_BSR, "b s (g r) -> b s g r", g=self.num_latents)

    def latent_scores(self, q_BNR: Tensor, latent_BSR: Tensor, rotated_BNS: Tensor) -> Tensor:
        """[B, N, S] products of the queries with the latents that they read, added to those of the rotated keys."""
        if self.num_latents == 1:
            return torch.baddbmm(rotated_BNS, q_BNR, latent_BSR.transpose(1, 2))
        q_BGNR = rearrange(q_BNR, "b (g n) r -> b g n r", g=self.num_latents)
        score_BNS = torch.matmul(q_BGNR, self.latents(latent_BSR).permute(0, 2, 3, 1)).flatten(1, 2)
        return score_BNS.to(at_least_fp32(score_BNS.dtype)) + rotated_BNS

    def weighted_latents(self, weight_BNS: Tensor, latent_BSR: Tensor) -> Tensor:
        """[B, N, R] sums of the latents that each head reads."""
        if self.num_latents == 1:
            return torch.bmm(weight_BNS, latent_BSR)
        weight_BGNS = rearrange(weight_BNS, "b (g n) s -> b g n s", g=self.num_latents)
        return torch.matmul(weight_BGNS, self.latents(latent_BSR).transpose(1, 2)).flatten(1, 2)
