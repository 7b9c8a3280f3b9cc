"""Pareto plot, KV footprint against quality: a picture and an interactive page."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation, Transform

from eval.console import visible
from eval.plots.style import (
    BLUE,
    DARK_INK,
    DOMINATED,
    INK,
    LIGHT_INK,
    Axes,
    Picture,
    common_suffix,
    html_text,
    literal_text,
    plain_axes,
    without_suffix,
)
from eval.runs import Point
from eval.units import bytes_text, number_text

SIDES = ((1, "left"), (-1, "right"))
MARKER = 13  # width of a point with room around it, in pixels


@literal_text
def draw_pareto(rows: Sequence[Point], context: int, quality: str, path: Path | None = None) -> Picture:
    """Draw bytes (log) against quality (lower is better): the frontier as a staircase, seed ranges as whiskers.

    With a `path` the picture is also written there.
    """
    figure = Picture(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    if len({row.bytes for row in rows}) == 1:
        axes.set_xlim(rows[0].bytes / 2, rows[0].bytes * 2)
    frontier = [row for row in rows if row.frontier]
    for values in ([row.lowest for row in rows], [row.highest for row in rows]):  # sets the limits
        axes.plot([float(row.bytes) for row in rows], values, linestyle="")
    axes.margins(x=0.12, y=0.16)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"KV cache of one sequence of {context:,} tokens (log scale)")
    axes.set_ylabel(f"validation {quality}  (lower is better)")
    # The staircase goes on to the right: whatever lies above it is dominated.
    edge = axes.get_xlim()[1]
    x, y = _staircase(frontier, edge)
    axes.step(x, y, where="post", color=BLUE, linewidth=1.4, alpha=0.6, zorder=1)
    axes.set_xlim(right=edge)
    axes.set_ylim(axes.get_ylim())
    plain_axes(axes)
    figure.canvas.draw()  # places what follows is measured in
    for row, place in zip(rows, _places(figure, axes, rows), strict=True):
        tint = BLUE if row.frontier else DOMINATED
        if row.runs > 1:
            axes.vlines(row.bytes, row.lowest, row.highest, color=tint, linewidth=1.6, zorder=2, transform=place)
            ends = [row.lowest, row.highest]
            axes.scatter([row.bytes] * 2, ends, marker="_", color=tint, s=60, zorder=2, transform=place)
        face = tint if row.frontier else "white"
        axes.scatter(
            row.bytes, row.value, s=52, facecolor=face, edgecolor=tint, linewidth=1.5, zorder=3, transform=place
        )
    if not rows:
        axes.text(0.5, 0.5, f"no run with a finite {quality}", transform=axes.transAxes, ha="center", color=DARK_INK)
    spread = "; whiskers: lowest and highest seed" if any(row.runs > 1 for row in rows) else ""
    handles = [
        Line2D([], [], marker="o", color=BLUE, label="on the frontier"),
        Line2D([], [], marker="o", color=DOMINATED, markerfacecolor="white", linestyle="", label="dominated" + spread),
    ]
    legend = axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")
    _label(figure, axes, rows, legend)
    figure.write(path, dpi=200)
    return figure


def _staircase(frontier: Sequence[Point], edge: float) -> tuple[list[float], list[float]]:
    """The points of the frontier, and where it meets the `edge` of the picture on the right."""
    x, y = [float(row.bytes) for row in frontier], [row.value for row in frontier]
    return [*x, edge] if x else [], [*y, *y[-1:]]


def _places(figure: Picture, axes: Axes, rows: Sequence[Point]) -> list[Transform]:
    """The coordinates in which each point is drawn: points that would hide each other stand side by side."""
    spots = [axes.transData.transform([(row.bytes, row.lowest), (row.bytes, row.highest)]) for row in rows]
    clusters: list[list[int]] = []
    for number, ((x, low), (_, high)) in enumerate(spots):
        for cluster in clusters:
            others = [spots[other] for other in cluster]
            if any(
                abs(x - left) < MARKER and low < top + MARKER and high > bottom - MARKER
                for (left, bottom), (_, top) in others
            ):
                cluster.append(number)
                break
        else:
            clusters.append([number])
    shifts = [0.0] * len(rows)
    for cluster in clusters:
        for place, number in enumerate(cluster):
            shifts[number] = MARKER * (place - (len(cluster) - 1) / 2)
    inch = figure.dpi_scale_trans
    return [axes.transData + ScaledTranslation(shift / figure.dpi, 0, inch) for shift in shifts]


def _label(figure: Picture, axes: Axes, rows: Sequence[Point], legend: Legend) -> None:
    """Name each point at the first place around it where the name touches no other point, name or whisker."""
    figure.canvas.draw()
    taken = [legend.get_window_extent()]
    drawn = _places(figure, axes, rows)
    for row, transform in zip(rows, drawn, strict=True):
        (x, low), (_, high) = transform.transform([(row.bytes, row.lowest), (row.bytes, row.highest)])
        taken.append(Bbox.from_extents(x - 7, low - 7, x + 7, high + 7))
    places = [(9, 5, "left", "bottom"), (-9, 5, "right", "bottom"), (9, -5, "left", "top"), (-9, -5, "right", "top")]
    places += [(0, 12, "center", "bottom"), (0, -12, "center", "top"), (0, 24, "center", "bottom")]
    places += [
        (x * side, y, horizontal, "center") for x in (24, 38) for y in (0, 14, -14) for side, horizontal in SIDES
    ]
    common = common_suffix([row.name for row in rows])
    axes.set_title(visible(common.removeprefix("-")), loc="left", fontsize=10, color=DARK_INK)
    for row, transform in zip(rows, drawn, strict=True):
        for x, y, horizontal, vertical in places:
            text = axes.annotate(
                without_suffix(row.name, common),
                (row.bytes, row.value),
                (x, y),
                xycoords=transform,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8.5,
                color=INK if row.frontier else LIGHT_INK,
                weight="bold" if row.frontier else "normal",
            )
            box = text.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
            if (inside and not any(box.overlaps(other) for other in taken)) or (x, y) == places[-1][:2]:
                taken.append(box)
                break
            text.remove()


def plot_pareto_html(rows: Sequence[Point], context: int, quality: str, path: Path) -> None:
    """Write the same points as one HTML file that needs no network; hovering shows the figures."""
    import plotly.graph_objects as go

    frontier = [row for row in rows if row.frontier]
    x, y = _staircase(frontier, 1.5 * max((row.bytes for row in rows), default=1))
    figure = go.Figure()
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"shape": "hv", "color": BLUE, "width": 1.5},
        name="frontier",
        hoverinfo="skip",
    )
    for name, chosen, tint in (
        ("on the frontier", frontier, BLUE),
        ("dominated", [row for row in rows if not row.frontier], DOMINATED),
    ):
        figure.add_scatter(
            x=[row.bytes for row in chosen],
            y=[row.value for row in chosen],
            mode="markers+text",
            text=[html_text(row.name) for row in chosen],
            textposition="top right",
            cliponaxis=False,
            marker={"size": 10, "color": tint},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row.highest - row.value for row in chosen],
                "arrayminus": [row.value - row.lowest for row in chosen],
            },
            name=name,
            hovertext=[
                f"<b>{html_text(row.name)}</b><br>{quality} {row.value:.4f} ({row.runs} runs)<br>"
                f"stored {bytes_text(row.bytes)}: {number_text(row.kv_per_token)} B per token + "
                f"{bytes_text(row.kv_constant)}<br>"
                f"read per decoded token {bytes_text(row.kv_read)}<br>{row.params:,} parameters, {row.tokens:,} tokens"
                for row in chosen
            ],
            hoverinfo="text",
        )
    ticks = sorted({2**power for row in rows for power in (row.bytes.bit_length() - 1, row.bytes.bit_length())})
    figure.update_layout(
        template="plotly_white",
        legend={"orientation": "h", "y": 1.08},
        margin={"t": 40},
        xaxis={
            "type": "log",
            "title": f"KV cache of one sequence of {context:,} tokens (log scale)",
            "tickvals": ticks,
            "ticktext": [bytes_text(tick) for tick in ticks],
        },
        yaxis={"title": f"validation {quality} (lower is better)"},
    )
    figure.write_html(path, include_plotlyjs=True)
