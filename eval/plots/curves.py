"""Training curves: loss against tokens, seconds and FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.console import visible
from eval.histories import Curve
from eval.plots.style import (
    DARK_INK,
    REFERENCE,
    Axes,
    Look,
    Picture,
    common_suffix,
    fitting_legend,
    line_looks,
    literal_text,
    plain_axes,
    without_suffix,
)
from eval.units import count_text

EARLY = 0.05  # fraction of a run whose losses, falling from chance, do not set the scale
TITLES = {"val": "validation loss", "train": "training loss"}


@literal_text
def draw_curves(curves: Sequence[Curve], result: dict[str, Any], path: Path | None = None) -> Picture:
    """Draw a column each for tokens, seconds and FLOPs; validation above training if validation losses are compared.

    With a `path` the picture is also written there.
    """
    rows = ["val", "train"] if result["which"] == "val" else ["train"]
    unit = "CPU seconds" if result["clock"] == "cpu" else "seconds"
    columns = {"tokens": "training tokens", "seconds": f"{unit} of training", "flops": "training FLOPs"}
    figure = Picture(figsize=(11, 3.1 * len(rows) + 0.5))
    grid = figure.subplots(len(rows), 3, sharey="row", sharex="col", squeeze=False)
    looks = line_looks(len(curves))
    for which, line in zip(rows, grid, strict=True):
        for (key, label), axes in zip(columns.items(), line, strict=True):
            for curve, look in zip(curves, looks, strict=True):
                _draw(axes, curve, which, key, look)
            _frame(axes, result if which == result["which"] else None)
            if which == rows[-1]:
                axes.set_xlabel(label)
        line[0].set_ylim(*_limits(curves, which, result["target"]))
        line[0].set_ylabel(f"{TITLES[which]}, nats per token")
    figure.tight_layout(rect=(0, 0, 0.9, 0.98))
    _name(figure, grid[0][-1], curves, looks, rows[0])
    figure.write(path, dpi=160)
    return figure


def _draw(axes: Axes, curve: Curve, which: str, key: str, look: Look) -> None:
    color, style, marker = look
    steps, losses, lowest, highest = curve.mean(which)
    x = curve.axes(steps)[key]
    if which == "train":
        for seed in curve.by_seed():
            reported, raw, _, _ = seed.mean("raw")
            axes.plot(seed.axes(reported)[key], raw, ".", color=color, markersize=2, alpha=0.25, zorder=1)
    if len(curve.runs) > 1:
        axes.fill_between(x, lowest, highest, color=color, alpha=0.18, linewidth=0, zorder=2)
    marker = marker if which == "val" else ""
    axes.plot(x, losses, linestyle=style, color=color, linewidth=1.6, zorder=3, marker=marker, markersize=3.2)


def _frame(axes: Axes, result: dict[str, Any] | None) -> None:
    """Grid and ticks; with `result`, a line at the target loss."""
    plain_axes(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if result is not None:
        axes.axhline(result["target"], color=REFERENCE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)


def _tick(value: float) -> str:
    return count_text(value) if value < 1e12 else f"{value:.2g}".replace("e+", "e")


def _limits(curves: Sequence[Curve], which: str, target: float) -> tuple[float, float]:
    """Limits that show all losses but those of the first steps."""
    low, high = [target], [target]
    for curve in curves:
        steps, _, lowest, highest = curve.mean(which)
        late = steps >= EARLY * steps[-1]
        low.append(lowest[late].min())
        high.append(highest[late].max())
    margin = 0.06 * (max(high) - min(low)) or 0.1
    return min(low) - margin, max(high) + margin


def _name(
    figure: Picture,
    last: Axes,
    curves: Sequence[Curve],
    looks: Sequence[Look],
    which: str,
) -> None:
    """Name the lines at their ends right of the last column, or in a legend below where there is no room for them."""
    common = common_suffix([curve.name for curve in curves])
    names = [
        without_suffix(curve.name, common) + (f", {len(curve.runs)} seeds" if len(curve.runs) > 1 else "")
        for curve in curves
    ]
    figure.suptitle(visible(common.removeprefix("-")), x=0.01, y=0.985, ha="left", fontsize=10, color=DARK_INK)
    texts = []
    for curve, name, look in zip(curves, names, looks, strict=True):
        loss = curve.mean(which)[1][-1]
        right = last.get_yaxis_transform()
        text = last.annotate(
            name, (1.02, loss), xycoords=right, annotation_clip=False, va="center", fontsize=9, color=look.color
        )
        texts.append(text)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    overlap = any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    if not overlap and all(box.x1 <= figure.bbox.x1 for box in boxes):
        return
    for text in texts:
        text.remove()
    handles = [
        Line2D([], [], color=color, linestyle=style, marker=marker, markersize=4, linewidth=1.8, label=name)
        for name, (color, style, marker) in zip(names, looks, strict=True)
    ]
    legend = fitting_legend(figure, handles, 6, loc="lower center", fontsize=9, handlelength=3)
    figure.tight_layout(rect=(0, legend.get_window_extent().height / figure.bbox.height, 1, 1))
