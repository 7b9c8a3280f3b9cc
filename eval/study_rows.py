"""Rows of a study (train/studies/rows.py writes them): read, grouped by layout, compared by seed."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.cli import UsageError
from eval.identity import PREDICTED, READING
from eval.intervals import UNDECIDED, Interval, interval

Row = dict[str, Any]
T = TypeVar("T")


def read_rows(path: Path) -> list[Row]:
    """The rows in the file `path`; none where there is no file. A last line that was cut off is passed over.

    Raises UsageError if another line is not a row.
    """
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and {"key", "seed", "arch", "stage", "loss"} <= row.keys()):
                raise ValueError("it is no row of a study")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number}: {error}; delete it, its run is then done again") from error
    return rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each run at each commit. A run of one key in both stages is two."""
    return list({(row["stage"], row["key"], row["seed"], row["commit"]): row for row in rows}.values())


@dataclass(frozen=True)
class Group:
    """Runs of one configuration at one commit that differ in the seed. `label`: the layout, and what else is needed to
    tell the group from others of it."""

    label: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed."""
        return {row["seed"]: row["loss"] for row in self.rows if row["loss"] is not None}

    def figures(self, name: str) -> list[float]:
        """The figure `task/figure` of every run that has it."""
        task, _, figure = name.partition("/")
        values = [row["tasks"].get(task, {}).get("figures", {}).get(figure) for row in self.rows]
        return [value for value in values if value is not None]


def groups(rows: Iterable[Row], stage: str) -> list[Group]:
    """Group the rows of `stage`. Rows of different configurations or commits are never in one group."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in newest(row for row in rows if row["stage"] == stage):
        found.setdefault((row["arch"], row["key"], row["commit"]), []).append(row)
    labels = {}
    for arch, key, commit in found:
        others = [other for other in found if other[0] == arch]
        note = [key[:4]] * (len({other[1] for other in others}) > 1)
        note += [commit[:7] + "+" * commit.endswith("+")] * (len({other[2] for other in others}) > 1)
        labels[arch, key, commit] = f"{arch} ({', '.join(note)})" if note else arch
    return [Group(labels[name], tuple(sorted(same, key=lambda row: row["seed"]))) for name, same in found.items()]


def differences(one: Group, other: Group) -> list[str]:
    """The conditions that differ between two groups, and must not for their losses to be compared: the text, how it is
    read and what of it is predicted, tokens and steps, precision, commit, the beginning, and the optimizer but for its
    rate."""
    ours, theirs = _conditions(one.first), _conditions(other.first)
    return [key for key in ours if ours[key] != theirs[key]]


def _conditions(row: Row) -> dict[str, Any]:
    config, block = row["config"], row["config"]["arch"]["block"]
    found = {key: row[key] for key in ("data", "tokens", "seq_len", "commit", "speed", "val_tokens")}
    found |= {key: config.get(key) for key in ("batch_size", "init", "train_only")}
    found |= {f"data.{key}": config.get("data", {}).get(key, False) for key in READING}  # which the first rows lack
    found[PREDICTED] = 0 if block is None or block["start"] else block["length"]
    return found | {"optim": {key: value for key, value in config["optim"].items() if key != "lr"}}


def compare(group: Group, baseline: Group) -> Interval | None:
    """Loss of `group` minus that of `baseline`, by seed: equal seeds have the same order of the data.

    None if no seed is in both, or they are not comparable.
    """
    if differences(group, baseline):
        return None
    ours, theirs = group.losses, baseline.losses
    changes = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return interval(changes) if changes else None


def sentence(group: Group, baseline: Group) -> str:
    """Say whether the layout is better or worse than the baseline, or not told apart from it."""
    if others := differences(group, baseline):
        return f"{group.label}: not compared with {baseline.label}, the runs differ in {', '.join(others)}."
    found = compare(group, baseline)
    if found is None:
        return f"{group.label}: no seed in common with {baseline.label}."
    seeds = seeds_text(found.pairs, group, baseline)
    diverged = sum(row["loss"] is None for row in (*group.rows, *baseline.rows))
    note = f"; {diverged} diverged" * (diverged > 0)
    if found.half is None:
        seeds = "one seed" if seeds == "1" else f"{seeds} seeds"
        return f"{group.label}: not told apart from {baseline.label}: {seeds} ({found.mean:+.4f} nats{note})."
    shown = f"{found.mean:+.4f} ± {found.half:.4f} nats over {seeds} seeds{note}"
    than = "from" if found.verdict == UNDECIDED else "than"
    return f"{group.label}: {found.verdict} {than} {baseline.label} ({shown})."


def seeds_text(count: int, *groups: Group) -> str:
    """`3`, or `2 of 3` where `groups` have a seed more: one that diverged, or that not all of them have."""
    total = len({row["seed"] for group in groups for row in group.rows})
    return f"{count} of {total}" if count < total else str(count)


def best_rates(rows: Iterable[Row]) -> dict[str, dict[float, float]]:
    """Loss by learning rate of each layout, of the first stage."""
    rates: dict[str, dict[float, float]] = {}
    for row in newest(row for row in rows if row["stage"] == "rate" and row["loss"] is not None):
        rates.setdefault(row["arch"], {})[row["lr"]] = row["loss"]
    return {arch: dict(sorted(losses.items())) for arch, losses in rates.items()}


def frontier(points: Mapping[T, tuple[float, float]]) -> list[T]:
    """The names of `points` (bytes, loss) to which no other is superior, by bytes."""
    kept: list[T] = []
    lowest = math.inf
    for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < lowest:
            kept.append(name)
            lowest = loss
    return kept
