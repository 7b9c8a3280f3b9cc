"""The study of bounded caches, with toy numbers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script

from arch import allocate, resolve
from arch.footprint import num_params
from data.cli import UsageError, parse
from train.benchmarks import bounded_report, bounded_study
from train.benchmarks.bounded_study import (
    RULES,
    Settings,
    cells,
    describe_rule,
    layout,
    main,
    problems,
    rule_config,
    study,
)

BOUNDED = [rule for rule in RULES if rule != "full"]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
TOY = [
    "window=8", "lm_layers=1", "lm_width=32", "lm_vocab=600", "lm_length=16", "lm_tokens=96", "lm_val_tokens=64",
    "recall_layers=1", "recall_width=32", "recall_length=24", "recall_pairs=2,4", "recall_keys=4", "recall_batch=2",
    "recall_steps=2", "recall_val=4",
]  # fmt: skip


@pytest.mark.parametrize("task", ["lm", "recall"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("window", [8, 32, 64])
def test_bounded_rules_allocate_equally_many_bytes(task: str, itemsize: int, window: int) -> None:
    """In real caches, whatever the context."""
    settings = Settings(window=window, itemsize=itemsize)
    found = {}
    for rule in BOUNDED:
        plan = resolve(rule_config(task, rule, settings))
        sizes = {allocate(plan, 1, length, dtype=DTYPES[itemsize]).nbytes for length in (window, 50 * window)}
        assert len(sizes) == 1
        found[rule] = sizes.pop()
        assert describe_rule(task, rule, settings)["state_bytes"] == found[rule]
        assert describe_rule(task, rule, settings)["off_percent"] == 0
    assert len(set(found.values())) == 1
    ring_slots = describe_rule(task, "ring_slots", settings)
    assert ring_slots["window"] == window // 2, "half of the state goes to slots"


def test_what_does_not_come_out_even_is_told() -> None:
    about = describe_rule("lm", "gated", Settings(window=33))
    assert about["slots"] == 16
    assert about["off_percent"] == pytest.approx(100 * (32 / 33 - 1))


def test_rules_differ_by_their_routers_alone() -> None:
    settings = Settings()
    params = {}
    for rule in RULES:
        config = rule_config("lm", rule, settings)
        params[rule] = num_params(config, resolve(config))
    sinks = settings.lm_layers * rule_config("lm", "window", settings).size.num_heads
    assert params["window"] == params["full"] + sinks
    assert all(0 <= count / params["full"] - 1 < 0.05 for count in params.values()), params
    assert all(store.kv_heads == "all" for rule in RULES for store in layout(rule, settings).stores.values())


@pytest.fixture
def toy(corpus: Path, tmp_path: Path) -> Settings:
    settings = parse(Settings, [*TOY, f"data={corpus}", f"out={tmp_path / 'out'}"])
    assert not problems(settings)
    return settings


def test_from_nothing_to_the_pictures_and_on(
    toy: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings, out = toy, toy.out
    study(replace(settings, seeds=1))
    first = json.loads((out / "result.json").read_text())
    assert {path.name for path in out.iterdir()} == {"result.json", "README.md", "positions.png", "recall.png"}
    text = (out / "README.md").read_text()
    for words in (*(f"`{rule}`" for rule in RULES), "4 positions + 2 slots", "+0.0 %", "1 seed"):
        assert words in text
    for rule in RULES:
        run = first["lm"]["runs"][f"{rule} lr 0.003 seed 0"]
        assert set(run["positions"]) == {"16", "32", "64"}
        assert [bucket["first"] for bucket in run["positions"]["32"]] == [0, 1, 2, 4, 8, 16]
        asked = first["recall"]["runs"][f"{rule} lr 0.003 seed 0"]
        assert set(asked["counts"]) == {"2", "4"}
        assert set(asked["by_distance"]) == {"1", "2", "4", "8", "16", "32", "64"}, "to four times 24 tokens"

    trained = []
    run_cell = bounded_study.run
    monkeypatch.setattr(bounded_study, "run", lambda cell, *rest: trained.append(cell) or run_cell(cell, *rest))
    study(settings)
    assert [cell.seed for cell in trained] == [1] * 10, "what was there is not trained again"
    second = json.loads((out / "result.json").read_text())
    for task in ("lm", "recall"):
        assert first[task]["runs"].items() <= second[task]["runs"].items()
        assert len(second[task]["runs"]) == 10
    again = run_cell(trained[0], settings, lambda loss: None)
    kept = second["lm"]["runs"][trained[0].key]
    assert (again["loss"], again["positions"]) == (kept["loss"], kept["positions"]), "a function of settings and seed"
    with pytest.raises(UsageError, match=r"has runs with another window; give another folder with out="):
        study(replace(settings, window=16))
    monkeypatch.setattr(bounded_study, "text", lambda settings: (Path(), SimpleNamespace(digest="another")))
    with pytest.raises(UsageError, match=r"has runs on another text; give that with data=, or another folder"):
        study(replace(settings, seeds=3))
    recall = replace(settings, tasks=("recall",), rules=("window",), seeds=3)
    study(recall)  # reads none
    assert json.loads((out / "result.json").read_text())["lm"] == second["lm"]


def test_one_task_alone(toy: Settings) -> None:
    settings, out = toy, toy.out
    study(replace(settings, tasks=("recall",), rules=("gated", "window"), seeds=1))
    assert {path.name for path in out.iterdir()} == {"result.json", "README.md", "recall.png"}
    assert len(cells(settings)) == 20


def test_the_best_learning_rate_is_shown() -> None:
    runs = [
        {"rule": "window", "lr": lr, "seed": seed, "accuracy": accuracy, "loss": accuracy}
        for lr, accuracies in ((1e-3, (0.2, 0.4)), (1e-2, (0.1, 0.9)))
        for seed, accuracy in enumerate(accuracies)
    ]
    assert [run["lr"] for run in bounded_report.best_runs(runs, "recall")["window"]] == [1e-2, 1e-2]
    assert [run["lr"] for run in bounded_report.best_runs(runs, "lm")["window"]] == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["windw=3"], "unknown key windw, did you mean window? The command line has out, window, itemsize"),
        (["window"], "cannot read 'window'"),
        (["window=wide"], "window is wide; it must be a whole number"),
        (["window=0"], "window is 0; it must be at least 1"),
        (["window=2"], "too few bytes for a slot beside a window"),
        (["rules=gated,nothing"], "no rule nothing; the rules are full, window"),
        (["tasks=sums"], "no task sums; the tasks are lm, recall"),
        (["seeds=0"], "seeds is 0"),
        (["lm_lr=,"], "a list not empty"),
        (["slots_share=1"], "slots_share is 1.0"),
        (["lm_tokens=3"], "lm_tokens is 3; one step takes"),
        (["recall_pairs=900"], "make the sequence longer"),
    ],
)
def test_mistakes_are_refused_before_any_work(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_help_and_errors_of_the_command() -> None:
    shown = run_script("train/benchmarks/bounded_study.py", "--help")
    assert shown.returncode == 0
    for words in ("ring_router", "slots_share", "recall_*"):
        assert words in shown.stdout
    refused = run_script("train/benchmarks/bounded_study.py", "window=0")
    assert refused.returncode == 2
    assert refused.stderr == "error: window is 0; it must be at least 1, a list not empty\n"
