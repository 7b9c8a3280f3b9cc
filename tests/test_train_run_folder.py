"""The folder of a run: who gets it, and that nothing damaged or foreign in it or beside it stops a run."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, start_script
from test_train_command import pretrain, read_metrics

from data import files
from data.cli import UsageError
from data.launcher import (
    MACHINE,
    PROCESSES,
    RANK,
    RANK_ON_MACHINE,
    first_on_machine,
    launched,
    launched_rank,
    num_launched,
)
from train import callbacks, checkpoint, loggers, training
from train.callbacks import CheckpointCallback
from train.clock import Clock
from train.errors import TrainingError
from train.lit_module import LossWatch
from train.run import _starts
from train.run_lock import HOLDER, LOCK, locked, new_folder
from train.schema import PretrainConfig
from train.signals import RunStopped


def test_runs_that_start_in_one_second_get_a_folder_each(tmp_path: Path) -> None:
    """Four processes, released at once."""
    ready, go, end = os.pipe(), os.pipe(), os.pipe()
    processes = []
    for _ in range(4):
        if pid := os.fork():
            processes.append(pid)
            continue
        os.read(go[0], 1)
        with new_folder(tmp_path / "runs" / "now" / "mha-seed0", numbered=True) as folder:
            os.write(ready[1], f"{folder.name}\n".encode())
            os.read(end[0], 1)  # not of `go`: the first process would take what another waits for
        os._exit(0)
    os.write(go[1], b"1234")
    names = b""
    while names.count(b"\n") < 4:
        names += os.read(ready[0], 1000)
    os.write(end[1], b"1234")
    assert [os.waitpid(pid, 0)[1] for pid in processes] == [0] * 4
    assert sorted(names.decode().split()) == ["mha-seed0", "mha-seed0-2", "mha-seed0-3", "mha-seed0-4"]
    assert not list(tmp_path.rglob("mha*")), "nothing was written to them"


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with new_folder(folder, numbered=False):
        (folder / "config.yaml").touch()
        for again in (new_folder(folder, numbered=False), locked(folder)):
            with pytest.raises(UsageError, match=f"run is in use by process {os.getpid()} on .*, since ") as refused:
                again.__enter__()
            assert "\n" not in str(refused.value)
        (folder / HOLDER).unlink()
        with pytest.raises(UsageError, match="run is in use by another process"):
            locked(folder).__enter__()
    assert {path.name for path in folder.iterdir()} == {"config.yaml", LOCK}
    with pytest.raises(UsageError, match=f"holds a run already: resume={folder} continues it"):
        new_folder(folder, numbered=False).__enter__()
    with new_folder(folder, numbered=True) as other:
        assert other.name == "run-2"


def test_the_lock_of_a_process_that_died_does_not_count(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        with locked(tmp_path):
            os.write(writer, b"1")
            time.sleep(60)
    os.read(reader, 1)
    with pytest.raises(UsageError, match=f"in use by process {pid} on "):
        locked(tmp_path).__enter__()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["process"] == os.getpid()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(self: object, timeout: float) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr("train.run_lock.FileLock.acquire", refuse)
    with locked(tmp_path):
        assert "cannot be locked (no flock here): start nothing else in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder="], "folder= is empty; give a folder, or leave folder= out"),
        (["folder=' '"], "folder= is empty"),
        (["resume="], "resume= is empty"),
        (["init="], "init= is empty"),
        (["data.path="], "data.path= is empty; give a folder"),
        (["train_only="], "train_only= is empty; give a value"),
        (["folder=/"], "folder=/ is the root of the file system"),
        (["name=../../x"], "name is '../../x'; it must be one word of a path"),
        (["name=/abs/x"], "name is '/abs/x'; it must be one word of a path"),
        ([f"name={'x' * 300}"], "File name too long); give another with folder="),
        ([f"folder={'x' * 300}"], "File name too long); give another with folder="),
        ([f"folder=/dev/null/{'x' * 10}"], "Not a directory); give another with folder="),
    ],
)
def test_a_folder_that_cannot_be_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", *arguments)
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_prepared_data_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UsageError, match="holds prepared data"), new_folder(tmp_path, numbered=False):
        pytest.fail("it was given")
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_run_that_another_process_continues_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("train.training.run", lambda config: pytest.fail("it was started"))
    run = shutil.copytree(ROOT / "tests" / "golden" / "old", tmp_path / "old") / "run-mixattention"
    monkeypatch.chdir(run.parent)  # beside its data
    with locked(run), pytest.raises(SystemExit) as stopped:
        pretrain(f"resume={run}")
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{run} is in use by process {os.getpid()}" in line


def test_only_the_first_process_of_a_run_takes_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    assert launched_rank() == 0
    for variables in ({"RANK": "3", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}, {"SLURM_PROCID": "2"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert launched_rank() > 0


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*RANK, *RANK_ON_MACHINE, *PROCESSES, MACHINE}:
        monkeypatch.delenv(name, raising=False)


LAUNCHERS = [
    {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
    {"LOCAL_RANK": "1", "WORLD_SIZE": "4"},
    {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
    {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_SIZE": "4"},
]


@pytest.mark.parametrize("variables", LAUNCHERS, ids=["torchrun", "Lightning", "SLURM", "LSF"])
def test_a_process_knows_what_each_launcher_says(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them says a part alone: a mistake in the data is told to all, and Ctrl-C once per machine."""
    alone(monkeypatch)
    assert (first_on_machine(), launched(), num_launched()) == (True, False, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (first_on_machine(), launched(), num_launched()) == (False, True, 4)
    assert launched_rank() == (3 if "LOCAL_RANK" not in variables or "RANK" in variables else 1)


def test_machines_that_were_started_by_hand_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    monkeypatch.setenv("NODE_RANK", "0")
    assert launched() and first_on_machine() and num_launched() == 1


def test_names_are_flushed_with_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, sync = [], os.fsync

    def record(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    files.write_json(tmp_path / "a.json", [1])
    assert flushed == [str(tmp_path / "a.json.partial"), str(tmp_path)]
    flushed.clear()
    model = callbacks.torch.nn.Linear(2, 2)
    checkpoint.save(tmp_path / "c" / "step-00000001", model, callbacks.torch.optim.SGD(model.parameters()), 1, {})
    assert flushed[-2:] == [str(tmp_path / "c"), str(tmp_path)]


# Damage


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "a.json", [1])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "a.json", [2])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert len(list(tmp_path.iterdir())) == 1


