"""One envelope for result files."""

import json
import sys
from pathlib import Path

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


def test_hardware_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 2)
    assert environment.hardware().endswith(", 2 threads")
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 1)
    assert environment.hardware().endswith(", 1 thread")
