"""Callbacks that save, restore and stop a run."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from data.files import DataError, write_json
from train import checkpoint
from train.lightning_private import disable_signal_handling, set_loop_step
from train.lit_module import LitModel, lit_model


class CheckpointCallback(L.Callback):
    """Save every `every` steps, at the best validation so far and at the end; keep the newest `keep` and the best.

    Before training, restore the state of `start`, a checkpoint of this run, or else the weights of `init`, a run or a
    checkpoint. Rank 0's `run` and `start` are broadcast: other ranks may have chosen another timestamped folder.
    """

    def __init__(self, run: Path, every: int, keep: int, start: Path | None, init: Path | None):
        self.run, self.every, self.keep = run, every, keep
        self.start, self.init = start, init
        self.best = math.inf
        self.step = 0  # of the newest checkpoint

    @property
    def best_file(self) -> Path:
        return self.run / "checkpoints" / "best.json"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run, self.start = trainer.strategy.broadcast((self.run, self.start))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        if self.start is None:
            if self.init is not None:
                checkpoint.load(checkpoint.resolve(self.init), module.model)
            return
        checkpoint.load(self.start, module.model, trainer.optimizers[0])
        self.step = checkpoint.step_of(self.start)
        set_loop_step(trainer, self.step)
        module.clock.load(checkpoint.load_info(self.start).get("clock"))
        if self.best_file.is_file():
            best = json.loads(self.best_file.read_text())
            if best["checkpoint"] <= self.start.name:  # a later one was broken
                self.best = best["val_loss"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer, lit_model(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        if module.val_metrics["loss"] < self.best:
            self.best = module.val_metrics["loss"]
            self.save(trainer, module)
            if trainer.is_global_zero:
                write_json(self.best_file, {"checkpoint": folder_name(self.step), "val_loss": self.best})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, lit_model(pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was trained when the data fails. With several processes the others would wait for this one."""
        if isinstance(exception, DataError) and trainer.world_size == 1 and trainer.global_step:
            self.save(trainer, lit_model(pl_module))

    def save(self, trainer: L.Trainer, module: LitModel) -> None:
        """Save the state after the last whole step, unless it is saved already."""
        step = trainer.global_step
        if step == self.step:
            return
        module.check_finite()  # waits for the device
        folder = self.run / "checkpoints" / folder_name(step)
        with module.clock.paused():
            info = module.describe() | {"clock": module.clock.to_dict()}
            checkpoint.save(folder, module.model, trainer.optimizers[0], step, info)
            self.step = step
            if trainer.is_global_zero:
                self.prune()

    def prune(self) -> None:
        """Delete all but the newest `keep` checkpoints and the best.

        Checkpoints after this step were broken when the run was resumed and go too. A folder that cannot be deleted,
        because another program reads it, is tried again with the next checkpoint.
        """
        saved = checkpoint.checkpoints(self.run)
        newest = [path for path in saved if checkpoint.step_of(path) <= self.step][: self.keep]
        retained = {path.name for path in newest}
        if self.best_file.is_file():
            retained.add(json.loads(self.best_file.read_text())["checkpoint"])
        for path in [*saved, *(self.run / "checkpoints").glob("step-*.partial")]:
            if path.name not in retained:
                shutil.rmtree(path, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


class RunStopped(SystemExit):
    """A run that stopped on request and has saved its state."""

    def __init__(self, reason: str, code: int):
        super().__init__(code)
        self.reason = reason


class GracefulStop(L.Callback):
    """Save and end the run after the micro-batch in which any process got a signal, or the time limit passed.

    Signals are SIGTERM, SIGUSR1 and Ctrl-C; a second Ctrl-C interrupts at once. Replaces Lightning's handlers.
    Processes agree through a process group on the CPU, which waits for no device.
    """

    TIME_IS_UP = 1000

    def __init__(self, checkpoints: CheckpointCallback, max_hours: float | None):
        self.checkpoints = checkpoints
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.received = 0
        self.group: dist.ProcessGroup | None = None
        # Now and not in `setup`: the first process starts the others before, and they would outlive it.
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.previous_handlers = {number: signal.signal(number, self._receive) for number in signals}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        disable_signal_handling(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_requested(trainer, lit_model(pl_module))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.group is not None or trainer.world_size == 1:
            self._stop_if_requested(trainer, lit_model(pl_module))

    def _stop_if_requested(self, trainer: L.Trainer, module: LitModel) -> None:
        reason = self.received or (self.TIME_IS_UP if time.monotonic() > self.deadline else 0)
        if trainer.world_size > 1:
            flag = torch.tensor([reason])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
            reason = int(flag)
        if not reason:
            return
        self.checkpoints.save(trainer, module)
        name = "trainer.max_hours are over" if reason == self.TIME_IS_UP else signal.Signals(reason).name
        # Rank 0's exit code stands for the run; Lightning would kill it if another rank ended with an error.
        code = 130 if reason == signal.SIGINT and trainer.is_global_zero else 0
        raise RunStopped(f"stopped after step {trainer.global_step} ({name})", code)
