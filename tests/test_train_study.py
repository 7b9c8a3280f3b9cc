"""Studies: matched sizes, which runs are left, rows, and jobs that are cut and continue."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import ROOT, launch_in_process
from omegaconf import OmegaConf

from arch import LayoutError, resolve
from arch.named import CONFIGS, load_arch, model_config, names
from arch.plan import KVPlan
from data.cli import TaskError, UsageError
from eval import evaluate
from eval import study as report
from eval.identity import READING
from eval.plots.study import context_title
from eval.published import Published, order_of, read_published
from eval.runs import Run
from eval.study_rows import compare, contexts_of, frontier, groups, read_rows, searches, sentence, verdict
from train import pretrain, study
from train.errors import DIVERGENCE_HINT
from train.matching import find_match
from train.schema import PretrainConfig
from train.studies import launchers
from train.studies.cells import MAIN, RATE, Layout, next_cells, rate_to_try
from train.studies.launchers import (
    DONE,
    STOPPED,
    Job,
    LocalHandle,
    SlurmJob,
    SlurmLauncher,
    _end_with_parent,
    same_options,
)
from train.studies.rows import append_row, curve
from train.studies.schema import StudyConfig, problems

# Layouts whose heads would have to be more than 64 times as wide for MHA's bytes.
FEW_BYTES = ("characterai", "deepseek_v4_hca", "mlkv")


@pytest.mark.parametrize("name", names("arch"))
def test_every_layout_is_matched_or_refused(name: str) -> None:
    """At 1B a step of d_ff is 0.05 % of the model, half a step of head_dim at most 1 %, of square states 2 %."""
    model = model_config(name, "1b")
    squares = any(store.kind == "matrix" for stack in resolve(model).stacks for store in stack.plan.stores)
    for match, tolerance in (("params", 5e-4), ("flops", 5e-4), ("kv", 2e-2 if squares else 1e-2)):
        try:
            changed, found = find_match(model, match, model.size.seq_len)
        except LayoutError as refused:
            assert name in FEW_BYTES and match == "kv" and "no width brings it nearer" in str(refused)
            continue
        assert abs(found.off) < tolerance, str(found)
        assert getattr(changed.size, found.key) == found.width
        if name == "mha":
            assert changed.size == model.size or found.width == found.was


def layout(name: str) -> Layout:
    return Layout(name, PretrainConfig(), (f"+arch={name}",), None, "digest")


def test_rates_first_then_seeds_outermost() -> None:
    options = StudyConfig(archs=["a", "b"], seeds=[3, 4], lrs=[1e-3, 2e-3], lr_extra=2, tokens=10, lr_tokens=5)
    losses: dict[tuple[str, str, float, int], float] = {}

    def loss_of(cell: Any) -> float | None:
        return losses.get((cell.stage, cell.arch, cell.lr, cell.seed))

    def cells() -> list[Any]:
        return next_cells(options, [layout("a"), layout("b")], loss_of, lambda cell: cell.lr == 4e-3)[0]

    assert [(cell.stage, cell.arch, cell.lr, cell.tokens) for cell in cells()] == [
        (RATE, arch, lr, 5) for arch in "ab" for lr in (1e-3, 2e-3)
    ]
    losses |= {(RATE, "a", 1e-3, 3): 2.0, (RATE, "a", 2e-3, 3): 1.0}  # at the edge: one more, which fails
    assert [cell.lr for cell in cells() if cell.arch == "a" and cell.stage == RATE] == [1e-3, 2e-3, 4e-3]
    losses |= {(RATE, "b", 1e-3, 3): 1.0, (RATE, "b", 2e-3, 3): 2.0, (RATE, "b", 5e-4, 3): 1.5}
    main = [(cell.seed, cell.arch, cell.lr) for cell in cells() if cell.stage == MAIN]
    assert main == [(3, "a", 2e-3), (3, "b", 1e-3), (4, "a", 2e-3), (4, "b", 1e-3)]
    assert rate_to_try(StudyConfig(lrs=[1e-3]), {}) == []
    assert rate_to_try(StudyConfig(lrs=[1e-3, 1.001e-3]), {1e-3: 2.0, 1.001e-3: 1.0}) == [], "the next is 1e-3 again"


@pytest.mark.parametrize("lr", [6e-3, 2.15e-3, 1e-5, 1e30, 0.00123456789])
def test_a_run_is_trained_at_the_very_rate_of_its_row(lr: float) -> None:
    words = layout("a").cell(StudyConfig(), MAIN, lr, 0).words
    assert [OmegaConf.from_dotlist([word]).optim.lr for word in words if word.startswith("optim.lr=")] == [lr]


def test_keys_tell_configurations_apart_and_not_seeds() -> None:
    options = StudyConfig(tokens=10)
    one, seed, rate = (layout("a").cell(options, MAIN, lr, n) for lr, n in ((1e-3, 0), (1e-3, 1), (2e-3, 0)))
    assert one.key == seed.key != rate.key
    other = Layout("a", PretrainConfig(), ("+arch=a",), None, "other text")
    assert other.cell(options, MAIN, 1e-3, 0).key != one.key


def test_rows_survive_a_cut_line(tmp_path: Path) -> None:
    path, row = tmp_path / "rows" / "results.jsonl", {"key": "k", "seed": 0, "arch": "a", "stage": MAIN, "loss": 1.0}
    append_row(path, row)
    with path.open("a") as file:
        file.write('{"key": "k", "se')
    assert read_rows(path) == [row]
    append_row(path, {**row, "seed": 1})
    assert [found["seed"] for found in read_rows(path)] == [0, 1]
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UsageError, match="line 1"):
        read_rows(path)


def test_a_row_that_lacks_the_end_of_its_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("mha", 0, 3.0)))
    append_row(path, row("mha", 1, 3.0))
    assert [found["seed"] for found in read_rows(path)] == [0, 1]


def test_studies_with_one_file_of_rows_take_turns(tmp_path: Path) -> None:
    path, first = tmp_path / "results.jsonl", json.dumps(row("mha", 0, 3.0)) + "\n"
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(first[:9])
        other.flush()
        second = threading.Thread(target=append_row, args=(path, row("mha", 1, 3.0)))
        second.start()
        second.join(0.2)
        other.write(first[9:])
    second.join()
    assert [found["seed"] for found in read_rows(path)] == [0, 1]


VOCABULARY = "run=['+experiment=laptop','size.vocab_size=600']"


class Steps(Job):
    """A job of three commands, of which the file `state` says how many have ended."""

    program = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(str(int(p.read_text()) + 1))"

    def next_command(self) -> list[str] | None:
        state = self.folder / "state"
        if not state.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            state.write_text("0")
        done = int(state.read_text())
        return None if done == 3 else [sys.executable, "-S", "-c", self.program, str(state)]

    def progress(self) -> tuple[Any, ...]:
        return ((self.folder / "state").read_text(),)


def wait(handle: LocalHandle) -> str:
    while (outcome := handle.poll()) is None:
        if handle.process is not None:
            handle.process.wait()
    return outcome


def test_a_job_goes_on_until_all_is_done(tmp_path: Path) -> None:
    assert wait(LocalHandle(Steps(tmp_path / "a", (), (), {}, 1))) == DONE
    stopped = LocalHandle(Steps(tmp_path / "b", (), (), {}, 1))
    stopped.stop()
    assert wait(stopped) in (STOPPED, DONE)
    failing = Steps(tmp_path / "c", (), (), {}, 1)
    failing.next_command()
    object.__setattr__(failing, "program", "print('no text here'); raise SystemExit(3)")
    assert wait(LocalHandle(failing)) == "exit code 3: no text here"
    object.__setattr__(failing, "program", "pass")
    assert wait(LocalHandle(failing)).startswith("it ended without any progress")


class Script(Job):
    """A job that is a program of Python; `said` is what it has written to the file of its argument."""

    program = ""

    def next_command(self) -> list[str]:
        return [sys.executable, "-S", "-c", self.program, str(self.folder / "said")]

    @property
    def said(self) -> str:
        path = self.folder / "said"
        return path.read_text() if path.exists() else ""


class Preempted(Script):
    program = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit()
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(100)
"""


