"""Start the runs of a study: as processes of this machine, or as jobs of SLURM."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.cli import UsageError, hydra_value
from eval.environment import ROOT
from eval.evaluations import FOLDER, KEY, file_name
from eval.runs import Run, RunError
from eval.study_rows import deciding_options

LOG = "study.log"  # in the folder of a run: what its commands printed
PAUSE = 0.5  # seconds between two looks at what runs
PR_SET_PDEATHSIG = 1  # of prctl
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Job:
    """Train a run to its end, from wherever it is, then evaluate it; stopped at any time, the same job continues.

    words       of train/pretrain.py
    task_words  of eval/evaluate.py
    tasks       options of the results in summary.json, by their names; without any, nothing is evaluated
    """

    folder: Path
    words: tuple[str, ...]
    task_words: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    threads: int

    def next_command(self) -> list[str] | None:
        """The command that brings the run on; None if it has ended and is evaluated."""
        folder = hydra_value(str(self.folder))
        if not Run(self.folder).finished:
            started = (self.folder / "config.yaml").exists()
            words = [f"resume={folder}"] if started else [*self.words, f"folder={folder}"]
            return [sys.executable, str(ROOT / "train" / "pretrain.py"), *words]
        if self.evaluated() == list(self.tasks):
            return None
        words = [f"checkpoint={self.folder}", "wandb=false", *self.task_words]
        return [sys.executable, str(ROOT / "eval" / "evaluate.py"), *words]

    def lacks_checkpoints(self) -> bool:
        """Tell whether the run has ended and has none, but is to be evaluated. Raises RunError if it cannot be read."""
        evaluates = Run(self.folder).finished and self.next_command() is not None
        return evaluates and not any((self.folder / "checkpoints").glob("*"))

    def evaluated(self) -> list[str]:
        """The tasks with which the finished run was evaluated. Raises RunError if its summary cannot be read."""
        recorded = Run(self.folder).summary.get(KEY, {})
        return [task for task in self.tasks if task in recorded and self.has_result(task)]

    def has_result(self, task: str) -> bool:
        """Tell whether the folder has the result of `task` with its options."""
        try:
            result = json.loads((self.folder / FOLDER / f"{file_name(task)}.json").read_text())
        except (OSError, ValueError):
            return False
        return same_options(task, result, self.tasks[task])

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start `command` in a session of its own, so that Ctrl-C reaches it through the study alone; it is asked to
        stop if this process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with (self.folder / LOG).open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=variables,
                start_new_session=True,
                preexec_fn=partial(_end_with_parent, os.getpid()) if LIBC else None,
            )

    def progress(self) -> tuple[Any, ...]:
        """A value that changes with whatever brings the run on."""
        names = sorted(path.name for path in (self.folder / "checkpoints").glob("*"))
        try:
            evaluated = self.evaluated() if Run(self.folder).finished else None
        except RunError:
            evaluated = None
        return (self.folder / "config.yaml").exists(), names, evaluated

    def last_line(self) -> str:
        """The line of the log that says why the last command failed."""
        try:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return "it has no log"
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


def same_options(task: str, result: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Tell whether a result of `task` was measured with `options`, as far as it records them and they decide its
    figures."""
    recorded, wanted = (
        json.loads(json.dumps(deciding_options(task, of), default=str)) for of in (result.get("options") or {}, options)
    )
    return all(recorded[key] == value for key, value in wanted.items() if key in recorded)


def _end_with_parent(parent: int) -> None:
    """Ask the system for a SIGTERM at the end of `parent`, the process that has started this one."""
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os._exit(128 + signal.SIGTERM)


class Handle(Protocol):
    """A job that was started."""

    job: Job

    def poll(self) -> str | None:
        """`done`, `stopped` (it can go on), a sentence about its failure, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


DONE, STOPPED = "done", "stopped"


class LocalHandle:
    """A job as processes of this machine, one after the other."""

    def __init__(self, job: Job):
        self.job, self.stopping = job, False
        self.process: subprocess.Popen[bytes] | None = None
        self.before: tuple[Any, ...] = ()
        self.outcome = self._advance()

    def poll(self) -> str | None:
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            self.outcome = self._ended(code)
        return self.outcome

    def stop(self) -> None:
        self.stopping = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile, which macOS calls the latter
                os.killpg(self.process.pid, signal.SIGKILL)  # with the other ranks
            self.process.wait()

    def _advance(self) -> str | None:
        command = self.job.next_command()
        if command is None:
            return DONE
        self.before = self.job.progress()
        self.process = self.job.start(command)
        return None

    def _ended(self, code: int) -> str | None:
        if self.stopping:
            return DONE if self.job.next_command() is None else STOPPED
        if code:
            return f"exit code {code}: {self.job.last_line()}"
        if self.job.progress() == self.before:
            return f"it ended without any progress: {self.job.last_line()}"
        return self._advance()


class SlurmJob:
    """A job within SLURM, as submitit calls it; one that is preempted, or whose time is over, is queued again."""

    def __init__(self, job: Job):
        self.job = job
        self.handle: LocalHandle | None = None

    def __call__(self) -> str:
        self.handle = LocalHandle(self.job)
        while (outcome := self.handle.poll()) is None:
            time.sleep(PAUSE)
        return outcome

    def checkpoint(self) -> Any:
        """Let the run save, and return what submitit is to queue again.

        A signal handler calls it in the midst of `__call__`, which may hold the lock of Popen.
        """
        import submitit

        if self.handle is not None:
            self.handle.stop()
            if self.handle.process is not None:
                with suppress(ChildProcessError):  # its end was noticed already
                    os.waitpid(self.handle.process.pid, 0)
        return submitit.helpers.DelayedSubmission(SlurmJob(self.job))


class SlurmHandle:
    """A job that submitit has handed to SLURM."""

    def __init__(self, job: Job, submitted: Any):
        self.job, self.submitted, self.stopping = job, submitted, False

    def poll(self) -> str | None:
        if not self.submitted.done():
            return None
        if self.stopping:
            return DONE if self.job.next_command() is None else STOPPED
        if error := self.submitted.exception():
            return f"job {self.submitted.job_id}: {str(error).strip().splitlines()[-1]}"
        result: str = self.submitted.result()
        return result

    def stop(self) -> None:
        self.stopping = True
        self.submitted.cancel()

    def kill(self) -> None:
        self.submitted.cancel()


class SlurmLauncher:
    """Jobs of SLURM. Raises UsageError if submitit is not installed, or refuses the options."""

    def __init__(self, folder: Path, options: Mapping[str, Any], threads: int):
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise UsageError("launcher=slurm needs submitit: pip install -c constraints.txt -e '.[slurm]'") from error
        try:
            self.executor = submitit.AutoExecutor(folder=str(folder / "slurm"))
            self.executor.update_parameters(**{"cpus_per_task": threads, **options})
        except (RuntimeError, TypeError, ValueError, NameError) as error:
            raise UsageError(f"slurm={dict(options)}: {str(error).splitlines()[0]}") from error

    def start(self, job: Job) -> Handle:
        return SlurmHandle(job, self.executor.submit(SlurmJob(job)))


Start = Callable[[Job], Handle]
