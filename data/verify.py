"""Comparison of a prepared folder with its manifest: of every file at any time, of the shards once per machine."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from . import source_record
from .cores import cores
from .files import DataError, sha256, write_json
from .shards import CHUNK, THREADS, Manifest, Shard, read_offsets

SMALL = 2**26  # bytes; a folder below this is hashed every time, in a fraction of a second, and has no stamp
LINE_SECONDS = 10
SPLITS = ("train", "val")  # that a run reads


def verify_once(
    folder: Path,
    manifest: Manifest,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> None:
    """Compare the checksum of every shard of SPLITS with the manifest, unless this machine has done so before.

    A stamp in the user's cache, $XDG_CACHE_HOME/kvfrontier or ~/.cache/kvfrontier, keeps what was found right: a shard
    whose inode, size and times are still those of the stamp is not read again. `say` gets a line at the start and
    every LINE_SECONDS while a large folder is read; where the stamp cannot be written, a line too, and nothing fails.

    Raises DataError that names the first shard which is not what the manifest says, or cannot be read.
    """
    shards = [shard for name in SPLITS if name in manifest.splits for shard in manifest.splits[name].shards]
    stamp = _stamp_file(folder)
    states = {shard.file: _state(folder / shard.file, shard) for shard in shards}
    verified = _read_stamp(stamp) if sum(state[1] for state in states.values()) > SMALL else {}
    unread = [shard for shard in shards if verified.get(shard.file) != states[shard.file]]
    total = sum(states[shard.file][1] for shard in unread)
    if total > SMALL:
        say(f"comparing {len(unread)} shards of {folder} ({total / 1e9:.1f} GB) with their checksums, once")
    done, said_at = 0, time.monotonic()
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        found = {pool.submit(_checksum, folder / shard.file): shard for shard in unread}
        try:
            for future in as_completed(found):
                shard = found[future]
                if future.result() != shard.sha256:
                    raise DataError(
                        f"{folder / shard.file} is altered: its checksum is not that of the manifest; put the file "
                        f"back, or prepare the folder again (data/prepare.py verify={folder} lists all differences)"
                    )
                verified[shard.file] = states[shard.file]
                done += states[shard.file][1]
                if time.monotonic() - said_at > LINE_SECONDS:
                    said_at = time.monotonic()
                    say(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB compared")
                    _write_stamp(stamp, verified)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if total > SMALL and (problem := _write_stamp(stamp, verified)):
        say(f"cannot write {stamp} ({problem}): the next run compares the shards again")


def _stamp_file(folder: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    return Path(cache) / "kvfrontier" / "verified" / f"{name[:32]}.json"


def _state(path: Path, shard: Shard) -> list[Any]:
    """[checksum expected, size, inode, time of the last write, time of the last change of any kind]."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; put it back, or prepare the folder again") from error
    return [shard.sha256, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _checksum(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; put it back, or prepare the folder again") from error


def _read_stamp(path: Path) -> dict[str, list[Any]]:
    """Read what was found right before; nothing where there is no stamp or it cannot be used."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_stamp(path: Path, verified: dict[str, list[Any]]) -> str | None:
    """Write the stamp; return what went wrong, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, verified)
    except OSError as error:
        return error.strerror or str(error)
    return None


def verify(folder: Path) -> str:
    """Compare every file with the manifest and return a line of success. Raises DataError listing all differences."""
    manifest = Manifest.load(folder)
    errors = []
    try:
        manifest.check_tokenizer(folder)
    except DataError as error:
        errors.append(str(error))
    if manifest.sources is not None:
        try:
            source_record.load(folder, manifest.sources)
        except DataError as error:
            errors.append(str(error))
    hashes: dict[str, str] = {}
    shards = 0
    for name, split in manifest.splits.items():
        for shard in split.shards:
            if hashes.setdefault(shard.sha256, name) != name:
                errors.append(f"{folder / shard.file} of {name} holds what a shard of {hashes[shard.sha256]} holds")
            errors += _shard_errors(folder, shard, manifest)
            shards += 1
        for count in ("tokens", "documents", "bytes"):
            total = sum(getattr(shard, count) for shard in split.shards)
            if total != getattr(split, count):
                errors.append(
                    f"{folder / 'manifest.json'}: {name} has {getattr(split, count)} {count}, its shards {total}"
                )
    if errors:
        raise DataError("\n".join(errors))
    return f"{folder}: tokenizer and {shards} shards are what the manifest says"


def _shard_errors(folder: Path, shard: Shard, manifest: Manifest) -> Iterator[str]:
    path, offsets = folder / shard.file, folder / shard.offsets
    missing = [file for file in (path, offsets) if not file.is_file()]
    if missing:
        yield from (f"{file} is missing" for file in missing)
        return
    size = shard.tokens * np.dtype(manifest.dtype).itemsize
    if path.stat().st_size != size:
        yield f"{path} has {path.stat().st_size} bytes instead of {size}"
        return
    try:
        expected = {path: shard.sha256, offsets: shard.offsets_sha256}
        altered = [file for file, digest in expected.items() if _checksum(file) != digest]
    except DataError as error:
        yield str(error)
        return
    yield from (f"{file} is altered: its checksum is not that of the manifest" for file in altered)
    tokens = np.memmap(path, manifest.dtype, mode="r")
    ends = []
    for begin in range(0, len(tokens), CHUNK):
        chunk = tokens[begin : begin + CHUNK]
        if chunk.max() >= manifest.vocab_size:
            yield f"{path} has token {chunk.max()} in a vocabulary of {manifest.vocab_size}"
            return
        ends.append(np.flatnonzero(chunk == manifest.end_of_text) + begin)
    starts = np.concatenate([[0], np.concatenate(ends)[:-1] + 1])
    try:
        if not np.array_equal(read_offsets(offsets), starts) or len(starts) != shard.documents:
            yield f"{offsets} does not say where the documents of {path} begin"
    except DataError as error:
        yield str(error)
