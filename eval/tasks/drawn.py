"""Sequences that are drawn at random, and shares of the questions in them that are answered right.

Shapes: B sequences.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.intervals import Z95, student, wilson

FEW = 5  # sequences whose differences say nothing yet


def in_batches(
    draw: Callable[[int, int], tuple[Tensor, ...]], sequences: int, block: int, batch: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `sequences` in batches of `batch`, of which draw(number, size) makes a block of `block`: tensors [B, ...].

    How many of them go through a model at a time does not change what is drawn.
    """
    held: tuple[Tensor, ...] = ()
    for number in range(-(-sequences // block)):
        drawn = draw(number, min(block, sequences - number * block))
        held = tuple(map(torch.cat, zip(held, drawn, strict=True))) if held else drawn
        while len(held[0]) >= batch:
            yield tuple(part[:batch] for part in held)
            held = tuple(part[batch:] for part in held)
    if held and len(held[0]):
        yield held


class Share(NamedTuple):
    """A share, and the ends of its interval of 95 %."""

    value: float
    low: float
    high: float

    def entries(self, name: str) -> dict[str, float]:
        """Those of a row, for a figure of that name."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def share_of_sequences(right: Sequence[float], asked: Sequence[float]) -> Share:
    """The share of `right` answers of those `asked`, which are numbers of each sequence. Raises ValueError if nothing
    is asked.

    Questions of one sequence are not independent, sequences are. The interval is Wilson's of as many independent
    questions as would vary like the sequences (Korn and Graubard 1998; Dean and Pagano 2015), and of no more than there
    are sequences where fewer than FEW of them have a mistake, or a right answer: so few do not tell how they vary.
    """
    pairs = [(some, count) for some, count in zip(right, asked, strict=True) if count]
    if not pairs:
        raise ValueError("no question is asked")
    sequences, total = len(pairs), sum(count for _, count in pairs)
    share = sum(some for some, _ in pairs) / total
    independent = float(sequences)
    if sequences > 1 and 0 < share < 1:
        squares = math.fsum((some - share * count) ** 2 for some, count in pairs)
        variance = sequences / (sequences - 1) * squares / total**2
        most = share * (1 - share) / total  # variance of independent questions; less is chance
        independent = share * (1 - share) / max(variance, most) * (Z95 / student(sequences - 1)) ** 2
        if min(sum(some < count for some, count in pairs), sum(some > 0 for some, _ in pairs)) < FEW:
            independent = min(independent, sequences)
    trials = max(1, math.floor(independent))
    return Share(share, *wilson(share * trials, trials))
