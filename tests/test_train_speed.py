"""What a run reports of its speed, and that it waits for the device only where it reports."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import launch_in_process
from torch.utils._python_dispatch import TorchDispatchMode

from train import metrics, pretrain
from train.schema import PretrainConfig, TrainerConfig

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


def test_first_step_and_validation_are_not_timed(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the first step and validations advance, and each other step by one second."""
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    step, validate = pretrain.LitModel.training_step, pretrain.LitModel.validation_step

    def slow_step(self: Any, batch: Any, index: int) -> torch.Tensor:
        clock[0] += 1000.0 if self.trainer.global_step == 0 else 0.5  # two micro-batches
        return step(self, batch, index)

    def slow_validation(self: Any, batch: Any, index: int) -> None:
        clock[0] += 1000.0
        validate(self, batch, index)

    monkeypatch.setattr(pretrain.LitModel, "training_step", slow_step)
    monkeypatch.setattr(pretrain.LitModel, "validation_step", slow_validation)
    rows = run(tmp_path / "run", corpus)
    assert [float(row["train/tokens_per_second"]) for row in rows] == pytest.approx([4 * 32.0] * 3)


def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, dtype: torch.dtype, **options: float) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return metrics.peak_flops(TrainerConfig(**options), torch.device("cuda"), dtype)

    assert peak("NVIDIA H200", torch.bfloat16) == 989.5e12
    assert peak("NVIDIA H200", torch.float32) == 67e12
    assert peak("NVIDIA H300", torch.bfloat16) is None
    assert peak("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert peak("NVIDIA H300", torch.bfloat16, peak_tflops=7.0) == 7e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak("NVIDIA H200", torch.float32) == 494.5e12
    assert metrics.peak_flops(TrainerConfig(), torch.device("cpu"), torch.float32) is None
