"""Batches are a function of seed and step, mixtures keep their proportions, and broken data is refused by name."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import IGNORE, EvalBatches, Prefetched, SequenceFormat, TrainBatches, documents_of, order
from data.files import DataError, sha256
from data.mixture import EvalWindows, Mixture, weights_of
from data.shards import Manifest, TokenWindows, read_offsets
from data.verify import verify, verify_once


@pytest.fixture
def folder(corpus: Path) -> Path:
    return corpus


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


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


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for what Prefetched asks of CUDA, here the third device: the names of the threads that asked."""
    seen: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(f"device {device}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return seen


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_thread_makes_the_next_batch(folder: Path, no_cuda: list[str]) -> None:
    """The same batches in the same order, from any step on, one ahead; and the thread ends with them, or before."""
    form = SequenceFormat(document_mask=True)
    for plain in (
        TrainBatches(windows(folder), 3, 6, 8, 4, start_step=2, sequence_format=form),
        EvalBatches(EvalWindows.of(windows(folder), 11), 4),
    ):
        ahead = list(Prefetched(plain))
        assert len(Prefetched(plain)) == len(plain) and not threads()
        for ours, expected in zip(ahead, plain, strict=True):
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
    assert no_cuda[0] == "device 2", "a thread begins on the first device"
    assert set(no_cuda[1:]) == {"device 2", "batches_0"}
    assert len(no_cuda) == 2 + 3 * 8 + 2 * 3, "all tensors"
    batches = iter(Prefetched(TrainBatches(windows(folder), 3, 1000, 8, 4)))
    next(batches)
    assert threads()
    batches.close()
    assert not threads()


def test_what_fails_in_the_thread_is_raised_when_its_batch_is_due(
    folder: Path, no_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = windows(folder)
    place, count = TokenWindows.__getitem__, []

    def fail(self: TokenWindows, index: int) -> np.ndarray:
        count.append(index)
        if len(count) > 20:
            raise DataError("train-00000.bin was deleted while in use")
        return place(self, index)

    monkeypatch.setattr(TokenWindows, "__getitem__", fail)
    made = []
    with pytest.raises(DataError, match=r"^train-00000.bin was deleted while in use$"):
        made.extend(Prefetched(TrainBatches(read, 3, 6, 8, 4)))
    assert len(made) == 5 and not threads(), "the 21st sequence is of the sixth batch"


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
    chosen = EvalWindows.of(read, 7)
    for rank in range(2):
        batches = list(EvalBatches(chosen, micro_batch=2, rank=rank, world=2))
        assert len(batches) == 2
        for batch in batches:
            assert batch["inputs"].shape == (2, 16)
            real = (batch["targets"] != IGNORE).all(dim=1)
            seen += batch["targets"][real].tolist()
            assert batch["step_targets"] == 16 * int(real.sum())
    spread = np.linspace(0, len(read) - 1, 7).round().astype(int)
    assert sorted(seen) == sorted(read[int(index)][1:].tolist() for index in spread)


def test_documents_of_a_row_follow_from_the_offsets(folder: Path) -> None:
    read = windows(folder)
    starts = read_offsets(folder / "train-00000.offsets.npy")
    for index in range(len(read)):
        place = np.arange(index * 16, index * 16 + 17)
        number = np.searchsorted(starts, place, side="right")
        assert documents_of(read[index], 0).tolist() == (number - number[0]).tolist()


def test_document_numbers_are_in_the_batches(folder: Path) -> None:
    with_mask = TrainBatches(windows(folder, 64), 0, 2, 4, 2, sequence_format=SequenceFormat(document_mask=True))
    for batch in with_mask:
        assert batch["segment_ids_BT"].numpy().tolist() == documents_of(batch["inputs"].numpy(), 0).tolist()
        assert batch["segment_ids_BT"].shape == batch["inputs"].shape and batch["segment_ids_BT"].max() > 0
    assert next(iter(replace(with_mask, sequence_format=SequenceFormat())))["segment_ids_BT"] is None
    chosen = EvalWindows.of(windows(folder, 64, "val"), 3)
    batch = next(iter(EvalBatches(chosen, 4, sequence_format=SequenceFormat(document_mask=True))))
    assert batch["segment_ids_BT"].numpy().tolist() == documents_of(batch["inputs"].numpy(), 0).tolist()


def test_batches_for_whole_blocks(folder: Path) -> None:
    """Inputs are the targets themselves; what is not predicted is no target and not counted."""
    read = windows(folder)
    plain = list(TrainBatches(read, 0, 2, 4, 2))
    for unpredicted in (0, 4):
        blocks = list(
            TrainBatches(read, 0, 2, 4, 2, sequence_format=SequenceFormat(target_offset=0, num_unpredicted=unpredicted))
        )
        for ours, theirs in zip(blocks, plain, strict=True):
            assert torch.equal(ours["inputs"], theirs["targets"])
            assert torch.equal(ours["targets"][:, unpredicted:], theirs["targets"][:, unpredicted:])
            assert (ours["targets"][:, :unpredicted] == IGNORE).all()
            assert ours["step_targets"] == 4 * (16 - unpredicted)


def test_documents_in_whole_blocks(folder: Path) -> None:
    """Without its pads a row is what it was, cut off. A document begins at each place of a block about as often."""
    read, form = windows(folder, 64), SequenceFormat(target_offset=0, num_unpredicted=4, block_padding=4)
    made = TrainBatches(read, 3, 40, 4, 2, sequence_format=form)
    plain = TrainBatches(read, 3, 40, 4, 2, sequence_format=SequenceFormat(target_offset=0))
    begun, targets = [0] * 4, 0
    for number, (batch, whole) in enumerate(zip(made, plain, strict=True)):
        assert batch["inputs"].shape == batch["segment_ids_BT"].shape == (2, 64)
        assert batch["segment_ids_BT"].unique().tolist() == [-1, 0]
        real_BT = batch["segment_ids_BT"] == 0
        assert torch.equal(batch["targets"][:, 4:] != IGNORE, real_BT[:, 4:])
        targets += int((batch["targets"] != IGNORE).sum())
        if number % made.accumulate == made.accumulate - 1:
            assert batch["step_targets"] == targets
            targets = 0
        for row, real, tokens in zip(batch["inputs"], real_BT, whole["inputs"], strict=True):
            text = row[real].tolist()
            assert text == tokens.tolist()[: len(text)] and len(text) > 32
            assert (row[~real] == 0).all()
            blocks = real.view(-1, 4)
            assert blocks.any(dim=1).all()
            previous = 0
            for end in [place + 1 for place in range(64) if real[place] and row[place] == 0]:
                assert not real[end : -(-end // 4) * 4].any()
                start = -(-end // 4) * 4
                if start < 64:
                    begun[int(real[start : start + 4].int().argmax())] += 1
                assert start > previous
                previous = start
    assert min(begun) > 0.15 * sum(begun) > 10
    again = [batch["inputs"] for batch in replace(made, start_step=39)]
    assert torch.equal(torch.cat(again), torch.cat([batch["inputs"] for batch in made][-2:]))


def test_a_mixture_keeps_its_proportions(folder: Path) -> None:
    """At every length, not only in the long run; each sequence is the next of its corpus."""
    mixture = Mixture((windows(folder),) * 3, (6.5, 3.0, 0.5))
    counts = [0, 0, 0]
    for sequence in range(3000):
        corpus, number = mixture.locate(sequence, seed=1)
        assert number == counts[corpus]
        counts[corpus] += 1
        assert all(abs(n - w / 10 * (sequence + 1)) < 4 for n, w in zip(counts, mixture.weights, strict=True))
    far = [mixture.locate(10**12 + sequence, seed=1) for sequence in range(1000)]
    assert all(abs(n - 10**12 * mixture.weights[corpus] / 10) < 1000 for corpus, n in far)
    assert [mixture.locate(g, 1)[0] for g in range(50)] != [mixture.locate(g, 2)[0] for g in range(50)]


def test_batches_of_a_mixture(folder: Path) -> None:
    """The same on any number of processes and from any step; each corpus goes through its own epochs."""
    train, val = windows(folder), windows(folder, split="val")
    mixture = Mixture((train, val), (1.0, 3.0))
    steps = len(val) // 2  # of 8 sequences, 6 of val: three epochs of it and no whole one of train
    whole = torch.cat([batch["inputs"] for batch in TrainBatches(mixture, 3, steps, 8, 8)])
    late = torch.cat([batch["inputs"] for batch in TrainBatches(mixture, 3, steps, 8, 2, start_step=7)])
    assert torch.equal(whole[56:], late)
    ranks = [
        torch.cat([b["inputs"] for b in TrainBatches(mixture, 3, steps, 8, 4, rank=rank, world=2)]).view(steps, 4, 16)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(ranks, dim=1).view(-1, 16), whole)
    of_val = [row.tolist() for g, row in enumerate(whole) if mixture.locate(g, 3)[0] == 1]
    everything = sorted(val[index][:-1].tolist() for index in range(len(val)))
    assert sorted(of_val[: len(val)]) == sorted(of_val[len(val) : 2 * len(val)]) == everything
    assert of_val[: len(val)] != of_val[len(val) : 2 * len(val)]


def test_validation_of_a_mixture(folder: Path) -> None:
    val, test = windows(folder, split="val"), windows(folder, split="test")
    chosen = EvalWindows.of(Mixture((val, test), (3.0, 1.0)), 12)
    assert [corpus for corpus, _ in chosen.chosen] == [0] * 9 + [1] * 3
    assert np.array_equal(chosen[8], val[len(val) - 1]) and np.array_equal(chosen[11], test[len(test) - 1])
    inputs = torch.cat([batch["inputs"] for batch in EvalBatches(chosen, 4)])
    assert inputs.tolist() == [chosen[index][:-1].tolist() for index in range(12)]


def test_validation_keeps_the_proportions_where_a_corpus_has_too_little(folder: Path) -> None:
    """As many as the smaller one has for its part, and one at least; of one corpus, all there are."""
    val, train = windows(folder, split="val"), windows(folder)
    few, many = len(val), len(train)
    assert many > few > 100

    def counts(weights: tuple[float, float], asked: int) -> list[int]:
        chosen = [corpus for corpus, _ in EvalWindows.of(Mixture((val, train), weights), asked).chosen]
        return [chosen.count(0), chosen.count(1)]

    assert counts((9.0, 1.0), 10 * many) == [few, round(round(few / 0.9) / 10)]
    assert counts((1.0, 1.0), few + many) == [few, few]
    assert counts((1e6, 1.0), many) == [few, 1]
    assert counts((1.0, 3.0), 40) == [10, 30], "where both have enough, as asked"
    assert len(EvalWindows.of(Mixture((val,), (0.1,)), many)) == few


@pytest.mark.parametrize("mix", [3, {"a": 0}, {"a": "b"}, {"a": float("inf")}, {"a": 1, "a/": 2}])
def test_weights_are_positive_numbers(mix: object) -> None:
    with pytest.raises(DataError, match=r"data\.mix"):
        weights_of(mix)


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
    change_manifest(copy, format=1)
    with pytest.raises(DataError, match="has format 1, this version reads 2"):
        Manifest.load(copy)
    for text in ("{", "[]", "null", '{"format": 2}'):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="is not a manifest"):
            Manifest.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=rf"no prepared data\. To prepare it: python data/prepare.py .*path={copy}"):
        Manifest.load(copy)
    (copy / "books").mkdir()
    (copy / "books" / "manifest.json").touch()
    with pytest.raises(DataError, match=r"book holds no prepared data, did you mean books\? To prepare it: "):
        Manifest.load(copy / "book")


def of_type(path: str, value: object):
    """A change of the value at `path` in a manifest."""

    def change(values: dict) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            values = values[parent] if isinstance(values, dict) else values[int(parent)]
        values[key] = value

    return change


SHARD = "splits.train.shards.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_type(f"{SHARD}.tokens", 5.0), "tokens of a shard of train is '5.0'"),
        (of_type(f"{SHARD}.tokens", "5"), "tokens of a shard of train is '5'"),
        (of_type(f"{SHARD}.tokens", True), "tokens of a shard of train is 'True'"),
        (of_type(f"{SHARD}.tokens", -1), "tokens of a shard of train is '-1'"),
        (of_type(f"{SHARD}.documents", 2**70), "documents of a shard of train is '1180"),
        (of_type(f"{SHARD}.sha256", 5), "sha256 of a shard of train is '5'"),
        (of_type(f"{SHARD}.offsets_sha256", "abc"), "offsets_sha256 of a shard of train is 'abc'"),
        (of_type(f"{SHARD}.more", 1), "a shard of train has an unknown key more"),
        (of_type(SHARD.removesuffix(".0"), {}), "split train has no list of shards"),
        (of_type("splits.train", []), "train is no object"),
        (of_type("splits.train.bytes", None), "bytes of split train is 'None'"),
        (of_type("splits", 3), "splits is no object"),
        (of_type("recipe", []), "recipe is no object"),
        (of_type("recipe.source", None), "source is no object"),
        (of_type("recipe.source.recall", [64]), "recall is no object"),
        (of_type("recipe.source.recall", {"pairs": [4]}), "recall has no length"),
        (of_type("vocab_size", None), "vocab_size of it is 'None'"),
        (of_type("vocab_size", 2**16 + 1), "end of text 0 in a vocabulary of 65537"),
        (of_type("end_of_text", 600), "end of text 600 in a vocabulary of 600"),
        (of_type("tokenizer_sha256", 7), "tokenizer_sha256 of it is '7'"),
        (of_type("dtype", "O"), "dtype 'O'"),
        (of_type("sources", 3), "sources of it is '3'"),
        (lambda values: values.pop("dtype"), "it lacks a key"),
        (lambda values: values["splits"].update(val=values["splits"]["train"]), "one file in two places"),
    ],
)
def test_a_manifest_of_other_types_is_refused(copy: Path, change, message: str) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    change(values)
    (copy / "manifest.json").write_text(json.dumps(values))
    for read in (Manifest.load, verify):
        with pytest.raises(DataError) as caught:
            read(copy)
        assert "is not a manifest" in str(caught.value) and message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_manifest_that_cannot_be_read(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match="is not a manifest"):
        Manifest.load(copy)
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(DataError, match="is not a manifest"):
        Manifest.load(copy)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*manifest.json: Is a directory"):
        Manifest.load(copy)
    with pytest.raises(DataError, match=r"cannot read .*manifest.json: File name too long"):
        Manifest.load(copy / ("x" * 300))
    with pytest.raises(DataError, match="holds no prepared data"):
        Manifest.load(copy / "tokenizer.json")


@pytest.mark.parametrize("keep", [20, 60, 100, 127])
def test_offsets_whose_header_is_cut(copy: Path, keep: int) -> None:
    path = copy / "train-00000.offsets.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep].replace(b"}", b" ").ljust(128) + raw[128:])
    with pytest.raises(DataError, match=r"offsets.npy is altered or cut short"):
        windows(copy)
    with pytest.raises(DataError, match=r"offsets.npy is altered"):
        verify(copy)


