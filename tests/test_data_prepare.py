"""Preparation: any source becomes the same shards, however often it is interrupted, and mistakes name their fix."""

import errno
import gzip
import json
import lzma
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT, documents, process_environment, run_script
from fork_server import connect
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data.corpora
from data import writing
from data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data.files import DataError, sha256
from data.prepare import main, prepare
from data.presets import load, names, prepare_command
from data.shards import Manifest, read_offsets
from data.sources import Position, TextSource
from data.tokenizer import PIECE, Encoder, byte_tokenizer, dtype_of, end_token, scaled_bytes, token_bytes

# More than ASCII, the end of text spelled out, line ends of every kind, and text twice.
TEXTS = [f"# page {n}\r\nnaïve {'猫' * (n % 5)}<|endoftext|>\n\nx = {n * n}\n" for n in range(300)] + ["twice\n"] * 2
ROWS = [json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS)]
BYTES = TokenizerConfig(kind="bytes")


def config(folder: Path, tokenizer: TokenizerConfig = BYTES, **changes: object) -> PrepareConfig:
    """Source keys, and keys of PrepareConfig."""
    of_source = {key: value for key, value in changes.items() if key in SourceConfig.__dataclass_fields__}
    others = {key: value for key, value in changes.items() if key not in of_source}
    return PrepareConfig(
        path=str(folder), tokenizer=tokenizer, source=SourceConfig(**of_source), **{"workers": 1, **others}
    )


def texts_of(folder: Path, split: str = "train") -> list[str]:
    """The documents, cut where the offsets say."""
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for shard in manifest.splits[split].shards:
        tokens = np.fromfile(folder / shard.file, dtype=manifest.dtype)
        assert sha256(folder / shard.file) == shard.sha256 and len(tokens) == shard.tokens
        pieces = np.split(tokens, read_offsets(folder / shard.offsets)[1:])
        assert all(piece[-1] == manifest.end_of_text not in piece[:-1] for piece in pieces)
        found += tokenizer.decode_batch([piece[:-1].tolist() for piece in pieces], skip_special_tokens=False)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != writing.LOCK}


def jsonl(folder: Path, name: str, rows: list[str] = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    raw = ("\n".join(rows) + "\n").encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    (folder / name).write_bytes(packed.get(Path(name).suffix, bytes)(raw))
    return folder / name


def test_a_folder_of_the_corpus(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    assert manifest.vocab_size == 600 and manifest.dtype == "<u2"
    for number, split in enumerate(("val", "test", "train")):
        expected = [text for n, (_, text) in enumerate(documents()) if min(n % 4, 2) == number]
        assert texts_of(corpus, split) == expected
        tokens = np.fromfile(corpus / f"{split}-00000.bin", dtype="<u2")
        told = manifest.splits[split]
        assert told.documents == len(expected) and told.tokens == len(tokens)
        assert (
            told.bytes
            == sum(len(text.encode()) for text in expected)
            == np.load(corpus / "token_bytes.npy")[tokens].sum()
        )
    assert not (corpus / "progress.json").exists()


def test_stdlib_corpus_is_split_by_file() -> None:
    split_of: dict[str, str] = {}
    for split, text in data.corpora.stdlib():
        assert split_of.setdefault(text, split) == split or len(text) < 2000
    (line,) = TextSource(SourceConfig(corpus="stdlib")).listing
    assert line == f"reading the corpus stdlib, the *.py files in {Path(os.__file__).parent}"
    sizes = {name: sum(len(t) for t, s in split_of.items() if s == name) for name in ("train", "val", "test")}
    assert sizes["train"] > 10e6
    assert min(sizes["val"], sizes["test"]) > 2e5


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "x.parquet", row_group_size=37)
    return folder / "x.parquet"


def write_texts(folder: Path) -> Path:
    for n, text in enumerate(TEXTS):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / f"{n:04d}{('.txt', '.md', '.py')[n % 3]}").write_bytes(text.encode())
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


