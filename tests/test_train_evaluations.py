"""Tasks of evaluation while a run trains: what they measure, and that they change nothing of the training."""

import csv
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch_in_process, weights
from oracles import subject
from test_train_command import SMALL

import arch
from data.cli import UsageError
from eval.tasks import TASKS, select_tasks
from eval.tasks.task import Options, ProcessGroup, Subject, Task, TaskResult
from train.evaluations import check_pairs
from train.pretrain import main
from train.schema import EvalsConfig, PretrainConfig, evals_problems

CALLS: list[int] = []


def unruly(subject: Subject, options: Options) -> TaskResult:
    """A task that draws from every generator, and counts its calls."""
    CALLS.append(torch.randint(1000, ()).item())
    random.random(), np.random.random()
    assert not subject.model.training
    tokens = subject.generate([[1, 2, 3], [4]], 4)
    return TaskResult({"tokens": float(sum(map(len, tokens)))})


def shared(processes: int, lockstep: bool, run: Callable[[ProcessGroup, list[int]], TaskResult]) -> list[tuple]:
    """(result, lengths of its forward passes) of each of `processes`, which are threads here."""
    barrier, parts = threading.Barrier(processes, timeout=60), [None] * processes

    def gather(rank: int, mine: object) -> list:
        parts[rank] = mine
        barrier.wait()
        found = list(parts)
        barrier.wait()  # before anyone gives the next
        return found

    def one(rank: int) -> tuple:
        passes: list[int] = []
        return run(ProcessGroup(rank, processes, partial(gather, rank), lockstep), passes), passes

    with ThreadPoolExecutor(processes) as threads:
        return list(threads.map(one, range(processes)))


SHARED = {
    "perplexity": ["perplexity.batch=1", "perplexity.window=32"],
    "recall": ["recall.pairs=2,3", "recall.sequences=5", "recall.batch=1", "recall.kinds=gap,zoology"],
    "copy": ["copy.lengths=4,6", "copy.sequences=4", "copy.batch=1"],
    "induction": ["induction.length=12", "induction.sequences=5", "induction.batch=2"],
    "needles": ["needles.kinds=passkey", "needles.depths=0,50", "needles.samples=1", "needles.lengths=320,20"],
}


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_processes_share_a_task(name: str, lockstep: bool, tmp_path: Path) -> None:
    """Three give the result of one, to the last digit, and each makes fewer forward passes; as many as the others where
    the model is in parts, and then all of them where a text decides how many there are."""
    (chosen,) = select_tasks([name], SHARED[name])
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 4)
    model = arch.build("cla2", "tiny", num_layers=2, vocab_size=300).eval()

    def run(group: ProcessGroup | None, passes: list[int]) -> TaskResult:
        def counted(module: torch.nn.Module, args: tuple) -> None:
            if threading.get_ident() == here:
                passes.append(args[0].shape[-2])

        here, hook = threading.get_ident(), model.layers[0].register_forward_pre_hook(counted)
        try:
            return chosen.run(subject(model, texts=(text,), group=group))
        finally:
            hook.remove()

    alone: list[int] = []
    expected = run(None, alone)
    found = shared(3, lockstep, run)
    for result, _ in found:
        assert result.figures == expected.figures and result.rows == expected.rows and result.notes == expected.notes
    counts = [len(passes) for _, passes in found]
    if not lockstep:
        assert sum(counts) == len(alone) and max(counts) < len(alone)
    else:
        assert len(set(counts)) == 1
        assert (counts[0] == len(alone)) == (name == "needles") and counts[0] <= len(alone)


def test_what_one_process_refuses_ends_the_task_in_all() -> None:
    def refuse(item: int) -> int:
        if item == 4:
            raise UsageError("item 4")
        return item

    def run(group: ProcessGroup, passes: list[int]) -> None:
        with pytest.raises(UsageError, match="item 4"):
            subject(torch.nn.Identity(), group=group).each(range(8), refuse)
        assert subject(torch.nn.Identity(), group=group).each(range(4), refuse) == [0, 1, 2, 3], "the next task"

    shared(3, False, run)


def pretrain(corpus: Path, folder: Path, *arguments: str) -> None:
    words = [f"data.path={corpus}", f"folder={folder}", "logger=csv", *arguments]
    launch_in_process(main, "pretrain", PretrainConfig, ["+arch=cla2", "+size=tiny", *SMALL, *words])


