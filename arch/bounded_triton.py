"""The states of a bounded store between chunks by one Triton kernel, forward and backward; found at run time.

In plain torch each chunk is an operation of a few microseconds: at 2,048 tokens 256 of them forward and as many
backward, in every layer. Here a program keeps some slots of one head in registers and goes through all chunks.

Shapes: as in bounded.py.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# Set where the kernels are first needed: bounded.py is imported without Triton, which takes a second.
tl: Any = None
constexpr: Any = "constexpr"  # an annotation that triton.jit reads here, and its compiler looks up again

TILE = 2048  # elements of a state that a program holds


def forward_kernel(  # type: ignore[no-untyped-def]
    decay, written, states, num_chunks, batch, heads, num_slots, width, ROWS: constexpr, WIDTH: constexpr
):
    """states_z+1 = decay_z states_z + written_z, of `ROWS` slots of one head of a sequence."""
    head, all_heads = tl.program_id(0).to(tl.int64), batch * heads
    slot, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (slot < num_slots)[:, None] & (column < width)[None, :]
    place = slot[:, None] * width + column[None, :]
    size = num_slots * width
    state = tl.load(states + head * size + place, mask=inside, other=0.0)
    for z in range(num_chunks):
        kept = tl.load(decay + (z * batch + head // heads) * num_slots + slot, mask=slot < num_slots, other=0.0)
        new = tl.load(written + (z * all_heads + head) * size + place, mask=inside, other=0.0)
        state = kept[:, None] * state + new
        tl.store(states + ((z + 1) * all_heads + head) * size + place, state, mask=inside)


def backward_kernel(  # type: ignore[no-untyped-def]
    decay,
    states,
    sums,
    of_decay,
    num_chunks,
    batch,
    heads,
    num_slots,
    width,
    ROWS: constexpr,
    WIDTH: constexpr,
):
    """sums_z += decay_z sums_z+1 from the last chunk on, and the gradient of decay_z from each head."""
    head, all_heads = tl.program_id(0).to(tl.int64), batch * heads
    slot, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (slot < num_slots)[:, None] & (column < width)[None, :]
    place = slot[:, None] * width + column[None, :]
    size = num_slots * width
    total = tl.load(sums + (num_chunks * all_heads + head) * size + place, mask=inside, other=0.0)
    for back in range(num_chunks):
        z = num_chunks - 1 - back
        here = (z * all_heads + head) * size + place
        kept = tl.load(decay + (z * batch + head // heads) * num_slots + slot, mask=slot < num_slots, other=0.0)
        before = tl.load(states + here, mask=inside, other=0.0)
        row = of_decay + (z * all_heads + head) * num_slots + slot
        tl.store(row, tl.sum(total * before, axis=1), mask=slot < num_slots)
        total = tl.load(sums + here, mask=inside, other=0.0) + kept[:, None] * total
        tl.store(sums + here, total, mask=inside)


@functools.cache
def kernels() -> tuple[Any, Any, Any] | None:
    """Triton and the kernels forward and backward; None where it is not installed."""
    global tl, constexpr
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError:
        return None
    tl = importlib.import_module("triton.language")
    constexpr = tl.constexpr
    return triton, triton.jit(forward_kernel), triton.jit(backward_kernel)


def launch(number: int, states_ZBKME: Tensor, *tensors: Tensor) -> None:
    found = kernels()
    assert found is not None
    triton, kernel = found[0], found[number]
    length, batch, heads, num_slots, width = states_ZBKME.shape
    padded = triton.next_power_of_2(width)
    rows = max(1, min(TILE // padded, triton.next_power_of_2(num_slots)))
    grid = (batch * heads, triton.cdiv(num_slots, rows))
    kernel[grid](*tensors, length - 1, batch, heads, num_slots, width, ROWS=rows, WIDTH=padded)


def triton_advance(decay_ZBM: Tensor, written_ZBKME: Tensor, states_ZBKME: Tensor) -> None:
    """`bounded.advance` by the kernel."""
    launch(1, states_ZBKME, decay_ZBM.contiguous(), written_ZBKME.contiguous(), states_ZBKME)


def triton_retreat(decay_ZBM: Tensor, states_ZBKME: Tensor, sums_ZBKME: Tensor) -> Tensor:
    """`bounded.retreat` by the kernel."""
    length, batch, heads, num_slots, _ = states_ZBKME.shape
    of_decay_ZBKM = torch.empty(length - 1, batch, heads, num_slots, dtype=decay_ZBM.dtype, device=decay_ZBM.device)
    launch(2, states_ZBKME, decay_ZBM.contiguous(), states_ZBKME, sums_ZBKME, of_decay_ZBKM)
    return of_decay_ZBKM.sum(dim=2)
