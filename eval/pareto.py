"""KV footprint against quality over trained runs: `python eval/pareto.py runs/* context=8192`.

Folders are runs, or hold runs at any depth. Prints a table, writes pareto.png, pareto.html, pareto.csv and pareto.json.
Any figure that a run has recorded can be on either axis: `x=read y=recall/accuracy`; `list=true` says which there are.
A panel shows the runs that have its figure, weighed at their sequence length unless `context` says another.
Where runs were evaluated with cache methods (evaluate.py cache=), each is a point beside that of its run, and with
several seeds better or worse than the same runs without a method, or not told apart: by the interval of 95 % (Student's
t) of the differences.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from rich.table import Table
from rich.text import Text

from arch.footprint import kv_bytes
from data.cli import UsageError, did_you_mean, parse
from data.dotted import lookup
from eval.checks import is_finite
from eval.console import PlainConsole
from eval.figures import BYTES, METRICS, Axis, Panel, axis, figure, measured_differently, methods_of, names_of
from eval.identity import PREDICTED, name_data
from eval.intervals import interval
from eval.methods import NONE
from eval.outcome import run_script
from eval.released import load, released_names
from eval.runs import (
    Point,
    Run,
    RunError,
    default_out,
    differing,
    folders_of,
    folders_of_notes,
    group_by_seed,
    look_for_runs,
    repeated_seeds,
    warn,
)
from eval.study_rows import frontier
from eval.units import bytes_text, count_text, counted, number_text

LARGEST = 1e100
ALL = "all"  # released models whose configuration is in this repository


@dataclass(frozen=True)
class ParetoConfig:
    """Options.

    context   context length for the bytes of the KV cache; null: the sequence length of training, panel by panel
    itemsize  bytes per element of the cache
    out       folder for the files; null: the folder of the runs, or the one that contains all of them
    x         figure on the x axis: stored, read, allocated, ..., or one of a task (TASK/FIGURE)
    y         figure on the y axis: ppl or bpb (perplexity or bits per byte of the validation text), loss, or one of a
              task; several, separated by commas, get a panel each
    list      print the figures that the runs have, and draw nothing
    baseline  layout, or name of a point, whose range over seeds is shaded
    reference released models, separated by commas, drawn as vertical lines: a config.json, a folder with one, a name of
              the hub or of configs/released, or `all` of the latter. Their bytes are those of the axis `x`: of one
              sequence of `context` tokens, or of each further token with x=per_token
    """

    folders: tuple[str, ...] = ()
    context: int | None = None
    itemsize: int = 2
    out: Path | None = None
    x: str = "stored"
    y: tuple[str, ...] = ("ppl",)
    list: bool = False
    baseline: str | None = None
    reference: tuple[str, ...] = ()


def points(runs: Sequence[Run], context: int, metric: str, itemsize: int, x: str = "stored") -> list[Point]:
    """One point per experiment, the best in `x` first; on the frontier if no other is as good in both figures. Of equal
    points the first is on it.

    `metric` and `x` name figures of eval/figures.py. Runs in which one of them is no figure that a run can have are
    passed over; `passed_over` names them.
    """
    across, up = axis(x, context, runs), axis(metric, context, runs)
    methods = methods_of(runs)

    def value(run: Run, name: str, method: str) -> Any:
        return figure(run, name, context, itemsize, method)

    def usable(run: Run, method: str) -> bool:
        return all(possible(name, value(run, name, method)) for name in (x, metric))

    groups = group_by_seed([run for run in runs if any(usable(run, method) for method in methods)], experiment)
    found = []
    for name, method, group in (
        (name, method, having)
        for name, every in groups.items()
        for method in methods
        if (having := [run for run in every if usable(run, method)])
    ):
        values = [value(run, metric, method) for run in group]
        places = [value(run, x, method) for run in group]
        # One of each seed, also where a copy of a run is counted.
        pairs = {
            run.summary["seed"]: (value(run, metric, method), value(run, metric, NONE))
            for run in group
            if method != NONE and usable(run, NONE)
        }
        kv = kv_bytes(group[0].plan, context, itemsize) if method == NONE else None
        found.append(
            Point(
                name=name,
                bytes=value(group[0], "stored", method),
                value=sum(values) / len(values),
                lowest=min(values),
                highest=max(values),
                runs=len(group),
                frontier=False,
                params=group[0].summary["params"],
                tokens=group[0].summary["tokens"],
                kv_per_token=None if kv is None else kv.per_token,
                kv_constant=None if kv is None else kv.constant,
                kv_read=None if kv is None else kv.read,
                x=None if x == "stored" else sum(places) / len(places),
                method=method,
                against_none=verdict(pairs.values(), up.larger),
            )
        )
    signs = [-1 if of.larger else 1 for of in (across, up)]
    ordered = {number: (signs[0] * row.across, signs[1] * row.value) for number, row in enumerate(found)}
    kept = frontier(ordered)
    return [replace(found[number], frontier=number in kept) for number in sorted(ordered, key=ordered.__getitem__)]


def verdict(pairs: Collection[tuple[float, float]], larger: bool) -> str | None:
    """Verdict on the first figures of `pairs` against the second; `larger`: more is better. None of a single pair."""
    changes = [other - one if larger else one - other for one, other in pairs]
    return interval(changes).verdict if len(changes) > 1 else None


def possible(name: str, value: Any) -> bool:
    """Tell whether a run can have `value` as its figure `name`: a number, above 0 as perplexity and bits are, and not
    so large that no picture can show it."""
    return is_finite(value) and abs(value) < LARGEST and (name not in METRICS or value > 0)


def passed_over(runs: Sequence[Run], context: int, metric: str, itemsize: int, x: str = "stored") -> list[str]:
    """A line for each run that `points` passes over, because a figure of it is missing or impossible."""
    lines = []
    for run, method in ((each, method) for each in runs for method in methods_of([each])):
        if method != NONE and figure(run, metric, context, itemsize, method) is None:
            continue  # no task with this figure ran with this method
        for name in (x, metric):
            value = figure(run, name, context, itemsize, method)
            if not possible(name, value):
                with_method = "" if method == NONE else f", cache={method}"
                who = f"{run.folder} ({run.summary['name']}, seed {run.summary['seed']}{with_method})"
                lines.append(f"{who} is passed over: its {axis(name, context).label} is {value}")
                break
    return lines


def experiment(run: Run) -> list[Any]:
    """All that decides a run but its seed, the name first."""
    return [run.summary["name"], run.summary["experiment"]]


def mixed(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """A line for each group whose seeds are not all of one precision, compilation and commit."""
    lines = []
    for name, group in groups.items():
        told = [found for run in group if (found := conditions(run))]
        if others := differing({key: [found[key] for found in told] for key in (told or [{}])[0]}):
            folders = ", ".join(str(run.folder) for run in group)
            lines.append(f"{name}: its seeds differ in {', '.join(others)}, too, and are one point: {folders}")
    return lines


def conditions(run: Run) -> dict[str, Any]:
    """Return what the figures of a run may depend on, if by rounding alone, beside what `experiment` has; empty where
    its files do not tell."""
    try:
        starts = [start for start in run.starts if isinstance(start, dict)]
        precision, compiled, accelerator = (
            lookup(run.config, f"trainer.{key}") for key in ("precision", "compile", "accelerator")
        )
    except RunError:
        return {}
    on_gpu = accelerator != "cpu" and any(re.match(r"\d+ x ", str(start.get("hardware"))) for start in starts)
    return {
        "trainer.precision": ("bf16" if on_gpu else "fp32") if precision == "auto" else precision,
        "trainer.compile": on_gpu if compiled is None else compiled,
        "commit": list(dict.fromkeys(start.get("git") for start in starts)),
    }


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs and should be, for their values to be compared."""
    keys = {
        "data": "data, data.document_mask or data.block_padding",
        "val_tokens": "data.val_tokens",
        "steps": "steps",
        "unpredicted": PREDICTED,
    }
    values = {name: [run.summary["experiment"].get(key) for run in runs] for key, name in keys.items()}
    values["tokens"] = [run.summary["tokens"] for run in runs]
    values["size.seq_len"] = [run.summary["seq_len"] for run in runs]
    return differing(values)


