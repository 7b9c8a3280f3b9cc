"""A run survives what can happen to it: faults of train/benchmarks/faults.py, on the command itself."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import process_environment
from fork_server import connect

from train.benchmarks import faults
from train.benchmarks.faults import FAULTS, Fault, FaultRun, reference, run_fault, stop

# Tried by other tests, or by another fault, in less time; `make faults` tries all.
ELSEWHERE = {
    "SIGTERM",  # here, by the suite itself
    "Ctrl-C",  # test_train_command
    "SIGKILL after step 9",
    "SIGKILL after step 16",
    "loss is not a number",
    "newest checkpoint half written",  # test_train_checkpoint
    "disk full while saving in the background",
    "SIGTERM to one of two processes that save in the background, FSDP; resumed by two",  # test_train_parallel
    "two processes, DDP; resumed by one",  # as with FSDP
}


STEPS = 16


@pytest.fixture(scope="module", autouse=True)
def forks() -> Iterator[None]:
    """Runs are short, and forks, whose imports are done: what comes after them is the same in an interpreter of its
    own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "STEPS", STEPS)
        patch.setattr(faults.subprocess, "Popen", connect(process_environment()))
        yield


@pytest.fixture(scope="module")
def options(corpus: Path) -> list[str]:
    return [f"tokens={STEPS * 8 * 64}", "size.vocab_size=600", f"data.path={corpus}"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> dict[int, float]:
    return reference(FaultRun(tmp_path_factory.mktemp("alone") / "run", options))


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> tuple[Path, str]:
    """A run that got SIGTERM after step 7, and its stderr: where several faults begin."""
    run = FaultRun(tmp_path_factory.mktemp("stopped") / "run", options)
    return run.folder, stop(run)


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch, stopped_run: tuple[Path, str]) -> None:
    def copy(run: FaultRun) -> str:
        shutil.copytree(stopped_run[0], run.folder)
        return stopped_run[1]

    monkeypatch.setattr(faults, "stop", copy)


@pytest.mark.slow
def test_the_suite_writes_what_it_tried(
    tmp_path: Path, corpus: Path, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its first fault alone, on data that is there."""
    monkeypatch.setattr(faults, "FAULTS", FAULTS[:1])
    monkeypatch.setattr(faults, "open_data", lambda config: [corpus])
    monkeypatch.setattr(faults, "reference", lambda run: expected)
    with pytest.raises(SystemExit) as ended:
        faults.main(tmp_path)
    result = json.loads((tmp_path / "faults.json").read_text())
    assert ended.value.code == 0, result
    assert (result["tried"], result["survived"]) == (1, 1)
    (outcome,) = result["faults"]
    assert (outcome["fault"], outcome["steps_lost"], outcome["error"]) == ("SIGTERM", 0, 0)
    assert "stopped after step" in outcome["said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name not in ELSEWHERE], ids=lambda fault: fault.name.replace(" ", "-")
)
def test_fault(fault: Fault, tmp_path: Path, options: list[str], expected: dict[int, float]) -> None:
    run = FaultRun(tmp_path / "run", options)
    run.expected = expected
    outcome = run_fault(fault, run)
    assert outcome.steps_lost <= fault.most_lost
    assert outcome.error <= 1e-5
