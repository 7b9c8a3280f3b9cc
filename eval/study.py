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
from eval.published import Order, order_of, read_published
from eval.study_rows import (
    Group,
    Row,
    Search,
    compare,
    contexts_of,
    differences,
    edge,
    edge_sentence,
    groups,
    read_rows,
    search_of,
    searches,
    seeds_text,
    sentence,
    unequal_options,
    verdict,
    why_no_loss,
)
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

    baseline   layout that the others are compared with
    out        folder for the files; null: that of the rows
    figures    figures of tasks that are in the table and drawn against bytes, as far as the rows have them
    pool       compare rows of different commits: you say that nothing that matters has changed between them
    published  CSV file of a paper's figures, the lower the better, in two columns: layout, and their name. Says of
               every two layouts whether the losses here have the published order (pairs.csv, published.png)
    """

    files: tuple[str, ...] = ()
    baseline: str = "mha"
    out: Path | None = None
    figures: tuple[str, ...] = ("recall/zoology/accuracy", "recall/gap/accuracy", "induction/text", "copy/accuracy")
    pool: bool = False
    published: Path | None = None


def main(arguments: Sequence[str]) -> None:
    options = parse(StudyReport, arguments, positional="files")
    paths = [Path(path) for path in options.files]
    if missing := [path for path in paths if not path.is_file()]:
        raise UsageError(f"{missing[0]}: there is no such file; give the results.jsonl of a study")
    rows = [row for path in paths for row in read_rows(path)]
    if options.pool:
        rows = as_one_commit(rows)
    found = sorted(groups(rows, "main"), key=lambda group: statistics.fmean(group.losses.values() or [float("inf")]))
    if not found:
        raise UsageError(f"{paths[0]} has no run of the main stage yet")
    baselines = [group for group in found if group.first["arch"] == options.baseline]
    if not baselines:
        raise UsageError(f"no run has the layout {options.baseline}; choose baseline= one of the layouts")
    order = None if options.published is None else order_of(found, read_published(options.published))
    folder = options.out or paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        verdicts = [*sentences(found, baselines), *([] if order is None else [order.summary()]), *warnings(found, rows)]
        written = write_report(folder, rows, found, baselines, verdicts, order, options)
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); give another folder with out=") from error
    print("\n".join([*verdicts, *map(str, written)]))


def as_one_commit(rows: Sequence[Row]) -> list[Row]:
    """`rows` with one commit for all, the names of all of theirs: of a run at several commits the last row counts."""
    commits = dict.fromkeys(commit for row in rows for commit in row["commit"].split(", "))
    return [row | {"commit": ", ".join(commits)} for row in rows]


def baseline_of(group: Group, baselines: Sequence[Group]) -> Group:
    """The baseline under the conditions of `group`, of its own study if that has one; or else the one that differs in
    the least."""
    fitting = [other for other in baselines if compare(group, other) is not None]
    own = [other for other in fitting if other.first["study"] == group.first["study"]]
    nearest = min(baselines, key=lambda other: len(differences(group, other)))
    return [*own, *fitting, nearest][0]


def sentences(found: Sequence[Group], baselines: Sequence[Group]) -> list[str]:
    return [sentence(group, baseline_of(group, baselines)) for group in found if group not in baselines]


def warnings(found: Sequence[Group], rows: Sequence[Row]) -> list[str]:
    """Sentences about runs that diverged, and about learning rates at an end of those that were tried."""
    tried = searches(rows)
    diverged = [(group.label, row) for group in found for row in group.diverged]
    lines = [f"{label}: seed {row['seed']} diverged: {why_no_loss(row)}." for label, row in diverged]
    for search in tried:
        if not any(loss is not None for loss in search.losses.values()):
            rates = ", ".join(f"{lr:g}" for lr in search.losses)
            lines.append(f"{search.label}: diverged at every learning rate that was tried ({rates}).")
    ends = {group.label: (group.first["lr"], edge_of(group, tried)) for group in found}
    return [*lines, *(edge_sentence(label, lr, end) for label, (lr, end) in ends.items() if end)]


def edge_of(group: Group, tried: Sequence[Search]) -> str | None:
    """`lowest` or `highest` if the learning rate of `group` is at that end of those that were tried."""
    search = search_of(group, tried)
    return None if search is None else edge(group.first["lr"], search.losses)


def columns(
    group: Group, baselines: Sequence[Group], figures: Sequence[str], contexts: Sequence[int], tried: Sequence[Search]
) -> dict[str, Any]:
    """The columns of the table for a layout, with `figures` of tasks and bytes at `contexts`."""
    losses, first, baseline = list(group.losses.values()), group.first, baseline_of(group, baselines)
    difference = compare(group, baseline)
    measured = {figure: group.figures(figure) for figure in figures}
    return {
        "layout": group.label,
        "seeds": seeds_text(len(losses), group),
        "lr": first["lr"],
        "lr_edge": edge_of(group, tried),
        "parameters": first["params"],
        **{f"bytes at {context:,}": group.stored(context) for context in contexts},
        **{figure: statistics.fmean(values) if values else None for figure, values in measured.items()},
        "loss": statistics.fmean(losses) if losses else None,
        "lowest": min(losses, default=None),
        "highest": max(losses, default=None),
        "difference": None if difference is None else difference.mean,
        "half_width": None if difference is None else difference.half,
        "verdict": None if group in baselines else verdict(group, baseline),
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
    rows: Sequence[Row],
    found: Sequence[Group],
    contexts: Sequence[int],
    figures: Sequence[str],
    order: Order | None = None,
) -> "dict[str, Picture]":
    """The pictures that the rows have figures for, by the names of their files."""
    from eval.plots.study import (
        draw_bytes,
        draw_curves,
        draw_decoding,
        draw_published,
        draw_rates,
        has_curves,
        looks_of,
    )

    tried = searches(rows)
    looks = looks_of([*(search.label for search in tried), *(group.label for group in found)])
    drawn = {"loss": draw_bytes(found, contexts, "loss", looks)}
    if order is not None:
        drawn["published"] = draw_published(found, order, looks)
    for figure in figures:
        having = [group for group in found if group.figures(figure)]
        if having and figure != TOKEN_MS:
            drawn[figure.replace("/", "-")] = draw_bytes(having, contexts, figure, looks)
    timed = [group for group in found if group.losses and group.figures(TOKEN_MS)]
    if timed and TOKEN_MS in figures:
        drawn["decoding"] = draw_decoding(timed, "Loss against the measured time of a decoded token", looks)
    ended = [group for group in found if group.losses]
    if has_curves(ended):
        title = "Validation loss while training; bands: lowest to highest of the seeds"
        drawn["curves"] = draw_curves(ended, title, looks)
    if tried:
        drawn["rates"] = draw_rates(tried, "The search of each layout's learning rate, at a smaller budget", looks)
    return drawn


def usable(found: Sequence[Group], figures: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of `figures` that the rows have and that can be compared, and lines about those that cannot."""
    from eval.tasks import TASKS

    names, lines = [], dict[str, None]()
    for name in figures:
        having = [row for group in found if group.figures(name) for row in group.rows]
        task = name.partition("/")[0]
        timed = task in TASKS and TASKS[task].timed
        if timed and any(row.get("jobs") != 1 for row in having):
            why = "runs of the study that share a machine slow each other down, and the rows do not say jobs=1"
            lines[f"{task} is left out: {why}"] = None
        elif timed and len({(row.get("hardware"), row.get("threads")) for row in having}) > 1:
            lines[f"{task} is left out: times of different hardware or threads do not compare"] = None
        elif options := unequal_options(having, task):
            lines[f"{task} is left out: it was measured with different options ({', '.join(options)})"] = None
        elif having:
            names.append(name)
    return names, list(lines)


