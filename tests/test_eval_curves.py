"""`eval/curves.py` on runs whose losses and times are known in closed form."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import small
from PIL import Image

from arch import resolve
from data.cli import UsageError
from eval import curves, histories
from eval.plots.curves import draw_curves
from eval.runs import Run, RunError
from train.schema import PretrainConfig

pytestmark = pytest.mark.usefixtures("blank_pictures")  # test_picture looks at one
STEPS, STEP_TOKENS, FLOPS = 200, 64, 1000.0


def make_run(
    folder: Path,
    arch: str,
    loss: Callable[[float], float],
    *,
    step_seconds: float = 0.5,
    seed: int = 0,
    vals: int = 8,
    until: int = STEPS,
    drop: tuple[str, ...] = (),
    **changes: object,
) -> Path:
    """A run of 200 steps with a report every 10 and `vals` validations, whose losses are both `loss(step)`."""
    path = folder / f"{arch}-seed{seed}"
    (path / "metrics" / "0").mkdir(parents=True)
    config = PretrainConfig(name=f"{arch}-tiny", seed=seed, tokens=STEPS * STEP_TOKENS, batch_size=2)
    asked = asdict(config) | {"arch": {"of": arch}} | changes
    (path / "config.yaml").write_text(yaml.safe_dump(asked))
    (path / "plan.json").write_text(json.dumps(resolve(small(arch)).to_dict()))
    (path / "run.json").write_text(json.dumps([{"hardware": "a machine"}]))
    rows = []
    for step in range(1, until + 1):
        if step % 10 == 0:
            row = {"step": step, "train/loss": loss(step), "train/tokens": step * STEP_TOKENS}
            row |= {"train/seconds": step * step_seconds, "train/cpu_seconds": 2 * step * step_seconds}
            rows.append(row | {"model/params": 1000.0, "model/train_flops_per_token": FLOPS})
        if vals and step % (STEPS // vals) == 0:
            rows.append({"step": step, "val/loss": loss(step)})
    write_rows(path / "metrics" / "0", [{k: v for k, v in row.items() if k not in drop} for row in rows])
    return path


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    keys = sorted({key for row in rows for key in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def line(start: float, slope: float) -> Callable[[float], float]:
    return lambda step: start - slope * step


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """mha ends at 4 after 100 s; cla2 is there at step 150, 75 s a step slower: 150 s; swa never is."""
    folder = tmp_path / "runs"
    make_run(folder, "mha", line(6, 0.01))
    make_run(folder, "cla2", line(5.5, 0.01), step_seconds=1.0)
    make_run(folder, "swa", line(6, 0.005), step_seconds=0.25)
    return folder


def result(out: Path, *arguments: str) -> dict:
    curves.main([*arguments, f"out={out}"])
    found = json.loads((out / "curves.json").read_text())
    return found | {"curves": {row["name"]: row for row in found["curves"]}}


def test_what_each_takes_to_the_loss_of_the_reference(runs: Path, tmp_path: Path) -> None:
    found = result(tmp_path, str(runs), "reference=mha-tiny")
    assert (found["which"], found["target"]) == ("val", pytest.approx(4.0))
    mha, cla2, swa = (found["curves"][f"{arch}-tiny"] for arch in ("mha", "cla2", "swa"))
    tokens = 150 * STEP_TOKENS
    assert cla2["to_target"] == pytest.approx({"tokens": tokens, "seconds": 150.0, "flops": tokens * FLOPS})
    assert cla2["relative"] == pytest.approx({"tokens": 0.75, "seconds": 1.5, "flops": 0.75})
    assert mha["relative"] == pytest.approx({"tokens": 1.0, "seconds": 1.0, "flops": 1.0})
    assert (swa["to_target"], swa["relative"], swa["loss"]) == (None, None, pytest.approx(5.0))
    assert mha["tokens_per_second"] == pytest.approx(STEP_TOKENS / 0.5)
    assert swa["series"]["train"]["seconds"][-1] == pytest.approx(50.0)
    assert next(iter(found["curves"])) == "mha-tiny", "the reference comes first"


def test_the_reference_is_the_first_run_if_none_is_named(runs: Path, tmp_path: Path) -> None:
    found = result(tmp_path, str(runs / "swa-seed0"), str(runs / "mha-seed0"))
    assert found["reference"] == "swa-tiny"
    assert found["curves"]["mha-tiny"]["relative"]["seconds"] == pytest.approx(100 * 0.5 / 50)


def test_seconds_of_the_processor(runs: Path, tmp_path: Path) -> None:
    found = result(tmp_path, str(runs), "clock=cpu")
    assert found["curves"]["mha-tiny"]["seconds"] == pytest.approx(200.0)


def test_few_validations_leave_the_smoothed_training_loss(tmp_path: Path) -> None:
    """Noise that the smoothing takes out, so that the raw loss is below the target long before."""

    def noisy(step: float) -> float:
        return 6 - 0.01 * step - (0.4 if step == 60 else 0.0)

    make_run(tmp_path / "runs", "mha", line(6, 0.005))
    make_run(tmp_path / "runs", "cla2", noisy, vals=2)
    found = result(tmp_path, str(tmp_path / "runs"), "reference=mha-tiny")
    assert found["which"] == "train"
    raw = next(step for step in range(10, 201, 10) if noisy(step) <= found["target"])
    assert raw == 60
    assert 100 < found["curves"]["cla2-tiny"]["to_target"]["tokens"] / STEP_TOKENS < 120


def test_seeds_are_one_curve_and_each_is_compared_with_its_own(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed, start in enumerate((6.0, 6.2)):
        make_run(runs, "mha", line(start, 0.01), seed=seed)
        make_run(runs, "cla2", line(start - 0.5 - 0.2 * seed, 0.01), seed=seed)
    found = result(tmp_path, str(runs), "reference=mha-tiny")
    mha, cla2 = found["curves"]["mha-tiny"], found["curves"]["cla2-tiny"]
    assert (mha["seeds"], mha["loss"], mha["lowest"], mha["highest"]) == (
        [0, 1], pytest.approx(4.1), pytest.approx(4.0), pytest.approx(4.2)
    )  # fmt: skip
    assert cla2["to_target"]["tokens"] == pytest.approx(140 * STEP_TOKENS)
    assert cla2["seconds_by_seed"] == pytest.approx([0.75, 0.65])


def test_runs_of_one_name_that_differ_are_two_curves(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "mha", line(6, 0.01))
    make_run(tmp_path / "b", "mha", line(6, 0.01), seed=1, batch_size=4)
    found = curves.find_curves([tmp_path], "wall")
    assert len({curve.name for curve in found}) == 2
    assert all(curve.name.startswith("mha-tiny (") for curve in found)


def test_a_run_that_is_on_its_way(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Left out by name, or compared at the tokens that all have reached."""
    path = make_run(runs, "gqa4", line(5.5, 0.01), until=105)
    assert "gqa4-tiny" not in result(tmp_path, str(runs), "reference=mha-tiny")["curves"]
    captured = capsys.readouterr()
    assert f"not ended, left out; unfinished=true compares all: {path} (6.4K of 12.8K tokens)" in captured.err
    assert "loss of mha-tiny at 12.8K tokens, 4.0000" in captured.out
    all_of_them = result(tmp_path, str(runs), "reference=mha-tiny", "unfinished=true")
    found = all_of_them["curves"]["gqa4-tiny"]
    assert (found["loss"], found["to_target"]) == (pytest.approx(4.5), None)
    assert found["seconds"] == pytest.approx(50.0), "at its last validation"
    mha = all_of_them["curves"]["mha-tiny"]
    assert (mha["loss"], mha["loss_tokens"]) == (pytest.approx(5.0), 6400), "where gqa4 is"
    assert all_of_them["target"] == pytest.approx(4.0), "the final one, of a run that has ended"
    alone = result(tmp_path, str(path))
    assert (alone["target"], alone["final"]) == (pytest.approx(4.5), False), "none has ended"


