"""Pictures: a plan's ownership map, and KV footprint against quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from arch import KVPlan, Plan, StoreSpec
from arch.footprint import kv_bytes, slot_bytes, store_bytes
from eval.units import bytes_text, number_text

if TYPE_CHECKING:
    from eval.pareto import Point

COLORS = ("#2f6fb0", "#e08a1e", "#3a9a5b", "#a2559c", "#7f7f7f")
KINDS = (COLORS[2], COLORS[3], COLORS[1], COLORS[0])  # latents, slots, windows, all
INK = "#222222"


def draw_plan(plan: Plan, title: str, context: int, itemsize: int, path: Path) -> None:
    """Layers from left (lowest) to right; above each owner the store it writes, with lines to its readers. One map for
    each stack of the model."""
    stacks = plan.stacks
    titles = [f"{title}, {stacks[0].title}".removesuffix(", "), *(stack.title for stack in stacks[1:])]
    layers = max(stack.plan.num_layers for stack in stacks)
    figure, rows = plt.subplots(len(stacks), figsize=(max(7.0, 0.42 * layers + 1.5), 3.6 * len(stacks)), squeeze=False)
    for axes, stack, name in zip(rows[:, 0], stacks, titles, strict=True):
        _draw_stack(axes, stack.plan, name, stack.num_positions(context), stack.unit, itemsize, layers)
    figure.subplots_adjust(hspace=0.3)
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _draw_stack(
    axes: plt.Axes, plan: KVPlan, title: str, context: int, unit: str, itemsize: int, num_layers: int
) -> None:
    """`context` counts in units: tokens, blocks, or positions within a block."""
    types = list({store.name: store for store in plan.stores}.values())
    color = _colors(types)
    store_y, layer_y, half = 1.35, 0.0, 0.36
    for layer in range(plan.num_layers):
        store = plan.store(layer)
        owner = store.owner == layer
        tint = color[store.name]
        _box(axes, layer, layer_y, half, 0.2, face=tint if owner else "white", edge=tint)
        axes.text(layer, layer_y, str(layer), ha="center", va="center", fontsize=8, color="white" if owner else INK)
        if owner:
            _box(axes, layer, store_y, half, 0.2, face=tint, edge=tint)
            text = (
                "all" if store.max_positions is None else "+".join(str(n) for n in (store.window, store.num_slots) if n)
            )
            axes.text(layer, store_y, text, ha="center", va="center", fontsize=7, color="white")
            _line(axes, (layer, layer_y + 0.2), (layer, store_y - 0.2), tint, width=2.2, style="-|>")
        else:
            _line(axes, (store.owner + 0.12, store_y - 0.2), (layer, layer_y + 0.2), tint, width=0.9, style="-|>")
    kv = kv_bytes(plan, context, itemsize)
    stores = f"{len(plan.stores)} stores for {plan.num_layers} layers"
    axes.text(-0.4, 2.05, f"{title}: {stores}", fontsize=11, weight="bold")
    figures = (
        f"{kv.per_token:,} B per {unit} + {bytes_text(kv.constant)} of windows and slots; at {context:,} {unit}s "
        f"{bytes_text(kv.stored)} stored, {bytes_text(kv.read)} read per decoded {unit}"
    )
    axes.text(-0.4, 1.8, figures, fontsize=9, color="#555555")
    axes.set_yticks([layer_y, store_y], ["layer", "store\n(positions, slots)"], fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlim(-0.8, num_layers - 0.2)
    axes.set_ylim(-0.4, 2.2)
    axes.spines[:].set_visible(False)
    handles = [
        Patch(color=color[store.name], label=f"{store.name}: {_weight(store, context, itemsize)}") for store in types
    ]
    handles += [
        Patch(facecolor="#999999", edgecolor="#999999", label="writes and reads"),
        Patch(facecolor="white", edgecolor="#999999", label="only reads"),
    ]
    axes.legend(
        handles=handles, ncols=len(handles), loc="upper left", bbox_to_anchor=(0, -0.02), frameon=False, fontsize=8
    )


def _weight(store: StoreSpec, context: int, itemsize: int) -> str:
    """Bytes of a position; of a bounded store, whose slots weigh more than its positions, of all it holds."""
    if store.num_slots:
        return f"{bytes_text(store_bytes(store, context, itemsize))} at any context"
    return f"{slot_bytes(store, itemsize):,} B per position"


def _colors(types: Sequence[StoreSpec]) -> dict[str, str]:
    """Blue for stores that keep everything, orange for windows, green for latents, purple for bounded stores; further
    types take what is left."""
    left = list(COLORS)
    result = {}
    for store in types:
        kinds = (store.slot.latent_dim, store.num_slots, store.window, True)
        wanted = next(color for color, kind in zip(KINDS, kinds, strict=True) if kind)
        result[store.name] = left.pop(left.index(wanted)) if wanted in left else left.pop() if left else "#7f7f7f"
    return result


def _box(axes: plt.Axes, x: float, y: float, half: float, half_height: float, *, face: str, edge: str) -> None:
    corner = (x - half, y - half_height)
    shape = FancyBboxPatch(
        corner, 2 * half, 2 * half_height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=face, edgecolor=edge
    )
    shape.set_linewidth(1.4)
    axes.add_patch(shape)


def _line(
    axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], tint: str, *, width: float, style: str
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=7, color=tint, linewidth=width, shrinkA=0, shrinkB=0
        )
    )


def draw_pareto(rows: Sequence["Point"], context: int, quality: str, path: Path) -> None:
    """Bytes (log) against quality (lower is better): the frontier as a staircase, the seeds' spread as whiskers."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    axes.set_xscale("log", base=2)
    if len({row.bytes for row in rows}) == 1:
        axes.set_xlim(rows[0].bytes / 2, rows[0].bytes * 2)
    frontier = [row for row in rows if row.frontier]
    for row in rows:
        tint = COLORS[0] if row.frontier else "#8a8a8a"
        if row.runs > 1:
            axes.vlines(row.bytes, row.lowest, row.highest, color=tint, linewidth=1.6, zorder=2)
            axes.scatter([row.bytes] * 2, [row.lowest, row.highest], marker="_", color=tint, s=60, zorder=2)
        face = tint if row.frontier else "white"
        axes.scatter(row.bytes, row.value, s=52, facecolor=face, edgecolor=tint, linewidth=1.5, zorder=3)
    axes.margins(x=0.12, y=0.16)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"KV cache of one sequence of {context:,} tokens (log scale)")
    axes.set_ylabel(f"validation {quality}  (lower is better)")
    # The staircase goes on to the right: whatever lies above it is dominated.
    edge = axes.get_xlim()[1]
    steps = {"where": "post", "color": COLORS[0], "linewidth": 1.4, "alpha": 0.6, "zorder": 1}
    axes.step([*(row.bytes for row in frontier), edge], [*(row.value for row in frontier), frontier[-1].value], **steps)
    axes.set_xlim(right=edge)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    runs = sorted({row.runs for row in rows})
    spread = "; whiskers: lowest and highest seed" if runs[-1] > 1 else ""
    handles = [
        Line2D([], [], marker="o", color=COLORS[0], label="on the frontier"),
        Line2D([], [], marker="o", color="#8a8a8a", markerfacecolor="white", linestyle="", label="dominated" + spread),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")
    _label(figure, axes, rows)
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def _label(figure: plt.Figure, axes: plt.Axes, rows: Sequence["Point"]) -> None:
    """Name each point at the first place around it where the name touches no other point, name or whisker."""
    figure.canvas.draw()
    legend = axes.get_legend().get_window_extent()
    taken = [legend]
    for row in rows:
        (x, low), (_, high) = axes.transData.transform([(row.bytes, row.lowest), (row.bytes, row.highest)])
        taken.append(Bbox.from_extents(x - 7, low - 7, x + 7, high + 7))
    places = [(9, 5, "left", "bottom"), (-9, 5, "right", "bottom"), (9, -5, "left", "top"), (-9, -5, "right", "top")]
    places += [(0, 12, "center", "bottom"), (0, -12, "center", "top"), (0, 24, "center", "bottom")]
    names = [row.name for row in rows]
    endings = {name[name.rfind("-") :] if "-" in name else name for name in names}
    common = endings.pop() if len(endings) == 1 and len(rows) > 1 else ""  # the size, said once
    axes.set_title(common.removeprefix("-"), loc="left", fontsize=10, color="#555555")
    for row in rows:
        for x, y, horizontal, vertical in places:
            text = axes.annotate(
                row.name.removesuffix(common),
                (row.bytes, row.value),
                (x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8.5,
                color=INK if row.frontier else "#666666",
                weight="bold" if row.frontier else "normal",
            )
            box = text.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
            if (inside and not any(box.overlaps(other) for other in taken)) or (x, y) == places[-1][:2]:
                taken.append(box)
                break
            text.remove()


def plot_pareto_html(rows: Sequence["Point"], context: int, quality: str, path: Path) -> None:
    """The same points as one HTML file that needs no network: hover for the figures."""
    import plotly.graph_objects as go

    frontier = [row for row in rows if row.frontier]
    edge = 1.5 * max(row.bytes for row in rows)
    figure = go.Figure()
    figure.add_scatter(
        x=[*(row.bytes for row in frontier), edge],
        y=[*(row.value for row in frontier), frontier[-1].value],
        mode="lines",
        line={"shape": "hv", "color": COLORS[0], "width": 1.5},
        name="frontier",
        hoverinfo="skip",
    )
    for name, chosen, tint in (
        ("on the frontier", frontier, COLORS[0]),
        ("dominated", [row for row in rows if not row.frontier], "#8a8a8a"),
    ):
        figure.add_scatter(
            x=[row.bytes for row in chosen],
            y=[row.value for row in chosen],
            mode="markers+text",
            text=[row.name for row in chosen],
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
                f"<b>{row.name}</b><br>{quality} {row.value:.4f} ({row.runs} runs)<br>"
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
