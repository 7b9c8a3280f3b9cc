"""KV footprint against quality over trained runs: `python eval/pareto.py runs/* context=8192`.

Folders are runs, or hold runs at any depth. Prints a table, writes pareto.png, pareto.html, pareto.csv and pareto.json.
"""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from rich.table import Table
from rich.text import Text

from arch.footprint import kv_bytes
from data.cli import UsageError, fail, parse
from eval.checks import is_finite
from eval.console import PlainConsole
from eval.identity import name_data
from eval.runs import Point, Run, RunError, default_out, differing, folders_of, group_by_seed, look_for_runs, warn
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


def points(runs: Sequence[Run], context: int, metric: str, itemsize: int) -> list[Point]:
    """One point per experiment, fewest bytes first; on the frontier if none with at most its bytes is as good.

    Runs whose metric is not finite are passed over; `not_finite` names them.
    """
    rows = []
    for name, group in group_by_seed(filter(lambda run: has_finite(run, metric), runs), experiment).items():
        values = [run.summary["val"][metric] for run in group]
        kv = kv_bytes(group[0].plan, context, itemsize)
        rows.append(
            {
                "name": name,
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


def has_finite(run: Run, metric: str) -> bool:
    """Tell whether the run's `metric` is a finite number: of a run that diverged it may not be."""
    return is_finite(run.summary["val"].get(metric))


def not_finite(runs: Sequence[Run], metric: str) -> list[str]:
    """A line for each run that `points` passes over."""
    return [
        f"{run.folder} ({run.summary['name']}, seed {run.summary['seed']}) is passed over: its {METRICS[metric]} is "
        f"{run.summary['val'].get(metric)}"
        for run in runs
        if not has_finite(run, metric)
    ]


def experiment(run: Run) -> list[Any]:
    """All that decides a run but its seed, the name first."""
    return [run.summary["name"], run.summary["experiment"]]


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs and should be, for their values to be compared."""
    keys = {
        "data": "data, data.document_mask or data.block_padding",
        "val_tokens": "data.val_tokens",
        "steps": "steps",
        "unpredicted": "the positions that are predicted (arch.block.start=true predicts all)",
    }
    return differing({name: [run.summary["experiment"].get(key) for run in runs] for key, name in keys.items()})


def table(rows: Sequence[Point], context: int, metric: str) -> Table:
    result = Table(
        title=f"KV cache of one sequence of {context:,} tokens against {METRICS[metric]}", title_justify="left"
    )
    result.add_column("run", style="bold", overflow="fold")
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
            Text("yes", style="green") if row.frontier else "",
        )
    return result


def write(rows: Sequence[Point], context: int, metric: str, out: Path) -> list[Path]:
    """pareto.png, .html, .csv and .json in `out`. Raises OSError where that cannot be written."""
    from eval.plots.pareto import draw_pareto, plot_pareto_html

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"pareto.{kind}" for kind in ("png", "html", "csv", "json")]
    draw_pareto(rows, context, METRICS[metric], paths[0])
    plot_pareto_html(rows, context, METRICS[metric], paths[1])
    records = [{"context": context, "metric": metric, **asdict(row)} for row in rows]
    columns = ["context", "metric", *(field.name for field in fields(Point))]
    with paths[2].open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    paths[3].write_text(json.dumps(records, indent=1, allow_nan=False))
    return paths


def pareto(runs: Sequence[Run], context: int | None, metric: str, itemsize: int) -> tuple[list[Point], int]:
    """Return the points and their context: `context`, or the sequence length of training if it is None.

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
    found = look_for_runs(folders, finished=True)
    warn(found.unreadable)
    if found.unfinished:
        warn([f"not ended, left out: {', '.join(str(run.folder) for run in found.unfinished)}"])
    runs = found.runs
    rows, context = pareto(runs, options.context, options.metric, options.itemsize)
    warn(not_finite(runs, options.metric))
    out = options.out or default_out(folders)
    console = PlainConsole()
    console.print(table(rows, context, options.metric))
    if others := differences(runs):
        warn([f"the runs differ in {', '.join(others)}: their values hardly compare", *name_data(runs)])
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
