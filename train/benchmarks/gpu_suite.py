"""Measurements on a GPU.

`python train/benchmarks/gpu_suite.py [parts=A,B] [out=FOLDER] [minutes=N] [data=FOLDER] [git=HASH]`

Runs the parts in the order of their worth, each in a process of its own, and writes `<out>/<part>.json` after every
case. A suite that was stopped, killed or ran out of `minutes` goes on with what is missing when it is started again.

  parts         which ones, in which order (default: all; `--help` lists them)
  out           default: docs/results/gpu-<device>
  minutes       begin nothing that is not expected to end by then
  part_minutes  the same for each part, which is stopped a minute later
  data          prepared token shards for the study (default: the standard library's source, prepared now)
  git           revision to record where there is no git checkout
  toy           true: shapes of a test, on any device

Needs torch, einops, numpy and PyYAML; what needs more is skipped with the reason. Without CUDA it says so and ends.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data.files import write_json
from eval.environment import ROOT, driver, environment
from train.benchmarks import gpu_checks, gpu_decode, gpu_study, gpu_train
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.gpu_case import Case, Options

PARTS = {
    "ceilings": gpu_checks.ceilings,
    "train_1b": gpu_train.train_1b,
    "tests": gpu_checks.tests,
    "attention": gpu_checks.attention,
    "decode": gpu_decode.decode,
    "train_1b_8k": gpu_train.train_1b_8k,
    "train_3b": gpu_train.train_3b,
    "study": gpu_study.study,
    "train_3b_8k": gpu_train.train_3b_8k,
}
GRACE = 60.0  # seconds that a part may take beyond its time before it is stopped


@dataclass(frozen=True)
class Request:
    """The command line."""

    parts: tuple[str, ...]
    out: Path
    minutes: float
    part_minutes: float
    options: Options
    git: str | None
    child: bool  # this process runs its parts itself


def parse(arguments: Sequence[str]) -> Request:
    """Raises ValueError on an argument that is not one of the module's."""
    given = {"parts": ",".join(PARTS), "out": "", "minutes": "inf", "part_minutes": "8", "data": "", "git": ""}
    given |= {"toy": "false", "child": "false"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given or not value:
            raise ValueError(f"cannot read {argument!r}; write key=value with a key of {', '.join(given)}")
        given[key] = value
    parts = tuple(given["parts"].split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts= has no {', '.join(unknown)}; choose {', '.join(PARTS)}")
    for key in ("minutes", "part_minutes"):
        try:
            positive = float(given[key]) > 0
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"{key} is {given[key]}; it is a positive number")
    for key in ("toy", "child"):
        if given[key] not in ("true", "false"):
            raise ValueError(f"{key} is {given[key]}; it is true or false")
    toy = given["toy"] == "true"
    name = "toy" if toy else torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else ""
    return Request(
        parts,
        Path(given["out"] or (ROOT / ("runs" if toy else "docs/results") / f"gpu-{name}")),
        float(given["minutes"]),
        float(given["part_minutes"]),
        Options(toy, Path(given["data"]) if given["data"] else None),
        given["git"] or None,
        given["child"] == "true",
    )


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, 1 where something failed, 2 for a mistake on the command line."""
    if set(arguments) & {"-h", "--help"}:
        print(f"{__doc__}\nParts: {', '.join(PARTS)}")
        return 0
    try:
        request = parse(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not request.options.toy:
        print("no CUDA device: nothing to measure (toy=true runs every part at the shapes of a test)")
        return 0
    request.out.mkdir(parents=True, exist_ok=True)
    if request.child:
        return max([run_part(part, request) for part in request.parts])
    deadline = time.monotonic() + 60 * request.minutes
    status = 0
    for part in request.parts:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{part}: no time left; start the suite again to go on")
            continue
        status = max(status, start_part(part, request, arguments, min(left, 60 * request.part_minutes)))
    print(f"results: {request.out}")
    return status


def start_part(part: str, request: Request, arguments: Sequence[str], allowed: float) -> int:
    """Run a part in a process of its own: a crash, or a device error that sticks, ends that part alone."""
    keys = ("parts=", "minutes=", "part_minutes=", "out=")
    kept = [argument for argument in arguments if not argument.startswith(keys)]
    command = [sys.executable, str(Path(__file__).resolve()), *kept, f"parts={part}", f"out={request.out}"]
    command += [f"part_minutes={allowed / 60}", "child=true"]
    try:
        return 0 if subprocess.run(command, timeout=allowed + GRACE).returncode == 0 else 1
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped {GRACE:.0f} s after its time; what it had finished is kept")
        return 1


def run_part(part: str, request: Request) -> int:
    """Every case of the part that has no result yet and fits into the time. Returns 1 if one failed."""
    path = request.out / f"{part}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"starts": [], "cases": {}}
    started = environment() | {"driver": driver(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    result["starts"].append(started | ({"git": request.git} if request.git else {}))
    died_in = result.get("running")  # the process before this one; whatever did that now comes last
    result |= {"failed": {}, "skipped": {}, "left": [], "running": None}
    deadline = time.monotonic() + 60 * request.part_minutes
    for case in sorted(PARTS[part](request.options), key=lambda case: case.key == died_in):
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
    """Put the outcome into `result`: a failure is kept with its traceback and tried again by the next start."""
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
    sys.exit(main(sys.argv[1:]))