def directory(path: Path) -> None:
    path.mkdir()
    (path / "inner").touch()


DAMAGES = [
    pytest.param(damage if callable(damage) else lambda path, data=damage: path.write_bytes(data), id=name)
    for name, damage in {
        "empty": b"",
        "cut": b'{"checkpoint": "step-0000',
        "no JSON": b"loss: 3",
        "not UTF-8": b"\xff\xfe{}",
        "null": b"null",
        "text": b'"text"',
        "number": b"7",
        "nested": b"[" * 200_000,
        "folder": directory,
    }.items()
]
BEST = [b"[]", b"{}", b'{"checkpoint": "step-00000003"}', b'{"checkpoint": "step-00000003", "val_loss": "3"}']
BEST += [b'{"checkpoint": "step-00000003", "val_loss": %s}' % value for value in (b"NaN", b"null", b"[]", b"1" * 400)]
BEST = [pytest.param(lambda path, data=data: path.write_bytes(data), id=data.decode()[:60]) for data in BEST]


@pytest.fixture
def keeper(tmp_path: Path) -> CheckpointCallback:
    for step in (3, 6, 7, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    result = CheckpointCallback(tmp_path, every=3, keep=2, start=None, init=None)
    result.step = 9
    return result


def kept(keeper: CheckpointCallback) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(keeper.run)]


