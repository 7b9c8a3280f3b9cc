"""The record of what a folder was prepared from, sources.jsonl, and the changes of the sources since then."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .files import DataError, rename, sha256

SOURCES = "sources.jsonl"
WHOLE = 2**24  # bytes; of a larger file BLOCKS of BLOCK bytes each are hashed
BLOCKS, BLOCK = 64, 2**16
MAX_NAMED = 3


class SourceState(NamedTuple):
    """A source as it was read.

    For a file: size in bytes, time of the last write, time of the last change of any kind (which also tells of an edit
    whose time of writing was put back), and a hash of its content: of all of it up to WHOLE bytes, else of BLOCKS
    blocks spread evenly over it, the first and the last included. For a corpus, the hash of its text. For a data set
    of the hub, its commit, if the hub tells.
    """

    split: str
    name: str
    size: int | None = None
    written_ns: int | None = None
    changed_ns: int | None = None
    digest: str | None = None


def state_of_file(split: str, name: str, digest: bool = True) -> SourceState:
    stat = os.stat(name)
    content = _digest(Path(name), stat.st_size) if digest else None
    return SourceState(split, name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, content)


def save(folder: Path, states: Iterable[SourceState]) -> str:
    """Write the record, one line per source, and return its SHA-256."""
    partial, path = folder / f"{SOURCES}.partial", folder / SOURCES
    with partial.open("w") as file:
        file.writelines(json.dumps(state) + "\n" for state in states)
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)
    return sha256(path)


def load(folder: Path, checksum: str) -> list[SourceState]:
    """Read the record. Raises DataError if it is not the one with this SHA-256."""
    path = folder / SOURCES
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != checksum:
            raise DataError(f"{path} is altered; put it back, or delete {folder} and prepare it again")
        return [SourceState(*json.loads(line)) for line in raw.splitlines()]
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; put it back, or delete {folder} and prepare it again"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no record of sources; delete {folder} and prepare it again") from error


def changes(recorded: list[SourceState], current: list[SourceState]) -> str:
    """Describe what became new, missing or changed; empty if nothing did. `current` needs no digests.

    A file of another size is changed. One of the same size and times is not. Otherwise its content decides: a file up
    to WHOLE bytes that holds what it held is unchanged, whatever its times. A larger one is changed if it was written
    at another time, or one of its hashed blocks differs: an edit between these blocks that keeps the size and puts the
    time of writing back is not noticed.
    """
    before = {(state.split, state.name): state for state in recorded}
    now = {(state.split, state.name): state for state in current}
    groups = {
        "changed": [key[1] for key in now if key in before and _changed(before[key], now[key])],
        "new": [key[1] for key in now if key not in before],
        "missing": [key[1] for key in before if key not in now],
    }
    return "; ".join(f"{word} {_named(names)}" for word, names in groups.items() if names)


def changes_since_earlier_version(recorded: list[Any], current: list[SourceState]) -> str:
    """The same for the record of an earlier version, [split, name, size] of each source."""
    before = [SourceState(*entry) for entry in recorded]
    sizes = [SourceState(state.split, state.name, state.size) for state in current]
    return changes(before, sizes)


def same_content(states: Iterable[SourceState]) -> list[tuple[SourceState, SourceState]]:
    """Pairs of files of two splits that hold the same, as far as their hashes tell; empty files hold nothing."""
    first: dict[tuple[int, str], SourceState] = {}
    pairs = []
    for state in states:
        if state.size and state.digest:
            other = first.setdefault((state.size, state.digest), state)
            if other.split != state.split:
                pairs.append((other, state))
    return pairs


def _changed(before: SourceState, now: SourceState) -> bool:
    if before.size is None or now.size is None:
        return before.size != now.size or (None not in (before.digest, now.digest) and before.digest != now.digest)
    if before.size != now.size:
        return True
    if before.digest is None or (before.written_ns, before.changed_ns) == (now.written_ns, now.changed_ns):
        return False
    if now.size > WHOLE and before.written_ns != now.written_ns:
        return True
    return before.digest != _digest(Path(now.name), now.size)


def _digest(path: Path, size: int) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE:
            hashed.update(file.read(WHOLE + 1))
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
