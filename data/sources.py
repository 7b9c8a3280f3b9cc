"""Text of files, of data sets on the hub and of corpora: a stream of documents that can resume at any of them."""

import glob
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .config import SPLITS, SourceConfig
from .corpora import CORPORA
from .files import DataError

TEXT = (".txt", ".md", ".py")
PACKED = (".gz", ".xz", ".zst")
MAX_SAMPLED = 64  # source files that a tokenizer is trained on
ANCHOR_ROWS = 1000  # rows of a data set between two saved states of its reader


class Position(NamedTuple):
    """A place in the stream: `skip` documents after the reader state `anchor` of source file number `file`."""

    file: int = 0
    anchor: dict[str, Any] | None = None
    skip: int = 0


class Document(NamedTuple):
    """A text, its split, and the position of the stream after it."""

    split: str
    text: str
    after: Position


@dataclass(frozen=True)
class SourceFile:
    """A file, a split of a data set, or a corpus, and the split that it belongs to."""

    split: str
    name: str


class TextSource:
    """The documents of `config` in a fixed order. Raises DataError if there are none or they cannot be read."""

    def __init__(self, config: SourceConfig):
        self.config = config
        if config.corpus:
            if config.corpus not in CORPORA:
                raise DataError(
                    f"no corpus {config.corpus!r}; choose {', '.join(CORPORA)}, or set source.dataset, or "
                    "source.train to files"
                )
            self.files = [SourceFile("train", config.corpus)]
        else:
            expand = _one if config.dataset else _files
            values = {split: getattr(config, split) for split in SPLITS if getattr(config, split)}
            self.files = [
                SourceFile(split, name) for split, value in values.items() for name in expand(f"source.{split}", value)
            ]
        split_of: dict[str, str] = {}
        for file in self.files:
            if split_of.setdefault(file.name, file.split) != file.split:
                raise DataError(f"{file.name} is in both source.{split_of[file.name]} and source.{file.split}")
        try:
            self.start = re.compile(config.document_start) if config.document_start else None
        except re.error as error:
            raise DataError(f"source.document_start is no regular expression: {error}") from error

    @property
    def splits(self) -> list[str]:
        """The splits that will have documents, in order."""
        config, named = self.config, {file.split for file in self.files}
        shares = {"val": config.val_share, "test": config.test_share}
        return [split for split in SPLITS if config.corpus or split in named or shares.get(split)]

    def fingerprint(self) -> list[Any]:
        """[split, name, size or None] of each source file; a preparation resumes only if they are unchanged."""
        local = not (self.config.corpus or self.config.dataset)
        return [[file.split, file.name, Path(file.name).stat().st_size if local else None] for file in self.files]

    def documents(self, begin: Position, end: int) -> Iterator[Document]:
        """Yield every text that is not blank, from `begin` to the end of source file `end` - 1."""
        for number in range(begin.file, end):
            file = self.files[number]
            anchor, skip = (begin.anchor, begin.skip) if number == begin.file else (None, 0)
            for row in islice(self._read(file, anchor), skip, None):
                if row.text.strip():
                    valid, raw = _utf8(row.text)
                    split = row.split or self._split(file.split, raw)
                    yield Document(split, valid, Position(number, row.anchor, row.num_read))

    def sample(self, size: int) -> Iterator[str]:
        """Yield about `size` bytes of training text: the beginnings of up to MAX_SAMPLED files, evenly spaced."""
        numbers = [number for number, file in enumerate(self.files) if file.split == "train"]
        if len(numbers) > MAX_SAMPLED:
            numbers = [numbers[len(numbers) * index // MAX_SAMPLED] for index in range(MAX_SAMPLED)]
        for done, number in enumerate(numbers):
            remaining = size // (len(numbers) - done)
            for document in self.documents(Position(number), number + 1):
                if remaining <= 0:
                    break
                if document.split == "train":
                    text = document.text[:remaining]
                    remaining -= len(text.encode())
                    size -= len(text.encode())
                    yield text

    def _split(self, split: str, raw: bytes) -> str:
        """Move val_share and test_share of the training documents, by a hash: equal texts share a split."""
        config = self.config
        if split != "train" or not (config.val_share or config.test_share):
            return split
        point = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64
        return "val" if point < config.val_share else "test" if point < config.val_share + config.test_share else split

    def _read(self, file: SourceFile, anchor: dict[str, Any] | None) -> Iterator["_Row"]:
        with _errors_named(file.name):
            if self.config.corpus:
                for count, (split, text) in enumerate(CORPORA[file.name](), 1):
                    yield _Row(text, count, split=split)
            elif self.config.dataset and not self.start:
                yield from self._rows_of_dataset(file.name, anchor)
            else:
                rows: Iterator[str]
                if self.config.dataset:
                    rows = (row.text for row in self._rows_of_dataset(file.name, None))
                else:
                    rows = _rows_of_file(Path(file.name), self.config.text, by_lines=self.start is not None)
                for count, text in enumerate(self._joined(rows), 1):
                    yield _Row(text, count)

    def _joined(self, rows: Iterable[str]) -> Iterator[str]:
        """Join rows into documents, each started by a row that matches `document_start`."""
        if self.start is None:
            yield from rows
            return
        document: list[str] = []
        for row in rows:
            if self.start.search(row) and document:
                yield "".join(document)
                document = []
            document.append(row)
        yield "".join(document)

    def _rows_of_dataset(self, split: str, state: dict[str, Any] | None) -> Iterator["_Row"]:
        import datasets  # takes a second, and most uses of this package do without

        config = self.config
        try:
            dataset = datasets.load_dataset(
                config.dataset, config.subset, split=split, revision=config.revision, streaming=True
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot open split {split} of the data set {config.dataset}: {_first_line(error)}\nCheck "
                "source.dataset, source.subset, source.revision and the network; `hf auth login` opens a gated one"
            ) from error
        if dataset.column_names is not None and config.text not in dataset.column_names:
            raise DataError(f"{config.dataset} has no column {config.text}; set source.text to {dataset.column_names}")
        dataset = dataset.select_columns([config.text])
        if state is not None:
            dataset.load_state_dict(state)
        count, rows = 0, iter(dataset)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # which ones is up to a stack of network libraries
                raise DataError(
                    f"reading {config.dataset} failed: {type(error).__name__}: {_first_line(error)}\n"
                    "Run the same command again: it goes on from what is done"
                ) from error
            if row is None:
                return
            count += 1
            yield _Row(_string(row[config.text], f"{config.dataset}: column {config.text}"), count, anchor=state)
            if count == ANCHOR_ROWS:
                state, count = dataset.state_dict(), 0


class _Row(NamedTuple):
    """A text, the number of texts read since the reader state `anchor`, and its split if the source decides it."""

    text: str
    num_read: int
    anchor: dict[str, Any] | None = None
    split: str | None = None


def _rows_of_file(path: Path, column: str, by_lines: bool) -> Iterator[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise DataError(f"{path} has no column {column}; set source.text to one of {file.schema_arrow.names}")
        for batch in file.iter_batches(256, columns=[column]):
            yield from (_string(text, f"{path}: column {column}") for text in batch.column(0).to_pylist())
    elif _kind(path) == ".jsonl":
        with _open(path) as raw:
            for number, line in enumerate(raw, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # its own line number is that within `line`
                    raise ValueError(f"line {number} is no JSON: {getattr(error, 'msg', error)}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}: line {number} is no JSON object with the key {column}")
                if column not in row:
                    names = ", ".join(row)
                    raise DataError(f"{path} has no key {column} in line {number}; set source.text to one of: {names}")
                yield _string(row[column], f"{path}, line {number}: column {column}")
    else:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            if by_lines:
                yield from file
            else:
                yield file.read()


def _open(path: Path) -> "gzip.GzipFile | lzma.LZMAFile | io.BufferedReader":
    """Open a file for reading, decompressed."""
    if path.suffix == ".zst":
        import pyarrow  # its reader notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if path.suffix == ".gz":
        return gzip.open(path)
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn any error in reading into a DataError that names the source."""
    try:
        yield
    except DataError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"cannot read {name}: {type(error).__name__}: {_first_line(error)}\nMend the source and run the same "
            "command again: it goes on from what is done"
        ) from error


def _files(key: str, value: Any) -> list[str]:
    """Expand files, folders (recursively) and globs to files in sorted order. Raises DataError if one names none."""
    files: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str):
            raise DataError(f"{key} is {value}; give files, folders or globs, one or a list")
        path = Path(item)
        if path.is_dir():
            paths = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and _kind(file)]
        elif path.is_file():
            paths = [str(path)]
        else:
            paths = sorted(name for name in glob.glob(item, recursive=True) if Path(name).is_file())
        if not paths:
            raise DataError(f"{key}: no file at {item}; give files, folders or globs of text, .jsonl or .parquet")
        unknown = [name for name in paths if not _kind(Path(name))]
        if unknown:
            kinds = ", ".join([*TEXT, ".jsonl"])
            raise DataError(f"{key}: cannot read {unknown[0]}; files are {kinds} (each also .gz .xz .zst), .parquet")
        files += [name for name in paths if name not in files]
    return files


def _kind(path: Path) -> str | None:
    """Suffix of the format, without that of the compression; None if it cannot be read."""
    inner = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    known = inner in (*TEXT, ".jsonl") or (inner == ".parquet" and path.suffix == inner)
    return inner if known else None


def _one(key: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        raise DataError(f"{key} is {value}; with source.dataset it is the name of a split")
    return [value]


def _string(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} holds {type(value).__name__}, not text; set source.text to another")
    return value or ""


def _utf8(text: str) -> tuple[str, bytes]:
    """Return the text and its UTF-8. Half of a surrogate pair, which JSON can contain, becomes U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, text.encode()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
