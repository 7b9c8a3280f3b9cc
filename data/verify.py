"""Comparison of every file of a prepared folder with its manifest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import DataError, sha256
from .shards import Manifest, Shard, read_offsets

CHUNK = 2**24  # tokens


def verify(folder: Path) -> str:
    """Compare every file with the manifest and return a line of success. Raises DataError listing all differences."""
    manifest = Manifest.load(folder)
    errors = []
    try:
        manifest.check_tokenizer(folder)
    except DataError as error:
        errors.append(str(error))
    shards = 0
    for name, split in manifest.splits.items():
        for shard in split.shards:
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
    if sha256(path) != shard.sha256:
        yield f"{path} is altered: its checksum is not that of the manifest"
    if sha256(offsets) != shard.offsets_sha256:
        yield f"{offsets} is altered: its checksum is not that of the manifest"
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
