"""Cross-attention: a layer attends to vectors from outside of its sequence, after it has attended to its own.

Shapes: B batch, T new tokens, C vectors of the context, D model, N query heads, K key/value heads, H head.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from .attend import Mask, attend
from .buffers import AppendBuffer, Slots
from .config import SizeConfig, head_dim, style_of
from .layers import build_norm
from .plan import StoreSpec


class Context(NamedTuple):
    """What one layer attends to outside of its sequence, every token to all of it.

    vectors_BCD  the vectors; None: `store` has their keys and values
    store        a cache of those: written where there are vectors, read where there are none; None keeps nothing
    mask         that hides nothing
    """

    vectors_BCD: Tensor | None
    store: AppendBuffer | None
    mask: Mask


class CrossAttention(nn.Module):
    """Queries of the normalised residual stream over keys and values of the context, neither of them rotated.

    It has as many key/value heads as the layer's own store. The context is not normalised.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert not store.slot.latent_dim
        self.num_heads, self.kv_heads, width = size.num_heads, store.slot.kv_heads, head_dim(size)
        self.scale, bias = width**-0.5, style_of(size).bias
        self.norm = build_norm(size)
        self.q_proj = nn.Linear(size.d_model, self.num_heads * width, bias=bias)
        self.k_proj = nn.Linear(size.d_model, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(size.d_model, self.kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * width, size.d_model, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """What is to be added to the residual stream `x_BTD`."""
        q_BTNH = rearrange(self.q_proj(self.norm(x_BTD)), "b t (n h) -> b t n h", n=self.num_heads)
        k_BCKH, v_BCKH = (slot.to(q_BTNH.dtype) for slot in self.slots(context))  # a cache may hold another type
        out_BTNH = attend(q_BTNH, k_BCKH, v_BCKH, context.mask, self.scale, None)
        out: Tensor = self.o_proj(rearrange(out_BTNH, "b t n h -> b t (n h)"))
        return out

    def slots(self, context: Context) -> Slots:
        """Keys and values of the context, made where there are vectors."""
        if context.vectors_BCD is None:
            assert context.store is not None
            return context.store.tensors
        made = tuple(
            rearrange(proj(context.vectors_BCD), "b c (k h) -> b c k h", k=self.kv_heads)
            for proj in (self.k_proj, self.v_proj)
        )
        return made if context.store is None else context.store.update(made, 0)
