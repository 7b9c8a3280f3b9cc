"""Files that are written whole or not at all, their checksums, and the error of data that cannot be used."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the fix."""


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically; the content is on the disk before it gets its name."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