class Ranks(Script):
    program = """
import subprocess, sys
rank = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
rank += "; file.write('locked'); file.flush(); time.sleep(100)"
subprocess.run([sys.executable, "-S", "-c", rank, sys.argv[1]])
"""


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no SIGUSR1")
def test_a_preempted_job_of_slurm_saves_and_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the handler of a signal, as submitit does, which comes while the job waits for its run."""
    helpers = SimpleNamespace(DelayedSubmission=lambda call: call)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(helpers=helpers))
    job, queued = SlurmJob(Preempted(tmp_path, (), (), {}, 1)), []

    def handler(number: int, frame: Any) -> None:
        queued.append(job.checkpoint())
        sys.exit()

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert job.job.said == "saved" and queued[0].job == job.job


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def until(told: Callable[[], Any], seconds: float) -> bool:
    """Wait up to so many seconds for what `told` tells, and tell whether it came."""
    patience = time.monotonic() + seconds
    while not (found := told()) and time.monotonic() < patience:
        time.sleep(0.02)
    return bool(found)


def test_all_processes_of_a_run_are_killed(tmp_path: Path) -> None:
    handle = LocalHandle(job := Ranks(tmp_path, (), (), {}, 1))
    assert until(lambda: job.said, 30)
    handle.kill()
    assert until(lambda: not is_locked(tmp_path / "said"), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_run_whose_study_has_just_died_does_not_start() -> None:
    done = subprocess.run(["echo", "ran"], preexec_fn=partial(_end_with_parent, -1), capture_output=True)
    assert done.returncode and not done.stdout


def test_commands_of_a_run(tmp_path: Path) -> None:
    job = Job(tmp_path, ("+arch=mha",), ("tasks=recall",), {"recall": {}}, 1)
    assert job.next_command()[-2:] == ["+arch=mha", f"folder={tmp_path}"]
    (tmp_path / "config.yaml").write_text("")
    assert job.next_command()[-1] == f"resume={tmp_path}"


def row(arch: str, seed: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    kv = {str(context): [context * (2 if arch == "mha" else 1), 1] for context in (2048, 8192, 32768, 131072)}
    made = {"arch": arch, "seed": seed, "loss": loss, "key": arch, "stage": MAIN, "commit": "c" * 40, "lr": 1e-3}
    made |= {"study": "s", "config": {"batch_size": 8, "optim": {"name": "adamw", "lr": loss}, "arch": {"block": None}}}
    made |= {"data": [{"name": "books", "digest": "d"}], "tokens": 10, "seq_len": 4, "speed": {}, "val_tokens": 8}
    val_curve = [] if loss is None else [[5, loss + 1], [10, loss]]
    made |= {"kv": kv, "params": 7, "val_curve": val_curve, "match": None, "date": "2026-01-31T00", "jobs": 1}
    return made | {"tasks": {"decode": {"figures": {"token_ms": 2.0}}}, "hardware": "a CPU"} | changes


def test_layouts_are_compared_by_seed() -> None:
    rows = [row("mha", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [row("cla2", seed, 3.1 + seed / 10 + seed / 1000) for seed in range(3)]  # paired, 0.1 above
    rows += [row("mla", seed, loss) for seed, loss in enumerate((2.9, 3.3, 3.2))]
    rows += [row("mla", 0, 1.0, commit="d" * 40)]
    mha, cla2, mla, other = groups(rows, MAIN)
    assert [mla.label, other.label] == ["mla (ccccccc)", "mla (ddddddd)"]
    found = compare(cla2, mha)
    assert found is not None and found.mean == pytest.approx(0.101)
    assert found.half == pytest.approx(4.303 * 0.001 / 3**0.5)
    assert sentence(cla2, mha) == "cla2: worse than mha (+0.1010 ± 0.0025 nats over 3 seeds)."
    assert sentence(mla, mha).startswith("mla (ccccccc): not told apart from mha (+0.0333 ±")
    assert compare(other, mha) is None and sentence(other, mha).endswith("the runs differ in commit.")
    assert frontier({"a": (1, 3.0), "b": (2, 3.1), "c": (3, 2.0)}) == ["a", "c"]


def test_equal_differences_of_a_few_seeds_are_no_verdict() -> None:
    mha, cla2 = groups([row(arch, seed, loss) for arch, loss in (("mha", 3.0), ("cla2", 2.5)) for seed in (0, 1)], MAIN)
    told = "cla2: not told apart from mha: 2 seeds, whose differences are equal (-0.5000 nats)."
    assert sentence(cla2, mha) == told and verdict(cla2, mha) == "not told apart"


def test_losses_of_other_targets_are_not_compared() -> None:
    """Those of a Block Transformer without the first block of a window, and of masked and padded documents. A row of
    before the last two were written is of neither."""
    config = row("mha", 0, 3.0)["config"]
    mha, whole, first, masked = (
        groups([row(arch, 0, loss, config=config | changes)], MAIN)[0]
        for arch, loss, changes in (
            ("mha", 3.0, {}),
            ("block", 2.9, {"arch": {"block": {"length": 4, "start": True}}, "data": dict.fromkeys(READING, False)}),
            ("block", 2.9, {"arch": {"block": {"length": 4, "start": False}}}),
            ("cla2", 2.9, {"data": dict.fromkeys(READING, True)}),
        )
    )
    assert compare(whole, mha) is not None and compare(first, mha) is compare(masked, mha) is None
    assert sentence(first, mha).endswith(
        "the runs differ in the positions that are predicted (arch.block.start=true predicts all)."
    )
    assert sentence(masked, mha).endswith("the runs differ in data.document_mask, data.block_padding.")


def test_seeds_that_are_missing_are_said() -> None:
    rows = [row("mha", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [row(arch, seed, 2.9 + 0.101 * seed) for arch in ("cla2", "mqa") for seed in range(2)]
    rows.append(row("cla2", 2, None))
    mha, cla2, mqa = groups(rows, MAIN)
    assert sentence(cla2, mha) == "cla2: no verdict beside mha (-0.0995 ± 0.0064 nats over 2 of 3 seeds; 1 diverged)."
    assert sentence(mqa, mha) == "mqa: better than mha (-0.0995 ± 0.0064 nats over 2 of 3 seeds)."
    assert [report.columns(group, [mha], [], [], [])["seeds"] for group in (mha, cla2, mqa)] == ["3", "2 of 3", "2"]


def test_a_layout_that_diverged_is_not_better_and_is_listed() -> None:
    """Nor is one worse than a baseline that diverged; what is worse where neither did is worse."""
    nan = {"diverged": "the loss is nan at step 5"}
    rows = [row("mha", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [row(arch, seed, loss + 0.101 * seed) for arch, loss in (("cla2", 2.9), ("mla", 3.1)) for seed in range(2)]
    rows += [row("cla2", 2, None, **nan), row("mla", 2, None), *(row("mqa", seed, None, **nan) for seed in range(3))]
    mha, cla2, mla, mqa = found = groups(rows, MAIN)
    assert [verdict(group, mha) for group in (cla2, mla, mqa)] == ["diverged", "worse", "diverged"]
    assert [verdict(mha, group) for group in (cla2, mla)] == ["not told apart", "better"]
    assert sentence(mqa, mha) == "mqa: no seed in common with mha; 3 diverged."
    assert report.columns(mqa, [mha], [], [], [])["verdict"] == "diverged"
    assert report.warnings(found, rows) == [
        "cla2: seed 2 diverged: the loss is nan at step 5.",
        "mla: seed 2 diverged: its validation loss is not finite.",
        *(f"mqa: seed {seed} diverged: the loss is nan at step 5." for seed in range(3)),
    ]
    assert report.pictures(rows, found, [2048], []).keys() == {"loss", "curves"}


@pytest.mark.parametrize("changes", [{"d_model": 32}, {"num_layers": 2}, {"vocab_size": 300}, {"match": "flops"}])
def test_models_of_different_size_are_not_compared(changes: dict[str, Any]) -> None:
    """The width of an MLP, which a match chooses, may differ, and so may the heads."""

    def one(arch: str, match: str = "params", **size: int) -> dict[str, Any]:
        sizes = {"num_layers": 4, "d_model": 16, "vocab_size": 600, "d_ff": 48, "num_heads": 4} | size
        config = row("mha", 0, 3.0)["config"] | {"size": sizes}
        return row(arch, 0, 3.0, config=config, match={"match": match, "target": 7.0})

    mha, cla2, other = groups([one("mha"), one("cla2", d_ff=56, num_heads=8), one("mla", **changes)], MAIN)
    assert compare(cla2, mha) is not None
    (key,) = changes
    assert sentence(other, mha).endswith(f"the runs differ in {key if key == 'match' else f'size.{key}'}.")


def test_figures_of_unequal_tasks_and_times_of_shared_machines_are_left_out() -> None:
    def recall(joined: bool) -> dict[str, Any]:
        return {"recall": {"figures": {"gap/accuracy": 0.5}, "options": {"joined": joined, "pairs": [4]}}}

    names = ("decode/token_ms", "recall/gap/accuracy")
    assert report.usable(groups([row("mha", 0, 3.0)], MAIN), names) == (["decode/token_ms"], [])
    _, (shared,) = report.usable(groups([row("mha", 0, 3.0), row("cla2", 0, 3.0, jobs=2)], MAIN), names)
    assert shared.startswith("decode is left out: runs of the study that share a machine slow each other down")
    for other in ({"hardware": "another CPU"}, {"threads": 2}):
        _, (mixed,) = report.usable(groups([row("mha", 0, 3.0), row("mha", 1, 3.0, **other)], MAIN), names)
        assert mixed == "decode is left out: times of different hardware or threads do not compare"
    same, other = ([row("mha", 0, 3.0, tasks=recall(True)), row("cla2", 0, 3.0, tasks=recall(of))] for of in (1, 0))
    same[1]["tasks"] = recall(True) | {"copy": {}}
    assert report.usable(groups(same, MAIN), names) == (["recall/gap/accuracy"], [])
    assert report.usable(groups(other, MAIN), names) == (
        [], ["recall is left out: it was measured with different options (joined)"]
    )  # fmt: skip


def test_figures_of_other_questions_are_left_out() -> None:
    """By the digests of those rows that have one, and not for what does not decide a figure: recall's batch."""

    def found(*results: dict[str, Any]) -> tuple[list[str], list[str]]:
        figures = {"figures": {"gap/accuracy": 0.5}}
        rows = [row("mha", seed, 3.0, tasks={"recall": figures | of}) for seed, of in enumerate(results)]
        return report.usable(groups(rows, MAIN), ["recall/gap/accuracy"])

    options = {"pairs": [4], "batch": 16}
    batch, pairs = {"options": options | {"batch": 100}}, {"options": options | {"pairs": [8]}}
    for other in (batch, batch | {"digest": "d"}):
        assert found({"options": options, "digest": "d"}, other) == (["recall/gap/accuracy"], [])
    for first, second, named in (
        ({"options": options, "digest": "d"}, {"options": options, "digest": "e"}, "what its digest is of: questions"),
        ({"options": options}, pairs, "pairs"),
    ):
        names, (line,) = found(first, second)
        assert not names and line.startswith(f"recall is left out: it was measured with different options ({named}")


