"""Callbacks that save, restore and stop a run."""

import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from data.files import DataError, set_aside, write_json
from eval.runs import Best, Run, RunError
from train import checkpoint
from train.errors import TrainingError
from train.lightning_private import disable_signal_handling, set_loop_step
from train.lit_module import LitModel, lit_model
from train.signals import RunStopped, Signals


class CheckpointCallback(L.Callback):
    """Save every `every` steps, at the best validation so far and at the end; keep the newest `keep` and the best.

    With `minutes`, save at the first step after that many minutes since the last save, instead of every `every` steps.
    With `in_background`, write while training continues; a checkpoint waits for the one before, and the end of the run
    for the last.

    Before training, restore the state of `start`, a checkpoint of this run, or else the weights of `init`, a run or a
    checkpoint. Rank 0's `run` and `start` are broadcast: other ranks may have chosen another timestamped folder.
    """

    def __init__(
        self,
        run: Path,
        every: int,
        keep: int,
        start: Path | None,
        init: Path | None,
        minutes: float | None = None,
        in_background: bool = False,
    ):
        self.run, self.every, self.minutes, self.keep = run, every, minutes, keep
        self.start, self.init = start, init
        self.in_background = in_background
        self.copies: dict[str, Tensor] = {}
        self.group: dist.ProcessGroup | None = None
        self.writing: checkpoint.BackgroundSave | None = None
        self.best = math.inf
        self.new_best: dict[str, Any] | None = None  # for best.json, once its checkpoint is written
        self.step = 0  # of the newest checkpoint, which may still be written
        self.saved_at = time.monotonic()
        self.timed_step = 0  # at which a checkpoint is due by the clock, as all processes have agreed
        self.broken: set[str] = set()  # names of checkpoints that were found so; they count as none
        self.loaded = False  # nothing that was read is in doubt any more

    @property
    def best_file(self) -> Path:
        return self.run / "checkpoints" / "best.json"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.run, self.start = trainer.strategy.broadcast((self.run, self.start))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        if self.in_background and trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")
        if self.start is not None:
            checkpoint.load(self.start, module.model, trainer.optimizers[0])
            self.step = checkpoint.step_of(self.start)
            set_loop_step(trainer, self.step)
            info = checkpoint.load_info(self.start)
            module.clock.load(info.get("clock"))
            module.loss_watch.lowest = info.get("lowest_loss") or math.inf
            saved = checkpoint.checkpoints(self.run)
            self.broken = {path.name for path in saved[: saved.index(self.start)]}
            best = self.read_best() if trainer.is_global_zero else None
            _, self.best = trainer.strategy.broadcast(best) or ("", math.inf)
        elif self.init is not None:
            checkpoint.load(checkpoint.resolve(self.init), module.model)
        self.loaded = True
        self.saved_at = time.monotonic()

    def read_best(self) -> Best | None:
        """Name and validation loss of the best checkpoint; None if there is none that is not broken.

        A damaged best.json is renamed, with a warning.
        """
        try:
            best = Run(self.run).best
        except RunError as error:
            aside = set_aside(self.best_file)
            print(f"{self.best_file} is damaged ({error}); it is now {aside.name}", file=sys.stderr)
            return None
        if best is None or best.checkpoint in self.broken:
            return None
        return best if self.best_file.with_name(best.checkpoint) in checkpoint.checkpoints(self.run) else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.writing is not None and self.writing.ended and not self.writing.failed:
            self.finish(trainer)
        if not self.due(trainer.global_step):
            return
        module = lit_model(pl_module)
        if not module.loss_watch.risen:  # else the next report says whether it exploded
            self.save(trainer, module)

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is due at the end of `step`; the same in all processes."""
        return step % self.every == 0 if self.minutes is None else step == self.timed_step

    def time_is_up(self) -> bool:
        """Tell whether a checkpoint is due by the clock of this process."""
        return self.minutes is not None and time.monotonic() - self.saved_at > 60 * self.minutes

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        if module.val_metrics["loss"] < self.best:
            self.best = module.val_metrics["loss"]
            self.save(trainer, module)
            self.new_best = {"checkpoint": checkpoint.folder_name(self.step), "val_loss": self.best}
            if self.writing is None:
                self._written(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, lit_model(pl_module))
        self.finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the training so far if the data fails. With several processes the others would wait for this one.

        Another failure waits for the checkpoint that is being written; a run that is stopped twice does not.
        """
        if isinstance(exception, DataError) and trainer.world_size == 1 and trainer.global_step:
            self.save(trainer, lit_model(pl_module))
            self.finish(trainer)
        elif not isinstance(exception, RunStopped):
            try:
                self.finish(trainer)
            except (TrainingError, RuntimeError) as error:  # the latter where another process has ended
                print(f"warning: {error}", file=sys.stderr)

    def save(self, trainer: L.Trainer, module: LitModel) -> None:
        """Save the state after the last whole step, unless it is saved already.

        Raises TrainingError if this or the checkpoint before cannot be written.
        """
        step = trainer.global_step
        if step == self.step:
            return
        module.check_finite()  # waits for the device
        folder = self.run / "checkpoints" / checkpoint.folder_name(step)
        with module.clock.paused():
            self.finish(trainer)
            lowest = module.loss_watch.lowest
            info = module.describe() | {
                "clock": module.clock.to_dict(),
                "lowest_loss": lowest if math.isfinite(lowest) else None,
            }
            state = folder, module.model, trainer.optimizers[0], step, info
            if self.in_background:
                self.writing = checkpoint.BackgroundSave(*state, self.copies, self.group)
            else:
                checkpoint.save(*state)
            self.step, self.saved_at = step, time.monotonic()
            if self.writing is None:
                self._written(trainer)

    def finish(self, trainer: L.Trainer) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises TrainingError if it cannot be."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.wait()
            self._written(trainer)

    def _written(self, trainer: L.Trainer) -> None:
        """After a checkpoint: write best.json if the best one has changed, and delete those that are not kept."""
        if trainer.is_global_zero:
            if self.new_best is not None:
                write_json(self.best_file, self.new_best)
            self.prune()
        self.new_best = None

    def prune(self) -> None:
        """Delete all but the newest `keep` checkpoints and the best; those that are broken count as none.

        A folder that cannot be deleted, because another program reads it, is tried again with the next checkpoint.
        """
        saved = checkpoint.checkpoints(self.run)
        self.broken.discard(checkpoint.folder_name(self.step))
        retained = {path.name for path in [path for path in saved if path.name not in self.broken][: self.keep]}
        best = self.read_best()
        if best is not None:
            retained.add(best.checkpoint)
        for path in saved:
            if path.name not in retained:
                checkpoint.delete(path)
        for path in (self.run / "checkpoints").glob("step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)


class GracefulStop(L.Callback):
    """Save and end the run after the step in which any process got a signal or the time limit passed; a single process
    does so after the micro-batch.

    Signals are those of train/signals.py. Processes agree once per step, and in each batch of a validation, through a
    process group on the CPU, which waits for no device. They also agree whether a checkpoint is due by rank 0's clock,
    and whether one could not be written in the background, which ends the run.
    """

    TIME_IS_UP, NOT_SAVED = 1000, 1001

    def __init__(self, checkpoints: CheckpointCallback, signals: Signals, max_hours: float | None):
        self.checkpoints, self.signals = checkpoints, signals
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.group: dist.ProcessGroup | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        disable_signal_handling(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")
        self.signals.start_training()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.training = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.signals.training = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ended or trainer.world_size == 1:
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
        reason = self.signals.received or (self.TIME_IS_UP if time.monotonic() > self.deadline else 0)
        due = int(trainer.is_global_zero and self.checkpoints.time_is_up())
        if self.checkpoints.writing is not None and self.checkpoints.writing.failed:
            reason = self.NOT_SAVED
        if trainer.world_size > 1:
            flags = torch.tensor([reason, due])
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
            reason, due = flags.tolist()
        if reason == self.NOT_SAVED:
            self.checkpoints.finish(trainer)
            raise TrainingError("another process could not write a checkpoint")
        if due:
            self.checkpoints.timed_step = trainer.global_step + 1
        if not reason:
            return
        self.checkpoints.save(trainer, module)
        self.checkpoints.finish(trainer)
        name = "trainer.max_hours are over" if reason == self.TIME_IS_UP else signal.Signals(reason).name
        # Rank 0's exit code stands for the run; Lightning would kill it if another rank ended with an error.
        code = 130 if reason == signal.SIGINT and trainer.is_global_zero else 0
        raise RunStopped(f"stopped after step {trainer.global_step} ({name})", code)