def test_a_token_beyond_the_vocabulary_is_named_when_it_is_read(copy: Path) -> None:
    overwrite(copy / "train-00000.bin", b"\xff\x7f", 2 * 3500)
    read = windows(copy)
    with pytest.raises(
        DataError, match=r"train-00000.bin is altered: position 3500 has token 32767 in a vocabulary of"
    ):
        [read[index] for index in range(len(read))]


def test_the_bytes_of_tokens_are_checked(copy: Path) -> None:
    manifest = Manifest.load(copy)
    assert manifest.token_bytes(copy).tolist() == np.load(copy / "token_bytes.npy").tolist()
    for wrong in (np.zeros(3, int), np.zeros(600), np.zeros((600, 1), int), np.array([{}] * 600)):
        np.save(copy / "token_bytes.npy", wrong)
        with pytest.raises(DataError, match=r"token_bytes.npy"):
            manifest.token_bytes(copy)


def test_shards_are_compared_once(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp is trusted while the file's inode, size and times are those of the stamp, and only then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[str] = []
    checksum = sha256
    monkeypatch.setattr("data.verify.sha256", lambda path: read.append(path.name) or checksum(path))
    manifest, shard, said = Manifest.load(copy), copy / "train-00000.bin", []

    def check() -> list[str]:
        read.clear()
        verify_once(copy, manifest, say=said.append)
        return sorted(read)

    both = ["train-00000.bin", "val-00000.bin"]
    assert check() == check() == both and not said and not (tmp_path / "cache").exists(), "a small folder has no stamp"
    monkeypatch.setattr("data.verify.SMALL", 100)
    assert check() == both and "comparing 2 shards" in said[0]
    assert check() == [] and len(said) == 1
    before, raw = shard.stat(), shard.read_bytes()
    overwrite(shard, b"\x07\x00", 7000)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"train-00000.bin is altered: its checksum is not that of the manifest"):
        check()
    shard.write_bytes(raw)
    assert check() == ["train-00000.bin"] and check() == []
    (stamp,) = (tmp_path / "cache" / "kvfrontier" / "verified").iterdir()
    stamp.write_text("[" * 100_000)
    assert check() == both
    monkeypatch.setenv("XDG_CACHE_HOME", str(shard))  # a cache that cannot be written
    assert check() == check() == both and "cannot write" in said[-1]
    shard.unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-00000.bin: No such file"):
        check()


