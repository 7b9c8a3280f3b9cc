"""What a run keeps, and that it resumes with nothing lost: the cases that train/benchmarks/faults.py does not drive."""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import current_thread, main_thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import run_script
from lightning.pytorch.loggers import CSVLogger
from test_train_command import SMALL, losses, pretrain, read_metrics
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import train.training
from data.cli import UsageError
from train import checkpoint
from train.benchmarks.faults import cut_in_half, flip_a_byte
from train.checkpoint import INFO, BackgroundSave, checkpoints, load, resolve, save, step_of, verify_checksums
from train.errors import TrainingError
from train.lit_module import LitModel


@pytest.fixture(scope="module")
def options(corpus: Path) -> list[str]:
    """Eight steps, validated after the fourth and the last; saved after the third, the sixth and the last."""
    every = ["trainer.val_every=4", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9"]
    return ["+arch=mha", "+size=tiny", *SMALL, *every, "logger=csv", f"data.path={corpus}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    """A run that is left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(*options, f"folder={folder}")
    return folder


def stop(*arguments: str, step: int, where: str = "training_step") -> None:
    """The command, which gets SIGTERM in step `step`, or in the validation after it."""
    method = getattr(LitModel, where)

    def signalled(self: LitModel, *args: object) -> object:
        if self.trainer.global_step == (step if "validation" in where else step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(LitModel, where, signalled)
        pretrain(*arguments)
    assert stopped.value.code == 0


def validations(folder: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["val/loss"]) for row in read_metrics(folder) if row.get("val/loss")}


@pytest.mark.parametrize(
    ("step", "where"), [(4, "training_step"), (8, "training_step"), (4, "validation_step"), (8, "validation_step")]
)
def test_a_validation_that_was_due_is_not_lost(
    whole: Path, options: list[str], tmp_path: Path, step: int, where: str
) -> None:
    folder = tmp_path / "run"
    stop(*options, f"folder={folder}", step=step, where=where)
    pretrain(f"resume={folder}")
    assert losses(folder) == losses(whole)
    assert validations(folder) == validations(whole)
    best = [(run / "checkpoints" / "best.json").read_text() for run in (whole, folder)]
    assert best[0] == best[1]


def test_stopped_before_the_first_step_it_still_starts_from_the_given_weights(
    whole: Path, options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop(*options, f"folder={folder}", f"init={whole}", "trainer.micro_batch=1", step=1)
    assert not checkpoints(folder)
    pretrain(f"resume={folder}")
    assert float(losses(folder)[1]) < float(losses(whole)[1]) - 0.3


def test_broken_checkpoints_do_not_crowd_out_good_ones(
    whole: Path, options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Nor does a best one that is broken stay the best, nor is half of one left for ever."""
    folder = tmp_path / "run"
    pretrain(*options, f"folder={folder}")
    broken = checkpoints(folder)[:2]
    assert [path.name for path in broken] == ["step-00000008", "step-00000006"]
    for path in broken:
        flip_a_byte(next(path.glob("*.safetensors")))
    (folder / "checkpoints" / "step-00000007.partial").mkdir()
    stop(f"resume={folder}", "trainer.keep_checkpoints=1", "trainer.val_every=8", step=5)
    assert "falling back to step-00000004" in capfd.readouterr().err
    assert resolve(folder).name == "step-00000005"
    assert not list(folder.glob("checkpoints/*.partial"))
    pretrain(f"resume={folder}")
    assert losses(folder) == losses(whole)
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best == {"checkpoint": "step-00000008", "val_loss": validations(whole)[8]}
    verify_checksums(folder / "checkpoints" / best["checkpoint"])


def test_a_signal_before_training_has_begun_stops_it(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = train.training.fit

    def signalled(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fit(*args)

    monkeypatch.setattr(train.training, "fit", signalled)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stopped:
            pretrain(*options, f"folder={tmp_path / 'run'}")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 0
    assert list(losses(tmp_path / "run")) == [1]


def test_denormal_numbers_are_zero_while_a_cpu_trains(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, products = train.training.fit, []

    def multiplied(*args: object) -> None:
        products.append(float(torch.full((64,), 1e-39).mul(0.5).max()))
        fit(*args)

    monkeypatch.setattr(train.training, "fit", multiplied)
    pretrain(*options, f"folder={tmp_path / 'run'}")
    assert products == [0.0]
    assert torch.full((64,), 1e-39).mul(0.5).max() > 0, "afterwards the process is as it was"


def test_disk_full_while_logging(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = tmp_path / "run", CSVLogger.save

    def full(self: CSVLogger) -> None:
        if checkpoints(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")
        write(self)

    monkeypatch.setattr(CSVLogger, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*The last good checkpoint is .*step-00000003"):
        pretrain(*options, f"folder={folder}")


def test_a_folder_that_cannot_be_written_to_loses_no_configuration(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    stop(*options, f"folder={folder}", step=1)
    before = (folder / "config.yaml").read_text()
    (folder / "config.yaml.partial").mkdir()
    with pytest.raises(SystemExit) as stopped:
        pretrain(f"resume={folder}", "tokens=2048")
    assert stopped.value.code == 2
    assert f"cannot write to the run folder {folder}" in capfd.readouterr().err
    assert (folder / "config.yaml").read_text() == before


@pytest.fixture
def group() -> Iterator[None]:
    """One process that is a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.usefixtures("group")
def test_a_sharded_model_saved_after_a_validation_keeps_all_optimizer_state(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = stepped(model)
    with torch.no_grad():
        model(torch.ones(2, 3))
        save(tmp_path / "step-00000001", model, optimizer, 1, {})
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fresh = torch.optim.AdamW(other.parameters())
    load(tmp_path / "step-00000001", other, fresh)
    for (name, theirs), ours in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(theirs.full_tensor(), ours), name
        for key, value in optimizer.state[theirs].items():
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(full, fresh.state[ours][key]), f"{key} of {name}"


def test_what_is_not_whole_is_not_loaded(tmp_path: Path) -> None:
    folder, model = tmp_path / "step-00000001", nn.Linear(3, 2)
    save(folder, model, torch.optim.AdamW(model.parameters()), 1, {})
    with pytest.raises(TrainingError, match="lacks the optimizer state of weight, bias"):
        load(folder, model, torch.optim.AdamW(model.parameters()))
    save(folder, model, stepped(model), 1, {})
    wider = nn.Linear(3, 4)
    with pytest.raises(TrainingError, match=r"is of another model: model\.weight"):
        load(folder, wider, torch.optim.AdamW(wider.parameters()))
    (path,) = folder.glob("*.safetensors")
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(TrainingError, match=r"cannot read .*step-00000001"):
        load(folder, model)


def test_values_that_are_no_numbers_are_not_loaded(tmp_path: Path) -> None:
    """Neither of weights nor of the optimizer; nor weights that are whole numbers, which would be rounded."""
    folder, model = tmp_path / "step-00000001", nn.Linear(3, 2)
    optimizer = stepped(model)
    for tensor in (model.weight.data, optimizer.state[model.bias]["exp_avg_sq"]):
        before = tensor.clone()
        tensor.flatten()[1] = math.nan
        save(folder, model, optimizer, 1, {})
        fresh = nn.Linear(3, 2)
        with pytest.raises(TrainingError, match=r"has values that are not finite, in (model|optimizer)\.[\w.]+$"):
            load(folder, fresh, torch.optim.AdamW(fresh.parameters()))
        tensor.copy_(before)
    model.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int32), requires_grad=False)
    save(folder, model, optimizer, 1, {})
    with pytest.raises(TrainingError, match=r"is of another model: model\.weight is I32 there"):
        load(folder, nn.Linear(3, 2))


def test_an_adapter_beside_a_checkpoint_or_in_its_run_is_refused(tmp_path: Path) -> None:
    """By all that start from its weights: pretrain init=, uptrain, export and load."""
    model = nn.Linear(3, 2)
    folder = tmp_path / "checkpoints" / "step-00000001"
    save(folder, model, torch.optim.AdamW(model.parameters()), 1, {})
    assert resolve(folder) == resolve(tmp_path) == folder
    for place, names in ((folder, (folder, tmp_path)), (tmp_path, (tmp_path,))):
        (place / "adapter_config.json").touch()
        for name in names:
            with pytest.raises(UsageError, match=rf"{place} has an adapter, adapter_config.json, which would be left"):
                resolve(name)
        (place / "adapter_config.json").unlink()


@pytest.mark.slow
def test_processes_agree_on_a_folder_that_was_not_given(options: list[str], tmp_path: Path) -> None:
    """Each would name it by its own clock. The checkpoint made in a validation has the optimizer state of all."""
    arguments = [*options, "trainer=fsdp", "trainer.accelerator=cpu", "tokens=256", "trainer.val_every=1"]
    done = run_script("train/pretrain.py", *arguments, cwd=tmp_path, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").glob("*/*")
    newest = resolve(folder)
    assert len(list(newest.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_in_half, r"safetensors has \d+ bytes, \d+ were written"),
        (flip_a_byte, "has been altered: its checksum is not the one written"),
        (Path.unlink, "safetensors is missing"),
    ],
)
def test_what_was_written_is_what_is_there(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = tmp_path / "checkpoints" / "step-00000001"
    save(folder, model, optimizer, 1, {})
    verify_checksums(folder)
    damage(next(folder.glob("*.safetensors")))
    with pytest.raises(TrainingError, match=message):
        verify_checksums(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hold(monkeypatch: pytest.MonkeyPatch, let_go: Callable[[int], bool]) -> None:
    """Let no file of a checkpoint be written in the background before `let_go` of its step."""
    write = checkpoint.write_file

    def held(path: Path, *arguments: Any) -> dict[str, Any]:
        while current_thread() is not main_thread() and not let_go(step_of(path.parent.with_suffix(""))):
            time.sleep(0.002)
        return write(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_file", held)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_background_writes_the_state_of_its_step(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Byte for byte what `save` writes, though training goes on; the second one over the copies of the first."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    if sharded:
        request.getfixturevalue("group")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer, copies = stepped(model), {}
    changed: set[int] = set()
    hold(monkeypatch, changed.__contains__)
    for step in (1, 2):
        expected, folder = (tmp_path / name / "checkpoints" / f"step-{step:08}" for name in ("one", "two"))
        save(expected, model, optimizer, step, {"plan": "this"})
        writing = BackgroundSave(folder, model, optimizer, step, {"plan": "this"}, copies, None)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert not writing.ended and not checkpoints(tmp_path / "two")[step - 1 :]
        changed.add(step)
        writing.wait()
        assert contents(folder) == contents(expected)


def test_training_goes_on_while_a_checkpoint_is_written(
    whole: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is written when the next step has begun, but for the last; run and checkpoints are as if it waited."""
    folder, unfinished = tmp_path / "run", {}
    training_step = LitModel.training_step

    def step(self: LitModel, *arguments: Any) -> Any:
        unfinished[self.trainer.global_step] = [path.name for path in folder.glob("checkpoints/*.partial")]
        return training_step(self, *arguments)

    monkeypatch.setattr(LitModel, "training_step", step)
    hold(monkeypatch, lambda step: step in unfinished or step == 8)
    pretrain(*options, f"folder={folder}", "trainer.checkpoint_async=true")
    for number in (3, 4, 6):
        assert unfinished[number] == [f"step-{number:08}.partial"], "when the next step begins"
    assert losses(folder) == losses(whole)
    found = [{path.name: contents(path) for path in checkpoints(run)} for run in (whole, folder)]
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        verify_checksums(folder / "checkpoints" / name)
        infos = [json.loads(content[name].pop(INFO)) | {"clock": None} for content in found]
        assert infos[0] == infos[1]
        assert found[1][name] == expected
    best = [(run / "checkpoints" / "best.json").read_text() for run in (whole, folder)]
    assert best[0] == best[1]


@pytest.mark.parametrize("how", ["SIGTERM", "failure"])
def test_the_end_waits_for_what_is_written_in_the_background(
    how: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is not written before someone waits for it."""
    folder, waited = tmp_path / "run", []
    wait, training_step = BackgroundSave.wait, LitModel.training_step

    def wait_for(self: BackgroundSave) -> None:
        waited.append(self.folder.name)
        wait(self)

    def fail(self: LitModel, *arguments: Any) -> Any:
        if self.trainer.global_step == 3:
            raise TrainingError("the loss is lost")
        return training_step(self, *arguments)

    monkeypatch.setattr(BackgroundSave, "wait", wait_for)
    hold(monkeypatch, lambda step: bool(waited))
    arguments = [*options, f"folder={folder}", "trainer.checkpoint_async=true"]
    if how == "SIGTERM":
        stop(*arguments, step=3)
    else:
        monkeypatch.setattr(LitModel, "training_step", fail)
        with pytest.raises(TrainingError, match=r"is lost\. The last good checkpoint is .*step-00000003"):
            pretrain(*arguments)
    assert waited == ["step-00000003"]
    assert resolve(folder).name == "step-00000003"
    assert not list(folder.glob("checkpoints/*.partial"))


def test_a_failure_in_the_background_ends_the_run_at_the_next_step(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write, training_step = tmp_path / "run", checkpoint.write_file, LitModel.training_step

    def full(path: Path, *arguments: Any) -> dict[str, Any]:
        if "step-00000004" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *arguments)

    def step(self: LitModel, *arguments: Any) -> Any:
        for thread in enumerate_threads():
            if thread.name.startswith("save "):
                thread.join()
        return training_step(self, *arguments)

    monkeypatch.setattr(checkpoint, "write_file", full)
    monkeypatch.setattr(LitModel, "training_step", step)
    saved = r"The last good checkpoint is .*step-00000003"
    with pytest.raises(TrainingError, match=rf"cannot save .*step-00000004: .*No space left on device.*{saved}"):
        pretrain(*options, f"folder={folder}", "trainer.checkpoint_async=true")
    assert max(losses(folder)) <= 5, "the next checkpoint would have been after step 6"
    assert not list(folder.glob("checkpoints/*.partial"))
    assert not (folder / "checkpoints" / "best.json").exists(), "it would name what was not written"
