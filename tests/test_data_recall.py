"""Data sets of associative recall: sequences with their answers, from the corpus to the batches of a run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch_in_process
from tokenizers import Tokenizer

from data.batches import IGNORE, EvalBatches, SequenceFormat, TrainBatches
from data.config import PrepareConfig, RecallConfig, SourceConfig, TokenizerConfig
from data.files import DataError
from data.mixture import EvalWindows
from data.prepare import prepare
from data.presets import load
from data.recall import RecallTask, Rows, ZoologyTask, recall_rows, texts, zoology_rows
from data.shards import Manifest, TokenWindows
from train.pretrain import main
from train.schema import PretrainConfig

SMALL = RecallConfig(pairs=2, length=16, vocab=64, rows=24, val_rows=5)


def preparation(recall: RecallConfig, path: Path | None = None) -> PrepareConfig:
    source = SourceConfig(corpus="recall", recall=recall)
    return PrepareConfig(
        str(path) if path else None, "recall", source, TokenizerConfig(kind="numbers"), shard_tokens=400, workers=1
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    prepare(preparation(SMALL, folder))
    return folder


@pytest.fixture(scope="module")
def rows() -> Rows:
    return zoology_rows(ZoologyTask(16, 64), 2, 24, np.random.RandomState(123))


def windows(folder: Path, split: str = "train", length: int = 16) -> TokenWindows:
    return TokenWindows(folder, Manifest.load(folder), split, length)


def test_a_document_is_a_sequence_and_its_answers(folder: Path, rows: Rows) -> None:
    """Those of the paper's generator; several shards, and as text for people to read."""
    read, manifest = windows(folder), Manifest.load(folder)
    assert len(read) == 24 and len(manifest.splits["train"].shards) > 1 and manifest.row_length == 16
    for index in range(24):
        inputs, answers = read[index].reshape(2, -1)
        assert np.array_equal(inputs, rows.inputs_BT[index])
        assert np.array_equal(answers, np.where(rows.targets_BT[index] == IGNORE, 0, rows.targets_BT[index]))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(read[3].tolist()) == " ".join(map(str, read[3].tolist()))
    assert manifest.splits["train"].token_text_bytes == manifest.splits["train"].bytes
    assert {split: len(windows(folder, split)) for split in ("val", "test")} == {"val": 5, "test": 5}


def test_training_asks_for_the_answers_alone(folder: Path, rows: Rows) -> None:
    batches = TrainBatches(windows(folder), seed=0, steps=6, batch_size=4, micro_batch=2)
    seen = []
    for number, batch in enumerate(batches):
        for inputs, targets in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
            place = rows.inputs_BT.tolist().index(inputs)
            assert targets == rows.targets_BT[place].tolist()
            seen.append(place)
        assert batch["step_targets"] == 4 * SMALL.num_pairs[0], number
    assert sorted(seen) == list(range(24)), "an epoch is every sequence once"


def test_whole_blocks_answer_in_place_of_the_token_after_the_question(folder: Path) -> None:
    plain = next(iter(TrainBatches(windows(folder), 0, 6, 24, 24)))
    form = SequenceFormat(target_offset=0, num_unpredicted=4)
    blocks = next(iter(TrainBatches(windows(folder), 0, 6, 24, 24, sequence_format=form)))
    assert torch.equal(blocks["inputs"], plain["inputs"])
    assert torch.equal(blocks["targets"][:, 4:], plain["targets"][:, 3:-1])
    assert (blocks["targets"][:, :4] == IGNORE).all()
    assert blocks["step_targets"] == int((blocks["targets"] != IGNORE).sum())


def test_validation_fills_up_with_nothing(folder: Path) -> None:
    chosen = EvalWindows.of(windows(folder, "val"), 5)
    batches = [batch for rank in range(2) for batch in EvalBatches(chosen, 2, rank, 2)]
    assert [batch["step_targets"] for batch in batches] == [4, 2, 4, 0]
    assert sum(int((batch["targets"] != IGNORE).sum()) for batch in batches) == 10


def test_sequences_of_several_numbers_of_pairs_take_turns() -> None:
    made = [text for split, text in texts(replace(SMALL, kind="gap", pairs=["1", 3], length=24)) if split == "train"]
    ours = recall_rows(RecallTask.of(24, 3, 64), 3, 12, 123, 0)
    lines = [[list(map(int, line.split())) for line in text.splitlines()] for text in made]
    assert len(lines) == 24 and lines[7][0] == ours.inputs_BT[3].tolist()
    assert sum(answer > 0 for answer in lines[6][1]) == sum(answer > 0 for answer in lines[7][1]) == 12