@pytest.mark.parametrize("damage", [*DAMAGES, *BEST])
def test_a_damaged_best_json_is_put_aside(
    damage: Callable[[Path], object], keeper: CheckpointCallback, capsys: pytest.CaptureFixture
) -> None:
    damage(keeper.best_file)
    assert keeper.read_best() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{keeper.best_file} is damaged" in line and "it is now best.json.damaged" in line
    files.write_json(keeper.best_file, {"checkpoint": "step-00000003", "val_loss": 3})
    assert keeper.read_best() == ("step-00000003", 3.0)
    keeper.prune()
    assert kept(keeper) == [9, 7, 3]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_json_is_put_aside(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.json"
    for number in ("", "-2"):
        damage(path)
        assert _starts(tmp_path) == []
        assert f"{path} is damaged" in (line := capsys.readouterr().err) and len(line.splitlines()) == 1
        assert (tmp_path / f"run.json.damaged{number}").exists()
    assert _starts(tmp_path) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [param for param in DAMAGES if param.id not in ("null", "number")])
def test_a_damaged_identity_in_wandb_is_put_aside(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(tmp_path / "wandb-id.txt")
    identity = loggers.wandb_id(tmp_path)
    assert len(identity) == 12
    assert "wandb-id.txt is damaged" in capsys.readouterr().err
    assert loggers.wandb_id(tmp_path) == identity


@pytest.mark.parametrize(
    "saved", [None, {}, [], [1, 2], "text", 5, math.nan, {"seconds": "3", "cpu_seconds": math.inf}, {"seconds": -1}]
)
def test_a_clock_that_was_not_saved_still_measures(saved: object) -> None:
    clock = Clock()
    clock.load(saved)
    clock.resume()
    assert 0 <= clock.read() < 60
    assert math.isnan(clock.seconds) and math.isnan(clock.cpu_seconds)
    clock.load({"seconds": 5, "cpu_seconds": 10**400})
    assert 5 <= clock.seconds < 65
    assert math.isnan(clock.cpu_seconds)


def test_a_run_goes_on_whatever_is_damaged_beside_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """All at once: its records, its metrics, the clock in its checkpoint; at the end the picture cannot be drawn."""
    shutil.copytree(ROOT / "tests" / "golden" / "old", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    run = Path("run-mixattention")
    recorded = json.loads((run / "summary.json").read_text())
    for path in (run / "checkpoints" / "step-00000008", run / "metrics"):
        shutil.rmtree(path)
    for name in ("summary.json", "checkpoints/best.json"):
        (run / name).unlink()
    directory(run / "checkpoints" / "best.json")
    (run / "run.json").write_text("{")
    (run / "metrics").touch()
    info = run / "checkpoints" / "step-00000006" / "checkpoint.json"
    files.write_json(info, json.loads(info.read_text()) | {"clock": ["3"]})
    monkeypatch.setattr(loggers, "write", lambda *arguments: 1 / 0)
    pretrain(f"resume={run}", "trainer.log_every=1")
    assert json.loads((run / "summary.json").read_text())["val"] == pytest.approx(recorded["val"], rel=1e-5)
    assert checkpoint.checkpoints(run)[0].name == "step-00000008"
    assert json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"] == "step-00000008"
    rows = [row for row in read_metrics(run) if row["train/loss"]]
    assert [row["train/seconds"] for row in rows] == ["nan"] * len(rows)
    assert float(rows[-1]["train/tokens_per_second"]) > 0
    errors = capfd.readouterr().err.splitlines()
    assert sum("is damaged" in line or "is no folder" in line for line in errors) == 3, errors
    assert any(line.startswith("no Pareto picture: division by zero") for line in errors), errors


def test_each_start_has_metrics_of_its_own(tmp_path: Path) -> None:
    config = PretrainConfig(resume=str(tmp_path))
    config.logger.wandb = False

    def number() -> str:
        (logger,) = loggers.loggers(config, tmp_path)
        return Path(logger.log_dir).name

    (tmp_path / "metrics").write_text("")
    assert number() == "0"
    assert (tmp_path / "metrics.damaged").is_file()
    for name in ("1", "12", "notes", "²"):
        (tmp_path / "metrics" / name).mkdir(parents=True)
    (tmp_path / "metrics" / "40").touch()
    assert number() == "41"


@pytest.mark.parametrize("in_background", [False, True])
def test_the_former_best_goes_when_there_is_a_better_one(
    in_background: bool, keeper: CheckpointCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end, too: no other checkpoint comes that would delete it."""
    monkeypatch.setattr("train.callbacks.lit_model", lambda module: module)
    files.write_json(keeper.best_file, {"checkpoint": "step-00000007", "val_loss": 3.0})
    keeper.keep, keeper.best = 1, 3.0
    keeper.writing = SimpleNamespace(wait=lambda: None) if in_background else None
    trainer, module = SimpleNamespace(global_step=9, is_global_zero=True), SimpleNamespace(val_metrics={"loss": 2.0})
    keeper.on_validation_end(trainer, module)
    keeper.on_train_end(trainer, module)
    assert keeper.read_best() == ("step-00000009", 2.0)
    assert kept(keeper) == [9]


def test_broken_checkpoints_do_not_count(keeper: CheckpointCallback) -> None:
    files.write_json(keeper.best_file, {"checkpoint": "step-00000007", "val_loss": 3.0})
    (keeper.run / "checkpoints" / "step-old-copy").mkdir()
    keeper.broken = {"step-00000007", "step-00000009"}
    keeper.prune()
    assert kept(keeper) == [9, 6], "the one of this step was written anew"
    assert (keeper.run / "checkpoints" / "step-old-copy").exists()


def test_a_checkpoint_that_is_being_deleted_does_not_look_like_one(
    keeper: CheckpointCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL may come with any file that is deleted."""
    seen = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: seen.append(path.name))
    keeper.prune()
    assert kept(keeper) == [9, 7]
    assert {name for name in seen if "06" in name or "03" in name} == {
        f"step-0000000{step}.deleted.partial" for step in (3, 6)
    }


# The end of a run


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A finished run with a neighbour of each kind that cannot be read."""
    run = tmp_path / "run"
    for name in ("run", "empty_val", "text", "folder", "unfinished"):
        (tmp_path / name).mkdir()
    source = ROOT / "tests/golden/old/run-mixattention"
    for name in ("summary.json", "plan.json"):
        (run / name).write_bytes((source / name).read_bytes())
        (tmp_path / "empty_val" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "text" / "summary.json").write_text("text")
    (tmp_path / "folder" / "summary.json").mkdir()
    return run


def test_neighbours_that_cannot_be_read_are_named(
    ended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    exists = Path.exists

    def private(self: Path) -> bool:
        if self.parent.name == "empty_val":
            raise PermissionError(13, "Permission denied", str(self))
        return exists(self)

    monkeypatch.setattr(Path, "exists", private)
    loggers.log_final(ended, {}, 2, 32, [])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("left out of the Pareto picture: ") for line in lines), lines
    assert len(json.loads((ended / "pareto" / "pareto.json").read_text())) == 1


def test_the_picture_of_a_run_has_the_neighbours_that_compare_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Not those of other data, steps or validation, as a study's runs that search rates are."""
    source = ROOT / "tests/golden/old/run-mixattention"
    changes = {"own": {}, "same": {}, "data": {"data": "x"}, "steps": {"steps": 4}, "val": {"val_tokens": 64}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        shutil.copy(source / "plan.json", tmp_path / name)
        summary = json.loads((source / "summary.json").read_text())
        summary |= {"name": name, "experiment": summary["experiment"] | change}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    loggers.log_final(tmp_path / "own", {}, 2, 32, [])
    rows = json.loads((tmp_path / "own" / "pareto" / "pareto.json").read_text())
    assert {row["name"] for row in rows} == {"own", "same"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("left out of the Pareto picture: 3 runs with other data") and "steps" in line


@pytest.mark.parametrize("error", [ValueError("no $ here"), OSError(28, "No space left on device"), RecursionError()])
def test_a_picture_fails_no_run(
    error: Exception, ended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sent = {}

    def fail(*arguments: object) -> None:
        assert sent, "the figures are sent first"
        raise error

    logger = loggers.WandbLogger.__new__(loggers.WandbLogger)
    monkeypatch.setattr(loggers.WandbLogger, "experiment", SimpleNamespace(summary=sent))
    monkeypatch.setattr(loggers, "write", fail)
    loggers.log_final(ended, {"final/ppl": 3.0}, 2, 32, [logger])
    assert sent == {"final/ppl": 3.0}
    assert "no Pareto picture: " in capsys.readouterr().err


def test_a_full_disk_at_the_start_or_end_is_one_line(
    keeper: CheckpointCallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All between building the trainer and the summary is in this block."""
    monkeypatch.setattr(training.checkpoint, "latest_valid", lambda run: run / "checkpoints" / "step-00000009")
    message = r"^\[Errno 28\] No space left on device\. The last good checkpoint is .*step-00000009; resume=.*\.$"
    with pytest.raises(TrainingError, match=message), training.naming_the_last_checkpoint(keeper):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_agree_once_in_a_step(keeper: CheckpointCallback, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """On the signal that one of them got, and on rank 0's clock alone for the next checkpoint."""
    mine, theirs, watch = [], torch.tensor([0, 0]), LossWatch(3.0)

    def all_reduce(flags: torch.Tensor, op: object, group: object) -> None:
        mine.append(flags.tolist())
        flags.copy_(torch.maximum(flags, theirs))

    monkeypatch.setattr(callbacks.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(callbacks, "lit_model", lambda module: module)
    monkeypatch.setattr(keeper, "save", lambda trainer, module: saved.update({trainer.global_step: None}))
    saved: dict[int, None] = {}
    keeper.minutes = 30.0
    stop, module = callbacks.GracefulStop(keeper, SimpleNamespace(received=0), None), SimpleNamespace(loss_watch=watch)
    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=4, is_global_zero=rank == 0, global_step=9)

    def step() -> None:
        first = 4 * (trainer.global_step - 9)
        for batch in range(first, first + 4):
            trainer.global_step += batch == first + 3
            keeper.on_train_batch_end(trainer, module, None, None, batch)
            stop.on_train_batch_end(trainer, module, None, None, batch)

    step()
    assert (mine, [*saved]) == ([[0, 0]], [])
    keeper.saved_at -= 31 * 60
    theirs[1] = int(rank == 1)
    step()
    assert mine[1:] == [[0, int(rank == 0)]], "the clock of the others does not count"
    keeper.saved_at, theirs[1] = time.monotonic(), 0
    step()
    assert ([*saved], len(mine)) == ([12], 3)
    step()
    assert ([*saved], len(mine)) == ([12], 4)
    theirs[0] = signal.SIGTERM
    with pytest.raises(RunStopped) as stopped:
        step()
    assert stopped.value.reason == "stopped after step 14 (SIGTERM)"
    assert ([*saved], len(mine)) == ([12, 14], 5)


WAITING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from pathlib import Path
from train import signals
signals.PATIENCE = 0.5
handlers = signals.Signals(Path("RUN"), peers=True, rank=0)
print("waiting", flush=True)
dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_process_that_waits_for_its_peers_can_be_stopped(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    process = start_script(tmp_path / "waiting.py", cwd=tmp_path)
    assert process.stdout.readline() == "waiting\n", process.stderr.read()
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.splitlines() == [f"stopped before training began ({number.name}); resume=RUN continues"]


@pytest.mark.parametrize(("rank", "code", "message"), [("0", 130, "error: interrupted\n"), ("1", 0, "")])
def test_ctrl_c_during_imports_is_one_line(rank: str, code: int, message: str, tmp_path: Path) -> None:
    """Of the process that a terminal shows; its launcher's others say nothing."""
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r})", "from data.cli import end_on_ctrl_c; end_on_ctrl_c()"
    (tmp_path / "command.py").write_text("\n".join([*lines, "raise KeyboardInterrupt"]))
    process = start_script(tmp_path / "command.py", cwd=tmp_path, environment={"LOCAL_RANK": rank})
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, message)
