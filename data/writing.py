"""A folder of shards while it is written: what is on disk, where the text goes on, and one process at a time."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from .files import DataError, sha256, write_json
from .shards import Shard
from .sources import Position

LOCK = "prepare.lock"
PROGRESS = "progress.json"
BEFORE_PROGRESS = {LOCK, "tokenizer.json", "token_bytes.npy"}


@dataclass
class Written:
    """What of a split is on disk: whole shards, and counts that include the one that is being written.

    covered  bytes that the tokens stand for: the text's bytes unless the tokenizer changes text
    full     the split has reached its limit
    """

    shards: list[Shard] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    covered: int = 0
    full: bool = False

    def unfinished(self, name: str) -> int:
        """`tokens`, `documents` or `bytes` of the shard that is being written."""
        return int(getattr(self, name) - sum(getattr(shard, name) for shard in self.shards))


@dataclass
class Progress:
    """`progress.json`: a prepared folder is this plus what is still to come, however often it was interrupted.

    asked  recipe and source; going on with others would mix data
    """

    asked: dict[str, Any]
    position: Position
    splits: dict[str, Written]

    def save(self, folder: Path) -> None:
        write_json(folder / PROGRESS, asdict(self) | {"position": list(self.position)})

    @classmethod
    def load(cls, folder: Path, asked: dict[str, Any], splits: list[str]) -> "Progress":
        """That of `folder`, or a new one. Raises DataError where the folder holds something else."""
        path = folder / PROGRESS
        if not path.exists():
            _refuse_others(folder)
            return cls(asked, Position(), {split: Written() for split in splits})
        values = json.loads(path.read_text())
        if values["asked"] != json.loads(json.dumps(asked)):
            if not any(split["tokens"] for split in values["splits"].values()):
                path.unlink()
                return cls(asked, Position(), {split: Written() for split in splits})
            raise DataError(
                f"{folder} was begun with {differences(values['asked'], asked)}; run that command again, delete the "
                "folder, or give another with path="
            )
        written = {
            name: Written(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in values["splits"].items()
        }
        return cls(asked, Position(*values["position"]), written)


class SplitWriter:
    """Appends documents to the shards of one split; continues after what `written` says."""

    def __init__(self, folder: Path, split: str, written: Written, end: int, dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.written = folder, split, written
        self.end, self.dtype, self.shard_tokens = end, dtype, shard_tokens
        for shard in written.shards:
            if (
                not (folder / shard.file).is_file()
                or (folder / shard.file).stat().st_size != shard.tokens * dtype.itemsize
            ):
                raise DataError(f"{folder / shard.file} was finished and is altered; delete {folder} and begin anew")
        self.tokens = written.unfinished("tokens")
        self.file = self.path.open("r+b" if self.tokens else "wb")
        size = self.tokens * dtype.itemsize
        if self.path.stat().st_size < size:
            raise DataError(f"{self.path} is shorter than what was written; delete {folder} and begin anew")
        self.file.truncate(size)
        self.file.seek(size)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.written.shards):05d}.bin"

    def add(self, tokens: np.ndarray, text_bytes: int, covered: int) -> bool:
        """Append a document; True if it begins a new shard."""
        begins = self.tokens > 0 and self.tokens + len(tokens) > self.shard_tokens
        if begins:
            self.finish()
            self.file = self.path.open("wb")
        self.file.write(tokens.tobytes())
        self.tokens += len(tokens)
        self.written.tokens += len(tokens)
        self.written.documents += 1
        self.written.bytes += text_bytes
        self.written.covered += covered
        return begins

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Close the shard; where documents begin follows from where they end."""
        written = self.written
        self.sync()
        self.file.close()
        ends = np.flatnonzero(np.memmap(self.path, self.dtype, mode="r") == self.end)
        assert len(ends) == written.unfinished("documents") and ends[-1] == self.tokens - 1
        offsets = self.path.with_suffix(".offsets.npy")
        with offsets.open("wb") as file:
            np.save(file, np.concatenate([[0], ends[:-1] + 1]).astype(np.int64))
            file.flush()
            os.fsync(file.fileno())
        written.shards.append(
            Shard(
                file=self.path.name,
                tokens=self.tokens,
                documents=len(ends),
                bytes=written.unfinished("bytes"),
                sha256=sha256(self.path),
                offsets=offsets.name,
                offsets_sha256=sha256(offsets),
            )
        )
        self.tokens = 0


def _refuse_others(folder: Path) -> None:
    """Raises DataError where `folder` holds what no preparation that has only begun leaves there."""
    others = {file.name for file in folder.iterdir() if file.suffix != ".partial"} - BEFORE_PROGRESS
    if others:
        raise DataError(f"{folder} holds {min(others)}, which is not ours; give an empty folder with path=")


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Waits for another process that writes the folder. A process that dies leaves no lock.

    Raises DataError, and leaves nothing, where the folder is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / LOCK).exists():
        _refuse_others(folder)
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


def differences(ours: dict[str, Any], asked: dict[str, Any]) -> str:
    """`source.train=a instead of b, ...`"""
    found = []

    def compare(prefix: str, old: Any, new: Any) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                compare(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
        elif old != new:
            found.append("other source files" if prefix == "files" else f"{prefix}={old} instead of {new}")

    compare("", ours, json.loads(json.dumps(asked)))
    return ", ".join(found)
