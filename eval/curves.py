"""Training compared: `python eval/curves.py runs/* reference=mha-tiny`. Loss against tokens, seconds and FLOPs.

Folders are runs, finished or not, or hold runs at any depth; runs that differ in nothing but the seed are one curve,
the mean of them. Prints what each takes to the reference's final loss, writes curves.png and curves.json.

The loss is that of validation where every run has four or more, interpolated linearly, and else the training loss,
smoothed. Learning rates fall towards the end of a run: one planned to end where this one passes the loss may be earlier
there. Seconds are training alone: no validation, no checkpoints, not the first step after a start, which compiles.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from arch import plan_from_dict
from data.cli import UsageError, fail, parse
from eval.cli import folders_of
from eval.pareto import RunError
from eval.results import write_result
from eval.units import count_text

CLOCKS = {"wall": "train/seconds", "cpu": "train/cpu_seconds"}
LOSSES = {"val": "validation loss", "train": "smoothed training loss"}
ENOUGH = 4  # validations, to interpolate between them
SMOOTHING = 1 / 12  # share of a whole run that the smoothed loss is about the mean of
Array = np.ndarray

# What decides a run besides its seed, and what decides how fast it is.
LEARNED = ("arch", "size", "data", "optim", "tokens", "batch_size", "init", "train_only")
EXECUTED = ("accelerator", "devices", "num_nodes", "strategy", "precision", "micro_batch", "compile", "backend")
EXECUTED += ("activation_checkpointing",)


@dataclass(frozen=True)
class CurvesConfig:
    """Options.

    reference  name of the run that the others are compared with; null: the first
    clock      wall, or cpu: CPU seconds of the process, which only runs on a CPU have
    out        folder for the files; null: the folder of the runs, or the one that contains all of them
    """

    folders: tuple[str, ...] = ()
    reference: str | None = None
    clock: str = "wall"
    out: Path | None = None


@dataclass(frozen=True)
class History:
    """What one run reported: by step the training loss as it is and smoothed, and the seconds; validations by step."""

    folder: Path
    config: dict[str, Any]
    unpredicted: int
    hardware: str
    params: int
    step_tokens: float
    flops_per_token: float
    steps: Array
    seconds: Array
    raw: Array
    train: Array
    val_steps: Array
    val: Array

    def losses(self, which: str) -> tuple[Array, Array]:
        """(steps, losses) of `val` or `train`."""
        return (self.val_steps, self.val) if which == "val" else (self.steps, self.train)

    def seconds_at(self, step: Array | float) -> Any:
        return np.interp(step, [0, *self.steps], [0.0, *self.seconds])


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but the seed. Their mean is over the steps that all of them have reported."""

    name: str
    runs: tuple[History, ...]

    def mean(self, which: str) -> tuple[Array, Array, Array, Array]:
        """(steps, mean, lowest and highest loss) of `val`, `train` or `raw`."""
        series = [(run.steps, run.raw) if which == "raw" else run.losses(which) for run in self.runs]
        steps = reduce(np.intersect1d, [steps for steps, _ in series])
        losses = np.stack([values[np.isin(of, steps)] for of, values in series])
        return steps, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)

    def axes(self, steps: Array | float) -> dict[str, Any]:
        """Tokens, seconds and training FLOPs after `steps`, the seconds on average."""
        tokens = steps * self.runs[0].step_tokens
        seconds = np.mean([run.seconds_at(steps) for run in self.runs], axis=0)
        return {"tokens": tokens, "seconds": seconds, "flops": tokens * self.runs[0].flops_per_token}

    def each(self) -> "list[Curve]":
        """Every run as a curve of its own."""
        return [Curve(self.name, (run,)) for run in self.runs]


