"""Run folders: read and find them, group them by seed, and list what differs between them.

A run folder has config.yaml, plan.json, run.json (one record per start) and metrics/<start>/metrics.csv, and
summary.json once its training has ended. train/run.py writes them; checkpoints/best.json is train/callbacks.py's.
"""

import csv
import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from arch import Plan, plan_from_dict
from data.cli import UsageError, value_text
from data.dotted import lookup, without_nulls
from eval.checks import check_plain, check_plan, check_summary
from eval.console import visible
from eval.environment import ROOT
from eval.plain_yaml import parse_plain

T = TypeVar("T")
MAX_NOTE = 40  # characters that tell runs of one name apart
MAX_VALUE = 12  # of a value among them


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
    "match": Key(None, fixed=True),  # the width that it led to is in `size`
    "train_only": Key("result", fixed=True),
    "name": Key(None, fixed=True),
    "folder": Key(None, fixed=True),
    "resume": Key(None),
    "context": Key(None),
    "kv_itemsize": Key(None),
    "logger": Key(None),
    "evals": Key(None),
    "trainer.accelerator": Key("speed"),
    "trainer.devices": Key("speed"),
    "trainer.num_nodes": Key("speed"),
    "trainer.strategy": Key("speed"),
    "trainer.replicas": Key("speed"),
    "trainer.precision": Key("speed"),
    "trainer.micro_batch": Key("speed"),
    "trainer.compile": Key("speed"),
    "trainer.backend": Key("speed"),
    "trainer.activation_checkpointing": Key("speed"),
    "trainer.log_every": Key(None),
    "trainer.val_every": Key(None),
    "trainer.checkpoint_every": Key(None),
    "trainer.checkpoint_minutes": Key(None),
    "trainer.checkpoint_async": Key(None),
    "trainer.keep_checkpoints": Key(None),
    "trainer.max_rise": Key(None),
    "trainer.max_hours": Key(None),
    "trainer.peak_tflops": Key(None),
    "trainer.progress": Key(None),
}


# A value of a key of speed that decides the result, too: fp8 is no mere rounding of sums, and no seed of bf16.
COARSE = {"trainer.precision": "fp8"}


def deciding_values(config: Mapping[str, Any], decides: str) -> dict[str, Any]:
    """The values in `config` (nested) of the keys that decide `decides`, groups as wholes.

    A key that an earlier version did not have is None.
    """
    keys = [key for key, value in KEYS.items() if value.decides == decides and key.rpartition(".")[0] not in KEYS]
    if decides == "result":
        keys += [key for key, value in COARSE.items() if lookup(config, key) == value]
    return {key: lookup(config, key) for key in keys}


class RunError(UsageError):
    """A folder that holds no usable run; the message says why."""


class Best(NamedTuple):
    """The checkpoint with the lowest validation loss: the name of its folder, and the loss."""

    checkpoint: str
    val_loss: float


