"""The page of layouts by idea is that of the plans, and so are its pictures."""

import re
from pathlib import Path

import pytest
from conftest import ARCHS

from eval import layouts
from eval.families import BLOCKS, BOTH, FAMILIES, FIRST_FITTING, FULL, LATENTS, POOLS, SHARING, STATES, WINDOWS, family
from eval.released import load, released_names

AGAIN = (
    "a layout or a released model was added, changed or removed: run  python eval/readme.py  and commit docs/layouts"
)


def test_the_page_and_its_pictures_are_those_of_the_plans() -> None:
    plans, models = layouts.plans(), [load(name) for name in released_names()]
    assert layouts.page(plans, models) == layouts.PAGE.read_text(), AGAIN
    drawn = layouts.pictures(plans, models)
    assert {path.stem for path in layouts.PICTURES.iterdir()} == set(drawn), AGAIN
    for name, (seen, _) in drawn.items():
        assert layouts.mark(layouts.PICTURES / f"{name}.png") == seen, f"{name}.png: {AGAIN}"


def test_marks_are_of_what_is_shown(tmp_path: Path) -> None:
    """A picture that shows something else is drawn again, one without a mark too."""
    from eval.plots.plan import draw_plan

    plan, path = layouts.plans()["cla2"], tmp_path / "cla2.png"
    draw_plan(plan, "cla2", 16, path=path)
    assert layouts.mark(path) == ""
    layouts.put_mark(path, "0123456789abcdef")
    assert layouts.mark(path) == "0123456789abcdef"
    import matplotlib.image

    assert matplotlib.image.imread(path).ndim == 3, "still a picture"
    assert layouts.mark(tmp_path / "none.png") == ""
    (stack,), (other,) = plan.stacks, layouts.plans()["cla3"].stacks
    assert layouts.digest(layouts.shown(stack)) != layouts.digest(layouts.shown(other))


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (FULL, ("mha", "gqa4", "mqa")),
        (LATENTS, ("mla",)),
        (POOLS, ("deepseek_v4_hca", "mtla")),
        (WINDOWS, ("swa", "swa_sinks", "gemma3")),
        (SHARING, ("cla2", "cla4", "cla2_keepends")),
        (BOTH, ("mixattention", "yoco", "tail_sharing", "characterai")),
        (STATES, ("bct", "bct_gated", "bct_mixed")),
        (BLOCKS, ("block",)),
    ],
    ids=lambda value: value.title if hasattr(value, "title") and not isinstance(value, tuple) else None,
)
def test_families_follow_the_plan(expected: object, names: tuple[str, ...]) -> None:
    plans = layouts.plans()
    assert {family(plans[name]) for name in names} == {expected}


def test_every_family_has_an_idea_of_three_sentences_and_an_example() -> None:
    assert len(FAMILIES) == len(set(FIRST_FITTING)) == len(FIRST_FITTING)
    plans = layouts.plans()
    for each in FAMILIES:
        assert each.example in ARCHS and family(plans[each.example]) is each
        assert len(re.findall(r"[.](?= |$)", each.idea)) == 3, each.title
    for name, title in (("deepseek-v3", LATENTS), ("gemma-4-e2b", BOTH), ("jamba-v0.1", STATES), ("llama-2-7b", FULL)):
        assert family(load(name).plan) is title
