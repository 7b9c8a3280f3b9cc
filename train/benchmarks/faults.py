"""What a run survives: `python train/benchmarks/faults.py [out=docs/results/faults]`.

Each fault hits a short run of the command itself, which is then resumed and must repeat the losses of a run that was
left alone, bit for bit (up to rounding on another number of processes). Writes what was tried, whether it was survived,
and how many steps had to be done again.
"""

import csv
import json
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
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.files import write_json
from data.presets import load
from eval.environment import environment
from train import checkpoint
from train.datamodule import open_data

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED_EVERY = 24, 5
RUN = [
    "+arch=mixattention", "+size=tiny", "size.num_layers=4", "size.d_model=64", "size.d_ff=128", "size.seq_len=64",
    "size.max_window=16", "batch_size=8", f"tokens={STEPS * 8 * 64}", "data.val_tokens=512", "logger=csv",
    "trainer.accelerator=cpu", "trainer.micro_batch=1", "trainer.log_every=1", "trainer.val_every=12",
    f"trainer.checkpoint_every={SAVED_EVERY}",
]  # fmt: skip


class FaultError(AssertionError):
    """The fault cost more than it may."""


@dataclass
class Outcome:
    """`steps_lost`: steps done before the fault that had to be done again. `error`: largest relative difference of a
    loss to the run that was left alone."""

    fault: str
    steps_lost: int
    error: float
    seconds: float
    said: str


class Scene:
    """Runs of one configuration in a folder, and the losses that each of them must have."""

    def __init__(self, folder: Path, options: list[str]):
        self.folder, self.options = folder, options
        self.expected: dict[int, float] = {}

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        """The command, in the run folder `self.folder`."""
        known = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTHONPATH"))}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train" / "pretrain.py"), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder.parent,
            env=known | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def begin(self, *options: str, **environment: str) -> subprocess.Popen:
        return self.start(*RUN, *self.options, f"folder={self.folder}", *options, **environment)

    def end(self, process: subprocess.Popen, code: int) -> str:
        """What the process said at its end, which must come with exit code `code`."""
        errors = process.communicate(timeout=200)[1]
        check(process.returncode == code, f"exit code {process.returncode}, not {code}: {errors[-2000:]}")
        return errors

    def reached(self, process: subprocess.Popen, step: int) -> None:
        """Wait until `step` has been logged."""
        while max(self.losses(), default=0) < step:
            check(process.poll() is None, f"ended before step {step}")
            time.sleep(0.005)

    def losses(self) -> dict[int, float]:
        found = {}
        for path in sorted(self.folder.glob("metrics/*/metrics.csv"), key=lambda path: int(path.parent.name)):
            with path.open() as file:
                rows = [row for row in csv.DictReader(file) if row.get("train/loss") and row.get("step")]
            found |= {int(row["step"]): float(row["train/loss"]) for row in rows}
        return found

    def resume(self, *options: str) -> str:
        return self.end(self.start(f"resume={self.folder}", *options), 0)

    def finished(self, tolerance: float = 0.0) -> float:
        """Largest relative difference of a loss to what it must be. Raises FaultError beyond `tolerance`."""
        losses = self.losses()
        check((self.folder / "summary.json").exists() and sorted(losses) == sorted(self.expected), "not all steps done")
        error = max(abs(losses[step] / loss - 1) for step, loss in self.expected.items())
        check(error <= tolerance, f"losses differ by {error:.1e}")
        return error

    def saved(self) -> int:
        folders = checkpoint.checkpoints(self.folder)
        return checkpoint.step_of(folders[0]) if folders else 0


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise FaultError(otherwise)


# Hits the run of a scene and returns the steps done by then and what the run said about it; the caller resumes the run.
Hit = Callable[[Scene], tuple[int, str]]


def signalled(number: signal.Signals, code: int) -> Hit:
    def hit(scene: Scene) -> tuple[int, str]:
        process = scene.begin()
        scene.reached(process, 7)
        process.send_signal(number)
        said = scene.end(process, code)
        return max(scene.losses()), said

    return hit