def test_joined_pairs_fill_the_vocabulary() -> None:
    """A pair is one token, and there are as many keys and values as have room."""
    task = RecallTask.of(64, 8, 296, joined=True)
    assert (task.keys, task.values, task.gap, task.vocab_size) == (16, 16, 24, 296)
    made = recall_rows(task, 8, 4, 0, 0)
    number_BP = made.inputs_BT[:, :8] - task.first_pair
    keys_BP, values_BP = 8 + number_BP // 16, 24 + number_BP % 16
    for row, place in ((0, 32), (3, 63)):
        (pair,) = np.flatnonzero(keys_BP[row] == made.inputs_BT[row, place])
        assert made.targets_BT[row, place] == values_BP[row, pair]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "copy"}, "source.recall: kind is copy; choose zoology, gap"),
        ({"pairs": "few"}, "pairs is few; write a number, or a list of them"),
        ({"pairs": []}, "write a number, or a list"),
        ({"pairs": [2, 9]}, "9 pairs: at least 1, and at most 4 find room"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"vocab": 16}, "the length must be even, and below the vocabulary"),
        ({"joined": True}, "joined is of kind=gap"),
    ],
)
def test_impossible_sequences(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare(preparation(replace(SMALL, **changes), tmp_path))


def test_numbers_and_recall_go_together(tmp_path: Path) -> None:
    config = preparation(SMALL, tmp_path)
    with pytest.raises(DataError, match="numbers and recall go together"):
        prepare(replace(config, tokenizer=TokenizerConfig(kind="bytes")))


def test_keys_of_the_command_line_reach_the_corpus() -> None:
    words = ["source.recall.pairs=[4,8]", "source.recall.length=128", "source.recall.noise=true"]
    config = load("recall", words).preparation
    assert config.source.recall == RecallConfig(pairs=["4", "8"], length=128, noise=True)
    assert config.folder.name == "recall-zoology-128-4-8-8192"
    assert "joined" not in config.recipe["source"]["recall"], "folders made before there were joined pairs stay"
    joined = load("recall", ["source.recall.kind=gap", "source.recall.joined=true"]).preparation
    assert joined.folder.name.endswith("-joined") and joined.recipe["source"]["recall"]["joined"]
    assert "recall" not in load("stdlib", []).preparation.recipe["source"], "other folders stay as they are"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds sequences of 16 tokens; set size.seq_len=16"),
        (["size.seq_len=16", "data.document_mask=true"], "sequences with answers.* leave out data.document_mask"),
    ],
)
def test_runs_that_do_not_fit(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+arch=mha", "+size=tiny", f"data.path={folder}", *words]
    with pytest.raises(SystemExit):
        launch_in_process(main, "pretrain", PretrainConfig, words)
    assert re.search(message, capsys.readouterr().err)


def test_a_run_learns_answers(folder: Path, tmp_path: Path) -> None:
    """Ten sequences by heart: nothing but the answers has a loss, so that it falls to nearly nothing."""
    words = (
        "size.seq_len=16 size.vocab_size=65 size.num_layers=2 size.d_model=64 tokens=5760 batch_size=12 optim.lr=1e-2"
    )
    arguments = [
        *words.split(),
        f"data.path={folder}",
        f"folder={tmp_path / 'run'}",
        "logger=csv",
        "trainer.log_every=1",
    ]
    launch_in_process(main, "pretrain", PretrainConfig, ["+arch=mha", "+size=tiny", *arguments])
    (metrics,) = (tmp_path / "run").glob("metrics/*/metrics.csv")
    header, *lines = metrics.read_text().splitlines()
    losses = [line.split(",")[header.split(",").index("train/loss")] for line in lines]
    known = [float(loss) for loss in losses if loss]
    assert known[0] > 3.5 and known[-1] < 0.2


def test_a_limit_of_tokens_leaves_text_to_validate_on(tmp_path: Path) -> None:
    """One file of the corpus has all of its splits, each of which the limit is for."""
    recall = RecallConfig(pairs=2, length=16, rows=40, val_rows=5)
    prepare(replace(preparation(recall, tmp_path / "data"), max_tokens=330))
    splits = Manifest.load(tmp_path / "data").splits
    assert (splits["train"].tokens, splits["val"].tokens) == (330, 165)


def test_pairs_are_numbers_however_they_are_given(tmp_path: Path) -> None:
    """On the command line of data/prepare.py they are text."""
    typed, given = (preparation(RecallConfig(pairs=pairs)).recipe for pairs in (["4", "8"], [4, 8]))
    assert typed == given and typed["source"]["recall"]["pairs"] == [4, 8]
    assert preparation(RecallConfig(pairs="2")).recipe == preparation(RecallConfig(pairs=2)).recipe
    prepare(preparation(RecallConfig(pairs=2, length=16, rows=4, val_rows=2), tmp_path / "data"))
    values = json.loads((tmp_path / "data" / "manifest.json").read_text())
    values["recipe"]["source"]["recall"]["pairs"] = "2"  # as it was written before
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(values))
    assert Manifest.load(tmp_path / "data").recipe["source"]["recall"]["pairs"] == 2