FORMATS: dict[str, Callable[[Path], Path]] = {
    **{
        name: lambda folder, name=name: jsonl(folder, name)
        for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst")
    },
    "parquet": write_parquet,
    "folder of text": write_texts,
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_text(write: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    manifest = prepare(config(tmp_path / "out", train=str(write(tmp_path / "in"))))
    assert texts_of(tmp_path / "out") == TEXTS
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].tokens == manifest.splits["train"].bytes + len(TEXTS)


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_data_set_of_the_hub(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a local folder as it reads the hub: streamed, by the names of splits; from any document on."""
    monkeypatch.setattr("data.sources.ANCHOR_ROWS", 7)
    for split in ("train", "validation"):
        for part in range(3):
            name = str(tmp_path / "hub" / f"{split}-{part:05d}-of-00003")
            rows = datasets.Dataset.from_dict({"body": TEXTS[part::3], "id": TEXTS[part::3]})
            rows.to_parquet(f"{name}.parquet") if kind == "parquet" else rows.to_json(f"{name}.jsonl")
    expected = [text for part in range(3) for text in TEXTS[part::3]]
    asked = config(tmp_path / "out", dataset=str(tmp_path / "hub"), text="body", train="train", val="validation")
    prepare(replace(asked, max_eval_tokens=2000))
    assert texts_of(tmp_path / "out") == expected
    val = texts_of(tmp_path / "out", "val")
    assert val == expected[: len(val)] and 30 < len(val) < 100
    source = TextSource(asked.source)
    whole = list(source.documents(Position(), 1))
    for place in (0, 5, 6, 7, 50, 299):
        position = Position(*json.loads(json.dumps(whole[place].after)))
        assert [d.text for d in source.documents(position, 1)] == expected[place + 1 :]
    with pytest.raises(DataError, match=r"has no column text; set source.text to one of: body, id"):
        prepare(config(tmp_path / "o2", dataset=str(tmp_path / "hub"), train="train"))
    with pytest.raises(DataError, match="cannot open split dev of the data set"):
        prepare(config(tmp_path / "o3", dataset=str(tmp_path / "hub"), text="body", train="dev"))


def test_a_data_set_that_cannot_be_reached(tmp_path: Path) -> None:
    code = "import sys; from data.prepare import main\nmain(sys.argv[1:])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for options, message in (
        (["fineweb_edu", "tokenizer.kind=bytes"], "cannot open split train of the data set HuggingFaceFW/fineweb-edu"),
        (["fineweb_edu"], "cannot load the tokenizer EleutherAI/gpt-neox-20b"),
    ):
        run = [sys.executable, "-c", code, *options, f"path={tmp_path / 'out'}"]
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
        assert f"DataError: {message}" in done.stderr


@pytest.mark.parametrize("dataset", [False, True])
def test_rows_are_joined_to_documents(dataset: bool, tmp_path: Path) -> None:
    """WikiText's rows are lines: an article begins at a heading of the first level, as the shipped file says."""
    pattern = load("wikitext103", []).source.document_start
    articles = [f" = Title {n} = \n\n text , = of = it \n\n = = Part = = \n more {n} \n" for n in range(20)]
    lines = "".join(articles).splitlines(keepends=True)
    if dataset:
        jsonl(tmp_path / "in", "train.jsonl", [json.dumps({"text": line}) for line in lines])
        asked = config(tmp_path / "out", dataset=str(tmp_path / "in"), train="train", document_start=pattern)
    else:
        (tmp_path / "wiki.txt").write_text("".join(articles))
        asked = config(tmp_path / "out", train=str(tmp_path / "wiki.txt"), document_start=pattern)
    prepare(asked)
    assert texts_of(tmp_path / "out") == articles


def test_shards_are_bounded_and_hold_whole_documents(tmp_path: Path) -> None:
    rows = [*ROWS[:40], json.dumps({"text": "long " * 400}), *ROWS[40:]]
    asked = config(tmp_path / "out", train=str(jsonl(tmp_path, "a.jsonl", rows)), shard_tokens=1000)
    shards = prepare(asked).splits["train"].shards
    assert len(shards) > 10
    assert [shard.documents for shard in shards if shard.tokens > 1000] == [1]
    assert texts_of(tmp_path / "out") == [json.loads(row)["text"] for row in rows]


def test_a_share_of_the_documents(tmp_path: Path) -> None:
    """By hash: a text is in one split however often it occurs and whatever else there is."""
    path = jsonl(tmp_path, "a.jsonl")
    prepare(config(tmp_path / "out", train=str(path), val_share=0.2, test_share=0.1))
    splits = {split: texts_of(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert sorted(text for texts in splits.values() for text in texts) == sorted(TEXTS)
    assert 40 < len(splits["val"]) < 80 and 15 < len(splits["test"]) < 45
    assert sum("twice\n" in texts for texts in splits.values()) == 1
    prepare(config(tmp_path / "fewer", train=str(jsonl(tmp_path, "b.jsonl", ROWS[::2])), val_share=0.2, test_share=0.1))
    assert set(texts_of(tmp_path / "fewer", "val")) == set(splits["val"]) & set(TEXTS[::2])


def test_limits(tmp_path: Path) -> None:
    paths = [str(jsonl(tmp_path, name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    asked = config(tmp_path / "1", train=paths[:2], val=paths[2], max_tokens=1000, max_eval_tokens=500)
    splits = prepare(asked).splits
    assert 900 < splits["train"].tokens <= 1000 and 400 < splits["val"].tokens <= 500
    assert texts_of(tmp_path / "1") == TEXTS[: splits["train"].documents]
    assert prepare(config(tmp_path / "2", train=paths[0], max_documents=17)).splits["train"].documents == 17
    with pytest.raises(DataError, match=r"has no text for the split train: .* higher limits"):
        prepare(config(tmp_path / "3", train=paths[0], max_tokens=5))


START = """
import sys
sys.path.insert(0, {root!r})
from data import pool, prepare
pool.BATCH, prepare.CHECKPOINT_SECONDS = 2000, 0.05
if __name__ == "__main__":
    prepare.main(sys.argv[1:])
"""


def finished_shards(folder: Path) -> set[str]:
    path = folder / "progress.json"
    splits = json.loads(path.read_text())["splits"] if path.exists() else {}
    return {shard["file"] for split in splits.values() for shard in split["shards"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_goes_on(workers: int, tmp_path: Path) -> None:
    """SIGKILL, again and again, at any point; in the end the bytes are those of an uninterrupted one."""
    script = tmp_path / "start.py"
    script.write_text(START.format(root=str(ROOT)))
    rows = [json.dumps({"text": " ".join(str(hash((n, i))) for i in range(150))}) for n in range(400)]
    for name, half in (("a.jsonl.xz", rows[:200]), ("b.jsonl", rows[200:])):
        jsonl(tmp_path / "in", name, half)
    options = [
        f"source.train={tmp_path / 'in'}",
        "shard_tokens=40000",
        "source.val_share=0.1",
        "source.test_share=0.1",
    ]
    options += ["tokenizer.vocab_size=300", "tokenizer.sample_bytes=50000"]
    main(["files", *options, "workers=1", f"path={tmp_path / 'whole'}"])
    out = tmp_path / "out"
    run = [sys.executable, str(script), "files", *options, f"workers={workers}", f"path={out}"]
    for kill in range(4):
        process = connect(process_environment())(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before = finished_shards(out)
        while kill < 3 and len(finished_shards(out)) == len(before):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        if kill < 3:
            process.kill()
        _, errors = process.communicate()
        assert process.returncode == (-9 if kill < 3 else 0), errors
        assert before < finished_shards(out) or kill == 3, "finished shards are kept"
        if kill < 3:
            with pytest.raises(DataError, match=r"was not prepared to the end: run the same data/prepare\.py command"):
                Manifest.load(out)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_processes_at_once(tmp_path: Path) -> None:
    """The second waits and then reads what the first has made."""
    path = jsonl(tmp_path, "a.jsonl", ROWS * 100)
    run = [sys.executable, str(ROOT / "data" / "prepare.py"), "files", f"source.train={path}", "tokenizer.kind=bytes"]
    run += [f"path={tmp_path / 'out'}", "workers=1"]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    main([f"verify={tmp_path / 'out'}"])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said so; finished shards are kept, and with room the same command goes on."""
    asked = config(tmp_path / "out", train=str(jsonl(tmp_path, "a.jsonl")), shard_tokens=3000)
    prepare(replace(asked, path=str(tmp_path / "whole")))
    add = writing.SplitWriter.add

    def full(self: writing.SplitWriter, *arguments: object) -> bool:
        if len(self.progress.shards) == 2 and self.tokens > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, *arguments)

    monkeypatch.setattr(writing.SplitWriter, "add", full)
    with pytest.raises(DataError, match=r"cannot write .*out: No space left on device\nMake room"):
        prepare(asked)
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    kept = (tmp_path / "out" / "train-00001.bin").stat().st_mtime_ns
    prepare(asked)
    assert (tmp_path / "out" / "train-00001.bin").stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_is_of_one_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, "a.jsonl")
    asked = config(tmp_path / "out", train=str(path))
    prepare(asked)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    prepare(replace(asked, workers=2))
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before, "only read"
    with pytest.raises(DataError, match="was prepared with max_tokens=null instead of 10; give another folder"):
        prepare(replace(asked, max_tokens=10))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"other holds thesis.tex, which is not ours; give an empty folder"):
        prepare(replace(asked, path=str(tmp_path / "other")))
    assert contents(tmp_path / "other").keys() == {"thesis.tex"} and not (tmp_path / "other" / writing.LOCK).exists()


def test_a_preparation_that_was_begun_keeps_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path, "a.jsonl")

    def stop(self: writing.SplitWriter) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(writing.SplitWriter, "finish", stop)
    monkeypatch.setattr("data.prepare.CHECKPOINT_SECONDS", 0)
    begun = config(tmp_path / "begun", train=str(path))
    with pytest.raises(DataError, match="full"):
        prepare(begun)
    with pytest.raises(DataError, match="was begun with shard_tokens=134217728 instead of 5; run that command again"):
        prepare(replace(begun, shard_tokens=5))
    path.write_text("{}\n")
    with pytest.raises(DataError, match="was begun with other source files"):
        prepare(begun)


def test_progress_of_an_earlier_version(tmp_path: Path) -> None:
    shard = {"file": "train-00000.bin", "tokens": 3, "documents": 1, "bytes": 2, "sha256": "a"}
    shard |= {"offsets": "train-00000.offsets.npy", "offsets_sha256": "b"}
    split = {"shards": [shard], "tokens": 5, "documents": 2, "bytes": 4, "covered": 3, "full": False}
    saved = {"asked": {"source": 1}, "position": [0, None, 2], "splits": {"train": split}}
    (tmp_path / writing.PROGRESS).write_text(json.dumps(saved))
    progress = writing.Progress.load(tmp_path, {"source": 1}, ["train"])
    assert progress.position == Position(0, None, 2)
    assert progress.splits["train"].token_text_bytes == 3 and progress.splits["train"].unfinished("tokens") == 2
    progress.save(tmp_path)
    assert json.loads((tmp_path / writing.PROGRESS).read_text()) == saved


def test_a_preparation_that_wrote_nothing_is_forgotten(tmp_path: Path) -> None:
    asked = config(tmp_path / "out", train=str(jsonl(tmp_path, "a.jsonl", ["{"])))
    with pytest.raises(DataError, match="is no JSON"):
        prepare(asked)
    bpe = TokenizerConfig(vocab_size=300)
    manifest = prepare(config(tmp_path / "out", bpe, train=str(jsonl(tmp_path, "b.jsonl")), val_share=0.1))
    assert manifest.vocab_size == 300


def test_a_preparation_stopped_before_its_first_token_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(tmp_path / "out", train=str(jsonl(tmp_path, "a.jsonl")))

    def full(folder: Path, *_: object) -> None:
        (folder / "train-00000.bin").touch()
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="full"):
        patched.setattr("data.prepare.SplitWriter", full)
        prepare(asked)
    assert prepare(asked).splits["train"].documents == len(TEXTS)


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    rows = [
        '{"text": "a\\ud83d b"}',
        '{"text": "\\ud83d\\ude00"}',
        '{"text": null}',
        '{"text": " \\n"}',
        '{"text": "c\\u0000"}',
    ]
    prepare(config(tmp_path / "out", train=str(jsonl(tmp_path, "a.jsonl", rows))))
    assert texts_of(tmp_path / "out") == ["a\ufffd b", "\U0001f600", "c\x00"]


def broken(folder: Path, name: str) -> Path:
    path = jsonl(folder, name)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.jsonl", ['{"text": "a"}', "{"], "cannot read .*a.jsonl: ValueError: line 2 is no JSON: Expecting"),
        (
            "a.jsonl",
            ['{"text": "a"}', '{"body": "b", "id": 3}'],
            "no key text in line 2; set source.text to one of: body, id",
        ),
        ("a.jsonl", ['{"text": 3}'], "a.jsonl, line 1: column text holds int, not text"),
        ("a.jsonl", ["[1]"], "a.jsonl: line 1 is no JSON object with the key text"),
    ],
)
def test_text_that_cannot_be_read(name: str, rows: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path / "out", train=str(jsonl(tmp_path, name, rows))))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_files_cut_short_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot read .*{name}: .*\nMend the source.* If tokens were written before"):
        prepare(config(tmp_path / "out", train=str(broken(tmp_path, name))))


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read .*a.txt: UnicodeDecodeError"):
        prepare(config(tmp_path / "out", train=str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"source.train is not set; give files"),
        ({"train": 5}, r"source.train is 5; give files, folders or globs, one or a list"),
        ({"train": "/nowhere/*.txt"}, r"source.train: no file at /nowhere/\*.txt"),
        ({"train": __file__, "val": [__file__]}, "test_data_prepare.py is in both source.train and source.val"),
        ({"train": "pyproject.toml"}, "cannot read pyproject.toml; files are .txt, .md, .py, .jsonl"),
        ({"train": __file__, "val_share": 0.6, "test_share": 0.5}, "together below 1"),
        ({"train": __file__, "val": "x", "val_share": 0.6}, "and the split has text of its own; choose one"),
        ({"corpus": "books"}, "no corpus 'books'; choose stdlib"),
        ({"corpus": "stdlib", "dataset": "x"}, "are both set; choose one"),
        ({"dataset": "x"}, "name the split of x: source.train=train"),
        ({"dataset": "x", "train": ["a", "b"]}, "it is the name of a split"),
        ({"train": __file__, "document_start": "("}, "source.document_start is no regular expression"),
        ({"train": __file__, "tokenizer": TokenizerConfig("bpe", 17)}, "tokenizer.vocab_size is 17; choose 257 to"),
        ({"train": __file__, "tokenizer": TokenizerConfig("wordy")}, "choose bpe, bytes, pretrained"),
        ({"train": __file__, "tokenizer": TokenizerConfig("pretrained")}, "tokenizer.name is not set"),
        ({"train": __file__, "shard_tokens": 0}, "shard_tokens is 0; it must be at least 1"),
        ({"train": __file__, "val_share": 1e-9}, "split val: its documents, 1 in all, are in others. .*source.val"),
    ],
)
def test_mistakes(changes: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path / "out", **{"tokenizer": BYTES, **changes}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdlb"], "no data set 'stdlb', did you mean stdlib? configs/data has files, fineweb_edu, "),
        (["corpus=stdlib"], "begin with the name of a data set: files, "),
        (["stdlib", "tokenizer.vocab_sze=3"], "unknown key tokenizer.vocab_sze, did you mean vocab_size?"),
        (["stdlib", "val_tokens=3"], "unknown key val_tokens"),
        (["stdlib", "max_tokens=many"], "max_tokens: Value 'many' of type 'str' could not be converted to Integer"),
        (["stdlib", "source.train=[a"], "cannot read source.train=[a: a value is YAML, a list is written '[a,b]'"),
        (["stdlib", "quick"], "cannot read 'quick'; write key=value"),
        (["stdlib", "name.x=3"], "unknown key name.x. name has no keys"),
        (["verify=/nowhere"], "/nowhere holds no prepared data"),
        (["verify=/nowhere", "x=1"], "verify= stands alone"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    done = run_script("data/prepare.py", "stdlib", "tokenizer.vocab_size=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: tokenizer.vocab_size is 1; choose 257 to 1048576\n")
    shown = run_script("data/prepare.py", "--help", cwd=tmp_path).stdout
    assert "python data/prepare.py NAME" in shown and "source.val_share: 0.0" in shown
    jsonl(tmp_path / "books", "a.jsonl")
    options = ["source.train=[books,books/*.jsonl]", "path=out", "tokenizer.vocab_size=400", "workers=2"]
    done = run_script(
        "data/prepare.py", "files", *options, "source.val_share=0.2", "source.test_share=0.1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out: train ") and done.stdout.endswith("vocabulary 400\n")
    done = run_script("data/prepare.py", "verify=out", cwd=tmp_path)
    assert done.stdout == "out: tokenizer and 3 shards are what the manifest says\n"


def test_training_knows_its_preparation() -> None:
    changed = DataConfig("a", "b", SourceConfig("c"), TokenizerConfig("d"), 1, 2, 3, 4, 5)
    assert changed.preparation == PrepareConfig("a", "b", SourceConfig("c"), TokenizerConfig("d"), 1, 2, 3, 4, 5)


def test_the_schema_imports_nothing_heavy() -> None:
    code = "import sys, data.config, data.files; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "datasets", "tokenizers", "pyarrow", "omegaconf", "rich", "yaml"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("name", names())
def test_every_config_says_its_own_name_and_command(name: str) -> None:
    assert load(name, []).name == name
    assert prepare_command(load(name, []).preparation) == f"python data/prepare.py {name}"
    changed = load(name, ["source.text=body", "tokenizer.vocab_size=512", "max_tokens=5"])
    shown = "python data/prepare.py " + name + " source.text=body tokenizer.vocab_size=512 max_tokens=5"
    assert prepare_command(changed.preparation) == shown
    assert load(name, shown.split()[3:]) == changed
    listed = load(name, ["source.train=[a b/*,c]"])
    assert load(name, shlex.split(prepare_command(listed.preparation))[3:]) == listed


def gpt_neox_like(path: Path) -> None:
    """Byte-level with a normalizer, runs of spaces as added tokens, and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in range(2, 6)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(path))


def llama_like(path: Path) -> None:
    """SentencePiece's kind: spaces as U+2581, bytes for what the vocabulary lacks."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocabulary = {token: n for n, token in enumerate([*tokens, "\u2581t", "th"])}
    merges = [("\u2581", "t"), ("t", "h")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))


@pytest.mark.parametrize(("write", "end"), [(gpt_neox_like, "<|endoftext|>"), (llama_like, "</s>")])
def test_pretrained_tokenizers(write: Callable[[Path], None], end: str, tmp_path: Path) -> None:
    """From a folder or a file: the text comes back, its bytes are counted, special tokens in it are text."""
    (tmp_path / "tok").mkdir()
    write(tmp_path / "tok" / "tokenizer.json")
    texts = [*TEXTS, f"spelled out: {end} <s> <|padding|>", "    if x:\n      y   z"]
    rows = [json.dumps({"text": text}) for text in texts]
    manifests = [
        prepare(
            config(
                tmp_path / out,
                TokenizerConfig("pretrained", name=str(name)),
                train=str(jsonl(tmp_path, "a.jsonl", rows)),
            )
        )
        for out, name in (("out", tmp_path / "tok"), ("out2", tmp_path / "tok" / "tokenizer.json"))
    ]
    assert manifests[0].digest == manifests[1].digest
    assert texts_of(tmp_path / "out") == texts
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert manifests[0].end_of_text == tokenizer.token_to_id(end)
    assert manifests[0].vocab_size == tokenizer.get_vocab_size()
    tokens = np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u2")
    counted = np.load(tmp_path / "out" / "token_bytes.npy")[tokens].sum()
    assert counted == manifests[0].splits["train"].bytes == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_that_changes_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "x": 2, "page": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    pretrained = TokenizerConfig("pretrained", name=str(tmp_path / "t.json"))
    prepare(config(tmp_path / "out", pretrained, train=str(jsonl(tmp_path, "a.jsonl"))))
    assert "% of the bytes of its text (the tokenizer changes text)" in capsys.readouterr().err


def test_tokenizers_without_an_end_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match=r"has no token <eot>; set tokenizer.end_of_text"):
        end_token(tokenizer, "<eot>")
    with pytest.raises(DataError, match=r"reads the text 'a' as the token; set tokenizer.end_of_text to another"):
        end_token(tokenizer, "a")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot load the tokenizer .*t.json: .*\nWithout a network"):
        prepare(config(tmp_path / "out", TokenizerConfig("pretrained", name=str(tmp_path / "t.json")), train=__file__))


def test_large_vocabularies_have_wider_tokens(tmp_path: Path) -> None:
    vocabulary = (
        {chr(0x4E00 + n): n for n in range(20000)} | {f"a{n}": 20000 + n for n in range(50000)} | {"</s>": 70000}
    )
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    text = chr(0x4E00 + 19999) + chr(0x4E00)
    (tmp_path / "a.txt").write_text(text)
    pretrained = TokenizerConfig("pretrained", name=str(tmp_path / "t.json"))
    manifest = prepare(config(tmp_path / "out", pretrained, train=str(tmp_path / "a.txt")))
    assert manifest.dtype == "<u4" and manifest.vocab_size == 70001
    assert np.fromfile(tmp_path / "out" / "train-00000.bin", dtype="<u4").tolist() == [19999, 0, 70000]
    assert (dtype_of(65536), dtype_of(65537)) == (np.dtype("<u2"), np.dtype("<u4"))


def test_long_documents_are_encoded_in_pieces() -> None:
    encode = Encoder(byte_tokenizer(), 256)
    text = "line\n" * (PIECE // 2) + "x" * (PIECE + 7)
    (tokens,) = encode([text])
    assert bytes(tokens[:-1].astype(np.uint8)) == text.encode() and tokens[-1] == 256
    assert token_bytes(byte_tokenizer()).tolist() == [1] * 256 + [0]


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    for sizes, scaled in (([1, 2], [1, 2]), ([1, 1], [1.5, 1.5]), ([0, 0], [1.5, 1.5]), ([], [])):
        assert scaled_bytes(sizes, "abc") == scaled


def test_a_sample_is_spread_over_the_files(tmp_path: Path) -> None:
    for n in range(100):
        (tmp_path / f"{n:03d}.txt").write_text(f"{n:03d} " * 1000)
    source = TextSource(SourceConfig(train=str(tmp_path)))
    sample = list(source.sample(64_000))
    assert len(sample) == 64 and sum(map(len, sample)) == 64_000
    assert sample[0].startswith("000") and sample[-1].startswith("098")
