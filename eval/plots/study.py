"""Pictures of a study: loss against bytes and against decoding time, curves of loss and of learning rates."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from eval.figures import axis
from eval.plots.points import Name, Spot, boxes_of_steps, name_spots, side_by_side
from eval.plots.style import DOMINATED, GRID, Axes, Look, Picture, line_looks, literal_text, plain_axes
from eval.study_rows import Group, Row, frontier
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
) -> None:
    """Draw the mean of `values` at `places` with its name, and the frontier with a band from the lowest to the highest.
    The scales and labels of `axes` must be as they stay.

    lower  low values are the better ones
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
    kept = [by_name[of] for of in frontier({of: (x, y if lower else -y) for of, (x, y, *_) in by_name.items()})]
    kept.append(kept[-1]._replace(x=axes.get_xlim()[1]))  # whatever lies beyond it is dominated
    x, y, lowest, highest = zip(*kept, strict=True)
    axes.step(x, y, where="post", color=DOMINATED, zorder=1)
    axes.fill_between(x, lowest, highest, step="post", color=GRID, alpha=0.6, zorder=0)
    picture.canvas.draw()
    for name, spot, place in zip(named, spots, side_by_side(picture, axes, spots), strict=True):
        spread, look = [[spot.y - spot.lowest], [spot.highest - spot.y]], looks[name]
        style: dict[str, Any] = {"color": look.color, "markersize": 5, "capsize": 2, "transform": place}
        axes.errorbar(spot.x, spot.y, yerr=spread, fmt=look.marker, **style)
    names = [Name(number, name, {"fontsize": 7, "color": looks[name].color}) for number, name in enumerate(named)]
    names.sort(key=lambda name: spots[name.number].x)
    name_spots(picture, axes, spots, names, lines=boxes_of_steps(axes, x, y))


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
def draw_bytes(groups: Sequence[Group], contexts: Sequence[str], figure: str, looks: Looks) -> Picture:
    """`figure` (`loss`, or a task's) against bytes of cache, a panel for each context."""
    loss = figure == "loss"
    label, larger = ("validation loss, nats", False) if loss else (axis(figure, 0).label, axis(figure, 0).larger)
    values = {group.label: list(group.losses.values()) if loss else group.figures(figure) for group in groups}
    picture = Picture(figsize=(10, 7.2), layout="constrained")
    picture.suptitle(f"{label[0].upper()}{label[1:]}, against the cache\n{SHOWN}", fontsize=10)
    panels = {context: picture.add_subplot(2, 2, number) for number, context in enumerate(contexts, start=1)}
    for context, axes in panels.items():
        bytes_axis(axes)
        axes.set_xlabel(f"cache at {int(context):,} tokens (log scale)")
        axes.set_ylabel(label)
    for context, axes in panels.items():
        places = {group.label: group.first["kv"][context][0] for group in groups}
        points(picture, axes, places, values, looks, lower=not larger)
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
    """Loss of validation against tokens, the mean over seeds with a band from the lowest to the highest."""
    picture = Picture(figsize=(8.2, 4.8), layout="constrained")
    axes = picture.add_subplot()
    for group in groups:
        curves = [dict(map(tuple, row["val_curve"])) for row in group.rows]
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
def draw_rates(rates: Mapping[str, Mapping[float, float]], title: str, looks: Looks) -> Picture:
    """Loss against the learning rate, a line for each layout."""
    picture = Picture(figsize=(7.4, 4.4), layout="constrained")
    axes = picture.add_subplot()
    for name, losses in rates.items():
        line(axes, list(losses), list(losses.values()), name, looks)
    log_axis(axes)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    picture.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3)
    plain_axes(axes)
    return picture


def has_curves(rows: Sequence[Row]) -> bool:
    return all(len(row["val_curve"]) > 1 for row in rows)
