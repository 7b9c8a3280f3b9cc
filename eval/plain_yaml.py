"""YAML that somebody else may have written, read as plain data.

A run's config.yaml has neither tags nor aliases, nothing that is interpolated, and little nesting: what has is refused
before anything is built of it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.cli import UsageError

MAX_BYTES = 2**18
MAX_DEPTH = 32
# Values that the schema of a run has until they are resolved. They name no more than another key of the run.
REFERENCES = {
    ("optim.lr", "${size.lr}"),
    ("tokens", "${size.tokens}"),
    ("batch_size", "${size.batch_size}"),
    ("context", "${size.seq_len}"),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Dates stay text, as in OmegaConf, which writes config.yaml."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass
class _Level:
    """A mapping or list that the parser is in: the key or number of the item it is at."""

    mapping: bool
    at: str | int = -1
    seen: set[str] = field(default_factory=set)
    in_value: bool = False


def read_plain(path: Path) -> Any:
    """Read a YAML file of plain data.

    Raises OSError if it cannot be read, ValueError with one line about what is wrong with it.
    """
    with path.open("rb") as file:
        return parse_plain(file.read(MAX_BYTES + 1).decode())


def read_config(run: Path) -> dict[str, Any]:
    """Read the config.yaml of a run as plain data, with the keys that are in it.

    Raises UsageError if it cannot be read.
    """
    path = run / "config.yaml"
    try:
        values = read_plain(path)
        if not isinstance(values, dict):
            raise ValueError("it is empty" if values is None else "it is no mapping")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{run}: no run there, config.yaml is missing; give the folder of a run") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give the folder of a run") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {error}") from error
    return values


def parse_plain(text: str) -> Any:
    """Parse YAML of plain data. Raises ValueError with one line about what is wrong with it."""
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB")
    try:
        _check(text)
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _check(text: str) -> None:
    """Raise ValueError at the first thing that is not plain; what comes after it is not looked at."""
    levels: list[_Level] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{line} has an alias, *{event.anchor}")
        if event.tag is not None:
            raise ValueError(f"{line} has a tag, {event.tag.replace('tag:yaml.org,2002:', '!!')}")
        value = event.value if isinstance(event, yaml.ScalarEvent) else None
        is_key = bool(levels) and _enter(levels[-1], value, line)
        key = ".".join(str(level.at) for level in levels)
        if value is not None and "${" in value and (is_key or (key, value) not in REFERENCES):
            raise ValueError(f"{key} is {value}; nothing in a run's configuration is interpolated, write the value")
        if value == "???" and not is_key:
            raise ValueError(f"{key} is ???, which stands for no value; write one")
        if value is None:
            levels.append(_Level(isinstance(event, yaml.MappingStartEvent)))
            if len(levels) > MAX_DEPTH:
                raise ValueError(f"{line} is nested more than {MAX_DEPTH} deep")


def _enter(level: _Level, value: str | None, line: str) -> bool:
    """Go on to the next item of `level`, whose text is `value` (None: a collection); return whether it is a key."""
    if not level.mapping:
        assert isinstance(level.at, int)
        level.at += 1
        return False
    level.in_value = not level.in_value
    if not level.in_value:
        return False
    if value is None:
        raise ValueError(f"{line} has a key that is a list or a mapping")
    if value in level.seen:
        raise ValueError(f"{line} has {value} a second time")
    level.seen.add(value)
    level.at = value
    return True
