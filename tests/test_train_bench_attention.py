"""The attention benchmark: every claimed case, true errors, pairs counted as the mask has them."""

import math

import pytest
import torch

from arch.attend import BACKENDS, Backend, sdpa
from arch.masks import SequenceBatch, dense
from train.benchmarks.attention import MASKS, TINY, cases, pairs, run_case

DOCUMENTS = torch.tensor([[0] * 2 + [1] * 6 + [2], [0] * 9])


def test_cases_are_what_is_claimed() -> None:
    found = cases("cpu")
    assert {case.backend for case in found} == {"sdpa", "reference"}
    assert len(found) == 2 * len(TINY) * len(MASKS)
    real = cases("cuda")
    assert {case.batch * case.length for case in real} == {16384}
    assert not [case for case in real if case.backend == "varlen" and (case.sinks or case.shape == "mla")]


@pytest.mark.parametrize("case", cases("cpu"), ids=lambda case: f"{case.backend}-{case.shape}")
def test_results(case) -> None:
    result = run_case(case)
    assert set(result["error"]) == {"out", "q", "k", "v"} | ({"sinks"} if case.sinks else set())
    assert all(error < 1e-5 for error in result["error"].values())
    assert all(result[key] > 0 for key in ("ms_mask", "ms_forward", "ms_both", "tflops_forward", "tflops_both"))


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(q, k, v, mask, scale, sinks):
        return sdpa(q, k, v, mask, scale * 1.1, sinks)

    monkeypatch.setitem(BACKENDS, "sdpa", Backend("sdpa", off, dense, ""))
    assert min(run_case(cases("cpu")[0])["error"].values()) > 1e-3


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_pairs_are_those_of_the_mask(window: int | None, documents: torch.Tensor | None) -> None:
    sequences = SequenceBatch(2, 9, documents, torch.device("cpu"))
    allowed = dense(sequences, window).allowed
    allowed = torch.ones(9, 9).tril() if allowed is None else allowed
    copies = 2 // math.prod(allowed.shape[:-2]) if documents is not None else 2
    assert pairs(sequences, window) == copies * int(allowed.sum())