@dataclass(frozen=True)
class Run:
    """A run folder. Files are read on first use; RunError where one is missing or is not what a run writes."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml, not typed: an earlier version may have written it."""
        config: dict[str, Any] = self._read("config.yaml", parse_plain, dict)
        return config

    @cached_property
    def plan(self) -> Plan:
        plan: Plan = self._read("plan.json", _parse_plan, object)
        return plan

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """run.json: the environment record of every start."""
        starts: list[dict[str, Any]] = self._read("run.json", json.loads, list)
        return starts

    @cached_property
    def best(self) -> Best | None:
        """checkpoints/best.json; None if there is none."""
        name = "checkpoints/best.json"
        return self._read(name, _parse_best, Best) if (self.folder / name).exists() else None

    @property
    def finished(self) -> bool:
        return os.path.isfile(self.folder / "summary.json")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; of a `finished_run` with at least the keys of checks.SUMMARY_TYPES."""
        summary: dict[str, Any] = self._read("summary.json", json.loads, dict)
        return summary

    @property
    def experiment(self) -> dict[str, Any]:
        """The part of summary.json that decides the result, with digests of the data."""
        experiment = self.summary.get("experiment")
        if not isinstance(experiment, dict):
            raise RunError(f"{self.folder} holds no readable run: summary.json has no experiment; put it back")
        return experiment

    @cached_property
    def metrics(self) -> list[dict[str, str]]:
        """The rows of all starts that have a loss; where a start repeats steps of the one before, its rows count."""
        rows: list[dict[str, str]] = []
        starts = (path for path in (self.folder / "metrics").glob("*/metrics.csv") if path.parent.name.isdecimal())
        for path in sorted(starts, key=lambda path: int(path.parent.name)):
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    new = [row for row in csv.DictReader(file) if row.get("train/loss") or row.get("val/loss")]
                first = min((int(row["step"]) for row in new), default=None)
                trained = any(row.get("train/loss") and int(row["step"]) == first for row in new)
            except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
                raise RunError(f"{self.folder} holds no readable run: {path}: {_reason(error)}") from error
            if first is None:
                continue
            # A start that begins with a validation did not repeat the training step before it.
            last = first - 1 if trained else first
            rows = [row for row in rows if int(row["step"]) <= (last if row.get("train/loss") else first - 1)] + new
        return rows

    def _read(self, name: str, parse: Callable[[str], Any], kind: type) -> Any:
        try:
            value = parse((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            what = "finished run" if name == "summary.json" else "run"
            raise RunError(f"{self.folder} holds no {what}: {error.filename} is missing") from error
        except OSError as error:
            raise RunError(f"{self.folder} holds no readable run: {name}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise RunError(f"{self.folder} holds no readable run: {name}: {_reason(error)}") from error
        if not isinstance(value, kind):
            what = "list" if kind is list else "mapping"
            raise RunError(f"{self.folder} holds no readable run: {name} is no {what}; put it back")
        return value


def _parse_plan(text: str) -> Plan:
    values = json.loads(text)
    check_plain(values)
    plan = plan_from_dict(values)
    check_plan(plan)
    return plan


def _parse_best(text: str) -> Best:
    values = json.loads(text)
    loss = values["val_loss"]
    if type(loss) not in (int, float) or not math.isfinite(loss):
        raise ValueError(f"val_loss is {str(loss)[:80]}")
    if not (name := Path(str(values["checkpoint"])).name):
        raise ValueError("checkpoint has no name")
    return Best(name, float(loss))


def _reason(error: Exception) -> str:
    """One line about what is wrong with a file."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if type(error) is ValueError:
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def folders_of(patterns: Sequence[str]) -> list[Path]:
    """The folders that `patterns` name: a path that exists is itself, anything else a glob.

    Files are skipped: `runs/*` also matches our own pictures. Raises UsageError if there is none.
    """
    paths = [
        Path(path)
        for pattern in patterns
        for path in ([pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)) or [pattern])
    ]
    folders = [path for path in paths if not os.path.isfile(path)]
    if not folders:
        raise UsageError("no folder is given; give run folders, or a folder that holds runs")
    return folders


def default_out(folders: Sequence[Path]) -> Path:
    """The folder that is given, or the one that contains all; `runs` where that would be the checkout, or around it."""
    common = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    return ROOT / "runs" if ROOT.is_relative_to(common) else common


def finished_run(folder: Path) -> Run:
    """The run in `folder`. Raises RunError unless it has a readable summary and plan."""
    run = Run(folder)
    try:
        check_summary(run.summary)
    except RunError:  # a ValueError as well
        raise
    except (ValueError, TypeError) as error:
        raise RunError(f"{folder} holds no readable run: summary.json: {_reason(error)}") from error
    assert run.plan  # reads it
    return run


class FoundRuns(NamedTuple):
    """The runs in some folders, and what was found beside them.

    unfinished  runs that have no result yet; empty where those are among the runs
    unreadable  a line for each folder that holds no readable run, or cannot be looked into
    """

    runs: list[Run]
    unfinished: list[Run]
    unreadable: list[str]


def look_for_runs(folders: Sequence[Path], *, finished: bool) -> FoundRuns:
    """The runs in and below `folders`, each once; all that have started, or only the finished ones.

    Raises RunError if there is none.
    """
    found: dict[Path, Run] = {}
    unfinished: dict[Path, Run] = {}
    unreadable: list[str] = []

    def cannot_look(error: OSError) -> None:
        unreadable.append(f"{error.filename} cannot be looked into: {error.strerror}")

    for folder in folders:
        if not os.path.isdir(folder):
            raise RunError(f"{folder} is not a folder; give run folders, or a folder that holds runs")
        places = {Path(path): {*inner, *files} for path, inner, files in os.walk(folder, onerror=cannot_look)}
        for path in sorted(places):
            if not places[path] & ({"run.json", "summary.json"} if finished else {"run.json"}):
                continue
            real = Path(os.path.realpath(path))
            try:
                if not finished:
                    found.setdefault(real, Run(path))
                elif "summary.json" in places[path]:
                    found.setdefault(real, finished_run(path))
                else:
                    unfinished.setdefault(real, Run(path))
            except RunError as error:
                unreadable.append(str(error))
    if not found:
        shown = ", ".join(map(str, folders))
        missing = (
            f"no finished run in {shown}: a run writes summary.json when its training ends"
            if finished
            else f"no run in {shown}: a run writes run.json when it starts"
        )
        raise RunError("\n".join([missing, *unreadable]))
    return FoundRuns(list(found.values()), list(unfinished.values()), list(dict.fromkeys(unreadable)))


