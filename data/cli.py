"""Command lines of `key=value` words, typed by a dataclass, on the standard library; Hydra's are in eval/cli.py."""

import atexit
import difflib
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from data.launcher import first_on_machine

T = TypeVar("T")


class UsageError(ValueError):
    """A mistake on the command line; the message names the fix."""


class TaskError(RuntimeError):
    """A task that failed, through no mistake on its command line."""


def parse(schema: type[T], arguments: Sequence[str], positional: str | None = None, prefix: str = "") -> T:
    """Build `schema`, a dataclass with defaults, from `key=value` words.

    Fields may be str, int, float, bool, Path, a tuple of one of them (`1,2,3`), or optional (`null`). Words without
    `=`, and those that are a path or can only be one (`./lr=1e-3`), go into the field `positional`, a tuple of str.
    `--help`, or no word where there is a positional field, prints the docstrings of the schema's module and of the
    schema, and exits. `prefix` stands before the keys in messages: that of a group of options, as `recall.`.

    Raises UsageError on an unknown key and on a value of another type.
    """
    if {"-h", "--help"} & set(arguments) or (positional and not arguments):
        print(usage(schema, positional))
        sys.exit()
    hints = {key: hint for key, hint in get_type_hints(schema).items() if key != positional}
    values: dict[str, Any] = {}
    words = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if positional and (os.path.lexists(argument) or "/" in key):
            if key in hints:
                raise UsageError(f"{argument} is an option and a path that is here; write ./{argument} for the path")
            words.append(argument)
            continue
        if equals and key not in hints:
            raise UsageError(unknown_key(f"{prefix}{key}", list(hints)))
        if equals and text:
            try:
                values[key] = _convert(text, hints[key])
            except ValueError:
                raise UsageError(f"{prefix}{key} is {text}; it must be {_describe(hints[key])}") from None
        elif positional and not equals:
            words.append(argument)
        else:
            raise UsageError(f"cannot read {prefix + argument!r}; write key=value, the keys are {', '.join(hints)}")
    if positional:
        values[positional] = tuple(words)
    return schema(**values)


def usage(schema: type, positional: str | None = None, module: bool = True) -> str:
    """The help text of a command whose options are `schema`, with the docstring of its module or without."""
    defaults = [
        f"{item.name}={value_text(item.default)}"
        for item in fields(schema)
        if item.name != positional and item.default is not MISSING
    ]
    documents = [inspect.getdoc(sys.modules[schema.__module__]) if module else None, inspect.getdoc(schema)]
    return "\n\n".join([*filter(None, documents), f"Defaults: {' '.join(defaults)}"])


def unknown_key(path: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """The message for a (dotted) key that is none of `known`, with the nearest of them, or those of its name
    `elsewhere`."""
    parent, _, key = path.rpartition(".")
    owner = parent or "The command line"
    near = f", did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, known)
    return f"unknown key {path}{near} {owner} has {', '.join(known) or 'no keys'}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a clause about the unknown `word`: the nearest of `known`, or a full stop."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else "."


def word(key: str, value: object) -> str:
    """`key=value` to be pasted into a shell, for a command with Hydra that is to read `value` as this very text."""
    return shlex.quote(f"{key}={hydra_value(str(value))}")


def hydra_value(text: str) -> str:
    """`text` in Hydra's grammar: in quotes, unless it is plain.

    In quotes, backslashes before a quote are doubled and the quote gets one; so are those before `${`, which OmegaConf
    would interpolate.
    """
    if re.fullmatch(r"[A-Za-z0-9_./-]+", text) and not _is_typed(text):
        return text
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|$(?![\s\S]))", _escape_quote, literal) + "'"


def _escape_quote(match: re.Match[str]) -> str:
    return 2 * match[1] + ("\\'" if match[2] else "")


def _is_typed(text: str) -> bool:
    """Tell whether Hydra reads `text` as a number, a truth value or null."""
    if text.lower() in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message` as an error and end the process."""
    report(message)
    sys.exit(code)


def report(message: str) -> None:
    """Print `message` as an error."""
    text = f"error:\n{message}" if "\n" in message else f"error: {message.removeprefix('- ')}"  # one is no list
    print(text, file=sys.stderr)


def end_on_ctrl_c() -> None:
    """Make a Ctrl-C that nothing catches end this process as `interrupted` does, also during imports.

    A Ctrl-C while the interpreter shuts down changes nothing: all has been done.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, traceback)
            return
        try:
            interrupted()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(str(end.code)))  # Python would kill itself with the signal

    sys.excepthook = hook


def interrupted(message: str = "error: interrupted") -> NoReturn:
    """Print `message` and end the process with code 130. Processes that a launcher started beside the first keep quiet,
    and end without an error, for which their launcher would kill the first."""
    if not first_on_machine():
        sys.exit(0)
    print(message, file=sys.stderr)
    sys.exit(130)


def _convert(text: str, hint: Any) -> Any:
    """Raise ValueError if `text` is not of the type `hint`."""
    options = get_args(hint)
    if get_origin(hint) is tuple:
        whole = options[0] is Path and os.path.lexists(text)  # a name with commas
        parts = [text] if whole else text.removeprefix("[").removesuffix("]").split(",")
        return tuple(_convert(part.strip(), options[0]) for part in parts if part.strip())
    if NoneType in options:
        (inner,) = (option for option in options if option is not NoneType)
        return None if text == "null" else _convert(text, inner)
    if hint is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _reject(text)
    return hint(text)


def _reject(text: str) -> NoReturn:
    raise ValueError(text)


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _describe(hint: Any) -> str:
    options = get_args(hint)
    if get_origin(hint) is tuple:
        return f"a list, with commas; each {_describe(options[0])}"
    if NoneType in options:
        return f"{_describe(next(option for option in options if option is not NoneType))}, or null"
    return NAMES[hint]


def value_text(value: Any) -> str:
    """`value` as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(value_text, value)) if isinstance(value, tuple) else str(value)
