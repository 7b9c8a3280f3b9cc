"""The data sets of configs/data, by name: read with changes, and written back as the command that prepares them."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from .cli import did_you_mean, unknown_key
from .config import LIMITS, DataConfig, PrepareConfig
from .dotted import flat, lookup
from .files import DataError

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "data"


def names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(name: str, overrides: list[str]) -> DataConfig:
    """Read `configs/data/<name>.yaml`, changed by `key=value` words of PrepareConfig.

    Text is taken as it stands, in the file and on the command line: nothing in it is interpolated, and on the command
    line it is not YAML. `null` means no value. source.train, .val and .test may be lists, `[a,b]`, of text in YAML.

    Raises DataError on an unknown name or key, with the nearest known one, and on a value of another type.
    """
    import yaml

    if name not in names():
        raise DataError(f"no data set {name!r}{did_you_mean(name, names())} configs/data has {', '.join(names())}")
    path, config = PRESETS / f"{name}.yaml", DataConfig()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    for key, value in _keys_of_file("", values or {}):
        _set(config, key, value, f"{path}: ")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise DataError(f"cannot read {override!r}; write key=value")
        hint = _hint(PrepareConfig, key)
        if not text:
            raise DataError(f"{key} is empty; give a value, or {key}=null for none")
        _set(config, key, _read(key, text, hint), "")
    return config


def prepare_command(config: PrepareConfig) -> str:
    """The command that prepares `config`."""
    return shlex.join(["python", "data/prepare.py", config.name, *_changes("", asdict(config), asdict(_base(config)))])


def changed_limits(config: PrepareConfig) -> dict[str, int]:
    """The limits of `config` that are set and are not those of its file in configs/data."""
    base = _base(config)
    return {key: getattr(config, key) for key in LIMITS if getattr(config, key) not in (None, getattr(base, key))}


def overridden(config: PrepareConfig) -> dict[str, Any]:
    """The keys of source and tokenizer, and the name and workers, that are not as in a file of configs/data, dotted.

    They are those typed beside a data set; under a name of one's own, of the data set that leaves the fewest.
    """
    bases = (
        [_base(config)] if config.name in names() else [PrepareConfig(), *(load(n, []).preparation for n in names())]
    )
    changes = [
        {
            key: value
            for key, value in flat(asdict(config)).items()
            if key.startswith(("source.", "tokenizer.", "workers")) and value != lookup(asdict(base), key)
        }
        for base in bases
    ]
    found = min(changes, key=len)
    return found if config.name in (*names(), PrepareConfig.name) else {"name": config.name, **found}


def _base(config: PrepareConfig) -> PrepareConfig:
    """The data set of `config` as configs/data has it; the defaults where there is none of this name."""
    return load(config.name, []).preparation if config.name in names() else PrepareConfig()


def _hint(schema: Any, key: str) -> Any:
    """The type of the dotted `key` of `schema`. Raises DataError if it is none of its keys."""
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        known = [item.name for item in fields(schema)] if is_dataclass(schema) else []
        if part not in known:
            raise DataError(unknown_key(".".join(parts[:depth]), known))
        schema = get_type_hints(schema)[part]
    if is_dataclass(schema):
        raise DataError(f"{key} is a group; set one of {', '.join(f'{key}.{item.name}' for item in fields(schema))}")
    return schema


def _read(key: str, text: str, hint: Any) -> Any:
    """The value of a word of the command line: text as typed, `null`, or a list where there may be one.

    A number is text here too: YAML would read 0123 as 83 and 1:30 as 90.
    """
    import yaml

    if text == "null":
        return None
    if hint is bool and text in ("true", "false"):
        return text == "true"
    is_list = hint is Any and text.startswith("[") and ("]" not in text or text.endswith("]"))
    is_quoted = hint is Any and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if (is_list or is_quoted) and not os.path.lexists(text):
        try:
            return yaml.load(text, yaml.BaseLoader)  # leaves every scalar a string
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(f"cannot read {key}={text}: a value is YAML, a list is written '[a,b]'") from error
    return text


def _keys_of_file(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of a file; a mapping is a value where the schema has no group."""
    for key, value in values.items() if isinstance(values, dict) else [("", values)]:
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in ("source", "source.recall", "tokenizer"):
            yield from _keys_of_file(f"{name}.", value)
        else:
            yield name, value


def _set(config: DataConfig, key: str, value: Any, where: str) -> None:
    """Set the dotted `key`. Raises DataError on an unknown key and on a value of another type."""
    hint = _hint(DataConfig, key)
    *groups, last = key.split(".")
    owner: Any = config
    for group in groups:
        owner = getattr(owner, group)
    setattr(owner, last, _converted(value, hint, f"{where}{key}"))


def _converted(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) or (hint,)
    if hint is Any or (value is None and NoneType in kinds):
        return value
    kind: Any = next(kind for kind in kinds if kind is not NoneType)
    with suppress(ValueError, OverflowError):
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str | int | float):
            return str(value)
        number = isinstance(value, str | int) or (kind is float and isinstance(value, float))
        if kind in (int, float) and number and not isinstance(value, bool):
            return kind(value)
    names = {int: "Integer", float: "Float", bool: "Boolean", str: "String"}
    raise DataError(
        f"{where}: Value {value!r} of type '{type(value).__name__}' could not be converted to {names[kind]}"
    )


def _changes(prefix: str, config: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """`key=value` for each value that differs from the one in `base`."""
    changes = []
    for key, value in config.items():
        if isinstance(value, dict):
            changes += _changes(f"{prefix}{key}.", value, base[key])
        elif value != base[key]:
            text = _list(value) if isinstance(value, list) else "null" if value is None else value
            changes.append(f"{prefix}{key}={text}")
    return changes


def _list(values: list[Any]) -> str:
    """A list as YAML; text that YAML would read otherwise stands in quotes."""
    plain = re.compile(r"[\w./~][^\[\]{},:#]*(?<!\s)")
    return (
        f"[{','.join(str(v) if plain.fullmatch(str(v)) else json.dumps(str(v), ensure_ascii=False) for v in values)}]"
    )
