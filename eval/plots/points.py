"""Points that hide no other, and names beside them that cannot be taken for those of another."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox, ScaledTranslation, Transform

from eval.plots.style import LIGHT_INK, Axes, Picture

MARKER, WHISKER = 13, 3  # widths of a point with room around it, and of a line, in pixels
OVER = 6  # pixels that a name may stand out of its axes on the right, where there is nothing
CLEARLY = 1.5  # times as far away as its own point is from a name, at least, any other
Mark = tuple[float, float]  # pixels
LEADER = {"arrowstyle": "-", "color": LIGHT_INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}


class Spot(NamedTuple):
    """A point, and the ends of its whisker, in the units of its axes."""

    x: float
    y: float
    lowest: float
    highest: float


class Name(NamedTuple):
    """The text beside the point with a number, and its look. `forced`: it is written where there is no room, too."""

    number: int
    text: str
    look: dict[str, Any]
    forced: bool = True


class Beside(NamedTuple):
    """Place of a text beside its point: offset in points, and the ends of the text that are there."""

    x: float
    y: float
    horizontal: str
    vertical: str


SIDES = ((1, "left"), (-1, "right"))
# Where the name of a point may stand.
AROUND = (
    *(Beside(9 * side, y, end, vertical) for y, vertical in ((5, "bottom"), (-5, "top")) for side, end in SIDES),
    Beside(0, 12, "center", "bottom"),
    Beside(0, -12, "center", "top"),
    Beside(0, 24, "center", "bottom"),
    Beside(0, 36, "center", "bottom"),
    Beside(0, -24, "center", "top"),
    Beside(0, -36, "center", "top"),
    *(Beside(x * side, y, end, "center") for x in (24, 38) for y in (0, 14, -14) for side, end in SIDES),
)


def side_by_side(figure: Picture, axes: Axes, spots: Sequence[Spot]) -> list[Transform]:
    """The coordinates in which each point is drawn: points that would hide each other stand side by side, in
    their order."""
    ends = [axes.transData.transform([(x, of) for of in (y, low, high)]) for x, y, low, high in spots]
    drawn = [(x, *sorted((y, low, high))) for ((x, y), (_, low), (_, high)) in ends]
    clusters: list[list[int]] = []
    for number, (x, low, y, high) in enumerate(drawn):
        for cluster in clusters:  # by their first points alone, so that none is moved far
            left, bottom, middle, top = drawn[cluster[0]]
            as_one = abs(x - left) < WHISKER and low < top and high > bottom
            if as_one or (abs(x - left) < MARKER and abs(y - middle) < MARKER):
                cluster.append(number)
                break
        else:
            clusters.append([number])
    shifts = [0.0] * len(spots)
    for cluster in clusters:
        for place, number in enumerate(sorted(cluster, key=lambda number: spots[number].x)):
            shifts[number] = MARKER * (place - (len(cluster) - 1) / 2)
    inch = figure.dpi_scale_trans
    return [axes.transData + ScaledTranslation(shift / figure.dpi, 0, inch) for shift in shifts]


def name_spots(
    figure: Picture,
    axes: Axes,
    spots: Sequence[Spot],
    names: Sequence[Name],
    taken: Sequence[Bbox] = (),
    lines: Sequence[Bbox] = (),
) -> None:
    """Name points that stand `side_by_side`, in the order of `names`: each at the first place around it where its name
    touches no point, name or whisker, and nothing that is in `taken`. Places where it is not over `lines` come before
    those where it is, and then those where no other point is about as near; elsewhere a line leads to its point."""
    figure.canvas.draw()
    drawn = side_by_side(figure, axes, spots)
    marks, taken, written = [], list(taken), list[Bbox]()
    left, bottom, right, top = axes.bbox.extents
    room = Bbox.from_extents(left, bottom, min(right + OVER, figure.bbox.x1), top)
    for spot, transform in zip(spots, drawn, strict=True):
        (x, y), (_, low), (_, high) = transform.transform([(spot.x, of) for of in spot[1:]])
        marks.append((x, y))
        taken.append(Bbox.from_extents(x - 7, low - 7, x + 7, high + 7))

    def faults(box: Bbox, number: int) -> tuple[int, bool, bool]:
        """The faults of a place for the name of a point, the worst first: no room, over a line, too near to another
        point."""
        own, others = marks[number], marks[:number] + marks[number + 1 :]
        inside = room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1)
        led = any(distance(box, other) < CLEARLY * distance(box, own) for other in others)
        hidden = touches(box, [*taken, *written]) or (led and touches(gap(box, own), written))
        return 2 * (not inside) + hidden, touches(box, lines), led

    for number, text, look, forced in names:
        look = {**look, "xycoords": drawn[number]}
        found = []
        for place in AROUND:
            note, box = write(axes, text, spots[number][:2], place, **look)
            found.append((faults(box, number), box, place))
            note.remove()
        (no_room, _, led), box, place = min(found, key=lambda each: each[0])
        if not no_room or forced:
            write(axes, text, spots[number][:2], place, arrowprops=LEADER if led else None, **look)
            written += [box, gap(box, marks[number])] if led else [box]


def touches(box: Bbox, others: Sequence[Bbox]) -> bool:
    return any(box.overlaps(other) for other in others)


def boxes_of_steps(axes: Axes, x: Sequence[float], y: Sequence[float]) -> list[Bbox]:
    """Boxes around the lines of a staircase, for names to keep clear of."""
    corners = list(zip(x, y, strict=True))
    for number, turn in enumerate(zip(x[1:], y[:-1], strict=True)):
        corners.insert(2 * number + 1, turn)
    drawn = [axes.transData.transform(corner) for corner in corners]
    boxes = [Bbox([start, end]) for start, end in itertools.pairwise(drawn)]
    return [Bbox.from_extents(box.xmin - 1, box.ymin - 1, box.xmax + 1, box.ymax + 1) for box in boxes]


def gap(box: Bbox, mark: Mark) -> Bbox:
    """The box between a box and a point outside it."""
    (x, y), near_x, near_y = mark, np.clip(mark[0], box.x0, box.x1), np.clip(mark[1], box.y0, box.y1)
    return Bbox.from_extents(min(x, near_x), min(y, near_y), max(x, near_x), max(y, near_y))


def distance(box: Bbox, mark: Mark) -> float:
    """From a box to a point, in pixels."""
    return math.hypot(*gap(box, mark).size)


def write_beside(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    places: Sequence[Beside],
    is_free: Callable[[Bbox], bool],
    forced: bool,
    **look: Any,
) -> list[Bbox]:
    """Write `text` at the first of `places` whose box `is_free`; where none is, at the last if it is `forced`.

    Returns its box, in a list that is empty if nothing was written. The canvas must have been drawn.
    """
    for number, place in enumerate(places, start=1):
        note, box = write(axes, text, at, place, **look)
        if is_free(box) or (forced and number == len(places)):
            return [box]
        note.remove()
    return []


def write(axes: Axes, text: str, at: tuple[float, float], place: Beside, **look: Any) -> tuple[Annotation, Bbox]:
    """Write `text` beside a point; return it with its box, without a line to the point."""
    x, y, horizontal, vertical = place
    note = axes.annotate(text, at, (x, y), textcoords="offset points", ha=horizontal, va=vertical, **look)
    note.get_window_extent()  # moves it to its place
    return note, Text.get_window_extent(note)
