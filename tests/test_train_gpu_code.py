"""Every layout as code for an H100, which needs no GPU but the CUDA build of torch; and counts that may not grow.

The environment is made by `make gpu-code`, which also runs these tests.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHS, BLOCKS, covering, whole_depth

from arch.named import names
from train.benchmarks import gpu_counts
from train.benchmarks.gpu_case import Options, case_config
from train.benchmarks.gpu_code import SHARED_MEMORY, Assembled, Workshop, unavailable_reason
from train.benchmarks.gpu_counts import OUT, count_operators, count_step, count_token, micro_batch_that_fits

REASON = unavailable_reason()
needs_cuda_build = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(1800),
    pytest.mark.slow,
]
SPILL = 512  # bytes of stack per thread that a kernel may have, which spills its registers to there


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OUT / name).read_text())
    return content


OPERATORS = recorded("operators.json")


def test_operators_of_every_layout_are_recorded() -> None:
    assert set(OPERATORS["layouts"]) >= set(ARCHS), "python train/benchmarks/gpu_counts.py toy=true"


@pytest.mark.parametrize("arch", covering(ARCHS))
def test_operators_do_not_grow(arch: str) -> None:
    """Of a micro-step and of a decoded token, at a small size on the CPU: what a GPU would launch grows with them."""
    version = OPERATORS["versions"]["torch"].partition("+")[0]
    if torch.__version__.partition("+")[0] != version:
        pytest.skip(f"operators were counted with torch {version}")
    command = "python train/benchmarks/gpu_counts.py toy=true"
    for what, count in count_operators(arch).items():
        limit = OPERATORS["layouts"][arch][what]
        assert count <= limit, f"{arch}: {count} operators in a {what}, recorded {limit}; if that is meant: {command}"


def test_counts_of_other_layouts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some are counted; those of all replace the file."""
    path = tmp_path / "operators.json"
    path.write_text(json.dumps({"layouts": {"mha": {"token": 1}, "gone": {"token": 2}}}))
    monkeypatch.setattr(gpu_counts, "count_operators", lambda arch: {"token": 3})
    gpu_counts.main(["toy=true", "archs=mha", f"out={tmp_path}"])
    assert json.loads(path.read_text())["layouts"] == {"gone": {"token": 2}, "mha": {"token": 3}}
    gpu_counts.main(["toy=true", f"out={tmp_path}"])
    assert list(json.loads(path.read_text())["layouts"]) == sorted(names("arch"))


def check(kernels: dict[str, list[Assembled]]) -> None:
    """Of the configurations of each kernel, one fits into a block's shared memory, and one has registers enough."""
    assert kernels
    for name, tried in kernels.items():
        assert min(made.shared for made in tried) <= SHARED_MEMORY, (name, tried)
        assert min(made.stack for made in tried) <= SPILL, (name, tried)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop()


class TestCode:
    pytestmark = needs_cuda_build

    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("documents", [False, True])
    def test_training_lowers_and_assembles(self, workshop: Workshop, arch: str, documents: bool) -> None:
        """Forward and backward, each kind of block as one graph; and no more launches than were recorded."""
        if documents and arch in BLOCKS:
            pytest.skip("a Block Transformer cannot keep documents apart")
        config = case_config(arch, gpu_counts.SIZE, Options(toy=False))
        step = count_step(config, micro_batch_that_fits(config), workshop, documents)
        blocks = [(calls, graphs) for part, calls, graphs in step.graphs if part == "model"]
        assert all(len(graphs) == 2 for _, graphs in blocks), "forward and backward"
        assert sum(calls for calls, _ in blocks) == num_graphs(config), "a block is one graph, and so is a last norm"
        check(workshop.assemble(lowered for _, _, graphs in step.graphs for lowered in graphs))
        known = recorded("counts.json")
        version = known["versions"]["torch"].partition("+")[0]
        command = "python train/benchmarks/gpu_counts.py"
        assert arch in known["layouts"], f"{arch} was never counted: {command} steps=true archs={arch}"
        if documents or version != torch.__version__.partition("+")[0]:
            return
        launches = sum(part.launches for part in step.parts.values())
        limit = known["layouts"][arch]["launches"]
        assert launches <= limit, f"{arch}: {launches} launches, recorded {limit}; if that is meant: {command}"

    @pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in BLOCKS])
    def test_decoding_lowers_and_assembles(self, workshop: Workshop, arch: str) -> None:
        """A compiled step of fixed shapes, at the least depth with all of the pattern."""
        config = case_config(arch, gpu_counts.SIZE, Options(toy=False))
        config.size.num_layers = whole_depth(arch, least=4)
        token = count_token(config, workshop)
        assert token.launches["compiled"] < token.launches["static"]
        check(workshop.assemble(lowered for graphs in token.graphs for lowered in graphs))


def num_graphs(config: Any) -> int:
    from arch import resolve

    return sum(stack.plan.num_layers + 1 for stack in resolve(config).stacks)
