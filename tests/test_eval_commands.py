"""`eval/footprint.py` and `eval/pareto.py` as their users meet them."""

import csv
import html
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ARCHS, launch_in_process, small
from matplotlib.text import Text

from arch import resolve
from arch.footprint import kv_bytes
from data.cli import UsageError
from eval import footprint, pareto
from eval.figures import Panel, axis
from eval.pareto import experiment, points
from eval.plots.pareto import draw_panels
from eval.readme import committed
from eval.runs import RunError, finished_run, look_for_runs
from eval.units import bytes_text, count_text, parse_bytes

KEYS = {
    "arch",
    "num_params",
    "flops_per_token",
    "kv_bytes_per_token",
    "kv_bytes_constant",
    "kv_bytes_stored",
    "kv_bytes_read",
}


def run_footprint(*arguments: str) -> None:
    launch_in_process(footprint.main, "footprint", footprint.FootprintConfig, [*arguments])


def footprint_json(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, dict]:
    run_footprint(*arguments, "json=true")
    return {row["arch"]: row for row in json.loads(capsys.readouterr().out)}


def test_footprint_of_every_arch(capsys: pytest.CaptureFixture) -> None:
    rows = footprint_json(capsys, "+size=1b", "context=32768")
    assert sorted(rows) == ARCHS
    assert all(set(row) >= KEYS for row in rows.values())
    expected = {"mha": 163840, "gqa4": 40960, "gqa2": 20480, "mqa": 10240, "cla2": 5120, "cla3": 3584, "cla4": 2560}
    assert {name: rows[name]["kv_bytes_per_token"] for name in expected} == expected
    cla = rows["cla2"]
    assert cla["kv_bytes_stored"] == 5120 * 32768
    assert cla["kv_bytes_read"] == 10240 * 32768, "sharing stores half and reads as much"
    weights = 2 * cla["num_params"]
    assert cla["max_batch"] == int((80e9 - weights) // cla["kv_bytes_stored"])
    prefill = {name: row["prefill_flops"] for name, row in rows.items()}
    assert prefill["yoco"] < prefill["tail_sharing"] < prefill["cla4"] < prefill["cla2"] < prefill["mha"]
    assert prefill["mha"] < 32768 * rows["mha"]["flops_per_token"] * 32768 / 2048


def test_footprint_options(capsys: pytest.CaptureFixture) -> None:
    base = footprint_json(capsys, "+size=1b", "+arch=swa", "context=4096")["swa"]
    short = footprint_json(capsys, "+size=1b", "+arch=swa", "context=100")["swa"]
    wide = footprint_json(capsys, "+size=1b", "+arch=swa", "context=4096", "itemsize=4", "memory=1GiB")["swa"]
    other = footprint_json(capsys, "+size=1b", "+arch=swa", "context=4096", "arch.stores.local.window=512")["swa"]
    assert base["kv_bytes_stored"] == base["kv_bytes_constant"] == 1024 * 20 * 2048
    assert (base["kv_bytes_per_token"], short["kv_bytes_stored"]) == (0, 100 * 20 * 2048)
    assert wide["kv_bytes_stored"] == 2 * base["kv_bytes_stored"]
    assert wide["max_batch"] == 0, "the weights alone do not fit"
    assert other["kv_bytes_stored"] * 2 == base["kv_bytes_stored"]


def test_footprint_table_and_picture(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    run_footprint("+size=1b", "+arch=mixattention", "context=32768", f"picture={picture}")
    text = capsys.readouterr().out
    for words in ("mixattention: 9 stores for 20 layers", "last 1,024", "12, 18", "142 MiB", "ownership map"):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    run_footprint("+size=1b", "+arch=bct_mixed", "context=32768", f"picture={picture}")
    text = capsys.readouterr().out
    for words in ("last 512 + 64 slots", "2,048 + 4,096", "1.25 MiB"):
        assert words in text
    run_footprint("+size=tiny", "+arch=mha", f"picture={tmp_path / 'new' / 'bare'}")
    bare = tmp_path / "new" / "bare.png"
    assert f"ownership map: {bare}" in capsys.readouterr().out and bare.exists()
    run_footprint("+size=tiny", "+arch=mha", "picture=null")
    assert "ownership map" not in capsys.readouterr().out


def test_footprint_says_which_arch_is_impossible(capsys: pytest.CaptureFixture) -> None:
    run_footprint("+size=tiny", "size.num_heads=4", "json=true")
    captured = capsys.readouterr()
    names = {row["arch"] for row in json.loads(captured.out)}
    assert set(committed()) - names == {
        "gemma4",
        "gpt_oss",
        "gqa8",
        "mimo",
        "qwen3_next",
    }  # more than four heads, and eighths
    assert "gqa8 is impossible at this size" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose +size= one of: 125m, 1b"),
        (["+size=1b", "+arch=cla9"], "Could not find 'arch/cla9'"),
        (["+size=1b", "context=0"], "must be at least 1"),
        (["+size=1b", "context=-5"], "must be at least 1"),
        (["+size=1b", "memory=lots"], "write it like 80GB or 80GiB"),
        (["+size=1b", "contex=3"], "unknown key contex, did you mean context?"),
        (["+size=1b", "+arch=mha", "picture=/proc/nowhere/x.png"], "give another file with picture="),
        (["+size=1b", "+arch=gqa8", "size.num_heads=4"], "does not divide the 4 query heads"),
    ],
)
def test_footprint_errors(arguments: list[str], message: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_footprint(*arguments)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (5120, "5 KiB"),
        (163840, "160 KiB"),
        (999.4 * 2**10, "999 KiB"),
        (999.6 * 2**10, "0.976 MiB"),
        (5 * 2**30, "5 GiB"),
        (999.6 * 2**40, "1,000 TiB"),
        (3 * 2**50, "3,072 TiB"),
    ],
)
def test_bytes_text(value: float, text: str) -> None:
    assert bytes_text(value) == text


