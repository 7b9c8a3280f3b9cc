"""The timer of the benchmarks: calls are warm, repeated, and summarised by their median and range."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from train.device import synchronize

T = TypeVar("T")
Series = dict[str, list[float]]  # one number per round, for each competitor
CPU = torch.device("cpu")


def timed(function: Callable[[], T], device: torch.device = CPU) -> tuple[T, float]:
    """The result of one call and its wall time, including the work it queues on the device."""
    synchronize(device)
    begin = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - begin


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The wall time of one call, as `timed`."""
    return timed(function, device)[1]


def repeated(
    function: Callable[[], Any], device: torch.device, repeats: int, inner: int = 1, warmup: int = 2
) -> list[float]:
    """Seconds per call, measured `repeats` times over `inner` calls in a row, after `warmup` calls.

    On CUDA the device's own events measure.
    """
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(inner):
                function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / inner)
        else:
            times.append(seconds(lambda: [function() for _ in range(inner)], device) / inner)
    return times


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median over 20 calls after 3; on a CPU, over 3 after 1."""
    warmup, repeats = (3, 20) if device.type == "cuda" else (1, 3)
    return 1e3 * statistics.median(repeated(function, device, repeats, warmup=warmup))


class Turns(NamedTuple):
    """Wall seconds, and CPU seconds of all threads of this process, of each competitor's calls."""

    seconds: Series
    cpu_seconds: Series


def take_turns(calls: Mapping[str, Callable[[int], Any]], repeats: int, warmup: int) -> Turns:
    """Time `repeats` rounds, after `warmup` untimed ones, in which every competitor is called once.

    Whatever else the machine does then meets all of them; the first of a round changes. A call is given the number of
    its round, from 0 on.
    """
    names = list(calls)
    turns = Turns({name: [] for name in names}, {name: [] for name in names})
    for number in range(warmup + repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begin, worked = time.perf_counter(), time.process_time()
            calls[name](number)
            if number >= warmup:
                turns.seconds[name].append(time.perf_counter() - begin)
                turns.cpu_seconds[name].append(time.process_time() - worked)
    return turns


def time_ratios(turns: Turns, numerator: str, denominator: str) -> dict[str, Any]:
    """The ratio of two competitors' median times and of their times by round, by the clock and in CPU seconds."""
    found: dict[str, Any] = {}
    for name, series in (("speed", turns.seconds), ("cpu", turns.cpu_seconds)):
        over, under = series[numerator], series[denominator]
        found[name] = statistics.median(over) / statistics.median(under)
        found[f"{name}_by_round"] = summary_stats([a / b for a, b in zip(over, under, strict=True)])
    return found


def summary_stats(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}
