"""Caches of released models beside those of layouts, on one axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from arch import Plan
from arch.footprint import kv_bytes
from eval.console import visible
from eval.families import FAMILIES, family
from eval.plots.style import INK, STORE_COLORS, Picture, literal_text, plain_axes
from eval.units import bytes_text

ROW = 0.165  # inches


@literal_text
def draw_released(groups: Sequence[tuple[str, Mapping[str, Plan]]], context: int, path: Path | None = None) -> Picture:
    """Draw a column of names for each group, the heaviest first: a point for bytes stored at `context` tokens, a bar to
    those read for one token. Colours are families. With a `path` the picture is also written there."""
    rows = max(len(plans) for _, plans in groups)
    figure = Picture(figsize=(6.4 * len(groups), ROW * rows + 1.5), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharex=True)[0]
    colors = {each.title: color for each, color in zip(FAMILIES, STORE_COLORS, strict=False)}
    for axes, (title, plans) in zip(panels, groups, strict=True):
        order = sorted(plans, key=lambda name: kv_bytes(plans[name], context).stored)
        for place, name in enumerate(order):
            kv, color = kv_bytes(plans[name], context), colors[family(plans[name]).title]
            axes.plot([kv.stored, kv.read], [place, place], color=color, linewidth=1.2, alpha=0.7)
            axes.plot(kv.stored, place, marker="o", markersize=4.5, color=color)
            axes.plot(kv.read, place, marker="|", markersize=6, color=color)
        axes.set_yticks(range(len(order)), [visible(name) for name in order], fontsize=6.5)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=4, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        plain_axes(axes)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colors[each.title], label=each.title) for each in FAMILIES
    ]
    handles += [
        Line2D([], [], marker="o", color=INK, linestyle="", label="stored"),
        Line2D([], [], marker="|", color=INK, linestyle="", label="read per decoded token"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    figure.supxlabel(f"KV cache of one sequence of {context:,} tokens in bf16 (log scale)", fontsize=9)
    figure.write(path, dpi=130)
    return figure