def killed(step: int) -> Hit:
    def hit(scene: Scene) -> tuple[int, str]:
        process = scene.begin()
        scene.reached(process, step)
        process.kill()
        process.communicate()
        return max(scene.losses()), ""

    return hit


def out_of_time(scene: Scene) -> tuple[int, str]:
    said = scene.end(scene.begin("trainer.max_hours=0.0004"), 0)
    return max(scene.losses(), default=0), said


def one_of_two_signalled(strategy: str, rank: int) -> Hit:
    def hit(scene: Scene) -> tuple[int, str]:
        process = scene.begin(f"trainer={strategy}")
        scene.reached(process, 7)
        others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if rank == 0 else int(others[0]), signal.SIGTERM)
        said = scene.end(process, 0)
        return max(scene.losses()), said

    return hit


def damaged(damage: Callable[[Path], None]) -> Hit:
    """A stopped run, whose newest checkpoint is then damaged."""

    def hit(scene: Scene) -> tuple[int, str]:
        process = scene.begin()
        scene.reached(process, 7)
        process.send_signal(signal.SIGTERM)
        scene.end(process, 0)
        damage(next(checkpoint.checkpoints(scene.folder)[0].glob("*.safetensors")))
        return max(scene.losses()), ""

    return hit


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def disk_full(scene: Scene) -> tuple[int, str]:
    """The kernel refuses to write more than a few hundred bytes of any file of the process, from step 7 on."""
    process = scene.begin()
    scene.reached(process, 7)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    said = scene.end(process, 1)
    check("cannot save" in said and "The last good checkpoint is" in said, said[-500:])
    check(not list(scene.folder.glob("checkpoints/*.partial")), "half a checkpoint was left")
    return max(scene.losses()), said


def diverged(*options: str) -> Hit:
    """A stopped run goes on with settings that cannot end well, and then with its own."""

    def hit(scene: Scene) -> tuple[int, str]:
        process = scene.begin()
        scene.reached(process, 7)
        process.send_signal(signal.SIGTERM)
        scene.end(process, 0)
        done = max(scene.losses())
        said = scene.end(scene.start(f"resume={scene.folder}", *options), 1)
        check("The last good checkpoint is" in said and "Traceback" not in said, said[-500:])
        return done, said

    return hit


def shard_cut(scene: Scene) -> tuple[int, str]:
    """A shard of the training data loses its second half, and gets it back before the run is resumed."""
    shard = next(Path(option.removeprefix("data.path=")) for option in scene.options if "data.path=" in option)
    (path,) = shard.glob("train-*.bin")
    whole = path.read_bytes()
    process = scene.begin()
    try:
        scene.reached(process, 7)
        os.truncate(path, 0)
        said = scene.end(process, 1)
    finally:
        path.write_bytes(whole)
    check(path.name in said and "The last good checkpoint is" in said, said[-500:])
    return max(scene.losses()), said


def no_wandb_server(scene: Scene) -> tuple[int, str]:
    server = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://localhost:9"}
    process = scene.begin("logger=wandb", **server)
    said = scene.end(process, 0)
    check("logging offline" in said, said[-500:])
    return STEPS, said


@dataclass(frozen=True)
class Fault:
    """`after`: options on resuming. `tolerance`: relative, where another number of processes adds in another order."""

    name: str
    hit: Hit
    most_lost: int = 0
    after: tuple[str, ...] = ()
    tolerance: float = 0.0


