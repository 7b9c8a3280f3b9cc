"""Pictures of a study: loss against bytes and against decoding time, curves of loss and of learning rates."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from eval.figures import axis
from eval.plots.points import Name, Spot, boxes_of_steps, name_spots, side_by_side
from eval.plots.style import DOMINATED, GRID, Axes, Look, Picture, line_looks, literal_text, plain_axes
from eval.published import Order
from eval.study_rows import Group, Search, frontier
from eval.units import bytes_text

SHOWN = "bars: range of the seeds; grey: the frontier, and the range of its seeds; points of one place: side by side"
Looks = Mapping[str, Look]


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """A look for each different label, to be the same in all pictures of a report."""
    different = list(dict.fromkeys(labels))
    return dict(zip(different, line_looks(len(different)), strict=True))


def points(
    picture: Picture,
    axes: Axes,
    places: Mapping[str, float],
    values: Mapping[str, Sequence[float]],
    looks: Looks,
    lower: bool = True,
    stepped: bool = True,
) -> None:
    """Draw the mean of `values` at `places` with its name, and the frontier with a band from the lowest to the highest.
    The scales and labels of `axes` must be as they stay.

    lower    low values are the better ones
    stepped  draw the frontier
    """
    named = [name for name in places if values.get(name)]
    plain_axes(axes)
    if not named:  # all runs diverged
        return
    spots = [Spot(places[of], statistics.fmean(values[of]), min(values[of]), max(values[of])) for of in named]
    for spot in spots:  # sets the limits
        axes.plot([spot.x] * 2, [spot.lowest, spot.highest], linestyle="")
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    by_name = dict(zip(named, spots, strict=True))
    lines: list[Bbox] = []
    if stepped:
        kept = [by_name[of] for of in frontier({of: (x, y if lower else -y) for of, (x, y, *_) in by_name.items()})]
        kept.append(kept[-1]._replace(x=axes.get_xlim()[1]))  # whatever lies beyond it is dominated
        x, y, lowest, highest = zip(*kept, strict=True)
        axes.step(x, y, where="post", color=DOMINATED, zorder=1)
        axes.fill_between(x, lowest, highest, step="post", color=GRID, alpha=0.6, zorder=0)
        lines = boxes_of_steps(axes, x, y)
    picture.canvas.draw()
    for name, spot, place in zip(named, spots, side_by_side(picture, axes, spots), strict=True):
        spread, look = [[spot.y - spot.lowest], [spot.highest - spot.y]], looks[name]
        style: dict[str, Any] = {"color": look.color, "markersize": 5, "capsize": 2, "transform": place}
        axes.errorbar(spot.x, spot.y, yerr=spread, fmt=look.marker, **style)
    names = [Name(number, name, {"fontsize": 7, "color": looks[name].color}) for number, name in enumerate(named)]
    names.sort(key=lambda name: spots[name.number].x)
    name_spots(picture, axes, spots, names, lines=lines)


def bytes_axis(axes: Axes) -> None:
    """Make x logarithmic, with sizes at powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.margins(x=0.12, y=0.16)


