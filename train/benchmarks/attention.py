"""Time and check every attention backend on this machine: `python train/benchmarks/attention.py` prints a table.

Other scripts call `cases` and `run_case`.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import train  # noqa: F401  before torch

import torch
from torch import Tensor

from arch.attend import BACKENDS, Needs, attend, reference
from arch.masks import SequenceBatch, dense, segment_starts
from arch.spans import visible_pairs
from train.benchmarks.timing import milliseconds

# Query heads, key heads, key width, value width.
SHAPES = {"mha": (16, 16, 128, 128), "gqa4": (16, 4, 128, 128), "mqa": (16, 1, 128, 128), "mla": (16, 16, 192, 128)}
TINY = {"mha": (4, 4, 16, 16), "gqa4": (4, 1, 16, 16), "mla": (4, 4, 24, 16)}
# Windowed?, documents?, sinks?
MASKS = ((False, False, False), (True, False, False), (False, True, False), (True, True, False), (True, False, True))


@dataclass(frozen=True)
class AttentionCase:
    """Attention of `batch` rows of `length` tokens to themselves; `documents` is their mean length, None: one a row."""

    backend: str
    shape: str
    heads: int
    kv_heads: int
    width: int
    value_width: int
    batch: int
    length: int
    window: int | None
    documents: int | None
    sinks: bool
    dtype: torch.dtype
    device: str

    @property
    def needs(self) -> Needs:
        needed = {
            "windows": self.window is not None,
            "documents": self.documents is not None,
            "sinks": self.sinks,
            "gqa": self.kv_heads < self.heads,
            "uneven_value_width": self.width != self.value_width,
        }
        return Needs(frozenset(feature for feature, need in needed.items() if need), (self.width, self.value_width))


def cases(device: str) -> list[AttentionCase]:
    """Every case that a backend claims and that can run on `device`.

    On CUDA 16384 tokens in bf16, in rows of 2048 and 8192; elsewhere tiny.
    """
    real = device == "cuda"
    shapes, window, documents = (SHAPES, 1024, 512) if real else (TINY, 8, 10)
    dtype = torch.bfloat16 if real else torch.float32
    result = []
    for length, batch in ((2048, 8), (8192, 2)) if real else ((40, 2),):
        for shape, sizes in shapes.items():
            for windowed, cut, sinks in MASKS:
                for name, backend in BACKENDS.items():
                    limits = (window if windowed else None, documents if cut else None)
                    case = AttentionCase(name, shape, *sizes, batch, length, *limits, sinks, dtype, device)
                    claimed = not backend.unsupported(case.needs, device) and (
                        not backend.dtypes or dtype in backend.dtypes
                    )
                    if claimed and not (real and name == "reference"):
                        result.append(case)
    return result


def run_case(case: AttentionCase) -> dict[str, Any]:
    """Measure a case; its fields, and

    ms_mask, ms_forward, ms_both   median milliseconds: the mask, forward, forward and backward
    tflops_forward, tflops_both    products over visible pairs; a backward pass counts as 2.5 forward ones, as in
                                   FlashAttention-2 (section 4.1)
    error                          ||ours - exact|| / ||exact|| against fp64 of the same inputs: out, and the gradients
    """
    torch._dynamo.reset()  # each case compiles anew; variants of earlier ones must not count
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=case.device)

    rows = (case.batch, case.length)
    sizes = {
        "q": (*rows, case.heads, case.width),
        "k": (*rows, case.kv_heads, case.width),
        "v": (*rows, case.kv_heads, case.value_width),
    }
    inputs = {name: normal(*size).to(case.dtype).requires_grad_() for name, size in sizes.items()}
    if case.sinks:
        inputs["sinks"] = normal(case.heads).requires_grad_()
    weight = normal(*rows, case.heads, case.value_width).to(case.dtype)
    segment_ids_BT = None
    if case.documents is not None:
        cuts = torch.rand(rows, generator=generator, device=case.device)
        segment_ids_BT = (cuts < 1 / case.documents).cumsum(1)
    device = torch.device(case.device)
    sequences = SequenceBatch(*rows, segment_ids_BT, device)
    backend, scale = BACKENDS[case.backend], case.width**-0.5
    mask = backend.mask(sequences, case.window, case.dtype)

    def forward() -> Tensor:
        return attend(inputs["q"], inputs["k"], inputs["v"], mask, scale, inputs.get("sinks"))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), list(inputs.values()), weight)

    ours = {"out": forward().detach(), **dict(zip(inputs, both(), strict=True))}
    result = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch."), "error": {}}
    for name, exact in definition(case, inputs, weight, sequences).items():
        result["error"][name] = ((ours[name].double() - exact).norm() / exact.norm()).item()
    with torch.no_grad():
        result["ms_forward"] = milliseconds(forward, device)
    result["ms_both"] = milliseconds(both, device)
    result["ms_mask"] = milliseconds(lambda: backend.mask(sequences, case.window, case.dtype), device)
    flops = 2 * pairs(sequences, case.window) * case.heads * (case.width + case.value_width)
    result["tflops_forward"] = flops / result["ms_forward"] / 1e9
    result["tflops_both"] = 3.5 * flops / result["ms_both"] / 1e9
    return result


def pairs(sequences: SequenceBatch, window: int | None) -> int:
    """Number of visible (query, key) pairs of the batch."""
    if sequences.segment_ids_BT is None:
        return sequences.batch * visible_pairs(sequences.length, window)
    starts = segment_starts(sequences.segment_ids_BT)
    seen = torch.arange(sequences.length, device=starts.device) - starts + 1
    return int(seen.clamp(max=window or sequences.length).sum())


def definition(
    case: AttentionCase, inputs: dict[str, Tensor], weight: Tensor, sequences: SequenceBatch
) -> dict[str, Tensor]:
    """Output and gradients in fp64, one row and one key head at a time: the scores of all would not fit."""
    doubles = {name: tensor.detach().double() for name, tensor in inputs.items()}
    exact = {"out": torch.zeros_like(weight, dtype=torch.float64)}
    exact |= {name: torch.zeros_like(tensor) for name, tensor in doubles.items()}
    group = case.heads // case.kv_heads
    for row in range(case.batch):
        documents = None if sequences.segment_ids_BT is None else sequences.segment_ids_BT[row : row + 1]
        mask = dense(SequenceBatch(1, case.length, documents, sequences.device), case.window)
        for head in range(case.kv_heads):
            queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
            where: dict[str, Any] = {name: (slice(row, row + 1), slice(None), queries) for name in ("out", "q")}
            where |= {name: (slice(row, row + 1), slice(None), keys) for name in ("k", "v")} | {"sinks": queries}
            part = {name: tensor[where[name]].requires_grad_() for name, tensor in doubles.items()}
            out = reference(part["q"], part["k"], part["v"], mask, case.width**-0.5, part.get("sinks"))
            gradients = torch.autograd.grad(out, list(part.values()), weight[where["out"]].double())
            for name, value in zip(("out", *part), (out.detach(), *gradients), strict=True):
                exact[name][where[name]] += value
    return exact


def main() -> None:
    from rich.console import Console  # a GPU machine may lack it, and `cases` and `run_case` need it not
    from rich.table import Table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ("backend", "shape", "length", "window", "documents", "sinks")
    figures = ("ms_mask", "ms_forward", "ms_both", "tflops_forward", "tflops_both")
    table = Table(*columns, *figures, "worst error")
    for case in cases(device):
        fields = [str(getattr(case, column)) for column in columns]
        try:
            result = run_case(case)
        except RuntimeError as error:  # a kernel that fails is a row of the table, too
            table.add_row(*fields, f"failed: {str(error).splitlines()[0]}")
            continue
        worst = max(result["error"], key=result["error"].get)
        table.add_row(*fields, *(f"{result[f]:.3g}" for f in figures), f"{worst} {result['error'][worst]:.1e}")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    main()
