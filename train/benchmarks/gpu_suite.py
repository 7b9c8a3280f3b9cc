"""Measurements on a GPU: `python train/benchmarks/gpu_suite.py [parts=A,B] [minutes=N] [key=value ...]`.

Runs the parts in the order of their worth, each in a process of its own, and writes `<out>/<part>.json` after every
case. A suite that was stopped, killed or ran out of `minutes` continues with what is missing when it is started again.
At the end it prints what was measured of training beside its roof and its goal, and writes that to `<out>/training.md`.

Needs torch, einops, numpy and PyYAML; what needs more is skipped with the reason. Without CUDA it says so and ends.
"""

import gc
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()
    import train  # noqa: F401  before torch

import torch

from data.cli import UsageError, did_you_mean, parse
from data.files import write_json, write_text
from eval.environment import ROOT, driver
from eval.outcome import run_script
from eval.results import envelope
from train.benchmarks import gpu_checks, gpu_decode, gpu_study, gpu_train
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.gpu_case import Case, Options

PARTS = {
    "ceilings": gpu_checks.ceilings,
    "train_1b": gpu_train.train_1b,
    "tests": gpu_checks.tests,
    "attention": gpu_checks.attention,
    "decode": gpu_decode.decode,
    "decode_steps": gpu_decode.decode_steps,
    "train_1b_8k": gpu_train.train_1b_8k,
    "train_3b": gpu_train.train_3b,
    "study": gpu_study.study,
    "train_3b_8k": gpu_train.train_3b_8k,
}
GRACE = 60.0  # seconds that a part may take beyond its time before it is stopped


@dataclass(frozen=True)
class SuiteConfig:
    """Options.

    parts         which parts, in which order
    out           folder of results; null: docs/results/gpu-<device>
    minutes       begin nothing that is not expected to end by then
    part_minutes  the same for each part, which is stopped a minute later
    data          prepared token shards for the study; null: the standard library's source, prepared now
    git           revision to record where there is no git checkout
    toy           shapes of a test, on any device
    child         run the parts in this process
    """

    parts: tuple[str, ...] = tuple(PARTS)
    out: Path | None = None
    minutes: float = math.inf
    part_minutes: float = 8
    data: Path | None = None
    git: str | None = None
    toy: bool = False
    child: bool = False

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        if self.toy:
            return ROOT / "runs" / "gpu-toy"
        return ROOT / "docs" / "results" / f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}"


def check(config: SuiteConfig) -> None:
    """Raise UsageError for a part that does not exist and for a time that is not positive."""
    unknown = [part for part in config.parts if part not in PARTS]
    if unknown or not config.parts:
        near = did_you_mean(unknown[0], list(PARTS)).rstrip(".") if unknown else ""
        raise UsageError(f"parts= has no {', '.join(unknown) or 'entry'}{near or ';'} choose {', '.join(PARTS)}")
    for key in ("minutes", "part_minutes"):
        if not getattr(config, key) > 0:
            raise UsageError(f"{key} is {getattr(config, key)}; it is a positive number")


def main(arguments: Sequence[str]) -> int:
    """Run the suite. Returns the exit status: 0, or 1 if something failed. Raises UsageError."""
    config = parse(SuiteConfig, arguments)
    check(config)
    if not torch.cuda.is_available() and not config.toy:
        print("no CUDA device: nothing to measure (toy=true runs every part at the shapes of a test)")
        return 0
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.child:
        return max([run_part(part, config) for part in config.parts])
    deadline = time.monotonic() + 60 * config.minutes
    status = 0
    for part in config.parts:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{part}: no time left; start the suite again to go on")
            continue
        status = max(status, start_part(part, config, min(left, 60 * config.part_minutes)))
    show_training(config.folder)
    print(f"results: {config.folder}")
    return status


def start_part(part: str, config: SuiteConfig, allowed: float) -> int:
    """Run a part in a process of its own: a crash, or a device error that sticks, ends that part alone."""
    command = [sys.executable, str(Path(__file__).resolve()), f"parts={part}", f"out={config.folder}", "child=true"]
    command += [f"part_minutes={allowed / 60}", f"toy={str(config.toy).lower()}"]
    command += [f"{key}={value}" for key, value in (("data", config.data), ("git", config.git)) if value is not None]
    try:
        return 0 if subprocess.run(command, timeout=allowed + GRACE).returncode == 0 else 1
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped {GRACE:.0f} s after its time; what it had finished is kept")
        return 1


def show_training(folder: Path) -> None:
    """Print what is measured of training so far as a table, and write it beside the results."""
    lines = [table for part in PARTS if (table := gpu_train.table(part, read_part(folder / f"{part}.json")))]
    if lines:
        text = "\n\n".join(lines) + "\n"
        write_text(folder / "training.md", text)
        print(f"\n{text}", end="")


def read_part(path: Path) -> dict[str, Any]:
    """The results of a part so far."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"starts": [], "cases": {}}
    return result


def run_part(part: str, config: SuiteConfig) -> int:
    """Run every case of the part that has no result yet and fits into the time. Returns 1 if one failed, else 0."""
    path = config.folder / f"{part}.json"
    result = read_part(path)
    git = {"git": config.git} if config.git else {}
    result["starts"].append(envelope() | {"driver": driver()} | git)
    options = Options(config.toy, config.data)
    died_in = result.get("running")  # the process before this one; whatever did that now comes last
    result |= {"failed": {}, "skipped": {}, "left": [], "running": None}
    deadline = time.monotonic() + 60 * config.part_minutes
    for case in sorted(PARTS[part](options), key=lambda case: case.key == died_in):
        if case.key in result["cases"]:
            continue
        if time.monotonic() + case.seconds > deadline:
            result["left"].append(case.key)
            continue
        write_json(path, result | {"running": case.key})
        run_case(part, case, result)
    write_json(path, result)
    if result["left"]:
        print(f"{part}: no time for {', '.join(result['left'])}; start the suite again to go on")
    return 1 if result["failed"] else 0


def run_case(part: str, case: Case, result: dict[str, Any]) -> None:
    """Run one case and store the outcome in `result`: a failure with its traceback, to be retried by the next start."""
    begin = time.monotonic()
    try:
        value = case.run()
        result["cases"][case.key] = value | {"start": len(result["starts"]) - 1, "took": time.monotonic() - begin}
        print(f"{part}/{case.key}: {case.line(value)}  [{time.monotonic() - begin:.0f} s]", flush=True)
    except UnavailableError as error:
        result["skipped"][case.key] = str(error)
        print(f"{part}/{case.key}: skipped, {error}", flush=True)
    except Exception as error:  # one broken case must not cost the others their time on the device
        result["failed"][case.key] = traceback.format_exc()
        print(f"{part}/{case.key}: FAILED, {type(error).__name__}: {str(error)[:300]}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_script(lambda words: sys.exit(main(words)))
