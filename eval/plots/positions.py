"""Loss by position in the context, a line for each model or length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from eval.console import visible
from eval.plots.style import DARK_INK, Picture, line_looks, literal_text, plain_axes

if TYPE_CHECKING:  # which imports torch
    from eval.positions import Bucket


@literal_text
def draw_positions(series: "Mapping[str, Sequence[Bucket]]", title: str, path: Path | None = None) -> Picture:
    """Draw the loss of each bucket at the middle of its positions (log), a band of one standard error around it.

    With a `path` the picture is also written there.
    """
    figure = Picture(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for (name, buckets), look in zip(series.items(), line_looks(len(series)), strict=True):
        middle = [((bucket.first + 1) * bucket.end) ** 0.5 for bucket in buckets]
        nats = [bucket.nats for bucket in buckets]
        color, style, marker = look
        axes.plot(middle, nats, color=color, linestyle=style, marker=marker, markersize=3.5, label=visible(name))
        errors = [bucket.error or 0.0 for bucket in buckets]
        low, high = ([y + sign * error for y, error in zip(nats, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(middle, low, high, color=color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of context (log scale)")
    axes.set_ylabel("loss in nats per token  (lower is better)")
    axes.set_title(visible(title), loc="left", fontsize=10, color=DARK_INK)
    if len(series) > 1:
        # All lines: of itself, a legend leaves out names that begin with _.
        axes.legend(handles=axes.get_lines(), frameon=False, fontsize=8)
    plain_axes(axes)
    figure.write(path, dpi=160)
    return figure
