"""Writing slots and reading them, for key/value heads and for latents; bounded.py has those of bounded stores.

A writer exists only in the layer that owns a store. Every writer is called alike, with what tokens see or where they
stand, and with the cache of its store, if there is one: then the new slots, of tokens `offset` on, go through it and
come back with the ones before. A reader projects queries of its own and attends over whatever
slots it is handed: those its own layer has just written, an earlier layer's, or the live part of a cache.

Shapes: B batch, T new tokens, S slots read, D model, N query heads, K key/value heads, H head, R latent, P rotary part.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from .attend import Mask, Needs, attend
from .bounded import BoundedReader, BoundedWriter, TokenPositions
from .buffers import AppendBuffer, RingBuffer, Slots
from .config import SizeConfig, head_dim, style_of
from .layers import RMSNorm, Rope, rotate
from .plan import StoreSpec

# Fixed by the stock DeepSeek classes whatever their rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class GroupedWriter(nn.Module):
    """Keys, rotated once, and values: ([B, T, K, H], [B, T, K, H])."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        slot = store.slot
        self.kv_heads = slot.kv_heads
        self.k_proj = nn.Linear(size.d_model, slot.kv_heads * slot.k_dim, bias=style_of(size).bias)
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=style_of(size).bias)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        mask: Mask | TokenPositions | None = None,
        store: AppendBuffer | RingBuffer | None = None,
        offset: int = 0,
    ) -> Slots:
        k_BTKH = rearrange(self.k_proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads)
        v_BTKH = rearrange(self.v_proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads)
        slots = rotate(k_BTKH, rope), v_BTKH
        return slots if store is None else store.update(slots, offset)


class GroupedReader(nn.Module):
    """Queries of this layer over shared keys and values."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.num_heads, width = size.num_heads, head_dim(size)
        self.scale = width**-0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * width, bias=style_of(size).bias)
        self.o_proj = nn.Linear(self.num_heads * width, size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None

    def forward(self, x_BTD: Tensor, slots: Slots, rope: Rope, mask: Mask) -> Tensor:
        q_BTNH = rotate(rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads), rope)
        k_BSKH, v_BSKH = (slot.to(q_BTNH.dtype) for slot in slots)  # a cache may hold another type
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask, self.scale, self.sinks)
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out


class LatentWriter(nn.Module):
    """The normalised latent and the rotated key that all heads share: ([B, T, R], [B, T, P])."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.widths = [store.slot.latent_dim, store.slot.rope_dim]
        self.kv_down_proj = nn.Linear(size.d_model, sum(self.widths), bias=style_of(size).bias)
        self.latent_norm = RMSNorm(store.slot.latent_dim, LATENT_NORM_EPS)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        mask: Mask | TokenPositions | None = None,
        store: AppendBuffer | RingBuffer | None = None,
        offset: int = 0,
    ) -> Slots:
        latent_BTR, k_rope_BTP = self.kv_down_proj(x_BTD).split(self.widths, dim=-1)
        slots = self.latent_norm(latent_BTR), rotate(k_rope_BTP.unsqueeze(2), rope).squeeze(2)
        return slots if store is None else store.update(slots, offset)


class LatentReader(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    Over the tokens at hand it expands the latents to keys and values of every head. Over a cache it never does: the key
    expansion is absorbed into the query and the value expansion into the output, so that attention is multi-query
    over latents of width R + P. For that the expansion has no bias in any style.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.num_heads, self.width, self.rope_dim = size.num_heads, head_dim(size), store.slot.rope_dim
        self.scale = (self.width + self.rope_dim) ** -0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * (self.width + self.rope_dim), bias=style_of(size).bias)
        self.kv_up_proj = nn.Linear(store.slot.latent_dim, self.num_heads * 2 * self.width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.width, size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None

    def forward(self, x_BTD: Tensor, slots: Slots, rope: Rope, mask: Mask) -> Tensor:
        q = rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads)
        q_BTNH, q_rope_BTNP = q.split([self.width, self.rope_dim], dim=-1)
        read = self.expanded if slots[0].shape[1] == x_BTD.shape[1] else self.absorbed
        slots = tuple(slot.to(q.dtype) for slot in slots)  # a cache may hold another type
        out_BTNH = read(q_BTNH, rotate(q_rope_BTNP, rope), slots, mask)
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out

    def expanded(self, q_BTNH: Tensor, q_rope_BTNP: Tensor, slots: Slots, mask: Mask) -> Tensor:
        latent_BSR, k_rope_BSP = slots
        kv = rearrange(self.kv_up_proj(latent_BSR), "b s (n h) -> b s n h", n=self.num_heads)
        k_BSNH, v_BSNH = kv.chunk(2, dim=-1)
        k_rope_BSNP = k_rope_BSP.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        q = torch.cat((q_BTNH, q_rope_BTNP), dim=-1)
        k = torch.cat((k_BSNH, k_rope_BSNP), dim=-1)
        return attend(q, k, v_BSNH, mask, self.scale, self.sinks)

    def absorbed(self, q_BTNH: Tensor, q_rope_BTNP: Tensor, slots: Slots, mask: Mask) -> Tensor:
        latent_BSR, k_rope_BSP = slots
        up_NHR, up_v_NHR = rearrange(self.kv_up_proj.weight, "(n h) r -> n h r", n=self.num_heads).chunk(2, dim=1)
        q_BTNR = torch.einsum("btnh,nhr->btnr", q_BTNH, up_NHR.to(q_BTNH.dtype))
        q = torch.cat((q_BTNR, q_rope_BTNP), dim=-1)
        k = torch.cat((latent_BSR, k_rope_BSP), dim=-1).unsqueeze(2)
        out_BTNR = attend(q, k, latent_BSR.unsqueeze(2), mask, self.scale, self.sinks)
        return torch.einsum("btnr,nhr->btnh", out_BTNR, up_v_NHR.to(out_BTNR.dtype))


def build_writer(size: SizeConfig, store: StoreSpec) -> nn.Module:
    if store.num_slots:
        return BoundedWriter(size, store)
    return LatentWriter(size, store) if store.slot.latent_dim else GroupedWriter(size, store)


def build_reader(size: SizeConfig, store: StoreSpec) -> nn.Module:
    if store.num_slots:
        return BoundedReader(size, store)
    return (LatentReader if store.slot.latent_dim else GroupedReader)(size, store)


def attention_needs(size: SizeConfig, store: StoreSpec, documents: bool = False) -> Needs:
    """What the layers that read `store` ask of an attention backend."""
    latent, width = bool(store.slot.latent_dim), head_dim(size)
    asked = {
        "windows": store.window is not None,
        "documents": documents,
        "sinks": store.sinks,
        "gqa": not latent and store.slot.kv_heads < size.num_heads,
        "uneven_value_width": latent,
    }
    widths = (width + store.slot.rope_dim, width) if latent else (store.slot.k_dim, store.slot.v_dim)
    return Needs(frozenset(name for name, need in asked.items() if need), widths)
