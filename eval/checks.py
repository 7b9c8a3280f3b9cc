"""Checks of what the files of a run hold, before it is computed with: somebody else may have written them."""

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from arch import Plan, from_dict

MAX_DEPTH = 64
MAX_VALUES = 100_000
LARGEST = 2**53  # of a count
SUMMARY_TYPES = {
    "name": str,
    "seed": int,
    "seq_len": int,
    "experiment": dict,
    "val": dict,
    "params": int,
    "tokens": int,
}
CONFIG_TYPES = {"name": str, "seed": int, "tokens": int, "batch_size": int, "data": dict, "size": dict}
TYPE_NAMES = {str: "text", int: "a whole number", dict: "a mapping"}


def check_summary(summary: dict[str, Any]) -> None:
    """Raise ValueError unless `summary` has the values of a summary.json that a Pareto plot reads."""
    if missing := SUMMARY_TYPES.keys() - summary.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    check_plain(summary)
    _check_types(summary, SUMMARY_TYPES)
    for key in ("seq_len", "params", "tokens"):
        _check_count(key, summary[key], least=1)
    ppl = summary["val"].get("ppl")
    if not is_number(ppl) or (isinstance(ppl, int) and abs(ppl) > LARGEST):  # JSON has numbers that no float holds
        raise ValueError(f"val.ppl is {ppl!r:.40}; it must be a number")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless `config` has the values of a config.yaml by which training curves are compared."""
    if missing := CONFIG_TYPES.keys() - config.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    check_plain(config)
    _check_types(config, CONFIG_TYPES)
    for key, value in (("tokens", config["tokens"]), ("size.seq_len", config["size"].get("seq_len"))):
        _check_count(key, value, least=1)


def check_plan(plan: Plan) -> None:
    """Raise ValueError unless every field of `plan` is of its type and the numbers are those of a plan."""
    _check_fields(plan)
    _check_count("length", plan.block_length, least=1)
    for stack in plan.stacks:
        stores, reads = stack.plan.stores, stack.plan.reads
        if not reads:
            raise ValueError("it has no layers")
        for number, store in enumerate(stores):
            _check_fields(store)
            _check_fields(store.slot)
            _check_count(f"stores[{number}].owner", store.owner, most=len(reads) - 1)
        for layer, read in enumerate(reads):
            _check_count(f"reads[{layer}]", read, most=len(stores) - 1)
        for layer, window in enumerate(stack.plan.reader_windows):
            if window is not None:
                _check_count(f"reader_windows[{layer}]", window, least=1)


def check_plain(value: Any) -> None:
    """Raise ValueError unless `value` is plain data of moderate size: mappings with text as keys, lists, scalars."""
    level, seen = [value], 0
    for _ in range(MAX_DEPTH):
        seen += len(level)
        if not level:
            return
        if seen > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise ValueError(f"it has a key that is no text: {next(k for k in item if not isinstance(k, str))}")
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif not isinstance(item, str | int | float | None):
                raise ValueError(f"it has a {type(item).__name__}, {item}")
        level = inner
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def is_number(value: Any) -> bool:
    """Tell whether `value` is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Tell whether `value` is a finite number that a float holds; JSON has larger ones."""
    return is_number(value) and abs(value) <= sys.float_info.max


def _check_types(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for key, kind in types.items():
        if type(values[key]) is not kind:
            raise ValueError(f"{key} is {values[key]!r}; it must be {TYPE_NAMES[kind]}")


def _check_count(key: str, value: Any, least: int = 0, most: int = LARGEST) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} is {value!r}; it must be a whole number from {least} to {most}")


def _check_fields(item: Any) -> None:
    """Raise ValueError if a field of the dataclass `item` is of another type, or a number is out of all bounds."""
    values = {field.name: getattr(item, field.name) for field in fields(item) if field.init}
    from_dict(type(item), values)
    for key, value in values.items():
        if is_number(value) and not 0 <= value <= LARGEST:
            raise ValueError(f"{type(item).__name__}.{key} is {value!r}; it must be from 0 to {LARGEST}")
