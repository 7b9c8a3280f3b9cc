"""torch's fused attention, with the backward pass that is fast on the CPU in half precision.

Shapes: B batch, T queries, S slots, N query heads, K key heads, H width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HALF = frozenset({torch.bfloat16, torch.float16})

# Widest heads, and most elements of a head's keys, with which the backward pass is faster in fp32 on the CPU. In half
# precision it calls the library of matrix products for each tile, which costs more than small tiles do, 3 times as much
# with heads of 16 and 256 slots; wide heads of long sequences gain more by the faster products.
WIDTH, ELEMENTS = 32, 1 << 14


def fused_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, allowed: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """scaled_dot_product_attention, [B, N, T, H]; `allowed` is boolean, or added to the scores."""
    if backward_in_fp32(q_BNTH, k_BKSH, v_BKSH):
        if allowed is not None and allowed.dtype == torch.bool:
            allowed = torch.zeros_like(allowed, dtype=q_BNTH.dtype).masked_fill(~allowed, float("-inf"))
        out: Tensor = BackwardInFp32.apply(q_BNTH, k_BKSH, v_BKSH, allowed, causal, scale)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        attn_mask=allowed,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
    )


def backward_in_fp32(*tensors: Tensor) -> bool:
    """Tell whether these queries, keys and values get a gradient on the CPU, by a kernel that takes them, that is
    faster to compute in fp32."""
    width, slots = tensors[1].shape[-1], tensors[1].shape[2]
    return (
        tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in tensors)
        and (width <= WIDTH or width * slots <= ELEMENTS)
        and all(x.dtype in HALF and x.shape[-1] == width and x.stride(-1) == 1 and x.numel() for x in tensors)
    )


class BackwardInFp32(torch.autograd.Function):
    """scaled_dot_product_attention of half precision on the CPU, to the bit; its gradients are computed in fp32.

    Nothing but what that one keeps is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attention(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.causal, ctx.scale = causal, scale
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bias = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.float() for x in (grad_out, q, k, v, out)),
            lse,
            0.0,
            ctx.causal,
            attn_mask=None if bias is None else bias.float(),
            scale=ctx.scale,
        )
        return *(grad.to(q.dtype) for grad in grads), None, None, None
