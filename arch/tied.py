"""Stores in which keys and values are one tensor: their writers and readers, in three forms.

vector      the rotated key is the value too. Outputs, sums of rotated values, are rotated back by the position of the
            query, so that they depend on distances alone (DeepSeek-V4). Where nothing is rotated, plainly K = V
half        a value's first half is that of its key, whose other half is rotated and shared by all heads (grouped-tied
            attention, GTA)
projection  one projection makes keys, normed and rotated, and values, which are not rotated and normed without a scale
            (Gemma 4). Both are cached: what is saved is the other projection

Shapes: B batch, T new tokens, S slots read, D model, N query heads, K key/value heads, H head, P rotated half.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attend import Mask, attend
from .buffers import SlotBuffer, Step
from .config import SizeConfig, has_qkv_bias
from .grouped import GroupedKV, GroupedReader
from .layers import RMSNorm, Rope, build_head_norm, gate_output, inverse_rope, norm_heads, rotate, rotate_step
from .precision import at_least_fp32
from .query_scale import scale_queries
from .store_spec import StoreSpec
from .tied_spec import TiedSpec


class VectorKV(NamedTuple):
    """Keys that are values too, rotated where they are of the sequence."""

    kv_BSKH: Tensor


class HalfKV(NamedTuple):
    """Values, and the rotated half of the keys of all heads."""

    v_BSKH: Tensor
    k_rope_BSP: Tensor


def apply_rope(x_BTNH: Tensor, rope: Rope) -> Tensor:
    """Rotate heads [B, T, N, H], or [B, N, H] of single tokens, whose `rope` is that of a step."""
    return (rotate if x_BTNH.ndim == 4 else rotate_step)(x_BTNH, rope)


class TiedWriter(nn.Module):
    """Projects the residual stream [B, T, D], or [B, D] of single tokens, once; with a buffer, the slots before come
    first."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        slot = store.slot
        self.kv_heads, self.width = slot.kv_heads, slot.k_dim
        width = slot.kv_heads * slot.k_dim + slot.rope_dim
        self.kv_proj = nn.Linear(size.d_model, width, bias=has_qkv_bias(size))
        self.k_norm = build_head_norm(size, slot.kv_heads, slot.k_dim)

    def forward(
        self, x_BTD: Tensor, rope: Rope, buffer: SlotBuffer | None = None, offset: int | Step = 0
    ) -> tuple[Tensor, ...]:
        new = self.make_kv(self.kv_proj(x_BTD), rope)
        if buffer is None:
            return new
        seen = buffer.append(new, offset) if isinstance(offset, Step) else buffer.update(new, offset)
        make: type = type(new)
        out: tuple[Tensor, ...] = make(*seen)
        return out

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.kv_heads, -1)

    def make_kv(self, projected_BTP: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """Tensors of new tokens that are cached."""
        raise NotImplementedError


class VectorWriter(TiedWriter):
    def make_kv(self, projected_BTP: Tensor, rope: Rope) -> VectorKV:
        return VectorKV(apply_rope(norm_heads(self.k_norm, self.heads(projected_BTP)), rope))


class HalfWriter(TiedWriter):
    def make_kv(self, projected_BTP: Tensor, rope: Rope) -> HalfKV:
        values = self.kv_heads * self.width
        v, k_rope = torch.split(projected_BTP, [values, projected_BTP.shape[-1] - values], dim=-1)
        return HalfKV(self.heads(v), apply_rope(k_rope.unsqueeze(-2), rope).squeeze(-2))


class ProjectionWriter(TiedWriter):
    def make_kv(self, projected_BTP: Tensor, rope: Rope) -> GroupedKV:
        heads = self.heads(projected_BTP)
        return GroupedKV(apply_rope(norm_heads(self.k_norm, heads), rope), norm_unscaled(self.k_norm, heads))


def norm_unscaled(norm: RMSNorm | None, x_BTKH: Tensor) -> Tensor:
    """Norm heads as `norm_heads`, without the weights of `norm`."""
    if norm is None:
        return x_BTKH
    shape = norm.weight.shape
    x = x_BTKH if shape[0] == x_BTKH.shape[-1] else x_BTKH.flatten(-2)
    return F.rms_norm(x.to(at_least_fp32(x.dtype)), shape, None, norm.eps).to(x.dtype).view_as(x_BTKH)


def one_gradient(x: Tensor) -> Tensor:
    """A view of `x`: gradients of its uses are added before they join those of other readers, as with checkpointing."""
    return x.view_as(x)


class VectorReader(GroupedReader):
    """Queries of this layer over vectors that are keys and values; outputs are rotated back where those are rotated."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, kv: VectorKV, rope: Rope, mask: Mask, query_table: Tensor | None = None
    ) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens, whose `rope` and `mask` are those of a step."""
        q_BTNH = self.q_proj(x_BTD).unflatten(-1, (self.num_heads, -1))
        q_BTNH = scale_queries(apply_rope(norm_heads(self.q_norm, q_BTNH), rope), query_table, self.head_scale)
        kv_BSKH = one_gradient(kv.kv_BSKH.to(q_BTNH.dtype))  # a cache may hold another type
        out_BTNH = apply_rope(attend(q_BTNH, kv_BSKH, kv_BSKH, mask, self.scale, self.sinks), inverse_rope(rope))
        out: Tensor = self.o_proj(gate_output(self.gate_proj, x_BTD, out_BTNH).flatten(-2))
        return out


class HalfReader(GroupedReader):
    """Queries of this layer over keys that it puts together: of the first half of the values, and the shared half."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__(size, store)
        self.widths = [store.slot.k_dim - store.slot.rope_dim, store.slot.rope_dim]

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, kv: HalfKV, rope: Rope, mask: Mask, query_table: Tensor | None = None
    ) -> Tensor:
        """[B, T, D] for the residual stream; [B, D] of single tokens, whose `rope` and `mask` are those of a step."""
        q = self.q_proj(x_BTD).unflatten(-1, (self.num_heads, -1))
        plain, rotated = q.split(self.widths, dim=-1)
        q_BTNH = scale_queries(torch.cat((plain, apply_rope(rotated, rope)), dim=-1), query_table, self.head_scale)
        v_BSKH, k_rope_BSP = (one_gradient(tensor.to(q.dtype)) for tensor in kv)
        k_rope_BSKP = k_rope_BSP.unsqueeze(2).expand(-1, -1, v_BSKH.shape[2], -1)
        k_BSKH = torch.cat((v_BSKH[..., : self.widths[0]], k_rope_BSKP), dim=-1)
        out_BTNH = gate_output(self.gate_proj, x_BTD, attend(q_BTNH, k_BSKH, v_BSKH, mask, self.scale, self.sinks))
        out: Tensor = self.o_proj(out_BTNH.flatten(-2))
        return out


FORMS: dict[str, tuple[type[TiedWriter], type[GroupedReader]]] = {
    "vector": (VectorWriter, VectorReader),
    "half": (HalfWriter, HalfReader),
    "projection": (ProjectionWriter, GroupedReader),
}


def build_tied_writer(size: SizeConfig, store: StoreSpec) -> nn.Module:
    assert isinstance(store, TiedSpec)
    return FORMS[store.tied][0](size, store)


def build_tied_reader(size: SizeConfig, store: StoreSpec) -> nn.Module:
    assert isinstance(store, TiedSpec)
    return FORMS[store.tied][1](size, store)