def test_other_units() -> None:
    assert (count_text(950e6), count_text(7.17e9), count_text(12)) == ("950M", "7.17B", "12")
    assert [count_text(value) for value in (999_499, 999_936, 999.5, 5e15)] == ["999K", "1M", "1K", "5,000T"]
    assert [parse_bytes(text) for text in ("80GB", "1GiB", "12 kb", "7")] == [80e9, 2**30, 12e3, 7]


def make_run(folder: Path, arch: str, seed: int, ppl: float, name: str | None = None, **changes: object) -> Path:
    path = folder / f"{name or arch}-seed{seed}-{ppl}"
    path.mkdir(parents=True)
    plan = resolve(small(arch))
    (path / "plan.json").write_text(json.dumps(plan.to_dict()))
    summary = {
        "name": name or arch,
        "seed": seed,
        "seq_len": 32,
        "experiment": {"arch": arch, **changes},
        "val": {"ppl": ppl, "bpb": ppl / 10, "loss": 1.0},
        "params": 1000,
        "tokens": 5000,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    for seed, ppl in enumerate((20.0, 22.0, 21.0)):
        make_run(folder, "mha", seed, ppl)
    make_run(folder, "gqa4", 0, 23.0)
    make_run(folder, "mqa", 0, 30.0)
    make_run(folder, "cla2", 0, 26.0)
    make_run(folder, "swa", 0, 40.0)
    return folder


def test_points_and_frontier(runs: Path) -> None:
    rows = {row.name: row for row in points(look_for_runs([runs], finished=True).runs, 64, "ppl", 2)}
    assert (rows["mha"].value, rows["mha"].lowest, rows["mha"].highest, rows["mha"].runs) == (21.0, 20.0, 22.0, 3)
    assert {name for name, row in rows.items() if row.frontier} == {"swa", "cla2", "gqa4", "mha"}
    for name, row in rows.items():
        assert row.bytes == kv_bytes(resolve(small(name)), 64, 2).stored


@pytest.mark.usefixtures("blank_pictures")
def test_methods_are_compared_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With the same runs without one, seed by seed, whichever end is better: int8, whose range overlaps that of none,
    is a little lower of each seed; int4 is far below it, and varies by more."""
    found = {"none": (0.9, 0.8, 0.7), "int8": (0.85, 0.76, 0.65), "int4": (0.69, 0.3, 0.5), "int2": (1.1, 1.02, 0.9)}
    for seed in range(3):
        path = make_run(tmp_path, "mha", seed, 20.0 + seed)
        summary = json.loads((path / "summary.json").read_text())
        summary["evaluations"] = {
            "compressed" if method == "none" else f"compressed[{method}]": {
                "step": 8,
                "digest": "d",
                "figures": {"end_bytes": 64, "loss": values[seed], "recall/accuracy": values[seed]},
                **({} if method == "none" else {"method": method}),
            }
            for method, values in {**found, **({"fp8": (9.0, 9.0, 9.0)} if seed == 1 else {})}.items()
        }
        (path / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(tmp_path / "mha-seed1-21.0", tmp_path / "copy")  # no second pair of its seed
    of = {}
    for figure in ("loss", "recall/accuracy"):
        pareto.main([str(tmp_path), "x=compressed/end_bytes", f"y=compressed/{figure}"])
        of[figure] = {row["method"]: row["against_none"] for row in json.loads((tmp_path / "pareto.json").read_text())}
    undecided = {"none": None, "int4": "not told apart", "fp8": None}
    assert of["recall/accuracy"] == {**undecided, "int8": "worse", "int2": "better"}
    assert of["loss"] == {**undecided, "int8": "better", "int2": "worse"}
    shown = " ".join(capsys.readouterr().out.split())
    assert "over seeds" in shown and "0.3 to 0.69" in shown


def test_panels_of_models_for_different_tasks(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Each panel has the runs of its task, at their length; the band is of the baseline's seeds."""
    recall = [
        make_run(runs / "recall", arch, seed, 1.0, data="recall")
        for arch, seed in (("mha", 0), ("mha", 1), ("cla2", 0))
    ]
    for path in sorted(path.parent for path in runs.glob("**/summary.json")):
        summary = json.loads((path / "summary.json").read_text())
        if path in recall:
            summary["seq_len"] = 16
            found = {"recall": {"step": 8, "digest": "d", "figures": {"accuracy": 0.9 - 0.1 * summary["seed"]}}}
        else:
            found = {"perplexity": {"step": 8, "digest": "d", "figures": {"ppl": summary["val"]["ppl"]}}}
        summary["evaluations"] = found
        (path / "summary.json").write_text(json.dumps(summary))
    pareto.main([str(runs), "y=perplexity/ppl,recall/accuracy", "baseline=mha"])
    assert "warning" not in capsys.readouterr().err
    rows = json.loads((runs / "pareto.json").read_text())
    texts, recalls = ([row for row in rows if row["metric"] == of] for of in ("perplexity/ppl", "recall/accuracy"))
    assert {row["name"] for row in texts} == {"mha", "gqa4", "mqa", "cla2", "swa"}
    assert {row["name"]: (row["context"], row["runs"], row["lowest"]) for row in recalls} == {
        "mha": (16, 2, pytest.approx(0.8)),
        "cla2": (16, 1, pytest.approx(0.9)),
    }
    assert {row["bytes"] for row in recalls} == {
        kv_bytes(resolve(small(name)), 16, 2).stored for name in ("mha", "cla2")
    }
    with pytest.raises(UsageError, match="baseline is cla2, of which there is one run; train it with several seeds"):
        pareto.main([str(runs), "y=recall/accuracy", "baseline=cla2"])
    with pytest.raises(UsageError, match="baseline is mla, which 0 of these points are called; "):
        pareto.main([str(runs), "y=recall/accuracy", "baseline=mla"])
    with pytest.raises(RunError, match=r"say which context=N"):
        pareto.main([str(runs)])


def test_the_context_decides_the_order(runs: Path) -> None:
    """Windows cost as much as full stores on a short text and almost nothing on a long one."""
    short = {row.name: row.bytes for row in points(look_for_runs([runs], finished=True).runs, 4, "ppl", 2)}
    long = {row.name: row.bytes for row in points(look_for_runs([runs], finished=True).runs, 4096, "ppl", 2)}
    assert short["swa"] > short["mqa"]
    assert long["swa"] < long["mqa"]


def test_runs_that_differ_in_more_than_the_seed_are_two_points(tmp_path: Path) -> None:
    make_run(tmp_path, "mha", 0, 20.0)
    make_run(tmp_path, "mha", 1, 25.0, lr=3)
    rows = points(look_for_runs([tmp_path], finished=True).runs, 64, "ppl", 2)
    assert len(rows) == 2
    assert len({row.name for row in rows}) == 2
    assert all(row.name.startswith("mha (") for row in rows)
    first, second = look_for_runs([tmp_path], finished=True).runs
    assert experiment(first) != experiment(second)


def test_which_folders_have_a_label_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of names that do not say it: a part of what differs, where all of it would be too long."""
    make_run(tmp_path, "mqa", 0, 22.0)
    text = {"vocab_size": 8192, "data": 64 * "a", "val_tokens": 1024}
    for seed, ppl in enumerate((20.0, 21.0)):
        make_run(tmp_path, "mha", seed, ppl, **text)
    make_run(tmp_path, "mha", 0, 25.0, vocab_size=819, data=64 * "b", val_tokens=4096)
    pareto.main([str(tmp_path), "context=64", f"out={tmp_path / 'out'}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "): " in line]
    assert lines == [
        f"mha (vocab_size=8192, ...): {tmp_path / 'mha-seed0-20.0'}, {tmp_path / 'mha-seed1-21.0'}",
        f"mha (vocab_size=819, ...): {tmp_path / 'mha-seed0-25.0'}",
    ]


def test_pareto_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    pareto.main([str(runs / "*"), "context=64", "y=bpb", f"out={out}"])
    text = capsys.readouterr().out
    assert "KV cache of one sequence of 64 tokens against bits per byte" in text
    assert {path.name for path in out.iterdir()} == {"pareto.png", "pareto.html", "pareto.csv", "pareto.json"}
    records = json.loads((out / "pareto.json").read_text())
    expected = [
        {"context": 64, "metric": "bpb", **asdict(row)}
        for row in points(look_for_runs([runs], finished=True).runs, 64, "bpb", 2)
    ]
    assert records == expected
    with (out / "pareto.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in records]
    html = (out / "pareto.html").read_text()
    assert "plotly" in html
    assert "mixattention" not in html
    assert all(row["name"] in html for row in records)


@pytest.mark.usefixtures("blank_pictures")
def test_default_place_and_context(runs: Path) -> None:
    pareto.main([str(runs)])
    assert json.loads((runs / "pareto.json").read_text())[0]["context"] == 32
    single = runs / "mha-seed0-20.0"
    pareto.main([str(single)])
    assert (single / "pareto.png").exists()


def test_a_perplexity_too_large_for_a_float_is_still_drawn(tmp_path: Path) -> None:
    """An empty frame says so, as at the end of a run that diverged."""
    run = make_run(tmp_path, "mha", 0, float("inf"))
    pareto.main([str(run)])
    assert (run / "pareto.png").exists()
    assert json.loads((run / "pareto.json").read_text()) == []


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -5.0, 1.5e308])
def test_what_is_not_finite_enters_no_frontier(value: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arch, seed, ppl in (("mqa", 0, 120.0), ("gqa2", 0, value), ("gqa4", 0, 100.0), ("gqa4", 1, value)):
        make_run(tmp_path, arch, seed, ppl)
    make_run(tmp_path, "mha", 0, 50.0)
    pareto.main([str(tmp_path)])
    text = (tmp_path / "pareto.json").read_text()
    assert not {"NaN", "Infinity"} & set(text.replace("-", " ").replace(",", " ").split())
    rows = {row["name"]: row for row in json.loads(text)}
    assert {name: (row["value"], row["runs"], row["frontier"]) for name, row in rows.items()} == {
        "mqa": (120.0, 1, True),
        "gqa4": (100.0, 1, True),
        "mha": (50.0, 1, True),
    }
    errors = capsys.readouterr().err.splitlines()
    assert [f"({name}, seed {seed}) is passed over: its perplexity is {value}" in "".join(errors) for name, seed in
            (("gqa2", 0), ("gqa4", 1))] == [True, True]  # fmt: skip


SUMMARY = {"name": "x", "seed": 0, "seq_len": 32, "experiment": {}, "val": {"ppl": 2.0}, "params": 1, "tokens": 1}
NESTED = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("summary.json", SUMMARY | change) for change in (
            {"val": {}}, {"val": None}, {"val": "x"}, {"val": {"ppl": "2"}}, {"val": {"ppl": True}}, {"val": [1]},
            {"name": 5}, {"name": None}, {"seed": True}, {"seed": "0"}, {"seq_len": 0}, {"seq_len": 2.5},
            {"experiment": []}, {"experiment": NESTED}, {"params": None}, {"params": 10**30}, {"tokens": "many"},
        )),
        ("summary.json", []),
        ("summary.json", b"\xff\xfe{}"),
        ("summary.json", b""),
        ("summary.json", None),
        ("plan.json", None),
        ("plan.json", b"[" * 10**5),
        ("plan.json", NESTED),
        ("plan.json", {"stores": "kv", "reads": [0]}),
        ("plan.json", {"stores": [], "reads": [0]}),
        ("plan.json", {"reads": [0]}),
        ("plan.json", {"block": 5}),
        ("plan.json.window", "64"),
        ("plan.json.window", True),
        ("plan.json.window", 2**80),
        ("plan.json.owner", 99),
        ("plan.json.owner", -1),
        ("plan.json.slot", {"kv_heads": "8"}),
        ("plan.json.slot", 7),
        ("plan.json.name", None),
    ],
)  # fmt: skip
def test_a_neighbour_that_cannot_be_read_is_passed_over(
    file: str, content: object, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """None stands for a folder of the file's name."""
    broken = make_run(runs, "swa", 7, 1.0)
    name, _, key = file.partition("json.")
    path = broken / (f"{name}json" if key else file)
    if key:
        plan = json.loads(path.read_text())
        plan["stores"][0][key] = content
        content = plan
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    monkey: list = []
    original = pareto.write_panels
    pareto.write_panels = lambda panels, *_: monkey.extend(panels["ppl"].rows) or []
    try:
        pareto.main([str(runs)])
    finally:
        pareto.write_panels = original
    assert [row.name for row in monkey if row.name == "x" or row.value == 1.0] == []
    assert len(monkey) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {broken} holds no readable run: {path.name}")


def test_folders_that_cannot_be_looked_into_are_named(
    runs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's folder, and another user's file."""
    closed, run = runs / "closed", next(runs.glob("mqa*"))
    closed.mkdir()
    scandir, read_text = os.scandir, Path.read_text

    def refuse(path: Path, inside: Path, call, *arguments, **options):
        if Path(path).is_relative_to(inside):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, closed, scandir))
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **o: refuse(path, run, read_text, *a, **o))
    found = look_for_runs([runs], finished=True)
    assert len(found.runs) == 6
    assert found.unreadable == [
        f"{closed} cannot be looked into: Permission denied",
        f"{run} holds no readable run: summary.json: Permission denied",
    ]


@pytest.mark.usefixtures("blank_pictures")
def test_unfinished_runs_are_named(runs: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b"):
        (runs / name).mkdir()
        (runs / name / "run.json").write_text("[]")
    pareto.main([str(runs)])
    assert f"warning: not ended, left out: {runs / 'a'}, {runs / 'b'}\n" == capsys.readouterr().err


MARKUP = [
    "cla2[v2]-tiny", "cla2[lr=3e-4]-tiny", "[/]", "[red]x[/bold]", "[link=x]y[/link]", ":smile:", "a$x$b", "c$$d",
    "$x^2", "a_b^c", r"back\slash \frac{1}{2}", "_under", "<b>bold</b>", "a<br>b", "</script>", "&amp;", "{braces}",
    "%d %{x}", "'single' \"double\"", "~#!", "naïve é", "two words", "-dash", "__init__",
]  # fmt: skip


def test_names_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, pictures and page: what rich, matplotlib and plotly read as markup."""
    archs = ("mha", "gqa4", "mqa", "cla2")
    for number, name in enumerate(MARKUP):
        path = make_run(tmp_path, archs[number % 4], number, 20.0 + number, name="run")
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"name": name}))
    drawn = []
    monkeypatch.setattr("eval.plots.pareto.draw_panels", lambda *arguments: drawn.append(draw_panels(*arguments)))
    pareto.main([str(tmp_path)])
    texts = drawn[0].axes[0].texts
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in MARKUP)
    assert {text.get_text() for text in texts} == set(MARKUP)
    assert not any(text.get_parse_math() or text.get_usetex() for text in texts)
    data = (tmp_path / "pareto.html").read_text().rpartition("Plotly.newPlot(")[2]
    shown = set(html.unescape(json.loads(f'"{text}"')) for text in re.findall(r'"((?:[^"\\]|\\.)*)"', data))
    assert set(MARKUP) <= shown
    assert not re.search(r"<b>bold|<br>b|\$x\$", data.encode().decode("unicode_escape", "ignore"))
    with (tmp_path / "pareto.csv").open(encoding="utf-8") as file:
        assert {row["name"].removeprefix("'-") for row in csv.DictReader(file)} == {name.lstrip("-") for name in MARKUP}


