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
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .config import LIMITS
from .files import DataError, sha256, write_json

FORMAT = 2
CHUNK = 2**24  # tokens of a shard that are looked at together
OPEN_FILES = 256  # many systems allow a process 1024


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
            state = "was not prepared to the end: run the same data/prepare.py command again" if started else ""
            raise DataError(
                f"{path} is missing: {folder} {state or 'holds no prepared data; run data/prepare.py'}"
            ) from None
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
        """Raises DataError if the folder's tokenizer is not the one that made the shards."""
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


class TokenWindows:
    """Windows of `seq_len` + 1 consecutive tokens of one split, each read from disk when it is indexed.

    Consecutive windows overlap by one token, the last target of one and the first input of the next, so every token of
    a shard except the first is a target exactly once. An incomplete last window of a shard is dropped.

    Raises DataError if a file does not match the manifest, and on reading a file that was deleted or changed in the
    meantime: a memory map would return garbage or kill the process.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, seq_len: int):
        if split not in manifest.splits:
            raise DataError(f"{folder} has no split {split}; it has {', '.join(manifest.splits)}")
        self.seq_len, self.end_of_text = seq_len, manifest.end_of_text
        self.dtype, self.vocab_size = np.dtype(manifest.dtype), manifest.vocab_size
        self.files = [
            (folder / shard.file, shard.tokens * self.dtype.itemsize) for shard in manifest.splits[split].shards
        ]
        self._open: OrderedDict[int, tuple[int, int]] = OrderedDict()  # shard -> file descriptor, time of last change
        weakref.finalize(self, _close, self._open)
        counts = [max(0, shard.tokens - 1) // seq_len for shard in manifest.splits[split].shards]
        self.starts = np.cumsum([0, *counts])
        for number, shard in enumerate(manifest.splits[split].shards):
            self._check(folder, number, shard)
        if len(self) == 0:
            raise DataError(
                f"{folder}: no shard of split {split} holds {seq_len + 1} tokens, one window at seq_len {seq_len}; "
                "use a shorter seq_len or more text"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._read(shard, (index - int(self.starts[shard])) * self.seq_len, self.seq_len + 1)

    def _read(self, shard: int, begin: int, tokens: int) -> np.ndarray:
        path, size = self.files[shard]
        try:
            file, changed = self._open[shard] if shard in self._open else self._open_shard(shard)
            state = os.fstat(file)
            raw = os.pread(file, tokens * self.dtype.itemsize, begin * self.dtype.itemsize)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror}; put it back, or prepare the folder again"
            ) from error
        if state.st_nlink == 0 or state.st_size != size or state.st_mtime_ns != changed:
            what = "deleted" if state.st_nlink == 0 else "changed"
            raise DataError(f"{path} was {what} while in use; put it back and resume the run, or prepare it again")
        read = np.frombuffer(raw, self.dtype)
        if len(read) and read.max() >= self.vocab_size:
            raise DataError(
                f"{path} is altered: position {begin + int(read.argmax())} has token {read.max()} in a vocabulary of "
                f"{self.vocab_size}; put the file back, or prepare the folder again"
            )
        return read

    def _open_shard(self, shard: int) -> tuple[int, int]:
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1][0])
        file = os.open(self.files[shard][0], os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = file, os.fstat(file).st_mtime_ns
        return self._open[shard]

    def _check(self, folder: Path, number: int, shard: Shard) -> None:
        """Check sizes, offsets, the final end of text and a few tokens, without reading the whole shard."""
        path, size = self.files[number]
        for file in (path, folder / shard.offsets):
            if not file.is_file():
                raise DataError(f"{file} is named by the manifest and is not there; prepare the folder again")
        if path.stat().st_size != size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, its manifest says {size}; prepare it again")
        offsets = read_offsets(folder / shard.offsets)
        if len(offsets) != shard.documents or offsets[0] != 0 or offsets[-1] >= shard.tokens:
            raise DataError(f"{folder / shard.offsets} does not fit {path}; prepare it again")
        count = min(shard.tokens, 1024)
        for begin in (0, (shard.tokens - count) // 2):
            self._read(number, begin, count)
        if self._read(number, shard.tokens - 1, 1)[0] != self.end_of_text:
            raise DataError(f"{path} is altered: its last token is not the end of text; prepare the folder again")


def read_offsets(path: Path) -> np.ndarray:
    """Memory-map the offsets, int64 [documents]. Raises DataError if the file is not complete."""
    offsets = _load_array(path)
    if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
        raise DataError(f"{path} holds no offsets; prepare the folder again")
    return offsets


def _load_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file. Raises DataError if it is none."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; put it back, or prepare the folder again") from error
    except Exception as error:  # numpy parses the header as Python source: SyntaxError, TokenError, RecursionError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{path} is altered or cut short ({reason}); prepare the folder again") from error
    if not isinstance(array, np.ndarray):  # an archive of several
        raise DataError(f"{path} is altered: it holds no array; prepare the folder again")
    return array


def _close(files: OrderedDict[int, tuple[int, int]]) -> None:
    for file, _ in files.values():
        os.close(file)
    files.clear()