def write_report(
    folder: Path,
    rows: Sequence[Row],
    found: Sequence[Group],
    baselines: Sequence[Group],
    verdicts: Sequence[str],
    order: Order | None,
    options: StudyReport,
) -> list[Path]:
    """Write the page, the tables and the pictures; return their paths."""
    figures, left_out = usable(found, (TOKEN_MS, *options.figures))
    contexts, tried = contexts_of(found), searches(rows)
    table = [columns(group, baselines, figures, contexts, tried) for group in found]
    images, written = [], []
    for name, picture in pictures(rows, found, contexts, figures, order).items():
        written.append(folder / f"{name}.png")
        picture.write(written[-1], dpi=130)
        images.append(base64.b64encode(written[-1].read_bytes()).decode())
    tables = {"study": table} if order is None else {"study": table, "pairs": order.table()}
    written = [*(write_table(folder / f"{name}.csv", lines) for name, lines in tables.items()), *written]
    title = f"Study {', '.join(dict.fromkeys(group.first['study'] for group in found))}"
    about = [*conditions(found, options.pool), *left_out]
    write_text(folder / "report.html", page(title, table, verdicts, images, about))
    return [folder / "report.html", *written]


def write_table(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write `lines`, which have the same keys, as CSV; return `path`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
    return path


def conditions(found: Sequence[Group], pool: bool = False) -> list[str]:
    """Lines about what the runs share, and what they do not. `pool`: their commits are taken for one."""
    rows = [row for group in found for row in group.rows]

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row[name] is not None))

    names = dict.fromkeys(of["name"] for row in rows for of in row["data"])
    tokens, lengths = (dict.fromkeys(f"{row[key]:,}" for row in rows) for key in ("tokens", "seq_len"))
    lines = [
        f"tokens per run: {'; '.join(tokens)}",
        f"trained length: {'; '.join(lengths)} tokens; at longer contexts bytes are counted, and no loss is measured",
    ]
    lines += [f"text: {', '.join(names)}", f"hardware: {values('hardware')}", f"commit: {values('commit')}"]
    if len({row["commit"] for row in rows}) > 1:
        lines.append(
            "the rows are of several commits: groups of different commits are shown apart, and not compared; where "
            "nothing that matters has changed between them, pool=true compares them"
        )
    if pool:
        lines.append(
            "rows of different commits are compared (pool=true): whoever made this report says that nothing that "
            "matters changed between them"
        )
    if any("+" in row["commit"] for row in rows):
        lines.append("a commit that ends in + had changes that were not committed: its rows may be of different code")
    matches = dict.fromkeys("none" if row["match"] is None else row["match"]["match"] for row in rows)
    dates = sorted(row["date"][:10] for row in rows if row["date"])
    return [*lines, f"match: {', '.join(matches)}", *(f"dates: {first} to {dates[-1]}" for first in dates[:1])]


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