def table(rows: Sequence[Point], x: Axis, y: Axis) -> Table:
    result = Table(title=f"{x.label} against {y.label}", title_justify="left")
    result.add_column("run", style="bold", overflow="fold")
    compressed = any(row.method != NONE for row in rows)
    if compressed:
        result.add_column("cache", overflow="fold")
    extra = [] if x.name in ("stored", "read", "per_token", "constant", "params") else [x.label]
    for column in (*extra, "KV stored", "per token", "constant", "KV read", y.label, "over seeds", "runs", "params"):
        result.add_column(column, justify="right")
    for column in (*(["against none"] if compressed else []), "frontier"):
        result.add_column(column)
    shown: Callable[[float], str] = bytes_text if y.in_bytes else "{:.5g}".format
    for row in rows:
        result.add_row(
            row.name,
            *([row.method] if compressed else []),
            *([bytes_text(row.across) if x.in_bytes else f"{row.across:.5g}"] if extra else []),
            "-" if row.bytes is None else bytes_text(row.bytes),
            "-" if row.kv_per_token is None else f"{number_text(row.kv_per_token)} B",
            bytes_text(row.kv_constant) if row.kv_constant else "-",
            "-" if row.kv_read is None else bytes_text(row.kv_read),
            shown(row.value),
            f"{shown(row.lowest)} to {shown(row.highest)}" if row.runs > 1 else "-",
            str(row.runs),
            count_text(row.params),
            *([row.against_none or "-"] if compressed else []),
            Text("yes", style="green") if row.frontier else "",
        )
    return result


