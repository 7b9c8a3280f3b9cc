"""Rows of a study (train/studies/rows.py writes them): read, grouped by layout, compared by seed."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from arch import ModelConfig, Plan, SizeConfig, from_dict, kv_bytes, resolve
from data.cli import UsageError
from eval.identity import PREDICTED, READING
from eval.intervals import UNDECIDED, WORSE, Interval, interval

Row = dict[str, Any]
T = TypeVar("T")
DIVERGED = "diverged"  # the verdict on a layout of which a run did, unless the others are worse anyway
QUESTIONS = "what its digest is of: questions, text or type of numbers"
SIZE = ("num_layers", "d_model", "vocab_size")  # of models that are compared; widths of heads and MLPs are a layout's


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
            rows.append(parse_row(line))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number}: {error}; delete it, its run is then done again") from error
    return rows


def parse_row(line: str | bytes) -> Row:
    """Read a row. Raises ValueError if `line` is none."""
    row = json.loads(line)
    if not (isinstance(row, dict) and {"key", "seed", "arch", "stage", "loss"} <= row.keys()):
        raise ValueError("it is no row of a study")
    return row


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
        """Validation loss by seed, of the runs that have not diverged."""
        return {row["seed"]: row["loss"] for row in self.rows if row["loss"] is not None}

    @property
    def diverged(self) -> list[Row]:
        return [row for row in self.rows if row["loss"] is None]

    @cached_property
    def plan(self) -> Plan | None:
        """The layout by this version; None if that cannot read it, or counts other bytes than the row has."""
        config, names = self.first["config"], [field.name for field in fields(SizeConfig)]
        try:
            size = {key: value for key, value in config["size"].items() if key in names}
            plan = resolve(from_dict(ModelConfig, {"arch": config["arch"], "size": size}))
        except (ValueError, KeyError, TypeError):
            return None
        same = all(kv_bytes(plan, int(at)).stored == stored for at, (stored, _) in self.first["kv"].items())
        return plan if same else None

    def stored(self, context: int) -> int | None:
        """Bytes of the cache at `context` tokens, from the row or by its layout; None where neither tells."""
        if known := self.first["kv"].get(str(context)):
            return int(known[0])
        return None if self.plan is None else kv_bytes(self.plan, context).stored

    def figures(self, name: str) -> list[float]:
        """The figure `task/figure` of every run that has it."""
        task, _, figure = name.partition("/")
        values = [row["tasks"].get(task, {}).get("figures", {}).get(figure) for row in self.rows]
        return [value for value in values if value is not None]


def groups(rows: Iterable[Row], stage: str) -> list[Group]:
    """Group the rows of `stage`. Rows of different configurations or commits are never in one group."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in newest(row for row in rows if row["stage"] == stage):
        found.setdefault((row["arch"], row["key"], row["commit"]), []).append(row)
    labels = _labels({(arch, key, commit): (key[:4], _short(commit)) for arch, key, commit in found})
    return [Group(labels[name], tuple(sorted(same, key=lambda row: row["seed"]))) for name, same in found.items()]


def contexts_of(found: Sequence[Group]) -> list[int]:
    """The contexts at which the bytes of all groups are known: the lengths of training first."""
    trained = sorted({group.first["seq_len"] for group in found})
    others = sorted({int(context) for group in found for context in group.first["kv"]})
    at = dict.fromkeys([*trained, *others])
    return [context for context in at if all(group.stored(context) is not None for group in found)]


def _labels(words: Mapping[tuple[str, ...], Sequence[str]]) -> dict[tuple[str, ...], str]:
    """A name for each key: its first item, and for each further one that others of that name do not share its word."""
    labels = {}
    for key, shown in words.items():
        others = [other for other in words if other[0] == key[0]]
        note = [word for place, word in enumerate(shown, 1) if len({other[place] for other in others}) > 1]
        labels[key] = f"{key[0]} ({', '.join(note)})" if note else key[0]
    return labels


def _short(commits: str) -> str:
    return ", ".join(commit[:7] + "+" * commit.endswith("+") for commit in commits.split(", "))


def differences(one: Group, other: Group) -> list[str]:
    """The conditions that differ between two groups, and must not for their losses to be compared: the text, how it is
    read and what of it is predicted, depth, width and vocabulary, what is matched, tokens and steps, precision, commit,
    the beginning, and the optimizer but for its rate."""
    ours, theirs = _conditions(one.first), _conditions(other.first)
    return [key for key in ours if ours[key] != theirs[key]]


def _conditions(row: Row) -> dict[str, Any]:
    config, block = row["config"], row["config"]["arch"]["block"]
    found = {key: row[key] for key in ("data", "tokens", "seq_len", "commit", "speed", "val_tokens")}
    found |= {key: config.get(key) for key in ("batch_size", "init", "train_only")}
    found |= {f"size.{key}": config.get("size", {}).get(key) for key in SIZE}
    found["match"] = None if row["match"] is None else (row["match"]["match"], row["match"]["target"])
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


def verdict(group: Group, baseline: Group) -> str | None:
    """Better or worse than the baseline, not told apart from it, or DIVERGED; None: not compared.

    A layout with a run that diverged is not better, and one is not worse than a baseline of which one did.
    """
    if differences(group, baseline):
        return None
    found = compare(group, baseline)
    if group.diverged and (found is None or found.verdict != WORSE):
        return DIVERGED
    if found is None:
        return None
    return UNDECIDED if baseline.diverged and found.verdict == WORSE else found.verdict