def overwrite(path: Path, raw: bytes, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(raw)


@pytest.mark.parametrize(
    ("file", "change", "at_start", "verified"),
    [
        ("train-00000.bin", lambda path: overwrite(path, b"\xff\xff", 10), "is altered", "is altered: its checksum"),
        ("train-00000.bin", lambda path: overwrite(path, b"\x07\x00", 7000), None, "is altered: its checksum"),
        ("train-00000.bin", lambda path: path.write_bytes(b""), "has 0 bytes", "has 0 bytes instead of"),
        ("train-00000.offsets.npy", lambda path: path.write_bytes(b""), "is altered or cut short", "is altered"),
        ("train-00000.offsets.npy", lambda path: overwrite(path, b"\x01", 128), "does not fit", "is altered"),
        ("train-00000.offsets.npy", lambda path: overwrite(path, b"\x01", 136), None, "is altered"),
        ("train-00000.offsets.npy", Path.unlink, "is not there", "is missing"),
        ("tokenizer.json", lambda path: path.write_text(path.read_text() + " "), "is not the one", "is not the one"),
        ("token_bytes.npy", lambda path: overwrite(path, b"\x09", 200), "is not the one", "is not the one"),
        ("tokenizer.json", Path.unlink, "is missing", "is missing"),
    ],
)
def test_altered_files_are_named(copy: Path, file: str, change, at_start: str | None, verified: str) -> None:
    """The cheap checks at the start of a run see much of it, verify sees all."""
    assert verify(copy).endswith("tokenizer and 3 shards are what the manifest says")
    change(copy / file)
    with pytest.raises(DataError) as caught:
        verify(copy)
    assert all(file in line for line in str(caught.value).splitlines())
    assert verified in str(caught.value)
    if at_start:
        with pytest.raises(DataError, match=f"{file} .*{at_start}|{file} {at_start}"):
            Manifest.load(copy).check_tokenizer(copy)
            windows(copy)


def test_verify_checks_the_counts(copy: Path) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    values["splits"]["val"]["tokens"] += 1
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"manifest.json: val has \d+ tokens, its shards \d+"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "was deleted while in use"),
        (lambda path: os.truncate(path, 4096), "was changed while in use"),
        (lambda path: overwrite(path, b"\x01", 5000), "was changed while in use"),
    ],
)
def test_a_shard_that_goes_away_while_training(copy: Path, change, message: str) -> None:
    os.utime(copy / "train-00000.bin", (0, 0))  # clocks of file systems are coarse
    batches = iter(TrainBatches(windows(copy), 0, 100, 4, 4))
    next(batches)
    change(copy / "train-00000.bin")
    with pytest.raises(DataError, match=f"train-00000.bin {message}"):
        list(batches)


def test_a_process_keeps_few_files_open(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.OPEN_FILES", 2)
    manifest = Manifest.load(copy)
    shards = tuple(split.shards[0] for split in manifest.splits.values())
    read = TokenWindows(
        copy, replace(manifest, splits={"all": replace(manifest.splits["train"], shards=shards)}), "all", 16
    )
    rows = [read[index] for index in (0, len(read) - 1)]
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    rows += [read[index] for index in (len(read) // 2, 0)]
    assert np.array_equal(rows[0], rows[3])
    assert len(read._open) == 2
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
        del read
        assert len(os.listdir("/proc/self/fd")) == before - 2


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "..", "", "a/b.bin"])
@pytest.mark.parametrize("key", ["file", "offsets"])
def test_a_manifest_cannot_point_outside_its_folder(copy: Path, key: str, name: str) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    values["splits"]["train"]["shards"][0][key] = name
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="a file outside of the folder"):
        Manifest.load(copy)
