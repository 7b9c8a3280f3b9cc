"""Sources of a preparation: each file once, noticed when it changes, as typed, and of any size or shape."""

import gzip
import json
import os
import random
import shlex
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import data.corpora
from data import held_out, prepare, reading, source_record, tokenizer
from data.config import PrepareConfig, SourceConfig, TokenizerConfig
from data.files import DataError
from data.presets import load, prepare_command
from data.shards import Manifest, Split, text_bytes_of_tokens
from data.sources import TextSource
from data.tokenizer import Encoder, byte_tokenizer, train_bpe
from data.verify import verify


def asked(folder: Path, *, tokenizer: str = "bytes", **source: object) -> PrepareConfig:
    return PrepareConfig(str(folder), "files", SourceConfig(**source), TokenizerConfig(tokenizer), workers=1)


def text_of(folder: Path, split: str) -> str:
    """The text of a split that was prepared as bytes, without what ends its documents."""
    manifest = Manifest.load(folder)
    shards = [np.fromfile(folder / shard.file, manifest.dtype) for shard in manifest.splits[split].shards]
    tokens = np.concatenate(shards)
    return bytes(tokens[tokens != 256].astype(np.uint8)).decode()


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "books").mkdir()
    for n in range(8):
        (tmp_path / "books" / f"{n}.txt").write_text(f"book {n}\n" + f"line of {n}\n" * 100)
    return tmp_path / "books"


