"""Help of the commands with Hydra, from the docstrings of their schemas."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from arch.named import CONFIGS, names

KEYS, GROUPS = "$KEYS", "$GROUPS"  # in the help of configs/<name>.yaml
COLUMN, MOST_COLUMNS = 34, 120
GROUP_NAMES = ("arch", "size", "data", "optim", "trainer", "logger", "experiment")


def help_text(name: str, schema: type, words: Sequence[str], config_dir: str | None) -> str:
    """The help of `configs/<name>.yaml`: its text, the groups, and the keys of `schema` with the values that `words`
    give them."""
    template: str = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["hydra"]["help"]["template"]
    if KEYS in template:
        found = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values = compose(name, overrides=[*found, *words])
        template = template.replace(KEYS, "\n".join(key_lines(schema, values)).strip("\n"))
    return template.replace(GROUPS, groups()).rstrip()


def groups() -> str:
    """The config groups and the names in each."""
    lines = []
    for group in GROUP_NAMES:
        listed = ", ".join(names(group))
        lines += textwrap.wrap(f"{group}: {listed}", width(), initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def width() -> int:
    return min(MOST_COLUMNS, max(80, shutil.get_terminal_size((MOST_COLUMNS, 0)).columns))


def key_lines(schema: type, values: DictConfig, indent: str = "") -> Iterator[str]:
    """A line for each key of `schema`: key, value, meaning; then a section for each group of keys.

    Of a schema that extends another command's, only its own keys. A group that the docstring of `schema` explains is
    one line, without its keys. Keys of a group that its docstring does not explain are those of data/prepare.py, and
    are named alone.
    """
    meanings, hints = explanations(schema), get_type_hints(schema)
    extends = not indent and is_dataclass(schema.__mro__[1])
    own = [field.name for field in fields(schema) if not extends or field.name in schema.__annotations__]
    sections = [] if indent else [name for name in own if is_dataclass(hints[name]) and name not in meanings]
    others = [name for name in own if name not in meanings and name not in sections]
    whole = not indent and not sections  # a long list is cut to a line for each
    for name in own:
        if name in meanings:
            alias = re.search(r"; on the command line `(\w+)=`", meanings[name])
            meaning = meanings[name].replace(alias[0], "") if alias else meanings[name]
            key = f"{name}.KEY" if is_dataclass(hints[name]) else alias[1] if alias else name
            value = "" if is_dataclass(hints[name]) else f": {shown_value(values, name)}"
            yield from _line(f"{indent}{key}{value}", meaning, whole)
    if others:
        yield from _line(f"{indent}...", f"{', '.join(others)}: see python data/prepare.py --help", whole=True)
    for name in sections:
        yield f"{name}:"
        yield from key_lines(hints[name], values[name], "  ")


def shown_value(values: DictConfig, key: str) -> str:
    """The value of `key` as YAML, in one line; of one that follows another key, that key's name."""
    plain: dict[str, Any] = cast(dict[str, Any], OmegaConf.to_container(values))
    value = plain[key]
    if isinstance(value, str) and value.startswith("${"):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _line(shown: str, meaning: str, whole: bool) -> Iterator[str]:
    """A key, its value and its meaning: `whole`, or the first clauses that have room in one line."""
    column = max(COLUMN, len(shown) + 2)
    room = width() - column
    if whole:
        first, *others = textwrap.wrap(meaning, room) or [""]
        yield f"{shown:<{column}}{first}".rstrip()
        yield from (" " * column + line for line in others)
        return
    while len(meaning) > room and (cut := max(meaning.rfind(mark) for mark in ("; ", ". ", ": ", ", ", " ("))) > 0:
        meaning = meaning[:cut]
    if meaning.count("(") > meaning.count(")"):
        meaning = meaning[: meaning.rfind(" (")]
    yield f"{shown:<{column}}{textwrap.shorten(meaning, max(room, 20), placeholder=' ...')}".rstrip()


def explanations(schema: type) -> dict[str, str]:
    """The meaning of each key of `schema` by the docstrings of it and its bases, lines of `key, other   meaning`."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if is_dataclass(cls):
            found |= _explained(inspect.getdoc(cls) or "", {field.name for field in fields(cls)})
    return found


def _explained(text: str, keys: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current: list[str] = []
    for line in text.splitlines():
        match = re.match(r"(\w+(?:, \w+)*)\s+(.*)", line)
        listed = match[1].split(", ") if match else []
        if match and set(listed) <= keys:
            current = listed
            found |= dict.fromkeys(current, match[2])
        elif line.startswith(" "):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found
