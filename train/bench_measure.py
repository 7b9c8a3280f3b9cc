"""How the benchmarks measure: warm, repeated, on random data, with the spread beside the median."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from arch import ArchConfig, SizeConfig, from_dict

from .machine import ROOT

CONFIGS = ROOT / "configs"


def load_arch(name: str) -> ArchConfig:
    """`configs/arch/<name>.yaml`, read without OmegaConf, which a GPU machine may lack."""
    return from_dict(ArchConfig, yaml.safe_load((CONFIGS / "arch" / f"{name}.yaml").read_text()))


def load_size(name: str) -> SizeConfig:
    """`configs/size/<name>.yaml`, likewise. `1e-3`, without a point, is a string to YAML 1.1 and a number to us."""
    values = yaml.safe_load((CONFIGS / "size" / f"{name}.yaml").read_text())
    return from_dict(SizeConfig, {key: float(v) if isinstance(v, str) else v for key, v in values.items()})


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
