"""Tasks of evaluation: a registry, and the part of a command line that chooses them.

A task is a module here with a frozen dataclass of options and a function `run(subject, options) -> TaskResult`, and an
entry of TASKS. In training (`evals.tasks`) processes share the items of `Subject.each`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.cli import UsageError, did_you_mean, parse
from eval.tasks import compressed, copying, decoding, harness, needles, perplexity, recall
from eval.tasks.task import Options, Subject, Task, TaskResult

__all__ = ["TASKS", "ChosenTask", "Options", "Subject", "Task", "TaskResult", "section", "sections", "select_tasks"]

TASKS: dict[str, Task] = {
    "perplexity": Task(perplexity.Options, perplexity.run, reads_text=True),
    "recall": Task(recall.Options, recall.run, of_numbers=True, larger=recall.NAMES),
    "needles": Task(needles.Options, needles.run, reads_text=True, larger=needles.NAMES),
    "copy": Task(copying.CopyOptions, copying.copy, larger=copying.NAMES),
    "induction": Task(copying.InductionOptions, copying.induction, reads_text=True, larger=("accuracy",)),
    "decode": Task(decoding.Options, decoding.run, timed=True, larger=("tokens_per_second",)),
    "compressed": Task(
        compressed.Options, compressed.run, reads_text=True, of_numbers=True, compresses=True, larger=recall.NAMES
    ),
    "lm-eval": Task(harness.Options, harness.run, argument="names", larger=harness.LARGER),
}


@dataclass(frozen=True)
class ChosenTask:
    """A task with its options."""

    name: str
    task: Task
    options: Options

    def run(self, subject: Subject) -> TaskResult:
        return self.task.run(subject, self.options)


def section(name: str) -> str:
    """The prefix of the options of task `name` on a command line: its name, dashes as underscores."""
    return name.replace("-", "_")


def sections() -> dict[str, type]:
    """Schemas of the options of all tasks, by their prefix."""
    return {section(name): task.options for name, task in TASKS.items()}


def select_tasks(names: Sequence[str], words: Sequence[str] = ()) -> list[ChosenTask]:
    """The tasks `names`, each once, with the options among `words` (`recall.pairs=8`).

    Raises UsageError on an unknown task or option, on options of a task that is not among `names`, and on a value of
    another type.
    """
    if not names:
        raise UsageError(f"tasks= is empty; choose {', '.join(TASKS)}")
    arguments: dict[str, list[str]] = {}
    for item in names:
        name, colon, argument = item.partition(":")
        if name not in TASKS:
            raise UsageError(f"no task {name}{did_you_mean(name, list(TASKS))} There are {', '.join(TASKS)}")
        if bool(colon) != (TASKS[name].argument is not None) or (colon and not argument):
            form = f"write {name}:NAME" if TASKS[name].argument else "it takes no name after a colon"
            raise UsageError(f"tasks: {item}: {form}")
        arguments.setdefault(name, []).extend([argument] if colon else [])
    known = {section(name) for name in arguments}
    given: dict[str, list[str]] = {}
    for word in words:
        prefix, _, rest = word.partition(".")
        if prefix not in known:
            raise UsageError(f"{word}: the task {prefix} is not among tasks={','.join(names)}")
        given.setdefault(prefix, []).append(rest)
    chosen = []
    for name, collected in arguments.items():
        task = TASKS[name]
        options = parse(task.options, given.get(section(name), []), prefix=f"{section(name)}.")
        if task.argument is not None:
            options = replace(options, **{task.argument: tuple(dict.fromkeys(collected))})
        if problems := options.problems():
            raise UsageError("\n".join(f"{section(name)}.{problem}" for problem in problems))
        chosen.append(ChosenTask(name, task, options))
    return chosen
