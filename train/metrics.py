"""Metrics of a run while it trains."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from eval.units import duration_text
from train.device import peak_flops, synchronize
from train.lightning_private import TrainingProgressBar
from train.lit_module import LitModel, lit_model


class Metrics(L.Callback):
    """Report loss, learning rate, tokens/s and `static_metrics` every `every` steps, and whenever a checkpoint is due.

    Nothing waits for the device between reports.

    train/seconds            training time over all starts, without validation, checkpoints, and the first step after
                             each start, which compiles; NaN where that of an earlier start is not known
    train/cpu_seconds        CPU time of rank 0's threads over the same spans; reported on a CPU only
    train/tokens_per_second  of all processes, since the last report, by the same clock
    train/mfu                tokens/s per device x `model/train_flops_per_token`, as a fraction of the device's peak if
                             that is known; recomputed activations are not counted

    Raises TrainingError, before a checkpoint is saved, when the loss is not finite, or exceeds its minimum by more than
    `trainer.max_rise` nats in two consecutive reports.
    """

    def __init__(
        self,
        every: int,
        checkpoint_due: Callable[[int], bool],
        step_tokens: int,
        static_metrics: dict[str, float],
        print_reports: bool,
        print_validations: bool,
    ):
        self.every, self.checkpoint_due = every, checkpoint_due
        self.step_tokens, self.static_metrics = step_tokens, static_metrics
        self.print_reports, self.print_validations = print_reports, print_validations
        self.loss: Tensor | float = 0.0
        self.lr = 0.0
        self.step = self.warm = self.reported = 0
        self.seconds = 0.0  # of this start of the run, at the last report
        self.peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        self.step = trainer.global_step
        self.warm = self.reported = self.step + 1
        self.seconds = module.clock.read()
        self.peak = peak_flops(module.device, module.compute_dtype, module.config.trainer.peak_tflops)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        synchronize(module.device)  # for the training steps that are queued
        module.clock.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = lit_model(pl_module)
        if self.step >= self.warm:
            module.clock.resume()
        self.announce_validation(trainer, module)

    def announce_validation(self, trainer: L.Trainer, module: LitModel) -> None:
        """Print the result of a validation, unless a bar shows it."""
        if self.print_validations and trainer.is_global_zero:
            loss, perplexity = module.val_metrics["loss"], module.val_metrics["ppl"]
            print(f"{self._place(trainer)}  validation loss {loss:.4f}  perplexity {perplexity:.3f}", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = lit_model(pl_module)
        self.loss = self.loss + outputs["loss"]
        if trainer.global_step == self.step:  # within a step that accumulates
            return
        self.step = trainer.global_step
        loss, self.loss = self.loss, 0.0
        if self.step == trainer.max_steps:
            trainer.should_stop = True  # ends the run with a validation, wherever the last one was
        if self.step % self.every == 0 or self.checkpoint_due(self.step) or self.step == trainer.max_steps:
            self._report(trainer, module, trainer.strategy.reduce(loss, reduce_op="mean").item())
        if self.step == self.warm:
            synchronize(module.device)
            module.clock.resume()

    def _report(self, trainer: L.Trainer, module: LitModel, loss: float) -> None:
        module.loss_watch.see(loss, self.step)
        metrics = {"train/loss": loss, "train/lr": self.lr, "train/tokens": float(self.step * self.step_tokens)}
        seconds = module.clock.read()
        metrics["train/seconds"] = module.clock.seconds
        if module.device.type == "cpu":
            metrics["train/cpu_seconds"] = module.clock.cpu_seconds
        module.progress_metrics["loss"] = loss
        line, speed = f"{self._place(trainer)}  loss {loss:.4f}", 0.0
        if self.step > self.warm:
            speed = (self.step - self.reported) * self.step_tokens / (seconds - self.seconds)
            self.seconds, self.reported = seconds, self.step
            metrics["train/tokens_per_second"] = speed
            module.progress_metrics["tok/s"] = float(round(speed))
            line += f"  {speed:,.0f} tok/s"
            if self.peak is not None:
                per_device = speed / trainer.world_size
                mfu = per_device * self.static_metrics["model/train_flops_per_token"] / self.peak
                metrics |= {"train/tokens_per_second_per_device": per_device, "train/mfu": mfu}
                line += f"  MFU {mfu:.1%}"
        for logger in trainer.loggers:
            logger.log_metrics(metrics | self.static_metrics, step=self.step)
        if self.print_reports and trainer.is_global_zero:
            left = (trainer.max_steps - self.step) * self.step_tokens
            print(f"{line}  {duration_text(left / speed)} left" if left and speed > 0 else line, flush=True)

    def _place(self, trainer: L.Trainer) -> str:
        return f"step {trainer.global_step}/{trainer.max_steps}"


class ProgressBar(TrainingProgressBar):
    """Loss, tokens/s, last validation and time left."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics | lit_model(pl_module).progress_metrics
