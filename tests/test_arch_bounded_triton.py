"""The Triton kernels of bounded stores against the plain form: in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT

from arch.bounded_scan import advance, recurrence, retreat

SHAPES = [(5, 2, 2, 3, 6), (1, 1, 1, 64, 16), (9, 2, 1, 40, 24)]  # Z, B, K, M, E: powers of two and others


def check(shape: tuple[int, ...]) -> None:
    from arch import bounded_triton

    chunks, batch, heads, slots, width = shape
    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(chunks, batch, slots, generator=generator)
    written = torch.randn(chunks, batch, heads, slots, width, generator=generator)
    states = [torch.empty(chunks + 1, batch, heads, slots, width) for _ in range(2)]
    sums = torch.randn(states[0].shape, generator=generator)
    for one in states:
        one[0] = 0.5
    advance(decay, written, states[0])
    bounded_triton.triton_advance(decay, written, states[1])
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)
    ours = [sums.clone(), sums.clone()]
    expected = retreat(decay, states[0], ours[0])
    torch.testing.assert_close(bounded_triton.triton_retreat(decay, states[0], ours[1]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*ours, rtol=1e-6, atol=1e-6)


def cannot_interpret() -> str | None:
    """Why Triton's interpreter cannot run here; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of triton before 3.7 counts loops by arrays that numpy 2.4 refuses to take as integers"
    return None


@pytest.mark.skipif(cannot_interpret() is not None, reason=str(cannot_interpret()))
def test_the_kernels_are_the_plain_form() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    command = "from test_arch_bounded_triton import SHAPES, check; [check(shape) for shape in SHAPES]"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests"), *sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)


def test_the_cpu_takes_the_plain_form() -> None:
    assert recurrence("cpu") == (advance, retreat)
