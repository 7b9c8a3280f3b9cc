"""Run folders: read and find them, group them by seed, and list what differs between them.

A run folder has config.yaml, plan.json, run.json (one record per start) and metrics/<start>/metrics.csv, and
summary.json once its training has ended. train/run.py writes them.
"""

import csv
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from arch import Plan, plan_from_dict
from data.cli import UsageError

T = TypeVar("T")
Array = npt.NDArray[np.float64]

CLOCKS = {"wall": "train/seconds", "cpu": "train/cpu_seconds"}
SUMMARY_KEYS = {"name", "seed", "seq_len", "experiment", "val", "params", "tokens"}
SMOOTHING = 1 / 12  # fraction of a whole run that the smoothed loss averages over


class Key(NamedTuple):
    """The part of one key (or group of keys) of train/schema.py in a run.

    decides  result: what is learned. speed: how fast, and rounding. seed: which repetition. None: names, reports, files
    fixed    a resumed run cannot change it
    """

    decides: str | None
    fixed: bool = False


# Every key of a run's configuration. A key under a group that is listed as a whole is listed only where it differs.
KEYS = {
    "arch": Key("result", fixed=True),
    "size": Key("result", fixed=True),
    "data": Key("result", fixed=True),
    "optim": Key("result"),
    "optim.name": Key("result", fixed=True),
    "tokens": Key("result"),
    "batch_size": Key("result", fixed=True),
    "seed": Key("seed", fixed=True),
    "init": Key("result", fixed=True),
    "train_only": Key("result", fixed=True),
    "name": Key(None, fixed=True),
    "folder": Key(None, fixed=True),
    "resume": Key(None),
    "context": Key(None),
    "kv_itemsize": Key(None),
    "logger": Key(None),
    "trainer.accelerator": Key("speed"),
    "trainer.devices": Key("speed"),
    "trainer.num_nodes": Key("speed"),
    "trainer.strategy": Key("speed"),
    "trainer.precision": Key("speed"),
    "trainer.micro_batch": Key("speed"),
    "trainer.compile": Key("speed"),
    "trainer.backend": Key("speed"),
    "trainer.activation_checkpointing": Key("speed"),
    "trainer.log_every": Key(None),
    "trainer.val_every": Key(None),
    "trainer.checkpoint_every": Key(None),
    "trainer.keep_checkpoints": Key(None),
    "trainer.max_rise": Key(None),
    "trainer.max_hours": Key(None),
    "trainer.peak_tflops": Key(None),
    "trainer.progress": Key(None),
}


def deciding_values(config: Mapping[str, Any], decides: str) -> dict[str, Any]:
    """The values in `config` (nested) of the keys that decide `decides`, groups as wholes.

    A key that an earlier version did not have is None.
    """
    keys = [key for key, value in KEYS.items() if value.decides == decides and key.rpartition(".")[0] not in KEYS]
    return {key: _lookup(config, key) for key in keys}


