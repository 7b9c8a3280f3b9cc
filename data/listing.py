"""Source files: files, folders and globs expanded to names, each real file once."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .files import DataError
from .source_record import SOURCES

TEXT = (".txt", ".md", ".py")
PACKED = (".gz", ".xz", ".zst")
KINDS = f"{', '.join([*TEXT, '.jsonl'])} (each also .gz .xz .zst), .parquet"


@dataclass(frozen=True)
class SourceFile:
    """A file, a split of a data set, or a corpus, and the split that it belongs to."""

    split: str
    name: str


class _Taken(NamedTuple):
    split: str
    name: str
    item: int
    alone: bool  # the item names this very file


@dataclass
class _Expansion:
    """Names of the files of one item; `passed_over` counts what a folder holds beside them, by ending."""

    names: list[str]
    alone: bool = False
    passed_over: Counter[str] = field(default_factory=Counter)


def list_files(values: dict[str, Any]) -> tuple[list[SourceFile], list[str]]:
    """Expand split -> files, folders or globs, one or a list; return the files in order and a line about each split.

    A folder is read recursively, linked folders too, each once; hidden files and folders in it are passed over. A file
    that one folder or glob reaches by several names or links is read once.

    The record that a preparation leaves in its folder is passed over, or a folder prepared among its own sources would
    be one of them.

    Raises DataError if an item names no file, a file cannot be read, or one real file, under whatever name or link,
    or packed and not, is in two splits, or is named twice in one.
    """
    files: list[SourceFile] = []
    lines, twins = [], []
    taken: dict[tuple[int, int], _Taken] = {}
    by_unpacked: dict[str, _Taken] = {}
    for split, value in values.items():
        key, read, passed_over = f"source.{split}", Counter[str](), Counter[str]()
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(item, str) or not item:
                raise DataError(f"{key} is {value!r}; give files, folders or globs, one or a list")
            expansion = _expand(key, item)
            passed_over += expansion.passed_over
            for name in expansion.names:
                found = _Taken(split, name, number, expansion.alone)
                earlier = taken.setdefault(_identity(name), found)
                if earlier is found:
                    twin = by_unpacked.setdefault(_unpacked(name), found)
                    if twin is not found:
                        twins.append(_describe_twins(twin, found))
                    files.append(SourceFile(split, name))
                    read[_ending(name)] += 1
                else:
                    _check_repeated(earlier, found)
                    passed_over["other names of a file that is read"] += 1
        counts = f"read {_number(read, 'file')} ({_by_count(read)})"
        if passed_over:
            counts += f"; passed over {sum(passed_over.values())}: {_by_count(passed_over)}"
        lines.append(f"{key}: {counts}")
    if twins:
        more = f", and {len(twins) - 1} more pairs" if len(twins) > 1 else ""
        lines.append(f"warning: {twins[0]}{more}: their text is read twice")
    return files, lines


def all_files(folder: Path) -> list[str]:
    """Sorted names of every file in `folder` that is not hidden, at any depth."""
    return _sorted([entry.path for _, entries in _folders(str(folder)) for entry in entries if entry.is_file()])


def kind_of(path: Path) -> str | None:
    """Suffix of the format in lower case, without that of the compression; None if it cannot be read."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix in PACKED else suffix
    known = inner in (*TEXT, ".jsonl") or (inner == ".parquet" and suffix == inner)
    return inner if known else None


def _unpacked(name: str) -> str:
    """The path of a file without links on its way and the suffix of its compression."""
    folder, base = os.path.split(name)
    path = Path(os.path.realpath(folder), base)
    return str(path.with_suffix("") if path.suffix.lower() in PACKED else path)


def _describe_twins(one: _Taken, other: _Taken) -> str:
    """Say that two files are one by their names. Raises DataError if they are in two splits."""
    if one.split != other.split:
        raise DataError(
            f"{one.name} is in source.{one.split} and {other.name} in source.{other.split}: by their names one is the "
            "other, packed; give it to one split, or rename the one that holds other text"
        )
    return f"{one.name} and {other.name} are one text by their names, packed and not"


def _check_repeated(earlier: _Taken, found: _Taken) -> None:
    """Raise DataError unless the two names of one file come from one item, or from folders and globs that overlap."""
    also = "" if earlier.name == found.name else f" ({earlier.name} is the same file)"
    if earlier.split != found.split:
        raise DataError(
            f"{found.name} is in both source.{earlier.split} and source.{found.split}{also}; give each file to one "
            "split"
        )
    overlap = earlier.name == found.name and not (earlier.alone or found.alone)
    if earlier.item != found.item and not overlap:
        raise DataError(f"{found.name} is twice in source.{found.split}{also}; give each file once")


