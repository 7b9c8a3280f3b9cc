"""The states of a bounded store between chunks: a linear recurrence, as one operator.

Shapes: as in bounded.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bounded_triton import kernels, triton_advance, triton_retreat

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
