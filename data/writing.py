"""A folder of shards while it is written: its progress file, the writer of its shards, and its lock."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from .cli import value_text
from .config import SPLITS
from .files import DataError, sha256, sync_folder, write_json
from .shards import CHUNK, Shard
from .source_record import SOURCES
from .sources import Position

LOCK = "prepare.lock"
PROGRESS = "progress.json"
INITIAL_FILES = {LOCK, SOURCES, "tokenizer.json", "token_bytes.npy"}


@dataclass
class SplitProgress:
    """Finished shards of a split, and totals that include the shard being written.

    token_text_bytes  bytes that the tokens stand for: those of the text, unless the tokenizer changes text
    full              the split has reached its limit
    """

    shards: list[Shard] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    token_text_bytes: int = 0
    full: bool = False

    def unfinished(self, name: str) -> int:
        """`tokens`, `documents` or `bytes` of the shard being written."""
        return int(getattr(self, name) - sum(getattr(shard, name) for shard in self.shards))


@dataclass
class Progress:
    """State of an interrupted preparation, in `progress.json`: all that resuming needs beside the shards.

    inputs   recipe; resuming with another would mix data
    sources  SHA-256 of sources.jsonl; of an earlier version, [split, name, size] of each source
    """

    inputs: dict[str, Any]
    position: Position
    splits: dict[str, SplitProgress]
    sources: str | list[Any] | None = None

    def save(self, folder: Path) -> None:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        for split in splits.values():  # the names of earlier versions, whose preparations can be resumed
            split["covered"] = split.pop("token_text_bytes")
        asked = self.inputs if self.sources is None else self.inputs | {"files": self.sources}
        write_json(folder / PROGRESS, {"asked": asked, "position": list(self.position), "splits": splits})

    @classmethod
    def load(cls, folder: Path, inputs: dict[str, Any], splits: list[str]) -> "Progress":
        """Read the progress of `folder`, or start over if no token was written.

        Raises DataError if the folder was begun with other inputs, holds foreign files, or its progress is damaged.
        """
        path = folder / PROGRESS
        new = cls(inputs, Position(), {split: SplitProgress() for split in splits})
        if not path.exists():
            _refuse_foreign_files(folder)
            return new
        try:
            values = json.loads(path.read_text())
            asked, sources = dict(values["asked"]), values["asked"].get("files")
            asked.pop("files", None)
            for split in values["splits"].values():
                split["token_text_bytes"] = split.pop("covered")
                split["shards"] = [Shard(**shard) for shard in split["shards"]]
            progress = {name: SplitProgress(**split) for name, split in values["splits"].items()}
            position = Position(*values["position"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error!r}); delete {folder} and start over") from error
        if asked != json.loads(json.dumps(inputs)):
            if not any(split.tokens for split in progress.values()):
                discard(folder)
                return new
            raise DataError(
                f"{folder} was begun with {differences(asked, inputs)}; run that command again, delete the folder, or "
                "give another with path="
            )
        return cls(inputs, position, progress, sources)


class SplitWriter:
    """Appends documents to the shards of one split, after those that `progress` counts.

    Raises DataError if a shard is not as it was written.
    """

    def __init__(self, folder: Path, split: str, progress: SplitProgress, end: int, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.progress = folder, split, progress
        self.end, self.dtype, self.shard_tokens = end, dtype, shard_tokens
        for shard in progress.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.tokens * dtype.itemsize:
                raise DataError(f"{path} was finished and is altered; delete {folder} and start over")
        self.tokens = progress.unfinished("tokens")
        self.file = self.path.open("r+b" if self.tokens else "wb")
        size = self.tokens * dtype.itemsize
        if self.path.stat().st_size < size:
            raise DataError(f"{self.path} is shorter than what was written; delete {folder} and start over")
        self.file.truncate(size)
        self.file.seek(size)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.progress.shards):05d}.bin"

    def add(self, tokens: np.ndarray, text_bytes: int, token_text_bytes: int) -> bool:
        """Append a document; return True if it begins a new shard."""
        begins = self.tokens > 0 and self.tokens + len(tokens) > self.shard_tokens
        if begins:
            self.finish()
            self.file = self.path.open("wb")
        self.file.write(tokens.data)
        self.tokens += len(tokens)
        self.progress.tokens += len(tokens)
        self.progress.documents += 1
        self.progress.bytes += text_bytes
        self.progress.token_text_bytes += token_text_bytes
        return begins

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Close the shard and write its offsets, which follow from the end-of-text tokens."""
        self.sync()
        self.file.close()
        tokens = np.memmap(self.path, self.dtype, mode="r")
        found = [np.flatnonzero(tokens[at : at + CHUNK] == self.end) + at for at in range(0, len(tokens), CHUNK)]
        ends = np.concatenate(found)
        assert len(ends) == self.progress.unfinished("documents") and ends[-1] == self.tokens - 1
        offsets = self.path.with_suffix(".offsets.npy")
        with offsets.open("wb") as file:
            np.save(file, np.concatenate([[0], ends[:-1] + 1]).astype(np.int64))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)  # before the progress file or the manifest names them
        self.progress.shards.append(
            Shard(
                file=self.path.name,
                tokens=self.tokens,
                documents=len(ends),
                bytes=self.progress.unfinished("bytes"),
                sha256=sha256(self.path),
                offsets=offsets.name,
                offsets_sha256=sha256(offsets),
            )
        )
        self.tokens = 0


def discard(folder: Path) -> None:
    """Delete what an unfinished preparation wrote, so that the next one begins anew."""
    write_json(folder / PROGRESS, {"asked": {}, "position": [], "splits": {}})  # kept to the end: files are ours by it
    for split in SPLITS:
        for path in folder.glob(f"{split}-[0-9]*"):
            if re.fullmatch(rf"{split}-\d{{5,}}(\.offsets\.npy|\.bin)", path.name):
                path.unlink()
    for name in (SOURCES, "tokenizer.json", "token_bytes.npy", PROGRESS):
        (folder / name).unlink(missing_ok=True)


def _refuse_foreign_files(folder: Path) -> None:
    """Raise DataError if `folder` holds anything but the first files of a preparation."""
    others = {file.name for file in folder.iterdir() if file.suffix != ".partial"} - INITIAL_FILES
    if others:
        raise DataError(f"{folder} holds {min(others)}, which is not ours; give an empty folder with path=")


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make the folder if needed and lock it, after waiting for another process that writes it.

    The lock of a process that dies is released. Raises DataError if the folder holds foreign files, and writes nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LOCK).exists():
        _refuse_foreign_files(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is preparing {folder}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def differences(recorded: dict[str, Any], requested: dict[str, Any]) -> str:
    """Describe what differs between two recipes: `source.train=a instead of b, ...`"""
    changes = []

    def compare(prefix: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                compare(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
        elif old != new:
            changes.append(f"{prefix}={value_text(old)} instead of {value_text(new)}")

    compare("", recorded, json.loads(json.dumps(requested)))
    return ", ".join(changes)
