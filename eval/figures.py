"""Figures of a run by name, each of which can be an axis of the Pareto plot.

stored, read, allocated, per_token, constant  bytes of the KV cache at a context length, from the layout
params, tokens                                of the model, and of its training
ppl, bpb, loss                                of validation
TASK/FIGURE                                   of a task, as eval/evaluate.py or training (evals.tasks) recorded it

With a cache method (eval/methods.py) a run has figures of tasks that ran with it, and `stored` by the method's formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arch import Plan
from arch.compression.checks import check_method
from arch.compression.method import parse_method
from arch.compression.storage import compressed_bytes
from arch.footprint import allocated_bytes, kv_bytes
from eval.checks import is_finite
from eval.methods import NONE
from eval.runs import Point, Run
from eval.tasks import TASKS

METRICS = {"ppl": "perplexity", "bpb": "bits per byte"}  # of validation, beside `loss`
BYTES: dict[str, tuple[str, Callable[[Plan, int, int], float]]] = {
    "stored": ("KV cache of one sequence of {} tokens", lambda plan, *at: kv_bytes(plan, *at).stored),
    "read": ("KV bytes read per token decoded at {} tokens", lambda plan, *at: kv_bytes(plan, *at).read),
    "allocated": (
        "KV cache allocated for one sequence of {} tokens",
        lambda plan, context, itemsize: allocated_bytes(plan, 1, context, itemsize),
    ),
    "per_token": ("KV bytes added per token", lambda plan, *at: kv_bytes(plan, *at).per_token),
    "constant": ("KV bytes that do not grow", lambda plan, *at: kv_bytes(plan, *at).constant),
}
LOSS = {"loss": "loss in nats per token"}
# Of tasks, where the name alone does not say what it is.
LABELS = {
    "compressed/loss": "loss through the cache, in nats per token",
    "compressed/recall/accuracy": "recall across the compression",
    "compressed/known/accuracy": "recall, asked before the compression",
    "compressed/new/accuracy": "recall, not asked before the compression",
    "compressed/end_bytes": "cache of one window at its end, measured",
    "compressed/mean_bytes": "cache of one window, mean over steps, measured",
    "compressed/peak_bytes": "cache of one window at its largest, measured",
    "compressed/offloaded_bytes": "cache of one window in another memory, measured",
    "compressed/recalled_bytes": "bytes copied back per token, measured",
    "compressed/recall/end_bytes": "cache of a sequence of recall at its end, measured",
    "compressed/recall/mean_bytes": "cache of a sequence of recall, mean over steps, measured",
    "recall/gap/accuracy": "accuracy of recall",
    "recall/zoology/accuracy": "accuracy of recall, as in Zoology",
    "induction/text": "loss when text repeats, minus before",
    "induction/random": "loss when random tokens repeat, minus before",
    "perplexity/ppl": "perplexity",
    "perplexity/loss": "loss in nats per token",
    "perplexity/repeat_ppl": "perplexity of tokens that repeat a pair seen before",
    "decode/token_ms": "milliseconds per decoded token",
    "decode/prefill_ms": "milliseconds of prefill",
}
COUNTS = {"params": "parameters", "tokens": "tokens of training"}


@dataclass(frozen=True)
class Axis:
    """A figure on an axis. `larger`: more of it is better; `in_bytes`: it is shown as KiB, MiB, ..."""

    name: str
    label: str
    larger: bool = False
    in_bytes: bool = False

    @property
    def better(self) -> str:
        return "higher is better" if self.larger else "lower is better"


@dataclass(frozen=True)
class Panel:
    """The points of one picture of the Pareto plot, and what its axes are.

    context     tokens at which the cache is weighed
    references  (name, place from left to right) of vertical lines
    baseline    point whose range of seeds is shaded from end to end
    """

    rows: Sequence[Point]
    context: int
    x: Axis
    y: Axis
    references: Sequence[tuple[str, float]] = ()
    baseline: Point | None = None


def axis(name: str, context: int, runs: Sequence[Run] = ()) -> Axis:
    """The axis of the figure `name`, with bytes at `context` tokens; `runs` may have recorded which end is better."""
    if name in BYTES:
        return Axis(name, BYTES[name][0].format(f"{context:,}"), in_bytes=True)
    label = METRICS.get(name) or LOSS.get(name) or COUNTS.get(name) or LABELS.get(without_text(name)) or name
    return Axis(name, label, is_larger_better(name, runs), name.endswith("bytes"))


def is_larger_better(name: str, runs: Sequence[Run] = ()) -> bool:
    """Tell whether more of the figure `name` of a task is better: as one of `runs` recorded, or by the task's words."""
    key, _, rest = name.partition("/")
    for run in runs:
        for of, entry in _entries(run).items():
            larger = entry.get("larger")
            if of.partition("[")[0] == key and isinstance(larger, dict) and isinstance(larger.get(rest), bool):
                return bool(larger[rest])
    task = TASKS.get(key.partition("@")[0])
    *_, word = [part for part in rest.split("/") if not part.isdigit()] or [""]
    return task is not None and word.partition("@")[0].partition(",")[0] in task.larger


