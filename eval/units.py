"""Format bytes and counts for people, and parse amounts of memory."""

import re

FOUR_DIGITS = 999.5  # from here on, three digits would be written as 1e+03


def bytes_text(value: float) -> str:
    """`163840` as `160 KiB`: three digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < FOUR_DIGITS:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{_at_least_three_digits(value)} TiB"


def count_text(value: float) -> str:
    """`1_060_000_000` as `1.06B`."""
    for unit in ("", "K", "M", "B"):
        if value < FOUR_DIGITS:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{_at_least_three_digits(value)}T"


def _at_least_three_digits(value: float) -> str:
    return f"{value:.3g}" if value < FOUR_DIGITS else f"{value:,.0f}"


def number_text(value: float) -> str:
    """`163840` as `163,840`, and what is not whole with one digit more."""
    return f"{value:,.1f}".removesuffix(".0")


def parse_bytes(text: str) -> float:
    """`80GB` (decimal) or `80GiB` (binary) in bytes. Raises ValueError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise ValueError(f"cannot read {text!r} as an amount of memory; write it like 80GB or 80GiB")
    unit: int = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    return float(match[1]) * unit


def counted(number: int, noun: str) -> str:
    """`1 store`, `2 stores`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def times(number: int) -> str:
    """`once`, `2 times`."""
    return "once" if number == 1 else f"{number:,} times"


def duration_text(seconds: float) -> str:
    """`90` as `2 min`, `4000` as `1 h 07 min`: to a minute, and below one to a second."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
