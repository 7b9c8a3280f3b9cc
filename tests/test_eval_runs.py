"""Run folders: what decides a run, and folders of earlier versions."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from eval.histories import load_history
from eval.runs import KEYS, Run, RunError, deciding_values, finished_run, group_by_seed, look_for_runs
from train.schema import PretrainConfig

OLD = ROOT / "tests" / "golden" / "old"


def leaves(config: object, prefix: str = "") -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_every_key_of_a_run_is_listed_once() -> None:
    """Each is in KEYS, or one of the groups it lies in is; KEYS has no other."""
    keys = set(leaves(PretrainConfig()))
    for key in keys:
        parts = key.split(".")
        assert {".".join(parts[: i + 1]) for i in range(len(parts))} & set(KEYS), f"{key} is not in eval/runs.py's KEYS"
    for key in KEYS:
        assert [known for known in keys if f"{known}.".startswith(f"{key}.")], f"{key} is no key of PretrainConfig"


def test_deciding_values() -> None:
    config = {"arch": {"a": 1}, "optim": {"name": "adamw"}, "trainer": {"devices": 2}, "seed": 3}
    result, speed = deciding_values(config, "result"), deciding_values(config, "speed")
    assert (result["arch"], result["optim"], result["init"]) == ({"a": 1}, {"name": "adamw"}, None)
    assert "optim.name" not in result, "a part of optim"
    assert (speed["trainer.devices"], speed["trainer.compile"]) == (2, None)
    assert deciding_values(config, "seed") == {"seed": 3}


def test_fp8_is_no_seed_of_bf16() -> None:
    """Runs that differ in bf16 and fp32 are repetitions of one; those in fp8 are another."""
    configs = [{"trainer": {"precision": precision}} for precision in ("auto", "bf16", "fp8", "fp32", "fp8")]
    found = group_by_seed(enumerate(configs), lambda run: ["cla2", deciding_values(run[1], "result")])
    assert {name: [number for number, _ in runs] for name, runs in found.items()} == {
        "cla2 (precision=null)": [0, 1, 3],
        "cla2 (precision=fp8)": [2, 4],
    }


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.glob("run-*")))
def test_a_run_of_an_earlier_version_is_read(name: str) -> None:
    run = Run(OLD / name)
    assert run.config["name"] == run.summary["name"]
    assert run.starts[0]["hardware"]
    assert run.metrics[-1]["step"] == "8"
    assert run.plan is run.plan
    history = load_history(run, "wall")
    assert history.steps[-1] == 8
    assert history.seconds_at(8) > history.seconds_at(4) > 0


def test_groups() -> None:
    runs = [("a", 1), ("a", 2), ("b", 1), ("a", 1)]
    assert list(group_by_seed(runs[2:], list).values()) == [[("b", 1)], [("a", 1)]]
    groups = group_by_seed(runs, list)
    assert list(groups.values()) == [[("a", 1), ("a", 1)], [("a", 2)], [("b", 1)]]
    first, second, third = groups
    assert first.startswith("a (") and second.startswith("a (") and third == "b"
    old, new = {"lr": 1, "decay": None}, {"lr": 1}
    assert len(group_by_seed([old, new], lambda run: ["a", run])) == 1, "a key that an earlier version did not have"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "a: [", "config.yaml"),
        ("config.yaml", "7", "config.yaml is no mapping; put it back"),
        ("plan.json", "{", "plan.json"),
        ("run.json", "[" * 10**5, "run.json"),
        ("summary.json", "[1]", "summary.json is no mapping; put it back"),
        ("summary.json", '{"name": "a"}', "lacks experiment, params, seed"),
    ],
)
def test_broken_files_are_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    read = {"config": lambda run: run.config, "plan": lambda run: run.plan, "run": lambda run: run.starts}
    with pytest.raises(RunError) as caught:
        read.get(Path(file).stem, lambda run: finished_run(run.folder))(Run(tmp_path))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps([{"hardware": "x"}]))
    (run,) = look_for_runs([tmp_path], finished=False).runs
    assert not run.finished
    with pytest.raises(RunError, match=r"no finished run: .*summary.json is missing"):
        _ = run.summary
    with pytest.raises(RunError, match="no finished run in"):
        look_for_runs([tmp_path], finished=True)
