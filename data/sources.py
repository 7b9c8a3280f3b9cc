"""Text from files, from data sets of the hub and from this machine: one stream of documents that can start anywhere."""

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
from typing import Any, BinaryIO, NamedTuple

from .config import SPLITS, SourceConfig
from .corpora import CORPORA
from .files import DataError

TEXT = (".txt", ".md", ".py")
PACKED = (".gz", ".xz", ".zst")
SAMPLED_PARTS = 64  # files that a tokenizer is trained on at most
ANCHOR = 1000  # rows of a data set between two states of its reader


class Position(NamedTuple):
    """Where a stream goes on: part `part` from the state `anchor` of its reader, less the first `skip` documents."""

    part: int = 0
    anchor: dict[str, Any] | None = None
    skip: int = 0


class Document(NamedTuple):
    """A text, its split, and where the stream goes on after it."""

    split: str
    text: str
    after: Position


@dataclass(frozen=True)
class Part:
    """A file, a split of a data set, or a corpus, and the split it is for."""

    split: str
    name: str


class Source:
    """The documents of `config` in a fixed order. Raises DataError where there are none or they cannot be read."""

    def __init__(self, config: SourceConfig):
        self.config = config
        if config.corpus:
            if config.corpus not in CORPORA:
                raise DataError(
                    f"no corpus {config.corpus!r}; choose {', '.join(CORPORA)}, or set source.dataset, or "
                    "source.train to files"
                )
            self.parts = [Part("train", config.corpus)]
        else:
            wanted = [(split, getattr(config, split)) for split in SPLITS if getattr(config, split)]
            expand = _one if config.dataset else _files
            self.parts = [Part(split, name) for split, value in wanted for name in expand(f"source.{split}", value)]
        seen: dict[str, str] = {}
        for part in self.parts:
            if seen.setdefault(part.name, part.split) != part.split:
                raise DataError(f"{part.name} is in both source.{seen[part.name]} and source.{part.split}")
        try:
            self.start = re.compile(config.document_start) if config.document_start else None
        except re.error as error:
            raise DataError(f"source.document_start is no regular expression: {error}") from error

    @property
    def splits(self) -> list[str]:
        """Those that will have documents, in order."""
        config, own = self.config, {part.split for part in self.parts}
        shares = {"val": config.val_share, "test": config.test_share}
        return [split for split in SPLITS if config.corpus or split in own or shares.get(split)]

    def fingerprint(self) -> list[Any]:
        """What is read: changed files mean that a preparation cannot go on."""
        local = not (self.config.corpus or self.config.dataset)
        return [[part.split, part.name, Path(part.name).stat().st_size if local else None] for part in self.parts]

    def documents(self, begin: Position, end: int) -> Iterator[Document]:
        """Every text that is not blank, from `begin` on, up to but without part `end`."""
        for number in range(begin.part, end):
            part = self.parts[number]
            anchor, skip = (begin.anchor, begin.skip) if number == begin.part else (None, 0)
            for split, text, after, count in islice(self._read(part, anchor), skip, None):
                if text.strip():
                    valid, raw = _utf8(text)
                    yield Document(split or self._split(part.split, raw), valid, Position(number, after, count))

    def sample(self, size: int) -> Iterator[str]:
        """About `size` bytes of the training split, the beginning of each part or of an even choice of parts."""
        numbers = [number for number, part in enumerate(self.parts) if part.split == "train"]
        if len(numbers) > SAMPLED_PARTS:
            numbers = [numbers[len(numbers) * index // SAMPLED_PARTS] for index in range(SAMPLED_PARTS)]
        for done, number in enumerate(numbers):
            share = size // (len(numbers) - done)
            for document in self.documents(Position(number), number + 1):
                if share <= 0:
                    break
                if document.split == "train":
                    text = document.text[:share]
                    share, size = share - len(text.encode()), size - len(text.encode())
                    yield text

    def _split(self, split: str, raw: bytes) -> str:
        """A share of the training documents goes elsewhere, by hash: equal texts stay together."""
        config = self.config
        if split != "train" or not (config.val_share or config.test_share):
            return split
        point = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64
        return "val" if point < config.val_share else "test" if point < config.val_share + config.test_share else split

    def _read(self, part: Part, anchor: dict[str, Any] | None) -> Iterator[tuple[str | None, str, Any, int]]:
        """(split where the source decides it, text, anchor, documents since the anchor)."""
        with _named(part.name):
            if self.config.corpus:
                for count, (split, text) in enumerate(CORPORA[part.name](), 1):
                    yield split, text, None, count
            elif self.config.dataset and not self.start:
                for text, state, count in self._rows_of_dataset(part.name, anchor):
                    yield None, text, state, count
            else:
                if self.config.dataset:
                    rows = (text for text, _, _ in self._rows_of_dataset(part.name, None))
                else:
                    rows = _rows_of_file(Path(part.name), self.config.text, by_lines=self.start is not None)
                for count, text in enumerate(self._joined(rows), 1):
                    yield None, text, None, count

    def _joined(self, rows: Iterable[str]) -> Iterator[str]:
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

    def _rows_of_dataset(self, split: str, state: dict[str, Any] | None) -> Iterator[tuple[str, Any, int]]:
        """(text, a state of the reader, rows since that state)."""
        import datasets  # takes a second, and most uses of this package need none of it

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
            yield _string(row[config.text], f"{config.dataset}: column {config.text}"), state, count
            if count == ANCHOR:
                state, count = dataset.state_dict(), 0


def _rows_of_file(path: Path, column: str, by_lines: bool) -> Iterator[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise DataError(f"{path} has no column {column}; set source.text to one of {file.schema_arrow.names}")
        for batch in file.iter_batches(256, columns=[column]):
            yield from (_string(text, f"{path}: column {column}") for text in batch.column(0).to_pylist())
    elif _kind(path) == ".jsonl":
        with _opened(path) as raw:
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
        with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            if by_lines:
                yield from file
            else:
                yield file.read()


def _opened(path: Path) -> BinaryIO:
    """The file unpacked. Of zstd, pyarrow's reader: it notices a file that is cut short."""
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever goes wrong in reading becomes a DataError that names the source."""
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
    """Files, folders (all below them) and globs, to files in sorted order."""
    found: list[str] = []
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
        found += [name for name in paths if name not in found]
    return found


def _kind(path: Path) -> str | None:
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
    """JSON can spell half a surrogate pair, which is no text: replaced by U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, text.encode()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
