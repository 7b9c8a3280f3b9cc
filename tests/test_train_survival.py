"""A run survives what can happen to it: every fault of train/faults.py, on the command itself."""

from pathlib import Path

import pytest

from train.faults import FAULTS, Fault, Scene, reference, survive


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, float]:
    return reference(Scene(tmp_path_factory.mktemp("alone") / "run", [f"data.path={corpus}"]))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault(fault: Fault, tmp_path: Path, corpus: Path, expected: dict[int, float]) -> None:
    scene = Scene(tmp_path / "run", [f"data.path={corpus}"])
    scene.expected = expected
    outcome = survive(fault, scene)
    assert outcome.steps_lost <= fault.most_lost
    assert outcome.error <= 1e-5
