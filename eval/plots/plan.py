"""Ownership map of a plan: which layer writes which store, and which layers read it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from arch import KVPlan, Plan, StoreSpec
from arch.footprint import kv_bytes
from eval.console import visible
from eval.plots.style import (
    BLUE,
    DARK_INK,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    STORE_COLORS,
    TEAL,
    Axes,
    Picture,
    fitting_legend,
    literal_text,
)
from eval.units import bytes_text, counted

KEY = "#444444"  # in the legend, of what every store type has; no type has it
SINK: dict[str, Any] = {"marker": "v", "markersize": 5}


@literal_text
def draw_plan(plan: Plan, title: str, context: int, itemsize: int = 2, path: Path | None = None) -> Picture:
    """Draw the layers from left (lowest) to right and above each owner the store it writes, with lines to its readers.

    One map for each stack of the model. With a `path` the picture is also written there.
    """
    stacks = plan.stacks
    titles = [f"{title}, {stacks[0].title}".removesuffix(", "), *(stack.title for stack in stacks[1:])]
    layers = max(stack.plan.num_layers for stack in stacks)
    figure = Picture(figsize=(max(7.0, 0.42 * layers + 1.5), 3.6 * len(stacks)))
    rows = figure.subplots(len(stacks), squeeze=False)
    for axes, stack, name in zip(rows[:, 0], stacks, titles, strict=True):
        _draw_stack(axes, stack.plan, name, stack.num_positions(context), stack.unit, itemsize, layers)
    figure.subplots_adjust(hspace=0.4)
    figure.write(path, dpi=160, bbox_inches="tight")
    return figure


# Of a kind that is not here, a colour that is left.
KIND_COLORS = {
    "grouped": BLUE,
    "latent": GREEN,
    "strided_latent": GREEN,
    "bounded": PURPLE,
    "matrix": TEAL,
}
LEGEND_COLUMNS = 4
# Lines from a second store, by how it is read.
DASHES: dict[str, Literal["--", ":"]] = {"values": "--", "mix": ":"}


def _draw_stack(axes: Axes, plan: KVPlan, title: str, context: int, unit: str, itemsize: int, num_layers: int) -> None:
    """Draw one stack. `context` counts in `unit`s: tokens, blocks, or positions within a block."""
    types = list({store.name: store for store in plan.stores}.values())
    color = _colors(types)
    store_y, layer_y, half = 1.35, 0.0, 0.36
    for layer in range(plan.num_layers):
        store = plan.store(layer)
        owner = store.owner == layer
        tint = color[store.name]
        if (own := plan.own_window(layer)) is not None:
            axes.text(layer, layer_y - 0.31, str(own), ha="center", va="center", fontsize=7, color=tint)
        _box(axes, layer, layer_y, half, 0.2, face=tint if owner else "white", edge=tint)
        axes.text(layer, layer_y, str(layer), ha="center", va="center", fontsize=8, color="white" if owner else INK)
        if owner:
            _box(axes, layer, store_y, half, 0.2, face=tint, edge=tint)
            kept = [str(number) for _, number in store.retention] or ["all" if store.grows else "state"]
            if store.pools:
                kept[-1] = f"1 in\n{kept[-1]}"
            text = "\n+".join(kept)
            axes.text(layer, store_y, text, ha="center", va="center", fontsize=7, color="white")
            _line(axes, (layer, layer_y + 0.2), (layer, store_y - 0.2), tint, width=2.2, style="-|>")
            if store.sinks:
                axes.plot(layer, store_y + 0.28, **SINK, color=tint)
        else:
            _line(axes, (store.owner + 0.12, store_y - 0.2), (layer, layer_y + 0.2), tint, width=0.9, style="-|>")
        if (second := plan.second_read(layer)) is not None:
            other = plan.stores[second.store]
            start, end = (other.owner + 0.12, store_y - 0.2), (layer + 0.12, layer_y + 0.2)
            _line(axes, start, end, color[other.name], width=0.9, style="-|>", dashes=DASHES[second.how])
    kv = kv_bytes(plan, context, itemsize)
    stores = f"{counted(len(plan.stores), 'store')} for {counted(plan.num_layers, 'layer')}"
    axes.text(-0.4, 2.2, visible(f"{title}: {stores}"), fontsize=11, weight="bold")
    figures = (
        f"{kv.per_token:,} B per {unit} + {bytes_text(kv.constant)} of windows, slots and states;\n"
        f"at {context:,} {unit}s {bytes_text(kv.stored)} stored, {bytes_text(kv.read)} read per decoded {unit}"
    )
    axes.text(-0.4, 1.76, figures, va="bottom", fontsize=9, color=DARK_INK)
    axes.set_yticks([layer_y, store_y], ["layer", "store\n(positions, slots)"], fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlim(-0.8, num_layers - 0.2)
    axes.set_ylim(-0.4, 2.2)
    axes.spines[:].set_visible(False)
    handles: list[Any] = [
        Patch(color=color[store.name], label=visible(f"{store.name}: {_weight(store, context, itemsize)}"))
        for store in types
    ]
    handles += [
        Patch(facecolor=KEY, edgecolor=INK, label="layer that writes a store and reads it"),
        Patch(facecolor="white", edgecolor=INK, label="layer that only reads"),
    ]
    if plan.reader_windows:
        handles.append(Patch(facecolor="white", edgecolor="white", label="below a layer: last positions it sees"))
    hows = dict.fromkeys(second.how for second in plan.second_reads if second)
    for how, label in (("values", "values of it alone, for keys of another"), ("mix", "mixed with another")):
        if how in hows:
            handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=DASHES[how], label=label))
    if any(store.sinks for store in types):
        handles.append(Line2D([], [], **SINK, linestyle="", color=INK, label="with attention sinks"))
    fitting_legend(axes, handles, LEGEND_COLUMNS, loc="upper left", bbox_to_anchor=(0, -0.02), fontsize=8)


def _weight(store: StoreSpec, context: int, itemsize: int) -> str:
    """Bytes per position; for a bounded store, whose slots are larger than its positions, and for a matrix per head,
    bytes in total."""
    if not store.grows:
        return f"{bytes_text(store.nbytes(context, itemsize))} at any context"
    return f"{sum(store.slot_bytes(itemsize)):,} B per {'slot' if store.pools else 'position'}"


def _colors(types: Sequence[StoreSpec]) -> dict[str, str]:
    """Colour by name, a different one while there are any: green for latents, purple for bounded stores, teal for a
    matrix per head, orange for windows, blue for stores that keep everything; further types take what is left."""
    left = list(STORE_COLORS)
    result = {}
    for store in types:
        wanted = ORANGE if store.kind == "grouped" and store.window else KIND_COLORS.get(store.kind)
        if wanted in left:
            result[store.name] = left.pop(left.index(wanted))
    for number, store in enumerate(store for store in types if store.name not in result):
        result[store.name] = left[number] if number < len(left) else STORE_COLORS[number % len(STORE_COLORS)]
    return {store.name: result[store.name] for store in types}


def _box(axes: Axes, x: float, y: float, half: float, half_height: float, *, face: str, edge: str) -> None:
    corner = (x - half, y - half_height)
    shape = FancyBboxPatch(
        corner, 2 * half, 2 * half_height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=face, edgecolor=edge
    )
    shape.set_linewidth(1.4)
    axes.add_patch(shape)


def _line(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    tint: str,
    *,
    width: float,
    style: str,
    dashes: Literal["-", "--", ":"] = "-",
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=7,
            color=tint,
            linewidth=width,
            linestyle=dashes,
            shrinkA=0,
            shrinkB=0,
        )
    )
