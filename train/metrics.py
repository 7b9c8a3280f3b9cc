"""What a run reports while it trains."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from train.checkpoint import TrainingError
from train.device import peak_flops, synchronize
from train.lit_module import LESS, LitModel


class Metrics(L.Callback):
    """Loss, learning rate, tokens/s and the figures of `constants`, every `every` steps and at those of a checkpoint.

    Between reports nothing waits for the device. `train/seconds` is the time the run has trained, `train/cpu_seconds`,
    reported on a CPU, that of the first process' threads: over all starts, without validation, the writing of
    checkpoints, and the first step after a start, which compiles. tokens/s counts the tokens of all processes since the
    last report, by the same clock. Where the peak of the device is known, `train/mfu` is the share of it that tokens/s
    x `model/train_flops_per_token` makes up on each device: forward and backward, what is recomputed not counted.
    Raises TrainingError, before a checkpoint is saved, when the loss is not finite, or for the second report running is
    more than `max_rise` nats above the lowest one.
    """

    def __init__(
        self,
        every: int,
        checkpoint_every: int,
        max_rise: float,
        step_tokens: int,
        constants: dict[str, float],
        print_lines: bool,
    ):
        self.every, self.checkpoint_every, self.max_rise = every, checkpoint_every, max_rise
        self.step_tokens, self.constants, self.print_lines = step_tokens, constants, print_lines
        self.lowest, self.risen = math.inf, False
        self.loss: Tensor | float = 0.0
        self.lr = 0.0
        self.step = self.warm = self.reported = 0
        self.seconds = 0.0  # at the last report
        self.peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, module: LitModel) -> None:
        self.step = trainer.global_step
        self.warm = self.reported = self.step + 1
        self.seconds = module.clock.seconds
        self.peak = peak_flops(module.device, module.compute_dtype, module.config.trainer.peak_tflops)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: LitModel, optimizer: torch.optim.Optimizer) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def on_validation_start(self, trainer: L.Trainer, module: LitModel) -> None:
        synchronize(module.device)  # for the training steps that are queued
        module.clock.pause()

    def on_validation_end(self, trainer: L.Trainer, module: LitModel) -> None:
        if self.step >= self.warm:
            module.clock.go_on()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: LitModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss = self.loss + outputs["loss"]
        if trainer.global_step == self.step:  # within a step that accumulates
            return
        self.step = trainer.global_step
        loss, self.loss = self.loss, 0.0
        if self.step == trainer.max_steps:
            trainer.should_stop = True  # ends the run with a validation, wherever the last one was
        due = self.step % self.every == 0 or self.step % self.checkpoint_every == 0 or self.step == trainer.max_steps
        if due:
            self._report(trainer, module, trainer.strategy.reduce(loss, reduce_op="mean").item())
        if self.step == self.warm:
            synchronize(module.device)
            module.clock.go_on()

    def _report(self, trainer: L.Trainer, module: LitModel, loss: float) -> None:
        self._check(loss)
        metrics = {"train/loss": loss, "train/lr": self.lr, "train/tokens": float(self.step * self.step_tokens)}
        seconds = module.clock.read()
        metrics["train/seconds"] = seconds
        if module.device.type == "cpu":
            metrics["train/cpu_seconds"] = module.clock.cpu_seconds
        module.shown["loss"], line = loss, f"step {self.step}/{trainer.max_steps}  loss {loss:.4f}"
        if self.step > self.warm:
            speed = (self.step - self.reported) * self.step_tokens / (seconds - self.seconds)
            self.seconds, self.reported = seconds, self.step
            metrics["train/tokens_per_second"] = speed
            module.shown["tok/s"] = float(round(speed))
            line += f"  {speed:,.0f} tok/s"
            if self.peak is not None:
                per_device = speed / trainer.world_size
                mfu = per_device * self.constants["model/train_flops_per_token"] / self.peak
                metrics |= {"train/tokens_per_second_per_device": per_device, "train/mfu": mfu}
                line += f"  MFU {mfu:.1%}"
        for logger in trainer.loggers:
            logger.log_metrics(metrics | self.constants, step=self.step)
        if self.print_lines and trainer.is_global_zero:
            print(line, flush=True)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step}: {LESS}")
        rising = loss > self.lowest + self.max_rise
        if rising and self.risen:
            raise TrainingError(f"the loss exploded, {loss:.3f} at step {self.step} after {self.lowest:.3f}: {LESS}")
        self.lowest, self.risen = min(loss, self.lowest), rising


class Progress(RichProgressBar):
    """Lightning's bar with loss, tokens/s, last validation and time left; without what never changes."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics | pl_module.shown

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
