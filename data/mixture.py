"""Several corpora in fixed proportions."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError
from .shards import TokenWindows

M = 2**64
STEP = 0x9E3779B97F4A7C15  # M divided by the golden ratio, odd: multiples of it fill [0, M) most evenly


@dataclass(frozen=True)
class Mixture:
    """Which corpus a training sequence comes from: a pure function of its number and the seed, in exact proportion.

    Sequence g is the point (g * STEP + seed's offset) mod M, and each corpus owns an interval of [0, M) as long as its
    share. The points of any stretch are spread evenly (a Weyl sequence), so that each corpus' count stays within a few
    sequences of its share; over M sequences it is the share exactly, to 1/M.
    """

    corpora: tuple[TokenWindows, ...]
    weights: tuple[float, ...]

    @property
    def seq_len(self) -> int:
        return self.corpora[0].seq_len

    @cached_property
    def bounds(self) -> list[int]:
        """Where the corpora's intervals begin and end."""
        shares = [0.0, *accumulate(weight / sum(self.weights) for weight in self.weights)]
        return [*(round(share * M) for share in shares[:-1]), M]

    def locate(self, sequence: int, seed: int) -> tuple[int, int]:
        """(corpus, how many sequences before this one are of that corpus)."""
        if len(self.corpora) == 1:
            return 0, sequence
        offset = _offset(seed)
        point = (sequence * STEP + offset) % M
        corpus = next(number for number, bound in enumerate(self.bounds[1:]) if point < bound)
        low, high = (_below(bound, sequence, offset) for bound in self.bounds[corpus : corpus + 2])
        return corpus, high - low


@dataclass(frozen=True)
class EvalWindows:
    """Validation windows of several corpora: (corpus, window) each, one corpus after the other."""

    corpora: tuple[TokenWindows, ...]
    chosen: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, mixture: Mixture, num_windows: int) -> "EvalWindows":
        """About `num_windows` in the mixture's proportion, at least one of each corpus, at most what it has, spread."""
        chosen = []
        for number, corpus in enumerate(mixture.corpora):
            share = mixture.weights[number] / sum(mixture.weights)
            count = min(len(corpus), max(1, round(num_windows * share)))
            spread = np.linspace(0, len(corpus) - 1, count).round().astype(int)
            chosen += [(number, window) for window in spread.tolist()]
        return cls(mixture.corpora, tuple(chosen))

    @property
    def seq_len(self) -> int:
        return self.corpora[0].seq_len

    @property
    def end_of_text(self) -> int:
        return self.corpora[0].end_of_text

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        corpus, window = self.chosen[index]
        return self.corpora[corpus][window]


def weights_of(mix: Any) -> dict[str, float]:
    """`data.mix` with its weights as numbers. Raises DataError where it is something else."""
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
    """How many of the first `sequences` points are below `bound`: x mod M < bound where the floors below differ."""
    return _floor_sum(sequences, offset) - _floor_sum(sequences, offset - bound)


def _floor_sum(count: int, offset: int) -> int:
    """Sum over i < count of floor((i * STEP + offset) / M), by Euclid's algorithm on STEP and M."""
    total, a, m = 0, STEP, M
    while count > 0:
        total += (count - 1) * count // 2 * (a // m) + count * (offset // m)
        a, offset = a % m, offset % m
        largest = a * count + offset
        if largest < m:
            break
        count, a, m, offset = largest // m, m, a, largest % m
    return total
