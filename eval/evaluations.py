"""Results of tasks in the folder of a run: evaluations/<key>.json with its pictures, and the figures in summary.json.

The key is the name of the task, with the names of texts that were given (`perplexity@wiki.test`), and with the cache
method where there is one (`compressed[int4]`). In summary.json, under `evaluations`: for each key its figures, `step`
of the checkpoint, a digest of the options, the text and the type of numbers, the method, if any, and where the task
cannot tell beforehand which figures are the better the larger they are, which.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.table import Table

from data.cli import value_text
from data.files import sha256, write_json
from eval.intervals import UNDECIDED, interval
from eval.methods import NONE, name_of
from eval.results import write_result
from eval.runs import Run, RunError
from eval.tasks import ChosenTask
from eval.tasks.task import Subject, TaskResult

FOLDER, KEY = "evaluations", "evaluations"


def key_of(chosen: ChosenTask, texts: Sequence[Path], method: str = NONE) -> str:
    """The key of a result: the task, the names of `texts` where these were given and change the figures, the method."""
    of_method = "" if method == NONE else f"[{method}]"
    if not chosen.task.reads_text or not texts:
        return chosen.name + of_method
    names = "+".join(re.sub(r"[^A-Za-z0-9_.-]+", "-", text.name.split(".jsonl")[0]) or "text" for text in texts)
    return f"{chosen.name}@{names}{of_method}"


def file_name(key: str) -> str:
    """`key` without the brackets of its method, which shells and glob patterns read."""
    return re.sub(r"[\[\](),]+", "-", key).rstrip("-")


def digest_of(chosen: ChosenTask, subject: Subject) -> str:
    """Digest of what decides the figures beside the weights: the options, the context, the seed and the text, of times
    how tokens are decoded, if not by plain steps, the type of numbers, if it is not fp32, and how many tokens questions
    are made of, if the model has more."""
    from arch.static_step import choose_way

    texts = None
    if chosen.task.reads_text:
        texts = [", ".join(map(sha256, subject.texts)), subject.text_key] if subject.texts else None
        if subject.prepared is not None:
            texts = [subject.prepared.digest, str(subject.prepared.val_tokens)]
    values = [chosen.name, chosen.options.deciding(), subject.context, subject.seed, texts]
    if chosen.task.timed and (way := choose_way(subject.model, subject.steps)) != "plain":
        values.append(way)
    if (numbers := number_type(subject)) != "float32":
        values.append(numbers)
    if chosen.task.of_numbers and (count := subject.numbers) is not None and count < len(subject.model.output_weight):
        values.append(count)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def number_type(subject: Subject) -> str:
    """The type of the weights, and that of products where autocast is on: `float32`, `float32, autocast bfloat16`."""
    import torch

    weights, device = subject.model.output_weight.dtype, subject.device.type
    types = [str(weights)]
    if torch.is_autocast_enabled(device) and (products := torch.get_autocast_dtype(device)) != weights:
        types.append(f"autocast {products}")
    return ", ".join(types).replace("torch.", "")


def write_evaluation(
    key: str, chosen: ChosenTask, subject: Subject, result: TaskResult, folder: Path, about: Mapping[str, Any]
) -> list[Path]:
    """Write `key`.json and the pictures into `folder`, with the items of `about`; return the paths.

    Raises OSError if that cannot be written.
    """
    paths = [folder / f"{file_name(key)}.json"]
    payload = {
        "task": chosen.name,
        "model": subject.name,
        "device": str(subject.device),
        "numbers": number_type(subject),
        "context": subject.context,
        "seed": subject.seed,
        "cache": name_of(subject.method),
        "texts": [str(path) for path in subject.texts],
        "options": asdict(chosen.options),
        "digest": digest_of(chosen, subject),
        "notes": list(result.notes),
        "figures": json_values(result.figures),
        "rows": [json_values(row) for row in result.rows],
        "samples": result.samples,
        **about,
    }
    write_result(paths[0], payload)
    for name, picture in result.pictures.items():
        paths.append(folder / f"{file_name(key)}-{name}.png")
        picture.savefig(paths[-1], dpi=160, facecolor="white")
    return paths


def recorded_step(run: Path, keys: Iterable[str]) -> int:
    """The step of the results of `keys` in the folder of a run; 0 if one of them is not there, or damaged."""
    try:
        paths = [run / FOLDER / f"{file_name(key)}.json" for key in keys]
        return min((int(json.loads(path.read_text())["step"]) for path in paths), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def merge(run: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `entries`, by key, into the summary.json of `run`; those of other tasks stay. Processes take turns.

    Raises OSError if it cannot be written, ValueError if it cannot be read.
    """
    path = run / "summary.json"
    with FileLock(run / f"{KEY}.lock"):
        summary = Run(run).summary
        write_json(path, summary | {KEY: {**summary.get(KEY, {}), **entries}})


