"""lm-eval's tasks, scored without an export: tasks=[lm-eval:hellaswag,lm-eval:my_task]."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cli import UsageError
from eval.intervals import wilson
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult

MISSING = 'lm-eval is not installed: pip install -c constraints.txt -e ".[eval]"'
# Metrics that are shares of right answers, whose interval is that of a count.
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match")
# Metrics of which more is better, for results that were recorded without what lm-eval says of that.
LARGER = (
    *SHARES,
    "bleu",
    "chrf",
    "em",
    "exact",
    "f1",
    "mcc",
    "recall",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "score",
)


@dataclass(frozen=True)
class Options(TaskOptions):
    """Tasks of lm-eval, on the hub or in a folder.

    names         filled from tasks=[lm-eval:NAME]
    include_path  folder with your own task files; null: only lm-eval's
    num_fewshot   examples before each question; null: the task's own number
    limit         limit of questions per task; null: all
    batch         sequences per forward pass
    """

    names: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch: int = 16

    def problems(self) -> list[str]:
        found = [
            f"{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("num_fewshot", self.num_fewshot, 0),
                ("limit", self.limit, 1),
                ("batch", self.batch, 1),
            )
            if value is not None and value < least
        ]
        if self.include_path is not None and not Path(self.include_path).is_dir():
            found.append(f"include_path is {self.include_path}, which is no folder")
        return found


def by_prefix(prefixes: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal prefixes together, in the order in which each comes first."""
    groups: dict[Hashable, list[int]] = {}
    for index, prefix in enumerate(prefixes):
        groups.setdefault(prefix, []).append(index)
    return list(groups.values())


def window_of(prefix: Sequence[int], continuation: Sequence[int], most: int) -> tuple[int, ...]:
    """The end of `prefix` that has room before `continuation`, of whose tokens the last is no input, in `most` inputs.

    Raises UsageError if none of it has.
    """
    room = most + 1 - len(continuation)
    if room < 1 or not prefix or not continuation:
        raise UsageError(
            f"lm-eval: a continuation of {len(continuation)} tokens after a prefix of {len(prefix)}: a context of "
            f"{most} takes 1 to {most} after at least 1; give a longer context, or leave the task out"
        )
    return tuple(prefix[-room:])


def run(subject: Subject, options: Options) -> TaskResult:
    """Run the tasks. Raises UsageError if lm-eval is not installed, or has no such task."""
    try:
        from eval.tasks.harness_model import evaluate
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UsageError(MISSING) from error
    return result(evaluate(subject, options))


def result(found: dict[str, Any]) -> TaskResult:
    """Figures `TASK/METRIC`, with `@FILTER` where there is one, and rows of what `simple_evaluate` returns."""
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    larger: dict[str, bool] = {}
    for task, values in sorted(found["results"].items()):
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not chosen:
                continue
            name = metric if chosen == "none" else f"{metric}@{chosen}"
            figures[f"{task}/{name}"] = float(value)
            more = (found.get("higher_is_better") or {}).get(task, {}).get(metric)
            if more is not None:
                larger[f"{task}/{name}"] = bool(more)
            count = (found.get("n-samples") or {}).get(task, {}).get("effective")
            is_share = metric in SHARES and count is not None
            low, high = wilson(value * count, count) if is_share else (None, None)
            rows.append({"task": task, "metric": name, "value": float(value), "low": low, "high": high, "count": count})
    return TaskResult(figures, rows, notes=(f"scored by lm-eval {found['version']}",), larger=larger)