def warn(lines: Iterable[str]) -> None:
    """Print each of `lines` as a warning."""
    for line in lines:
        print(f"warning: {visible(line)}", file=sys.stderr)


def group_by_seed(runs: Iterable[T], identity: Callable[[T], Sequence[Any]]) -> dict[str, list[T]]:
    """Group runs of equal `identity`: JSON values, the name first, all that decides a run but its seed.

    The key is the name; where several groups have it, with the settings in which they differ (`cla2 (kv_heads=2)`); if
    those are many, with as many as tell them apart (`cla2 (kv_heads=2, ...)`), or else with a digest of the identity. A
    null in a mapping counts as absent: the version that wrote it may not have had the key.
    """
    groups: dict[str, list[T]] = {}
    identities: dict[str, list[Any]] = {}
    for run in runs:
        values = without_nulls(list(identity(run)))
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        groups.setdefault(digest, []).append(run)
        identities[digest] = values
    names = {digest: values[0] for digest, values in identities.items()}
    labels: dict[str, str] = {}
    for name in dict.fromkeys(names.values()):
        same = [digest for digest in names if names[digest] == name]
        notes = _distinctions([identities[digest][1:] for digest in same])
        if len(set(notes)) < len(same) or max(map(len, notes)) > MAX_NOTE:
            notes = [digest[:4] for digest in same]
        labels |= {digest: f"{name} ({note})" for digest, note in zip(same, notes, strict=True)}
        if len(same) == 1:
            labels[same[0]] = name
    return {labels[digest]: group for digest, group in groups.items()}


def repeated_seeds(
    groups: Mapping[str, Sequence[T]], seed: Callable[[T], int], folder: Callable[[T], Path]
) -> list[str]:
    """A line for each run that has the seed of another of its group: a copy of it, or the same run again."""
    lines = []
    for name, group in groups.items():
        first: dict[int, T] = {}
        for run in group:
            other = first.setdefault(seed(run), run)
            if other is not run:
                lines.append(
                    f"{folder(run)} has the seed of {folder(other)} ({name}, seed {seed(run)}): both are counted"
                )
    return lines


def folders_of_notes(
    groups: Mapping[str, Sequence[T]], name: Callable[[T], str], folder: Callable[[T], Path]
) -> list[str]:
    """A line for each group whose label is more than the name of its runs: which folders they are in."""
    noted = {label: group for label, group in groups.items() if label != name(group[0])}
    return [f"{label}: {', '.join(str(folder(run)) for run in group)}" for label, group in noted.items()]


def _distinctions(values: Sequence[Any]) -> list[str]:
    """The settings of each of `values`, plain data, that not all others share, as `lr=3, window=64`; where those are
    too long, the first that tell all apart, as `lr=3, ...`."""
    flat = [dict(_leaves("", value)) for value in values]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if differing({key: _column(flat, key)})]
    short = {key: key.rpartition(".")[2] for key in keys}
    shown = {key: short[key] if list(short.values()).count(short[key]) == 1 else key for key in keys}
    texts = [[f"{shown[key]}={value_text(each.get(key))[:MAX_VALUE]}" for key in keys] for each in flat]
    whole = [", ".join(each) for each in texts]
    if max(map(len, whole)) <= MAX_NOTE:
        return whole
    notes = [""] * len(flat)
    for column in zip(*texts, strict=True):
        longer = [f"{note}{text}, " for note, text in zip(notes, column, strict=True)]
        if len(set(longer)) > len(set(notes)):
            notes = longer
    return [f"{note}..." for note in notes]


def _column(flat: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [each.get(key) for each in flat]


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The scalars of plain data by dotted key; lists of scalars are one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(f"{prefix}.{number}" if prefix and not isinstance(item, Mapping) else prefix, item)
    else:
        yield prefix, json.dumps(value) if isinstance(value, list) else value


def differing(values: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names whose values are not all equal."""
    return [name for name, of in values.items() if any(value != of[0] for value in of)]


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but the seed. `value` is their mean; bytes are of one sequence of the context.

    x       the mean of the figure on the other axis; None: `bytes`
    method  what is done to the cache at test time; figures of the layout alone are then None, as are bytes without a
            formula
    against_none  verdict (eval/intervals.py) on the differences to the same runs without a method; None: it has no
                  method, or fewer than two seeds have both figures
    """

    name: str
    bytes: int | None
    value: float
    lowest: float
    highest: float
    runs: int
    frontier: bool
    params: int
    tokens: int
    kv_per_token: float | None
    kv_constant: int | None
    kv_read: float | None
    x: float | None = None
    method: str = "none"
    against_none: str | None = None

    @property
    def across(self) -> float:
        """The place on the axis from left to right."""
        across = self.bytes if self.x is None else self.x
        assert across is not None
        return float(across)
