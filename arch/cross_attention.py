"""Cross-attention: a layer attends to vectors from outside of its sequence, after it has attended to its own.

Shapes: B batch, T new tokens, C vectors of the context, D model, N query heads, K key/value heads, H head.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .attend import Mask, attend
from .buffers import AppendBuffer
from .config import SizeConfig, style_of
from .grouped import GroupedKV
from .layers import build_norm
from .store_spec import StoreSpec


class CrossContext(NamedTuple):
    """Vectors that every token of a layer attends to besides its own sequence.

    vectors_BCD  the vectors; None: their keys and values are read from `buffer`
    buffer       cache of the keys and values, written when there are vectors; None: no cache
    mask         hides nothing
    """

    vectors_BCD: Tensor | None
    buffer: AppendBuffer | None
    mask: Mask


class CrossAttention(nn.Module):
    """Queries of the normalised residual stream over keys and values of the context, neither of them rotated.

    It has as many key/value heads as the layer's own store. The context is not normalised.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert store.slot.kv_heads
        self.num_heads, (self.kv_heads, k_dim, v_dim) = size.num_heads, store.kernel_heads(size)
        self.scale, bias = k_dim**-0.5, style_of(size).bias
        self.norm = build_norm(size)
        self.q_proj = nn.Linear(size.d_model, self.num_heads * k_dim, bias=bias)
        self.k_proj = nn.Linear(size.d_model, self.kv_heads * k_dim, bias=bias)
        self.v_proj = nn.Linear(size.d_model, self.kv_heads * v_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * v_dim, size.d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: CrossContext) -> Tensor:
        """Attend from the residual stream, [B, T, D] or [B, D] of single tokens, to the context; return what is added
        to it, of the same shape."""
        if x_BTD.ndim == 2:
            return self(x_BTD.unsqueeze(1), context).squeeze(1)  # type: ignore[no-any-return]
        q_BTNH = rearrange(self.q_proj(self.norm(x_BTD)), "b t (n h) -> b t n h", n=self.num_heads)
        kv = self.context_kv(context)
        k_BCKH, v_BCKH = (tensor.to(q_BTNH.dtype) for tensor in kv)  # a cache may hold another type
        out_BTNH = attend(q_BTNH, k_BCKH, v_BCKH, context.mask, self.scale, None)
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out

    def context_kv(self, context: CrossContext) -> GroupedKV:
        """Keys and values [B, C, K, H] of the context, computed from its vectors or read from its buffer."""
        if context.vectors_BCD is None:
            assert context.buffer is not None
            return GroupedKV(*context.buffer.tensors)
        kv = GroupedKV(
            *(
                rearrange(proj(context.vectors_BCD), "b c (k h) -> b c k h", k=self.kv_heads)
                for proj in (self.k_proj, self.v_proj)
            )
        )
        return kv if context.buffer is None else GroupedKV(*context.buffer.update(kv, 0))
