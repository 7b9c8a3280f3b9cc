"""Take the folder of a run: the process that makes a new one has it, and every one is locked while it is used."""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from data.cli import UsageError, word
from data.files import write_json

LOCK = "run.lock"
HOLDER = "run.lock.json"  # who has the lock
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that knows none


@contextmanager
def new_folder(base: Path, numbered: bool) -> Iterator[Path]:
    """Make and lock the folder of a new run: `base`, or if `numbered`, `base` with the first number that is free.

    A run that is refused before it has written anything leaves no folder behind.

    Raises UsageError if `base` cannot be written to and, unless `numbered`, if it holds a run or prepared data or is in
    use.
    """
    if not numbered and os.path.lexists(base / "manifest.json"):
        raise UsageError(f"{base} holds prepared data; give another folder with folder=")
    folder, made = _make(base, numbered)
    try:
        with locked(folder):
            if os.path.lexists(folder / "config.yaml"):
                raise UsageError(f"{folder} holds a run already: {word('resume', folder)} continues it")
            yield folder
    finally:
        with suppress(OSError):
            if made[:1] == [folder] and os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
        _remove_empty(made)


def _make(base: Path, numbered: bool) -> tuple[Path, list[Path]]:
    """Return the folder, and which of it and its parents were made, the innermost first."""
    made: list[Path] = []
    try:
        parents = list(base.parents) or [base]  # `.` has none
        made = [path for path in parents if not path.exists()]
        if not parents[len(made)].is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        base.parent.mkdir(parents=True, exist_ok=True)
        if not numbered:
            made = made if base.exists() else [base, *made]
            base.mkdir(exist_ok=True)
            return base, made
        for folder in chain([base], (base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))):
            with suppress(FileExistsError):
                folder.mkdir()
                return folder, [folder, *made]
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    except OSError as error:
        _remove_empty(made)
        raise _not_writable(base, error) from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a run. The system releases the lock of a process that dies.

    Raises UsageError, naming the process that has it, if it is locked, and if it cannot be written to.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
        write_json(folder / HOLDER, {"process": os.getpid(), "host": socket.gethostname(), "since": _now()})
    except Timeout:
        raise UsageError(
            f"{folder} is in use by {_holder(folder)}; wait until it ends, or stop it, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise _not_writable(folder, error) from error
        print(f"{folder} cannot be locked ({error}): start nothing else in it", file=sys.stderr)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _now() -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}"


def _holder(folder: Path) -> str:
    """Name the process that has the lock; it may need a moment to write who it is."""
    for _ in range(10):
        try:
            holder = json.loads((folder / HOLDER).read_text())
            return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def _not_writable(folder: Path, error: OSError) -> UsageError:
    reason = error.strerror or str(error)
    return UsageError(f"cannot write to the run folder {folder} ({reason}); give another with folder=")