@pytest.mark.parametrize("vals", [0, 4])
def test_a_run_before_its_first_validation(vals: int, runs: Path, tmp_path: Path) -> None:
    """Alone, and beside finished ones: by the smoothed training loss, up to where it is."""
    path = make_run(runs, "gqa4", line(5.5, 0.01), until=40, vals=vals)
    alone = result(tmp_path, str(path))
    assert (alone["which"], alone["target_tokens"]) == ("train", 40 * STEP_TOKENS)
    assert alone["curves"]["gqa4-tiny"]["series"]["val"]["loss"] == []
    beside = result(tmp_path, str(runs), "unfinished=true")
    assert {row["loss_tokens"] for row in beside["curves"].values()} == {40 * STEP_TOKENS}


def test_seeds_without_a_common_step_are_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", "mha", line(6, 0.01))
    make_run(tmp_path / "runs", "mha", line(6, 0.01), seed=1)
    rows = [row | {"step": int(row["step"]) - 5} for row in Run(path).metrics if row["train/loss"]]
    write_rows(path / "metrics" / "0", rows)
    with pytest.raises(RunError, match="seeds of one configuration that report no loss at the same step"):
        result(tmp_path, str(tmp_path / "runs"))


def test_a_seed_that_is_on_its_way_does_not_shorten_the_curve(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "mha", line(6, 0.01))
    make_run(tmp_path / "runs", "mha", line(6.2, 0.01), seed=1, until=50)
    (curve,) = curves.find_curves([tmp_path], "wall")
    assert [run.seed for run in curve.runs] == [0]


