"""Caches that are made smaller at test time: the protocol of `tasks=compressed`, what is written, and its picture."""

import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, build, small
from matplotlib.text import Text
from oracles import subject
from torch.nn import functional as F

from arch.named import load_arch
from data.cli import UsageError
from data.recall import RecallTask
from eval import generate, pareto
from eval.evaluate import main
from eval.evaluations import difference
from eval.figures import Axis, Panel, evaluations, methods_of
from eval.methods import read_method, with_brackets
from eval.plots.pareto import draw_panels
from eval.recall import questions
from eval.runs import Point, look_for_runs
from eval.source import Source
from eval.tasks import compressed
from eval.tasks.compressed import Bytes, Options, RecallBatch, batches, pairs_of, text_windows, through
from train.subjects import data_of_run, open_subject

OLD = ROOT / "tests" / "golden" / "old"
CODED = "int4(group=4,recent=2)+streaming@50%"
WIDE = "int4(recent=0)"  # its blocks of 32 tokens are wider than the windows
COUNTED = "corm(window=2)"  # its bytes depend on the text
FEW = ["compressed.windows=4", "compressed.pairs=2", "compressed.length=16", "compressed.sequences=4", "device=cpu"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, evaluated with cache methods."""
    folder = tmp_path_factory.mktemp("compressed") / "old"
    shutil.copytree(OLD, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("run-mixattention", "run-block"):
            main([f"checkpoint={run}", f"cache=[none,streaming@100%,streaming@50%,{CODED},{WIDE},{COUNTED}]", *FEW])
    return folder


def entries(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["evaluations"]


@pytest.mark.parametrize("run", ["run-mixattention", "run-block"])
def test_every_method_has_its_figures_and_its_bytes(run: str, old: Path) -> None:
    found = entries(old / run)
    names = [
        "compressed",
        *(f"compressed[{method}]" for method in ("streaming@100%", "streaming@50%", CODED, WIDE, COUNTED)),
    ]
    assert list(found) == names and "method" not in found["compressed"] and found[names[3]]["method"] == CODED
    assert len({entry["digest"] for entry in found.values()}) == 1, "the method is no option of the protocol"
    none, full, half, both, wide, counted = (found[name]["figures"] for name in names)
    assert full == none, "a full budget changes no bit"
    for figures in (none, full, half, both, wide):
        assert figures["end_bytes"] == figures["formula_bytes"] <= figures["peak_bytes"]
    assert "formula_bytes" not in counted and 0 < counted["end_bytes"] <= counted["peak_bytes"]
    assert both["end_bytes"] < none["end_bytes"] and half["mean_bytes"] < none["mean_bytes"]
    written = json.loads((old / run / "evaluations" / "compressed-streaming@50%.json").read_text())
    assert written["cache"] == "streaming@50%" and len(written["samples"]["loss"]) == 4
    samples = json.loads((old / run / "evaluations" / "compressed.json").read_text())["samples"]["recall/accuracy"]
    assert sum(samples) / 4 == none["recall/accuracy"] != none["recall/choice"]
    assert half["loss"] != none["loss"] == pytest.approx(sum(written_loss(old / run)) / 4)


def written_loss(run: Path) -> list[float]:
    return json.loads((run / "evaluations" / "compressed.json").read_text())["samples"]["loss"]


def test_a_method_measured_again_takes_the_place_of_its_figures_alone(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run-mixattention"
    shutil.copytree(old / run.name, run)
    shutil.copytree(old / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = entries(run)
    words = [*FEW, "compressed.parts=text", "compressed.new=4"]
    main([f"checkpoint={run}", "cache=streaming@50%", *words])
    after = entries(run)
    assert after.keys() == before.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert changed == ["compressed[streaming@50%]"] and "recall/choice" not in after[changed[0]]["figures"]


def test_the_loss_without_a_method_is_that_of_a_pass_without_a_cache(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tokens after the first that follows the prefix."""
    monkeypatch.chdir(old)
    opened = open_subject(Source("run-mixattention", device="cpu"))
    subject = replace(opened.subject, prepared=data_of_run(opened), quiet=True)
    found = compressed.run(subject, Options(parts=("text",), prefix=20, new=8, windows=3, dtype="fp32"))
    tokens_NT = text_windows(subject, 29, 3)
    with torch.no_grad():
        logits_NTV = subject.model.next_token_logits(tokens_NT[:, :-1])
    nats_NT = F.cross_entropy(logits_NTV.transpose(1, 2), tokens_NT[:, 1:], reduction="none")
    assert found.samples["loss"] == pytest.approx(nats_NT[:, 20:].mean(dim=1).tolist(), rel=1e-5)
    most = subject.context - 8
    assert compressed.lengths(subject, Options(prefix=most, new=8)) == (most, 8)
    with pytest.raises(UsageError, match=f"beyond the context of {most + 8}: lower it, or set context={most + 9}"):
        compressed.lengths(subject, Options(prefix=most + 1, new=8))


class Oracle:
    """A model that answers every question by looking at what it was fed; `method` forgets some of it."""

    class plan:  # noqa: N801
        min_prompt = 1

    output_weight = torch.zeros(40, 1)

    def prefill(self, tokens_BT: torch.Tensor, cache: list) -> None:
        cache.append(tokens_BT)

    def decode_step(self, tokens_B1: torch.Tensor, cache: list) -> torch.Tensor:
        prompt_BT = cache[0]
        logits_BV = torch.zeros(len(prompt_BT), 40)
        for row, (key,) in enumerate(tokens_B1.tolist()):
            value = dict(zip(*(prompt_BT[row, place:4:2].tolist() for place in (0, 1)), strict=True)).get(key, 0)
            logits_BV[row, value] = 1.0
        return logits_BV[:, None]


class OracleCache(list):
    nbytes = 12


class OracleSubject:
    model, device, seed, context, method, name = Oracle(), torch.device("cpu"), 0, 64, None, "oracle"
    numbers: int | None = None
    joined: bool | None = None

    def allocate_cache(self, rows: int, capacity: int, dtype: torch.dtype) -> OracleCache:
        return OracleCache()

    def progress(self, items: tuple, total: int, what: str) -> tuple:
        return items


@pytest.mark.parametrize("part", ["recall", "turns"])
def test_who_knows_the_pairs_answers_everything(part: str) -> None:
    found = compressed.of_recall(OracleSubject(), Options(pairs=(2,), sequences=8), part)  # type: ignore[arg-type]
    for kind in ("recall",) if part == "recall" else ("known", "new"):
        assert found.figures[f"{kind}/accuracy"] == found.figures[f"{kind}/choice"] == 1
    assert found.figures[f"{part}/end_bytes"] == 12 / 8


def test_questions_and_answers_are_no_text() -> None:
    """Of data=recall, whose rows would be read as text."""
    subject = OracleSubject()
    subject.prepared = SimpleNamespace(has_answers=True)
    found = compressed.run(subject, Options(parts=("text", "recall"), pairs=(2,), sequences=2))  # type: ignore[arg-type]
    assert "loss" not in found.figures and found.figures["recall/accuracy"] == 1
    assert "text is left out: the data is questions and their answers; give text=FILE" in found.notes


def test_what_the_first_turn_left_out_is_neither_known_nor_new() -> None:
    """Row by row: of two even pairs the first asks for one, the second for both."""
    pair_BT = torch.tensor([[-1, -1, 0, 0, 0, 2, 1, 3], [-1, -1, 2, 0, 0, 2, 1, 2]])
    asked = RecallBatch(torch.zeros_like(pair_BT), pair_BT, torch.ones(2, 4).long(), prefix=4)
    found = compressed.right(OracleSubject(), asked, "turns", "bf16", Bytes())  # type: ignore[arg-type]
    assert found["known"][..., 2].tolist() == [[1, 0, 0, 0], [1, 1, 0, 1]]
    assert found["new"][..., 2].tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("part", ["recall", "turns"])
def test_bytes_are_those_of_sequences_of_one_length(part: str) -> None:
    class Cache(OracleCache):
        nbytes = 0

    class Subject(OracleSubject):
        def allocate_cache(self, rows: int, capacity: int, dtype: torch.dtype) -> OracleCache:
            cache = Cache()
            cache.nbytes = rows * capacity
            return cache

    options = Options(pairs=(4, 2, 9), sequences=4)
    found = compressed.of_recall(Subject(), options, part)  # type: ignore[arg-type]
    assert {found.figures[f"{part}/{name}_bytes"] for name in ("end", "mean", "peak")} == {64}
    assert f"{part}: bytes are those of sequences with 4 pairs, 64 tokens" in found.notes
    assert any("with 9 pairs is left out: 144 tokens are beyond the context of 64" in note for note in found.notes)


def test_what_is_impossible_is_known_before_and_faults_come_out() -> None:
    class Subject(OracleSubject):
        def allocate_cache(self, rows: int, capacity: int, dtype: torch.dtype) -> OracleCache:
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        compressed.of_recall(Subject(), Options(pairs=(2,)), "recall")  # type: ignore[arg-type]
    found = compressed.of_recall(Subject(), Options(pairs=(2,), length=3), "recall")  # type: ignore[arg-type]
    assert not found.rows and "recall with 2 pairs is left out: 2 pairs: at least 1" in found.notes[0]


def test_budgets_that_hold_nothing_of_a_length_are_known_before() -> None:
    """ArkVale's digests are of all pages: 384 bytes are enough for 32 tokens, not for 64."""
    given = replace(subject(build(small(load_arch("mha"), num_layers=2, vocab_size=80), torch.float32)), context=64)
    budget = "arkvale@BUDGET(page=4,recent=4)"
    at_64 = replace(given, method=read_method(budget.replace("BUDGET", "1B")))
    least = int(re.findall(r"the least is arkvale@(\d+)B", compressed.too_little(at_64, 32, 64, "bf16"))[0])
    given = replace(given, method=read_method(budget.replace("BUDGET", f"{least - 1}B")))
    found = compressed.run(given, Options(parts=("recall",), pairs=(2, 4), sequences=2))
    assert found.figures["recall/end_bytes"] > 0 and {row["what"] for row in found.rows} == {"2 pairs"}
    assert found.notes[0].startswith("recall with 4 pairs is left out: arkvale")
    assert f"the least is arkvale@{least}B" in found.notes[0]
    text = compressed.run(given, Options(parts=("text", "recall"), pairs=(2,), sequences=2))
    assert text.notes[0].startswith("text is left out: arkvale") and f"arkvale@{least}B" in text.notes[0]
    assert compressed.too_little(replace(given, method=read_method(COUNTED)), 32, 64, "bf16") == ""


def test_a_kind_that_chance_never_asks_for_is_left_out() -> None:
    """One question after the compression is of one kind; so are those of a sequence with few."""
    options = Options(pairs=(2,), sequences=1, length=8)
    found = compressed.of_recall(OracleSubject(), options, "turns")  # type: ignore[arg-type]
    kinds = {kind for kind in ("known", "new") if f"{kind}/accuracy" in found.figures}
    assert len(kinds) == 1 and found.samples.keys() == {f"{kind}/accuracy" for kind in kinds}
    assert "no question is of kind" in found.notes[0]
    options = replace(options, sequences=8)
    found = compressed.of_recall(OracleSubject(), options, "turns")  # type: ignore[arg-type]
    assert found.samples.keys() == {"known/accuracy", "new/accuracy"}
    assert {1.0} == {*found.samples["known/accuracy"], *found.samples["new/accuracy"]}


@pytest.mark.parametrize("joined", [False, True])
def test_the_first_turn_asks_for_every_other_pair(joined: bool) -> None:
    subject = OracleSubject()
    subject.model = Oracle()
    subject.model.output_weight = torch.zeros(296, 1)
    (asked,) = batches(subject, Options(joined=joined, sequences=6), "turns", 4)  # type: ignore[arg-type]
    assert isinstance(asked, RecallBatch) and asked.inputs_BT.shape == (6, 64) and asked.prefix == 48
    keys_BP, values_BP = pairs_of(RecallTask.of(64, 4, 296, joined), asked.inputs_BT, 4)
    assert torch.equal(values_BP, asked.values_BP)
    assert torch.equal(keys_BP.gather(1, asked.pair_BT[:, 32:]), asked.inputs_BT[:, 32:])
    assert set(asked.pair_BT[:, 32:48].unique().tolist()) == {0, 2}
    assert set(asked.pair_BT[:, 48:].unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("part", ["recall", "turns"])
def test_the_size_of_a_batch_does_not_change_the_questions(part: str) -> None:
    """Those of the default are as they were; what some methods do with a batch is in the digest."""
    found = []
    for batch in (16, 5, 40):
        asked = [*batches(OracleSubject(), Options(sequences=40, batch=batch), part, 4)]  # type: ignore[arg-type]
        assert len(asked[0].inputs_BT) == batch
        found.append([torch.cat([getattr(one, name) for one in asked]) for name in ("inputs_BT", "pair_BT")])
    assert all(one.equal(other) for parts in found[1:] for one, other in zip(found[0], parts, strict=True))
    if part == "recall":
        assert found[0][0][16:32].equal(questions(RecallTask.of(64, 4, 40), 4, 16, 0, number=1).inputs_BT)
    assert Options(batch=5).deciding() == {**asdict(Options(batch=5)), "version": compressed.VERSION}


def test_questions_are_of_the_tokens_that_the_model_was_trained_on() -> None:
    subject = OracleSubject()
    subject.model = Oracle()
    subject.model.output_weight = torch.zeros(4096, 1)
    subject.numbers = 296
    for asked in batches(subject, Options(joined=True), "recall", 4):  # type: ignore[arg-type]
        assert asked.inputs_BT.max() < 296 and asked.values_BP.max() < 40, "of 16 keys and as many values"


def test_bytes_are_seen_before_and_after_the_compression() -> None:
    class Cache(OracleCache):
        nbytes, notes_nbytes = 8, 6

        def compress(self) -> None:
            self.nbytes = 4

    subject = OracleSubject()
    subject.method = "half"  # type: ignore[assignment]
    subject.allocate_cache = lambda *_: Cache()  # type: ignore[method-assign]
    seen = Bytes()
    through(subject, torch.zeros(2, 6, dtype=torch.int64), 4, "bf16", lambda logits, place: None, seen)  # type: ignore[arg-type]
    assert seen.figures() == {"end_bytes": 2, "mean_bytes": 2, "peak_bytes": 7} and len(seen.steps) == 2


def test_methods_are_read_from_a_list() -> None:
    words = ("none", "int4(group=8", "recent=2)", "streaming@5%(sinks=2)")
    assert with_brackets(words) == ["none", "int4(group=8,recent=2)", "streaming@5%(sinks=2)"]
    assert read_method(" none ") is None and str(read_method("'int8'").text) == "int8"
    with pytest.raises(UsageError, match="cache=int5: no cache method 'int5'"):
        read_method("int5")


def test_a_method_that_a_layout_does_not_take_is_refused_before_any_work(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old)
    with pytest.raises(UsageError, match="cache= of bct-tiny-seed0: int4: every store is bounded"):
        main(["checkpoint=run-bct", "cache=none,int4", *FEW])
    assert "evaluations" not in json.loads(Path("run-bct/summary.json").read_text())


def test_points_of_methods_stand_beside_those_of_their_runs(old: Path, capsys: pytest.CaptureFixture) -> None:
    runs = look_for_runs([old / "run-mixattention", old / "run-block"], finished=True).runs
    assert methods_of(runs) == ["none", COUNTED, CODED, WIDE, "streaming@100%", "streaming@50%"]
    assert evaluations(runs[0], CODED)["compressed/loss"] > 0
    pareto.main([str(run.folder) for run in runs] + ["list=true"])
    shown = capsys.readouterr().out
    assert "compressed/loss" in shown and "compressed/end_bytes" in shown and "[" not in shown
    words = ["x=compressed/end_bytes", "y=compressed/loss,compressed/recall/choice", f"out={old / 'out'}"]
    pareto.main([*(str(run.folder) for run in runs), *words])
    with (old / "out" / "pareto.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 6 and {row["method"] for row in rows} == set(methods_of(runs))
    one = next(row for row in rows if row["method"] == "streaming@50%" and row["name"] == "mixattention-tiny")
    assert float(one["x"]) == 464 and one["kv_read"] == "" and int(one["bytes"]) < 768
    pareto.main([str(run.folder) for run in runs] + [f"out={old / 'plain'}"])
    with (old / "plain" / "pareto.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["none", "none"], "perplexity is of no method"


@pytest.mark.parametrize("options", ["", "(group=16,recent=8,keys=token,hadamard=true)"])
def test_forty_points_can_be_told_apart(options: str) -> None:
    """Every method is in the legend, in whole, and joined to its model; names touch no point and no other name."""
    methods = ["none", *(f"method{number}{options}" for number in range(7))]
    rows = [
        Point(f"layout{n}-tiny", 2 ** (20 - n) // (m + 1), 5 + 0.1 * n + 0.02 * m, 5.0, 5.0, 1, n == m, 1, 1, 1, 0, 1)
        for n in range(5)
        for m in range(8)
    ]
    rows = [
        replace(row, method=methods[place % 8], lowest=row.value, highest=row.value) for place, row in enumerate(rows)
    ]
    figure = draw_panels([Panel(rows, 64, Axis("stored", "bytes", in_bytes=True), Axis("loss", "loss"))])
    figure.canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()][2:] == methods[1:]
    assert sum(len(line.get_xdata()) == 2 and line.get_linewidth() == 0.6 for line in axes.lines) == 35
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) >= 5
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    below = legend.get_window_extent()
    assert not any(below.overlaps(box) for box in [*boxes, axes.bbox])
    assert 0 <= below.x0 < below.x1 <= figure.bbox.x1 and below.y0 >= 0


@pytest.mark.parametrize(
    ("values", "others", "text"),
    [
        ([1.0, 2.0], [1.0, 2.0], "same"),
        ([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], "+0.5000"),
        ([1.0, 3.0], [2.0, 2.0], "+0.0000 ± 12.7060, not told apart"),
    ],
)
def test_differences_are_paired(values: list[float], others: list[float], text: str) -> None:
    assert difference(values, others) == text


def test_text_is_continued_over_a_compressed_cache(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the bytes before and after; a full budget continues as no method does."""
    monkeypatch.chdir(old)
    texts, reports, whole = [], [], []
    for method in ("none", "streaming@100%", "streaming@50%", "fp8"):
        generate.main(
            ["checkpoint=run-mixattention", "prompt=def function_1(x):", "max_new_tokens=6", f"cache={method}"]
        )
        out, err = capsys.readouterr()
        texts.append(out)
        reports.append([int(found.replace(",", "")) for found in re.findall(r"\(([\d,]+) bytes\)", err)])
        whole.append(re.findall(r"cache (\S+ \S+) \(" if method == "none" else r", (\S+ \S+) before", err))
    assert texts[0] == texts[1]
    assert reports[2] < reports[1] == reports[0] > reports[3]
    assert whole == [whole[0]] * 4
