"""Nested plain data; by dotted key, `size.seq_len` is `values["size"]["seq_len"]`."""

from collections.abc import Collection, Mapping
from typing import Any


def flat(values: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Return `values`, nested, by dotted key. Mappings that are empty, or whose key is in `whole`, are one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            found |= flat(value, whole, f"{key}.")
        else:
            found[key] = value
    return found


def lookup(values: Any, key: str, default: Any = None) -> Any:
    """Return the value in `values`, nested, at a dotted key; `default` where there is none."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def without_nulls(values: Any) -> Any:
    """Return `values`, nested, without the keys of mappings that are null."""
    if isinstance(values, Mapping):
        return {key: without_nulls(value) for key, value in values.items() if value is not None}
    return [without_nulls(value) for value in values] if isinstance(values, list | tuple) else values
