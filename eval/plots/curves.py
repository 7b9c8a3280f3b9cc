"""A picture of training: loss against tokens, seconds and FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.runs import Curve
from eval.units import count_text

# Okabe and Ito's, told apart by all kinds of sight; dashes after the seventh.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":")
EARLY = 0.05  # share of a run whose losses, on the way down from chance, set no scale
TITLES = {"val": "validation loss", "train": "training loss"}


def draw_curves(curves: Sequence[Curve], result: dict[str, Any], path: Path) -> None:
    """One column for each of tokens, seconds and FLOPs; validation above training where it is what is compared."""
    rows = ["val", "train"] if result["which"] == "val" else ["train"]
    unit = "CPU seconds" if result["clock"] == "cpu" else "seconds"
    columns = {"tokens": "training tokens", "seconds": f"{unit} of training", "flops": "training FLOPs"}
    figure, grid = plt.subplots(
        len(rows), 3, figsize=(11, 3.1 * len(rows) + 0.5), sharey="row", sharex="col", squeeze=False
    )
    looks = [(COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]) for i in range(len(curves))]
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
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def _draw(axes: plt.Axes, curve: Curve, which: str, key: str, look: tuple[str, str]) -> None:
    color, style = look
    steps, losses, lowest, highest = curve.mean(which)
    x = curve.axes(steps)[key]
    if which == "train":
        for one in curve.by_seed():
            reported, raw, _, _ = one.mean("raw")
            axes.plot(one.axes(reported)[key], raw, ".", color=color, markersize=2, alpha=0.25, zorder=1)
    if len(curve.runs) > 1:
        axes.fill_between(x, lowest, highest, color=color, alpha=0.18, linewidth=0, zorder=2)
    marker = {"marker": "o", "markersize": 3.2} if which == "val" else {}
    axes.plot(x, losses, style, color=color, linewidth=1.6, zorder=3, **marker)


def _frame(axes: plt.Axes, result: dict[str, Any] | None) -> None:
    """Grid and ticks, and the loss that is compared, in the row it is of."""
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if result is not None:
        axes.axhline(result["target"], color="#777777", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)


def _tick(value: float) -> str:
    return count_text(value) if value < 1e12 else f"{value:.2g}".replace("e+", "e")


def _limits(curves: Sequence[Curve], which: str, target: float) -> tuple[float, float]:
    """All losses but those of the first steps."""
    low, high = [target], [target]
    for curve in curves:
        steps, _, lowest, highest = curve.mean(which)
        late = steps >= EARLY * steps[-1]
        low.append(lowest[late].min())
        high.append(highest[late].max())
    margin = 0.06 * (max(high) - min(low)) or 0.1
    return min(low) - margin, max(high) + margin


def _name(
    figure: plt.Figure,
    last: plt.Axes,
    curves: Sequence[Curve],
    looks: Sequence[tuple[str, str]],
    which: str,
) -> None:
    """Names at the ends of the lines right of the last column; in a legend above where they would overlap."""
    endings = {"-" + curve.name.rpartition("-")[2] for curve in curves}
    common = endings.pop() if len(endings) == 1 and len(curves) > 1 else ""  # the size, said once
    names = [curve.name.removesuffix(common) + (f", {len(curve.runs)} seeds" if len(curve.runs) > 1 else "")
             for curve in curves]  # fmt: skip
    figure.suptitle(common.removeprefix("-"), x=0.01, y=0.985, ha="left", fontsize=10, color="#555555")
    texts = []
    for curve, name, (color, _) in zip(curves, names, looks, strict=True):
        loss = curve.mean(which)[1][-1]
        place = {"xy": (1.02, loss), "xycoords": last.get_yaxis_transform(), "annotation_clip": False}
        texts.append(last.annotate(name, **place, va="center", fontsize=9, color=color))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    if not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i]):
        return
    for text in texts:
        text.remove()
    handles = [
        Line2D([], [], color=color, linestyle=style, linewidth=1.8, label=name)
        for name, (color, style) in zip(names, looks, strict=True)
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    figure.tight_layout()
