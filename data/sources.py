"""Text of files, of data sets on the hub and of corpora: a stream of documents that can resume at any of them."""

import hashlib
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from . import corpora
from .config import SPLITS, SourceConfig
from .files import DataError
from .held_out import HeldOut, by_hash, hold_out
from .listing import SourceFile, all_files, list_files
from .reading import CHUNK, check_memory, rows_of_file, string
from .source_record import SourceState, state_of_file

MAX_SAMPLED = 64  # source files that a tokenizer is trained on
ANCHOR_ROWS = 1000  # rows of a data set between two saved states of its reader


class Position(NamedTuple):
    """A place in the stream: `skip` documents after the reader state `anchor` of source file number `file`."""

    file: int = 0
    anchor: dict[str, Any] | None = None
    skip: int = 0


class Document(NamedTuple):
    """A text, the bytes of its UTF-8, its split, and the position of the stream after it.

    `complete` is False where another part of the same text follows: `after` is then the position after both.
    """

    split: str
    text: str
    num_bytes: int
    after: Position
    complete: bool = True


class TextSource:
    """The documents of `config` in a fixed order. Raises DataError if there are none or they cannot be read."""

    def __init__(self, config: SourceConfig):
        self.config = config
        self.listing: list[str] = []  # a line about each split: what was found, and what was passed over
        self.held_out = by_hash(config.shares) if config.shares else HeldOut()
        self.commit: str | None = None  # of a data set of the hub; None: what source.revision names when it is read
        values = {split: getattr(config, split) for split in SPLITS if getattr(config, split)}
        if config.corpus:
            if config.corpus not in corpora.names():
                raise DataError(
                    f"no corpus {config.corpus!r}; choose {', '.join(corpora.names())}, or set source.dataset, or "
                    "source.train to files"
                )
            self.files, self.listing = [SourceFile("train", config.corpus)], [corpora.described(config)]
        elif config.dataset:
            self.files = [SourceFile(split, _one(f"source.{split}", value)) for split, value in values.items()]
            split_of: dict[str, str] = {}
            for file in self.files:
                if split_of.setdefault(file.name, file.split) != file.split:
                    raise DataError(f"{file.name} is in both source.{split_of[file.name]} and source.{file.split}")
        else:
            self.files, self.listing = list_files(values)
        try:
            self.start = re.compile(config.document_start) if config.document_start else None
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(f"source.document_start is no regular expression: {error}") from error

    @property
    def splits(self) -> list[str]:
        """The splits that will have documents, in order."""
        config, named = self.config, {file.split for file in self.files}
        return [split for split in SPLITS if config.corpus or split in named or split in config.shares]

    def states(self, digest: bool = True) -> list[SourceState]:
        """Describe each source, to notice whether it changes; without `digest`, by what costs no reading of files.

        Raises DataError if a source cannot be read.
        """
        config = self.config
        with _errors_named(config.corpus or config.dataset or "the sources"):
            if config.corpus:
                return [SourceState("train", config.corpus, digest=_digest_of_corpus(config))]
            if not config.dataset:
                return [state_of_file(file.split, file.name, digest) for file in self.files]
            if Path(config.dataset).is_dir():
                return [state_of_file("", name, digest) for name in all_files(Path(config.dataset))]
            commit = _commit(config.dataset, config.revision) if digest else None
            return [SourceState(file.split, file.name, digest=commit) for file in self.files]

    def pin(self, states: Iterable[SourceState]) -> None:
        """Read a data set of the hub at the commit that was recorded, whatever its branch names by now."""
        if self.config.dataset and not Path(self.config.dataset).is_dir():
            self.commit = next((state.digest for state in states), None)

    def hold_out(self, name: str) -> None:
        """Decide which training text is held out for val and test; `name` is that of the data set.

        Of files it is known how many documents there are, and few are cut otherwise than many; a hash chooses
        documents of a data set that is streamed.
        """
        if self.config.shares and not self.config.dataset:
            self.held_out = hold_out(self._training_texts(), self.config.shares, name)

    def can_yield(self, file: SourceFile) -> list[str]:
        """The splits that documents of `file` can belong to."""
        if self.config.corpus:
            return list(SPLITS)
        return ["train", *self.config.shares] if file.split == "train" else [file.split]

    def documents(self, begin: Position, end: int) -> Iterator[Document]:
        """Yield every text that is not blank, from `begin` to the end of source file `end` - 1."""
        for number in range(begin.file, end):
            file = self.files[number]
            anchor, skip = (begin.anchor, begin.skip) if number == begin.file else (None, 0)
            for row in islice(self._read(file, anchor), skip, None):
                if not row.text or row.text.isspace():
                    continue
                text, raw = _utf8(row.text)
                after = Position(number, row.anchor, row.num_read)
                split = row.split or file.split
                parts = [(split, text)] if row.split or split != "train" else self.held_out.parts(text, raw)
                for place, (part_split, part) in enumerate(parts, 1):
                    size = len(raw) if len(parts) == 1 and part is text else len(part.encode())
                    yield Document(part_split, part, size, after, place == len(parts))

    def _training_texts(self) -> Iterator[tuple[str, bytes, str]]:
        """Text, UTF-8 and source file of every training document, before any is held out."""
        for file in self.files:
            if file.split == "train":
                for row in self._read(file, None):
                    if row.text and not row.text.isspace():
                        yield *_utf8(row.text), file.name

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
                    num_bytes = len(text.encode())
                    remaining -= num_bytes
                    size -= num_bytes
                    yield text

    def _read(self, file: SourceFile, anchor: dict[str, Any] | None) -> Iterator["_Row"]:
        with _errors_named(file.name):
            if self.config.corpus:
                for count, (split, text) in enumerate(corpora.corpus(self.config), 1):
                    yield _Row(text, count, split=split)
            elif self.config.dataset and not self.start:
                yield from self._rows_of_dataset(file.name, anchor)
            else:
                rows: Iterator[str]
                if self.config.dataset:
                    rows = (row.text for row in self._rows_of_dataset(file.name, None))
                else:
                    rows = rows_of_file(Path(file.name), self.config.text, by_lines=self.start is not None)
                for count, text in enumerate(self._joined(rows, file.name), 1):
                    yield _Row(text, count)

    def _joined(self, rows: Iterable[str], name: str) -> Iterator[str]:
        """Join rows into documents, each started by a row that matches `document_start`."""
        if self.start is None:
            yield from rows
            return
        document: list[str] = []
        size = checked = 0
        for row in rows:
            if self.start.search(row) and document:
                yield "".join(document)
                document, size, checked = [], 0, 0
            document.append(row)
            size += len(row)
            if size - checked > CHUNK:
                check_memory(name, size)
                checked = size
        yield "".join(document)

    def _rows_of_dataset(self, split: str, state: dict[str, Any] | None) -> Iterator["_Row"]:
        import datasets  # takes a second, and most uses of this package do without

        config = self.config
        try:
            dataset = datasets.load_dataset(
                config.dataset, config.subset, split=split, revision=self.commit or config.revision, streaming=True
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot open split {split} of the data set {config.dataset}: {_first_line(error)}\nCheck "
                "source.dataset, source.subset, source.revision and the network; `hf auth login` opens a gated one"
            ) from error
        if dataset.column_names is not None and config.text not in dataset.column_names:
            names = ", ".join(dataset.column_names)
            raise DataError(f"{config.dataset} has no column {config.text}; set source.text to one of: {names}")
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
            yield _Row(string(row[config.text], f"{config.dataset}: column {config.text}"), count, anchor=state)
            if count == ANCHOR_ROWS:
                state, count = dataset.state_dict(), 0