def _lookup(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


class RunError(UsageError):
    """A folder that holds no usable run; the message says why."""


@dataclass(frozen=True)
class Run:
    """A run folder. Files are read on first use; RunError where one is missing or is not what a run writes."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml, not typed: an earlier version may have written it."""
        config: dict[str, Any] = self._read("config.yaml", yaml.safe_load, dict)
        return config

    @cached_property
    def plan(self) -> Plan:
        plan: Plan = self._read("plan.json", lambda text: plan_from_dict(json.loads(text)), object)
        return plan

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """run.json: the environment record of every start."""
        starts: list[dict[str, Any]] = self._read("run.json", json.loads, list)
        return starts

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json, with at least SUMMARY_KEYS."""
        if not self.finished:
            raise RunError(f"{self.folder} holds no finished run: {self.folder / 'summary.json'} is missing")
        summary: dict[str, Any] = self._read("summary.json", json.loads, dict)
        if missing := SUMMARY_KEYS - set(summary):
            raise RunError(f"{self.folder}/summary.json lacks {', '.join(sorted(missing))}")
        return summary

    @cached_property
    def metrics(self) -> list[dict[str, str]]:
        """The rows of all starts that have a loss; where a start repeats steps of the one before, its rows count."""
        rows: list[dict[str, str]] = []
        for path in sorted((self.folder / "metrics").glob("*/metrics.csv"), key=lambda path: int(path.parent.name)):
            with path.open(newline="") as file:
                new = [row for row in csv.DictReader(file) if row["train/loss"] or row.get("val/loss")]
            if new:
                first = min(int(row["step"]) for row in new)
                rows = [row for row in rows if int(row["step"]) < first] + new
        return rows

    def _read(self, name: str, parse: Callable[[str], Any], kind: type) -> Any:
        try:
            value = parse((self.folder / name).read_text())
        except FileNotFoundError as error:
            raise RunError(f"{self.folder} holds no run: {error.filename} is missing") from error
        except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise RunError(f"{self.folder} holds no readable run: {name}: {error!r}") from error
        if not isinstance(value, kind):
            raise RunError(f"{self.folder} holds no readable run: {name} has no {kind.__name__}")
        return value


def folders_of(patterns: Sequence[str]) -> list[Path]:
    """The folders that `patterns` (paths or globs) name. Files are skipped: `runs/*` also matches our own pictures.

    Raises UsageError where there is none.
    """
    paths = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
    folders = [path for path in paths if not path.is_file()]
    if not folders:
        raise UsageError("no folder is given; give run folders, or a folder that holds runs")
    return folders


def finished_run(folder: Path) -> Run:
    """The run in `folder`. Raises RunError unless it has a readable summary and plan."""
    run = Run(folder)
    assert run.summary and run.plan  # reads them
    return run


def find_runs(folders: Sequence[Path], *, finished: bool) -> list[Run]:
    """The runs in and below `folders`, each once; all that have started, or only the finished ones.

    Raises RunError where there is none, and where a finished one is not readable.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; give run folders, or a folder that holds runs")
        for path in sorted(folder.rglob("summary.json" if finished else "run.json")):
            load = finished_run if finished else Run
            found.setdefault(path.parent.resolve(), load(path.parent))
    if not found:
        names = ", ".join(map(str, folders))
        if finished:
            raise RunError(f"no finished run in {names}: a run writes summary.json when its training ends")
        raise RunError(f"no run in {names}: a run writes run.json when it starts")
    return list(found.values())


def group_by_seed(runs: Iterable[T], identity: Callable[[T], Sequence[Any]]) -> dict[str, list[T]]:
    """Group runs of equal `identity`: JSON values, the name first, all that decides a run but its seed.

    The key is the name, with a digest of the identity where several groups have the name. A null in a mapping counts as
    absent: the version that wrote it may not have had the key.
    """
    groups: dict[str, list[T]] = {}
    names: dict[str, str] = {}
    for run in runs:
        values = list(identity(run))
        digest = hashlib.sha256(json.dumps(_without_nulls(values), sort_keys=True).encode()).hexdigest()
        groups.setdefault(digest, []).append(run)
        names[digest] = values[0]
    common = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {
        f"{names[digest]} ({digest[:4]})" if names[digest] in common else names[digest]: group
        for digest, group in groups.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def differing(values: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names whose values are not all equal."""
    return [name for name, of in values.items() if any(value != of[0] for value in of)]


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but the seed. `value` is their mean; bytes are of one sequence of the context."""

    name: str
    bytes: int
    value: float
    lowest: float
    highest: float
    runs: int
    frontier: bool
    params: int
    tokens: int
    kv_per_token: float
    kv_constant: int
    kv_read: float


@dataclass(frozen=True)
class History:
    """The course of one run, finished or not.

    steps, seconds, raw, train  by report: training time without validation, training loss as measured and smoothed
    val_steps, val              by validation
    """

    run: Run
    seed: int
    num_unpredicted: int
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

    def losses(self, series: str) -> tuple[Array, Array]:
        """(steps, losses) of `val`, `train` or `raw`."""
        if series == "val":
            return self.val_steps, self.val
        return self.steps, {"train": self.train, "raw": self.raw}[series]

    def seconds_at(self, step: Array | float) -> Any:
        """Seconds of training up to `step`, linear between reports."""
        return np.interp(step, [0, *self.steps], [0.0, *self.seconds])


def load_history(run: Run, clock: str) -> History:
    """Read the metrics of a run, with seconds of `clock`. Raises RunError where they cannot make a curve."""
    try:
        plan, rows = run.plan, run.metrics
        train = [row for row in rows if row["train/loss"]]
        if len(train) < 2:
            count = f"has reported {len(train)} times so far, a curve needs 2"
            raise RunError(f"{run.folder} {count}: leave it out, or wait")
        column = CLOCKS[clock]
        if column not in train[0]:
            why = "it ran on no CPU" if clock == "cpu" else "it is of a version that logged none"
            raise RunError(f"{run.folder} has no {column}, {why}: leave it out, or train it again")
        steps, seconds, raw = np.array([[float(row[key]) for key in ("step", column, "train/loss")] for row in train]).T
        if not np.isfinite(seconds).all():
            raise RunError(
                f"{run.folder}: its time is not known, it began with a version that logged none; leave it out"
            )
        val = [(float(row["step"]), float(row["val/loss"])) for row in rows if row.get("val/loss")]
        val_steps, val_losses = np.array([row for row in val if row[0] <= steps[-1]]).reshape(-1, 2).T
        step_tokens = float(train[-1]["train/tokens"]) / steps[-1]
        num_reports = run.config["tokens"] / step_tokens / (steps[-1] / len(steps))  # of the whole run
        return History(
            run,
            seed=run.config["seed"],
            num_unpredicted=plan.num_unpredicted,
            hardware=json.dumps(run.starts[-1]["hardware"]),
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
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{run.folder} holds no readable run: {error!r}") from error


def ema(losses: Array, span: float) -> Array:
    """Exponential moving average over about `span` of the losses, without bias towards the first."""
    decay = 1 - 1 / max(1.0, span)
    total = weight = 0.0
    averages = []
    for loss in losses:
        total, weight = decay * total + loss, decay * weight + 1
        averages.append(total / weight)
    return np.array(averages)


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but the seed. Their mean is over the steps that all of them have reported."""

    name: str
    runs: tuple[History, ...]

    def mean(self, series: str) -> tuple[Array, Array, Array, Array]:
        """(steps, mean, lowest and highest loss) of `val`, `train` or `raw`."""
        losses = [run.losses(series) for run in self.runs]
        steps = reduce(np.intersect1d, [steps for steps, _ in losses])
        common = np.stack([values[np.isin(of, steps)] for of, values in losses])
        return steps, common.mean(axis=0), common.min(axis=0), common.max(axis=0)

    def axes(self, steps: Array | float) -> dict[str, Any]:
        """Tokens, seconds and training FLOPs after `steps`, the seconds on average."""
        tokens = steps * self.runs[0].step_tokens
        seconds = np.mean([run.seconds_at(steps) for run in self.runs], axis=0)
        return {"tokens": tokens, "seconds": seconds, "flops": tokens * self.runs[0].flops_per_token}

    def by_seed(self) -> "list[Curve]":
        """Each run as a curve of its own."""
        return [Curve(self.name, (run,)) for run in self.runs]