def list_table(runs: Sequence[Run], context: int, itemsize: int) -> Table:
    """A row for each figure that any of `runs` has: its range, and how many have it."""
    result = Table("figure", "what it is", title=f"figures of {counted(len(runs), 'run')}", title_justify="left")
    for column in ("lowest", "highest", "runs"):
        result.add_column(column, justify="right")
    for name in names_of(runs):
        of = axis(name, context, runs)
        found = [
            [value for method in methods_of([run]) if is_finite(value := figure(run, name, context, itemsize, method))]
            for run in runs
        ]
        values, having = [value for each in found for value in each], sum(map(bool, found))
        ends = (
            [bytes_text(end) if of.in_bytes else f"{end:,.6g}" for end in (min(values), max(values))] if values else []
        )
        result.add_row(name, f"{of.label} ({of.better})", *(ends or ["-", "-"]), str(having))
    return result


References = Sequence[tuple[str, float]]


def reference_lines(names: Sequence[str], x: str, context: int, itemsize: int) -> References:
    """(name, bytes on the axis `x`) of released models. Raises UsageError if one cannot be read, and if the axis
    is none of bytes of the cache."""
    if names and x not in BYTES:
        raise UsageError(f"reference= draws bytes of the KV cache, and x={x} is not; choose x={', '.join(BYTES)}")
    given = [each for name in names for each in (released_names() if name == ALL else [name])]
    models = [load(name) for name in dict.fromkeys(given)]
    lines = [(model.name, BYTES[x][1](model.plan, context, itemsize)) for model in models]
    warn([f"{name} has no bytes on the axis {x}: no line" for name, value in lines if value <= 0])
    return [(name, value) for name, value in lines if value > 0]


def write(rows: Sequence[Point], context: int, metric: str, out: Path) -> list[Path]:
    """pareto.png, .html, .csv and .json in `out`. Raises OSError if that cannot be written."""
    return write_panels({metric: Panel(rows, context, axis("stored", context), axis(metric, context))}, out)


def write_panels(panels: Mapping[str, Panel], out: Path) -> list[Path]:
    """The files of `write` with a panel for each figure of `panels`, one below the other in tables."""
    from eval.plots.pareto import draw_panels, plot_pareto_html

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"pareto.{kind}" for kind in ("png", "html", "csv", "json")]
    draw_panels(list(panels.values()), paths[0])
    plot_pareto_html(list(panels.values()), paths[1])
    records = [
        {"context": of.context, "metric": metric, **asdict(row)} for metric, of in panels.items() for row in of.rows
    ]
    columns = ["context", "metric", *(field.name for field in fields(Point))]
    with paths[2].open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: in_a_sheet(value) for key, value in record.items()} for record in records)
    paths[3].write_text(json.dumps(records, indent=1, allow_nan=False))
    return paths


