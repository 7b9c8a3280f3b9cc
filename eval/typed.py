"""Types of the keys of a schema, and values of true-or-false keys, which OmegaConf converts from any number."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def mistyped_booleans(schema: Any, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the keys of `values`, nested or dotted, that are true or false in `schema` and something else here.

    OmegaConf takes any number, and words such as `on`.
    """
    return [problem for key, value in values.items() for problem in _check(schema, str(key).split("."), value, prefix)]


def _check(schema: Any, path: list[str], value: Any, prefix: str) -> Iterator[str]:
    name, *rest = path
    key = f"{prefix}{name}"
    hint = hint_of(schema, name)
    options = get_args(hint) if get_args(hint) and get_origin(hint) is not dict else (hint,)
    inner = next((option for option in options if is_dataclass(option) or get_origin(option) is dict), None)
    if rest:
        yield from _check(inner, rest, value, f"{key}.")
    elif isinstance(value, Mapping):
        yield from mistyped_booleans(inner, value, f"{key}.")
    elif bool in options and not isinstance(value, bool):
        text = str(value)
        null = value is None and type(None) in options
        if not null and text.lower() not in ("true", "false") and "${" not in text:
            yield f"{key} is {text}; it must be true or false"


def hint_of(schema: Any, name: str) -> Any:
    """Return the type that `schema`, a dataclass or a dict, has for the key `name`; None if it has none."""
    if is_dataclass(schema):
        return get_type_hints(schema).get(name)
    return get_args(schema)[1] if get_origin(schema) is dict else None
