"""Rotary embeddings whose frequencies are slowed down for longer contexts, without torch: by which rule, and how much.

linear  all, by `factor` (position interpolation, arXiv 2306.15595)
llama3  those that make fewer than `low` turns within `original` positions, by `factor`; more than `high`, not at all;
        between, the share of both is linear in the number of turns (Llama 3.1)
yarn    likewise, but linear in the index of the frequency, and cosines and sines are multiplied by `attention`
        (arXiv 2309.00071)
"""

import math
from dataclasses import dataclass

from .config import MAX_COUNT, RopeScalingConfig

# Turns of each rule, fewer than which are slowed down whole, and more than which are not.
TURNS = {"linear": (0.0, 0.0), "llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}


@dataclass(frozen=True)
class RopeScaling:
    """A rule with all of its numbers; config.RopeScalingConfig explains them."""

    rule: str
    factor: float
    original: int = 0
    low: float = 0.0
    high: float = 0.0
    attention: float = 1.0
    truncate: bool = True

    def ramp(self, dim: int, theta: float) -> tuple[float, float]:
        """Indices of the frequencies from which on yarn slows down, and from which on in whole, of tables of width
        `dim`."""

        def index(turns: float) -> float:
            return (dim * math.log(self.original / (turns * 2 * math.pi))) / (2 * math.log(theta))

        first, last = index(self.high), index(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        return first, last + 0.001 * (first == last)


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """Factor of cosines and sines that the paper of yarn recommends, whose logarithm is multiplied by `scale`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def resolve_rope_scaling(where: str, config: RopeScalingConfig, problems: list[str]) -> RopeScaling | None:
    """The rule with its defaults; None if there is none. Adds to `problems` what is wrong with it."""
    found: list[str] = []
    if config.rule not in TURNS:
        problems.append(f"{where}.rule is {config.rule!r}; it is {', '.join(list(TURNS)[:-1])} or {list(TURNS)[-1]}")
        return None
    numbers = {key: getattr(config, key) for key in ("factor", "low", "high", "attention")}
    found += [
        f"{where}.{key} is {value}; it must be positive and finite"
        for key, value in numbers.items()
        if value is not None and not 0 < value < math.inf
    ]
    used = {"linear": ("factor",), "llama3": ("factor", "low", "high", "original")}.get(config.rule)
    if used is not None:
        unused = {key: getattr(config, key) for key in (*numbers, "original", "truncate") if key not in used}
        found += [
            f"{where}.{key} is {value}; the rule {config.rule} has none: leave it out"
            for key, value in unused.items()
            if value is not None and value is not True
        ]
    if config.rule == "linear":
        problems += found
        return None if found else RopeScaling("linear", float(config.factor))
    if config.original is None or not 1 <= config.original <= MAX_COUNT:
        found.append(
            f"{where}.original is {config.original}; it must be the number of positions before, at most {MAX_COUNT:,}"
        )
    low, high = (default if own is None else float(own) for own, default in
                 zip((config.low, config.high), TURNS[config.rule], strict=True))  # fmt: skip
    if not low < high:
        found.append(f"{where}.low is {low:g}, and high {high:g}; it must be less")
    problems += found
    if found or config.original is None:
        return None
    attention = 1.0
    if config.rule == "yarn":
        attention = yarn_attention(config.factor) if config.attention is None else float(config.attention)
    return RopeScaling(config.rule, float(config.factor), config.original, low, high, attention, config.truncate)
