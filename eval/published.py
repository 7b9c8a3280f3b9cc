"""Figures that a paper published for its layouts, set beside the losses of a study: have they the same order?"""

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.cli import UsageError
from eval.intervals import BETTER, UNDECIDED, Z95, Interval
from eval.study_rows import Group, compare

SAME, REVERSED = "as published", "reversed"


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
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
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
    """Pairs of layouts, whether their losses have the published order."""

    published: Published
    pairs: Sequence[Pair]

    @property
    def layouts(self) -> set[str]:
        return {name for pair in self.pairs for name in (pair.better, pair.worse)}

    def summary(self) -> str:
        """Say in how many pairs the losses have the published order, and in how many by chance.

        An order drawn at random agrees in half of the pairs. In 95 % of cases it lies in the range that is given, by
        the variance of Kendall's statistic for n layouts without ties, n (n - 1) (2n + 5) / 18, as if it were normal.
        """
        same, count = sum(pair.loss.mean < 0 for pair in self.pairs), len(self.pairs)
        n = len(self.layouts)
        half = Z95 / 2 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        low, high = max(0, math.ceil(count / 2 - half)), min(count, math.floor(count / 2 + half))
        told = [pair.verdict for pair in self.pairs if pair.verdict != UNDECIDED]
        apart = f"{len(told)} are told apart, {told.count(SAME)} of them as published" if told else "none is told apart"
        return (
            f"{self.published.name}: of {count} pairs of layouts {same} have the published order (an order drawn at "
            f"random: {low} to {high}); {apart}."
        )

    def table(self) -> str:
        """The pairs as CSV: published figures, the difference of losses in nats, and half of its interval of 95 %."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["better", "worse", "published", "published of worse", "difference", "half_width", "verdict"])
        for pair in self.pairs:
            figures = [self.published.figures[name] for name in (pair.better, pair.worse)]
            writer.writerow([pair.better, pair.worse, *figures, pair.loss.mean, pair.loss.half, pair.verdict])
        return text.getvalue()


def order_of(found: Sequence[Group], published: Published) -> Order:
    """The order of those layouts of `found` that have published figures, as far as their losses can be compared.

    Two with equal figures are no pair. Raises UsageError if there is no pair.
    """
    known = [group for group in found if group.label in published.figures]
    known.sort(key=lambda group: published.figures[group.label])
    compared = [(one, other, compare(one, other)) for one, other in itertools.combinations(known, 2)]
    pairs = [
        Pair(one.label, other.label, loss)
        for one, other, loss in compared
        if loss is not None and published.figures[one.label] < published.figures[other.label]
    ]
    if not pairs:
        names = ", ".join(group.label for group in found)
        raise UsageError(f"published= has different figures for no two layouts that can be compared, of {names}")
    return Order(published, pairs)