def log_axis(axes: Axes) -> None:
    """Make x logarithmic, with plain numbers at 1, 2 and 5 of each power of ten, and room for names at the right."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)


def line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, looks: Looks) -> None:
    color, style, marker = looks[label]
    axes.plot(x, y, color=color, linestyle=style, marker=marker, markersize=4, label=label)


@literal_text
def draw_bytes(groups: Sequence[Group], contexts: Sequence[int], figure: str, looks: Looks) -> Picture:
    """`figure` (`loss`, or a task's) against bytes of cache, a panel for each of `contexts`: of an odd number the first
    is as wide as two."""
    loss = figure == "loss"
    label, larger = ("validation loss, nats", False) if loss else (axis(figure, 0).label, axis(figure, 0).larger)
    values = {group.label: list(group.losses.values()) if loss else group.figures(figure) for group in groups}
    wide = len(contexts) % 2
    lines = (len(contexts) + wide) // 2
    picture = Picture(figsize=(10, 3.6 * lines), layout="constrained")
    picture.suptitle(f"{label[0].upper()}{label[1:]}, against the cache\n{SHOWN}", fontsize=10)
    grid = picture.add_gridspec(lines, 2)
    cells = [grid[0, :]] * wide + [grid[line, column] for line in range(wide, lines) for column in range(2)]
    panels = {context: picture.add_subplot(cell) for context, cell in zip(contexts, cells, strict=True)}
    trained = {group.first["seq_len"] for group in groups}
    for context, axes in panels.items():
        bytes_axis(axes)
        axes.set_title(context_title(context, trained, loss), fontsize=9)
        axes.set_xlabel(f"cache at {context:,} tokens (log scale)")
        axes.set_ylabel(label)
    for context, axes in panels.items():
        places = {group.label: stored for group in groups if (stored := group.stored(context)) is not None}
        points(picture, axes, places, values, looks, lower=not larger)
    return picture


def context_title(context: int, trained: Collection[int], loss: bool) -> str:
    """Title of a panel of bytes at `context`, of models that were `trained` at these lengths; a task may have measured
    at another."""
    if not loss:
        return f"Bytes at {context:,} tokens, the figure as its task measured it"
    if {context} == set(trained):
        return f"At the trained length, {context:,} tokens"
    start = "Extrapolation: bytes" if context > max(trained) else "Bytes"
    return f"{start} at {context:,} tokens, loss at the trained length"


@literal_text
def draw_published(groups: Sequence[Group], order: Order, looks: Looks) -> Picture:
    """Loss against published figures: if both have one order, points ascend."""
    picture = Picture(figsize=(7.4, 4.8), layout="constrained")
    axes = picture.add_subplot()
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel(order.published.name)
    axes.set_ylabel("validation loss, nats")
    axes.set_title("Losses here against published figures\nbars: range of the seeds", fontsize=9)
    figures = order.published.figures
    places = {group.label: figures[name] for group in groups if (name := group.first["arch"]) in order.layouts}
    losses = {group.label: list(group.losses.values()) for group in groups}
    points(picture, axes, places, losses, looks, stepped=False)
    return picture


@literal_text
def draw_decoding(groups: Sequence[Group], title: str, looks: Looks) -> Picture:
    """Loss against the measured time of a token."""
    picture = Picture(figsize=(7.4, 4.8), layout="constrained")
    axes = picture.add_subplot()
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel("milliseconds per token")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(f"{title}\n{SHOWN}", fontsize=9)
    places = {group.label: statistics.fmean(group.figures("decode/token_ms")) for group in groups}
    losses = {group.label: list(group.losses.values()) for group in groups}
    points(picture, axes, places, losses, looks)
    return picture


@literal_text
def draw_curves(groups: Sequence[Group], title: str, looks: Looks) -> Picture:
    """Loss of validation against tokens, the mean over the seeds that ended, with a band from lowest to highest."""
    picture = Picture(figsize=(8.2, 4.8), layout="constrained")
    axes = picture.add_subplot()
    for group in groups:
        curves = [dict(map(tuple, row["val_curve"])) for row in group.rows if row["loss"] is not None]
        tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
        losses = [[curve[at] for curve in curves] for at in tokens]
        line(axes, tokens, [statistics.fmean(at) for at in losses], group.label, looks)
        low, high = ([edge(at) for at in losses] for edge in (min, max))
        axes.fill_between(tokens, low, high, color=looks[group.label].color, alpha=0.15)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    picture.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3)
    plain_axes(axes)
    return picture


@literal_text
def draw_rates(tried: Sequence[Search], title: str, looks: Looks) -> Picture:
    """Loss against the learning rate, a line for each layout; above, by name, the rates at which one diverged."""
    picture = Picture(figsize=(7.4, 4.4), layout="constrained")
    axes = picture.add_subplot()
    diverged: list[tuple[str, list[float]]] = []
    for search in tried:
        ended = {lr: loss for lr, loss in search.losses.items() if loss is not None}
        line(axes, list(ended), list(ended.values()), search.label, looks)
        if rest := [lr for lr in search.losses if lr not in ended]:
            diverged.append((search.label, rest))
    low, high = axes.get_ylim()
    step = 0.06 * (high - low)
    axes.set_ylim(low, high + step * len(diverged))
    for number, (label, rates) in enumerate(diverged):  # one above the other, as layouts share rates
        axes.plot(rates, [high + step * number] * len(rates), marker="x", linestyle="", color=looks[label].color)
        for lr in rates:
            place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, (lr, high + step * number), fontsize=7, color=looks[label].color, **place)
    title += "\nx: diverged, at no loss" * bool(diverged)
    log_axis(axes)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    picture.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3)
    plain_axes(axes)
    return picture


def has_curves(groups: Sequence[Group]) -> bool:
    """Tell whether there is a curve of every run that ended, and any."""
    ended = [row for group in groups for row in group.rows if row["loss"] is not None]
    return bool(ended) and all(len(row["val_curve"]) > 1 for row in ended)