def steps_of_summary(run: Path) -> int | None:
    """The steps of the run by its summary.json; None if it has none. Raises RunError if that does not say them."""
    ended = Run(run)
    if not ended.finished:
        return None
    steps = ended.experiment.get("steps")
    if not isinstance(steps, int):
        raise RunError(f"{run} holds no readable run: summary.json has no steps; put it back")
    return steps


def entries_of_step(run: Path, step: int) -> dict[str, Any]:
    """The entries of a summary.json that are of the checkpoint of `step`; none where it cannot be read."""
    try:
        return {key: found for key, found in Run(run).summary[KEY].items() if found["step"] == step}
    except (RunError, KeyError, TypeError, AttributeError):
        return {}


def entry(result: TaskResult, step: int, digest: str, method: str = NONE) -> dict[str, Any]:
    """The entry of a result in summary.json."""
    of_method = {} if method == NONE else {"method": method}
    larger = {"larger": result.larger} if result.larger else {}
    return {"step": step, "digest": digest, **of_method, "figures": json_values(result.figures), **larger}


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as JSON has them: a number that is not finite as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def figures_table(name: str, results: Mapping[str, TaskResult]) -> Table:
    """A row for each figure of each task."""
    table = Table("figure", title=name, title_justify="left")
    table.add_column("value", justify="right")
    for key, result in results.items():
        for figure, value in result.figures.items():
            table.add_row(f"{key}/{figure}", number(value))
    return table


def comparisons(results: Mapping[str, TaskResult]) -> list[Table]:
    """Tables, one for each task that ran with several methods, of what each changes by the same windows and sequences.

    The interval is that of the mean of paired differences to `none`, or to the first method, by Student's t.
    """
    groups: dict[str, dict[str, TaskResult]] = {}
    for key, result in results.items():
        if result.samples:
            task, _, method = key.partition("[")
            groups.setdefault(task, {})[method.removesuffix("]") or NONE] = result
    tables = []
    for task, group in groups.items():
        base = NONE if NONE in group else next(iter(group))
        names = [name for name in group[base].samples if all(name in result.samples for result in group.values())]
        if len(group) < 2 or not names:
            continue
        table = Table("cache", title=f"{task}: difference to {base}, paired, 95 %", title_justify="left")
        for name in names:
            table.add_column(name, justify="right")
        for method, result in group.items():
            if method != base:
                pairs = [(result.samples[name], group[base].samples[name]) for name in names]
                table.add_row(method, *(difference(*pair) for pair in pairs))
        tables.append(table)
    return tables


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean of `values` less `others`, and half of its interval of 95 %; `same` where all are equal."""
    found = [value - other for value, other in zip(values, others, strict=True)]
    if not any(found):
        return "same"
    of = interval(found)
    if of.half is None:
        return f"{of.mean:+.4f}"
    return f"{of.mean:+.4f} ± {of.half:.4f}{f', {UNDECIDED}' if of.verdict == UNDECIDED else ''}"


def rows_table(key: str, result: TaskResult) -> Table:
    """The details of a task."""
    table = Table(title=key, title_justify="left")
    for column in result.rows[0]:
        table.add_column(str(column), justify="right")
    for row in result.rows:
        table.add_row(*(number(value) if isinstance(value, float) else value_text(value) for value in row.values()))
    return table


def number(value: float) -> str:
    """A whole number with commas, any other with six digits."""
    return f"{value:,.0f}" if value == round_or_nan(value) else f"{value:.6g}"


def round_or_nan(value: float) -> float:
    return float(round(value)) if math.isfinite(value) else math.nan
