"""What a run reports of its speed, and that it waits for the device only where it reports."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import launch_in_process
from torch.utils._python_dispatch import TorchDispatchMode

from train import callbacks, clock, device, lit_module, metrics, pretrain
from train.clock import Clock
from train.schema import PretrainConfig

SMALL = [
    "+arch=cla2", "+size=tiny", "size.num_layers=3", "size.d_model=32", "size.vocab_size=600", "size.seq_len=32",
    "batch_size=4", "tokens=1536", "data.val_tokens=128", "logger=csv", "trainer.accelerator=cpu",
    "trainer.micro_batch=2", "trainer.log_every=5", "trainer.val_every=8",
]  # fmt: skip


def run(folder: Path, corpus: Path, *arguments: str) -> list[dict[str, str]]:
    """The reports of the steps, of 12: 5, 10, 12."""
    options = [*SMALL, f"data.path={corpus}", f"folder={folder}", *arguments]
    launch_in_process(pretrain.main, "pretrain", PretrainConfig, options)
    rows = csv.DictReader((folder / "metrics" / "0" / "metrics.csv").open())
    return [row for row in rows if row["train/loss"]]


class Reads(TorchDispatchMode):
    """Counts, for each step, how often the host reads a value off the device."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[self.step] += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bar", [False, True])
def test_nothing_waits_between_reports(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, bar: bool
) -> None:
    reads, begin = Reads(), metrics.Metrics.on_train_batch_start

    def at_start(self: metrics.Metrics, trainer: L.Trainer, *rest: Any) -> None:
        reads.step = trainer.global_step + 1
        begin(self, trainer, *rest)

    monkeypatch.setattr(metrics.Metrics, "on_train_batch_start", at_start)
    monkeypatch.setattr("sys.stdout.isatty", lambda: bar)
    with reads:
        run(tmp_path / "run", corpus)
    waited = {step for step, count in reads.count.items() if count}
    assert waited - {0} == {5, 8, 10, 12}, "reports, validations, and the end"


def test_mfu(tmp_path: Path, corpus: Path) -> None:
    rows = run(tmp_path / "run", corpus, "trainer.peak_tflops=0.002")
    assert [int(row["step"]) for row in rows] == [5, 10, 12]
    for row in rows:
        speed = float(row["train/tokens_per_second"])
        assert float(row["train/tokens_per_second_per_device"]) == speed
        expected = speed * float(row["model/train_flops_per_token"]) / 0.002e12
        assert float(row["train/mfu"]) == pytest.approx(expected)


def test_unknown_device_has_no_mfu(tmp_path: Path, corpus: Path) -> None:
    rows = run(tmp_path / "run", corpus)
    assert all("train/mfu" not in row and float(row["train/tokens_per_second"]) > 0 for row in rows)


class Times:
    """A clock that is advanced by hand, in place of the machine's two: every CPU second is two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(clock.time, "process_time", lambda: 2 * self.now)


@pytest.fixture
def steps_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """TokenPositions take a second each; the first after a start, validations and checkpoints take a thousand."""
    times, first = Times(monkeypatch), [-1]
    step, validate, save = (
        lit_module.LitModel.training_step,
        lit_module.LitModel.validation_step,
        callbacks.checkpoint.save,
    )

    def slow_start(self: metrics.Metrics, trainer: L.Trainer, module: Any) -> None:
        first[0] = trainer.global_step
        start(self, trainer, module)

    def slow_step(self: Any, batch: Any, index: int) -> torch.Tensor:
        times.now += 1000.0 if self.trainer.global_step == first[0] else 0.5  # two micro-batches
        return step(self, batch, index)

    def slow_validation(self: Any, batch: Any, index: int) -> None:
        times.now += 1000.0
        validate(self, batch, index)

    def slow_save(*arguments: Any) -> None:
        times.now += 1000.0
        save(*arguments)

    start = metrics.Metrics.on_train_start
    monkeypatch.setattr(metrics.Metrics, "on_train_start", slow_start)
    monkeypatch.setattr(lit_module.LitModel, "training_step", slow_step)
    monkeypatch.setattr(lit_module.LitModel, "validation_step", slow_validation)
    monkeypatch.setattr(callbacks.checkpoint, "save", slow_save)


@pytest.mark.usefixtures("steps_of_a_second")
def test_only_steps_are_timed(tmp_path: Path, corpus: Path) -> None:
    rows = run(tmp_path / "run", corpus, "trainer.checkpoint_every=6")
    assert [int(row["step"]) for row in rows] == [5, 6, 10, 12]
    assert [float(row["train/tokens_per_second"]) for row in rows] == pytest.approx([4 * 32.0] * 4)
    assert [float(row["train/seconds"]) for row in rows] == pytest.approx([4.0, 5.0, 9.0, 11.0])
    assert [float(row["train/cpu_seconds"]) for row in rows] == pytest.approx([8.0, 10.0, 18.0, 22.0])


@pytest.mark.usefixtures("steps_of_a_second")
def test_time_goes_on_over_a_resume(tmp_path: Path, corpus: Path) -> None:
    """Stopped after step 8, before the validation that is due there, which then comes first."""
    folder = tmp_path / "run"

    class HeldError(Exception):
        pass

    def fail(self: Any) -> None:
        raise HeldError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lit_module.LitModel, "on_validation_epoch_start", fail)
        with pytest.raises(HeldError):
            run(folder, corpus, "trainer.checkpoint_every=8", "trainer.log_every=3")
    launch_in_process(pretrain.main, "pretrain", PretrainConfig, [f"resume={folder}"])
    found = {}
    for start in ("0", "1"):
        for row in csv.DictReader((folder / "metrics" / start / "metrics.csv").open()):
            if row["train/loss"]:
                found[int(row["step"])] = float(row["train/seconds"])
    assert found == pytest.approx({3: 2.0, 6: 5.0, 8: 7.0, 9: 7.0, 12: 10.0}), "without the first steps, 1 and 9"


def test_the_time_of_a_run_from_before_the_clock_is_not_known() -> None:
    new = Clock()
    new.load(None)
    assert math.isnan(new.seconds)
    assert math.isnan(new.cpu_seconds)


def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, dtype: torch.dtype, **options: float) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return device.peak_flops(torch.device("cuda"), dtype, **options)

    assert peak("NVIDIA H200", torch.bfloat16) == 989.5e12
    assert peak("NVIDIA H200", torch.float32) == 67e12
    assert peak("NVIDIA H300", torch.bfloat16) is None
    assert peak("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert peak("NVIDIA H300", torch.bfloat16, peak_tflops=7.0) == 7e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak("NVIDIA H200", torch.float32) == 494.5e12
    assert device.peak_flops(torch.device("cpu"), torch.float32) is None