@pytest.mark.usefixtures("blank_pictures")
def test_copies_of_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = make_run(tmp_path / "copy", "cla2", 0, 20.0)
    make_run(tmp_path, "cla2", 0, 20.0)
    pareto.main([str(tmp_path)])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(copy) in errors[0] and "(cla2, seed 0): both are counted" in errors[0]
    assert [row["runs"] for row in json.loads((tmp_path / "pareto.json").read_text())] == [2]


@pytest.mark.usefixtures("blank_pictures")
def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path, "mha", 0, 20.0, name="plain")
    path = next(tmp_path.glob("plain*")) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "a\x1b[31m\ud800b\u202ec"}))
    pareto.main([str(tmp_path)])
    assert r"a\x1b[31m\ud800b\u202ec" in capsys.readouterr().out


@pytest.mark.usefixtures("blank_pictures")
def test_the_folder_that_was_named_is_the_one_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that exists is no glob and no option."""
    for name in ("exp[1]", "exp1", "lr=1e-3", "what?", "star*"):
        make_run(tmp_path / name, "mha", 0, 20.0, name=f"in {name}")
    monkeypatch.chdir(tmp_path)

    def read(*words: str) -> set[str]:
        pareto.main([*words, "out=out"])
        capsys.readouterr()
        return {row["name"] for row in json.loads(Path("out/pareto.json").read_text())}

    for name in ("exp[1]", "lr=1e-3", "./lr=1e-3", "what?", "star*"):
        assert read(name) == {f"in {name.removeprefix('./')}"}
    assert read("exp*") == {"in exp[1]", "in exp1"}
    assert read("./lr=*") == {"in lr=1e-3"}
    assert len(read(*(f"./{path.name}" for path in tmp_path.iterdir() if path.name != "out"))) == 5
    with pytest.raises(UsageError, match="no/lr=3 is not a folder"):
        read("no/lr=3")


def test_labels_do_not_overlap(tmp_path: Path) -> None:
    """A crowd: every name is drawn, none over another."""
    for number, name in enumerate(
        ("mha", "gqa8", "gqa4", "gqa2", "mqa", "cla2", "cla3", "cla4", "swa", "mixattention")
    ):
        make_run(tmp_path, name, 0, 20.0 + number / 3)
    rows = points(look_for_runs([tmp_path], finished=True).runs, 64, "ppl", 2)
    figure = draw_panels([Panel(rows, 64, axis("stored", 64), axis("ppl", 64))])
    drawn = {text.get_text(): Text.get_window_extent(text) for text in figure.axes[0].texts}
    assert set(drawn) == {row.name for row in rows}
    boxes = list(drawn.values())
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{runs}", "contxt=3"],
            "contxt, did you mean context? The command line has context, itemsize, out, x, y",
        ),
        (["{runs}", "context=long"], "context is long; it must be a whole number, or null"),
        (["{runs}", "context=0"], "it is a whole number"),
        (["{runs}", "y=[]"], "y is empty; name at least one figure"),
        (["/nowhere"], "/nowhere is not a folder"),
        ([__file__], "no folder is given"),
        (["{empty}"], "no finished run in"),
        (["{runs}", "out=/proc/nowhere"], "give another folder with out="),
    ],
)
def test_pareto_errors(arguments: list[str], message: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as caught:
        pareto.main([argument.format(runs=runs, empty=tmp_path / "empty") for argument in arguments])
    assert message in str(caught.value)


@pytest.mark.usefixtures("blank_pictures")
def test_a_star_that_finds_our_own_files(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The second time `pareto.py runs/*` is typed, the first one's files lie among the runs."""
    pareto.main([str(runs)])
    assert (runs / "pareto.csv").exists()
    capsys.readouterr()
    pareto.main([*map(str, sorted(runs.iterdir())), f"out={tmp_path}"])
    assert (tmp_path / "pareto.png").exists()


