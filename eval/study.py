"""The report of a study from its rows: `python eval/study.py docs/results/study-cpu/results.jsonl`.

Writes report.html, which needs no network, its pictures as PNG, and study.csv. Layouts are compared with a baseline by
seed: equal seeds have the same order of the data. In the table, difference is the mean over seeds of loss minus that of
the baseline, in nats, and half_width half of its interval of 95 %; other figures are means over seeds, too. The
interval is that of Student's t over the seeds' differences: what another training run would give is the question, and
resampling the validation text would not answer it. It holds for a layout by itself: of twenty layouts equal to the
baseline, one would be told apart by chance.
"""

import base64
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from data.cli import UsageError, parse
from data.files import write_text
from eval.outcome import run_script
from eval.study_rows import Group, Row, best_rates, compare, differences, groups, read_rows, seeds_text, sentence
from eval.units import bytes_text, count_text

if TYPE_CHECKING:
    from eval.plots.style import Picture

TOKEN_MS = "decode/token_ms"
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f3f3f3;padding:1px 3px}"
)


@dataclass(frozen=True)
class StudyReport:
    """Options.

    baseline  layout that the others are compared with
    out       folder for the files; null: that of the rows
    figures   figures of tasks that are in the table and drawn against bytes, as far as the rows have them
    """

    files: tuple[str, ...] = ()
    baseline: str = "mha"
    out: Path | None = None
    figures: tuple[str, ...] = ("recall/zoology/accuracy", "recall/gap/accuracy", "induction/text", "copy/accuracy")


def main(arguments: Sequence[str]) -> None:
    options = parse(StudyReport, arguments, positional="files")
    paths = [Path(path) for path in options.files]
    if missing := [path for path in paths if not path.is_file()]:
        raise UsageError(f"{missing[0]}: there is no such file; give the results.jsonl of a study")
    rows = [row for path in paths for row in read_rows(path)]
    found = sorted(groups(rows, "main"), key=lambda group: statistics.fmean(group.losses.values() or [float("inf")]))
    if not found:
        raise UsageError(f"{paths[0]} has no run of the main stage yet")
    baselines = [group for group in found if group.first["arch"] == options.baseline]
    if not baselines:
        raise UsageError(f"no run has the layout {options.baseline}; choose baseline= one of the layouts")
    folder = options.out or paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = write_report(folder, rows, found, baselines, options)
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); give another folder with out=") from error
    print("\n".join([*sentences(found, baselines), *map(str, written)]))


def baseline_of(group: Group, baselines: Sequence[Group]) -> Group:
    """The baseline under the conditions of `group`, of its own study if that has one; or else the one that differs in
    the least."""
    fitting = [other for other in baselines if compare(group, other) is not None]
    own = [other for other in fitting if other.first["study"] == group.first["study"]]
    nearest = min(baselines, key=lambda other: len(differences(group, other)))
    return [*own, *fitting, nearest][0]


def sentences(found: Sequence[Group], baselines: Sequence[Group]) -> list[str]:
    return [sentence(group, baseline_of(group, baselines)) for group in found if group not in baselines]


def columns(group: Group, baselines: Sequence[Group], figures: Sequence[str]) -> dict[str, Any]:
    """The columns of the table for a layout, with `figures` of tasks."""
    losses, first, difference = list(group.losses.values()), group.first, compare(group, baseline_of(group, baselines))
    measured = {figure: group.figures(figure) for figure in figures}
    return {
        "layout": group.label,
        "seeds": seeds_text(len(losses), group),
        "lr": first["lr"],
        "parameters": first["params"],
        **{f"bytes at {int(context):,}": values[0] for context, values in first["kv"].items()},
        **{figure: statistics.fmean(values) if values else None for figure, values in measured.items()},
        "loss": statistics.fmean(losses) if losses else None,
        "lowest": min(losses, default=None),
        "highest": max(losses, default=None),
        "difference": None if difference is None else difference.mean,
        "half_width": None if difference is None else difference.half,
        "verdict": None if difference is None or group in baselines else difference.verdict,
    }


def shown(name: str, value: Any) -> str:
    """A cell of the table in the page."""
    if value is None:
        return ""
    if name.startswith("bytes"):
        return bytes_text(value)
    if name == "parameters":
        return count_text(value)
    if name in ("difference", "half_width"):
        return f"{value:+.4f}" if name == "difference" else f"±{value:.4f}"
    return f"{value:.4g}" if name in ("lr", TOKEN_MS) else f"{value:.4f}" if isinstance(value, float) else str(value)


