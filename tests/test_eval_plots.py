"""What is written in pictures is within them, and belongs to one thing: names to their points, handles to one line."""

import json
import math

import pytest
from conftest import ROOT
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Transform

from arch import resolve
from arch.named import model_config
from eval import study
from eval.figures import Panel, axis
from eval.plots import study as plots
from eval.plots.pareto import draw_panels
from eval.plots.plan import draw_plan
from eval.plots.points import distance, gap
from eval.plots.style import Axes, Picture
from eval.runs import Point
from eval.study_rows import groups, read_rows

RESULTS = ROOT / "docs" / "results"


def demo() -> Picture:
    panels: dict[tuple[str, int], list[Point]] = {}
    for record in json.loads((RESULTS / "demo-cpu" / "pareto.json").read_text()):
        panels.setdefault((record.pop("metric"), record.pop("context")), []).append(Point(**record))
    return draw_panels(
        [
            Panel(rows, context, axis("stored", context), axis(metric, context), (), rows[-1])
            for (metric, context), rows in panels.items()
        ]
    )


def names(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation)]


def spot(name: Annotation) -> tuple[float, float]:
    """The point of a name, in pixels."""
    assert isinstance(name.xycoords, Transform)
    x, y = name.xycoords.transform(name.xy)
    return float(x), float(y)


def check_names(axes: Axes) -> None:
    """No other point is as near to a name as its own, unless a line leads to that, across no name; no name leaves the
    panel or is over another."""
    found = names(axes)
    boxes = [Text.get_window_extent(name) for name in found]
    for name, box in zip(found, boxes, strict=True):
        others = [spot(other) for other in found if other is not name]
        assert name.arrow_patch or distance(box, spot(name)) < min(distance(box, other) for other in others), name
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1), name
        if name.arrow_patch:
            assert not any(gap(box, spot(name)).overlaps(other) for other in boxes if other is not box)
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_names_of_the_demo() -> None:
    """`block` and `bct` of recall, whose points are neighbours: no name could be the other's."""
    figure = demo()
    for axes in figure.axes:
        assert len(names(axes)) == 7
        check_names(axes)
    found = {name.get_text(): (Text.get_window_extent(name), spot(name)) for name in names(figure.axes[1])}
    (block, at_block), (bct, at_bct) = found["block"], found["bct"]
    assert 1.5 * distance(block, at_block) < distance(block, at_bct)
    assert 1.5 * distance(bct, at_bct) < distance(bct, at_block)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    """Of the study of recall, whose ten layouts are more than there are colours."""
    rows = read_rows(RESULTS / "study-recall" / "results.jsonl")
    return study.pictures(rows, groups(rows, "main"), [2048, 131072], ["recall/gap/accuracy"])


def look(line: Line2D) -> tuple[str, str]:
    return str(line.get_color()), str(line.get_marker())


def test_a_layout_looks_the_same_in_all_pictures_of_a_report(pictures: dict[str, Picture]) -> None:
    handles = {
        name: {line.get_label(): look(line) for line in pictures[name].legends[0].get_lines()}
        for name in ("rates", "curves")
    }
    assert handles["rates"] == handles["curves"]
    assert len(set(handles["rates"].values())) == 10, "as many looks as layouts"
    for name in ("loss", "recall-gap-accuracy"):
        for axes in pictures[name].axes:
            drawn = [look(bars[0]) for bars in axes.containers]
            assert sorted(drawn) == sorted(handles["rates"].values())


def test_points_of_a_study_hide_no_other_and_have_their_names(pictures: dict[str, Picture]) -> None:
    for axes in (*pictures["loss"].axes, *pictures["recall-gap-accuracy"].axes):
        assert len(names(axes)) == 10
        check_names(axes)
        places = {name.get_text(): spot(name) for name in names(axes)}
        assert math.dist(places["mixattention"], places["yoco"]) >= 12, "the same bytes and accuracy"
        assert places["gqa2"][0] < places["mla"][0], "in the order of their bytes"


def test_a_map_of_few_layers_is_as_wide_as_its_layers() -> None:
    figure = draw_plan(resolve(model_config("mixattention", "tiny")), "mixattention at tiny", 8192)
    (axes,) = figure.axes
    (legend,) = (each for each in axes.get_children() if isinstance(each, Legend))
    ends = [each.get_window_extent().x1 for each in (*axes.texts, legend)]
    assert max(ends) <= axes.bbox.x1


def test_the_frontier_is_of_what_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low where a figure is a loss, also one of a task; high where it is an accuracy."""
    found: list[bool] = []
    monkeypatch.setattr(plots, "points", lambda *_, lower=True: found.append(lower))
    for name, figure, expected in (
        ("study-cpu", "loss", True),
        ("study-cpu", "induction/text", True),
        ("study-recall", "recall/gap/accuracy", False),
    ):
        same = groups(read_rows(RESULTS / name / "results.jsonl"), "main")
        plots.draw_bytes(same, [2048], figure, plots.looks_of(group.label for group in same))
        assert found.pop() == expected, figure
