"""OpenMP's wait policy: `python train/benchmarks/wait_policy.py [repeats=3] [tokens=65536] [out=FOLDER]`.

A short run of train/pretrain.py on the CPU under each policy of OpenMP's idle threads, alone on the machine and beside
as many busy processes as there are cores. `spin` is what OpenMP does unless told otherwise, `sleep` what this
repository sets. Runs take turns. Writes tokens/s of each, the median and all.
"""

import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.cli import TaskError, UsageError, parse
from data.cores import cores
from eval.environment import ROOT
from eval.outcome import run_script
from eval.results import write_result
from train.benchmarks.timing import summary_stats

# libgomp lets waiting threads look 300,000 times before they sleep where no policy is set (its manual, GOMP_SPINCOUNT).
POLICIES = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}}
RUN = [
    "+arch=cla2",
    "+size=tiny",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every=4",
    "data.val_tokens=512",
]


@dataclass(frozen=True)
class WaitPolicyConfig:
    """Options.

    repeats  runs of each policy, alone and beside others
    tokens   length of a run
    out      folder of wait_policy.json
    """

    repeats: int = 3
    tokens: int = 65536
    out: Path = ROOT / "docs" / "results" / "wait-policy-cpu"


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes busy with computing."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def tokens_per_second(policy: str, tokens: int) -> float:
    """Median over the reports of one run, the first left out. Raises TaskError if the run fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "train" / "pretrain.py"),
            *RUN,
            f"tokens={tokens}",
            f"folder={folder}/run",
        ]
        done = subprocess.run(command, env=environment | POLICIES[policy], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise TaskError(f"the run under {policy} failed:\n{done.stderr[-2000:]}")
        with (Path(folder) / "run" / "metrics" / "0" / "metrics.csv").open() as file:
            speeds = [row["train/tokens_per_second"] for row in csv.DictReader(file)]
        return statistics.median([float(speed) for speed in speeds if speed][1:])


def main(arguments: list[str]) -> None:
    options = parse(WaitPolicyConfig, arguments)
    if options.repeats < 1:
        raise UsageError(f"repeats is {options.repeats}; it must be at least 1")
    speeds: dict[str, list[float]] = {}
    for _, others, policy in product(range(options.repeats), (0, cores()), POLICIES):
        name = f"{policy}, {'beside ' + str(others) + ' busy processes' if others else 'alone'}"
        with busy(others):
            speeds.setdefault(name, []).append(tokens_per_second(policy, options.tokens))
        print(f"{name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    payload = {
        "run": RUN,
        "tokens": options.tokens,
        "cores": cores(),
        "policies": POLICIES,
        "tokens_per_second": {name: summary_stats(values) for name, values in speeds.items()},
    }
    path = options.out / "wait_policy.json"
    write_result(path, payload)
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
