"""Peak memory of a training step on the CPU, each model in a process of its own."""

import contextlib
import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from arch import ModelConfig
from train.benchmarks.baselines import BUILDERS, Step, random_batch

STEPS = 2  # the optimizer's state is made in the first


def peak_memory(name: str, config: ModelConfig, batch: int) -> dict[str, int | None]:
    """Peak bytes of building a model and taking two steps, in a new process.

    allocated  the most that torch's CPU allocator had handed out at one time: weights, gradients, optimizer state,
               activations, but nothing that libraries allocate themselves
    resident   the largest resident set, less that after all imports; None on a system without /proc
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, torch.get_num_threads(), name, config, batch).result()


def _measure(threads: int, name: str, config: ModelConfig, batch: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    BUILDERS[name](config, torch.device("meta"), False)  # imports what building imports
    before = resident_bytes("VmRSS")
    _train(name, config, batch)
    peak = resident_bytes("VmHWM")
    gc.collect()
    return {
        "allocated": _allocated(name, config, batch),
        "resident": None if peak is None or before is None else peak - before,
    }


def _train(name: str, config: ModelConfig, batch: int) -> None:
    device = torch.device("cpu")
    step = Step(BUILDERS[name](config, device, False), contextlib.nullcontext)
    for seed in range(STEPS):
        step(*random_batch(config.size.vocab_size, batch, config.size.seq_len, device, seed))


def _allocated(name: str, config: ModelConfig, batch: int) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _train(name, config, batch)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def resident_bytes(field: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process; None on a system without /proc."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
