"""Next-token cross-entropy from the last hidden states; all logits are never in memory at once.

torch's own linear_cross_entropy (torch 2.13) was measured on the CPU (docs/results/bench-cpu): in bf16 its loss in
chunks takes 2.8 to 4.5 times as long and is off by 4 to 5 in 1,000. So this one stays.

Shapes: N tokens, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from arch.precision import at_least_fp32
from data.batches import IGNORE
from train.schema import loss_rows

NllAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy_sum(
    targets_BT: Tensor, compiled: bool = False, few: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a head for `LanguageModel.forward`: the loss in nats, summed over the real targets (not IGNORE), in fp32.

    `compiled`: elementwise operations on the logits of a chunk become one kernel. `few`: most positions have no target,
    and get no logits; on CUDA they do, since counting the others would wait for the device.
    """
    softmax = fused_nll_and_gradient if compiled else nll_and_gradient

    def head(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        if few and not x_ND.is_cuda:
            real_N = targets_N != IGNORE
            x_ND, targets_N = x_ND[real_N], targets_N[real_N]
        total: Tensor = LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, softmax)  # type: ignore[no-untyped-call]
        return total

    return head


class LinearCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(x @ weight.T, targets)), `loss_rows` tokens at a time.

    The forward pass computes the gradients too, while the logits of a chunk are in memory: three matrix products in
    all, as many as with whole logits, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softmax: NllAndGradient) -> Tensor:
        weight = weight_VD.to(x_ND.dtype)
        rows = loss_rows(len(x_ND), len(weight), x_ND.itemsize, x_ND.is_cuda)
        with torch.autocast(x_ND.device.type, enabled=False):
            total = torch.zeros((), dtype=at_least_fp32(x_ND.dtype), device=x_ND.device)
            grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
            wide = at_least_fp32(weight.dtype)
            grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
            for begin in range(0, len(x_ND), rows):
                x, targets = x_ND[begin : begin + rows], targets_N[begin : begin + rows]
                if not any(ctx.needs_input_grad):
                    logits = x @ weight.T
                    logits = logits.to(at_least_fp32(logits.dtype))
                    total += F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
                    continue
                loss, grad_logits = softmax(x @ weight.T, targets)
                total += loss
                if grad_x is not None:
                    torch.mm(grad_logits, weight, out=grad_x[begin : begin + rows])
                if grad_weight is not None:
                    add_product(grad_weight, grad_logits.T, x)
                del grad_logits  # before the next logits are made
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad_total.to(grad_x.dtype),
            None if grad_weight is None else grad_weight * grad_total.to(grad_weight.dtype),
            None,
            None,
        )


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in place, which may be of fp32 where they are of half precision.

    On CUDA the product is never rounded to half precision; on the CPU torch has no such product.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def nll_and_gradient(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood, at least fp32, and its gradient [N, V] in the type of the logits."""
    real_N = targets_N != IGNORE
    index_N1 = targets_N.clamp(min=0)[:, None]
    log_probability_NV = logits_NV.to(at_least_fp32(logits_NV.dtype)).log_softmax(dim=-1)
    loss = -(log_probability_NV.gather(1, index_N1)[:, 0] * real_N).sum()
    if torch.compiler.is_compiling():  # one kernel, where a scatter needs the probabilities in memory, in fp32
        is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == index_N1
        gradient_NV = (log_probability_NV.exp() - is_target_NV.to(log_probability_NV.dtype)) * real_N[:, None]
    else:
        gradient_NV = log_probability_NV.exp_()
        gradient_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=gradient_NV.dtype))
        gradient_NV *= real_N[:, None]
    return loss, gradient_NV.to(logits_NV.dtype)


fused_nll_and_gradient = torch.compile(nll_and_gradient)