def sentence(group: Group, baseline: Group) -> str:
    """Say whether the layout is better or worse than the baseline, or not told apart from it."""
    if others := differences(group, baseline):
        return f"{group.label}: not compared with {baseline.label}, the runs differ in {', '.join(others)}."
    found, reached = compare(group, baseline), verdict(group, baseline)
    diverged = len(group.diverged) + len(baseline.diverged)
    note = f"; {diverged} diverged" * (diverged > 0)
    if found is None:
        return f"{group.label}: no seed in common with {baseline.label}{note}."
    seeds = seeds_text(found.pairs, group, baseline)
    told = "no verdict beside" if reached == DIVERGED else f"{reached} {'from' if reached == UNDECIDED else 'than'}"
    if found.half is None:
        seeds = "one seed" if seeds == "1" else f"{seeds} seeds"
        seeds += ", whose differences are equal" * (found.pairs > 1)
        return f"{group.label}: {told} {baseline.label}: {seeds} ({found.mean:+.4f} nats{note})."
    shown = f"{found.mean:+.4f} ± {found.half:.4f} nats over {seeds} seeds{note}"
    return f"{group.label}: {told} {baseline.label} ({shown})."


def why_no_loss(row: Row) -> str:
    return str(row.get("diverged") or "its validation loss is not finite")


def seeds_text(count: int, *groups: Group) -> str:
    """`3`, or `2 of 3` where `groups` have a seed more: one that diverged, or that not all of them have."""
    total = len({row["seed"] for group in groups for row in group.rows})
    return f"{count} of {total}" if count < total else str(count)


@dataclass(frozen=True)
class Search:
    """The learning rates that a study tried with a layout at one commit.

    losses   by rate, in their order; None: it diverged
    setting  digest of all but the rate and the tokens
    """

    label: str
    arch: str
    study: str
    commit: str
    setting: str
    losses: Mapping[float, float | None]


def searches(rows: Iterable[Row]) -> list[Search]:
    """The searches of learning rates, of the first stage."""
    found: dict[tuple[str, ...], dict[float, float | None]] = {}
    for row in rows:
        if row["stage"] == "rate":
            key = (row["arch"], row["study"], row["commit"], f"{row['tokens']:,} tokens", _setting(row))
            found.setdefault(key, {})[row["lr"]] = row["loss"]
    labels = _labels({key: (key[1], _short(key[2]), key[3], key[4][:4]) for key in found})
    return [
        Search(labels[key], arch, study, commit, setting, dict(sorted(losses.items())))
        for key, losses in found.items()
        for arch, study, commit, _, setting in [key]
    ]


def _setting(row: Row) -> str:
    config = {key: value for key, value in row["config"].items() if key != "tokens"}
    optim = {key: value for key, value in config["optim"].items() if key != "lr"}
    values = [config | {"optim": optim}, row["data"], row["speed"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def search_of(group: Group, found: Iterable[Search]) -> Search | None:
    """The search that gave the runs of `group` their rate, of their own commit if that has one."""
    row = group.first
    wanted = row["arch"], row["study"], _setting(row)
    fitting = [each for each in found if (each.arch, each.study, each.setting) == wanted]
    return max(fitting, key=lambda each: each.commit == row["commit"], default=None)


def edge(lr: float, tried: Iterable[float]) -> str | None:
    """`lowest` or `highest` if `lr` is that of several rates that were tried."""
    rates = sorted(set(tried))
    if len(rates) < 2 or lr not in (rates[0], rates[-1]):
        return None
    return "lowest" if lr == rates[0] else "highest"


def edge_sentence(label: str, lr: float, end: str) -> str:
    beyond = {"lowest": "lower", "highest": "higher"}[end]
    return f"{label}: its learning rate, {lr:g}, is the {end} that was tried; a {beyond} one may be better."


def deciding_options(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of `task`, as they are recorded; those that do not decide its figures with the value that the task's
    digests have."""
    from eval.tasks import TASKS

    kind = TASKS[task].options if task in TASKS else None
    if kind is None or not options:
        return dict(options)
    known = {field.name for field in fields(kind)}
    deciding = kind(**{name: value for name, value in options.items() if name in known}).deciding()
    return {name: deciding.get(name, value) for name, value in options.items()}


def unequal_options(rows: Iterable[Row], task: str) -> list[str]:
    """The options in which the results of `task` differ, as far as they are recorded; of equal ones, QUESTIONS if the
    digests of those results that have one differ."""
    found = [row["tasks"][task] for row in rows if task in row["tasks"]]
    given = [deciding_options(task, of.get("options") or {}) for of in found]
    names = dict.fromkeys(name for options in given for name in options)
    unequal = [name for name in names if len({json.dumps(options[name]) for options in given if name in options}) > 1]
    digests = {of["digest"] for of in found if of.get("digest")}
    return unequal or [QUESTIONS] * (len(digests) > 1)


def frontier(points: Mapping[T, tuple[float, float]]) -> list[T]:
    """The names of `points` (bytes, loss) to which no other is superior, by bytes."""
    kept: list[T] = []
    lowest = math.inf
    for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < lowest:
            kept.append(name)
            lowest = loss
    return kept
