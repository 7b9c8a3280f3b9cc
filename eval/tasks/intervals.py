"""Shares that are counted, with their intervals."""

import math

Z95 = 1.959963984540054  # quantile of the normal distribution for an interval of 95 %


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
