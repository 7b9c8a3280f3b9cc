"""Text for validation and test that is taken from the training documents."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from .files import DataError

MIN_DOCUMENTS = 8  # of each split, for whole documents to be chosen
DEFAULT_SHARE = 0.005  # of the documents or, if there are few, of the text: ...
MIN_CHARS, MAX_FRACTION = 2**16, 0.1  # ... at least MIN_CHARS characters, but no more than MAX_FRACTION of the text
LINE = 4096  # characters in which the end of a line is looked for


class TextSpan(NamedTuple):
    """Characters `begin` to `end` of a document, and their split."""

    split: str
    begin: int
    end: int


@dataclass(frozen=True)
class HeldOut:
    """Assignment of training documents, or parts of them, to splits. Equal texts are assigned alike.

    shares   split -> its share of the documents, chosen by a hash of the text
    cuts     None, or hash of a document -> its parts, for those that are not all training text
    summary  how much of the text is held out, and which
    """

    shares: dict[str, float] = field(default_factory=dict)
    cuts: dict[int, tuple[TextSpan, ...]] | None = None
    summary: str = ""

    def parts(self, text: str, raw: bytes) -> list[tuple[str, str]]:
        """(split, text) of each part of a training document; `raw` is its UTF-8."""
        if self.cuts is not None:
            return _cut(text, self.cuts[key]) if (key := _hash(raw)) in self.cuts else [("train", text)]
        return [(self.split_of(_hash(raw)) if self.shares else "train", text)]

    def split_of(self, key: int) -> str:
        point, bound = key / 2**64, 0.0
        for split, share in self.shares.items():
            bound += share
            if point < bound:
                return split
        return "train"


def by_hash(shares: dict[str, float | None]) -> HeldOut:
    """Hold out whole documents. `shares` maps split -> share, None if it is left to us."""
    chosen = {split: DEFAULT_SHARE if share is None else share for split, share in shares.items()}
    texts = " and ".join(f"{share:.3g} of the documents for {split}" for split, share in chosen.items())
    return HeldOut(chosen, None, f"held out: {texts}, chosen by a hash")


def hold_out(documents: Iterable[tuple[str, bytes, str]], shares: dict[str, float | None], name: str) -> HeldOut:
    """Decide what is held out of the training documents (text, UTF-8, source file).

    If each split gets MIN_DOCUMENTS documents, a hash chooses them, and no more documents than that are read here. If
    there are fewer, the end of the text is held out, test after val, cut at the end of a line or of a document.

    Raises DataError if a split would have no text.
    """
    whole = by_hash(shares)
    counts = Counter[str]()
    lengths, keys = array("Q"), array("Q")
    sources: list[tuple[int, str]] = []  # first document of each file
    for text, raw, source in documents:
        key = _hash(raw)
        counts[whole.split_of(key)] += 1
        if min(counts[split] for split in ("train", *shares)) >= MIN_DOCUMENTS:
            return whole
        lengths.append(len(text))
        keys.append(key)
        if not sources or sources[-1][1] != source:
            sources.append((len(lengths) - 1, source))
    starts = array("Q", accumulate(lengths, initial=0))
    total = end = starts[-1]
    bounds: list[TextSpan] = []
    for split in reversed(shares):
        begin = _begin(end, _size(shares[split], total), starts)
        if begin >= end or begin < 1:
            raise no_text(name, split if begin >= end else "train", len(lengths))
        bounds.insert(0, TextSpan(split, begin, end))
        end = begin
    cuts: dict[int, tuple[TextSpan, ...]] = {}
    for number in range(len(lengths)):
        start, stop = starts[number], starts[number + 1]
        if stop > end:
            inside = [
                TextSpan(part.split, max(part.begin, start), min(part.end, stop))
                for part in [TextSpan("train", 0, end), *bounds]
            ]
            cuts.setdefault(
                keys[number],
                tuple(TextSpan(p.split, p.begin - start, p.end - start) for p in inside if p.begin < p.end),
            )
    return HeldOut({}, cuts, _summary(bounds, total, starts, sources))


def no_text(name: str, split: str, documents: int) -> DataError:
    """The error of a split without a document."""
    if not documents:
        return DataError(
            f"{name} has no text for the split {split}: every text is empty or blank, or the first one exceeds a "
            "limit; give others, or higher limits"
        )
    own = f", text of its own with source.{split}, or none with source.{split}_share=0" if split != "train" else ""
    return DataError(
        f"{name} has no text for the split {split}: its documents, {documents} in all, are in others. Give more "
        f"documents (source.document_start cuts a file into several), a larger share{own}, or higher limits"
    )


def _size(share: float | None, total: int) -> int:
    """Characters to hold out."""
    return (
        int(share * total)
        if share is not None
        else int(min(max(DEFAULT_SHARE * total, MIN_CHARS), MAX_FRACTION * total))
    )


def _begin(end: int, size: int, starts: array) -> int:  # type: ignore[type-arg]
    """The beginning of the `size` characters before `end`; a document not longer than them stays whole."""
    begin = max(end - size, 0)
    number = bisect_right(starts, begin) - 1
    start, stop = starts[number], starts[min(number + 1, len(starts) - 1)]
    return start if start > 0 and stop - start <= size else begin


def _cut(text: str, parts: tuple[TextSpan, ...]) -> list[tuple[str, str]]:
    """The parts of a document, each cut after a line or a word near by; blank parts are left out."""
    begins = [0]
    for part in parts[1:]:
        reach = min(part.begin + min(LINE, (part.end - part.begin) // 2), len(text))
        found = [text.find(mark, part.begin - 1, reach) + 1 for mark in ("\n", " ")]
        begins.append(next((place for place in found if place > begins[-1]), part.begin))
    ends = [*begins[1:], len(text)]
    pieces = [(part.split, text[begin:end]) for part, begin, end in zip(parts, begins, ends, strict=True)]
    return [(split, piece) for split, piece in pieces if piece and not piece.isspace()]


def _summary(bounds: list[TextSpan], total: int, starts: array, sources: list[tuple[int, str]]) -> str:  # type: ignore[type-arg]
    documents = len(starts) - 1
    texts = []
    for part in bounds:
        first = bisect_right(starts, part.begin) - 1
        source = next(source for number, source in reversed(sources) if number <= first)
        share = (part.end - part.begin) / total
        texts.append(f"{part.split} is {part.end - part.begin:,} characters ({share:.2%}), from {source} on")
    few = "1 document" if documents == 1 else f"{documents} documents"
    return (
        f"held out from the end of the text, since there {'is' if documents == 1 else 'are'} only {few}: "
        + "; ".join(texts)
    )


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
