"""Token shards: a folder of raw little-endian integers and the manifest that describes them.

manifest.json            counts, checksums, recipe; written last, so a folder that has one is complete
tokenizer.json           the tokenizer in the format of `tokenizers`
token_bytes.npy          [V] UTF-8 bytes that each token stands for, for bits per byte
train-00000.bin ...      consecutive documents, each ended by the end-of-text token, which occurs nowhere else
train-00000.offsets.npy  [documents] start of each document in the shard, in tokens
"""

import hashlib
import json
import os
import weakref
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError, sha256, write_json

FORMAT = 2
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
    """Totals of a split: `bytes` of text, `documents`, and `tokens`, which include one end of text per document."""

    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """Description of a complete folder. `recipe` is PrepareConfig.recipe of its preparation."""

    format: int
    name: str
    recipe: dict[str, Any]
    tokenizer_sha256: str
    token_bytes_sha256: str
    vocab_size: int
    end_of_text: int
    dtype: str
    splits: dict[str, Split]

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
        """Read manifest.json. Raises DataError if it is missing or malformed."""
        path = folder / "manifest.json"
        if not path.exists():
            started = (folder / "progress.json").exists()
            state = "was not prepared to the end: run the same data/prepare.py command again" if started else ""
            raise DataError(f"{path} is missing: {folder} {state or 'holds no prepared data; run data/prepare.py'}")
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {values['format']}, this version reads {FORMAT}; delete {folder} and prepare "
                    "it again"
                )
            values["splits"] = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in values["splits"].items()
            }
            manifest = cls(**values)
            inside = all(
                Path(file).name == file and file not in ("", "..")
                for split in manifest.splits.values()
                for shard in split.shards
                for file in (shard.file, shard.offsets)
            )
            if not inside or manifest.dtype not in ("<u2", "<u4"):
                raise KeyError("a file outside of the folder" if not inside else f"dtype {manifest.dtype}")
            return manifest
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a manifest ({error!r}); delete {folder} and prepare it again") from error

    def check_tokenizer(self, folder: Path) -> None:
        """Raises DataError if the folder's tokenizer is not the one that made the shards."""
        for name, expected in (
            ("tokenizer.json", self.tokenizer_sha256),
            ("token_bytes.npy", self.token_bytes_sha256),
        ):
            if not (folder / name).is_file():
                raise DataError(f"{folder / name} is missing; prepare the folder again")
            if sha256(folder / name) != expected:
                raise DataError(f"{folder / name} is not the one that the manifest describes; prepare the folder again")


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
        self.dtype = np.dtype(manifest.dtype)
        self.files = [
            (folder / shard.file, shard.tokens * self.dtype.itemsize) for shard in manifest.splits[split].shards
        ]
        self._open: OrderedDict[int, tuple[int, int]] = OrderedDict()  # shard -> file descriptor, time of last change
        weakref.finalize(self, _close, self._open)
        counts = [max(0, shard.tokens - 1) // seq_len for shard in manifest.splits[split].shards]
        self.starts = np.cumsum([0, *counts])
        for number, shard in enumerate(manifest.splits[split].shards):
            self._check(folder, number, shard, manifest.vocab_size)
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
        return np.frombuffer(raw, self.dtype)

    def _open_shard(self, shard: int) -> tuple[int, int]:
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1][0])
        file = os.open(self.files[shard][0], os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = file, os.fstat(file).st_mtime_ns
        return self._open[shard]

    def _check(self, folder: Path, number: int, shard: Shard, vocab_size: int) -> None:
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
        tokens = np.concatenate([self._read(number, begin, count) for begin in (0, (shard.tokens - count) // 2)])
        last = self._read(number, shard.tokens - 1, 1)
        if tokens.max() >= vocab_size or last[0] != self.end_of_text:
            raise DataError(f"{path} is altered: tokens are not those of its tokenizer; prepare it again")


def read_offsets(path: Path) -> np.ndarray:
    """Memory-map the offsets, int64 [documents]. Raises DataError if the file is not complete."""
    try:
        offsets: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is altered or cut short ({error}); prepare the folder again") from error
    if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
        raise DataError(f"{path} holds no offsets; prepare the folder again")
    return offsets


def _close(files: OrderedDict[int, tuple[int, int]]) -> None:
    for file, _ in files.values():
        os.close(file)
    files.clear()
