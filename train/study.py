"""Compare layouts with seeds, each at its own learning rate: `python train/study.py +study=cpu`. See --help."""

import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from types import FrameType
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from arch import LayoutError
from data.cli import TaskError, UsageError
from data.files import set_aside
from eval.cli import Choices, launch, typed_values
from eval.console import PlainConsole
from eval.environment import git_revision
from eval.runs import Run, RunError
from eval.study_rows import edge, edge_sentence, newest, read_rows, why_no_loss
from eval.units import bytes_text, count_text, counted, duration_text
from train.errors import DIVERGENCE_HINT
from train.studies.cells import MAIN, RATE, Cell, Choice, Layout, describe, layouts, next_cells
from train.studies.launchers import DONE, PAUSE, STOPPED, Handle, Job, LocalHandle, SlurmLauncher, Start, same_options
from train.studies.rows import append_row, row_of
from train.studies.schema import StudyConfig, problems, unused

GRACE = 180.0  # seconds that a run has to save


def main(config: DictConfig, choices: Choices) -> None:
    options = OmegaConf.to_object(config)
    assert isinstance(options, StudyConfig)
    if found := [*problems(options), *unused(options, typed_values())]:
        raise LayoutError(found)
    assert options.chosen is not None  # the tasks exist
    study = Study(options, layouts(options))
    study.refuse_without_checkpoints()
    study.print_plan()
    if options.plan:
        return
    options.place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(options.place / "study.lock")
    try:
        with lock.acquire(timeout=0):
            study.run(LocalHandle if options.launcher == "local" else slurm(options))
    except Timeout:
        raise UsageError(f"another process works on {options.place}; wait for it, or give another folder=") from None


def slurm(options: StudyConfig) -> Start:
    return SlurmLauncher(options.place, options.slurm or {}, options.threads_of_run).start


