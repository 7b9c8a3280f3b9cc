"""Pareto plot, KV footprint against quality: a picture and an interactive page."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, Transform

from eval.console import visible
from eval.figures import LOSS, METRICS, Axis, Panel
from eval.methods import NONE
from eval.plots.points import SIDES, Beside, Name, Spot, boxes_of_steps, name_spots, side_by_side, write_beside
from eval.plots.style import (
    BAND,
    BLUE,
    DARK_INK,
    DOMINATED,
    INK,
    LIGHT_INK,
    LINE_COLORS,
    REFERENCE,
    Axes,
    Picture,
    common_suffix,
    fitting_legend,
    html_text,
    literal_text,
    plain_axes,
    without_suffix,
)
from eval.runs import Point
from eval.units import bytes_text, counted, number_text

# Where the name of a vertical line may stand, at either end of it.
ALONG_TOP = tuple(Beside(2 * side, -3, end, "top") for side, end in SIDES)
ALONG_BOTTOM = tuple(Beside(2 * side, 3, end, "bottom") for side, end in SIDES)
# Of cache methods, in the order of the legend; colours of LINE_COLORS but black.
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
PLOTLY = {
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon",
    "*": "star",
    "d": "diamond-tall",
}
OPTIONS = re.compile(r"\([^()]*\)")  # of a cache method, which the legend has
CROWDED = 14  # points beyond which a name that finds no room is left out
LINES = 12  # of released models, beyond which lines are thin, and a name that finds no room is left out
LEGEND = 0.9  # inches of height that a picture has for it


@literal_text
def draw_panels(panels: Sequence[Panel], path: Path | None = None) -> Picture:
    """Draw points in a panel for each figure: the frontier as a staircase, seed ranges as whiskers.

    With a `path` the picture is also written there.
    """
    looks = method_looks([row for panel in panels for row in panel.rows])
    height = 5.4 if looks else 4.6
    figure = Picture(figsize=(7.2 if len(panels) == 1 else 5.6 * len(panels), height), layout="constrained")
    if looks:  # below the panels, where it hides no point
        spread = any(row.runs > 1 for panel in panels for row in panel.rows)
        handles = _handles(spread, any(panel.references for panel in panels), looks)
        handles += _band(panels[0])
        legend = fitting_legend(figure, handles, 3 * len(panels), loc="outside lower center", fontsize=8)
        figure.set_figheight(height + max(0.0, legend.get_window_extent().height / figure.dpi - LEGEND))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(figure, axes, panel, looks)
    figure.write(path, dpi=200)
    return figure


def method_looks(rows: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Marker and colour of each cache method among `rows`, equal in all panels."""
    methods = list(dict.fromkeys(sorted(row.method for row in rows if row.method != NONE)))
    colors = LINE_COLORS[1:] + LINE_COLORS[:1]
    return {
        method: (MARKERS[number % len(MARKERS)], colors[number % len(colors)]) for number, method in enumerate(methods)
    }


def _draw(figure: Picture, axes: Axes, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    rows = panel.rows
    _set_axes(axes, panel, 7 if looks else 9)
    if panel.baseline:
        axes.axhspan(panel.baseline.lowest, panel.baseline.highest, color=BAND, zorder=0)
    # The staircase goes on to where the other axis is worse: whatever lies beyond it is dominated.
    left, right = axes.get_xlim()
    x, y = _staircase([row for row in rows if row.frontier], left if panel.x.larger else right)
    axes.step(x, y, where="post", color=BLUE, linewidth=1.4, alpha=0.6, zorder=1)
    axes.set_xlim(left, right)
    axes.set_ylim(axes.get_ylim())
    plain_axes(axes)
    figure.canvas.draw()  # places what follows is measured in
    spots = [Spot(row.across, row.value, row.lowest, row.highest) for row in rows]
    _draw_points(axes, rows, side_by_side(figure, axes, spots), looks)
    if not rows:
        text = f"no run with a finite {panel.y.label}"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=DARK_INK)
    taken: list[Bbox] = []
    if not looks:
        handles = [*_handles(any(row.runs > 1 for row in rows), bool(panel.references), looks), *_band(panel)]
        legend = axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")
        taken = [legend.get_window_extent()]
    taken += _refer(axes, panel.references)
    name_spots(figure, axes, spots, _names(axes, rows), taken, boxes_of_steps(axes, x, y))


