"""Figures of a run by name, each of which can be an axis of the Pareto plot.

stored, read, allocated, per_token, constant  bytes of the KV cache at a context length, from the layout
params, tokens                                of the model, and of its training
ppl, bpb, loss                                of validation
TASK/FIGURE                                   of a task, as eval/evaluate.py or training (evals.tasks) recorded it
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arch import Plan
from arch.footprint import allocated_bytes, kv_bytes
from eval.checks import is_finite
from eval.runs import Run

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
    "induction/text": "loss when text repeats, minus before",
    "induction/random": "loss when random tokens repeat, minus before",
    "perplexity/repeat_ppl": "perplexity of tokens that repeat a pair seen before",
    "decode/token_ms": "milliseconds per decoded token",
    "decode/prefill_ms": "milliseconds of prefill",
}
COUNTS = {"params": "parameters", "tokens": "tokens of training"}
# Last words of names of figures that are the better the larger they are; a length may follow, or a filter of lm-eval.
LARGER = re.compile(
    r"(acc|acc_norm|accuracy|bleu|choice|chrf|em|exact|exact_match|f1|gain|generated|margin|match|mcc|mfu|per_second"
    r"|recall|rouge\w*|score)(,[\w-]+)?(/\d+)?$"
)


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


def axis(name: str, context: int) -> Axis:
    """The axis of the figure `name`, with bytes at `context` tokens."""
    if name in BYTES:
        return Axis(name, BYTES[name][0].format(f"{context:,}"), in_bytes=True)
    label = METRICS.get(name) or LOSS.get(name) or COUNTS.get(name) or LABELS.get(without_text(name)) or name
    return Axis(name, label, LARGER.search(name) is not None, name.endswith("bytes"))


def without_text(name: str) -> str:
    """The name of a figure without the text that it was measured on: `perplexity@book/ppl` is `perplexity/ppl`."""
    task, _, rest = name.partition("/")
    return f"{task.partition('@')[0]}/{rest}"


def figure(run: Run, name: str, context: int, itemsize: int) -> Any:
    """The figure `name` of a finished run, whatever was recorded; None where there is none."""
    if name in BYTES:
        return BYTES[name][1](run.plan, context, itemsize)
    if name in COUNTS:
        return run.summary[name]
    if name in METRICS or name in LOSS:
        return run.summary["val"].get(name)
    return evaluations(run).get(name)


def evaluations(run: Run) -> dict[str, Any]:
    """The figures of all tasks in the summary of `run`, as `TASK/FIGURE`."""
    return {f"{key}/{name}": value for key, found in _entries(run).items() for name, value in found["figures"].items()}


def names_of(runs: Sequence[Run]) -> list[str]:
    """All figures that any of `runs` has."""
    recorded = dict.fromkeys(name for run in runs for name in evaluations(run))
    measured = [name for name in (*METRICS, *LOSS) if any(is_finite(run.summary["val"].get(name)) for run in runs)]
    return [*BYTES, *COUNTS, *measured, *recorded]


def not_alike(runs: Sequence[Run], name: str) -> bool:
    """Tell whether `name` is a figure of a task that ran with other options, or on another text, for some of `runs`."""
    key = name.partition("/")[0]
    return len({entry["digest"] for run in runs if (entry := _entries(run).get(key))}) > 1


def _entries(run: Run) -> dict[str, dict[str, Any]]:
    """The readable entries of `evaluations` in a summary.json; somebody else may have written it."""
    entries = run.summary.get("evaluations")
    return {
        key: entry
        for key, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("figures"), dict) and isinstance(entry.get("digest"), str)
    }
