"""Figures that a paper published for its layouts, set beside the losses of a study: have they the same order?"""

import csv
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UsageError
from eval.intervals import BETTER, UNDECIDED, Interval
from eval.study_rows import Group, compare

SAME, REVERSED = "as published", "reversed"
DRAWN = 4000  # random orders


@dataclass(frozen=True)
class Published:
    """`figures` of layouts, of which the lower is the better; `name` says what they are."""

    name: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """Two layouts of which `better` has the lower published figure; `loss`: its loss minus that of `worse`."""

    better: str
    worse: str
    loss: Interval

    @property
    def verdict(self) -> str:
        if self.loss.verdict == UNDECIDED:
            return UNDECIDED
        return SAME if self.loss.verdict == BETTER else REVERSED


def read_published(path: Path) -> Published:
    """Read a CSV file of two columns: `layout`, and one of figures, whose heading is their name.

    Raises UsageError if it cannot be read, or is another file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # of Excel: with a mark in front
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"published={path} cannot be read ({error})") from error
    heading = lines[0] if lines else []
    if len(heading) != 2 or heading[0] != "layout":
        raise UsageError(f"published={path}: its first line is to be layout,NAME with the name of the figures")
    figures: dict[str, float] = {}
    for line in lines[1:]:
        try:
            layout, figure = line
            value = float(figure)
        except ValueError as error:
            raise UsageError(f"published={path}: {','.join(line)} is no layout with a figure") from error
        if not math.isfinite(value) or layout in figures:
            raise UsageError(f"published={path}: {layout} has no finite figure, or two")
        figures[layout] = value
    return Published(heading[1], figures)


@dataclass(frozen=True)
class Order:
    """Pairs of layouts, whether their losses have the published order; `left_out`: sentences about layouts in none."""

    published: Published
    pairs: Sequence[Pair]
    left_out: Sequence[str]

    @property
    def layouts(self) -> set[str]:
        return {name for pair in self.pairs for name in (pair.better, pair.worse)}

    def summary(self) -> str:
        """Say how many pairs of losses have the published order, and which layouts are in none."""
        count, same = len(self.pairs), sum(pair.loss.mean < 0 for pair in self.pairs)
        low, high = self.at_random()
        told = [pair.verdict for pair in self.pairs if pair.verdict != UNDECIDED]
        apart = f"{len(told)} are told apart, {told.count(SAME)} of them as published" if told else "none is told apart"
        found = (
            f"{self.published.name}: of {count} pairs of layouts {same} have the published order (an order drawn at "
            f"random: {low} to {high}); {apart} (of equal layouts one of twenty would be, by chance)."
        )
        return " ".join([found, *self.left_out])

    def at_random(self) -> tuple[int, int]:
        """The range that holds, for 95 % of random orders of the layouts, how many pairs have the published order."""
        names, draw = sorted(self.layouts), random.Random(0)
        agreeing = []
        for _ in range(DRAWN):
            place = dict(zip(names, draw.sample(range(len(names)), len(names)), strict=True))
            agreeing.append(sum(place[pair.better] < place[pair.worse] for pair in self.pairs))
        agreeing.sort()
        cut = DRAWN // 40  # 2.5 %
        return agreeing[cut], agreeing[-1 - cut]

    def table(self) -> list[dict[str, Any]]:
        """A line for each pair: published figures, the difference of losses in nats, and half of its interval."""
        figures = self.published.figures
        return [
            {
                "better": pair.better,
                "worse": pair.worse,
                "published of better": figures[pair.better],
                "published of worse": figures[pair.worse],
                "difference": pair.loss.mean,
                "half_width": pair.loss.half,
                "verdict": pair.verdict,
            }
            for pair in self.pairs
        ]


def order_of(found: Sequence[Group], published: Published) -> Order:
    """The order of those layouts of `found` that have published figures, as far as their losses can be compared.

    Two with equal figures are no pair, nor are layouts of which a run diverged. Raises UsageError if there is no pair,
    or a layout with a figure is in several groups of runs.
    """
    groups: dict[str, Group] = {}
    for group in found:
        name = group.first["arch"]
        if name in groups and name in published.figures:
            raise UsageError(
                f"published= has one figure of {name}, of which there are {groups[name].label} and {group.label}; "
                "give the rows of one configuration at one commit, or pool=true if only the commits differ"
            )
        groups[name] = group
    known = [name for name in published.figures if name in groups and not groups[name].diverged]
    known.sort(key=lambda name: published.figures[name])
    compared = [(one, other, compare(groups[one], groups[other])) for one, other in itertools.combinations(known, 2)]
    pairs = [
        Pair(one, other, loss)
        for one, other, loss in compared
        if loss is not None and published.figures[one] < published.figures[other]
    ]
    if not pairs:
        names = ", ".join(groups)
        raise UsageError(f"published= has different figures for no two layouts that can be compared, of {names}")
    return Order(published, pairs, left_out(groups, published))


def left_out(groups: Mapping[str, Group], published: Published) -> list[str]:
    """Sentences about layouts that are in no pair."""
    reasons = {
        "No run here": [name for name in published.figures if name not in groups],
        "A run diverged": [name for name in published.figures if name in groups and groups[name].diverged],
        "No published figure": [name for name in groups if name not in published.figures],
    }
    return [f"{why}: {', '.join(names)}." for why, names in reasons.items() if names]
