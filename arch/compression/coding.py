"""Codecs: blocks of tokens as packed integers (or smaller floats) with scales and zeros, and back.

A number is `code * scale + zero`, with `zero` the least of its group. Scales and zeros are fp16: zeros are rounded down
and scales up, so that the codes span the group and no number of it is off by more than half a step of its own scale.

Shapes: B batch, J blocks, G tokens of a block, H last axis, P bytes of it when packed, A scales of it.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import at_least_fp32
from .storage import TensorLayout

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
FP8_TO_FP16 = 2.0**8  # exponents of FP8 count from -7, those of fp16 from -15
LEAST_SCALE = 2.0**-24  # the smallest fp16
MOST_FP16 = 65504.0


def split_last(x: Tensor, size: int) -> Tensor:
    """[..., A, size]: the last axis in pieces of `size`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pack(code: Tensor, bits: int) -> Tensor:
    """Integers below 2 ** `bits`, uint8 [..., H], as bytes [..., P]; the first is in the lowest bits."""
    per = 8 // bits
    if per == 1:
        return code
    full = split_last(F.pad(code, (0, -code.shape[-1] % per)), per)
    packed: Tensor = full[..., 0].clone()
    for place in range(1, per):
        packed |= full[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack `width` numbers of what `pack` made; uint8 [..., H]."""
    per = 8 // bits
    if per == 1:
        return packed
    # A byte becomes an integer with one byte for each of its numbers, the first in the lowest: few passes over memory.
    wide = packed.to(torch.int16 if per == 2 else torch.int32)
    spread = wide.clone()
    for place in range(1, per):
        spread |= wide << (place * (8 - bits))
    spread &= sum(((1 << bits) - 1) << (8 * place) for place in range(per))
    return spread.view(torch.uint8)[..., :width]


def fp8_as_fp16(code: Tensor) -> Tensor:
    """FP8 numbers divided by FP8_TO_FP16, exactly, in fp16: sign and exponent are moved to their places by integer
    operators, as CPUs convert the type element by element."""
    bits = code.view(torch.int8).to(torch.int16)  # the sign in all bits above the exponent
    return bits.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)


@functools.cache
def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's matrix of `size`, a power of two, divided by the root of it: symmetric, and its own inverse. fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / math.sqrt(size)


def rotate_hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis by Hadamard matrices of the largest power of two that divides it; its own inverse."""
    width = x.shape[-1]
    size = width & -width
    matrix = hadamard_matrix(size).to(x.device, x.dtype)
    return (split_last(x, size) @ matrix).flatten(-2)


def in_groups(x: Tensor, group: int) -> Tensor:
    """[..., A, group]: the last axis in groups, the last of which is filled up with its last element."""
    more = -x.shape[-1] % group
    if more:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], more)), dim=-1)
    return split_last(x, group)


def ungroup(x: Tensor, width: int) -> Tensor:
    return x.flatten(-2)[..., :width]


def encode(x_BJGxH: Tensor, layout: TensorLayout) -> tuple[Tensor, ...]:
    """Codes [B, J, G, ..., P], then scales and zeros [B, J, ..., A] where the codec has them."""
    codec = layout.codec
    assert codec is not None
    if codec.name == "bf16":
        return (x_BJGxH.to(torch.bfloat16),)
    x = x_BJGxH.to(at_least_fp32(x_BJGxH.dtype))
    if codec.hadamard:
        x = rotate_hadamard(x)
    grouped = in_groups(x, layout.group)
    if codec.name == "fp8":
        scale = fp16_above((grouped.abs().amax(dim=(2, -1), keepdim=True) / FP8_MOST).clamp(min=LEAST_SCALE))
        code = (grouped / scale.to(x.dtype)).clamp(-FP8_MOST, FP8_MOST)
        return ungroup(code, x.shape[-1]).to(FP8), scale.squeeze(-1).squeeze(2)
    most = (1 << codec.bits) - 1
    low, high = grouped.amin(dim=(2, -1), keepdim=True), grouped.amax(dim=(2, -1), keepdim=True)
    if codec.clip < 1:
        middle, half = (low + high) / 2, (high - low) / 2 * float(codec.clip)
        low, high = middle - half, middle + half
    zero = -fp16_above(-low)
    scale = fp16_above(((high - zero.to(x.dtype)) / most).clamp(min=LEAST_SCALE))
    code = ((grouped - zero.to(x.dtype)) / scale.to(x.dtype)).round().clamp(0, most).to(torch.uint8)
    return pack(ungroup(code, x.shape[-1]), codec.bits), *(part.squeeze(-1).squeeze(2) for part in (scale, zero))


def fp16_above(x: Tensor) -> Tensor:
    """The least fp16 numbers that are not below `x`; beyond their range, the last of them."""
    near = x.clamp(-MOST_FP16, MOST_FP16).to(torch.float16)
    bits = near.view(torch.int16)
    above = torch.where(near < 0, bits - 1, bits + 1).view(torch.float16)
    return torch.where((near < x) & (near < MOST_FP16), above, near)


def decode(coded: tuple[Tensor, ...], layout: TensorLayout, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Blocks [B, J, G, ..., H] of what `encode` made, written to `out` where that is given."""
    codec, width, group = layout.codec, layout.shape[-1], layout.group
    assert codec is not None
    if out is None:
        out = torch.empty((*coded[0].shape[:-1], width), dtype=dtype, device=coded[0].device)
    if codec.name == "bf16":
        return out.copy_(coded[0])
    made = at_least_fp32(dtype)
    numbers = [part.to(made).unsqueeze(2) for part in coded[1:]]
    if codec.name == "fp8":
        values = fp8_as_fp16(coded[0])
        numbers[0] = numbers[0] * FP8_TO_FP16
    else:
        values = unpack(coded[0], codec.bits, width)
    direct = dtype == made and width % group == 0 and not codec.hadamard
    x, target = values.to(made), out if direct else None
    if group > 1:
        x, numbers = in_groups(x, group), [part.unsqueeze(-1) for part in numbers]
        target = out.view(*out.shape[:-1], -1, group) if direct else None
    x = torch.mul(x, numbers[0], out=target)
    for zero in numbers[1:]:
        x += zero
    if direct:
        return out
    x = ungroup(x, width) if group > 1 else x
    return out.copy_(rotate_hadamard(x) if codec.hadamard else x)


def zero_codes(layout: TensorLayout, batch: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Empty blocks, in the shapes of `encode`."""
    codec = layout.codec
    if codec is None:
        return ()
    heads, width = layout.shape[:-1], layout.shape[-1]
    kinds = {"bf16": (width, torch.bfloat16), "fp8": (width, FP8)}
    last, dtype = kinds.get(codec.name, (layout.packed_bytes, torch.uint8))
    codes = torch.zeros((batch, layout.blocks, layout.block, *heads, last), dtype=dtype, device=device)
    scales = (batch, layout.blocks, *heads, layout.groups)
    return codes, *(torch.zeros(scales, dtype=torch.float16, device=device) for _ in range(layout.scales))
