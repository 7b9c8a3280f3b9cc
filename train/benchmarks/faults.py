"""Fault injection: `python train/benchmarks/faults.py [out=FOLDER]`.

Each fault hits a short run of train/pretrain.py, which is then resumed and must repeat the losses of an undisturbed
run, bit for bit (up to rounding on another number of processes). Writes every fault, whether the run survived it, and
how many steps had to be repeated.
"""

import csv
import glob
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from rich.progress import track
from rich.table import Table

from data.cli import parse
from data.presets import load
from eval.console import PlainConsole
from eval.environment import ROOT
from eval.outcome import run_script
from eval.results import write_result
from eval.runs import Run
from train import checkpoint
from train.datamodule import open_data

STEPS, SAVED_EVERY = 24, 5
RUN = [
    "+arch=mixattention", "+size=tiny", "size.num_layers=4", "size.d_model=64", "size.d_ff=128", "size.seq_len=64",
    "size.max_window=16", "batch_size=8", f"tokens={STEPS * 8 * 64}", "data.val_tokens=512", "logger=csv",
    "trainer.accelerator=cpu", "trainer.micro_batch=2", "trainer.log_every=1", "trainer.val_every=12",
    f"trainer.checkpoint_every={SAVED_EVERY}",
]  # fmt: skip


@dataclass(frozen=True)
class FaultsConfig:
    """Options.

    out  folder of faults.json
    """

    out: Path = ROOT / "docs" / "results" / "faults"


class FaultError(AssertionError):
    """A fault cost more than it may."""


@dataclass
class Outcome:
    """The cost of a fault.

    steps_lost  steps finished before the fault that had to be repeated
    error       largest relative difference of a loss to the undisturbed run's
    message     the line with which the run reported the fault
    """

    fault: str
    steps_lost: int
    error: float
    seconds: float
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, under the names that faults.json has."""
        result = asdict(self)
        result["said"] = result.pop("message")
        return result


class FaultRun:
    """A run in a folder, started any number of times, and the losses that it must have in the end."""

    def __init__(self, folder: Path, options: list[str]):
        self.folder, self.options = folder, options
        self.expected: dict[int, float] = {}

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start train/pretrain.py with nothing but `options`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTHONPATH"))}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train" / "pretrain.py"), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder.parent,
            env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def begin(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start the run from nothing."""
        return self.start(*RUN, *self.options, f"folder={self.folder}", *options, **environment)

    def end(self, process: subprocess.Popen[str], code: int) -> str:
        """Wait for the process, which must end with exit code `code`, and return its stderr."""
        stderr: str = process.communicate(timeout=200)[1]
        check(process.returncode == code, f"exit code {process.returncode}, not {code}: {stderr[-2000:]}")
        return stderr

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        """Wait until `step` has been logged."""
        while max(self.losses(), default=0) < step:
            check(process.poll() is None, f"ended before step {step}")
            time.sleep(0.005)

    def losses(self) -> dict[int, float]:
        """The logged training loss of every step."""
        losses: dict[int, float] = {}
        for path in sorted(self.folder.glob("metrics/*/metrics.csv"), key=lambda path: int(path.parent.name)):
            with path.open() as file:
                rows = [row for row in csv.DictReader(file) if row.get("train/loss") and row.get("step")]
            losses |= {int(row["step"]): float(row["train/loss"]) for row in rows}
        return losses

    def resume(self, *options: str) -> str:
        return self.end(self.start(f"resume={self.folder}", *options), 0)

    def finished(self, tolerance: float = 0.0) -> float:
        """Largest relative difference of a loss to the expected one. Raises FaultError if it exceeds `tolerance`."""
        losses = self.losses()
        check((self.folder / "summary.json").exists() and sorted(losses) == sorted(self.expected), "not all steps done")
        error = max(abs(losses[step] / loss - 1) for step, loss in self.expected.items())
        check(error <= tolerance, f"losses differ by {error:.1e}")
        return error


def check(condition: bool, message: str) -> None:
    if not condition:
        raise FaultError(message)


class Injected(NamedTuple):
    """The step that a run had finished when the fault hit, and its stderr; the caller resumes the run."""

    step: int
    stderr: str


Inject = Callable[[FaultRun], Injected]


def interrupted(run: FaultRun) -> Injected:
    process = run.begin()
    run.wait_for_step(process, 7)
    process.send_signal(signal.SIGINT)
    stderr = run.end(process, 130)
    return Injected(max(run.losses()), stderr)


def killed(step: int) -> Inject:
    def inject(run: FaultRun) -> Injected:
        process = run.begin()
        run.wait_for_step(process, step)
        process.kill()
        process.communicate()
        return Injected(max(run.losses()), "")

    return inject