def load_history(folder: Path, clock: str) -> History:
    """Raises RunError where the folder holds no run, or one that cannot be compared."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        plan = plan_from_dict(json.loads((folder / "plan.json").read_text()))
        hardware = json.dumps(json.loads((folder / "run.json").read_text())[-1]["hardware"])
        rows = read_rows(folder)
        train = [row for row in rows if row["train/loss"]]
        val = [row for row in rows if row.get("val/loss")]
        if len(train) < 2:
            raise RunError(f"{folder} has reported {len(train)} times so far, a curve needs 2: leave it out, or wait")
        column = CLOCKS[clock]
        if column not in train[0]:
            why = "it ran on no CPU" if clock == "cpu" else "it is of a version that logged none"
            raise RunError(f"{folder} has no {column}, {why}: leave it out, or train it again")
        steps, seconds, raw = np.array([[float(row[key]) for key in ("step", column, "train/loss")] for row in train]).T
        if not np.isfinite(seconds).all():
            raise RunError(f"{folder}: its time is not known, it began with a version that logged none; leave it out")
        known = [(float(row["step"]), float(row["val/loss"])) for row in val if float(row["step"]) <= steps[-1]]
        val_steps, losses = np.array(known).reshape(-1, 2).T
        step_tokens = float(train[-1]["train/tokens"]) / steps[-1]
        reports = config["tokens"] / step_tokens / (steps[-1] / len(steps))  # of the whole run
        return History(
            folder,
            config,
            plan.num_unpredicted,
            hardware,
            int(float(train[0]["model/params"])),
            step_tokens,
            float(train[0]["model/train_flops_per_token"]),
            steps,
            seconds,
            raw,
            smoothed(raw, SMOOTHING * reports),
            val_steps,
            losses,
        )
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no run: {error.filename} is missing") from error
    except RunError:  # a ValueError as well
        raise
    except (ValueError, KeyError, TypeError, IndexError, yaml.YAMLError) as error:
        raise RunError(f"{folder} holds no readable run: {error!r}") from error


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of all starts of a run; where a start repeats steps of the one before, its rows count."""
    rows: list[dict[str, str]] = []
    for path in sorted((folder / "metrics").glob("*/metrics.csv"), key=lambda path: int(path.parent.name)):
        with path.open(newline="") as file:
            new = [row for row in csv.DictReader(file) if row["train/loss"] or row.get("val/loss")]
        if new:
            first = min(int(row["step"]) for row in new)
            rows = [row for row in rows if int(row["step"]) < first] + new
    return rows


def smoothed(losses: Array, span: float) -> Array:
    """Exponential mean of what came so far, over about `span` of the losses."""
    keep = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    result = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1
        result.append(total / weight)
    return np.array(result)


def find_curves(folders: Sequence[Path], clock: str) -> list[Curve]:
    """All runs in and below `folders`, each once. Raises RunError where there is none."""
    found: dict[Path, History] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; give run folders, or a folder that holds runs")
        for path in sorted(folder.rglob("run.json")):
            if path.parent.resolve() not in found:
                found[path.parent.resolve()] = load_history(path.parent, clock)
    if not found:
        raise RunError(f"no run in {', '.join(map(str, folders))}: a run writes run.json when it starts")
    groups: dict[str, list[History]] = {}
    for run in found.values():
        decides = [run.config["name"], *(run.config[key] for key in LEARNED)]
        text = json.dumps([*decides, *(run.config["trainer"][key] for key in EXECUTED)], sort_keys=True)
        groups.setdefault(hashlib.sha256(text.encode()).hexdigest(), []).append(run)
    names = [group[0].config["name"] for group in groups.values()]
    return [
        Curve(name if names.count(name) == 1 else f"{name} ({key[:4]})", tuple(group))
        for (key, group), name in zip(groups.items(), names, strict=True)
    ]


def differing(curves: Sequence[Curve]) -> list[str]:
    """What is not the same in all runs and should be, for their losses and times to be compared."""
    runs = [run for curve in curves for run in curve.runs]
    values = {
        "data": [run.config["data"] for run in runs],
        "tokens": [run.config["tokens"] for run in runs],
        "batch_size": [run.config["batch_size"] for run in runs],
        "size.seq_len": [run.config["size"]["seq_len"] for run in runs],
        "the positions that are predicted (arch.block.start=true predicts all)": [run.unpredicted for run in runs],
        "hardware": [run.hardware for run in runs],
        "how they were executed (trainer)": [[run.config["trainer"][key] for key in EXECUTED] for run in runs],
    }
    found = [name for name, of in values.items() if any(value != of[0] for value in of)]
    params = [run.params for run in runs]
    return found + ["parameters, by more than 2 %"] * (max(params) > 1.02 * min(params))


def crossing(steps: Array, losses: Array, target: float) -> float | None:
    """The step at which the loss first is `target`, linear between measurements; None: not reached.

    The first measurement where that is already below: what came before it is not known.
    """
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    now = int(below[0])
    if now == 0:
        return float(steps[0])
    share = (losses[now - 1] - target) / (losses[now - 1] - losses[now])
    return float(steps[now - 1] + share * (steps[now] - steps[now - 1]))