def _expand(key: str, item: str) -> _Expansion:
    try:
        path = Path(item)
        if path.is_dir():
            expansion = _of_folder(path)
        elif path.is_file():
            expansion = _Expansion([str(path)], alone=True)
        else:
            expansion = _Expansion([name for name in _glob(item) if os.path.isfile(name) and not _is_record(name)])
        names, aside = expansion.names, +expansion.passed_over  # without zeros
        if not names:
            held = f" (it holds {_by_count(aside)})" if aside else ""
            raise DataError(f"{key}: no file at {item}{held}; give files, folders or globs of {KINDS}")
        if unknown := [name for name in names if not kind_of(Path(name))]:
            raise DataError(f"{key}: cannot read {unknown[0]}; files are {KINDS}")
        expansion.names = _one_name_each(names)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else item
        raise DataError(f"{key}: cannot read {_short(where)}: {error.strerror}") from error
    aside["other names of a file that is read"] += len(names) - len(expansion.names)
    expansion.passed_over = +aside
    return expansion


def _of_folder(folder: Path) -> _Expansion:
    names: list[str] = []
    passed_over = Counter[str]()
    for hidden, entries in _folders(str(folder)):
        passed_over["hidden"] += hidden
        for entry in entries:
            if entry.is_dir():
                continue
            if _is_record(entry.path):
                passed_over["record of a preparation"] += 1
            elif entry.is_file() and kind_of(Path(entry.name)):
                names.append(entry.path)
            else:
                passed_over[_ending(entry.name) if entry.is_file() else "broken links and devices"] += 1
    return _Expansion(_sorted(names), passed_over=passed_over)


def _is_record(name: str) -> bool:
    """Tell whether a file is what a preparation, ended or not, wrote into its folder about its sources."""
    folder, base = os.path.split(name)
    return base == SOURCES and any(
        os.path.exists(os.path.join(folder, other)) for other in ("manifest.json", "progress.json", "prepare.lock")
    )


def _folders(top: str) -> Iterator[tuple[int, list[os.DirEntry[str]]]]:
    """Yield, for `top` and each folder below it, how many of its entries are hidden and those that are not.

    Linked folders are entered after all others, and no folder is entered twice.
    """
    seen: set[tuple[int, int]] = set()
    pending, linked = [str(Path(top))], list[str]()
    while pending or linked:
        here = pending.pop() if pending else linked.pop()
        identity = _identity(here)
        if identity in seen:
            continue
        seen.add(identity)
        with os.scandir(here) as scanned:
            everything = sorted(scanned, key=lambda entry: entry.name)
        entries = [entry for entry in everything if not entry.name.startswith(".")]
        for entry in entries:
            if entry.is_dir():
                (linked if entry.is_symlink() else pending).append(entry.path)
        yield len(everything) - len(entries), entries


def _glob(pattern: str) -> list[str]:
    """Expand `*`, `?`, `[...]` and `**`, as `glob.glob` does, but enter each real folder once for a `**`."""
    parts = list(Path(pattern).parts)
    if parts and parts[-1] == "**":
        parts.append("*")
    found = [""]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            found = [folder for base in found for folder in _below(base)]
        elif re.search(r"[*?\[]", part):
            matches = re.compile(fnmatch.translate(part)).match
            found = [
                os.path.join(base, name)
                for base in found
                for name in sorted(os.listdir(base or "."))
                if matches(name) and (part.startswith(".") or not name.startswith("."))
            ]
        else:
            found = [path for base in found if os.path.lexists(path := os.path.join(base, part))]
        if not last:
            found = [path for path in found if os.path.isdir(path)]
    return _sorted(list(dict.fromkeys(found)))


def _below(base: str) -> list[str]:
    """`base` and each folder below it that is not hidden."""
    paths = [base]
    for _, entries in _folders(base or "."):
        paths += [str(Path(entry.path)) for entry in entries if entry.is_dir()]
    seen: set[tuple[int, int]] = set()
    real_first = sorted(paths, key=lambda path: os.path.realpath(path) != os.path.abspath(path))
    return [path for path in real_first if (i := _identity(path or ".")) not in seen and not seen.add(i)]  # type: ignore[func-returns-value]


def _one_name_each(names: list[str]) -> list[str]:
    """Leave out the further names of each real file; the name without a link on its way stays."""
    by_file: dict[tuple[int, int], list[str]] = {}
    for name in names:
        by_file.setdefault(_identity(name), []).append(name)
    if len(by_file) == len(names):
        return names
    kept = {min(same, key=lambda name: os.path.realpath(name) != os.path.abspath(name)) for same in by_file.values()}
    return [name for name in names if name in kept]


def _identity(name: str) -> tuple[int, int]:
    stat = os.stat(name)
    return stat.st_dev, stat.st_ino


def _sorted(names: list[str]) -> list[str]:
    """Sort `names` by the parts of their paths, so that a folder's files stand together."""
    return [str(path) for path in sorted(map(Path, names))]


def _ending(name: str) -> str:
    path = Path(name)
    inner = Path(path.stem).suffix if path.suffix.lower() in PACKED else ""
    return f"{inner}{path.suffix}" or "no ending"


def _by_count(counts: Counter[str]) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:8]
    rest = sum(counts.values()) - sum(count for _, count in shown)
    return ", ".join([f"{ending} {count}" for ending, count in shown] + ([f"others {rest}"] if rest else []))


def _number(counts: Counter[str], noun: str) -> str:
    total = sum(counts.values())
    return f"{total:,} {noun}{'s' if total != 1 else ''}"


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"
