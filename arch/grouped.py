"""Stores of keys and values per head: their writer and reader.

Shapes: B batch, T new tokens, S slots read, D model, N query heads, K key/value heads, H head (of keys, or of values).
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .attend import Mask, attend
from .buffers import SlotBuffer, Step
from .config import SizeConfig, has_qkv_bias, style_of
from .layers import Rope, build_head_norm, build_output_gate, gate_output, norm_heads, rotate, rotate_step
from .query_scale import build_head_scale, scale_queries
from .store_spec import StoreSpec


class GroupedKV(NamedTuple):
    """Keys, rotated where they are of the sequence, and values."""

    k_BSKH: Tensor
    v_BSKH: Tensor


class GroupedWriter(nn.Module):
    """Projects the residual stream [B, T, D] to rotated keys and values; with a buffer, those before come first.

    `step` takes single tokens, [B, D].
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        slot = store.slot
        self.kv_heads = slot.kv_heads
        self.k_proj = nn.Linear(size.d_model, slot.kv_heads * slot.k_dim, bias=has_qkv_bias(size))
        self.v_proj = nn.Linear(size.d_model, slot.kv_heads * slot.v_dim, bias=has_qkv_bias(size))
        self.k_norm = build_head_norm(size, slot.kv_heads, slot.k_dim)

    def forward(self, x_BTD: Tensor, rope: Rope, buffer: SlotBuffer | None = None, offset: int | Step = 0) -> GroupedKV:
        if isinstance(offset, Step):
            assert buffer is not None
            return self.step(x_BTD, rope, buffer, offset)
        k_BTKH = rearrange(self.k_proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads)
        v_BTKH = rearrange(self.v_proj(x_BTD), "b t (k h) -> b t k h", k=self.kv_heads)
        kv = GroupedKV(rotate(norm_heads(self.k_norm, k_BTKH), rope), v_BTKH)
        return kv if buffer is None else GroupedKV(*buffer.update(kv, offset))

    def step(self, x_BD: Tensor, rope: Rope, buffer: SlotBuffer, step: Step) -> GroupedKV:
        k_BKH, v_BKH = (proj(x_BD).view(len(x_BD), self.kv_heads, -1) for proj in (self.k_proj, self.v_proj))
        return GroupedKV(*buffer.append((rotate_step(norm_heads(self.k_norm, k_BKH), rope), v_BKH), step))


class GroupedReader(nn.Module):
    """Queries of this layer over shared keys and values."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        self.num_heads, (_, k_dim, v_dim) = size.num_heads, store.kernel_heads(size)
        self.scale = k_dim**-0.5
        self.q_proj = nn.Linear(size.d_model, self.num_heads * k_dim, bias=has_qkv_bias(size))
        self.o_proj = nn.Linear(self.num_heads * v_dim, size.d_model, bias=style_of(size).bias)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if store.sinks else None
        self.q_norm = build_head_norm(size, self.num_heads, k_dim)
        self.gate_proj = build_output_gate(size, v_dim)
        self.head_scale = build_head_scale(size, store)

    def forward(
        self, x_BTD: Tensor, kv: GroupedKV, rope: Rope, mask: Mask, query_table: Tensor | None = None
    ) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens, whose `rope` and `mask` are those of a step."""
        if x_BTD.ndim == 2:
            return self.step(x_BTD, kv, rope, mask, query_table)
        q_BTNH = rearrange(self.q_proj(x_BTD), "b t (n h) -> b t n h", n=self.num_heads)
        q_BTNH = rotate(norm_heads(self.q_norm, q_BTNH), rope)
        q_BTNH = scale_queries(q_BTNH, query_table, self.head_scale)
        k_BSKH, v_BSKH = (tensor.to(q_BTNH.dtype) for tensor in kv)  # a cache may hold another type
        out_BTNH = gate_output(self.gate_proj, x_BTD, attend(q_BTNH, k_BSKH, v_BSKH, mask, self.scale, self.sinks))
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out

    def step(self, x_BD: Tensor, kv: GroupedKV, rope: Rope, mask: Mask, query_table: Tensor | None = None) -> Tensor:
        q_BNH = rotate_step(norm_heads(self.q_norm, self.q_proj(x_BD).view(len(x_BD), self.num_heads, -1)), rope)
        q_BNH = scale_queries(q_BNH, query_table, self.head_scale)
        k_BSKH, v_BSKH = (tensor.to(q_BNH.dtype) for tensor in kv)
        out_BNH = gate_output(self.gate_proj, x_BD, attend(q_BNH, k_BSKH, v_BSKH, mask, self.scale, self.sinks))
        out: Tensor = self.o_proj(out_BNH.flatten(1))
        return out
