"""Corpora found on every machine."""

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from . import recall
from .config import SourceConfig


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib() -> Iterator[tuple[str, str]]:
    """Yield (split, text) for every source file of the Python standard library, in a fixed order.

    A hash of its path assigns one file in 32 to val and one to test.
    """
    root = stdlib_folder()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if text.strip():
            yield {0: "val", 1: "test"}.get(zlib.crc32(name.encode()) % 32, "train"), text


CORPORA = {"stdlib": stdlib}


def names() -> list[str]:
    return [*CORPORA, "recall"]


def described(source: SourceConfig) -> str:
    """A line about the corpus that `source` names."""
    of = f", the *.py files in {stdlib_folder()}" if source.corpus == "stdlib" else ""
    return f"reading the corpus {source.corpus}{of}"


def corpus(source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for every document of the corpus that `source` names."""
    assert source.corpus is not None
    return recall.texts(source.recall) if source.corpus == "recall" else CORPORA[source.corpus]()
