"""Parts of the GPU suite: what the machine can do, whether attention is right and fast, whether the tests pass."""

import functools
import importlib.util
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from eval.environment import ROOT
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.gpu_case import Case, Options
from train.benchmarks.timing import repeated, summary_stats

TESTS = 420  # seconds that the tests may take


def ceilings(options: Options) -> list[Case]:
    """The rates that the device reaches at best: products of random matrices, copies within its memory."""
    sizes = [64] if options.toy else [4096, 8192, 16384]

    def line(result: dict[str, Any]) -> str:
        return f"{result['tflops']['median']:.0f} TFLOP/s"

    products = [Case(f"matmul-bf16-{n}", 5, functools.partial(matmul, n, options), line) for n in sizes]
    return [*products, Case("copy", 5, lambda: copy(options), lambda r: f"{r['gb_per_second']['median']:.0f} GB/s")]


def matmul(n: int, options: Options) -> dict[str, Any]:
    a, b = (torch.randn(n, n, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    times = repeated(lambda: a @ b, options.device, repeats=7, inner=1 if options.toy else 10)
    return {"tflops": summary_stats([2 * n**3 / time / 1e12 for time in times])}


def copy(options: Options) -> dict[str, Any]:
    """Bytes read plus bytes written, 10^9 per second."""
    numbers = 2**12 if options.toy else 2**30
    source = torch.randn(numbers, device=options.device)
    target = torch.empty_like(source)
    times = repeated(lambda: target.copy_(source), options.device, repeats=7, inner=1 if options.toy else 5)
    return {"gb_per_second": summary_stats([2 * source.nbytes / time / 1e9 for time in times])}


def attention(options: Options) -> list[Case]:
    """Error against fp64 and speed of every backend, forward and backward: train/benchmarks/attention.py."""
    try:
        from train.benchmarks.attention import cases, run_case
    except ImportError as error:
        reason = f"train/benchmarks/attention.py cannot be imported: {error}"
        return [Case("backends", 1, functools.partial(_unavailable, reason), str)]
    chosen = cases(options.device.type)[: 3 if options.toy else None]
    return [Case(_key(case), 4, functools.partial(run_case, case), _short) for case in chosen]


def _key(case: Any) -> str:
    """The fields of the attention case, which identify it: `flex-gqa4-...`."""
    return "-".join(str(value).removeprefix("torch.") for value in asdict(case).values())


def _unavailable(reason: str) -> dict[str, Any]:
    raise UnavailableError(reason)


def _short(result: dict[str, Any]) -> str:
    figures = [f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float)]
    worst = max(result["error"], key=result["error"].get)
    return ", ".join([*figures, f"worst error {worst} {result['error'][worst]:.1e}"])


def tests(options: Options) -> list[Case]:
    """The repository's tests that need a GPU."""
    return [Case("pytest", 240, lambda: gpu_tests(options), lambda r: r["summary"])]


def gpu_tests(options: Options) -> dict[str, Any]:
    """Run them and return the outcome, failures included. Other files are not collected: their imports may be missing.

    Raises UnavailableError if pytest is not installed, RuntimeError with its output if it takes too long.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UnavailableError("pytest is not installed")
    files = [ROOT / "tests/test_house.py"] if options.toy else sorted((ROOT / "tests").glob("*_gpu.py"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        raise RuntimeError(f"stopped after {TESTS} s:\n{output[-20000:]}") from error
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    return {"exit_code": done.returncode, "summary": lines[-1], "output": (done.stdout + done.stderr)[-20000:]}
