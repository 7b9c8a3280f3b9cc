"""Heat maps of retrieval: length of the context by depth of what is hidden in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from eval.console import visible
from eval.plots.style import DARK_INK, INK, Axes, Picture, literal_text

# From dark to light in lightness alone as well, so that it is read in print and by every kind of colour vision.
COLORS = "cividis"
MISSING = "#dddddd"


@dataclass(frozen=True)
class Panel:
    """Shares by (length, depth in percent); `chance` is that of a model that knows nothing."""

    title: str
    shares: Mapping[tuple[int, float], float]
    chance: float | None = None


@literal_text
def draw_heatmap(panels: Sequence[Panel], title: str, path: Path | None = None) -> Picture:
    """Draw the panels side by side on one scale from 0 to 1, each cell with its number.

    With a `path` the picture is also written there.
    """
    lengths = sorted({length for panel in panels for length, _ in panel.shares})
    depths = sorted({depth for panel in panels for _, depth in panel.shares})
    width, height = max(2.4, 0.62 * len(lengths)), max(1.8, 0.36 * len(depths))
    figure = Picture(figsize=(len(panels) * (width + 0.9) + 0.9, height + 1.4), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(row, panels, strict=True):
        _draw_panel(axes, panel, lengths, depths)
    row[0].set_ylabel("depth in percent")
    scale = ScalarMappable(Normalize(0, 1), colormaps[COLORS])
    bar = figure.colorbar(scale, ax=row.tolist(), label="share right", fraction=0.05, pad=0.02)
    if len({panel.chance for panel in panels if panel.chance is not None}) == 1:
        bar.ax.axhline(next(panel.chance for panel in panels if panel.chance is not None), color="white", linewidth=1.5)
    lines = fill(visible(title), int(11 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.02, ha="left", fontsize=10, color=DARK_INK)
    figure.write(path, dpi=160)
    return figure


def _draw_panel(axes: Axes, panel: Panel, lengths: Sequence[int], depths: Sequence[float]) -> None:
    grid = np.array([[panel.shares.get((length, depth), np.nan) for length in lengths] for depth in depths])
    axes.set_facecolor(MISSING)
    axes.imshow(grid, cmap=COLORS, norm=Normalize(0, 1), aspect="auto")
    for (y, x), share in np.ndenumerate(grid):
        if not np.isnan(share):
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8, color="white" if share < 0.6 else INK)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("tokens")
    chance = "" if panel.chance is None else f"\nchance {panel.chance:.2f}"
    axes.set_title(visible(panel.title) + chance, fontsize=9, color=DARK_INK)
