"""Token shards: a folder of raw little-endian integers and the manifest that describes them.

manifest.json            counts, checksums, recipe; written last, so a folder that has one is complete
tokenizer.json           the tokenizer in the format of `tokenizers`
token_bytes.npy          [V] UTF-8 bytes that each token stands for, for bits per byte
sources.jsonl            what was read: name, size, times and a hash of each source file
train-00000.bin ...      consecutive documents, each ended by the end-of-text token, which occurs nowhere else
train-00000.offsets.npy  [documents] start of each document in the shard, in tokens
"""

import hashlib
import json
import os
import re
import shlex
import stat
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from .cli import did_you_mean
from .config import LIMITS, as_numbers
from .files import DataError, sha256, write_json

FORMAT = 2
CHUNK = 2**24  # tokens of a shard that are looked at together
THREADS = 8  # that look at files at the same time
OPEN_FILES = 256  # many systems allow a process 1024
# Target at pads and at positions that the model does not predict: no loss, not counted.
IGNORE = -100


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `bytes` counts its text; `sha256` belongs to `file`, `offsets_sha256` to `offsets`."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    offsets: str
    offsets_sha256: str


@dataclass(frozen=True)
class Split:
    """Totals of a split: `bytes` of text, `documents`, and `tokens`, which include one end of text per document.

    token_text_bytes  bytes that the tokens stand for: `bytes`, unless the tokenizer changes text; None: not recorded,
                      by an earlier version
    """

    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]
    token_text_bytes: int | None = None