class _Row(NamedTuple):
    """A text, the number of texts read since the reader state `anchor`, and its split if the source decides it."""

    text: str
    num_read: int
    anchor: dict[str, Any] | None = None
    split: str | None = None


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turn any error in reading into a DataError that names the source."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"cannot read {name}: it does not fit in memory; cut the text into documents with source.document_start, "
            "or into files"
        ) from error
    except (OSError, EOFError, ValueError, RecursionError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"cannot read {name}: {type(error).__name__}: {_first_line(error)}\nMend the source and run the same "
            "command again: it goes on from what is done. If tokens were written before a file is changed, "
            "delete the prepared folder first, or give another with path="
        ) from error


def _one(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key} is {value}; with source.dataset it is the name of a split")
    return value


def _digest_of_corpus(source: SourceConfig) -> str:
    """Hash of the splits and texts of a corpus, which another version of Python has otherwise."""
    hashed = hashlib.blake2b(digest_size=16)
    for split, text in corpora.corpus(source):
        for part in (split.encode(), text.encode("utf-8", "surrogatepass")):
            hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.hexdigest()


def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit of a data set of the hub that `revision` names now; None if the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # reading it fails soon, and says why
        return None


def _utf8(text: str) -> tuple[str, bytes]:
    """Return the text and its UTF-8. Half of a surrogate pair, which JSON can contain, becomes U+FFFD."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text, text.encode()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
