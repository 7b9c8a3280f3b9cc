"""KV footprint against quality over trained runs: `python eval/pareto.py runs/* context=8192`.

Folders are runs, or hold runs at any depth. Prints a table, writes pareto.png, pareto.html, pareto.csv and pareto.json.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

from arch import Plan, plan_from_dict
from arch.footprint import kv_bytes
from data.cli import UsageError, fail, parse
from eval.cli import folders_of
from eval.units import bytes_text, count_text, number_text

METRICS = {"ppl": "perplexity", "bpb": "bits per byte"}


@dataclass(frozen=True)
class ParetoConfig:
    """Options.

    context   tokens at which the KV cache is weighed; null: the sequence length of training
    metric    ppl or bpb: perplexity or bits per byte of the validation text
    itemsize  bytes per element of the cache
    out       folder for the files; null: the folder of the runs, or the one that contains all of them
    """

    folders: tuple[str, ...] = ()
    context: int | None = None
    metric: str = "ppl"
    itemsize: int = 2
    out: Path | None = None


class RunError(UsageError):
    """A folder that holds no usable run; the message says why."""


@dataclass(frozen=True)
class Run:
    """A finished run, as its summary.json and plan.json tell it."""

    folder: Path
    summary: dict[str, Any]
    plan: Plan


@dataclass(frozen=True)
class Point:
    """Runs that differ in nothing but the seed. `value` is their mean; bytes are of one sequence of the context."""

    name: str
    bytes: int
    value: float
    lowest: float
    highest: float
    runs: int
    frontier: bool
    params: int
    tokens: int
    kv_per_token: float
    kv_constant: int
    kv_read: float


def load_run(folder: Path) -> Run:
    """Raises RunError where the run is unfinished or its files do not belong to a run."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        plan = plan_from_dict(json.loads((folder / "plan.json").read_text()))
        missing = {"name", "seed", "seq_len", "experiment", "val", "params", "tokens"} - set(summary)
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no finished run: {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} holds no readable run: {error!r}") from error
    if missing:
        raise RunError(f"{folder}/summary.json lacks {', '.join(sorted(missing))}")
    return Run(folder, summary, plan)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All finished runs in and below `folders`, each once. Raises RunError where there is none."""
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; give run folders, or a folder that holds runs")
        for path in sorted(folder.rglob("summary.json")):
            found.setdefault(path.parent.resolve(), load_run(path.parent))
    if not found:
        raise RunError(
            f"no finished run in {', '.join(map(str, folders))}: a run writes summary.json when its training ends"
        )
    return list(found.values())


def points(runs: Sequence[Run], context: int, metric: str, itemsize: int) -> list[Point]:
    """One point per experiment, fewest bytes first; on the frontier if none with at most its bytes is as good."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(experiment(run), []).append(run)
    names = [group[0].summary["name"] for group in groups.values()]
    rows = []
    for (key, group), name in zip(groups.items(), names, strict=True):
        values = [run.summary["val"][metric] for run in group]
        kv = kv_bytes(group[0].plan, context, itemsize)
        rows.append(
            {
                "name": name if names.count(name) == 1 else f"{name} ({key[:4]})",
                "bytes": kv.stored,
                "value": sum(values) / len(values),
                "lowest": min(values),
                "highest": max(values),
                "runs": len(group),
                "params": group[0].summary["params"],
                "tokens": group[0].summary["tokens"],
                "kv_per_token": kv.per_token,
                "kv_constant": kv.constant,
                "kv_read": kv.read,
            }
        )
    rows.sort(key=lambda row: (row["bytes"], row["value"]))
    result: list[Point] = []
    for row in rows:
        result.append(Point(**row, frontier=all(row["value"] < smaller.value for smaller in result)))
    return result


def differing(runs: Sequence[Run]) -> list[str]:
    """What is not the same in all runs and should be, for their values to be compared."""
    keys = {
        "data": "data, data.document_mask or data.block_padding",
        "val_tokens": "data.val_tokens",
        "steps": "steps",
        "unpredicted": "the positions that are predicted (arch.block.start=true predicts all)",
    }
    return [name for key, name in keys.items() if len({run.summary["experiment"].get(key) for run in runs}) > 1]


def experiment(run: Run) -> str:
    """A digest of all that decides a run but its seed."""
    text = json.dumps([run.summary["name"], run.summary["experiment"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def table(rows: Sequence[Point], context: int, metric: str) -> Table:
    result = Table(
        title=f"KV cache of one sequence of {context:,} tokens against {METRICS[metric]}", title_justify="left"
    )
    result.add_column("run", style="bold")
    for column in ("KV stored", "per token", "constant", "KV read", METRICS[metric], "spread", "runs", "params"):
        result.add_column(column, justify="right")
    result.add_column("frontier")
    for row in rows:
        result.add_row(
            row.name,
            bytes_text(row.bytes),
            f"{number_text(row.kv_per_token)} B",
            bytes_text(row.kv_constant) if row.kv_constant else "-",
            bytes_text(row.kv_read),
            f"{row.value:.3f}",
            f"{row.highest - row.lowest:.3f}" if row.runs > 1 else "-",
            str(row.runs),
            count_text(row.params),
            "[green]yes[/green]" if row.frontier else "",
        )
    return result


def write(rows: Sequence[Point], context: int, metric: str, out: Path) -> list[Path]:
    """pareto.png, .html, .csv and .json in `out`. Raises OSError where that cannot be written."""
    from eval.plots.pictures import draw_pareto, plot_pareto_html

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"pareto.{kind}" for kind in ("png", "html", "csv", "json")]
    draw_pareto(rows, context, METRICS[metric], paths[0])
    plot_pareto_html(rows, context, METRICS[metric], paths[1])
    records = [{"context": context, "metric": metric, **asdict(row)} for row in rows]
    with paths[2].open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
    paths[3].write_text(json.dumps(records, indent=1))
    return paths


def pareto(runs: Sequence[Run], context: int | None, metric: str, itemsize: int) -> tuple[list[Point], int]:
    """The points and the context they are weighed at: as asked, or what the runs were trained on.

    Raises RunError where the runs disagree about the latter.
    """
    lengths = sorted({run.summary["seq_len"] for run in runs})
    if context is None and len(lengths) > 1:
        raise RunError(f"the runs were trained on sequences of {lengths} tokens; say which context=N to weigh them at")
    context = context or lengths[0]
    return points(runs, context, metric, itemsize), context


def main(arguments: Sequence[str]) -> None:
    options = parse(ParetoConfig, arguments, positional="folders")
    if options.metric not in METRICS:
        raise UsageError(f"metric is {options.metric}; choose {', '.join(METRICS)}")
    for key in ("context", "itemsize"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UsageError(f"{key} is {value}; it is a whole number, at least 1")
    folders = folders_of(options.folders)
    runs = find_runs(folders)
    rows, context = pareto(runs, options.context, options.metric, options.itemsize)
    out = options.out or Path(os.path.commonpath([folder.absolute() for folder in folders]))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(rows, context, options.metric))
    if others := differing(runs):
        print(f"warning: the runs differ in {', '.join(others)}: their values hardly compare", file=sys.stderr)
    try:
        paths = write(rows, context, options.metric, out)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}); give another folder with out=") from error
    for path in paths:
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        fail(str(error))