class Study:
    """The state of a study: rows that are done, runs that failed, and what they took."""

    def __init__(self, options: StudyConfig, found: list[Layout]):
        self.options, self.layouts = options, found
        self.commit = str(git_revision())
        self.done: dict[tuple[str, str, int], dict[str, Any]] = {}  # by stage, key and seed
        self.failed: dict[str, str] = {}  # by the name of the run's folder
        self.moved = ""  # why no more runs start
        self.seconds = self.trained = 0.0  # of the runs of this start, and their tokens
        self._read_rows()

    def _read_rows(self) -> None:
        others: dict[str, int] = {}
        for row in newest(read_rows(self.options.rows)):
            commit = row["commit"]
            if commit == self.commit or self.options.others == "keep":
                self.done[row["stage"], row["key"], row["seed"]] = row
            else:
                others[commit] = others.get(commit, 0) + 1
        if others and self.options.others == "refuse":
            listed = ", ".join(f"{count} of {commit[:12]}" for commit, count in others.items())
            raise UsageError(
                f"{self.options.rows} has rows of other commits than this one, {self.commit[:12]}: {listed}. "
                "others=keep counts them as done, others=ignore does their runs again; or give another results="
            )

    def row(self, cell: Cell) -> dict[str, Any] | None:
        return self.done.get((cell.stage, cell.key, cell.seed))

    def loss_of(self, cell: Cell) -> float | None:
        row = self.row(cell)
        return None if row is None else row["loss"]

    def has_diverged(self, cell: Cell) -> bool:
        """Tell whether the run could not go on, or ended without a finite loss. One that failed otherwise has no row:
        it is tried again, and its layout waits for it."""
        row = self.row(cell)
        return row is not None and row["loss"] is None

    def is_done(self, cell: Cell) -> bool:
        row = self.row(cell)
        if row is None or row.get("diverged"):  # then there is nothing to evaluate
            return row is not None
        return all(
            task in row["tasks"] and same_options(task, row["tasks"][task], options)
            for task, options in self.tasks_of(cell).items()
        )

    def tasks_of(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """The options of the tasks of a run; the search of a learning rate needs none."""
        assert self.options.chosen is not None
        return {task.name: asdict(task.options) for task in self.options.chosen} if cell.stage == MAIN else {}

    def cells(self) -> tuple[list[Cell], dict[str, Choice]]:
        return next_cells(self.options, self.layouts, self.loss_of, self.has_diverged)

    def job(self, cell: Cell) -> Job:
        options = self.options
        folder = (options.place / cell.folder_name).absolute()
        words = tuple(options.task_words) if self.tasks_of(cell) else ()
        return Job(folder, cell.words, words, self.tasks_of(cell), options.threads_of_run)

    def print_plan(self) -> None:
        """The layouts, what is to be run, and how long that takes as far as it is known."""
        options, console = self.options, PlainConsole()
        table = Table("layout", "parameters", "FLOPs per token", "KV bytes", "match", title=options.name)
        for layout in self.layouts:
            counts = describe(layout)
            match = "" if layout.match is None else f"{layout.match.key} {layout.match.width} ({layout.match.off:+.2%})"
            texts = count_text(counts["params"]), count_text(round(counts["flops"])), bytes_text(counts["kv"])
            table.add_row(layout.arch, *texts, match)
        console.print(table)
        cells, _ = self.cells()
        left = [cell for cell in cells if not self.is_done(cell)]
        rates = len(options.lrs) if len(options.lrs) > 1 else 0
        total = len(options.archs) * len(options.seeds)
        console.print(
            f"{counted(total, 'run')} of {options.tokens:,} tokens ({counted(len(options.archs), 'layout')}, "
            f"{counted(len(options.seeds), 'seed')})"
            + (
                f", before them {rates * len(options.archs)} of {options.lr_tokens:,} for learning rates"
                if rates
                else ""
            )
        )
        console.print(
            f"{len(cells) - len(left)} done; {self.left_text()}; {options.jobs} at a time, "
            f"{counted(options.threads_of_run, 'thread')} each; rows: {options.rows}",
            soft_wrap=True,
        )

    def tokens_left(self) -> float:
        """Tokens that are still to be trained; of learning rates, those that are known to be tried."""
        options = self.options
        cells, _ = self.cells()
        rates = [cell for cell in cells if cell.stage == RATE and self.row(cell) is None]
        ended = sum(cell.stage == MAIN and self.row(cell) is not None for cell in cells)
        main = len(options.archs) * len(options.seeds) - ended
        return sum(cell.tokens for cell in rates) + main * options.tokens

    def left_text(self) -> str:
        """The time that is left by the speed of the runs so far, else by that of the rows."""
        left = self.tokens_left()
        if not left:
            return "no training is left"
        rates = [row["tokens_per_second"] for row in self.done.values() if row.get("tokens_per_second")]
        if self.trained:
            speed = self.trained / self.seconds
        elif rates:
            speed = sum(rates) / len(rates)
        else:
            return f"{count_text(round(left))} tokens are left, the first run will tell how long they take"
        return f"{count_text(round(left))} tokens are left, about {duration_text(left / speed / self.options.jobs)}"

    def run(self, start: Start) -> None:
        """Do what is left. Raises TaskError, at the end, if runs have failed."""
        limit = self.options.limit_minutes
        deadline = float("inf") if limit is None else time.monotonic() + 60 * limit
        running: dict[str, tuple[Cell, Handle, float]] = {}
        with stop_signals() as received:
            try:
                waiting = self.waiting()
                while not received and time.monotonic() < deadline:
                    while waiting and len(running) < self.options.jobs and not self.has_moved():
                        cell = waiting.pop(0)
                        with self.failing(cell):
                            self.make_way(cell)
                            running[cell.folder_name] = (cell, start(self.job(cell)), time.monotonic())
                            self.say(f"{cell} starts")
                    if not running:
                        break
                    time.sleep(PAUSE)
                    if self.collect(running):
                        waiting = self.waiting(running)
            finally:
                self.stop(running, received)
        self.end(bool(received) or time.monotonic() > deadline)

    def waiting(self, running: Collection[str] = ()) -> list[Cell]:
        """The runs that are to be started, as far as they are known; `running`: folders of those that are."""
        cells, _ = self.cells()
        begun = {*running, *self.failed}
        return [cell for cell in cells if cell.folder_name not in begun and not self.is_done(cell)]

    def has_moved(self) -> bool:
        """Tell whether the checkout, which the next run would import, is at another commit by now; say so once."""
        if not self.moved and self.options.others != "keep" and (commit := str(git_revision())) != self.commit:
            self.moved = (
                f"no more runs start, as the checkout is at {commit} by now, and was at {self.commit}: restore that, "
                "or go on with others=keep. A git worktree of its own does not change under a study"
            )
            self.say(self.moved)
        return bool(self.moved)

    @contextmanager
    def failing(self, cell: Cell) -> Iterator[None]:
        """Take an error as the failure of the run of `cell`, whatever is wrong with its files: the others go on."""
        try:
            yield
        except Exception as error:
            plain = isinstance(error, OSError | ValueError)
            self.fail(cell, str(error) if plain else f"{type(error).__name__}: {error}")

    def fail(self, cell: Cell, why: str) -> None:
        self.failed[cell.folder_name] = f"{cell}: {why}"
        self.say(f"{cell} failed: {why}")

    def make_way(self, cell: Cell) -> None:
        """Rename the folder of the run if it was begun at another commit, whose rows do not count."""
        folder = self.job(cell).folder
        if commits := self.other_commits(folder):
            aside = set_aside(folder, f"of-{'-'.join(sorted(commit[:7] for commit in commits))}")
            self.say(f"{folder.name} was begun at another commit; it is now {aside.name}")

    def other_commits(self, folder: Path) -> set[str]:
        """The commits at which the run in `folder` was started, if its row would not count for them."""
        if self.options.others == "keep" or not (folder / "run.json").exists():
            return set()
        commits = {str(start.get("git")) for start in Run(folder).starts}
        return set() if commits == {self.commit} else commits

    def refuse_without_checkpoints(self) -> None:
        """Raise UsageError if runs are to be evaluated whose checkpoints keep=false has deleted."""
        found = []
        for job in map(self.job, self.waiting()):
            with suppress(RunError):  # which is a failure of that run, when it starts
                if not self.other_commits(job.folder) and job.lacks_checkpoints():
                    found.append(str(job.folder))
        if found:
            raise UsageError(
                "keep=false has deleted the checkpoints of runs that would be evaluated with other tasks or options; "
                "give tasks= and options= of before, or delete these folders to train again:\n" + "\n".join(found)
            )

    def collect(self, running: dict[str, tuple[Cell, Handle, float]]) -> bool:
        """Write the rows of what has ended or diverged, and take note of what has failed otherwise. Tell whether there
        was any."""
        before = len(running)
        for name, (cell, handle, began) in list(running.items()):
            with self.failing(cell):
                outcome = handle.poll()
                if outcome is None:
                    continue
                diverged = divergence(outcome)
                if outcome == DONE or diverged:
                    self.add_row(cell, handle.job.folder, time.monotonic() - began, diverged)
                elif outcome == STOPPED:
                    self.say(f"{cell} is stopped, and continues from its checkpoint")
                else:
                    self.fail(cell, outcome)
            del running[name]
        return len(running) < before

    def add_row(self, cell: Cell, folder: Path, seconds: float, diverged: str | None = None) -> None:
        here = self.options.jobs if self.options.launcher == "local" else None  # others may have the rest of a node
        row = row_of(cell, folder, here, diverged)
        append_row(self.options.rows, row)
        self.done[cell.stage, cell.key, cell.seed] = row
        if row["starts"] == 1 and not diverged:
            self.seconds, self.trained = self.seconds + seconds, self.trained + row["tokens"]
        if not self.options.keep:
            rmtree(folder / "checkpoints", ignore_errors=True)
        speed = row["tokens_per_second"]
        rate = "" if speed is None else f", {speed:,.0f} tokens/s"
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        outcome = f"has diverged: {diverged}" if diverged else f"has ended: loss {loss}"
        self.say(f"{cell} {outcome}{rate}; {self.left_text()}")

    def stop(self, running: dict[str, tuple[Cell, Handle, float]], received: Collection[int]) -> None:
        """Let what runs save. What has not after GRACE seconds, or at one more signal in `received`, is ended."""
        if not running:
            return
        for cell, handle, _ in running.values():
            with self.failing(cell):
                handle.stop()
        self.say(f"saving {counted(len(running), 'run')}, up to {GRACE:.0f} seconds; Ctrl-C now ends them unsaved")
        patience, before = time.monotonic() + GRACE, len(received)
        while running and time.monotonic() < patience and len(received) == before:
            time.sleep(PAUSE)
            self.collect(running)
        for cell, handle, _ in running.values():
            with self.failing(cell):
                handle.kill()
                self.say(f"{cell} has not saved; it continues from the checkpoint before")

    def end(self, stopped: bool) -> None:
        """Say what is done. Raises TaskError if a run of the main stage has no result, or cannot have one. A learning
        rate that diverged is a result of the search, of which the best of the others is taken."""
        cells, chosen = self.cells()
        for arch, choice in chosen.items():
            if end := edge(choice.lr, choice.losses):
                self.say(edge_sentence(arch, choice.lr, end))
        total = len(self.options.archs) * len(self.options.seeds)
        ended = sum(cell.stage == MAIN and self.is_done(cell) for cell in cells)
        self.say(f"{ended} of {counted(total, 'run')} done; rows: {self.options.rows}")
        if stopped and ended < total:
            self.say("stopped; the same command continues")
        lost = [cell for cell in cells if self.has_diverged(cell)]
        no_loss = [f"{cell}: {why_no_loss(row)}" for cell in lost if cell.stage == MAIN and (row := self.row(cell))]
        for arch in self.options.archs:
            tried = [cell for cell in cells if (cell.arch, cell.stage) == (arch, RATE)]
            diverged = [f"{cell.lr:g}" for cell in tried if cell in lost]
            if diverged:
                self.say(f"{arch}: diverged at {', '.join(diverged)} in the search of its learning rate")
            if tried and len(diverged) == len(tried):
                no_loss.append(f"{arch}: no run, as it diverged at every learning rate; give lower lrs=")
        if failed := [*self.failed.values(), *no_loss]:
            listed = "\n".join(failed)
            told = f"{counted(len(failed), 'run')} failed; the same command tries again those without a row"
            raise TaskError(f"{told}:\n{listed}")
        if self.moved:
            raise TaskError(self.moved)

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def divergence(outcome: str) -> str | None:
    """Why a run of this outcome could not go on, if it has diverged, without the advice and paths that follow."""
    reason, hint, _ = outcome.partition(f": {DIVERGENCE_HINT}")
    return reason.rpartition("error: ")[2] if hint else None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C in the list that is yielded, in place of being ended by them."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    launch(main, "study", StudyConfig)
