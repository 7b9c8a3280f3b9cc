"""Text around what is hidden in it, fitted to a number of tokens."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, cycle, islice

import numpy as np

from eval.tasks.task import Subject
from eval.tasks.words import NOISE, sentences

MOST_TEXT = 1_000_000  # characters of text that haystacks are cut from
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def split_sentences(text: str) -> list[str]:
    """The sentences and lines of `text`, blanks within them reduced to one."""
    return [" ".join(part.split()) for part in SENTENCE_END.split(text) if part.strip()]


def haystack_sentences(subject: Subject) -> list[str]:
    """Sentences of text=, or of the validation split, up to MOST_TEXT characters; none where there is neither."""
    found: list[str] = []
    characters = 0
    for text in subject.documents() if subject.texts or subject.prepared is None else validation_texts(subject):
        found += split_sentences(text[: MOST_TEXT - characters])
        characters += len(text)
        if characters >= MOST_TEXT:
            break
    return found


def validation_texts(subject: Subject) -> Iterator[str]:
    """The documents of the validation split of the first folder, decoded; of long ones the beginning."""
    from eval.scoring import prepared_streams

    assert subject.prepared is not None
    folder, manifest = next(iter(subject.prepared.folders.items()))
    first = replace(subject.prepared, folders={folder: manifest}, weights=(1.0,))
    for stream in prepared_streams(first, documents=True):
        yield subject.tokenizer.decode(stream.tokens[1 : MOST_TEXT + 1].tolist())


class Haystack:
    """A text that is as long as asked: words of sentences without end, in their order.

    Raises ValueError if `source` ends too early.
    """

    def __init__(self, source: Iterable[str]):
        self._source: Iterator[str] = iter(source)
        self._sentences: list[list[str]] = []
        self._ends = [0]  # words up to the end of each sentence

    @classmethod
    def noise(cls) -> "Haystack":
        """The five sentences of the passkey task, again and again."""
        return cls(cycle(NOISE))

    @classmethod
    def text(cls, parts: Sequence[str], random: np.random.Generator) -> "Haystack":
        """Sentences of a text from a random one on, the first after the last; plain sentences where there are none."""
        if not parts:
            return cls(sentences(random))
        start = int(random.integers(len(parts)))
        return cls(islice(cycle(parts), start, None))

    def first(self, words: int) -> list[list[str]]:
        """The words of the first sentences, `words` of them in all: the last sentence may be cut short."""
        while self._ends[-1] < words:
            sentence = next(self._source, "").split()
            if not sentence:
                raise ValueError("the haystack has too few words")
            self._sentences.append(sentence)
            self._ends.append(self._ends[-1] + len(sentence))
        whole = bisect_left(self._ends, words)  # sentences, the last of which may be cut
        found = self._sentences[:whole]
        return [*found[:-1], found[-1][: words - self._ends[whole - 1]]] if words else []

    def around(self, hidden: Sequence[tuple[float, str]], words: int) -> tuple[str, list[int]]:
        """The first `words` words, with each (depth, text) of `hidden` between two sentences; and the characters before
        each of those.

        The depth is a percentage of the words; texts at one place keep their order.
        """
        parts = self.first(words)
        ends = [0, *accumulate(map(len, parts))]

        def nearest(depth: float) -> int:
            return min(range(len(ends)), key=lambda place: abs(ends[place] - depth * words / 100))

        here = [(nearest(depth), 0, index, text) for index, (depth, text) in enumerate(hidden)]
        here += [(place, 1, 0, " ".join(part)) for place, part in enumerate(parts)]
        begins, pieces, length = [0] * len(hidden), [], 0
        for _, is_haystack, index, text in sorted(here):
            if not is_haystack:
                begins[index] = length
            pieces.append(text)
            length += len(text) + 1
        return " ".join(pieces), begins


def largest_fit(count: Callable[[int], int], budget: int, least: int = 0) -> int:
    """The largest size, `least` or more, with `count(size)` <= `budget`, where the count grows with the size.

    Where it does not at every step, one of those whose next size is too large. Raises ValueError if `least` is.
    """
    fits, fitting = least, count(least)
    if fitting > budget:
        raise ValueError(f"at least {fitting} tokens are needed, there are {budget}")
    beyond, exceeding = least + 16, count(least + 16)
    while exceeding <= budget:
        fits, fitting, beyond = beyond, exceeding, 2 * beyond
        exceeding = count(beyond)
    halve = False
    while beyond - fits > 1:
        guess = (beyond - fits) * (budget - fitting) / (exceeding - fitting)
        size = (fits + beyond) // 2 if halve else min(max(fits + round(guess), fits + 1), beyond - 1)
        found = count(size)
        if found <= budget:
            fits, fitting = size, found
        else:
            beyond, exceeding = size, found
        halve = not halve
    return fits
