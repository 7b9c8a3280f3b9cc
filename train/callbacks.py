"""What a run keeps, and how it stops."""

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
from train.lit_module import LitModel


class Checkpoints(L.Callback):
    """Saves every `every` steps, where validation is best so far, and at the end; keeps the newest `keep` and the best.

    Also restores: from `start`, a checkpoint of this run, when training begins. `run` and `start` of the first process
    count for all: the others may have made up another folder, by their clock.
    """

    def __init__(self, run: Path, every: int, keep: int, start: Path | None):
        self.run, self.every, self.keep, self.start = run, every, keep, start
        self.best = math.inf
        self.step = 0

    @property
    def best_file(self) -> Path:
        return self.run / "checkpoints" / "best.json"

    def setup(self, trainer: L.Trainer, module: LitModel, stage: str) -> None:
        self.run, self.start = trainer.strategy.broadcast((self.run, self.start))
        module.config.folder = str(self.run)

    def on_fit_start(self, trainer: L.Trainer, module: LitModel) -> None:
        if self.start is None:
            return
        checkpoint.load(self.start, module.model, trainer.optimizers[0])
        self.step = checkpoint.step_of(self.start)
        module.go_on_after(self.step)
        module.clock.load(checkpoint.load_info(self.start).get("clock"))
        if self.best_file.is_file():
            best = json.loads(self.best_file.read_text())
            if best["checkpoint"] <= self.start.name:  # or it was one of the broken ones
                self.best = best["val_loss"]

    def on_train_batch_end(
        self, trainer: L.Trainer, module: LitModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: LitModel) -> None:
        if module.last_val["loss"] < self.best:
            self.best = module.last_val["loss"]
            self.save(trainer, module)
            if trainer.is_global_zero:
                write_json(self.best_file, {"checkpoint": folder_name(self.step), "val_loss": self.best})

    def on_train_end(self, trainer: L.Trainer, module: LitModel) -> None:
        self.save(trainer, module)

    def on_exception(self, trainer: L.Trainer, module: LitModel, exception: BaseException) -> None:
        """What stops one process cannot be saved by several; alone, nothing need be lost."""
        if isinstance(exception, DataError) and trainer.world_size == 1 and trainer.global_step:
            self.save(trainer, module)

    def save(self, trainer: L.Trainer, module: LitModel) -> None:
        """The state after the last whole step, unless it is saved already."""
        step = trainer.global_step
        if step == self.step:
            return
        module.check_finite()  # waits for the device
        folder = self.run / "checkpoints" / folder_name(step)
        with module.clock.paused():
            about = module.describe() | {"clock": module.clock.to_dict()}
            checkpoint.save(folder, module.model, trainer.optimizers[0], step, about)
            self.step = step
            if trainer.is_global_zero:
                self.prune()

    def prune(self) -> None:
        """Delete what is not kept: checkpoints after this step too, which were broken when the run was resumed.

        What cannot be deleted, because another program reads it, is tried again with the next checkpoint.
        """
        saved = checkpoint.checkpoints(self.run)
        kept = {path.name for path in [path for path in saved if checkpoint.step_of(path) <= self.step][: self.keep]}
        if self.best_file.is_file():
            kept.add(json.loads(self.best_file.read_text())["checkpoint"])
        for path in [*saved, *(self.run / "checkpoints").glob("step-*.partial")]:
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state."""

    def __init__(self, reason: str, code: int):
        super().__init__(code)
        self.reason = reason


class Stop(L.Callback):
    """Saves and ends the run after the micro-batch in which a signal came to any process, or the time was up.

    Signals are SIGTERM, SIGUSR1 and Ctrl-C; a second Ctrl-C interrupts at once. Replaces Lightning's handlers, which
    broadcast inside the handler (and hang where a process other than the first is hit) and wait for the device in every
    micro-batch. Processes agree through a process group on the CPU, which waits for no device.
    """

    TIME_IS_UP = 1000

    def __init__(self, checkpoints: Checkpoints, max_hours: float | None):
        self.checkpoints = checkpoints
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.received = 0
        self.group: dist.ProcessGroup | None = None
        # From now on, because the first process starts the others before `setup`, and they would outlive it.
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self._receive) for number in signals}

    def setup(self, trainer: L.Trainer, module: LitModel, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_start(self, trainer: L.Trainer, module: LitModel) -> None:
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def teardown(self, trainer: L.Trainer, module: LitModel, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: L.Trainer, module: LitModel, *_: Any) -> None:
        self._stop_if_asked(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: LitModel, *_: Any) -> None:
        if self.group is not None or trainer.world_size == 1:
            self._stop_if_asked(trainer, module)

    def _stop_if_asked(self, trainer: L.Trainer, module: LitModel) -> None:
        asked = self.received or (self.TIME_IS_UP if time.monotonic() > self.deadline else 0)
        if trainer.world_size > 1:
            flag = torch.tensor([asked])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
            asked = int(flag)
        if not asked:
            return
        self.checkpoints.save(trainer, module)
        reason = "trainer.max_hours are over" if asked == self.TIME_IS_UP else signal.Signals(asked).name
        # The first process speaks for all; where another ended with an error, Lightning would kill it.
        code = 130 if asked == signal.SIGINT and trainer.is_global_zero else 0
        raise Stopped(f"stopped after step {trainer.global_step} ({reason})", code)
