"""Figure, palette and axes of every picture; none of them needs a display."""

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from eval.console import visible

__all__ = ["Axes"]
NOTE = re.compile(r" \([^()]*\)$")  # of runs.group_by_seed
P = ParamSpec("P")
T = TypeVar("T")

BLUE, ORANGE, GREEN, PURPLE, TEAL = "#2f6fb0", "#e08a1e", "#3a9a5b", "#a2559c", "#1f9fa8"
# Of store types, told apart by every kind of colour vision as far as eight can be; no grey, which means nothing here.
STORE_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#c0392b", TEAL, "#7a5230", "#d977b5")
# Okabe and Ito's, which every kind of colour vision tells apart; other dashes and markers after the seventh.
LINE_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
LINE_MARKERS = ("o", "s", "^")
INK, DARK_INK, LIGHT_INK = "#222222", "#555555", "#666666"
DOMINATED, REFERENCE, GRID, BAND = "#8a8a8a", "#777777", "#e4e4e4", "#e3edf7"


class Picture(Figure):
    """A figure that a notebook shows where it is the value of a cell, whatever backend matplotlib has there."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        FigureCanvasAgg(self)

    def write(self, path: Path | None, **options: Any) -> None:
        """Save the picture on white, with `options` of savefig; do nothing without a path.

        A PNG gets a palette, and less than half of its bytes.
        """
        if path is None:
            return
        if path.suffix.lower() != ".png":
            self.savefig(path, facecolor="white", **options)
            return
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", facecolor="white", **options)
        with Image.open(buffer) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white", bbox_inches="tight")
        return buffer.getvalue()


def literal_text(draw: Callable[P, T]) -> Callable[P, T]:
    """Make `draw` a function whose texts are shown as they are: dollars are no formulas."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with rc_context({"text.parse_math": False, "text.usetex": False}):
            return draw(*args, **kwargs)

    return wrapped


def html_text(text: str) -> str:
    """`text` for a page of plotly, which reads tags, entities and formulas."""
    return html.escape(visible(text), quote=False).replace("$", "&#36;")


class Look(NamedTuple):
    """Colour, dashes and marker of a line."""

    color: str
    style: Literal["-", "--", ":"]
    marker: str


def line_looks(num_lines: int) -> list[Look]:
    """A different look for each line, as far as there are any."""
    rounds = zip(LINE_STYLES, LINE_MARKERS, strict=True)
    looks = [Look(color, style, marker) for style, marker in rounds for color in LINE_COLORS]
    return [looks[i % len(looks)] for i in range(num_lines)]


def fitting_legend(owner: Picture | Axes, handles: Sequence[Artist], most: int, **look: Any) -> Legend:
    """Add a legend in as many columns, at `most`, as fit into the picture or the axes."""
    columns = min(most, len(handles))
    while True:
        legend: Legend = owner.legend(handles=handles, ncols=columns, frameon=False, **look)
        if columns == 1 or legend.get_window_extent().width <= owner.bbox.width:
            return legend
        legend.remove()
        columns -= 1


def plain_axes(axes: Axes) -> None:
    """Draw a light grid behind the data and no frame above and right of it."""
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def common_suffix(names: Sequence[str]) -> str:
    """The last `-part` (a size) of names that all end with it, to be shown once; empty otherwise and for one name."""
    bases = [NOTE.sub("", name) for name in names]
    endings = {name[name.rfind("-") :] if "-" in name else name for name in bases}
    return endings.pop() if len(endings) == 1 and len(names) > 1 else ""


def without_suffix(name: str, common: str) -> str:
    """`name`, to be shown, without the suffix that is shown once; what tells it from others of the name stays."""
    base = NOTE.sub("", name)
    return visible(base.removesuffix(common) + name[len(base) :])