def compare(curves: Sequence[Curve], reference: Curve, clock: str) -> dict[str, Any]:
    """What each curve takes to the reference's final loss, and how much that is of what the reference takes.

    `by_seed` has the ratio of seconds for each seed that both have: to the final loss of the reference's own seed.
    """
    which = "val" if min(len(curve.mean("val")[0]) for curve in curves) >= ENOUGH else "train"
    ends, losses, _, _ = reference.mean(which)
    target, whole = float(losses[-1]), reference.axes(float(ends[-1]))
    seeds = {run.config["seed"]: run for run in reference.runs}
    rows = []
    for curve in curves:
        steps, losses, lowest, highest = curve.mean(which)
        reached = crossing(steps, losses, target)
        at = None if reached is None else {key: float(value) for key, value in curve.axes(reached).items()}
        end = curve.axes(float(steps[-1]))
        ratios = [_ratio(run, seeds[run.config["seed"]], which) for run in curve.runs if run.config["seed"] in seeds]
        rows.append(
            {
                "name": curve.name,
                "seeds": sorted(run.config["seed"] for run in curve.runs),
                "params": curve.runs[0].params,
                "flops_per_token": curve.runs[0].flops_per_token,
                "tokens": end["tokens"],
                "seconds": float(end["seconds"]),
                "tokens_per_second": float(end["tokens"] / end["seconds"]),
                "loss": float(losses[-1]),
                "lowest": float(lowest[-1]),
                "highest": float(highest[-1]),
                "to_target": at,
                "relative": None if at is None else {key: value / float(whole[key]) for key, value in at.items()},
                "seconds_by_seed": ratios if curve is not reference else [],
                "series": {key: _series(curve, key) for key in ("val", "train")},
            }
        )
    result = {"reference": reference.name, "loss": LOSSES[which], "which": which, "clock": clock, "target": target}
    return result | {"curves": rows}


def _ratio(run: History, reference: History, which: str) -> float | None:
    """Seconds of `run` to the final loss of `reference`, over those of `reference` to it."""
    steps, losses = reference.losses(which)
    reached = crossing(*run.losses(which), float(losses[-1]))
    return None if reached is None else float(run.seconds_at(reached) / reference.seconds_at(steps[-1]))


def _series(curve: Curve, which: str) -> dict[str, list[float]]:
    steps, losses, lowest, highest = curve.mean(which)
    values = {**curve.axes(steps), "loss": losses, "lowest": lowest, "highest": highest}
    return {key: [float(f"{value:.6g}") for value in of] for key, of in values.items()}


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"To the final {result['loss']} of {result['reference']}, {result['target']:.4f}", title_justify="left"
    )
    shown.add_column("run", style="bold")
    unit = "CPU s" if result["clock"] == "cpu" else "s"
    columns = ("runs", "params", "FLOPs/token", f"tokens/{unit}", "final loss", "spread")
    for column in (*columns, "tokens to it", "FLOPs to it", f"{unit} to it", "of reference", "by seed"):
        shown.add_column(column, justify="right")
    for row in result["curves"]:
        at, ratios = row["to_target"], row["seconds_by_seed"]
        reached = ["not reached", "", "", ""]
        if at is not None:
            reached = [count_text(at["tokens"]), f"{at['flops']:.3g}", f"{at['seconds']:,.0f}"]
            reached.append(f"{row['relative']['seconds']:.2f}")
        shown.add_row(
            row["name"],
            str(len(row["seeds"])),
            count_text(row["params"]),
            count_text(row["flops_per_token"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['loss']:.4f}",
            f"{row['highest'] - row['lowest']:.4f}" if len(row["seeds"]) > 1 else "-",
            *reached,
            ", ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios) if len(ratios) > 1 else "",
        )
    return shown


def main(arguments: Sequence[str]) -> None:
    options = parse(CurvesConfig, arguments, positional="folders")
    if options.clock not in CLOCKS:
        raise UsageError(f"clock is {options.clock}; choose {', '.join(CLOCKS)}")
    folders = folders_of(options.folders)
    curves = find_curves(folders, options.clock)
    by_name = {curve.name: curve for curve in curves}
    if options.reference and options.reference not in by_name:
        raise UsageError(f"reference is {options.reference}; the runs are {', '.join(by_name)}")
    reference = by_name[options.reference or curves[0].name]
    curves = [reference, *(curve for curve in curves if curve is not reference)]
    result = compare(curves, reference, options.clock)
    Console(width=None if sys.stdout.isatty() else 160).print(table(result))
    if others := differing(curves):
        print(f"warning: the runs differ in {', '.join(others)}: judge by that", file=sys.stderr)
    out = options.out or Path(os.path.commonpath([folder.absolute() for folder in folders]))
    try:
        write(curves, result, out)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}); give another folder with out=") from error


def write(curves: Sequence[Curve], result: dict[str, Any], out: Path) -> None:
    """curves.png and curves.json in `out`. Raises OSError where that cannot be written."""
    from eval.plots.curves import draw_curves

    out.mkdir(parents=True, exist_ok=True)
    write_result(out / "curves.json", result)
    draw_curves(curves, result, out / "curves.png")
    for name in ("curves.png", "curves.json"):
        print(out / name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        fail(str(error))