def _set_axes(axes: Axes, panel: Panel, ticks: int) -> None:
    """Scales, limits, labels, and on a logarithmic scale at most `ticks` of them from left to right."""
    rows, x_axis, y_axis = panel.rows, panel.x, panel.y
    places, lines = [row.across for row in rows], [place for _, place in panel.references]
    wide = bool(places) and min(places) > 0 and (x_axis.in_bytes or max(places) > 20 * min(places))
    if wide or not places:
        axes.set_xscale("log", base=2)
    if len({*places, *lines}) == 1 and wide:
        axes.set_xlim(places[0] / 2, places[0] * 2)
    for values in ([row.lowest for row in rows], [row.highest for row in rows]):  # sets the limits
        axes.plot([*places, *lines], [*values, *values[:1] * len(lines)] if values else lines, linestyle="")
    axes.margins(x=0.12, y=0.16)
    if wide:
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    for one, of in ((axes.xaxis, x_axis), (axes.yaxis, y_axis)):
        if of.in_bytes:
            one.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        elif one is axes.xaxis:
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(visible(f"{x_axis.label} (log scale)" if wide else f"{x_axis.label}  ({x_axis.better})"))
    axes.set_ylabel(visible(_title(y_axis)))


def _draw_points(
    axes: Axes, rows: Sequence[Point], places: Sequence[Transform], looks: Mapping[str, tuple[str, str]]
) -> None:
    """Draw each point in the coordinates of its place, with its whisker, and lines between those of one model."""
    _join(axes, rows, places)
    for row, place in zip(rows, places, strict=True):
        marker, tint = looks.get(row.method, ("o", BLUE if row.frontier else DOMINATED))
        if row.runs > 1:
            axes.vlines(row.across, row.lowest, row.highest, color=tint, linewidth=1.6, zorder=2, transform=place)
            ends = [row.lowest, row.highest]
            axes.scatter([row.across] * 2, ends, marker="_", color=tint, s=60, zorder=2, transform=place)
        axes.scatter(
            row.across,
            row.value,
            s=52 if row.method == NONE else 34,
            marker=marker,
            facecolor=tint if row.frontier else "white",
            edgecolor=tint,
            linewidth=1.5,
            zorder=3,
            transform=place,
        )


def _handles(spread: bool, referred: bool, looks: Mapping[str, tuple[str, str]]) -> list[Artist]:
    """Entries of the legend: the frontier, what is not on it, lines of released models, and each cache method."""
    dominated = "dominated; whiskers: lowest and highest seed" if spread else "dominated"
    handles: list[Artist] = [
        Line2D([], [], marker="o", color=BLUE, label="on the frontier"),
        Line2D([], [], marker="o", color=DOMINATED, markerfacecolor="white", linestyle="", label=dominated),
    ]
    if referred:
        handles.append(Line2D([], [], color=REFERENCE, linestyle=":", label="bytes of a released model"))
    for method, (marker, tint) in looks.items():
        text = visible(method)
        handles.append(Line2D([], [], marker=marker, color=tint, markerfacecolor="white", linestyle="", label=text))
    return handles


def _band(panel: Panel) -> list[Artist]:
    """Entry of the legend for the shaded seeds of the baseline, if there is one."""
    if panel.baseline is None:
        return []
    name = without_suffix(panel.baseline.name, common_suffix([row.name for row in panel.rows]))
    return [Patch(color=BAND, label=f"{name}: lowest to highest of {panel.baseline.runs} seeds")]