def without_text(name: str) -> str:
    """The name of a figure without the text that it was measured on: `perplexity@book/ppl` is `perplexity/ppl`."""
    task, _, rest = name.partition("/")
    return f"{task.partition('@')[0]}/{rest}"


def figure(run: Run, name: str, context: int, itemsize: int, method: str = NONE) -> Any:
    """The figure `name` of a finished run, with a cache method; whatever was recorded, None if there is none."""
    if name in BYTES:
        if method != NONE:
            return stored_bytes(run.plan, method, context, itemsize) if name == "stored" else None
        return BYTES[name][1](run.plan, context, itemsize)
    if name in COUNTS:
        return run.summary[name]
    if name in METRICS or name in LOSS:
        return run.summary["val"].get(name) if method == NONE else None
    return evaluations(run, method).get(name)


def stored_bytes(plan: Plan, method: str, context: int, itemsize: int) -> int | None:
    """Bytes of a cache of `context` tokens that has just been compressed, by the formula of `method`; None where the
    text decides, `plan` does not take the method, or its budget holds no slot of so many tokens."""
    try:
        found = parse_method(method)
        check_method(plan, found)
        return compressed_bytes(plan, found, 1, context, prompt=context, itemsize=itemsize)
    except ValueError:
        return None


def evaluations(run: Run, method: str = NONE) -> dict[str, Any]:
    """The figures of all tasks in the summary of `run`, as `TASK/FIGURE`: those with a cache method, or without."""
    return {
        f"{key.removesuffix(f'[{method}]')}/{name}": value
        for key, found in _entries(run).items()
        if found.get("method", NONE) == method
        for name, value in found["figures"].items()
    }


def methods_of(runs: Sequence[Run]) -> list[str]:
    """The cache methods with which any of `runs` has figures, `none` first."""
    found = [entry.get("method", NONE) for run in runs for entry in _entries(run).values()]
    return list(dict.fromkeys([NONE, *sorted(found)]))


def names_of(runs: Sequence[Run]) -> list[str]:
    """All figures that any of `runs` has."""
    methods = methods_of(runs)
    recorded = dict.fromkeys(name for method in methods for run in runs for name in evaluations(run, method))
    measured = [name for name in (*METRICS, *LOSS) if any(is_finite(run.summary["val"].get(name)) for run in runs)]
    return [*BYTES, *COUNTS, *measured, *recorded]


def measured_differently(runs: Sequence[Run], name: str) -> bool:
    """Tell whether `name` is a figure of a task that ran with other options, on another text or in another type of
    numbers for some of `runs`."""
    key = name.partition("/")[0]
    entries = [(of, entry) for run in runs for of, entry in _entries(run).items()]
    return len({entry["digest"] for of, entry in entries if of.partition("[")[0] == key}) > 1


def _entries(run: Run) -> dict[str, dict[str, Any]]:
    """The readable entries of `evaluations` in a summary.json; somebody else may have written it."""
    entries = run.summary.get("evaluations")
    return {
        key: entry
        for key, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("figures"), dict)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("method", NONE), str)
    }
