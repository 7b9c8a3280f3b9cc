"""Intervals of 95 %: of shares that are counted, and of means of paired differences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # quantile of the normal distribution for an interval of 95 %
# The same of Student's t, by degrees of freedom from 1 on.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
SIGNS = 6  # that differences of a mean of 0 all have one sign has by chance less than 5 %: 2 * 0.5**SIGNS
BETTER, WORSE, UNDECIDED = "better", "worse", "not told apart"


def student(freedom: int) -> float:
    """The quantile of Student's t for an interval of 95 %, to three decimals: beyond the table by its expansion in
    1 / `freedom` (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z, f = Z95, float(freedom)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / f**3
    return z + (z**3 + z) / 4 / f + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / f**2 + third


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, with the interval of Student's t; `half` None: they do not tell their spread."""

    mean: float
    half: float | None
    pairs: int

    @property
    def verdict(self) -> str:
        """Verdict on a difference of losses, of which the lower is the better."""
        if self.half is None or abs(self.mean) <= self.half:
            return UNDECIDED
        return BETTER if self.mean < 0 else WORSE


def interval(differences: Sequence[float]) -> Interval:
    """Interval of `differences`, of which there is at least one.

    Differences that are all equal, up to rounding, as those of counts can be, have no spread to estimate an interval
    from. Fewer than SIGNS of them, like one, get none; of more the signs alone tell that the mean is not 0.
    """
    count, mean = len(differences), statistics.fmean(differences)
    spread = statistics.stdev(differences) if count > 1 else 0.0
    if count < SIGNS and spread <= 1e-9 * abs(mean):
        return Interval(mean, None, count)
    return Interval(mean, student(count - 1) * spread / math.sqrt(count), count)


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's interval, 95 %, of the share that `right` of `total` independent trials estimate; (0, 1) of none."""
    if total == 0:
        return 0.0, 1.0
    share, weight = right / total, Z95**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z95 * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return (middle - half if right > 0 else 0.0), (middle + half if right < total else 1.0)


def counted_share(right: float, total: int) -> dict[str, float | int | None]:
    """The entries of a row that give a share: itself (None of no trials), its interval, and the number of trials."""
    low, high = wilson(right, total)
    return {"share": right / total if total else None, "low": low, "high": high, "count": total}