ONE = ("trainer.strategy=auto", "trainer.devices=1")
SOUND = ("optim.lr=3e-3", "optim.clip=1")
FAULTS = (
    Fault("SIGTERM", signalled(signal.SIGTERM, 0)),
    Fault("Ctrl-C", signalled(signal.SIGINT, 130)),
    Fault("SIGKILL before the first checkpoint", killed(2), most_lost=SAVED_EVERY),
    Fault("SIGKILL after step 9", killed(9), most_lost=SAVED_EVERY),
    Fault("SIGKILL after step 16", killed(16), most_lost=SAVED_EVERY),
    Fault("time is up", out_of_time, after=("trainer.max_hours=null",)),
    Fault("SIGTERM to the second of two processes, DDP; resumed by two", one_of_two_signalled("ddp", 1)),
    Fault("SIGTERM to the first of two processes, FSDP; resumed by two", one_of_two_signalled("fsdp", 0)),
    Fault("two processes, DDP; resumed by one", one_of_two_signalled("ddp", 1), after=ONE, tolerance=1e-5),
    Fault("two processes, FSDP; resumed by one", one_of_two_signalled("fsdp", 1), after=ONE, tolerance=1e-5),
    Fault("newest checkpoint altered", damaged(flip_a_byte), most_lost=SAVED_EVERY),
    Fault("newest checkpoint half written", damaged(cut_in_half), most_lost=SAVED_EVERY),
    Fault("disk full while saving", disk_full, most_lost=SAVED_EVERY),
    Fault("loss is not a number", diverged("optim.lr=1e30", "optim.clip=1e30"), after=SOUND),
    Fault("loss explodes", diverged("optim.lr=30", "optim.clip=1e9"), after=SOUND),
    Fault("a shard is cut while it is read", shard_cut),
    Fault("wandb cannot be reached", no_wandb_server),
)


def reference(scene: Scene) -> dict[int, float]:
    """The losses of a run that is left alone."""
    scene.end(scene.begin(), 0)
    losses = scene.losses()
    check(sorted(losses) == list(range(1, STEPS + 1)), "the run that was left alone did not end")
    return losses


def survive(fault: Fault, scene: Scene) -> Outcome:
    """Raises FaultError where the fault costs more than it may."""
    began = time.perf_counter()
    done, said = fault.hit(scene)
    if not (scene.folder / "summary.json").exists():
        said += scene.resume(*fault.after)
    error = scene.finished(fault.tolerance or (1e-5 if "processes" in fault.name else 0.0))
    starts = json.loads((scene.folder / "run.json").read_text())
    lost = max(0, done - starts[-1]["from_step"]) if len(starts) > 1 else 0
    check(lost <= fault.most_lost, f"{lost} steps were lost")
    told = ("error: ", "stopped after", "broken checkpoint", "wandb cannot")
    line = next((line for line in said.splitlines() if line.startswith(told)), "")
    line = line.replace(str(scene.folder), "RUN").replace(f"{scene.folder.parent}/", "")
    return Outcome(fault.name, lost, error, round(time.perf_counter() - began, 1), line)


def main(out: Path) -> None:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        (data,) = open_data(load("stdlib", []))
        options = [f"data.path={shutil.copytree(data, Path(name) / 'data')}"]  # a fault damages it
        expected = reference(Scene(Path(name) / "alone", options))
        for number, fault in enumerate(track(FAULTS, "faults")):
            scene = Scene(Path(name) / f"run{number}", options)
            scene.expected = expected
            try:
                results.append(asdict(survive(fault, scene)) | {"survived": True})
            except FaultError as reason:
                results.append({"fault": fault.name, "survived": False, "said": str(reason)})
    out.mkdir(parents=True, exist_ok=True)
    survived = sum(result["survived"] for result in results)
    write_json(out / "faults.json", {"tried": len(results), "survived": survived, "faults": results, **environment()})
    table = Table(
        "fault", "survived", "steps lost", "largest difference", title=f"{survived} of {len(results)} survived"
    )
    for result in results:
        table.add_row(result["fault"], *(str(result.get(key, "")) for key in ("survived", "steps_lost", "error")))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    sys.exit(0 if survived == len(results) else 1)


if __name__ == "__main__":
    arguments = [argument.removeprefix("out=") for argument in sys.argv[1:]]
    if "-h" in arguments or "--help" in arguments or len(arguments) > 1:
        print(__doc__)
    else:
        main(Path(arguments[0]) if arguments else ROOT / "docs" / "results" / "faults")
