"""Rows of text of one source file, decompressed; what a row may need of memory is bounded."""

import gzip
import io
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import DataError
from .listing import kind_of

MAX_LINE = 2**28  # bytes of a line of .jsonl, characters of a line of text
CHUNK = 2**24
MEMORY = 14  # bytes for each byte of a document; measured: 6.5 with one process, 13.4 with others that encode


def rows_of_file(path: Path, column: str, by_lines: bool, option: str | None = "source.text") -> Iterator[str]:
    """Yield the texts of a file: of its rows (.parquet), of its lines (.jsonl), else all of it; `by_lines`, its lines.

    A byte order mark before UTF-8 is no text. Errors name `option`, which chooses the column or key.

    Raises DataError on a row without text, a line longer than MAX_LINE, and a document that needs more memory than
    there is; OSError, ValueError and what decompression raises otherwise.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _rows_of_parquet(path, column, option)
    elif kind == ".jsonl":
        with _open(path) as raw:
            number = 0
            while line := raw.readline(MAX_LINE + 1):
                number += 1
                _check_line(path, number, len(line))
                if line.strip():
                    yield _text_of(path, number, line, column, option)
    else:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            if by_lines:
                number = 0
                while text := file.readline(MAX_LINE + 1):
                    number += 1
                    _check_line(path, number, len(text))
                    yield text
            else:
                pieces, size = [], 0
                while piece := file.read(CHUNK):
                    pieces.append(piece)
                    size += len(piece)
                    check_memory(str(path), size)
                yield "".join(pieces)


def check_memory(name: str, size: int) -> None:
    """Raise DataError if a document of `size` bytes from `name` needs more memory than there is."""
    free = _free_memory()
    if free is not None and size > CHUNK and size * MEMORY > free:
        raise DataError(
            f"{name}: a document of {size / 2**20:,.0f} MiB or more needs {size * MEMORY / 2**30:.1f} GiB of memory, "
            f"and {free / 2**30:.1f} GiB are free; cut it into documents with source.document_start, or into files"
        )


def string(value: Any, where: str, option: str | None = "source.text") -> str:
    """`value`, empty for null. Raises DataError if it is no text."""
    if value is not None and not isinstance(value, str):
        another = "" if option is None else f"; set {option} to another"
        raise DataError(f"{where} holds {type(value).__name__}, not text{another}")
    return value or ""


def _rows_of_parquet(path: Path, column: str, option: str | None) -> Iterator[str]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise DataError(f"{path} has no column {column}{_others(file.schema_arrow.names, option)}")
        if file.schema_arrow.names.count(column) > 1:
            raise DataError(f"{path} has several columns {column}; give each its name")
        for batch in file.iter_batches(256, columns=[column]):
            yield from (string(text, f"{path}: column {column}", option) for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:  # some of its kinds are no ValueError
        raise ValueError(str(error)) from error


def _others(names: Iterable[str], option: str | None) -> str:
    """The end of an error about a column or key that is not there."""
    return f", but {', '.join(names)}" if option is None else f"; set {option} to one of: {', '.join(names)}"


def _text_of(path: Path, number: int, line: bytes, column: str, option: str | None) -> str:
    """The text in line `number` of a .jsonl file."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError(f"line {number} is nested too deeply") from error
    except ValueError as error:  # its own line number is that within `line`
        raise ValueError(f"line {number} is no JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is no JSON object with the key {column}")
    if column not in row:
        raise DataError(f"{path} has no key {column} in line {number}{_others(row, option)}")
    return string(row[column], f"{path}, line {number}: column {column}", option)


def _check_line(path: Path, number: int, size: int) -> None:
    if size > MAX_LINE:
        raise DataError(f"{path}: line {number} is longer than {MAX_LINE >> 20} MiB; cut it into several documents")


def _free_memory() -> int | None:
    """Bytes that this process may still use; None if the system does not tell."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" is no number
        used = int((group / "memory.current").read_text())
        found.append(max(0, int((group / "memory.max").read_text()) - used))
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(max(0, limit - pages * os.sysconf("SC_PAGE_SIZE")))
    return min(found, default=None)


def _open(path: Path) -> "gzip.GzipFile | lzma.LZMAFile | io.BufferedReader":
    """Open a file for reading, decompressed."""
    packed = path.suffix.lower()
    if packed == ".zst":
        import pyarrow  # its reader notices a truncated file

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if packed == ".gz":
        return gzip.open(path)
    return lzma.open(path) if packed == ".xz" else path.open("rb")
