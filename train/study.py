"""Compare layouts with seeds, each at its own learning rate: `python train/study.py +study=cpu`. See --help."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from train.studies.launchers import DONE, STOPPED, Handle, Job, LocalLauncher, SlurmLauncher, Start, same_options
from train.studies.rows import append_row, row_of
from train.studies.schema import StudyConfig, problems, unused

PAUSE = 0.5  # seconds between two looks at what runs
GRACE = 180.0  # seconds that a run has to save


def main(config: DictConfig, choices: Choices) -> None:
    options = OmegaConf.to_object(config)
    assert isinstance(options, StudyConfig)
    if found := [*problems(options), *unused(options, typed_values())]:
        raise LayoutError(found)
    assert options.chosen is not None  # the tasks exist
    study = Study(options, layouts(options))
    study.print_plan()
    if options.plan:
        return
    options.place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(options.place / "study.lock")
    try:
        with lock.acquire(timeout=0):
            study.run(LocalLauncher().start if options.launcher == "local" else slurm(options))
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
        with stop_signals() as stopped:
            while True:
                if stopped or time.monotonic() > deadline:
                    self.wait_for_stop(running)
                    break
                for cell in self.startable(running):
                    self.make_way(cell)
                    running[cell.folder_name] = (cell, start(self.job(cell)), time.monotonic())
                    self.say(f"{cell} starts")
                if not running:
                    break
                time.sleep(PAUSE)
                self.collect(running)
        self.end(bool(stopped) or time.monotonic() > deadline)

    def make_way(self, cell: Cell) -> None:
        """Rename the folder of the run if it was begun at another commit, whose rows do not count."""
        folder = self.job(cell).folder
        if self.options.others == "keep" or not (folder / "run.json").exists():
            return
        commits = {str(start.get("git")) for start in Run(folder).starts}
        if commits != {self.commit}:
            aside = set_aside(folder, f"of-{'-'.join(sorted(commit[:7] for commit in commits))}")
            self.say(f"{folder.name} was begun at another commit; it is now {aside.name}")

    def startable(self, running: Mapping[str, Any]) -> list[Cell]:
        cells, _ = self.cells()
        waiting = [
            cell
            for cell in cells
            if not self.is_done(cell) and cell.folder_name not in running and cell.folder_name not in self.failed
        ]
        return waiting[: self.options.jobs - len(running)]

    def collect(self, running: dict[str, tuple[Cell, Handle, float]]) -> None:
        """Write the rows of what has ended or diverged, and take note of what has failed otherwise."""
        for name, (cell, handle, began) in list(running.items()):
            outcome = handle.poll()
            if outcome is None:
                continue
            del running[name]
            diverged = divergence(outcome)
            if outcome == DONE or diverged:
                self.add_row(cell, handle.job.folder, time.monotonic() - began, diverged)
            elif outcome == STOPPED:
                self.say(f"{cell} is stopped, and continues from its checkpoint")
            else:
                self.failed[name] = f"{cell}: {outcome}"
                self.say(f"{cell} failed: {outcome}")

    def add_row(self, cell: Cell, folder: Path, seconds: float, diverged: str | None = None) -> None:
        here = self.options.jobs if self.options.launcher == "local" else None  # others may have the rest of a node
        try:
            row = row_of(cell, folder, here, diverged)
        except (RunError, UsageError, OSError, ValueError) as error:
            self.failed[folder.name] = f"{cell}: {error}"
            self.say(f"{cell} failed: {error}")
            return
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

    def wait_for_stop(self, running: dict[str, tuple[Cell, Handle, float]]) -> None:
        for _, handle, _ in running.values():
            handle.stop()
        patience = time.monotonic() + GRACE
        while running and time.monotonic() < patience:
            time.sleep(PAUSE)
            self.collect(running)
        for cell, handle, _ in running.values():
            handle.kill()
            self.say(f"{cell} did not save in {GRACE:.0f} seconds; it continues from the checkpoint before")

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
