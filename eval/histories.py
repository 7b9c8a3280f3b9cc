"""Training curves of runs: their losses and times as arrays, and the mean over seeds."""

import json
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.cli import word
from eval.checks import check_config
from eval.runs import Run, RunError
from eval.units import times

Array = npt.NDArray[np.float64]

CLOCKS = {"wall": "train/seconds", "cpu": "train/cpu_seconds"}
SMOOTHING = 1 / 12  # fraction of a whole run that the smoothed loss averages over


@dataclass(frozen=True)
class History:
    """The course of one run, finished or not.

    last_step                   step at which the run ends
    steps, seconds, raw, train  by report: training time without validation, training loss as measured and smoothed
    val_steps, val              by validation
    """

    run: Run
    seed: int
    num_unpredicted: int
    hardware: str
    last_step: int
    params: int
    step_tokens: float
    flops_per_token: float
    steps: Array
    seconds: Array
    raw: Array
    train: Array
    val_steps: Array
    val: Array

    @property
    def ended(self) -> bool:
        """True once the last step has been reported."""
        return bool(self.steps[-1] >= self.last_step)

    def losses(self, series: str) -> tuple[Array, Array]:
        """(steps, losses) of `val`, `train` or `raw`."""
        if series == "val":
            return self.val_steps, self.val
        return self.steps, {"train": self.train, "raw": self.raw}[series]

    def seconds_at(self, step: Array | float) -> Any:
        """Seconds of training up to `step`, linear between reports."""
        return np.interp(step, [0, *self.steps], [0.0, *self.seconds])


def load_history(run: Run, clock: str) -> History:
    """Read the metrics of a run, with seconds of `clock`. Raises RunError if they cannot make a curve."""
    config = run.config
    try:
        check_config(config)
    except ValueError as error:
        raise RunError(f"{run.folder} holds no readable run: config.yaml: {error}") from error
    try:
        plan, rows = run.plan, run.metrics
        train = [row for row in rows if row.get("train/loss")]
        if len(train) < 2:
            count = f"has reported {times(len(train))} so far, a curve needs 2"
            raise RunError(f"{run.folder} {count}: leave it out, wait while it runs, or {word('resume', run.folder)}")
        column = CLOCKS[clock]
        if column not in train[0]:
            why = "it ran on no CPU" if clock == "cpu" else "it is of a version that logged none"
            raise RunError(f"{run.folder} has no {column}, {why}: leave it out, or train it again")
        steps, seconds, raw = np.array([[float(row[key]) for key in ("step", column, "train/loss")] for row in train]).T
        if not np.isfinite(seconds).all():
            raise RunError(
                f"{run.folder}: its time is not known, it began with a version that logged none; leave it out"
            )
        check_finite(run, steps, raw, "training loss")
        val = [(float(row["step"]), float(row["val/loss"])) for row in rows if row.get("val/loss")]
        val_steps, val_losses = np.array([row for row in val if row[0] <= steps[-1]]).reshape(-1, 2).T
        check_finite(run, val_steps, val_losses, "validation loss")
        for of, least in ((steps, 1.0), (val_steps, 0.0)):
            if len(of) and (of[0] < least or (np.diff(of) <= 0).any()):
                raise RunError(f"{run.folder}: its steps do not rise in metrics.csv; leave it out")
        if seconds[0] < 0 or seconds[-1] <= 0 or (np.diff(seconds) < 0).any():
            raise RunError(f"{run.folder}: its time does not rise in metrics.csv; leave it out")
        step_tokens = float(train[-1]["train/tokens"]) / steps[-1]
        num_reports = run.config["tokens"] / step_tokens / (steps[-1] / len(steps))  # of the whole run
        return History(
            run,
            seed=run.config["seed"],
            num_unpredicted=plan.num_unpredicted,
            hardware=json.dumps(run.starts[-1]["hardware"]),
            last_step=run.config["tokens"] // round(step_tokens),
            params=int(float(train[0]["model/params"])),
            step_tokens=step_tokens,
            flops_per_token=float(train[0]["model/train_flops_per_token"]),
            steps=steps,
            seconds=seconds,
            raw=raw,
            train=ema(raw, SMOOTHING * num_reports),
            val_steps=val_steps,
            val=val_losses,
        )
    except RunError:  # a ValueError as well
        raise
    except (ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise RunError(f"{run.folder} holds no readable run: {error!r}") from error


def check_finite(run: Run, steps: Array, losses: Array, what: str) -> None:
    """Raise RunError, naming the step, if a loss is not a finite number."""
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        raise RunError(f"{run.folder}: its {what} is {losses[wrong[0]]} at step {steps[wrong[0]]:.0f}; leave it out")


def ema(losses: Array, span: float) -> Array:
    """Exponential moving average over about `span` of the losses, without bias towards the first."""
    decay = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    averages = []
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        averages.append(total / weight)
    return np.array(averages)


class Band(NamedTuple):
    """Losses at `steps`: the mean over seeds, the lowest and the highest."""

    steps: Array
    mean: Array
    lowest: Array
    highest: Array


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but the seed. Their mean is over the steps that all of them have reported."""

    name: str
    runs: tuple[History, ...]

    def mean(self, series: str) -> Band:
        """The losses of `val`, `train` or `raw`: of `val` none before a common validation. Raises RunError if there are
        none of the others."""
        losses = [run.losses(series) for run in self.runs]
        steps = reduce(np.intersect1d, [steps for steps, _ in losses])
        if not len(steps) and series != "val":
            folders = ", ".join(str(run.run.folder) for run in self.runs)
            raise RunError(
                f"{folders}: seeds of one configuration that report no loss at the same step; leave some out"
            )
        common = np.stack([values[np.isin(of, steps)] for of, values in losses])
        return Band(steps, common.mean(axis=0), common.min(axis=0), common.max(axis=0))

    def axes(self, steps: Array | float) -> dict[str, Any]:
        """Tokens, seconds and training FLOPs after `steps`, the seconds on average."""
        tokens = steps * self.step_tokens
        seconds = np.mean([run.seconds_at(steps) for run in self.runs], axis=0)
        return {"tokens": tokens, "seconds": seconds, "flops": tokens * self.runs[0].flops_per_token}

    @property
    def ended(self) -> bool:
        """True once all of its runs have ended."""
        return all(run.ended for run in self.runs)

    @property
    def step_tokens(self) -> float:
        """Tokens of a step."""
        return self.runs[0].step_tokens

    def by_seed(self) -> "list[Curve]":
        """Each run as a curve of its own."""
        return [Curve(self.name, (run,)) for run in self.runs]