@dataclass(frozen=True)
class Manifest:
    """Description of a complete folder.

    recipe   PrepareConfig.recipe of its preparation
    sources  SHA-256 of sources.jsonl, the record of the files that were read; None: not recorded, by an earlier version
    """

    format: int
    name: str
    recipe: dict[str, Any]
    tokenizer_sha256: str
    token_bytes_sha256: str
    vocab_size: int
    end_of_text: int
    dtype: str
    splits: dict[str, Split]
    sources: str | None = None

    @property
    def digest(self) -> str:
        """Checksum of tokenizer and tokens: equal digests mean equal data."""
        parts = [self.tokenizer_sha256, *(shard.sha256 for split in self.splits.values() for shard in split.shards)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def row_length(self) -> int | None:
        """Tokens of a sequence, where a document is the inputs and the targets of one; None: documents are text."""
        recall = self.recipe["source"].get("recall")
        return recall["length"] if recall else None

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        write_json(folder / "manifest.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read manifest.json. Raises DataError if it is missing, cannot be read, or is malformed."""
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            started = (folder / "progress.json").exists()
            near = did_you_mean(folder.name, [other.parent.name for other in folder.parent.glob("*/manifest.json")])
            state = (
                "was not prepared to the end: run the same data/prepare.py command again"
                if started
                else f"holds no prepared data{near} To prepare it: "
                f"{shlex.join(['python', 'data/prepare.py', 'files', 'source.train=TEXT', f'path={folder}'])}"
            )
            raise DataError(f"{path} is missing: {folder} {state}") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; give the folder that was prepared") from error
        except (ValueError, RecursionError) as error:
            raise _malformed(path, str(error).splitlines()[0]) from error
        if not isinstance(values, dict) or "format" not in values:
            raise _malformed(path, "it has no format")
        if values["format"] != FORMAT:
            raise DataError(
                f"{path} has format {str(values['format'])[:20]}, this version reads {FORMAT}; delete {folder} and "
                "prepare it again"
            )
        try:
            return cls._checked(values)
        except ValueError as error:
            raise _malformed(path, str(error)) from error

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> "Manifest":
        """Build a manifest of plain data. Raises ValueError with what is wrong."""
        splits = {}
        for name, split in _object(values, "splits").items():
            shards = _object({name: split}, name).get("shards")
            if not isinstance(shards, list) or not shards:
                raise ValueError(f"split {name} has no list of shards")
            made = tuple(_record(Shard, shard, f"a shard of {name}") for shard in shards)
            splits[name] = _record(Split, {**split, "shards": made}, f"split {name}")
        recipe = _object(values, "recipe")
        for key in ("source", "tokenizer"):
            _object(recipe, key)
        if recipe["source"].get("recall"):
            recall = _object(recipe["source"], "recall")
            if type(recall.get("length")) is not int:
                raise ValueError("recall has no length")
            recall["pairs"] = as_numbers(recall.get("pairs"))  # the first such folders have text of the command line
        manifest: Manifest = _record(cls, {**values, "splits": splits, "recipe": dict.fromkeys(LIMITS) | recipe}, "it")
        if manifest.dtype not in ("<u2", "<u4"):
            raise ValueError(f"dtype {manifest.dtype[:20]!r}")
        if not manifest.end_of_text < manifest.vocab_size <= 2 ** (8 * np.dtype(manifest.dtype).itemsize):
            raise ValueError(f"end of text {manifest.end_of_text} in a vocabulary of {manifest.vocab_size}")
        files = [file for split in splits.values() for shard in split.shards for file in (shard.file, shard.offsets)]
        if any(Path(file).name != file or file in ("", "..") or "\0" in file for file in files):
            raise ValueError("a file outside of the folder")
        if len(set(files)) < len(files):
            raise ValueError("one file in two places")
        if not all(shard.tokens and shard.documents for split in splits.values() for shard in split.shards):
            raise ValueError("an empty shard")
        return manifest

    def check_tokenizer(self, folder: Path) -> None:
        """Raise DataError if the folder's tokenizer is not the one that made the shards."""
        for name, expected in (
            ("tokenizer.json", self.tokenizer_sha256),
            ("token_bytes.npy", self.token_bytes_sha256),
        ):
            try:
                found = sha256(folder / name)
            except FileNotFoundError:
                raise DataError(f"{folder / name} is missing; prepare the folder again") from None
            except OSError as error:
                raise DataError(f"cannot read {folder / name}: {error.strerror}") from error
            if found != expected:
                raise DataError(f"{folder / name} is not the one that the manifest describes; prepare the folder again")

    def token_bytes(self, folder: Path) -> np.ndarray:
        """UTF-8 bytes that each token stands for, [V], as of token_bytes.npy. Raises DataError if it is not that."""
        path = folder / "token_bytes.npy"
        sizes = _load_array(path)
        if sizes.shape != (self.vocab_size,) or sizes.dtype.kind not in "ui":
            raise DataError(f"{path} does not hold {self.vocab_size} whole numbers; prepare the folder again")
        return sizes


def text_bytes_of_tokens(
    token_bytes: np.ndarray, splits: Sequence[Split], weights: Sequence[float] = (1.0,)
) -> np.ndarray:
    """UTF-8 bytes of text that each token stands for, [V], for bits per byte of a mixture of `splits`.

    `token_bytes` as they are, int64, where they add up to the text, or an earlier version did not record whether they
    do. Else float64, scaled so that they add up to it: a tokenizer may add characters, or leave some out. Where no
    token stands for any text, each stands for its part of it.
    """
    weighted = list(zip(splits, weights, strict=True))
    text = sum(weight * split.bytes / split.tokens for split, weight in weighted)
    if any(split.token_text_bytes is None for split in splits):
        return token_bytes.astype(np.int64)
    counted = sum(weight * (split.token_text_bytes or 0) / split.tokens for split, weight in weighted)
    if text == counted:
        return token_bytes.astype(np.int64)
    if not counted:
        return np.full(len(token_bytes), text / sum(weights))
    scaled: np.ndarray = token_bytes * (text / counted)
    return scaled


def _malformed(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is not a manifest ({reason[:200]}); delete {path.parent} and prepare it again")


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """`values[key]`. Raises ValueError unless it is there and a JSON object."""
    if not isinstance(values.get(key), dict):
        raise ValueError(f"{key} is no object")
    value: dict[str, Any] = values[key]
    return value


def _record(cls: Any, values: Any, where: str) -> Any:
    """Build the dataclass `cls` of `values`. Raises ValueError on a missing or unknown key, or a value of another type.

    Numbers are whole, not negative, and fit 63 bits; checksums are 64 hexadecimal digits.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object")
    types = {item.name: item.type for item in fields(cls)}
    if unknown := sorted(values.keys() - types.keys()):
        raise ValueError(f"{where} has an unknown key {unknown[0][:40]}")
    try:
        record = cls(**values)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{where} lacks a key: {error}") from error
    for key, hint in types.items():
        value = getattr(record, key)
        if hint in (int, int | None) and value is not None:
            valid = type(value) is int and 0 <= value < 2**63
        elif key.endswith("sha256") or (key == "sources" and value is not None):
            valid = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
        else:
            valid = hint is not str or isinstance(value, str)
        if not valid or (value is None and hint in (int, str)):
            raise ValueError(f"{key} of {where} is {str(value)[:40]!r}")
    return record


class OpenFiles:
    """Shards that this process has open, at most OPEN_FILES of all folders together: those that were read last.

    Several threads read: each holds `lock` until it has read.
    """

    def __init__(self) -> None:
        self.lock = RLock()  # one that a finalizer can take, too, whatever it has interrupted
        self._recent: OrderedDict[tuple[int, int], Files] = OrderedDict()

    def open(self, files: "Files", shard: int, path: Path) -> tuple[int, int]:
        """Return the descriptor of a shard and the time of its last change when it was opened. `files` are those that
        its TokenWindows has open."""
        key = id(files), shard
        if shard in files:
            self._recent.move_to_end(key)
            return files[shard]
        while len(self._recent) >= OPEN_FILES:
            (_, oldest), others = self._recent.popitem(last=False)
            os.close(others.pop(oldest)[0])
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        files[shard], self._recent[key] = (file, os.fstat(file).st_mtime_ns), files
        return files[shard]

    def close(self, files: "Files") -> None:
        with self.lock:
            for shard, (file, _) in files.items():
                del self._recent[id(files), shard]
                os.close(file)
            files.clear()


Files = dict[int, tuple[int, int]]  # shard -> file descriptor, time of last change
OPEN = OpenFiles()


class TokenWindows:
    """Windows of `seq_len` + 1 consecutive tokens of one split, each read from disk when it is indexed.

    Consecutive windows overlap by one token, the last target of one and the first input of the next, so every token of
    a shard except the first is a target exactly once. An incomplete last window of a shard is dropped.

    Where documents are sequences with answers (`Manifest.row_length`), a window is one of them: `seq_len` inputs, and
    as many targets, 0 if nothing is asked.

    Raises DataError if a file does not match the manifest, unless `check` is false: another process has compared them.
    Also on reading a file that was deleted or changed in the meantime: a memory map would return garbage or kill the
    process.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, seq_len: int, check: bool = True):
        if split not in manifest.splits:
            raise DataError(f"{folder} has no split {split}; it has {', '.join(manifest.splits)}")
        self.seq_len, self.end_of_text = seq_len, manifest.end_of_text
        self.dtype, self.vocab_size = np.dtype(manifest.dtype), manifest.vocab_size
        self.folder, self.shards = folder, manifest.splits[split].shards
        self.files = [(folder / shard.file, shard.tokens * self.dtype.itemsize) for shard in self.shards]
        self._open: Files = {}
        weakref.finalize(self, OPEN.close, self._open)
        self.has_answers = manifest.row_length is not None
        if manifest.row_length not in (None, seq_len):
            raise DataError(
                f"{folder} holds sequences of {manifest.row_length} tokens; set size.seq_len={manifest.row_length}, or "
                "in a task a window of as many"
            )
        self.stride, self.taken = (2 * seq_len + 1, 2 * seq_len) if self.has_answers else (seq_len, seq_len + 1)
        counts = [max(0, shard.tokens - self.taken + self.stride) // self.stride for shard in self.shards]
        self.starts = np.cumsum([0, *counts])
        if check:
            self.check()
        if len(self) == 0:
            raise DataError(
                f"{folder}: no shard of split {split} holds {seq_len + 1} tokens, one window at seq_len {seq_len}; "
                "use a shorter seq_len or more text"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._read(shard, (index - int(self.starts[shard])) * self.stride, self.taken)

    def _read(self, shard: int, begin: int, tokens: int) -> np.ndarray:
        path, size = self.files[shard]
        try:
            with OPEN.lock:
                file, changed = OPEN.open(self._open, shard, path)
                state = os.fstat(file)
                raw = self._tokens_at(file, begin, tokens)
        except OSError as error:
            raise _unreadable(path, error) from error
        if state.st_nlink == 0 or state.st_size != size or state.st_mtime_ns != changed:
            what = "deleted" if state.st_nlink == 0 else "changed"
            raise DataError(f"{path} was {what} while in use; put it back and resume the run, or prepare it again")
        return self._checked(path, begin, raw)

    def _tokens_at(self, file: int, begin: int, tokens: int) -> np.ndarray:
        return np.frombuffer(os.pread(file, tokens * self.dtype.itemsize, begin * self.dtype.itemsize), self.dtype)

    def _checked(self, path: Path, begin: int, read: np.ndarray) -> np.ndarray:
        """Return tokens of `path` from `begin` on. Raises DataError if one is none of the vocabulary."""
        if len(read) and read.max() >= self.vocab_size:
            raise DataError(
                f"{path} is altered: position {begin + int(read.argmax())} has token {read.max()} in a vocabulary of "
                f"{self.vocab_size}; put the file back, or prepare the folder again"
            )
        return read

    def check(self) -> None:
        """Check sizes, offsets, the final end of text and a few tokens, without reading whole shards; several shards at
        a time, because a network file system takes its time for each. Raises DataError that names the first file which
        is not what the manifest says.
        """
        with ThreadPoolExecutor(min(THREADS, len(self.shards))) as pool:
            found = pool.map(self._check, range(len(self.shards)))
            try:
                for _ in found:
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _check(self, number: int) -> None:
        (path, size), shard = self.files[number], self.shards[number]
        count = min(shard.tokens, 1024)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                state = os.fstat(file)
                if not stat.S_ISREG(state.st_mode):
                    raise FileNotFoundError
                if state.st_size != size:
                    raise DataError(f"{path} has {state.st_size} bytes, its manifest says {size}; prepare it again")
                for begin in (0, (shard.tokens - count) // 2):
                    self._checked(path, begin, self._tokens_at(file, begin, count))
                last = self._tokens_at(file, shard.tokens - 1, 1)[0]
            finally:
                os.close(file)
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise _unreadable(path, error) from error
        if last != self.end_of_text:
            raise DataError(f"{path} is altered: its last token is not the end of text; prepare the folder again")
        count, first, end = offset_ends(self.folder / shard.offsets)
        if count != shard.documents or first != 0 or end >= shard.tokens:
            raise DataError(f"{self.folder / shard.offsets} does not fit {path}; prepare it again")


def _missing(path: Path) -> DataError:
    return DataError(f"{path} is named by the manifest and is not there; prepare the folder again")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}; put it back, or prepare the folder again")


def read_offsets(path: Path) -> np.ndarray:
    """Memory-map the offsets, int64 [documents]. Raises DataError if the file is not complete."""
    offsets = _load_array(path)
    _check_offsets(path, offsets.shape, offsets.dtype)
    return offsets


def offset_ends(path: Path) -> tuple[int, int, int]:
    """Read the number of offsets, the first and the last, with one opening of the file, where numpy's map takes three.

    Raises DataError if the file is not there or not complete.
    """
    try:
        file = path.open("rb", buffering=256)  # the header of np.save has 128 bytes
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    with file, _array_errors(path):
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is not as prepare.py writes it")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        _check_offsets(path, shape, dtype)
        raw = file.read(8)
        file.seek(8 * (shape[0] - 2), os.SEEK_CUR)
        raw += file.read(9)
        if len(raw) != 16:
            raise ValueError("its length is not that of its header")
    first, last = np.frombuffer(raw, np.int64).tolist()
    return shape[0], first, last


def _check_offsets(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 1 or dtype != np.int64 or shape[0] == 0:
        raise DataError(f"{path} holds no offsets; prepare the folder again")


@contextmanager
def _array_errors(path: Path) -> Iterator[None]:
    """Raise DataError if a .npy file cannot be read or is not one."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # numpy parses the header as Python source: SyntaxError, TokenError, RecursionError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{path} is altered or cut short ({reason}); prepare the folder again") from error


def _load_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file. Raises DataError if it is not one."""
    with _array_errors(path):
        array: np.ndarray = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):  # an archive of several
        raise DataError(f"{path} is altered: it holds no array; prepare the folder again")
    return array
