"""How a command ends: which errors are mistakes of the user or failures of a task, and with which exit codes."""

import errno
import sys
from collections.abc import Callable

from arch import LayoutError
from data.cli import TaskError, UsageError, fail
from data.files import DataError

MISTAKES = (UsageError, LayoutError, DataError)
# Of a path that somebody typed: too long a name, or below a folder that one may not read.
UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP)


def outcome(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of `error`: 2 for a mistake of the user, 1 for a task that failed; None for a
    defect of the program, which needs its traceback.
    """
    if isinstance(error, MISTAKES):
        return str(error), 2
    if isinstance(error, TaskError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno in UNREACHABLE:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    return None


def run_script(main: Callable[[list[str]], object]) -> None:
    """Call `main` with the words of the command line; where it fails, end the process by its `outcome`."""
    try:
        main(sys.argv[1:])
    except Exception as error:
        found = outcome(error)
        if found is None:
            raise
        fail(*found)