@pytest.mark.usefixtures("blank_pictures")
def test_runs_that_hardly_compare(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pareto.main([str(runs), f"out={tmp_path}"])
    assert "warning" not in capsys.readouterr().err
    path = next(runs.glob("mqa*")) / "summary.json"
    summary = json.loads(path.read_text())
    summary["experiment"]["data"] = "other"
    path.write_text(json.dumps(summary))
    pareto.main([str(runs), f"out={tmp_path}"])
    assert "warning: the runs differ in data, data.document_mask or data.block_padding: " in capsys.readouterr().err
    path.write_text(json.dumps(summary | {"tokens": 1, "seq_len": 64}))
    pareto.main([str(runs), "context=64", f"out={tmp_path}"])
    assert "data.block_padding, tokens, size.seq_len: their values hardly compare" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_seeds_that_differ_in_more_are_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In what rounds their sums otherwise, or in the code; `auto` is what it was on the hardware of the run. Runs whose
    files do not tell are not blamed."""
    folders = sorted(runs.glob("mha*"))

    def told(number: int, git: str = "abc", hardware: str = "A CPU, 1 thread", **trainer: object) -> str:
        found = {"precision": "auto", "compile": None, "accelerator": "auto", **trainer}
        (folders[number] / "config.yaml").write_text(yaml.safe_dump({"trainer": found}))
        (folders[number] / "run.json").write_text(json.dumps([{"git": git, "hardware": hardware}]))
        pareto.main([str(runs), f"out={tmp_path}"])
        return capsys.readouterr().err

    assert told(0) == told(1, precision="fp32", compile=False) == ""
    line = "warning: mha: its seeds differ in {}, too, and are one point: " + ", ".join(map(str, folders)) + "\n"
    assert told(1, git="def") == line.format("commit")
    assert told(1, precision="bf16") == line.format("trainer.precision")
    assert told(1, hardware="2 x NVIDIA H200") == line.format("trainer.precision, trainer.compile")
    assert told(1, hardware="2 x NVIDIA H200", accelerator="cpu") == ""


@pytest.mark.usefixtures("blank_pictures")
def test_a_baseline_is_called_by_its_layout(tmp_path: Path) -> None:
    """Also in a study, whose runs are named after it: the runs of several seeds, not those that searched rates."""
    for arch in ("mha", "cla2"):
        make_run(tmp_path, arch, 0, 25.0, name=f"cpu-{arch}", lr=3)
        for seed in range(2):
            make_run(tmp_path, arch, seed, 20.0 + seed, name=f"cpu-{arch}")
    rows = points(look_for_runs([tmp_path], finished=True).runs, 64, "ppl", 2)
    mha = next(row for row in rows if row.name.startswith("cpu-mha") and row.runs == 2)
    assert pareto.baseline_of(rows, "mha") == pareto.baseline_of(rows, mha.name) == mha
    with pytest.raises(UsageError, match="baseline is cpu, which 4 of these points are called; write one in full: cpu"):
        pareto.baseline_of(rows, "cpu")
    with pytest.raises(UsageError, match="baseline is mqa, which 0 of these"):
        pareto.baseline_of(rows, "mqa")


def test_broken_runs_are_named(runs: Path) -> None:
    run = next(runs.glob("mqa*"))
    (run / "plan.json").unlink()
    with pytest.raises(RunError, match=r"plan\.json is missing"):
        finished_run(run)
    (run / "plan.json").write_text("{")
    (line,) = look_for_runs([runs], finished=True).unreadable
    assert line.startswith(f"{run} holds no readable run")


def test_runs_of_different_length_need_a_context(runs: Path) -> None:
    path = next(runs.glob("mqa*")) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seq_len": 64}))
    with pytest.raises(RunError, match=r"sequences of \[32, 64\] tokens; say which context=N"):
        pareto.main([str(runs)])


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("needles/passkey/match", True), ("needles/single/choice/512", True), ("needles@a.txt/words/margin", True),
        ("recall/zoology/accuracy/8", True), ("copy/generated", True), ("decode/tokens_per_second", True),
        ("lm-eval/gsm8k/exact_match,strict-match", True), ("lm-eval/hellaswag/acc_norm,none", True),
        ("lm-eval/wikitext/word_perplexity,none", False), ("induction/text", False), ("induction/text/accuracy", True),
        ("perplexity/repeat_ppl", False), ("decode/token_ms", False), ("stored", False), ("bpb", False),
    ],
)  # fmt: skip
def test_which_end_of_an_axis_is_better(name: str, larger: bool) -> None:
    assert axis(name, 64).larger == larger


@pytest.mark.usefixtures("blank_pictures")
def test_any_recorded_figure_on_either_axis(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Figures of tasks, of which some are the better the larger they are; several are panels side by side."""
    accuracies = {"mha": 0.9, "gqa4": 0.7, "mqa": 0.95, "cla2": 0.5}
    nested = "gap/choice/4"
    for path in sorted(runs.glob("*")):
        summary = json.loads((path / "summary.json").read_text())
        if summary["name"] in accuracies:
            figures = {
                "accuracy": accuracies[summary["name"]] - 0.1 * summary["seed"],
                "seconds": 1.0 + summary["seed"],
                nested: accuracies[summary["name"]],
            }
            summary["evaluations"] = {"recall": {"step": 8, "digest": summary["name"][:1], "figures": figures}}
            (path / "summary.json").write_text(json.dumps(summary))
    pareto.main([str(runs), "list=true"])
    out = capsys.readouterr().out
    for words in ("recall/accuracy", "higher is better", "allocated", "figures of 7 runs"):
        assert words in out
    assert not (runs / "pareto.png").exists()

    pareto.main([str(runs), f"y=recall/{nested}"])
    assert f"recall/{nested}: some runs were measured with other options" in capsys.readouterr().err
    pareto.main([str(runs), "context=64", "x=read", "y=ppl,recall/accuracy"])
    captured = capsys.readouterr()
    assert "swa-seed0-40.0 (swa, seed 0) is passed over: its recall/accuracy is None" in captured.err
    assert "recall/accuracy: some runs were measured with other options" in captured.err
    rows = json.loads((runs / "pareto.json").read_text())
    ppl, recall = ({row["name"]: row for row in rows if row["metric"] == name} for name in ("ppl", "recall/accuracy"))
    assert len(ppl) == 5 and len(recall) == 4
    assert (recall["mha"]["value"], recall["mha"]["lowest"]) == (pytest.approx(0.8), pytest.approx(0.7))
    reads = {name: kv_bytes(resolve(small(name)), 64, 2).read for name in ppl}
    assert {name: row["x"] for name, row in ppl.items()} == reads
    expected = {
        name
        for name, row in recall.items()
        if not any(row["value"] <= other["value"] for key, other in recall.items() if reads[key] < reads[name])
    } - {"cla2"}  # reads as much as mqa, and recalls less
    assert {name for name, row in recall.items() if row["frontier"]} == expected

    pareto.main([str(runs), "x=recall/accuracy", "y=recall/seconds"])
    rows = json.loads((runs / "pareto.json").read_text())
    assert [row["name"] for row in rows] == ["mqa", "mha", "gqa4", "cla2"], "the best in x first"
    assert {row["name"] for row in rows if row["frontier"]} == {"mqa"}
    with pytest.raises(UsageError, match=r"no run here has the figure recall/acuracy, did you mean recall/accuracy\?"):
        pareto.main([str(runs), "y=recall/acuracy"])
