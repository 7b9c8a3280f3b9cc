"""What a size cuts from a layout is said, and pictures and tables tell apart what they show."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ARCHS, ROOT, launch_in_process, small, whole_depth

from arch import ArchConfig, KVPlan, LayoutError, ModelConfig, SizeConfig, StoreConfig, resolve
from arch.named import load_arch, load_size
from eval import footprint
from eval.figures import Panel, axis
from eval.footprint import by_remark, fold, stack_table
from eval.plots import plan as maps
from eval.plots.pareto import draw_panels
from eval.remarks import remarks
from eval.runs import Point, default_out, group_by_seed
from eval.units import counted, duration_text, times
from train.lit_module import LossWatch
from train.metrics import Metrics


def at(arch: str | ArchConfig, size: str = "tiny", **changes: object) -> ModelConfig:
    config = ModelConfig(load_arch(arch) if isinstance(arch, str) else arch, load_size(size))
    for key, value in changes.items():
        setattr(config.size, key, value)
    return config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (at("mha"), []),
        (at("gqa8", "1b"), []),
        (at("gqa8"), ["kv has 8 key/value heads for 8 query heads: multi-head attention, as kv_heads=all"]),
        (at("swa"), ["window 1,024 of local cut to 64 by size.max_window"]),
        (at("swa", max_window=1024), []),
        (at("deepseek_v4_hca"), [
            "window 128 of pooled cut to 64 by size.max_window", "stride 128 of pooled cut to 64 by size.max_window",
        ]),
        (at("llama4"), [
            "chunk 8,192 of chunk cut to 64 by size.max_window",
            "query_scale.tokens 8,192 of nope cut to 64 by size.max_window",
        ]),
        (at("cla4_window"), ["window=1,024 in arch.pattern cut to 64 by size.max_window"]),
        (at("swa", max_window=None), []),
        (at("bct_gated", max_window=32), ["slots 256 of memory cut to 32 by size.max_window"]),
        (
            at(ArchConfig({"a": StoreConfig("1/4"), "b": StoreConfig("1/4")}, [
                {"layers": 4, "pattern": ["new a"]}, {"pattern": ["new b"]}, {"layers": 3, "pattern": ["new a"]},
            ]), num_layers=5),
            ["section 1, the rest of 5 layers, has none", "section 2 cut from 3 layers to 1 by size.num_layers 5",
             "no layer writes b at size.num_layers 5"],
        ),
    ],
)  # fmt: skip
def test_what_a_size_cuts_is_said(config: ModelConfig, expected: list[str]) -> None:
    resolve(config)
    assert remarks(config) == expected


def test_both_decoders_of_a_block_transformer_are_looked_at() -> None:
    config = at("block", num_layers=8)
    config.arch.block.token.stores["kv"].window = 512
    assert remarks(config) == ["token decoder: window 512 of kv cut to 64 by size.max_window"]


@pytest.mark.parametrize("name", ARCHS)
def test_every_layout_at_the_size_of_its_authors_is_whole(name: str) -> None:
    """No remark without a cause: nothing is cut where the depth shows all of the pattern."""
    assert remarks(small(name, num_layers=whole_depth(name, 7), window=None, num_heads=16)) == []


def test_the_same_mistake_is_reported_once() -> None:
    arch = ArchConfig({"kv": StoreConfig(1), "x": StoreConfig(1)}, ["reuse kv", "reuse x"])
    with pytest.raises(LayoutError) as caught:
        resolve(ModelConfig(arch, SizeConfig(num_layers=8)))
    assert [problem[:24] for problem in caught.value.problems] == [
        "layer 0: `reuse kv` has ",
        "layer 1: `reuse x` has n",
    ]


def test_remarks_stand_below_the_tables(capsys: pytest.CaptureFixture) -> None:
    launch_in_process(
        footprint.main, "footprint", footprint.FootprintConfig, ["+size=tiny", "+arch=swa", "picture=null"]
    )
    out = capsys.readouterr().out
    assert "window 1,024 of local cut to 64 by size.max_window: swa" in out
    assert "KV constant: what no context changes" in out
    assert by_remark({"a": ["x"], "b": ["x", "y"]}) == ["x: a, b", "y: b"]


def test_the_map_is_drawn_under_runs(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch_in_process(footprint.main, "footprint", footprint.FootprintConfig, ["+size=tiny", "+arch=swa_sinks"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / "footprint" / "swa_sinks-tiny.png").stat().st_size > 10_000
    assert "ownership map: runs/footprint/swa_sinks-tiny.png" in capsys.readouterr().out


def test_equal_stores_are_one_row(capsys: pytest.CaptureFixture) -> None:
    mha, cla2 = (resolve(small(arch, num_layers=10)) for arch in ("mha", "cla2"))
    assert [len(row) for row in fold(mha)] == [10]
    assert [len(row) for row in fold(cla2)] == [5]
    footprint.PlainConsole().print(stack_table("x", mha.stacks[0], 32, 2))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "kv" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][:5] == ["kv", "10", "0-9", "0-9", "all"]
    footprint.PlainConsole().print(stack_table("x", cla2.stacks[0], 32, 2))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "kv" in line]
    assert "0-1; 2-3; 4-5; 6-7; 8-9" in row
    footprint.PlainConsole().print(stack_table("x", resolve(small("swa_sinks")).stacks[0], 32, 2))
    out = capsys.readouterr().out
    assert "sinks" in out and "yes" in out


def test_one_of_a_thing_is_singular(capsys: pytest.CaptureFixture) -> None:
    plan = resolve(small("mha", num_layers=1))
    footprint.PlainConsole().print(stack_table("x", plan.stacks[0], 32, 2))
    assert "1 store for 1 layer," in capsys.readouterr().out
    assert (counted(1, "store"), counted(0, "store"), times(1), times(2)) == ("1 store", "0 stores", "once", "2 times")
    durations = [duration_text(seconds) for seconds in (0.4, 59, 90, 4020, 200_000)]
    assert durations == ["0 s", "59 s", "2 min", "1 h 07 min", "2 d 7 h"]


def test_store_types_have_colours_of_their_own() -> None:
    types = [
        StoreConfig(1), StoreConfig(1, window=2), StoreConfig(1, window=3, sinks=True), StoreConfig(2, window=4),
        StoreConfig(2), StoreConfig(4), StoreConfig(4, window=5), StoreConfig(1, slots=2, rule="gated"),
    ]  # fmt: skip
    arch = ArchConfig({f"s{n}": store for n, store in enumerate(types)}, [f"new s{n}" for n in range(len(types))])
    plan = resolve(small(arch, num_layers=8))
    assert isinstance(plan, KVPlan)
    colors = maps._colors(plan.stores)
    assert len(set(colors.values())) == 8 and maps.KEY not in colors.values()
    (axes,) = maps.draw_plan(plan, "x", 32, 2).axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "with attention sinks" in texts and len(texts) == 11
    assert [line.get_xdata() for line in axes.lines] == [[2]], "a mark above the store with sinks"


def point(name: str, size: int, value: float, **changes: object) -> Point:
    values = {"lowest": value, "highest": value, "runs": 1, "frontier": False, "params": 1, "tokens": 1}
    values |= {"kv_per_token": 1.0, "kv_constant": 0, "kv_read": 1.0}
    return Point(name=name, bytes=size, value=value, **values | changes)


def test_points_at_one_place_stand_side_by_side() -> None:
    rows = [point("a", 1024, 20.0), point("b", 1024, 20.0), point("c", 2048, 20.0), point("d", 1024, 30.0)]
    figure = draw_panels([Panel(rows, 64, axis("stored", 64), axis("ppl", 64))])
    figure.canvas.draw()
    (axes,) = figure.axes
    spots = {}
    for row, marks in zip(rows, (mark for mark in axes.collections if len(mark.get_offsets()) == 1), strict=True):
        spots[row.name] = marks.get_offset_transform().transform(marks.get_offsets())[0]
    assert abs(spots["a"][0] - spots["b"][0]) >= 12 and spots["a"][1] == spots["b"][1]
    assert spots["d"][0] == pytest.approx((spots["a"][0] + spots["b"][0]) / 2), "at its own figure"


def test_runs_of_one_name_are_told_apart_by_their_settings() -> None:
    def run(**settings: object) -> list:
        return ["cla2", {"arch": {"stores": {"kv": {"kv_heads": 1}}}, "lr": 1, "optim": {"lr": 3}} | settings]

    two = run(arch={"stores": {"kv": {"kv_heads": 2}}})
    assert list(group_by_seed([run(), two, run()], list)) == ["cla2 (kv_heads=1)", "cla2 (kv_heads=2)"]
    assert list(group_by_seed([run(), run(steps=5)], list)) == ["cla2 (steps=null)", "cla2 (steps=5)"]
    assert list(group_by_seed([run(lr=2), run(optim={"lr": 4})], list)) == [
        "cla2 (lr=2, optim.lr=3)",
        "cla2 (lr=1, optim.lr=4)",
    ]
    many = [run(**{f"setting_{n}": value for n in range(9)}) for value in (1, 2)]
    assert list(group_by_seed(many, list)) == ["cla2 (setting_0=1, ...)", "cla2 (setting_0=2, ...)"]
    few = [
        {"long_setting": a, "other": 9, "longer_setting": b, "last_setting": a * b} for a, b in ((1, 1), (1, 2), (3, 2))
    ]
    assert list(group_by_seed([run(**settings) for settings in few], list)) == [
        "cla2 (long_setting=1, longer_setting=1, ...)",
        "cla2 (long_setting=1, longer_setting=2, ...)",
        "cla2 (long_setting=3, longer_setting=2, ...)",
    ]
    cut = [run(setting=14 * "a" + end) for end in "bc"]
    assert all(re.fullmatch(r"cla2 \([0-9a-f]{4}\)", name) for name in group_by_seed(cut, list))


def test_nothing_is_written_beside_the_sources(tmp_path: Path) -> None:
    assert default_out([tmp_path / "a"]) == tmp_path / "a"
    assert default_out([tmp_path / "a", tmp_path / "b"]) == tmp_path
    assert default_out([ROOT / "runs", ROOT / "docs"]) == ROOT / "runs"
    assert default_out([ROOT]) == default_out([ROOT, tmp_path]) == ROOT / "runs"


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)[0].split()
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^make {target}\b", shown, re.MULTILINE) for target in targets)


class Trainer:
    global_step, max_steps, is_global_zero, world_size, loggers = 30, 100, True, 1, ()


def test_lines_of_a_run_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    """Validation loss and time left; with trainer.progress=false the validations alone."""
    from types import SimpleNamespace

    import torch

    clock = SimpleNamespace(read=lambda: 10.0, seconds=10.0, cpu_seconds=9.0, resume=lambda: None)
    module = SimpleNamespace(
        val_metrics={"loss": 2.0, "ppl": 7.389},
        clock=clock,
        device=torch.device("cpu"),
        progress_metrics={},
        loss_watch=LossWatch(3.0),
    )
    for reports in (True, False):
        metrics = Metrics(10, lambda step: step % 10 == 0, 512, {}, print_reports=reports, print_validations=True)
        metrics.step, metrics.warm, metrics.reported = 30, 1, 20
        metrics._report(Trainer, module, 5.5)
        metrics.announce_validation(Trainer, module)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 30/100  loss 5.5000  512 tok/s  1 min left",
        "step 30/100  validation loss 2.0000  perplexity 7.389",
        "step 30/100  validation loss 2.0000  perplexity 7.389",
    ]
