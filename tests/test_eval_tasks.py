"""`eval/evaluate.py`: the registry of tasks, their options, and what is written."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from data.cli import UsageError
from eval.evaluate import main
from eval.tasks import TASKS, choose

OLD = ROOT / "tests" / "golden" / "old"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with finished runs, their data and exports."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def result(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (["perplexty"], [], "did you mean perplexity?"),
        (["perplexity:book"], [], "takes no name"),
        ([], [], "tasks= is empty"),
        (["perplexity"], ["perplexity.strid=8"], "did you mean stride?"),
        (["perplexity"], ["perplexity.stride=x"], r"perplexity\.stride is x; it must be a whole number"),
        (["perplexity"], ["perplexity.stride=9", "perplexity.window=8"], r"perplexity\.stride is 9, more than"),
        (["perplexity"], ["perplexity.protocol=page"], "choose auto, windows"),
    ],
)
def test_mistakes_in_options(names: list[str], words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(names, words)


def test_every_option_is_explained(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    for name, task in TASKS.items():
        for field in task.options.__dataclass_fields__:
            assert field in (task.options.__doc__ or ""), f"{name}.{field}"
            assert f"{field}=" in shown


@pytest.mark.parametrize("name", ["run-mixattention", "run-block", "run-bct"])
def test_perplexity_of_a_run_is_its_validation_loss(name: str, old: Path) -> None:
    """On the shards, and by the windows, that training validated on; merged into the summary beside it."""
    before = result(old / name / "summary.json")
    main([f"checkpoint={name}", "tasks=perplexity", "device=cpu"])
    after = result(old / name / "summary.json")
    found = after.pop("evaluations")["perplexity"]
    assert after == before
    assert found["step"] == 8
    assert {key: found["figures"][key] for key in ("loss", "ppl", "bpb")} == pytest.approx(before["val"], rel=1e-6)
    written = result(old / name / "evaluations" / "perplexity.json")
    assert written["figures"] == found["figures"] and written["digest"] == found["digest"]
    assert sum(row["targets"] for row in written["rows"]) == written["figures"]["tokens"]
    assert (old / name / "evaluations" / "perplexity-positions.png").exists()
