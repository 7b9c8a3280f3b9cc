"""Pictures of a study: loss against bytes and against decoding time, curves of loss and of learning rates."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from eval.figures import axis
from eval.plots.style import (
    DOMINATED,
    GRID,
    Axes,
    Beside,
    Picture,
    line_looks,
    literal_text,
    plain_axes,
    write_beside,
)
from eval.study_rows import Group, Row, frontier
from eval.units import bytes_text

# Where the name of a point may stand.
BESIDE = (
    *(Beside(x, y, end, "center_baseline") for y in (6, -6) for x, end in ((6, "left"), (-6, "right"))),
    *(Beside(0, side * rise, "center", "center_baseline") for rise in (10, 20, 30, 40) for side in (-1, 1)),
)
Looks = Mapping[str, tuple[str, str]]


def looks_of(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and dashes for each label."""
    return {label: tuple(look) for label, look in zip(labels, line_looks(len(labels)), strict=True)}  # type: ignore[misc]


def points(
    axes: Axes, places: Mapping[str, float], values: Mapping[str, Sequence[float]], looks: Looks, lower: bool = True
) -> None:
    """Draw the mean of `values` at `places`, and the frontier with a band from the lowest to the highest.

    lower  low values are the better ones
    """
    means = {name: statistics.fmean(values[name]) for name in places if values.get(name)}
    kept = frontier({name: (places[name], mean if lower else -mean) for name, mean in means.items()})
    axes.step([places[name] for name in kept], [means[name] for name in kept], where="post", color=DOMINATED, zorder=1)
    low, high = ([edge(values[name]) for name in kept] for edge in (min, max))
    axes.fill_between([places[name] for name in kept], low, high, step="post", color=GRID, alpha=0.6, zorder=0)
    for name, mean in means.items():
        spread = [[mean - min(values[name])], [max(values[name]) - mean]]
        color, style = looks[name]
        inside = color if style == "-" else "white"  # of a colour that a former layout has
        axes.errorbar(places[name], mean, yerr=spread, fmt="o", color=color, mfc=inside, markersize=5, capsize=2)
    plain_axes(axes)


def name_points(
    picture: Picture, axes: Axes, places: Mapping[str, float], values: Mapping[str, Sequence[float]], looks: Looks
) -> None:
    """Name the points of `points` in their colours, once their axes are as they stay: where no other name and no point
    is."""
    picture.canvas.draw()
    spots = {name: axes.transData.transform((places[name], statistics.fmean(values[name]))) for name in places}
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots.values()]

    def is_free(box: Bbox) -> bool:
        inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
        return inside and not any(box.overlaps(other) for other in taken)

    for name in sorted(places, key=lambda name: places[name]):
        at = places[name], statistics.fmean(values[name])
        taken += write_beside(axes, name, at, BESIDE, is_free, forced=True, fontsize=7, color=looks[name][0])


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


@literal_text
def draw_bytes(groups: Sequence[Group], contexts: Sequence[str], figure: str) -> Picture:
    """`figure` (`loss`, or a task's) against bytes of cache, a panel for each context."""
    looks = looks_of([group.label for group in groups])
    loss = figure == "loss"
    label = "validation loss, nats" if loss else axis(figure, 0).label
    values = {group.label: list(group.losses.values()) if loss else group.figures(figure) for group in groups}
    picture = Picture(figsize=(10, 7.2), layout="constrained")
    picture.suptitle(f"{label[0].upper()}{label[1:]}, against the cache; bars: range of the seeds", fontsize=11)
    for number, context in enumerate(contexts):
        axes = picture.add_subplot(2, 2, number + 1)
        places = {group.label: group.first["kv"][context][0] for group in groups}
        points(axes, places, values, looks, lower=loss)
        bytes_axis(axes)
        axes.set_xlabel(f"cache at {int(context):,} tokens (log scale)")
        axes.set_ylabel(label)
        name_points(picture, axes, {name: place for name, place in places.items() if values[name]}, values, looks)
    return picture


@literal_text
def draw_decoding(groups: Sequence[Group], title: str) -> Picture:
    """Loss against the measured time of a token."""
    picture = Picture(figsize=(6.4, 4.4), layout="constrained")
    axes = picture.add_subplot()
    places = {group.label: statistics.fmean(group.figures("decode/token_ms")) for group in groups}
    losses = {group.label: list(group.losses.values()) for group in groups}
    looks = looks_of([group.label for group in groups])
    points(axes, places, losses, looks)
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel("milliseconds per token")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    name_points(picture, axes, places, losses, looks)
    return picture


@literal_text
def draw_curves(groups: Sequence[Group], title: str) -> Picture:
    """Loss of validation against tokens, the mean over seeds with a band from the lowest to the highest."""
    looks = looks_of([group.label for group in groups])
    picture = Picture(figsize=(7.4, 4.8), layout="constrained")
    axes = picture.add_subplot()
    for group in groups:
        curves = [dict(map(tuple, row["val_curve"])) for row in group.rows]
        tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
        losses = [[curve[at] for curve in curves] for at in tokens]
        color, style = looks[group.label]
        axes.plot(tokens, [statistics.fmean(at) for at in losses], color=color, linestyle=style, label=group.label)
        axes.fill_between(tokens, [min(at) for at in losses], [max(at) for at in losses], color=color, alpha=0.15)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes)
    return picture


@literal_text
def draw_rates(rates: Mapping[str, Mapping[float, float]], title: str) -> Picture:
    """Loss against the learning rate, a line for each layout."""
    looks = looks_of(list(rates))
    picture = Picture(figsize=(6.4, 4.4), layout="constrained")
    axes = picture.add_subplot()
    for name, losses in rates.items():
        color, style = looks[name]
        axes.plot(
            list(losses), list(losses.values()), color=color, linestyle=style, marker="o", markersize=4, label=name
        )
    log_axis(axes)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes)
    return picture


def has_curves(rows: Sequence[Row]) -> bool:
    return all(len(row["val_curve"]) > 1 for row in rows)