def test_learning_rates_are_of_one_study_at_one_commit() -> None:
    """And one at the end of those that were tried is said to be there; one beyond which the next diverged is not."""
    rows = [row("mha", 0, loss, lr=lr, stage=RATE) for lr, loss in ((2e-3, 3.0), (1e-3, 3.1), (4e-3, None))]
    rows += [row("cla2", 0, loss, lr=lr, stage=RATE) for lr, loss in ((1e-3, 3.0), (2e-3, 3.1))]
    rows.append(row("cla2", 0, 1.0, lr=1e-3, stage=RATE, study="t"))
    rows += [row("mqa", 0, None, lr=lr, stage=RATE) for lr in (1e-3, 2e-3)]
    found = searches(rows)
    assert [each.label for each in found] == ["mha", "cla2 (s)", "cla2 (t)", "mqa"]
    assert list(found[0].losses.items()) == [(1e-3, 3.1), (2e-3, 3.0), (4e-3, None)]
    rows += [row("mha", 0, 3.0, lr=2e-3), row("cla2", 0, 3.0, lr=1e-3, commit="d" * 40)]
    main = groups(rows, MAIN)
    assert [report.columns(group, main[:1], [], [], found)["lr_edge"] for group in main] == [None, "lowest"]
    assert report.warnings(main, rows) == [
        "mqa: diverged at every learning rate that was tried (0.001, 0.002).",
        "cla2: its learning rate, 0.001, is the lowest that was tried; a lower one may be better.",
    ]
    (axes,) = report.pictures(rows, main, [2048], [])["rates"].axes
    crosses = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [[4e-3], [1e-3, 2e-3]] and "diverged" in axes.get_title()