def _merged(references: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Lines from left to right, one for those at the same place, with all of their names; of many, with the first
    and the number of the others."""
    names: dict[float, list[str]] = {}
    for name, place in sorted(references, key=lambda reference: reference[1]):
        names.setdefault(place, []).append(name)
    shown = 1 if len(names) > LINES else len(references)
    more = {place: f" and {len(those) - shown} more" if len(those) > shown else "" for place, those in names.items()}
    return [(", ".join(those[:shown]) + more[place], place) for place, those in names.items()]


def _refer(axes: Axes, references: Sequence[tuple[str, float]]) -> list[Bbox]:
    """Draw vertical lines with their names along them, and return where the names are: at the first end of the line,
    and on the first side of it, where no other name is and no other line runs; of many lines, those that have room for
    a name are named, the heaviest first."""
    taken: list[Bbox] = []
    lines = _merged(references)
    crowded = len(lines) > LINES
    drawn = {place: axes.transData.transform((place, 0))[0] for _, place in references}
    look: dict[str, Any] = {"rotation": 90, "fontsize": 7, "color": LIGHT_INK, "xycoords": axes.get_xaxis_transform()}
    if crowded:
        look |= {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}, "zorder": 0.5}

    def is_free(box: Bbox) -> bool:
        crossed = not crowded and any(box.x0 < line < box.x1 for line in drawn.values())
        return not (crossed or any(box.overlaps(other) for other in taken))

    for name, place in reversed(lines) if crowded else lines:
        axes.axvline(place, color=REFERENCE, linewidth=0.5 if crowded else 1.0, linestyle=":", zorder=0)
        for end, ends in ((1, ALONG_TOP), (0, ALONG_BOTTOM)):
            last = end == 0 and not crowded
            if written := write_beside(axes, visible(name), (place, end), ends, is_free, last, **look):
                taken += written
                break
    return taken


def _join(axes: Axes, rows: Sequence[Point], places: Sequence[Transform]) -> None:
    """Draw a thin line from the point of each run to each point of its cache methods."""
    spots = [
        axes.transData.inverted().transform(place.transform((row.across, row.value)))
        for row, place in zip(rows, places, strict=True)
    ]
    own = {row.name: spot for row, spot in zip(rows, spots, strict=True) if row.method == NONE}
    for row, spot in zip(rows, spots, strict=True):
        if row.method != NONE and row.name in own:
            (x, y), (left, top) = spot, own[row.name]
            axes.plot([left, x], [top, y], color=LIGHT_INK, linewidth=0.6, alpha=0.5, zorder=1)


def _title(of: Axis) -> str:
    """The label of the axis from bottom to top; those of a validation say so."""
    validation = "validation " if of.label in (*METRICS, *METRICS.values(), *LOSS.values()) else ""
    return f"{validation}{of.label}  ({of.better})"


def _staircase(frontier: Sequence[Point], edge: float) -> tuple[list[float], list[float]]:
    """The points of the frontier, and where it meets the `edge` of the picture."""
    x, y = [row.across for row in frontier], [row.value for row in frontier]
    return [*x, edge] if x else [], [*y, *y[-1:]]


def _names(axes: Axes, rows: Sequence[Point]) -> list[Name]:
    """The names of models and of what is on the frontier; what all have in common is the title."""
    common = common_suffix([row.name for row in rows])
    axes.set_title(visible(common.removeprefix("-")), loc="left", fontsize=10, color=DARK_INK)
    named = [pair for pair in enumerate(rows) if pair[1].method == NONE or pair[1].frontier]
    named.sort(key=lambda pair: (pair[1].method != NONE, not pair[1].frontier))
    names = []
    for number, row in named:
        of_method = "" if row.method == NONE else f"+{visible(OPTIONS.sub('', row.method))}"
        look: dict[str, Any] = {"color": INK, "weight": "bold"} if row.frontier else {"color": LIGHT_INK}
        forced = len(rows) <= CROWDED and row.method == NONE
        names.append(Name(number, without_suffix(row.name, common) + of_method, look | {"fontsize": 8.5}, forced))
    return names


def plot_pareto_html(panels: Sequence[Panel], path: Path) -> None:
    """Write the same panels as one HTML file that needs no network; hovering shows the figures."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(panels))
    looks = method_looks([row for panel in panels for row in panel.rows])
    for number, panel in enumerate(panels, start=1):
        _plot(figure, panel, number, looks)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": 1.08}, margin={"t": 40})
    figure.write_html(path, include_plotlyjs=True)


def _plot(figure: Any, panel: Panel, number: int, looks: Mapping[str, tuple[str, str]]) -> None:
    rows, x_axis, y_axis = panel.rows, panel.x, panel.y
    place = {"row": 1, "col": number, "showlegend": number == 1}
    frontier = [row for row in rows if row.frontier]
    ends = [row.across for row in rows] or [1.0]
    x, y = _staircase(frontier, min(ends) / 1.5 if x_axis.larger else 1.5 * max(ends))
    line = {"shape": "hv", "color": BLUE, "width": 1.5}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="frontier", hoverinfo="skip", **place)
    own = [row for row in rows if row.method == NONE]
    models = {row.name: row for row in own}
    joined = [(models[row.name], row) for row in rows if row.method != NONE and row.name in models]
    if joined:
        ends_x = [end for model, row in joined for end in (model.across, row.across, None)]
        ends_y = [end for model, row in joined for end in (model.value, row.value, None)]
        thin = {"color": LIGHT_INK, "width": 0.6}
        figure.add_scatter(x=ends_x, y=ends_y, mode="lines", line=thin, name="same model", hoverinfo="skip", **place)
    groups: list[tuple[str, list[Point], str, str]] = [
        ("on the frontier", [row for row in own if row.frontier], BLUE, "circle"),
        ("dominated", [row for row in own if not row.frontier], DOMINATED, "circle"),
    ]
    for method, (marker, tint) in looks.items():
        groups.append((html_text(method), [row for row in rows if row.method == method], tint, PLOTLY[marker]))
    for name, chosen, tint, symbol in groups:
        figure.add_scatter(
            x=[row.across for row in chosen],
            y=[row.value for row in chosen],
            mode="markers+text" if chosen and chosen[0].method == NONE else "markers",
            text=[html_text(row.name) for row in chosen],
            textposition="top right",
            cliponaxis=False,
            marker={"size": 10, "color": tint, "symbol": symbol},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row.highest - row.value for row in chosen],
                "arrayminus": [row.value - row.lowest for row in chosen],
            },
            name=name,
            hovertext=[_hover(row, x_axis, y_axis) for row in chosen],
            hoverinfo="text",
            **place,
        )
    if panel.baseline:
        band = {"fillcolor": BAND, "line_width": 0, "layer": "below"}
        figure.add_hrect(y0=panel.baseline.lowest, y1=panel.baseline.highest, **band, row=1, col=number)
    logarithmic = x_axis.in_bytes and min(ends) > 0
    _draw_references(figure, panel, number, logarithmic)
    if logarithmic:
        powers = [math.frexp(end)[1] for end in (*ends, *(line for _, line in panel.references))]
        ticks = sorted({2.0**power for power in (*powers, *(power - 1 for power in powers))})
        shown = {"type": "log", "tickvals": ticks, "ticktext": [bytes_text(tick) for tick in ticks]}
        title = f"{x_axis.label} (log scale)"
    else:
        shown, title = {}, f"{x_axis.label} ({x_axis.better})"
    figure.update_xaxes(title_text=html_text(title), row=1, col=number, **shown)
    figure.update_yaxes(title_text=html_text(_title(y_axis).replace("  ", " ")), row=1, col=number)