def all_stopped(process: int) -> bool:
    """Tell whether all threads of a process stand still."""
    states = (path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{process}/task").glob("*/stat"))
    return all(state == "T" for state in states)


def killed_while_saving(run: FaultRun) -> Injected:
    """Kill the run while a file of a checkpoint is written in the background: stopped in the middle, it is there."""
    process = run.begin(ASYNC, "trainer.checkpoint_every=1")
    run.wait_for_step(process, 7)
    # Unlike Path.glob, this one does not mind a folder that goes away while it is read.
    written = partial(glob.glob, str(run.folder / "checkpoints" / "step-????????.partial" / "*.safetensors"))
    while True:
        check(process.poll() is None, "ended before it was caught while saving")
        if written():
            process.send_signal(signal.SIGSTOP)
            while not all_stopped(process.pid):
                time.sleep(0.001)
            if caught := written():
                break
            process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()
    unfinished = Path(caught[0]).parent
    check(unfinished.is_dir() and not unfinished.with_suffix("").exists(), f"{unfinished} was finished")
    return Injected(max(run.losses()), "")


def out_of_time(run: FaultRun) -> Injected:
    stderr = run.end(run.begin("trainer.max_hours=1e-9"), 0)
    check(not (run.folder / "summary.json").exists(), "went on to its end")
    return Injected(max(run.losses(), default=0), stderr)


def one_of_two_signalled(strategy: str, rank: int, *options: str) -> Inject:
    def inject(run: FaultRun) -> Injected:
        process = run.begin(f"trainer={strategy}", *options)
        run.wait_for_step(process, 7)
        others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if rank == 0 else int(others[0]), signal.SIGTERM)
        stderr = run.end(process, 0)
        return Injected(max(run.losses()), stderr)

    return inject


def stop(run: FaultRun) -> str:
    """Begin the run, stop it after step 7, and return its stderr."""
    process = run.begin()
    run.wait_for_step(process, 7)
    process.send_signal(signal.SIGTERM)
    return run.end(process, 0)


def stopped(run: FaultRun) -> Injected:
    stderr = stop(run)
    return Injected(max(run.losses()), stderr)


def damaged(damage: Callable[[Path], None]) -> Inject:
    """Stop the run, then damage its newest checkpoint."""

    def inject(run: FaultRun) -> Injected:
        stop(run)
        damage(next(checkpoint.checkpoints(run.folder)[0].glob("*.safetensors")))
        return Injected(max(run.losses()), "")

    return inject


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def disk_full(*options: str) -> Inject:
    """Limit the files of the process to 60 kB from step 7 on, so that the kernel refuses a checkpoint."""

    def inject(run: FaultRun) -> Injected:
        process = run.begin(*options)
        run.wait_for_step(process, 7)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        stderr = run.end(process, 1)
        check("cannot save" in stderr and "The last good checkpoint is" in stderr, stderr[-500:])
        check(not list(run.folder.glob("checkpoints/*.partial")), "half a checkpoint was left")
        return Injected(max(run.losses()), stderr)

    return inject


def diverged(*options: str) -> Inject:
    """Stop the run and resume it with settings that make it diverge."""

    def inject(run: FaultRun) -> Injected:
        stop(run)
        step = max(run.losses())
        stderr = run.end(run.start(f"resume={run.folder}", *options), 1)
        check("The last good checkpoint is" in stderr and "Traceback" not in stderr, stderr[-500:])
        return Injected(step, stderr)

    return inject


def shard_cut(run: FaultRun) -> Injected:
    """A shard of the training data is emptied, and restored before the run is resumed."""
    shard = next(Path(option.removeprefix("data.path=")) for option in run.options if "data.path=" in option)
    (path,) = shard.glob("train-*.bin")
    whole = path.read_bytes()
    process = run.begin()
    try:
        run.wait_for_step(process, 7)
        os.truncate(path, 0)
        stderr = run.end(process, 1)
    finally:
        path.write_bytes(whole)
    check(path.name in stderr and "The last good checkpoint is" in stderr, stderr[-500:])
    return Injected(max(run.losses()), stderr)


def no_wandb_server(run: FaultRun) -> Injected:
    server = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://localhost:9"}
    process = run.begin("logger=wandb", **server)
    stderr = run.end(process, 0)
    check("logging offline" in stderr, stderr[-500:])
    return Injected(STEPS, stderr)


@dataclass(frozen=True)
class Fault:
    """An injected fault and its permitted cost.

    most_lost  steps that may have to be repeated
    after      options on resuming
    tolerance  of losses, relative: another number of processes adds in another order
    """

    name: str
    inject: Inject
    most_lost: int = 0
    after: tuple[str, ...] = ()
    tolerance: float = 0.0


