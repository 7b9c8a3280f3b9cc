"""Several corpora in fixed proportions; one corpus is a mixture of one."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError
from .shards import TokenWindows

RANGE = 2**64
STEP = 0x9E3779B97F4A7C15  # RANGE divided by the golden ratio, odd: multiples of it fill [0, RANGE) most evenly


@dataclass(frozen=True)
class Mixture:
    """Assigns training sequences to corpora in exact proportion, as a pure function of sequence number and seed.

    Sequence g is the point (g * STEP + offset of the seed) mod RANGE, and each corpus owns an interval of [0, RANGE)
    proportional to its weight. Consecutive points are spread evenly (a Weyl sequence), so each corpus' count stays
    within a few sequences of its proportion; over RANGE sequences it is exact to 1/RANGE.
    """

    corpora: tuple[TokenWindows, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, windows: "TokenWindows | Mixture") -> "Mixture":
        """A mixture as it is, or of one corpus."""
        return windows if isinstance(windows, Mixture) else cls((windows,), (1.0,))

    @property
    def seq_len(self) -> int:
        return self.corpora[0].seq_len

    @property
    def has_answers(self) -> bool:
        """Sequences come with their targets; corpora of one tokenizer all do or all do not."""
        return self.corpora[0].has_answers

    @cached_property
    def bounds(self) -> list[int]:
        """Ends of the corpora's intervals in [0, RANGE], 0 first."""
        cumulative = [0.0, *accumulate(weight / sum(self.weights) for weight in self.weights)]
        return [*(round(fraction * RANGE) for fraction in cumulative[:-1]), RANGE]

    @property
    def most_windows(self) -> int:
        """The largest number of windows, each once, that can be chosen in proportion to the weights."""
        total = sum(self.weights)
        sizes = zip(self.corpora, self.weights, strict=True)
        return min(round(len(corpus) * total / weight) for corpus, weight in sizes)

    def locate(self, sequence: int, seed: int) -> tuple[int, int]:
        """The corpus of a sequence, and the number of earlier sequences from that corpus."""
        if len(self.corpora) == 1:
            return 0, sequence
        offset = _offset(seed)
        point = (sequence * STEP + offset) % RANGE
        corpus = next(number for number, bound in enumerate(self.bounds[1:]) if point < bound)
        low, high = (_below(bound, sequence, offset) for bound in self.bounds[corpus : corpus + 2])
        return corpus, high - low


@dataclass(frozen=True)
class EvalWindows:
    """Validation windows of several corpora: `chosen` holds (corpus, window) pairs, one corpus after the other."""

    corpora: tuple[TokenWindows, ...]
    chosen: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, windows: TokenWindows | Mixture, num_windows: int) -> "EvalWindows":
        """Choose about `num_windows` evenly spaced windows, in proportion to the weights, at least one per corpus.

        Fewer where a corpus has too few for its part.
        """
        mixture = Mixture.of(windows)
        num_windows = min(num_windows, mixture.most_windows)
        chosen: list[tuple[int, int]] = []
        for number, corpus in enumerate(mixture.corpora):
            fraction = mixture.weights[number] / sum(mixture.weights)
            count = max(1, round(num_windows * fraction))
            spread = np.linspace(0, len(corpus) - 1, count).round().astype(int)
            chosen += [(number, window) for window in spread.tolist()]
        return cls(mixture.corpora, tuple(chosen))

    @property
    def seq_len(self) -> int:
        return self.corpora[0].seq_len

    @property
    def has_answers(self) -> bool:
        """Sequences come with their targets; corpora of one tokenizer all do or all do not."""
        return self.corpora[0].has_answers

    @property
    def end_of_text(self) -> int:
        return self.corpora[0].end_of_text

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        corpus, window = self.chosen[index]
        return self.corpora[corpus][window]


def weights_of(mix: Any) -> dict[str, float]:
    """Check `data.mix` and return it as folder -> weight. Raises DataError on anything but positive weights."""
    if not isinstance(mix, dict):
        raise DataError(f"data.mix is {mix}; write data.mix='{{FOLDER: weight, FOLDER: weight}}'")
    for folder, weight in mix.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise DataError(f"data.mix: the weight of {folder} is {weight}; it is a positive number")
    weights = {str(Path(str(folder))): float(weight) for folder, weight in mix.items()}
    if len(weights) < len(mix):
        raise DataError(f"data.mix names a folder twice: {', '.join(map(str, mix))}; give each one weight")
    return weights


@cache
def _offset(seed: int) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def _below(bound: int, sequences: int, offset: int) -> int:
    """The number of the first `sequences` points below `bound`: x mod RANGE < bound where these two floors differ."""
    return _floor_sum(sequences, offset) - _floor_sum(sequences, offset - bound)


def _floor_sum(count: int, offset: int) -> int:
    """Sum over i < count of floor((i * STEP + offset) / RANGE), by Euclid's algorithm on STEP and RANGE."""
    total, a, m = 0, STEP, RANGE
    while count > 0:
        total += (count - 1) * count // 2 * (a // m) + count * (offset // m)
        a, offset = a % m, offset % m
        largest = a * count + offset
        if largest < m:
            break
        count, a, m, offset = largest // m, m, a, largest % m
    return total