def _draw_references(figure: Any, panel: Panel, number: int, logarithmic: bool) -> None:
    """Lines of released models, with their names along them; of many, where the pointer is."""
    where = {"row": 1, "col": number}
    lines = _merged(panel.references)
    crowded = len(lines) > LINES
    if panel.rows:  # lines alone would not widen the axis
        figure.add_scatter(
            x=[place for _, place in lines],
            y=[min(row.lowest for row in panel.rows)] * len(lines),
            mode="markers",
            marker={"opacity": 0.5 if crowded else 0, "size": 5 if crowded else 1, "color": REFERENCE},
            hovertext=[html_text(f"{name}: {bytes_text(place)}") for name, place in lines],
            hoverinfo="text" if crowded else "skip",
            showlegend=False,
            **where,
        )
    for name, place in lines:
        figure.add_vline(x=place, line={"color": REFERENCE, "width": 1, "dash": "dot"}, **where)
        if crowded:
            continue
        at = math.log10(place) if logarithmic else place  # in which plotly wants it on such an axis
        text = html_text(f"{name}: {bytes_text(place)}")
        figure.add_annotation(
            x=at, y=1, yref="y domain", text=text, textangle=-90, xanchor="left", yanchor="top", showarrow=False,
            font={"size": 10, "color": LIGHT_INK}, **where,
        )  # fmt: skip


def _hover(row: Point, x_axis: Axis, y_axis: Axis) -> str:
    across = "" if x_axis.name == "stored" else f"{html_text(x_axis.label)} {row.across:,.6g}<br>"
    stored = "" if row.bytes is None else f"stored {bytes_text(row.bytes)}"
    if row.kv_per_token is not None and row.kv_constant is not None and row.kv_read is not None:
        stored += f": {number_text(row.kv_per_token)} B per token + {bytes_text(row.kv_constant)}<br>"
        stored += f"read per decoded token {bytes_text(row.kv_read)}"
    of_method = "" if row.method == NONE else f" + {html_text(row.method)}"
    return (
        f"<b>{html_text(row.name)}{of_method}</b><br>{html_text(y_axis.label)} {row.value:.4f} "
        f"({counted(row.runs, 'run')})<br>{across}{stored}<br>{row.params:,} parameters, {row.tokens:,} tokens"
    )