@pytest.mark.parametrize("name", ["study-cpu", "study-recall", "shakespeare-char", "zoology"])
def test_bytes_at_the_trained_length_come_first(name: str) -> None:
    """Of rows of before these had them by their layouts, unless these have come to mean other bytes since."""
    found = groups(read_rows(ROOT / "docs" / "results" / name / "results.jsonl"), MAIN)
    mha = next(group for group in found if group.first["arch"] == "mha")
    trained, size = mha.first["seq_len"], mha.first["config"]["size"]
    assert contexts_of(found) == [trained, 2048, 8192, 32768, 131072]
    assert mha.stored(trained) == trained * size["num_layers"] * size["d_model"] * 2 * 2
    mha.first["kv"]["2048"][0] += 1
    assert contexts_of(groups(mha.rows, MAIN)) == [2048, 8192, 32768, 131072]


def test_rows_of_several_commits_are_compared_if_the_user_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The later row of a seed counts. Of changes that were not committed the report warns."""
    other = "d" * 40 + "+"
    rows = [row("mha", 0, 3.0), row("mha", 1, 3.0), row("mha", 1, 3.1, commit=other)]
    rows += [row("cla2", 0, 2.9), row("cla2", 1, 3.001, commit=other)]
    for each in rows:
        append_row(tmp_path / "results.jsonl", each)
    with patch("eval.plots.style.Picture.write", lambda self, path, **options: path.write_bytes(b"png")):
        report.main([str(tmp_path / "results.jsonl"), "pool=true"])
        pooled = (tmp_path / "report.html").read_text()
        report.main([str(tmp_path / "results.jsonl")])
        apart = (tmp_path / "report.html").read_text()
    assert "cla2: better than mha (-0.0995 ± 0.0064 nats over 2 seeds)." in pooled
    assert "says that nothing that matters changed between them" in pooled and "shown apart" not in pooled
    assert "cla2 (ccccccc): not told apart from mha (ccccccc): 1 of 2 seeds" in apart and "pool=true" in apart
    assert "its rows may be of different code" in pooled


def test_a_baseline_has_the_conditions_of_its_layout() -> None:
    """Not those of another optimizer with a lower loss; of two that would do, that of the same study."""
    muon = {"batch_size": 8, "optim": {"name": "muon", "lr": 1e-3}, "arch": {"block": None}}
    rows = [row("mha", seed, 3.0, config=muon, key="m") for seed in range(2)]
    rows += [row("mha", seed, 3.3, study="t", key="t") for seed in range(2)]
    rows += [row(arch, seed, loss) for arch, loss in (("mha", 3.4), ("cla2", 3.35)) for seed in range(2)]
    by_loss = sorted(groups(rows, MAIN), key=lambda group: group.first["loss"])
    cla2 = next(group for group in by_loss if group.label == "cla2")
    baselines = [group for group in by_loss if group.first["arch"] == "mha"]
    assert report.baseline_of(cla2, baselines).first["loss"] == 3.4
    assert compare(cla2, baselines[0]) is None
    rows = [row("mha", 0, 3.0), row("mha", 1, 3.1, commit="d" * 40), row("cla2", 2, 3.2, commit="d" * 40)]
    *baselines, cla2 = groups(rows, MAIN)
    found = sentence(cla2, report.baseline_of(cla2, baselines))
    assert found == "cla2: no seed in common with mha (ddddddd)."


def test_report_needs_nothing_outside_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in range(2):
        append_row(tmp_path / "results.jsonl", row("mha", seed, 3.0))
        append_row(tmp_path / "results.jsonl", row("cla2", seed, 2.5 + seed / 1000))
    with patch("eval.plots.style.Picture.write", lambda self, path, **options: path.write_bytes(b"png")):
        report.main([str(tmp_path / "results.jsonl")])
    page = (tmp_path / "report.html").read_text()
    assert "cla2: better than mha (-0.4995 ± 0.0064 nats over 2 seeds)." in page and page.count("data:image/png") == 3
    assert "http" not in page and "<h1>Study s</h1>" in page
    assert "<th>milliseconds per decoded token</th>" in page and "recall" not in page
    assert (tmp_path / "study.csv").read_text().splitlines()[1].startswith("cla2,2,0.001,,7,2048,8192")


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_losses_are_set_beside_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Pairs of layouts with unequal figures, compared by seed; layouts without a figure are left out."""
    means = {"mha": 3.0, "gqa2": 3.2, "mqa": 3.1, "cla2": 3.19, "swa": 2.0}
    noise = {"mha": (0, 1, 2), "gqa2": (0, 2, 2), "mqa": (0, 1, 3), "cla2": (9, 0, -9), "swa": (0, 0, 0)}
    for name, mean in means.items():
        for seed in range(3):
            append_row(tmp_path / "results.jsonl", row(name, seed, mean + noise[name][seed] / 1000))
    file = write_lines(
        tmp_path / "paper.csv", "layout,perplexity", "mha,13.1", "gqa2,13.3", "mqa,13.5", "cla2,13.5", "mla,13"
    )
    report.main([str(tmp_path / "results.jsonl"), f"published={file}"])
    said = (
        "perplexity: of 5 pairs of layouts 3 have the published order (an order drawn at random: 0 to 5); 4 are told "
        "apart, 3 of them as published (of equal layouts one of twenty would be, by chance). No run here: mla. "
        "No published figure: swa."
    )
    assert said in capsys.readouterr().out
    assert escape(said) in (tmp_path / "report.html").read_text() and (tmp_path / "published.png").stat().st_size
    with (tmp_path / "pairs.csv").open(newline="") as lines:
        found = {(line["better"], line["worse"]): line for line in csv.DictReader(lines)}
    assert {pair: line["verdict"] for pair, line in found.items()} == {
        ("mha", "gqa2"): "as published", ("mha", "mqa"): "as published", ("mha", "cla2"): "as published",
        ("gqa2", "mqa"): "reversed", ("gqa2", "cla2"): "not told apart",
    }  # fmt: skip
    line = found["gqa2", "mqa"]
    assert (line["published of better"], line["published of worse"]) == ("13.3", "13.5")
    assert float(line["difference"]) == pytest.approx(0.1)
    assert float(line["half_width"]) == pytest.approx(4.303 * 0.001 / 3**0.5)


def test_the_page_of_cla_table1_says_what_its_rows_say() -> None:
    folder = ROOT / "docs" / "results" / "cla-table1"
    order = order_of(groups(read_rows(folder / "results.jsonl"), MAIN), read_published(folder / "published.csv"))
    same, (low, high) = sum(pair.loss.mean < 0 for pair in order.pairs), order.at_random()
    page = " ".join((folder / "README.md").read_text().split())
    told = [line["verdict"] for line in order.table() if line["verdict"] != "not told apart"]
    assert f"Of {len(order.pairs)} pairs of designs {same} have the published order" in page
    assert f"({low} to {high})" in page
    assert (len(told), told.count("as published")) == (8, 3)
    with (folder / "pairs.csv").open(newline="") as lines:
        written = [(line["better"], line["worse"], float(line["difference"])) for line in csv.DictReader(lines)]
    assert written == [(pair.better, pair.worse, pytest.approx(pair.loss.mean)) for pair in order.pairs]


def test_layouts_of_which_a_run_diverged_are_no_pair() -> None:
    rows = [row(name, seed, 3.0 + seed / 10) for name in ("mha", "mqa") for seed in range(2)]
    rows += [row("cla2", 0, 2.0), row("cla2", 1, None)]
    order = order_of(groups(rows, MAIN), Published("perplexity", {"mha": 1.0, "mqa": 2.0, "cla2": 3.0}))
    assert [(pair.better, pair.worse) for pair in order.pairs] == [("mha", "mqa")]
    assert order.summary().endswith("A run diverged: cla2.")


