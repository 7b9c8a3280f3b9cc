"""Make a layout comparable with multi-head attention: `match=params`, `flops` or `kv`.

params  parameters: the width of the MLP, size.d_ff, is adjusted
flops   training FLOPs per token at size.seq_len: size.d_ff is adjusted
kv      bytes of cache stored at `context` tokens: the width of a head, size.head_dim, is adjusted

The remaining difference is reported: widths are multiples of GRANULARITY, and heads have a width that can be rotated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from arch import LayoutError, ModelConfig, SizeConfig, resolve
from arch.config import head_dim
from arch.footprint import kv_bytes, num_params, train_flops_per_token
from arch.named import load_arch
from eval.units import bytes_text, count_text
from train.schema import PretrainConfig

BASELINE = "mha"
GRANULARITY = 8  # of d_ff: what matrix units of GPUs divide without a rest
HEAD_GRANULARITY = 2  # of head_dim: rotary embeddings turn pairs
MAX_FACTOR = 64  # between the width of a layout and that of its size
KEYS = {"params": "d_ff", "flops": "d_ff", "kv": "head_dim"}


@dataclass(frozen=True)
class Match:
    """A size whose `key` is `width` in place of `was`, and the two figures that it was chosen to make equal."""

    match: str
    key: str
    was: int
    width: int
    value: float
    target: float

    @property
    def off(self) -> float:
        """The figure relative to the baseline's, minus 1."""
        return self.value / self.target - 1

    def __str__(self) -> str:
        of = {"params": "parameters", "flops": "training FLOPs per token", "kv": "KV bytes"}[self.match]
        text = bytes_text if self.match == "kv" else count_text
        return (
            f"match={self.match}: size.{self.key} {self.width:,} (was {self.was:,}): {text(round(self.value))} {of}, "
            f"{BASELINE} has {text(round(self.target))} ({self.off:+.2%})"
        )


def find_match(
    model: ModelConfig, match: str, context: int, baseline: SizeConfig | None = None
) -> tuple[ModelConfig, Match]:
    """Return `model` with the width at which its figure is nearest to that of multi-head attention at the size
    `baseline`; None: at its own.

    Raises LayoutError if no width that the layout can have brings it within the granularity of that.
    """
    key = KEYS[match]
    figure = _figure(match, context)
    target = figure(ModelConfig(load_arch(BASELINE), baseline or model.size))
    was = head_dim(model.size) if key == "head_dim" else model.size.d_ff
    step = HEAD_GRANULARITY if key == "head_dim" else GRANULARITY

    def at(width: int) -> float | None:
        try:
            return figure(_with(model, key, width))
        except LayoutError:
            return None

    def admitted(number: int, direction: int) -> int | None:
        """The first width from `number` steps on, in that direction, that the layout can have; in steps."""
        while 1 <= number <= last:
            if at(number * step) is not None:
                return number
            number += direction
        return None

    # Every figure rises with the width: bisect among the widths that the layout can have.
    last = MAX_FACTOR * max(was, step) // step
    low, high = admitted(1, 1), admitted(last, -1)
    if low is None or high is None:
        raise LayoutError([f"match={match}: the layout can have no size.{key}; choose another match"])
    ends = low * step, high * step
    while (middle := admitted((low + high) // 2, -1) or 0) > low or (
        middle := admitted((low + high) // 2 + 1, 1) or high
    ) < high:
        value = at(middle * step)
        assert value is not None
        low, high = (middle, high) if value <= target else (low, middle)
    values = {number * step: value for number in (low, high) if (value := at(number * step)) is not None}
    width = min(values, key=lambda width: abs(values[width] - target))
    found = Match(match, key, was, width, values[width], target)
    if width in ends and abs(found.off) > 0.01:
        raise LayoutError([f"{found}: no width brings it nearer; choose another match"])
    return _with(model, key, width), found


def _with(model: ModelConfig, key: str, width: int) -> ModelConfig:
    changes: dict[str, Any] = {key: width}
    return ModelConfig(model.arch, replace(model.size, **changes))


def _figure(match: str, context: int) -> Callable[[ModelConfig], float]:
    def figure(model: ModelConfig) -> float:
        plan = resolve(model)
        if match == "params":
            return float(num_params(model, plan))
        if match == "flops":
            return train_flops_per_token(model, plan)
        return float(kv_bytes(plan, context).stored)

    return figure


def matched(config: PretrainConfig) -> tuple[PretrainConfig, Match | None]:
    """Return `config` with the size that its `match` asks for, and what was found; None if it is `none`."""
    if config.match == "none":
        return config, None
    model, found = find_match(config.model, config.match, config.context)
    return replace(config, size=model.size), found
