"""Shards hold the text, batches are a function of seed and step, and broken data is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import documents, run_script
from tokenizers import Tokenizer

import data.corpora
from data.batches import IGNORE, EvalBatches, TrainBatches, order
from data.prepare import END_OF_TEXT, main, prepare
from data.shards import DataError, Manifest, TokenWindows, sha256

TEXTS = [text for _, text in documents()]


@pytest.fixture
def folder(corpus: Path) -> Path:
    return corpus


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shards_hold_the_text(folder: Path) -> None:
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_bytes = np.load(folder / "token_bytes.npy")
    assert manifest.vocab_size == tokenizer.get_vocab_size() == len(token_bytes) == 600
    for number, name in enumerate(("val", "test", "train")):
        split = manifest.splits[name]
        ids = np.fromfile(folder / split.shards[0].file, dtype=manifest.dtype)
        assert len(ids) == split.tokens
        assert sha256(folder / split.shards[0].file) == split.shards[0].sha256
        texts = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
        assert texts.pop() == ""
        expected = [text for n, text in enumerate(TEXTS) if min(n % 4, 2) == number]
        assert texts == expected
        assert split.documents == len(expected)
        assert split.bytes == sum(len(text.encode()) for text in expected) == token_bytes[ids].sum()


def test_preparing_again_reads_what_is_there(folder: Path) -> None:
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare("unit", 600, folder) == Manifest.load(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(data.corpora.CORPORA, "unit", documents)
    monkeypatch.setattr("data.prepare._write_split", full)
    with pytest.raises(DataError, match=r"No space left on device; free some space"):
        prepare("unit", 600, tmp_path / "unit")
    assert list(tmp_path.iterdir()) == []


def test_stdlib_corpus_is_split_by_file() -> None:
    split_of: dict[str, str] = {}
    for split, text in data.corpora.stdlib():
        assert split_of.setdefault(text, split) == split or len(text) < 2000
    sizes = {name: sum(len(t) for t, s in split_of.items() if s == name) for name in ("train", "val", "test")}
    assert sizes["train"] > 10e6
    assert min(sizes["val"], sizes["test"]) > 2e5


def windows(folder: Path, seq_len: int = 16, split: str = "train") -> TokenWindows:
    return TokenWindows(folder, Manifest.load(folder), split, seq_len)


def test_windows_cover_the_text_once(folder: Path) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", dtype="<u2")
    read = windows(folder)
    targets = np.concatenate([read[index][1:] for index in range(len(read))])
    assert np.array_equal(targets, tokens[1 : 1 + len(targets)])
    assert len(tokens) - 1 - len(targets) < 16


def stream(folder: Path, **changes: int) -> torch.Tensor:
    options = {"seed": 3, "steps": 6, "batch_size": 8, "micro_batch": 8} | changes
    return torch.cat([batch["inputs"] for batch in TrainBatches(windows(folder), **options)])


def test_order_is_a_function_of_seed_and_step(folder: Path) -> None:
    whole = stream(folder)
    assert torch.equal(whole, stream(folder))
    assert not torch.equal(whole, stream(folder, seed=4))
    assert torch.equal(whole, stream(folder, micro_batch=2)), "micro-batches do not change the order"
    assert torch.equal(whole[8 * 4 :], stream(folder, start_step=4)), "a resumed run goes on where it was"


@pytest.mark.parametrize(("world", "micro_batch"), [(2, 4), (4, 1), (2, 2)])
def test_processes_share_out_each_step(folder: Path, world: int, micro_batch: int) -> None:
    """Every step has the same sequences whatever the number of processes."""
    ranks = [stream(folder, world=world, rank=rank, micro_batch=micro_batch).view(6, -1, 16) for rank in range(world)]
    together = torch.cat(ranks, dim=1)
    for step, rows in enumerate(stream(folder).view(6, 8, 16)):
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, together[step].tolist()))


def test_epochs_are_permutations(folder: Path) -> None:
    read = windows(folder)
    steps = 2 * len(read)
    seen = [tuple(batch["inputs"][0].tolist()) for batch in TrainBatches(read, 0, steps, 1, 1)]
    everything = sorted(tuple(read[index][:-1].tolist()) for index in range(len(read)))
    assert sorted(seen[: len(read)]) == sorted(seen[len(read) :]) == everything
    assert seen[: len(read)] != seen[len(read) :]
    assert sorted(order(10, 0, 0)) == list(range(10))


def test_length_counts_the_whole_run(folder: Path) -> None:
    batches = TrainBatches(windows(folder), 0, steps=6, batch_size=8, micro_batch=2, world=2, start_step=5)
    assert len(batches) == 12
    assert len(list(batches)) == 2


def test_eval_batches_cover_each_window_once_over_processes(folder: Path) -> None:
    read, seen = windows(folder, split="val"), []
    assert len(read) > 7
    for rank in range(2):
        batches = list(EvalBatches(read, 7, micro_batch=2, rank=rank, world=2))
        assert len(batches) == 2
        for batch in batches:
            assert batch["inputs"].shape == (2, 16)
            real = (batch["targets"] != IGNORE).all(dim=1)
            seen += batch["targets"][real].tolist()
            assert batch["step_targets"] == 16 * int(real.sum())
    chosen = np.linspace(0, len(read) - 1, 7).round().astype(int)
    assert sorted(seen) == sorted(read[int(index)][1:].tolist() for index in chosen)


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_folders_are_refused(copy: Path) -> None:
    with pytest.raises(DataError, match="no shard of split train holds 100001 tokens"):
        windows(copy, 100_000)
    with pytest.raises(DataError, match="has no split dev; it has train, val, test"):
        windows(copy, split="dev")
    shard = copy / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"train-00000.bin has \d+ bytes, its manifest says \d+"):
        windows(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.bin is named by the manifest and is not there"):
        windows(copy)
    change_manifest(copy, format=99)
    with pytest.raises(DataError, match="has format 99, this version reads 1"):
        Manifest.load(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not a manifest"):
        Manifest.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds no prepared data; run data/prepare.py"):
        Manifest.load(copy)


def test_a_manifest_cannot_point_outside_its_folder(copy: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(copy)
    (tmp_path.parent / "outside.bin").write_bytes(bytes(2000))
    split = manifest.splits["train"]
    outside = replace(split, shards=(replace(split.shards[0], file="../outside.bin", tokens=1000),))
    with pytest.raises(DataError, match="is not there"):
        TokenWindows(copy, replace(manifest, splits={"train": outside}), "train", 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus=nothing"], "no corpus 'nothing'; choose stdlib"),
        (["vocab_size=17"], "vocab_size is 17; choose 512 to 65536"),
        (["vocab_size=many"], "vocab_size is many; it is a whole number"),
        (["size=3"], "cannot read 'size=3'; write key=value with a key of corpus, vocab_size, out"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        main([*arguments, f"out={tmp_path / 'x'}"])
    assert message in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    done = run_script("data/prepare.py", "vocab_size=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: vocab_size is 1; choose 512 to 65536\n")
    assert "python data/prepare.py" in run_script("data/prepare.py", "--help", cwd=tmp_path).stdout
