"""`eval/evaluate.py`: the registry of tasks, their options, and what is written."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build, small
from oracles import subject

import arch
from arch.named import load_arch
from data.cli import UsageError
from data.shards import IGNORE
from eval.evaluate import main
from eval.evaluations import digest_of
from eval.scoring import repeats
from eval.source import Source
from eval.tasks import TASKS, perplexity, select_tasks
from eval.tasks.decoding import per_step
from eval.tasks.likelihood import whole_likelihoods
from train import load
from train.subjects import open_subject

OLD = ROOT / "tests" / "golden" / "old"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with finished runs, their data and exports."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def result(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (["perplexty"], [], "did you mean perplexity?"),
        (["perplexity:book"], [], "takes no name"),
        ([], [], "tasks= is empty"),
        (["perplexity"], ["perplexity.strid=8"], "did you mean stride?"),
        (["perplexity"], ["perplexity.stride=x"], r"perplexity\.stride is x; it must be a whole number"),
        (["perplexity"], ["perplexity.stride=9", "perplexity.window=8"], r"perplexity\.stride is 9, more than"),
        (["perplexity"], ["perplexity.protocol=page"], "choose auto, windows"),
    ],
)
def test_mistakes_in_options(names: list[str], words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select_tasks(names, words)


def test_every_option_is_explained(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    for name, task in TASKS.items():
        for field in task.options.__dataclass_fields__:
            assert field in (task.options.__doc__ or ""), f"{name}.{field}"
            assert f"{field}=" in shown


@pytest.mark.parametrize("name", ["run-mixattention", "run-block", "run-bct"])
def test_perplexity_of_a_run_is_its_validation_loss(name: str, old: Path) -> None:
    """On the shards, and by the windows, that training validated on; merged into the summary beside it."""
    before = result(old / name / "summary.json")
    main([f"checkpoint={name}", "tasks=perplexity", "device=cpu"])
    after = result(old / name / "summary.json")
    found = after.pop("evaluations")["perplexity"]
    assert after == before
    assert found["step"] == 8
    assert {key: found["figures"][key] for key in ("loss", "ppl", "bpb")} == pytest.approx(before["val"], rel=1e-6)
    written = result(old / name / "evaluations" / "perplexity.json")
    assert written["figures"] == found["figures"] and written["digest"] == found["digest"]
    assert sum(row["targets"] for row in written["rows"]) == written["figures"]["tokens"]
    assert (old / name / "evaluations" / "perplexity-positions.png").exists()


class Naive:
    """The loss of each token of a text by the definition, one forward pass for each, in the order of the text."""

    def __init__(self, run: str):
        loaded = load(run)
        self.model, self.tokenizer = loaded
        self.block = self.model.plan.block_length

    def nats(self, tokens: list[int], number: int, first: int) -> float:
        """Loss of tokens[number] given tokens[first:number]."""
        if first == number:  # a block decoder that predicts the first block sees nothing before it
            logits_V = self.model(torch.zeros(1, self.block, dtype=torch.int64))[0, 0]
        else:
            logits_V = self.model.next_token_logits(torch.tensor([tokens[first:number]]))[0, -1]
        return -logits_V.log_softmax(-1)[tokens[number]].item()

    def document(self, text: str, window: int, stride: int) -> list[float]:
        tokens = [self.tokenizer.end, *self.tokenizer.encode(text)]
        found, begin, done = [], 0, 1
        while done < len(tokens):
            end = min(begin + window, len(tokens) - 1)  # the last target of the window
            first = max(0, end - window)
            shift = 1 - self.model.plan.target_offset  # the blocks begin with the first target
            found += [self.nats(tokens, number, first + shift) for number in range(done, end + 1)]
            done, begin = end + 1, begin + stride
        return found


TEXTS = ["def naïve(x):\n    return x * 3\n" * 2, "import os", "class A:\n    'ä'\n" * 3]


@torch.no_grad()
@pytest.mark.parametrize(("run", "stride"), [("run-mixattention", 5), ("run-mixattention", 16), ("run-block", 8)])
def test_documents_by_the_definition(run: str, stride: int, old: Path) -> None:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS, ""])
    (old / "texts.jsonl").write_text(lines)
    main([
        f"checkpoint={run}", "tasks=perplexity", "text=texts.jsonl", "text_key=body", "context=16", "device=cpu",
        f"perplexity.stride={stride}", "perplexity.batch=3",
    ])  # fmt: skip
    naive = Naive(run)
    expected = [nats for text in TEXTS for nats in naive.document(text, 16, stride)]
    figures = result(old / run / "evaluations" / "perplexity@texts.json")["figures"]
    assert figures["tokens"] == len(expected)
    assert figures["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert figures["ppl"] == pytest.approx(math.exp(figures["loss"]))
    size = len("".join(TEXTS).encode())
    assert figures["bpb"] == pytest.approx(sum(expected) / math.log(2) / size, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_documents_of_less_than_two_blocks(batch: int, tmp_path: Path) -> None:
    """Of a Block Transformer that does not predict its first block: beside longer ones, and by themselves."""
    layout = load_arch("block")
    layout.block.start = False
    model = build(small(layout, num_layers=4, vocab_size=300))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (TEXTS[1], "ab", "abcd!"))
    )
    given = subject(model, texts=(tmp_path / "texts.jsonl",))
    figures = perplexity.run(given, perplexity.Options(batch=batch)).figures
    rows = [given.tokenizer.encode(text) for text in (TEXTS[1], "abcd!")]
    nats = [-whole_likelihoods(model, [(row[:4], row[4:])])[0].nats for row in rows]
    assert figures["tokens"] == sum(len(row) - 4 for row in rows)
    assert figures["loss"] == pytest.approx(sum(nats) / figures["tokens"], rel=1e-5)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match=r"text=\S+empty.txt has no document of 5 tokens; give other text"):
        perplexity.run(subject(model, texts=(tmp_path / "empty.txt",)), perplexity.Options())


@torch.no_grad()
def test_wikitext_by_words(old: Path) -> None:
    """Per word and byte of the file as it is, of pages that are detokenised and scored apart."""
    pages = [
        ' = Robert <unk> = \n \n Robert is an English actor ; he had a role in " Casualty " , in 2000 @-@ 01 . \n',
        " = N \n = \n \n = = Reception = = \n The album sold 4 @,@ 500 copies ( at $ 3 @.@ 5 ) . \n",
    ]
    pages[1] = pages[1].replace(" = N \n = \n", " = Second page = \n")
    plain = [
        ' = Robert <unk> = \n\nRobert is an English actor; he had a role in "Casualty", in 2000-01.\n',
        " = Second page = \n\n== Reception ==\nThe album sold 4,500 copies (at $ 3.5).\n",
    ]
    plain = [text.replace(" = \n", " =\n") for text in plain]
    (old / "wiki.test.raw").write_text("".join(pages))
    main([
        "checkpoint=run-mixattention", "text=wiki.test.raw", "perplexity.protocol=words", "context=32", "device=cpu",
    ])  # fmt: skip
    naive = Naive("run-mixattention")
    nats = sum(sum(naive.document(text, 32, 32)) for text in plain)
    figures = result(old / "run-mixattention" / "evaluations" / "perplexity@wiki.test.raw.json")["figures"]
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert figures["word_ppl"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert figures["bpb"] == pytest.approx(nats / math.log(2) / len("".join(pages).encode()), rel=1e-5)


def test_a_model_of_transformers(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported folder is scored, and decodes prompts of several lengths, as the run that it was exported from."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    monkeypatch.delitem(auto.CONFIG_MAPPING._extra_content, "kvfrontier", raising=False)  # by tests of train/hf
    (old / "text.txt").write_text("".join(TEXTS))
    words = ["text=text.txt", "context=16", "device=cpu"]
    with pytest.raises(UsageError, match=r"custom code.*trust=true runs it"):
        main(["checkpoint=export-mixattention", *words])
    main(["checkpoint=export-mixattention", "trust=true", "out=exported", *words])
    main(["checkpoint=run-mixattention", *words])
    ours = result(old / "run-mixattention" / "evaluations" / "perplexity@text.txt.json")
    theirs = result(old / "exported" / "perplexity@text.txt.json")
    assert theirs["figures"] == pytest.approx(ours["figures"], rel=1e-5)
    assert theirs["digest"] == ours["digest"]
    sources = [Source("export-mixattention", trust=True, device="cpu"), Source("run-mixattention", device="cpu")]
    found = []
    for one in (open_subject(source).subject for source in sources):
        prompts = [one.tokenizer.encode(text) for text in TEXTS]
        found.append(one.generate(prompts, 12))
        assert one.generate(prompts, 12, prefill_chunk=5) == found[-1]
    assert found[0] == found[1]


def test_a_run_whose_data_lies_elsewhere(old: Path) -> None:
    """The error names a key that helps."""
    shutil.move(old / "data", old / "moved")
    words = ["checkpoint=run-mixattention", "tasks=recall", "recall.kinds=gap", "recall.pairs=1", "recall.length=8"]
    words += ["recall.sequences=2", "device=cpu", "wandb=false"]
    with pytest.raises(UsageError, match=r"data is not here; give the prepared folder .* with prepared="):
        main(words)
    main([*words, "prepared=moved"])
    assert (old / "run-mixattention" / "evaluations" / "recall.json").is_file()


def test_figures_join_the_wandb_run(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the same identity, offline; a run that logged none stays without."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = old / "run-mixattention"
    (run / "wandb-id.txt").write_text("abc123")
    config = (run / "config.yaml").read_text()
    assert re.search(r"wandb: false", config)
    (run / "config.yaml").write_text(config.replace("wandb: false", "wandb: true"))
    logged: dict[str, float] = {}
    monkeypatch.setattr("wandb.sdk.wandb_summary.Summary.update", lambda self, values: logged.update(values))
    main(["checkpoint=run-mixattention", "device=cpu"])
    assert logged["evaluations/perplexity/ppl"] == pytest.approx(result(run / "summary.json")["val"]["ppl"], rel=1e-6)
    assert list(run.glob("wandb/offline-run-*-abc123"))
    main(["checkpoint=run-block", "device=cpu"])
    assert not (old / "run-block" / "wandb").exists()


def test_summary_keeps_to_its_checkpoint(old: Path, capsys: pytest.CaptureFixture) -> None:
    """Figures of an earlier checkpoint are written, and not put beside the result of the last one."""
    main(["checkpoint=run-mixattention/checkpoints/step-00000006", "device=cpu"])
    assert "evaluations" not in result(old / "run-mixattention" / "summary.json")
    assert "summary.json is of step 8, these figures are of step 6" in capsys.readouterr().err
    assert result(old / "run-mixattention" / "evaluations" / "perplexity.json")["step"] == 6


@pytest.mark.parametrize("name", ["run-mixattention", "run-block"])
def test_time_and_bytes_of_decoding(name: str, old: Path) -> None:
    main([f"checkpoint={name}", "tasks=decode", "decode.prompt=7", "decode.new=4", "decode.batch=2", "device=cpu"])
    written = result(old / name / "evaluations" / "decode.json")
    figures, model = written["figures"], load(name).model
    assert len(written["rows"]) == 5
    assert figures["cache_bytes"] == model.allocate_cache(2, 11 if model.plan.block_length > 1 else 10).nbytes
    assert figures["token_ms"] > 0 and figures["prefill_ms"] > 0
    assert figures["tokens_per_second"] == pytest.approx(2000 / figures["token_ms"])


@pytest.mark.parametrize(("block", "expected"), [(1, 1.0), (4, 2.5)])
def test_the_time_of_a_step_is_not_that_of_a_capture(block: int, expected: float) -> None:
    """Of a model of blocks, each fourth step does more."""
    steps = [1.0 if (number + 1) % block else 7.0 for number in range(24)] if block > 1 else [1.0] * 24
    steps[0] += 100
    steps[3] += 100
    times = [sum(steps[:number]) for number in range(len(steps) + 1)]
    assert per_step(times, block) == expected
    assert per_step([0.0, 3.0], block) == 3.0 and per_step(times[4:8], 4) == pytest.approx(1.0)


def test_times_of_other_steps_are_other_figures() -> None:
    """Plain ones keep the digest that they had."""
    model = arch.build("cla2", "tiny", num_layers=2, vocab_size=300).eval()
    decode, recall = select_tasks(["decode", "recall"])
    automatic, plain, static = (subject(model, steps=steps) for steps in ("auto", "plain", "static"))
    assert digest_of(decode, automatic) == digest_of(decode, plain) != digest_of(decode, static)
    assert digest_of(recall, plain) == digest_of(recall, static)


def test_figures_in_another_type_of_numbers_are_other_figures() -> None:
    """Those in fp32 keep the digest that they had."""
    model = arch.build("cla2", "tiny", num_layers=2, vocab_size=300).eval()
    (recall,) = select_tasks(["recall"])
    digests = [digest_of(recall, subject(model))]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            digests.append(digest_of(recall, subject(model)))
    digests.append(digest_of(recall, subject(model.to(torch.bfloat16))))
    assert digests[0] == digests[1] == "ab99b1f8bf9277f1"
    assert len(set(digests)) == 3, "weights in bf16 are not those in fp32 under autocast"


def test_repeated_pairs() -> None:
    """Targets whose pair with the token before them has come before, of decoders and of models of blocks."""
    row = [5, 6, 7, 5, 6, 5, 6, 7, 7, 7, 7]
    pairs = list(pairwise(row))
    expected = [pair in pairs[:number] for number, pair in enumerate(pairs)]
    inputs, targets = torch.tensor([row[:-1]]), torch.tensor([row[1:]])
    batch = {"inputs": inputs, "targets": targets, "step_targets": 10, "segment_ids_BT": None}
    assert repeats(batch, 1)[0].tolist() == expected
    padded = {"inputs": torch.tensor([[*row[:-1], 0, 0]]), "targets": torch.tensor([[*row[1:], IGNORE, IGNORE]])}
    assert repeats(batch | padded, 1)[0, :10].tolist() == expected, "beside a longer row"
    blocks = repeats(batch | {"inputs": targets}, 0)[0].tolist()
    pairs = pairs[1:]  # the token before the first target is not seen
    assert blocks == [False, *(pair in pairs[:number] for number, pair in enumerate(pairs))]


def test_figures_of_tasks_before_one_that_fails_are_kept(old: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UsageError, match="needles"):
        main(["checkpoint=run-mixattention", "tasks=perplexity,needles", "device=cpu"])
    assert "perplexity/ppl" in capsys.readouterr().out
    assert list(result(old / "run-mixattention" / "summary.json")["evaluations"]) == ["perplexity"]


def test_prepared_data_by_documents_and_strides(old: Path) -> None:
    """As many tokens as in validation, in windows no larger than the context."""
    for words in (["perplexity.protocol=documents"], ["perplexity.protocol=stride"]):
        main(["checkpoint=run-mixattention", "tasks=perplexity", "device=cpu", *words])
        found = result(old / "run-mixattention" / "evaluations" / "perplexity.json")["figures"]["tokens"]
        assert 128 <= found < 128 + 32, "the last window is whole"
    with pytest.raises(UsageError, match=r"perplexity\.stride is 10000, more than the window of"):
        main(["checkpoint=run-mixattention", "tasks=perplexity", "device=cpu", *words, "perplexity.stride=10000"])