def in_a_sheet(value: Any) -> Any:
    """`value`, a text with a quote before it where a spreadsheet would read it as a formula."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value


def baseline_of(rows: Sequence[Point], name: str) -> Point:
    """The point called `name`, in full or by its layout, which its name has between hyphens (`mha-tiny`, `cpu-mha`); of
    several, the one of several seeds. Raises UsageError if there is none, or several."""
    plain = [row for row in rows if row.method == NONE]
    named = [row for row in plain if row.name == name]
    named = named or [row for row in plain if name in row.name.partition(" (")[0].split("-")]
    found = [row for row in named if row.runs > 1]
    if len(found) == 1:
        return found[0]
    if len(named) == 1:
        raise UsageError(f"baseline is {name}, of which there is one run; train it with several seeds")
    known = ", ".join(row.name for row in plain)
    raise UsageError(f"baseline is {name}, which {len(named)} of these points are called; write one in full: {known}")


def context_of(runs: Sequence[Run], context: int | None) -> int:
    """`context`, or the sequence length of training if it is None. Raises RunError if the runs disagree about it."""
    lengths = sorted({run.summary["seq_len"] for run in runs})
    if context is None and len(lengths) > 1:
        raise RunError(f"the runs were trained on sequences of {lengths} tokens; say which context=N to weigh them at")
    return context or lengths[0]


def check_names(names: Sequence[str], runs: Sequence[Run]) -> None:
    """Raise UsageError if none of `runs` has one of the figures `names`."""
    known = names_of(runs)
    for name in names:
        if name not in known and name not in METRICS:
            raise UsageError(
                f"no run here has the figure {name}{did_you_mean(name, known)} list=true shows them; "
                "eval/evaluate.py measures those of tasks"
            )


def compare(runs: Sequence[Run], options: ParetoConfig) -> dict[str, Panel]:
    """Make the panel of each figure of `y`, with warnings about what is left out of it and what hardly compares.

    A run that lacks the figure of one panel is not missed there if it has that of another's task.
    """
    having = {metric: [run for run in runs if has(run, metric)] for metric in options.y}
    evaluated = [run for metric, of in having.items() if "/" in metric for run in of]
    panels, lines = {}, []
    for metric, of in having.items():
        context = context_of(of or runs, options.context)
        rows = points(of, context, metric, options.itemsize, options.x)
        references = reference_lines(options.reference, options.x, context, options.itemsize)
        baseline = baseline_of(rows, options.baseline) if options.baseline else None
        x, y = axis(options.x, context, of), axis(metric, context, of)
        panels[metric] = Panel(rows, context, x, y, references, baseline)
        expected = [run for run in runs if run in of or run not in evaluated]
        lines += passed_over(expected, context, metric, options.itemsize, options.x)
        if others := differences(of):
            lines += [f"the runs differ in {', '.join(others)}: their values hardly compare", *name_data(of)]
        lines += [
            f"{name}: some runs were measured with other options, types of numbers or texts; it hardly compares"
            for name in (options.x, metric)
            if measured_differently(of, name)
        ]
    warn(dict.fromkeys(lines))
    return panels


def has(run: Run, name: str) -> bool:
    """Tell whether `run` has recorded the figure `name`, with any cache method."""
    return any(figure(run, name, 1, 1, method) is not None for method in methods_of([run]))


def main(arguments: Sequence[str]) -> None:
    options = parse(ParetoConfig, arguments, positional="folders")
    if not options.y:
        raise UsageError("y is empty; name at least one figure, list=true shows them")
    for key in ("context", "itemsize"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UsageError(f"{key} is {value}; it is a whole number, at least 1")
    folders = folders_of(options.folders)
    found = look_for_runs(folders, finished=True)
    warn(found.unreadable)
    if found.unfinished:
        warn([f"not ended, left out: {', '.join(str(run.folder) for run in found.unfinished)}"])
    console, runs = PlainConsole(), found.runs
    if options.list:
        console.print(list_table(runs, context_of(runs, options.context), options.itemsize))
        return
    check_names([options.x, *options.y], runs)
    groups = group_by_seed(runs, experiment)
    warn(repeated_seeds(groups, lambda run: int(run.summary["seed"]), lambda run: run.folder) + mixed(groups))
    panels = compare(runs, options)
    for of in panels.values():
        console.print(table(of.rows, of.x, of.y))
    for line in folders_of_notes(groups, lambda run: str(run.summary["name"]), lambda run: run.folder):
        console.print(line)
    for name, value in dict.fromkeys(line for of in panels.values() for line in of.references):
        console.print(f"{name}: {bytes_text(value)} on the axis {options.x}")
    out = options.out or default_out(folders)
    try:
        paths = write_panels(panels, out)
    except OSError as error:
        raise UsageError(f"cannot write to {out} ({error.strerror}); give another folder with out=") from error
    for path in paths:
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    run_script(main)