ONE = ("trainer.strategy=auto", "trainer.devices=1")
ASYNC = "trainer.checkpoint_async=true"
SOUND = ("optim.lr=3e-3", "optim.clip=1")
FAULTS = (
    Fault("SIGTERM", stopped),
    Fault("Ctrl-C", interrupted),
    Fault("SIGKILL before the first checkpoint", killed(2), most_lost=SAVED_EVERY),
    Fault("SIGKILL after step 9", killed(9), most_lost=SAVED_EVERY),
    Fault("SIGKILL after step 16", killed(16), most_lost=SAVED_EVERY),
    Fault("time is up", out_of_time, after=("trainer.max_hours=null",)),
    Fault("SIGTERM to the second of two processes, DDP; resumed by two", one_of_two_signalled("ddp", 1)),
    Fault("SIGTERM to the first of two processes, FSDP; resumed by two", one_of_two_signalled("fsdp", 0)),
    Fault(
        "SIGTERM to one of two processes that save in the background, FSDP; resumed by two",
        one_of_two_signalled("fsdp", 1, ASYNC),
    ),
    Fault("two processes, DDP; resumed by one", one_of_two_signalled("ddp", 1), after=ONE, tolerance=1e-5),
    Fault("two processes, FSDP; resumed by one", one_of_two_signalled("fsdp", 1), after=ONE, tolerance=1e-5),
    Fault("newest checkpoint altered", damaged(flip_a_byte), most_lost=SAVED_EVERY),
    Fault("newest checkpoint half written", damaged(cut_in_half), most_lost=SAVED_EVERY),
    Fault("disk full while saving", disk_full(), most_lost=SAVED_EVERY),
    Fault("disk full while saving in the background", disk_full(ASYNC), most_lost=SAVED_EVERY + 1),
    Fault("SIGKILL while saving in the background", killed_while_saving, most_lost=2),
    Fault("loss is not a number", diverged("optim.lr=1e30", "optim.clip=1e30"), after=SOUND),
    Fault("loss explodes", diverged("optim.lr=30", "optim.clip=1e9"), after=SOUND),
    Fault("a shard is cut while it is read", shard_cut),
    Fault("wandb cannot be reached", no_wandb_server),
)


def reference(run: FaultRun) -> dict[int, float]:
    """Train without a fault and return the losses."""
    run.end(run.begin(), 0)
    losses = run.losses()
    check(sorted(losses) == list(range(1, STEPS + 1)), "the undisturbed run did not end")
    return losses


def run_fault(fault: Fault, run: FaultRun) -> Outcome:
    """Inject the fault and resume the run. Raises FaultError if the fault costs more than it may."""
    began = time.perf_counter()
    step, stderr = fault.inject(run)
    if not (run.folder / "summary.json").exists():
        stderr += run.resume(*fault.after)
    error = run.finished(fault.tolerance or (1e-5 if "processes" in fault.name else 0.0))
    starts = Run(run.folder).starts
    lost = max(0, step - starts[-1]["from_step"]) if len(starts) > 1 else 0
    check(lost <= fault.most_lost, f"{lost} steps were lost")
    reports = ("error: ", "stopped after", "broken checkpoint", "wandb cannot")
    message = next((line for line in stderr.splitlines() if line.startswith(reports)), "")
    message = message.replace(str(run.folder), "RUN").replace(f"{run.folder.parent}/", "")
    return Outcome(fault.name, lost, error, round(time.perf_counter() - began, 1), message)


def main(out: Path) -> None:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        (data,) = open_data(load("stdlib", []))
        options = [f"data.path={shutil.copytree(data, Path(name) / 'data')}"]  # a fault damages it
        expected = reference(FaultRun(Path(name) / "alone", options))
        for number, fault in enumerate(track(FAULTS, "faults")):
            run = FaultRun(Path(name) / f"run{number}", options)
            run.expected = expected
            try:
                results.append(run_fault(fault, run).to_dict() | {"survived": True})
            except FaultError as reason:
                results.append({"fault": fault.name, "survived": False, "said": str(reason)})
    survived = sum(result["survived"] for result in results)
    write_result(out / "faults.json", {"tried": len(results), "survived": survived, "faults": results})
    table = Table(
        "fault", "survived", "steps lost", "largest difference", title=f"{survived} of {len(results)} survived"
    )
    for result in results:
        table.add_row(result["fault"], *(str(result.get(key, "")) for key in ("survived", "steps_lost", "error")))
    PlainConsole().print(table)
    sys.exit(0 if survived == len(results) else 1)


if __name__ == "__main__":
    run_script(lambda words: main(parse(FaultsConfig, words).out))
