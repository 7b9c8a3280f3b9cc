"""Cache methods on a command line: `cache=[none,int4,"snapkv@25%"]`; torch is not needed to read them."""

from collections.abc import Sequence

from arch.compression.method import CacheMethod, parse_method
from data.cli import UsageError

NONE = "none"


def with_brackets(words: Sequence[str]) -> list[str]:
    """Words that were cut at commas, those within brackets joined again: `int4(group=32` and `recent=64)` are one."""
    whole: list[str] = []
    for word in words:
        if whole and whole[-1].count("(") > whole[-1].count(")"):
            whole[-1] += f",{word}"
        else:
            whole.append(word)
    return whole


def read_method(text: str) -> CacheMethod | None:
    """The method that `text` names; None of `none`. Raises UsageError if there is no such method."""
    try:
        method = parse_method(text.strip().strip("\"'"))
    except ValueError as error:
        raise UsageError(f"cache={text:.80}: {error}") from error
    return None if method.is_none else method


def name_of(method: CacheMethod | None) -> str:
    """The name of `method` in files and pictures."""
    return NONE if method is None else method.text