def column(folder: Path, name: str, start: int = 0) -> dict[int, float]:
    with (folder / "metrics" / str(start) / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_they_change_nothing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and weights are those of a run without them, bit by bit; also after the run was continued."""
    monkeypatch.setitem(TASKS, "unruly", Task(Options, unruly))
    CALLS.clear()
    pretrain(corpus, tmp_path / "plain")
    capsys.readouterr()
    evals = "evals={every: 3, tasks: [perplexity, unruly], options: {perplexity: {batch: 2}}}"
    pretrain(corpus, tmp_path / "evaluated", evals)
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    assert len(CALLS) == 3, "after steps 3 and 6, and at the end, step 8"
    assert column(evaluated, "train/loss") == column(plain, "train/loss")
    for name, value in weights(plain).items():
        assert torch.equal(weights(evaluated)[name], value), name
    assert "step 6/8  perplexity: loss " in capsys.readouterr().out

    perplexity = column(evaluated, "evaluations/perplexity/ppl")
    assert list(perplexity) == [3, 6, 8]
    summary = json.loads((evaluated / "summary.json").read_text())
    entries = summary["evaluations"]
    assert {key: entries["perplexity"]["figures"][key] for key in ("loss", "ppl", "bpb")} == pytest.approx(
        summary["val"], rel=1e-6
    )
    assert perplexity[8] == pytest.approx(summary["val"]["ppl"], rel=1e-6)
    assert perplexity[6] == pytest.approx(column(evaluated, "val/ppl")[6], rel=1e-6)
    assert entries["unruly"]["step"] == 8
    assert json.loads((evaluated / "evaluations" / "perplexity.json").read_text())["options"]["batch"] == 2
    assert "evaluations" not in json.loads((plain / "summary.json").read_text())

    launch_in_process(main, "pretrain", PretrainConfig, [f"resume={evaluated}", "tokens=1280"])
    assert list(column(evaluated, "evaluations/perplexity/ppl", start=1)) == [9, 10]
    assert json.loads((evaluated / "summary.json").read_text())["evaluations"]["perplexity"]["step"] == 10


def test_a_run_that_had_ended_is_evaluated(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is resumed, with tasks that it did not have; one that cannot be run is a warning."""

    def impossible(subject: Subject, options: Options) -> TaskResult:
        raise UsageError("the vocabulary is too small")

    monkeypatch.setitem(TASKS, "impossible", Task(Options, impossible))
    pretrain(corpus, tmp_path / "run", "tokens=256")
    words = [f"resume={tmp_path / 'run'}", "evals.tasks=[perplexity,impossible]"]
    launch_in_process(main, "pretrain", PretrainConfig, words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["evaluations"]) == ["perplexity"]
    assert "warning: step 2: the task impossible: the vocabulary is too small" in capsys.readouterr().err


@pytest.mark.parametrize("joined", [False, True])
def test_a_run_that_asks_for_other_pairs_does_not_start(joined: bool) -> None:
    """Of one folder of data=recall; a mixture is asked as the options say."""
    recipe = {"source": {"recall": {"kind": "gap", "joined": joined}}}
    config, folders = PretrainConfig(), {Path("data"): SimpleNamespace(recipe=recipe)}
    said = "recall.joined is false, .* one token; set evals.options={recall: {joined: true, kinds: .gap.}}"
    if not joined:
        said = "recall.joined is true, .* two tokens; set evals.options={recall: {joined: false}}"
    for right in (False, True):
        given = joined if right else not joined
        config.evals = EvalsConfig(["recall", "compressed"], options={"compressed": {"joined": joined}})
        config.evals.options["recall"] = {"joined": given, "kinds": ["gap"]}
        if right:
            check_pairs(config, folders)  # type: ignore[arg-type]
        else:
            with pytest.raises(UsageError, match=said):
                check_pairs(config, folders)  # type: ignore[arg-type]
    config.evals.options = {"recall": {"kinds": ["zoology"]}, "compressed": {"parts": ["text"]}}
    check_pairs(config, folders)  # type: ignore[arg-type]
    config.evals.options = {"compressed": {"joined": not joined}, "recall": {"kinds": ["zoology"]}}
    with pytest.raises(UsageError, match=f"set evals.options={{compressed: {{joined: {str(joined).lower()}}}}}"):
        check_pairs(config, folders)  # type: ignore[arg-type]
    config.data.mix = {"data": 1.0}
    check_pairs(config, folders)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvalsConfig(["perplexty"]), "evals: no task perplexty, did you mean perplexity?"),
        (EvalsConfig(every=5), "evals.every is set without evals.tasks"),
        (EvalsConfig(["perplexity"], text=["/nowhere"]), "evals.text: /nowhere: there is no such file"),
        (EvalsConfig(["perplexity"], options={"perplexity": {"batch": 0}}), "evals: perplexity.batch is 0"),
        (EvalsConfig(["perplexity"], options={"perplexity": 3}), "evals: perplexity is 3; write evals.options={"),
        (EvalsConfig(options={"perplexity": {"batch": 2}}), "evals: tasks= is empty"),
    ],
)
def test_mistakes(config: EvalsConfig, message: str) -> None:
    (problem,) = evals_problems(config)
    assert problem.startswith(message)