def test_a_published_figure_of_two_groups_of_runs_is_refused() -> None:
    rows = [row("mha", 0, 3.0), row("mha", 0, 3.1, commit="d" * 40), row("cla2", 0, 3.2)]
    with pytest.raises(UsageError, match=r"of which there are mha \(ccccccc\) and mha \(ddddddd\)"):
        order_of(groups(rows, MAIN), Published("perplexity", {"mha": 1.0, "cla2": 2.0}))
    assert order_of(groups(report.as_one_commit(rows), MAIN), Published("perplexity", {"mha": 1.0, "cla2": 2.0})).pairs


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (range(15), (34, 71)),  # Kendall's statistic, half of 105 pairs and 1.96 times half the root of n(n-1)(2n+5)/18
        ([0] * 5 + [1] * 5, (3, 22)),  # Mann and Whitney's, of two groups of five: U of 2 and less is below 2.5 %
    ],
)
def test_how_many_pairs_agree_by_chance(figures: Sequence[int], expected: tuple[int, int]) -> None:
    names = [f"layout{number}" for number in range(len(figures))]
    published = Published("perplexity", {name: float(figure) for name, figure in zip(names, figures, strict=True)})
    order = order_of(groups([row(name, 0, 3.0) for name in names], MAIN), published)
    assert order.at_random() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["mha,13.1"], "first line is to be layout,NAME"),
        (["layout,perplexity", "mha,13.1,2"], "mha,13.1,2 is no layout with a figure"),
        (["layout,perplexity", "mha,low"], "mha,low is no layout with a figure"),
        (["layout,perplexity", "mha,nan"], "mha has no finite figure"),
        (["layout,perplexity", "mha,1", "mha,2"], "mha has no finite figure, or two"),
        (["layout,perplexity", "mha,1", "mla,2"], "no two layouts that can be compared, of mha, cla2"),
        (["layout,perplexity", "mha,1", "cla2,1"], "different figures for no two layouts"),
        ([], "first line is to be layout,NAME"),
    ],
)
def test_published_figures_that_cannot_be_used(tmp_path: Path, lines: list[str], said: str) -> None:
    for name in ("mha", "cla2"):
        append_row(tmp_path / "results.jsonl", row(name, 0, 3.0))
    with pytest.raises(UsageError, match=re.escape(said)):
        report.main([str(tmp_path / "results.jsonl"), f"published={write_lines(tmp_path / 'paper.csv', *lines)}"])
    assert not (tmp_path / "report.html").exists()


def test_a_panel_of_a_tasks_figure_does_not_say_at_which_length_it_was_measured() -> None:
    assert context_title(64, [64], loss=True) == "At the trained length, 64 tokens"
    assert context_title(128, [64], loss=True) == "Extrapolation: bytes at 128 tokens, loss at the trained length"
    for context in (64, 128):
        found = context_title(context, [64], loss=False)
        assert found == f"Bytes at {context} tokens, the figure as its task measured it"


def test_a_report_of_runs_that_all_diverged() -> None:
    rows = [row("mha", seed, None) for seed in range(2)]
    assert report.pictures(rows, groups(rows, MAIN), [2048], []).keys() == {"loss"}


def test_the_table_has_the_figures_of_tasks_that_were_measured() -> None:
    rows = [row("mha", seed, 3.0, tasks={"copy": {"figures": {"accuracy": seed / 4}}}) for seed in range(2)]
    rows.append(row("cla2", 0, 2.5, tasks={}))
    mha, cla2 = groups(rows, MAIN)
    names = ["copy/accuracy"]
    found = [report.columns(group, [mha], names, [2048], []) for group in (mha, cla2)]
    assert [each["copy/accuracy"] for each in found] == [0.125, None]