def test_runs_that_make_no_curve_are_passed_over(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    diverged = make_run(runs, "gqa4", lambda step: float("nan") if step > 100 else 5.0)
    broken = {
        "mqa": ("config.yaml", "name: [a]\nseed: 0\ntokens: 1\nbatch_size: 1\ndata: {}\nsize: {seq_len: 1}\n"),
        "gqa2": ("plan.json", '{"stores": [], "reads": []}'),
        "ma": ("metrics/0/metrics.csv", "step,train/loss\nfirst,5\n"),
    }
    for arch, (name, text) in broken.items():
        (make_run(runs, arch, line(6, 0.01)) / name).write_text(text)
    assert set(result(tmp_path, str(runs))["curves"]) == {"mha-tiny", "cla2-tiny", "swa-tiny"}
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert any(f"{diverged}: its training loss is nan at step 110; leave it out" in line for line in errors)
    for arch, (name, _) in broken.items():
        assert any(f"{runs / arch}-seed0" in line and name.split("/")[0] in line for line in errors), arch


def test_a_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    """The second start, from step 100, repeats what the first had done when it was killed, at another time."""
    path = make_run(tmp_path / "runs", "mha", line(6, 0.01), until=150)
    rows = Run(path).metrics
    again = [row | {"train/seconds": float(row["train/seconds"] or 0) + 7} for row in rows if int(row["step"]) > 100]
    write_rows(path / "metrics" / "1", again)
    (run,) = curves.find_curves([path], "wall")[0].runs
    assert list(run.steps) == list(range(10, 151, 10))
    assert list(run.seconds) == [step / 2 + (7 if step > 100 else 0) for step in range(10, 151, 10)]


def test_a_start_that_only_validates_repeats_no_step(tmp_path: Path) -> None:
    """The first was stopped between the last step and its validation, or in the middle of that."""
    path = make_run(tmp_path / "runs", "mha", line(6, 0.01))
    write_rows(path / "metrics" / "1", [{"step": STEPS, "val/loss": 3.5}])
    (run,) = curves.find_curves([path], "wall")[0].runs
    assert list(run.steps) == list(range(10, STEPS + 1, 10))
    assert list(run.val_steps) == list(range(25, STEPS + 1, 25)) and run.val[-1] == 3.5


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([5.0, 4.0, 3.0], 3.5, 25.0),
        ([5.0, 4.0, 3.0], 3.0, 30.0),
        ([5.0, 3.0, 4.0, 2.0], 3.5, 17.5),
        ([5.0, 4.0, 3.0], 6.0, 10.0),
        ([5.0, 4.0, 3.0], 2.9, None),
    ],
)
def test_crossing(losses: list[float], target: float, expected: float | None) -> None:
    steps = 10.0 * np.arange(1, len(losses) + 1)
    assert curves.first_crossing(steps, np.array(losses), target) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{runs}", "refrence=mha"],
            "refrence, did you mean reference? The command line has reference, clock, out",
        ),
        (["{runs}", "clock=sun"], "clock is sun; choose wall, cpu"),
        (["{runs}", "reference=mha"], "the runs are cla2-tiny, mha-tiny, swa-tiny"),
        (["/nowhere"], "/nowhere is not a folder"),
        (["{empty}"], "no run in"),
        (["{runs}", "out=/proc/nowhere"], "give another folder with out="),
    ],
)
def test_mistakes(arguments: list[str], message: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        curves.main([argument.format(runs=runs, empty=tmp_path / "empty") for argument in arguments])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "clock", "message"),
    [
        ({"drop": ("train/seconds",)}, "wall", "has no train/seconds, it is of a version that logged none"),
        ({"drop": ("train/cpu_seconds",)}, "cpu", "has no train/cpu_seconds, it ran on no CPU"),
        ({"step_seconds": float("nan")}, "wall", "its time is not known"),
        (
            {"until": 15},
            "wall",
            "has reported once so far, a curve needs 2: leave it out, wait while it runs, or resume=",
        ),
        ({"step_seconds": -1.0}, "wall", "its time does not rise"),
        ({"step_seconds": 0.0}, "wall", "its time does not rise"),
    ],
)
def test_runs_that_cannot_be_compared(options: dict, clock: str, message: str, tmp_path: Path) -> None:
    path = make_run(tmp_path, "mha", line(6, 0.01), **options)
    with pytest.raises(UsageError, match=message) as caught:
        curves.find_curves([tmp_path], clock)
    assert str(path) in str(caught.value)
    (path / "plan.json").unlink()
    with pytest.raises(UsageError, match=r"plan\.json is missing"):
        histories.load_history(Run(path), clock)