def heading(name: str) -> str:
    """A heading of the table in the page: what a figure of a task is, in words."""
    from eval.figures import axis

    return axis(name, 0).label if "/" in name else name


def pictures(
    rows: Sequence[Row], found: Sequence[Group], contexts: Sequence[str], figures: Sequence[str]
) -> "dict[str, Picture]":
    """The pictures that the rows have figures for, by the names of their files."""
    from eval.plots.study import draw_bytes, draw_curves, draw_decoding, draw_rates, has_curves, looks_of

    rates = best_rates(rows)
    looks = looks_of([*rates, *(group.label for group in found)])
    drawn = {"loss": draw_bytes(found, contexts, "loss", looks)}
    for figure in figures:
        having = [group for group in found if group.figures(figure)]
        if having:
            drawn[figure.replace("/", "-")] = draw_bytes(having, contexts, figure, looks)
    timed = [group for group in found if group.losses and group.figures(TOKEN_MS)]
    if timed:
        drawn["decoding"] = draw_decoding(timed, "Loss against the measured time of a decoded token", looks)
    if has_curves([row for group in found for row in group.rows]):
        title = "Validation loss while training; bands: lowest to highest of the seeds"
        drawn["curves"] = draw_curves(found, title, looks)
    if rates:
        drawn["rates"] = draw_rates(rates, "The search of each layout's learning rate, at a smaller budget", looks)
    return drawn


def write_report(
    folder: Path, rows: Sequence[Row], found: Sequence[Group], baselines: Sequence[Group], options: StudyReport
) -> list[Path]:
    """Write the page, the pictures and the table; return their paths."""
    figures = [name for name in (TOKEN_MS, *options.figures) if any(group.figures(name) for group in found)]
    table = [columns(group, baselines, figures) for group in found]
    contexts = list(found[0].first["kv"])
    images, written = [], []
    for name, picture in pictures(rows, found, contexts, options.figures).items():
        written.append(folder / f"{name}.png")
        picture.write(written[-1], dpi=130)
        images.append(base64.b64encode(written[-1].read_bytes()).decode())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(folder / "study.csv", text.getvalue())
    title = f"Study {', '.join(dict.fromkeys(group.first['study'] for group in found))}"
    write_text(folder / "report.html", page(title, table, sentences(found, baselines), images, conditions(found)))
    return [folder / "report.html", folder / "study.csv", *written]


def conditions(found: Sequence[Group]) -> list[str]:
    """Lines about what the runs share, and what they do not."""
    rows = [row for group in found for row in group.rows]

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row[name] is not None))

    names = dict.fromkeys(of["name"] for row in rows for of in row["data"])
    tokens = dict.fromkeys(f"{row['tokens']:,}" for row in rows)
    lines = [f"tokens per run: {'; '.join(tokens)}"]
    lines += [f"text: {', '.join(names)}", f"hardware: {values('hardware')}", f"commit: {values('commit')}"]
    if len({row["commit"] for row in rows}) > 1:
        lines.append("the rows are of several commits: groups of different commits are shown apart, and not compared")
    matches = dict.fromkeys("none" if row["match"] is None else row["match"]["match"] for row in rows)
    return [*lines, f"match: {', '.join(matches)}", f"dates: {min(map(_date, rows))} to {max(map(_date, rows))}"]


def _date(row: Row) -> str:
    return str(row["date"])[:10]


def page(
    title: str, table: Sequence[dict[str, Any]], verdicts: Sequence[str], images: Sequence[str], lines: Sequence[str]
) -> str:
    """The report as one page without anything outside it."""
    head = "".join(f"<th>{escape(heading(name))}</th>" for name in table[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(shown(name, value))}</td>" for name, value in row.items()) + "</tr>"
        for row in table
    )
    listed = "".join(f"<li>{escape(text)}</li>" for text in verdicts)
    figures = "".join(f'<p><img alt="" src="data:image/png;base64,{image}"></p>' for image in images)
    about = "".join(f"<li>{escape(line)}</li>" for line in lines)
    method = escape(" ".join((sys.modules[__name__].__doc__ or "").partition("study.csv. ")[2].split()))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><ul>{about}</ul><h2>Verdicts</h2><ul>{listed}</ul><p>{method}</p>"
        f"<h2>Figures</h2><table><tr>{head}</tr>{body}</table><h2>Pictures</h2>{figures}</body></html>\n"
    )


if __name__ == "__main__":
    run_script(main)
