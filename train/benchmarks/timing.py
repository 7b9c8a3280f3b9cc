"""How the benchmarks measure: warm, repeated, on random data, with the spread beside the median."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def repeated(function: Callable[[], Any], device: torch.device, repeats: int, inner: int = 1) -> list[float]:
    """Seconds per call, `repeats` times, each over `inner` calls in a row; CUDA events where there is CUDA."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(inner):
                function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / inner)
        else:
            times.append(seconds(lambda: [function() for _ in range(inner)], device) / inner)
    return times


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def resident_bytes(field: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process; None where the system has no /proc."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
