"""Files that are written whole or not at all, their checksums, and the error of data that cannot be used."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the fix."""


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: content, then name, are on the disk when this returns. Nothing is left on an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1))


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder, replacing a file, and wait until the name is on the disk."""
    os.replace(old, new)
    sync_folder(new.parent)


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a file or folder to a free name beside it, which says `why`, and return that."""
    names = [why, *(f"{why}-{number}" for number in range(2, 10_000))]
    free = next(other for name in names if not os.path.lexists(other := path.with_name(f"{path.name}.{name}")))
    rename(path, free)
    return free


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where its file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot flush a folder keeps names in its own way, or not at all
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