def put_back(path: Path, text: str) -> None:
    """Write text of the same length and the old times."""
    before = path.stat()
    assert len(text) == before.st_size
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "appended": (lambda books: (books / "1.txt").open("a").write("more"), r"changed \S*1.txt\. "),
    "of equal size, time put back": (
        lambda books: put_back(books / "1.txt", (books / "1.txt").read_text().replace("line", "LINE")),
        r"changed \S*1.txt\. ",
    ),
    "new and missing": (
        lambda books: (books / "2.txt").rename(books / "9.txt"),
        r"new \S*9.txt; missing \S*2.txt\. ",
    ),
    "many": (
        lambda books: [(books / f"x{n}.txt").write_text("x") for n in range(7)],
        r"new \S*x0.txt, \S*x1.txt, \S*x2.txt and 4 more\. ",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("complete", [True, False])
def test_changed_sources_are_refused(
    complete: bool, change: Callable, message: str, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the folder is complete, and in the middle, where old and new text would be mixed."""
    config = asked(tmp_path / "out", train=str(books))
    if complete:
        prepare.prepare(config)
    else:
        stop_after(3, monkeypatch, config)
    change(books)
    with pytest.raises(DataError, match=f"{message}Put them back, delete .*out, or give another folder with path="):
        prepare.prepare(config)


def stop_after(documents: int, monkeypatch: pytest.MonkeyPatch, config: PrepareConfig) -> None:
    add = prepare.Preparation._add

    def stop(self: prepare.Preparation, document: object, tokens: np.ndarray) -> bool:
        if self.progress.splits["train"].documents == documents:
            raise KeyboardInterrupt
        return add(self, document, tokens)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare, "CHECKPOINT_SECONDS", 0)
        patched.setattr(prepare.Preparation, "_add", stop)
        prepare.prepare(config)


def test_sources_that_hold_what_they_held(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other times are no change, in the middle and afterwards; no file is read again whose times are the same."""
    config = asked(tmp_path / "out", train=str(books))
    stop_after(3, monkeypatch, config)
    for path in books.iterdir():
        path.write_text(path.read_text())
    prepare.prepare(config)
    assert text_of(tmp_path / "out", "train") == "".join((books / f"{n}.txt").read_text() for n in range(8))
    os.utime(books / "1.txt", (5, 5))
    prepare.prepare(config)
    os.utime(books / "1.txt", ns=(0, json.loads((tmp_path / "out" / "sources.jsonl").read_text().splitlines()[1])[3]))
    assert verify(tmp_path / "out").endswith("are what the manifest says")
    (tmp_path / "out" / "sources.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"sources.jsonl is altered"):
        verify(tmp_path / "out")
    with pytest.raises(DataError, match=r"sources.jsonl is altered"):
        prepare.prepare(config)


def test_large_files_are_known_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_record, "WHOLE", 1000)
    monkeypatch.setattr(source_record, "BLOCK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(5000))
    before = source_record.state_of_file("train", str(path))

    def changed() -> str:
        return source_record.changes([before], [source_record.state_of_file("train", str(path), digest=False)])

    assert changed() == ""
    for place, noticed in ((0, True), (4995, True), (15, False)):
        raw = bytearray(5000)
        raw[place] = 1
        path.write_bytes(raw)
        os.utime(path, ns=(0, before.written_ns))
        assert bool(changed()) == noticed, "between the blocks, and the time put back: as documented"
    os.utime(path, (7, 7))
    assert changed() == f"changed {path}"


def test_sources_that_change_while_they_are_read(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, finish = asked(tmp_path / "out", train=str(books)), prepare.SplitWriter.finish

    def edit(self: prepare.SplitWriter) -> None:
        (books / "0.txt").write_text("other")
        finish(self)

    with (
        monkeypatch.context() as patched,
        pytest.raises(DataError, match=r"changed while they were read: changed .*0.txt"),
    ):
        patched.setattr(prepare.SplitWriter, "finish", edit)
        prepare.prepare(config)
    prepare.prepare(config)
    assert text_of(tmp_path / "out", "train").startswith("otherbook 1")


def test_other_kinds_of_sources_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus by its text, as another version of Python has another; a local data set by its files."""
    rows = [("train", "a"), ("val", "b"), ("test", "c")]
    monkeypatch.setitem(data.corpora.CORPORA, "rows", lambda: iter(rows))
    config = asked(tmp_path / "out", corpus="rows")
    prepare.prepare(config)
    prepare.prepare(config)
    rows[1] = ("val", "B")
    with pytest.raises(DataError, match=r"have changed since it was prepared: changed rows\. "):
        prepare.prepare(config)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "some"}\n')
    source = TextSource(SourceConfig(dataset=str(tmp_path / "hub"), train="train"))
    before = source.states()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "other"}\n')
    assert source_record.changes(before, source.states(digest=False)) == f"changed {tmp_path / 'hub' / 'train.jsonl'}"


def test_folders_of_earlier_versions(books: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without a record of the sources a complete folder is used, with a line; an interrupted one compares sizes."""
    config, out = asked(tmp_path / "out", train=str(books)), tmp_path / "out"
    prepare.prepare(config)
    values = json.loads((out / "manifest.json").read_text())
    del values["sources"]
    for split in values["splits"].values():
        del split["token_text_bytes"]
    values["recipe"]["source"] |= {"val_share": 0.005, "test_share": 0.005}  # as the preset `files` was
    (out / "manifest.json").write_text(json.dumps(values))
    (out / "sources.jsonl").unlink()
    (books / "1.txt").write_text("new")
    capsys.readouterr()
    assert prepare.prepare(config).splits["train"].token_text_bytes is None
    assert capsys.readouterr().err.count("\n") == 1 and verify(out)

    config = replace(config, path=str(tmp_path / "begun"))
    stop_after(3, monkeypatch, config)
    progress = tmp_path / "begun" / "progress.json"
    values = json.loads(progress.read_text())
    values["asked"]["files"] = [["train", str(path), path.stat().st_size] for path in sorted(books.iterdir())]
    progress.write_text(json.dumps(values))
    (tmp_path / "begun" / "sources.jsonl").unlink()
    (books / "5.txt").write_text("longer" + (text := (books / "5.txt").read_text()))
    with pytest.raises(DataError, match=r"was begun with other source files: changed \S*5.txt\. "):
        prepare.prepare(config)
    (books / "5.txt").write_text(text)
    assert prepare.prepare(config).sources is not None
    assert text_of(tmp_path / "begun", "train") == "".join((books / f"{n}.txt").read_text() for n in range(8))


LINKS: dict[str, Callable[[Path, Path], str]] = {
    "spelling": lambda books, _: f"{books}/../books/1.txt",
    "symlink": lambda books, folder: (folder / "a.txt").symlink_to(books / "1.txt") or str(folder / "a.txt"),
    "hard link": lambda books, folder: (folder / "a.txt").hardlink_to(books / "1.txt") or str(folder / "a.txt"),
    "linked folder": lambda books, folder: (folder / "b").symlink_to(books) or str(folder / "b"),
    "glob": lambda books, _: f"{books.parent}/bo*/[1]*",
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_a_file_is_in_one_split_and_once_in_it(link: Callable, books: Path, tmp_path: Path) -> None:
    name = link(books, tmp_path)
    with pytest.raises(DataError, match=r"is in both source.train and source.val.*; give each file to one split"):
        TextSource(SourceConfig(train=str(books), val=name))
    first = str(books) if link is LINKS["linked folder"] else f"{books}/1.txt"
    with pytest.raises(DataError, match=r"is twice in source.train.*; give each file once"):
        TextSource(SourceConfig(train=[first, name]))


def test_equal_contents_in_two_splits_are_named(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "val.txt").write_text((books / "3.txt").read_text())
    prepare.prepare(asked(tmp_path / "out", train=str(books), val=str(tmp_path / "val.txt")))
    assert "warning: the same content is in two splits: " in capsys.readouterr().err


def test_what_a_folder_holds(tmp_path: Path) -> None:
    """Endings in capitals, linked folders, loops, hidden files; what is read and passed over, by ending."""
    top = tmp_path / "top"
    for name in ("a.txt", "b.TXT", "c.csv", "d.json", "e.json", ".hidden.txt", ".git/x.txt", "sub/f.Md", "noending"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    (top / "g.TXT.GZ").write_bytes(gzip.compress(b"g"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.txt").write_text("h")
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (top / "a again.txt").symlink_to(top / "a.txt")
    (top / "broken.txt").symlink_to(top / "nowhere")
    for name in ("loop", "loop2", "sub/loop"):
        (top / name).symlink_to(top)
    expected = ["a.txt", "b.TXT", "g.TXT.GZ", "linked/h.txt", "sub/f.Md"]
    source = TextSource(SourceConfig(train=str(top)))
    assert [os.path.relpath(file.name, top) for file in source.files] == expected
    assert source.listing == [
        "source.train: read 5 files (.txt 2, .Md 1, .TXT 1, .TXT.GZ 1); passed over 8: .json 2, hidden 2, .csv 1, "
        "broken links and devices 1, no ending 1, other names of a file that is read 1"
    ]
    assert [row.text for file in source.files for row in source._read(file, None)] == [
        "a.txt",
        "b.TXT",
        "g",
        "h",
        "sub/f.Md",
    ]
    globbed = TextSource(SourceConfig(train=f"{top}/**/*.[tT][xX][tT]"))
    assert [os.path.relpath(file.name, top) for file in globbed.files] == ["a.txt", "b.TXT", "linked/h.txt"]
    assert len(TextSource(SourceConfig(train=[f"{top}", f"{top}/*.txt"])).files) == 5, "globs may overlap"
    with pytest.raises(DataError, match=r"no file at \S*elsewhere2 \(it holds .csv 1\); give files"):
        (tmp_path / "elsewhere2").mkdir()
        (tmp_path / "elsewhere2" / "x.csv").write_text("x")
        TextSource(SourceConfig(train=str(tmp_path / "elsewhere2")))
    with pytest.raises(DataError, match=r"source.train: cannot read x+\.\.\.x+: File name too long"):
        TextSource(SourceConfig(train="x" * 300))
    with pytest.raises(DataError, match=r"cannot read .*: File name too long"):
        prepare.prepare(asked(tmp_path / ("x" * 300), train=str(top)))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("source.document_start=^# ", "^# "),
        ("source.document_start=# ", "# "),
        ("source.document_start=[a-z]: {2}$", "[a-z]: {2}$"),
        ("source.train=a: b", "a: b"),
        ("source.train=a #b", "a #b"),
        ("source.train=a ", "a "),
        ("source.train=a\nb\n", "a\nb\n"),
        ("source.train=${oc.env:HOME}", "${oc.env:HOME}"),
        ("source.train=[ab]*.txt", "[ab]*.txt"),
        ("source.train=5", "5"),
        ("source.train=['${x}',5,null,'a, b','c: d']", ["${x}", "5", "null", "a, b", "c: d"]),
        ("source.train='a b'", "a b"),
        ("path=/x/a: b", "/x/a: b"),
        ("path='x'", "'x'"),
        ("path=yes", "yes"),
        ("path=1e3", "1e3"),
        ("name=${x", "${x"),
        ("source.revision=007", "007"),
        ("source.subset=null", None),
        ("max_tokens=31_000_000_000", 31_000_000_000),
        ("max_tokens=null", None),
        ("max_tokens=0123", 123),
        ("source.val_share=1e-3", 1e-3),
        ("source.val_share=null", None),
        ("source.val_share=1", 1.0),
    ],
)
def test_values_are_taken_as_typed(word: str, value: object) -> None:
    config = load("files", [word])
    found: object = config.preparation
    for part in word.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    if not word.startswith("name="):
        assert load("files", shlex.split(prepare_command(config.preparation))[3:]) == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("path=", "path is empty; give a value, or path=null for none"),
        ("source=x", "source is a group; set one of source.corpus, "),
        ("max_tokens=${oc.env:HOME}", "could not be converted to Integer"),
        ("max_tokens=5.0", "could not be converted to Integer"),
        ("max_tokens=true", "could not be converted to Integer"),
        ("max_tokens=1:40", "could not be converted to Integer"),
        ("max_tokens=0x10", "could not be converted to Integer"),
        ("source.val_share=1:30", "could not be converted to Float"),
        ("source.val_share=[1]", "could not be converted to Float"),
        ("source.train=[a,{b", "a list is written '[a,b]'"),
    ],
)
def test_values_of_other_types(word: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load("files", [word])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_preset_is_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.presets.PRESETS", tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "name: ${oc.env:HOME}\nsource: {train: '${x}', val_share: 1e-3}\nval_tokens: 5\n"
    )
    config = load("mine", [])
    assert (config.name, config.source.train, config.source.val_share, config.val_tokens) == (
        "${oc.env:HOME}",
        "${x}",
        1e-3,
        5,
    )
    for text, message in (("- a", "unknown key "), ("source: {trian: x}", "did you mean train"), ("{", "cannot read ")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            load("mine", [])


def lines_of(n: int, count: int) -> str:
    return "".join(f"{n}/{line} {random.Random((n, line).__hash__()).random()}\n" for line in range(count))


def held(folder: Path, source: Path, *words: str) -> dict[str, str]:
    """The splits of a preparation from the command line."""
    prepare.main(["files", f"source.train={source}", f"path={folder}", "tokenizer.kind=bytes", "workers=1", *words])
    return {split: text_of(folder, split) for split in Manifest.load(folder).splits}


def test_validation_text_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, whole = tmp_path / "a.txt", lines_of(0, 3000)
    path.write_text(whole)
    splits = held(tmp_path / "out", path)
    assert splits.keys() == {"train", "val"} and splits["train"] + splits["val"] == whole
    assert len(splits["val"]) == pytest.approx(len(whole) / 10, abs=60) and splits["train"].endswith("\n")
    said = capsys.readouterr().err
    assert said.startswith(f"preparing {tmp_path / 'out'}\nsource.train: read 1 file")
    assert f"val is {int(len(whole) / 10):,} characters (10.00%), from {path} on" in said
    splits = held(tmp_path / "both", path, "source.val_share=0.2", "source.test_share=0.05")
    assert "".join(splits.values()) == whole and list(splits) == ["train", "val", "test"]
    for split, share in (("val", 0.2), ("test", 0.05)):
        assert len(splits[split]) == pytest.approx(len(whole) * share, abs=60)
    assert held(tmp_path / "none", path, "source.val_share=0") == {"train": whole}
    assert held(tmp_path / "own", path, f"source.val={__file__}") == {"train": whole, "val": Path(__file__).read_text()}
    with pytest.raises(DataError, match=r"text of its own; choose one: source.val_share=0 keeps that text"):
        held(tmp_path / "no", path, f"source.val={__file__}", "source.val_share=0.1")


def test_validation_text_of_ten_books_and_of_many_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Few are cut at the end, equal texts alike; of many a hash chooses, before all are read."""
    books = [lines_of(n, 100) for n in range(9)]
    (tmp_path / "books").mkdir()
    for n, text in enumerate([books[8], *books]):  # the last one is also the first
        (tmp_path / "books" / f"{n:02d}.txt").write_text(text)
    splits = held(tmp_path / "ten", tmp_path / "books")
    assert not set(splits["val"].splitlines()) & set(splits["train"].splitlines())
    assert books[8].endswith(splits["val"][len(splits["val"]) // 2 :]), "of the last book, and of its copy"
    assert sorted((splits["train"] + splits["val"]).splitlines()) == sorted("".join([books[8], *books]).splitlines())
    assert "there are only 10 documents" in capsys.readouterr().err
    rows = [json.dumps({"text": f"document {n}"}) for n in range(5000)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    read: list[int] = []
    documents = (("", row.encode(), str(read.append(1))) for row in rows)
    assert held_out.hold_out(documents, {"val": None}, "x").shares == {"val": 0.005} and len(read) < 4000
    splits = held(tmp_path / "many", tmp_path / "many.jsonl")
    assert 8 <= splits["val"].count("document") < 60
    assert "0.005 of the documents for val, chosen by a hash" in capsys.readouterr().err
    few = held(tmp_path / "limited", tmp_path / "many.jsonl", "max_tokens=100")
    assert few["train"].count("document") < 10 and few["val"].count("document") == 8


def test_a_small_limit_leaves_the_end_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(5):
        (tmp_path / "in" / f"{n}.txt").write_text(lines_of(n, 50))
    splits = held(tmp_path / "out", tmp_path / "in", "max_documents=1")
    assert splits["train"] == lines_of(0, 50) and splits["val"].endswith(lines_of(4, 50)[-100:])


@pytest.mark.parametrize("text", ["", "x", "ab"])
def test_too_little_text_to_hold_out(text: str, tmp_path: Path) -> None:
    """Refused before anything is written that would have to be deleted."""
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match="files has no text for the split"):
        held(tmp_path / "out", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a longer text\n" * 9)
    assert held(tmp_path / "out", tmp_path / "a.txt")["val"]


@pytest.mark.parametrize("text", [" ", "a", "7", "-_", "ab1"])
def test_training_on_text_without_breaks_is_bounded(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(tokenizer._without_long_runs(text * 5000 + " usual words" + "\n" * 1000))
    assert "".join(pieces) == text * 5000 + " usual words" + "\n" * 1000
    assert max(map(len, pieces)) <= tokenizer.LONGEST + (0 if len(text) < 3 else 1) + 13 + 1000
    assert list(tokenizer._without_long_runs("a usual line\n" * 9999)) == ["a usual line\n" * 9999]
    trained = train_bpe([text * 200_000, "some words"], 300)  # minutes, were it shown whole
    assert trained.decode(trained.encode(text * 50).ids) == text * 50


def prepending(kind: str) -> Tokenizer:
    """Tokenizers that put a blank before a text, as Llama's and others do."""
    letters = "\u2581\n" + string.ascii_lowercase + string.digits + " ."
    vocabulary = {c: n for n, c in enumerate(letters)} | {f"\u2581{c}": 100 + n for n, c in enumerate(letters)}
    merges = [("\u2581", c) for c in letters]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="."))
    if kind == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "always":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        made = train_bpe(["some words and some more words\n\n  x"], 280)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    made.add_special_tokens(["</s>"])
    return made


@pytest.mark.parametrize("kind", ["normalizer", "metaspace", "always", "prefix", "plain"])
@pytest.mark.parametrize(
    "text", ["some words and\n\n more words\n  x " * 60, "abcdefg" * 200, "\n" * 900, " ab\n" * 400]
)
def test_long_documents_have_the_tokens_of_the_whole(kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepending(kind)
    encode = Encoder(made, made.token_to_id("</s>"))
    (whole,) = encode([text])
    monkeypatch.setattr(tokenizer, "PIECE", 100)
    pieces = list(encode._ids_of_pieces(text))
    assert len(pieces) >= len(text) // 100 and [token for piece in pieces for token in piece] == whole[:-1].tolist()
    short, long = encode(["a", text])
    assert long.tolist() == whole.tolist() and short.tolist() == encode(["a"])[0].tolist()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl: ValueError: line 2 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b'{"a":' * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "' + b"a" * 2000), r"a.jsonl.gz: line 2 is longer than"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is no JSON"),
        ("a.parquet", b"PAR1 is not all", "cannot read .*a.parquet: ValueError"),
    ],
    ids=["deep list", "deep mapping", "long line", "long number", "no parquet"],  # gzip's bytes have the time in them
)
def test_hostile_rows(name: str, raw: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "longer" in message:
        monkeypatch.setattr(reading, "MAX_LINE", 1000)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        prepare.prepare(asked(tmp_path / "out", train=str(tmp_path / name)))


def test_text_that_does_not_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 1000)
    monkeypatch.setattr("data.sources.CHUNK", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x\n" * 5000))
    config = asked(tmp_path / "out", train=str(tmp_path / "a.txt.gz"))
    monkeypatch.setattr(reading, "_free_memory", lambda: 60_000)
    for start in (None, "^y"):
        whole = replace(config, source=replace(config.source, document_start=start))
        with pytest.raises(DataError, match=r"a.txt.gz: a document of 0 MiB or more needs .* GiB of memory"):
            prepare.prepare(whole)
    monkeypatch.setattr("data.sources.CHUNK", 1000)
    assert (
        prepare.prepare(replace(config, source=replace(config.source, document_start="^x"))).splits["train"].documents
    )
    monkeypatch.setattr(reading, "_free_memory", lambda: 1 / 0 if False else (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DataError, match=r"cannot read .*a.txt.gz: it does not fit in memory"):
        prepare.prepare(replace(config, path=str(tmp_path / "out2")))


def test_bytes_are_those_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tokenizer that puts a blank before each document, and reads what it lacks as nothing."""
    made = prepending("normalizer")
    made.decoder = decoders.Replace("\u2581", " ")
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"ab {n} \u00e9\u00e9"}) + "\n" for n in range(40)))
    config = replace(asked(tmp_path / "out", train=str(tmp_path / "a.jsonl"), val_share=0.4))
    config = replace(config, tokenizer=TokenizerConfig("pretrained", name=str(tmp_path / "t.json")))
    manifest = prepare.prepare(config)
    assert "bits per byte are counted from the text" in capsys.readouterr().err
    split, sizes = manifest.splits["val"], manifest.token_bytes(tmp_path / "out")
    tokens = np.fromfile(tmp_path / "out" / "val-00000.bin", manifest.dtype)
    assert split.token_text_bytes == sizes[tokens].sum() != split.bytes
    counted = text_bytes_of_tokens(sizes, [split])
    assert counted[tokens].sum() == pytest.approx(split.bytes)

    def of(text: int, from_tokens: int | None, tokens: int = 10) -> Split:
        return Split(tokens, text, 1, (), from_tokens)

    sizes = np.array([0, 2, 4], np.uint16)
    for exact in (of(30, 30), of(30, None)):
        assert text_bytes_of_tokens(sizes, [exact]).tolist() == [0, 2, 4]
        assert text_bytes_of_tokens(sizes, [exact]).dtype == np.int64
    assert text_bytes_of_tokens(sizes, [of(30, 40)]).tolist() == [0, 1.5, 3]
    assert text_bytes_of_tokens(sizes, [of(30, 0)]).tolist() == [3, 3, 3]
    assert text_bytes_of_tokens(sizes, [of(30, 40), of(60, 60)], (1, 3)).tolist() == [0, 2 * 21 / 22, 4 * 21 / 22]
    assert text_bytes_of_tokens(np.array([1] * 256 + [0]), [of(9, 9)]).dtype == np.int64


def test_a_file_and_its_packed_copy_are_one_text(books: Path) -> None:
    """Refused in two splits, under whatever name; said in one."""
    for ending in (".gz", ".XZ"):
        packed = books / f"1.txt{ending}"
        packed.write_bytes(gzip.compress((books / "1.txt").read_bytes()))
        for train, val in ((packed, books / "1.txt"), (books, books.parent / "books" / ".." / "books" / "1.txt")):
            with pytest.raises(DataError, match=r"is in source.train and \S+ in source.val|is in both"):
                TextSource(SourceConfig(train=str(train), val=str(val)))
        source = TextSource(SourceConfig(train=str(books)))
        assert source.listing[-1].endswith(f"1.txt and {packed} are one text by their names, packed and not: their "
                                           "text is read twice")  # fmt: skip
        packed.unlink()
    assert len(TextSource(SourceConfig(train=str(books))).listing) == 1


def test_a_folder_prepared_among_its_sources_is_none_of_them(books: Path, capsys: pytest.CaptureFixture) -> None:
    config = asked(books / "prepared", train=str(books))
    made = prepare.prepare(config)
    assert prepare.prepare(config) == made
    for train in (f"{books}/**/*.*l", str(books / "prepared")):
        with pytest.raises(DataError, match="no file at"):
            TextSource(SourceConfig(train=train))
    (books / "prepared" / "manifest.json").unlink()
    assert "record of a preparation 1" in TextSource(SourceConfig(train=str(books))).listing[0]


def test_a_data_set_of_the_hub_is_read_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the command that goes on after its branch has moved."""
    opened, commits = [], iter(["before", "after"])

    class Rows(list):
        column_names = ("text",)

        def select_columns(self, names: list[str]) -> "Rows":
            return self

    def load_dataset(name: str, subset: None, *, revision: str, **options: object) -> Rows:
        opened.append(revision)
        return Rows({"text": f"document {number}"} for number in range(9))

    fake = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=OSError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("data.sources._commit", lambda name, revision: next(commits))
    config = asked(tmp_path / "out", dataset="org/name", revision="main", train="train")
    stop_after(3, monkeypatch, config)
    assert prepare.prepare(config).splits["train"].documents == 9
    assert len(opened) == 2 and set(opened) == {"before"}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    assert list(reading.rows_of_file(tmp_path / "a.txt", "text", by_lines=False)) == ["one\r\ntwo"]
    assert list(reading.rows_of_file(tmp_path / "a.txt", "text", by_lines=True)) == ["one\r\n", "two"]


@pytest.mark.parametrize("limits", [{"max_tokens": 5}, {}])
def test_what_a_preparation_without_any_text_says(limits: dict[str, int], books: Path, tmp_path: Path) -> None:
    if not limits:
        for path in books.iterdir():
            path.write_text(" \n")
    with pytest.raises(DataError, match="every text is empty or blank, or the first one exceeds a limit"):
        prepare.prepare(replace(asked(tmp_path / "out", train=str(books)), **limits))


def test_help_explains_the_keys(capsys: pytest.CaptureFixture) -> None:
    prepare.main(["--help"])
    shown = capsys.readouterr().out
    for part in ("source.val_share", "fraction of the training documents", "max_tokens", "tokenizer.vocab_size"):
        assert part in shown
    assert byte_tokenizer().get_vocab_size() == 257