def test_a_study_checks_its_runs_before_it_starts(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["+study=cpu", "plan=true", f"data.path={corpus}", f"folder={tmp_path}"]
    for word, fix in (
        ("archs=[mha,gqa5]", "did you mean gqa8"),
        ("run=['seed=3']", "the study's to set"),
        ("+options.copy.new=8", "options.copy is of no use without copy among tasks; write tasks=[perplexity,recall"),
        ("+options.perplexty.tokens=8", "perplexity"),
        ("+options.lm_eval.limit=8", "is of no use without lm-eval among tasks"),
        ("run=['+experiment=laptop','arch.block.start=true']", "mha: a key on the command line lies under one that"),
    ):
        with pytest.raises(SystemExit):
            launch_in_process(study.main, "study", StudyConfig, [*words, word])
        assert fix in capsys.readouterr().err


def test_tasks_of_a_study_are_a_choice_of_those_that_its_file_has_options_of(
    corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["+study=cpu", "plan=true", f"data.path={corpus}", "archs=[mha]", "seeds=[0]", "tasks=[perplexity]"]
    launch_in_process(study.main, "study", StudyConfig, [*words, "match=none", "lrs=[1e-3]", VOCABULARY])
    assert "1 run of 5,000,000 tokens (1 layout, 1 seed)" in capsys.readouterr().out
    assert StudyConfig(options={"recall": {"pairs": 8}}).task_words == ["tasks=perplexity"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("{wide: ['+arch=mqa', 'seed=3']}", "layouts.wide has seed=3; seed is the study's to set"),
        ("{wide: ['size.head_dim=32']}", "it needs one +arch=, the layout that the other words change"),
        ("{wide: '+arch=mqa'}", "write layouts={mqa_wide: ['+arch=mqa', 'size.head_dim=32']}"),
        ("{wide: ['+arch=mqa', 'arch.stores.kv.window=0']}", "arch.stores.kv.window is 0"),
        (
            "{wide: ['+arch=mqa', '++size.vocab_size=700']}",
            "run has size.vocab_size=600, which replaces ++size.vocab_size=700 of layouts.wide; give",
        ),
        (
            "{wide: ['+arch=mqa'], b: ['+arch=mha']}",
            "layouts.b is of no use without b among archs; write archs=[wide,b]",
        ),
    ],
)
def test_layouts_of_a_study_of_its_own_are_checked(
    own: str, message: str, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    run = "run=['+size=tiny','size.vocab_size=600']"
    words = ["plan=true", f"data.path={corpus}", "archs=[wide]", f"layouts={own}", run]
    with pytest.raises(SystemExit):
        launch_in_process(study.main, "study", StudyConfig, words)
    assert message in capsys.readouterr().err


def test_equal_bytes(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """Half and an eighth of MHA's bytes, and as many parameters."""
    launch_in_process(
        study.main, "study", StudyConfig, ["+study=equal_bytes", "plan=true", f"data.path={corpus}", VOCABULARY]
    )
    rows = re.findall(r"│ (\w+) +│[^│]*│[^│]*│ ([\d.]+ [KM]iB) +│ d_ff \d+ \(([+-][\d.]+)%\)", capsys.readouterr().out)
    assert [row[:2] for row in rows] == [
        ("mha", "1 MiB"),
        *((name, "512 KiB") for name in ("gqa4", "tied8", "mlkv8")),
        *((name, "128 KiB") for name in ("mqa", "tied2", "mlkv4")),
    ]
    assert all(abs(float(off)) < 1 for *_, off in rows)  # a step of d_ff is 1.7 % of so small a model


def test_a_layout_is_matched_with_the_multi_head_attention_of_the_study(
    corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    """Not with that of a size that the layout has changed."""
    words = ["plan=true", f"data.path={corpus}", "archs=[mha,wide]", "run=['+size=tiny','size.vocab_size=600']"]
    words += ["match=params", "layouts={wide: ['+arch=mqa', 'size.head_dim=32']}"]
    launch_in_process(study.main, "study", StudyConfig, words)
    mha, wide = re.findall(r"│ (?:mha|wide) +│ ([\d.]+)M", capsys.readouterr().out)
    assert float(wide) == pytest.approx(float(mha), rel=0.01)


@pytest.mark.parametrize(
    ("arch", "word"), [("block", "arch.block.start=true"), ("mla", "arch.stores.latent.latent.dim=16")]
)
def test_a_match_reads_no_more_than_the_size_of_its_baseline(
    arch: str, word: str, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    """A word of the study that multi-head attention does not have is of its layouts."""
    words = ["plan=true", f"data.path={corpus}", f"archs=[{arch}]", "match=params"]
    launch_in_process(study.main, "study", StudyConfig, [*words, f"run=['+size=tiny','size.vocab_size=600','{word}']"])
    assert "%" in capsys.readouterr().out


def test_cla_table1(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """Bytes are in the proportions of the paper's table, where 8 layers for 20 leave them."""
    launch_in_process(
        study.main, "study", StudyConfig, ["+study=cla_table1", "plan=true", f"data.path={corpus}", VOCABULARY]
    )
    found = re.findall(r"│ (h\d+_\w+) +│[^│]*│[^│]*│ ([\d.]+ [KM]iB) +│", capsys.readouterr().out)
    kib = {name: float(size.split()[0]) * (1024 if "MiB" in size else 1) for name, size in found}
    paper = {
        "h16_mha": 163840, "h16_gqa4": 40960, "h16_gqa2": 20480, "h16_mqa": 10240, "h8_mqa": 5120,
        "h32_mqa_cla2": 10240, "h16_mqa_cla2": 5120, "h8_mqa_cla2": 2560, "h16_gqa4_cla2": 20480,
        "h16_gqa2_cla2": 10240, "h16_mqa_cla4": 2560,
    }  # fmt: skip
    heads = {"h16_mha": 2}  # 16 heads in the paper, 8 here
    assert {name: kib[name] * heads.get(name, 1) for name in paper} == {
        name: size / 10240 * kib["h16_mqa"] for name, size in paper.items()
    }
    assert {kib[f"h16_mqa_cla2_{name}"] for name in ("keepends", "densefront", "denseback")} == {kib["h16_mqa"] * 5 / 8}
    assert kib["h16_mqa_cla3"] == kib["h16_mqa"] * 3 / 8 and len(kib) == 15


MINIATURES = {
    "ma": "0 1s 1s 0 4s 0",
    "ma_endslide": "0 1s 1s 0 4s 4s",
    "ma_offset": "0s 0s 2 3s 3s 2",
    "ma_pairs": "0 1s 0 3 4s 3",
    "ma_successive1": "0 0 2s 3 3 5s",
    "ma_successive2": "0s 1 1 3 3 5s",
    "ma_noshare1": "0s 1 2s 2s 4s 4s",
    "ma_noshare2": "0s 0s 2 3s 3s 5s",
    "ma_noshare3": "0s 0s 2s 2s 2s 5",
}


@pytest.mark.parametrize("name", MINIATURES)
def test_the_miniatures_of_mixattention_write_and_read_as_the_papers_layouts(name: str) -> None:
    """As many full stores as in the paper's 24 layers, shared where they are shared there."""
    options = yaml.safe_load((CONFIGS / "study" / "mixattention.yaml").read_text())
    arch, pattern = options["layouts"][name]
    pattern = yaml.safe_load(pattern.removeprefix("arch.pattern="))
    layout = replace(load_arch(arch.removeprefix("+arch=")), pattern=pattern)
    plan = resolve(model_config(layout, "tiny", num_layers=6, max_window=2))
    assert str(plan) == MINIATURES[name]
    paper = resolve(model_config("mixattention" if name == "ma_pairs" else name, "tiny", num_layers=24, max_window=2))
    assert full_stores(plan) == full_stores(paper)


def full_stores(plan: KVPlan) -> list[bool]:
    """For each store without a window whether more than one layer reads it."""
    return [len(plan.readers(store)) > 1 for store in plan.stores if store.window is None]


class Recorded:
    """A job that something else has to do."""

    def __init__(self, job: Job):
        self.job = job

    def poll(self) -> str:
        return "not yet" if self.job.next_command() else DONE


def test_equal_bytes_at_a_toy_size(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout of the study's own is trained and evaluated as planned."""
    jobs: list[Job] = []
    monkeypatch.setattr(study, "LocalHandle", lambda job: jobs.append(job) or Recorded(job))
    monkeypatch.setattr(study, "PAUSE", 0)
    small = "size.num_layers=4 size.d_model=32 size.d_ff=48 size.seq_len=32 data.val_tokens=256 logger=csv batch_size=4"
    words = ["+study=equal_bytes", f"data.path={corpus}", f"folder={tmp_path}", "archs=[tied2]", "seeds=[0]"]
    words += [f"run={['+size=tiny', 'size.vocab_size=600', *small.split()]}", "tokens=256", "lrs=[3e-3]"]
    words += ["tasks=[perplexity]", "options=null"]
    with pytest.raises(TaskError, match="1 run failed"):
        launch_in_process(study.main, "study", StudyConfig, words)
    while command := jobs[0].next_command():
        if Path(command[1]).stem == "evaluate":
            evaluate.main(command[2:])
        else:
            launch_in_process(pretrain.main, "pretrain", PretrainConfig, command[2:])
    launch_in_process(study.main, "study", StudyConfig, words)
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["arch"] == "tied2" and row["config"]["arch"]["stores"]["kv"]["tied"] == "vector"
    assert row["tasks"]["perplexity"]["figures"] and row["match"]["key"] == "d_ff"
    assert row["config"]["size"]["d_ff"] == row["match"]["width"] != 48
    assert row["config"]["data"] == {"document_mask": False, "block_padding": False}
    assert row["kv"]["2048"] == [2048 * 4 * 2 * 4 * 2] * 2  # 4 layers of 2 heads, a vector of 4 elements in bf16
    assert row["kv"]["32"] == [32 * 4 * 2 * 4 * 2] * 2 and row["tokens"] == 256
    (start,) = json.loads((jobs[0].folder / "run.json").read_text())
    assert (row["date"], row["threads"], row["jobs"]) == (start["date"], torch.get_num_threads(), 1)
    recorded = json.loads((jobs[0].folder / "summary.json").read_text())["evaluations"]["perplexity"]
    assert row["tasks"]["perplexity"]["digest"] == recorded["digest"]


def test_a_run_that_diverges_has_a_row_and_is_not_trained_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    jobs: list[Job] = []
    outcome = ["exit code 137: killed"]

    def start(job: Job) -> Any:
        jobs.append(job)
        return SimpleNamespace(job=job, poll=lambda: outcome[-1])

    monkeypatch.setattr(study, "LocalHandle", start)
    monkeypatch.setattr(study, "PAUSE", 0)
    small = "size.num_layers=1 size.d_model=32 size.d_ff=48 size.seq_len=32 data.val_tokens=256 logger=csv batch_size=4"
    words = ["+study=equal_bytes", f"data.path={corpus}", f"folder={tmp_path}", "archs=[mha]", "seeds=[0]"]
    words += [f"run={['+size=tiny', 'size.vocab_size=600', *small.split(), 'optim.warmup=0']}", "tokens=1024"]
    words += ["lrs=[1e30]", "tasks=[perplexity]", "options=null", "match=none"]
    with pytest.raises(TaskError, match="killed"):
        launch_in_process(study.main, "study", StudyConfig, words)
    assert not read_rows(tmp_path / "results.jsonl")
    capsys.readouterr()
    with pytest.raises((SystemExit, TaskError)):
        launch_in_process(pretrain.main, "pretrain", PretrainConfig, jobs[0].next_command()[2:])
    outcome.append(f"exit code 1: {capsys.readouterr().err.splitlines()[-1]}")
    for _ in range(2):
        with pytest.raises(TaskError, match=r"1 run failed.*\nmha lr 1e\+30 seed 0: (the loss|weights)"):
            launch_in_process(study.main, "study", StudyConfig, words)
    assert len(jobs) == 2, "the third start has nothing to do"
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["loss"] is row["ppl"] is None and row["tasks"] == {} and row["tokens"] == 1024
    assert "not finite" in row["diverged"] or "nan" in row["diverged"]
    assert str(tmp_path) not in row["diverged"] and DIVERGENCE_HINT not in row["diverged"]


class Submitted:
    """A job of submitit's, which runs when it is submitted."""

    job_id = "7"

    def __init__(self, call: Any):
        self.value = call()
        self.cancelled = False

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> str:
        return self.value

    def cancel(self) -> None:
        self.cancelled = True


class Executor:
    """submitit.AutoExecutor, as far as it is used."""

    def __init__(self, folder: str):
        self.folder = folder

    def update_parameters(self, **options: Any) -> None:
        if unknown := options.keys() - {"cpus_per_task", "timeout_min"}:
            raise NameError(f"Unknown argument {unknown}")

    def submit(self, call: Any) -> Submitted:
        return Submitted(call)


def test_a_run_that_fails_otherwise_than_by_its_rate_is_waited_for(tmp_path: Path) -> None:
    options = StudyConfig(archs=["a"], lrs=[1e-3, 2e-3], lr_extra=0, tokens=10, tasks=[], folder=str(tmp_path))
    found = study.Study(options, [layout("a")])
    low, high = found.cells()[0]
    found.done[RATE, low.key, low.seed] = {"loss": 2.0, "tasks": {}}
    found.failed[high.folder_name] = "exit code 137: killed"
    assert not found.cells()[1]
    found.done[RATE, high.key, high.seed] = {"loss": None, "tasks": {}}
    assert found.cells()[1]["a"].lr == 1e-3
    failed = f"exit code 1: error: the loss is nan at step 5: {DIVERGENCE_HINT}. There was no checkpoint yet."
    assert study.divergence(failed) == "the loss is nan at step 5"
    assert study.divergence("exit code 137: killed") is study.divergence(DONE) is None


def test_a_run_without_a_finite_loss_has_diverged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The others of its layout go on; the study names a rate that did, and fails by runs that count and by layouts
    without any rate."""
    options = StudyConfig(archs=["a"], lrs=[1e-3, 2e-3], lr_extra=0, tokens=10, tasks=[], folder=str(tmp_path))
    found = study.Study(options, [layout("a")])
    low, high = found.cells()[0]
    found.done |= {(RATE, cell.key, 0): {"loss": loss, "tasks": {}} for cell, loss in ((low, 2.0), (high, None))}
    assert found.cells()[1]["a"].lr == 1e-3 and found.tokens_left() == options.tokens
    (main,) = found.waiting()
    found.done[MAIN, main.key, 0] = {"loss": 2.0, "tasks": {}}
    found.end(stopped=False)
    said = capsys.readouterr().out
    assert "a: diverged at 0.002 in the search" in said and "1 of 1 run done" in said
    found.done[MAIN, main.key, 0] = {"loss": None, "tasks": {}}
    with pytest.raises(TaskError, match=r"1 run failed.*\na lr 0.001 seed 0: its validation loss is not finite$"):
        found.end(stopped=False)
    found.done[RATE, low.key, 0] = {"loss": None, "tasks": {}}
    with pytest.raises(TaskError, match=r"\na: no run, as it diverged at every learning rate; give lower lrs=$"):
        found.end(stopped=False)
    metrics = [{"step": "1", "val/loss": "3.0"}, {"step": "2", "val/loss": "nan"}]
    run = SimpleNamespace(config={"batch_size": 2, "size": {"seq_len": 4}}, metrics=metrics)
    assert curve(run, "val/loss") == [[8.0, 3.0]]  # type: ignore[arg-type]  # a row has no other number


def test_the_search_at_the_full_budget_is_not_the_main_run(tmp_path: Path) -> None:
    """Though it is the same run, by its key: a report shows rows of the main stage."""
    options = StudyConfig(archs=["a"], lrs=[1e-3, 2e-3], lr_extra=0, tokens=10, lr_tokens=10, tasks=[])
    options.folder = str(tmp_path)
    found = study.Study(options, [layout("a")])
    for cell in found.cells()[0]:
        append_row(options.rows, row("a", 0, cell.lr, key=cell.key, stage=RATE, commit=found.commit))
    found = study.Study(options, [layout("a")])
    assert [(cell.stage, cell.lr) for cell in found.waiting()] == [(MAIN, 1e-3)]
    (cell,) = found.waiting()
    append_row(options.rows, row("a", 0, 1e-3, key=cell.key, commit=found.commit))
    found = study.Study(options, [layout("a")])
    assert not found.waiting() and len(groups(read_rows(options.rows), MAIN)) == 1


@pytest.mark.parametrize(("launcher", "jobs"), [("local", 2), ("slurm", None)])
def test_a_row_says_how_many_runs_its_machine_had_if_the_study_knows(
    launcher: str, jobs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StudyConfig(archs=["a"], tasks=[], folder=str(tmp_path), jobs=2, launcher=launcher)
    found, told = study.Study(options, [layout("a")]), []
    (cell,) = found.cells()[0]
    rest = {"starts": 2, "tokens_per_second": None, "loss": 1.0}
    monkeypatch.setattr(study, "row_of", lambda cell, folder, jobs, diverged: told.append(jobs) or rest)
    found.add_row(cell, tmp_path / "run", 1.0)
    assert told == [jobs]


class Recording:
    """A job with an outcome of its own, or without one, that records what it is asked."""

    def __init__(self, job: Job, outcome: str | None = None):
        self.job, self.outcome = job, outcome
        self.asked: list[str] = []

    def poll(self) -> str | None:
        return self.outcome

    def stop(self) -> None:
        self.asked.append("stop")

    def kill(self) -> None:
        self.asked.append("kill")


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> study.Study:
    """A study of three runs, one at a time."""
    rest = {"starts": 1, "tokens_per_second": None}
    monkeypatch.setattr(study, "PAUSE", 0.01)
    monkeypatch.setattr(study, "row_of", lambda cell, *_: row("a", cell.seed, 3.0, key=cell.key) | rest)
    options = StudyConfig(archs=["a"], seeds=[0, 1, 2], tokens=10, tasks=[], folder=str(tmp_path))
    return study.Study(options, [layout("a")])


def test_no_run_starts_at_another_commit_than_those_before(
    three: study.Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commits = iter([three.commit, "other", "other", "third"])
    monkeypatch.setattr(study, "git_revision", lambda: next(commits))
    said = "no more runs start, as the checkout is at other by now, and was at "
    with pytest.raises(TaskError, match=f"^{said}.*others=keep"):
        three.run(lambda job: Recording(job, DONE))
    assert len(read_rows(three.options.rows)) == 1 and capsys.readouterr().out.count(said) == 1
    three.options.others = "keep"
    study.Study(three.options, [layout("a")]).run(lambda job: Recording(job, DONE))
    assert len(read_rows(three.options.rows)) == 3 and next(commits) == "third"


def test_a_run_that_cannot_be_started_or_read_leaves_the_others(three: study.Study) -> None:
    def start(job: Job) -> Any:
        if "seed0" in job.folder.name:
            raise PermissionError(13, "Permission denied", str(job.folder))
        handle = Recording(job, DONE)
        if "seed1" in job.folder.name:
            handle.poll = lambda: Run(job.folder).summary
        return handle

    with pytest.raises(TaskError, match=r"2 runs failed.*\n.*seed 0: .*Permission denied.*\n.*seed 1: .*holds no"):
        three.run(start)
    assert [found["seed"] for found in read_rows(three.options.rows)] == [2]


def test_whatever_ends_a_study_stops_its_runs(three: study.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Recording(three.job(three.waiting()[0]))
    monkeypatch.setattr(study, "GRACE", 0.05)
    monkeypatch.setattr(three, "collect", lambda running: 0 if handle.asked else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        three.run(lambda job: handle)
    assert handle.asked == ["stop", "kill"]


def test_a_second_ctrl_c_does_not_wait(
    three: study.Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(study, "GRACE", 20)
    handle = Recording(three.job(three.waiting()[0]))
    handle.poll = lambda: os.kill(os.getpid(), signal.SIGINT)
    began = time.monotonic()
    three.run(lambda job: handle)
    assert handle.asked == ["stop", "kill"] and time.monotonic() - began < 10
    said = capsys.readouterr().out
    assert "saving 1 run, up to 20 seconds; Ctrl-C now ends them unsaved" in said and "has not saved" in said


def test_runs_without_checkpoints_are_not_evaluated_with_other_tasks(three: study.Study) -> None:
    """They are refused with the fix, but for one that makes way, as it was begun at another commit."""
    folder = three.job(three.waiting()[0]).folder
    three.options.tasks = ["recall"]
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps([{"git": "other"}]))
    three.refuse_without_checkpoints()
    (folder / "run.json").write_text(json.dumps([{"git": three.commit}]))
    fix = "keep=false has deleted the checkpoints.* delete these folders to train again:\n"
    with pytest.raises(UsageError, match=f"^{fix}{re.escape(str(folder))}$"):
        three.refuse_without_checkpoints()
    (folder / "checkpoints" / "last").mkdir(parents=True)
    three.refuse_without_checkpoints()


def test_threads_are_those_that_a_run_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert StudyConfig(jobs=2).threads_of_run == 2
    needed = "launcher=slurm needs threads=, the cores of one run"
    assert [line.partition(":")[0] for line in problems(StudyConfig(launcher="slurm"))] == [needed]
    assert not problems(StudyConfig(launcher="slurm", threads=8))


def test_a_run_of_another_commit_makes_way(tmp_path: Path) -> None:
    options = StudyConfig(archs=["a"], seeds=[0], lrs=[1e-3], tokens=10, tasks=[], folder=str(tmp_path))
    found = study.Study(options, [layout("a")])
    (cell,) = found.cells()[0]
    folder = found.job(cell).folder
    for commit in (found.commit, "1234567890"):
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps([{"git": commit}]))
        found.make_way(cell)
    assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == [f"{folder.name}.of-1234567"]


def test_results_of_other_options_do_not_count(tmp_path: Path) -> None:
    options = {"pairs": (4, 8), "sequences": 64}
    assert same_options("recall", {"options": {"pairs": [4, 8], "sequences": 64, "new": 1}}, options)
    assert not same_options("recall", {"options": {"pairs": [4], "sequences": 64}}, options)
    of_batch = {"options": {"batch": 100}}, {"batch": 16}
    assert same_options("recall", *of_batch) and not same_options("compressed", *of_batch)
    job = Job(tmp_path, (), ("tasks=recall",), {"recall": options}, 1)
    (tmp_path / "evaluations").mkdir()
    assert not job.has_result("recall")
    (tmp_path / "evaluations" / "recall.json").write_text(json.dumps({"options": {"pairs": [4, 8]}}))
    assert job.has_result("recall")


def test_a_run_evaluated_while_it_trained_is_evaluated_with_the_options_of_the_study(tmp_path: Path) -> None:
    """Its summary has the task already; what the study evaluates replaces that, and is progress."""
    job = Job(tmp_path, (), ("tasks=recall",), {"recall": {"sequences": 64}}, 1)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "summary.json").write_text(json.dumps({"name": "a", "evaluations": {"recall": {}}}))
    result = tmp_path / "evaluations" / "recall.json"
    result.write_text(json.dumps({"options": {"sequences": 16}}))
    assert "tasks=recall" in job.next_command()
    before = job.progress()
    result.write_text(json.dumps({"options": {"sequences": 64}}))
    assert job.progress() != before and job.next_command() is None


def test_jobs_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(launchers, "PAUSE", 0.01)
    with pytest.raises(UsageError, match="needs submitit"):
        SlurmLauncher(tmp_path, {}, 2)
    submitit = SimpleNamespace(AutoExecutor=Executor, helpers=SimpleNamespace(DelayedSubmission=lambda call: call))
    monkeypatch.setitem(sys.modules, "submitit", submitit)
    with pytest.raises(UsageError, match="Unknown argument"):
        SlurmLauncher(tmp_path, {"gpus": 1}, 2)
    launcher = SlurmLauncher(tmp_path, {"timeout_min": 5}, 2)
    handle = launcher.start(Steps(tmp_path / "a", (), (), {}, 1))
    assert handle.poll() == DONE and handle.job.next_command() is None
    handle.stop()
    assert handle.submitted.cancelled
    again = SlurmJob(Steps(tmp_path / "b", (), (), {}, 1)).checkpoint()  # preempted before its first command
    assert again() == DONE