def test_steps_that_do_not_rise_and_copies_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("twice", "copy"):
        shutil.copytree(runs / "mha-seed0", runs / name)
    path = runs / "twice" / "metrics" / "0" / "metrics.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows + rows[1:]))
    result(tmp_path, str(runs))
    errors = capsys.readouterr().err
    assert f"warning: {runs / 'twice'}: its steps do not rise in metrics.csv" in errors
    assert (
        f"warning: {runs / 'mha-seed0'} has the seed of {runs / 'copy'} (mha-tiny, seed 0): both are counted" in errors
    )


def test_runs_that_hardly_compare(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result(tmp_path, str(runs))
    assert "warning" not in capsys.readouterr().err
    make_run(runs, "gqa4", line(6, 0.01), data={"name": "other"})
    result(tmp_path, str(runs))
    assert "warning: the runs differ in data: " in capsys.readouterr().err


@pytest.mark.parametrize("vals", [2, 8])
def test_picture(vals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows where validation is compared; a legend where names at the ends of lines would overlap."""
    drawn = []
    monkeypatch.setattr("eval.plots.curves.draw_curves", lambda *arguments: drawn.append(draw_curves(*arguments)))
    for arch, last in (("mha", 4.0), ("cla2", 4.5 if vals == 8 else 4.01)):
        for seed in (0, 1):
            make_run(tmp_path / "runs", arch, line(last + 2, 0.01), seed=seed, vals=vals)
    result(tmp_path, str(tmp_path / "runs"))
    (figure,) = drawn
    assert len(figure.axes) == (6 if vals == 8 else 3)
    names = {text.get_text() for axes in figure.axes for text in axes.texts}
    legends = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    both = {"mha, 2 seeds", "cla2, 2 seeds"}
    assert (names, legends) == ((both, set()) if vals == 8 else (set(), both))
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 400
        assert len(image.convert("L").getcolors()) > 50


def test_names_that_would_leave_the_picture_are_in_a_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("eval.plots.curves.draw_curves", lambda *arguments: drawn.append(draw_curves(*arguments)))
    for number, vocab_size in enumerate((8192, 819)):
        folder = tmp_path / "runs" / str(number)
        make_run(folder, "cla2", line(6 + number, 0.01), size={"vocab_size": vocab_size, "seq_len": 64 + number})
    result(tmp_path, str(tmp_path / "runs"))
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == [
        "cla2 (seq_len=64, vocab_size=8192)",
        "cla2 (seq_len=65, vocab_size=819)",
    ]
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
