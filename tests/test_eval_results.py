"""One envelope for result files."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval import environment
from eval.results import write_result


def test_a_result_says_where_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_result(path, {"speed": 3, "git": "given"})
    result = json.loads(path.read_text())
    assert list(result) == ["date", "command", "git", "python", "versions", "hardware", "speed"]
    assert (result["speed"], result["git"], result["command"]) == (3, "given", sys.argv)
    assert [item.name for item in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (["processor\t: 0", "model name\t: AMD EPYC", "processor\t: 1", "model name\t: AMD EPYC"], "AMD EPYC"),
        (
            ["processor\t: 0", "CPU implementer\t: 0x41", "CPU part\t: 0xd40"],
            "aarch64, CPU implementer 0x41, CPU part 0xd40",
        ),
        ([], "aarch64"),
    ],
)
def test_processors_without_a_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, described: list[str], expected: str
) -> None:
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(environment, "_lines", lambda path: described)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.hardware().startswith(f"{expected}, ")


def test_a_mac_names_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    answer = SimpleNamespace(stdout="Apple M4\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda command, **options: answer)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.hardware().startswith("Apple M4, ")


def test_hardware_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment, "cores", lambda: 2)
    assert environment.hardware().endswith(", 2 threads")
    monkeypatch.setattr(environment, "cores", lambda: 1)
    assert environment.hardware().endswith(", 1 thread")
