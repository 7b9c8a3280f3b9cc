"""Multi-query associative recall (Arora et al. 2023, "Zoology", section 3): pairs of key and value, then noise, then
keys again; at each of those the model is to predict the value that came with it.

    k3 v7 k1 v2 | n n n n ... n | k1 k1 k3 k1 ...        answers: 2 at k1, 7 at k3, nothing anywhere else

Answers are never among the inputs. `gap` tokens stand between the pairs and the first question, so that what cannot see
further has to guess. Unlike the paper's, all tokens after the gap are questions: small models learn from fewer
sequences. Every batch is a function of (seed, number).

`zoology_rows` makes the paper's own sequences: each key is asked for once, at an even distance after the pairs that is
drawn from a power law, and token 0, or noise, stands everywhere else.

    k3 v7 k1 v2 | k1 0 0 0 k3 0 0 0 ...                  answers: 2 at k1, 7 at k3

A data set of such sequences is text, too: a document is a line of T numbers and a line of their T answers, 0 where
nothing is asked, which is never an answer.

Shapes: B sequences, T tokens, P pairs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .config import RECALL_KINDS, SPLITS, RecallConfig
from .files import DataError
from .shards import IGNORE


class Rows(NamedTuple):
    """Inputs, targets (IGNORE where nothing is asked) and positions of the answers among the inputs; all [B, T]."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    source_BT: np.ndarray


@dataclass(frozen=True)
class RecallTask:
    """Shape of the sequences. Token numbers: noise first, then keys, then values.

    length, gap  tokens of a sequence, and those between its last value and its first question
    noise        number of different tokens that mean nothing
    joined       a pair is one token instead of two: one layer then suffices, where else a lower one must have told each
                 value its key
    """

    length: int = 128
    gap: int = 62
    noise: int = 8
    keys: int = 32
    values: int = 32
    joined: bool = False

    @classmethod
    def of(cls, length: int, pairs: int, vocab_size: int, joined: bool = False) -> "RecallTask":
        """Sequences whose second half asks, of up to 32 keys and as many values."""
        room = max(0, vocab_size - cls.noise)
        symbols = min(32, math.isqrt(room + 1) - 1 if joined else room // 2)
        gap = max(0, length // 2 - (1 if joined else 2) * pairs)
        return cls(length, gap, keys=symbols, values=symbols, joined=joined)

    @property
    def vocab_size(self) -> int:
        return self.first_pair + (self.keys * self.values if self.joined else 0)

    @property
    def first_pair(self) -> int:
        """The first token after noise, keys and values."""
        return self.noise + self.keys + self.values

    @property
    def pair_length(self) -> int:
        return 1 if self.joined else 2

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs: each needs room for a question, and a key of its own."""
        return max(0, min((self.length - self.gap) // (self.pair_length + 1), self.keys))

    def problems(self, pairs: int) -> list[str]:
        """Reasons why sequences of `pairs` pairs are impossible, each with the fix."""
        found = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("length", 1), ("gap", 0), ("noise", 1), ("keys", 1), ("values", 1))
            if getattr(self, name) < least
        ]
        if not found and not 1 <= pairs <= self.most_pairs:
            found.append(
                f"{pairs} pairs: at least 1, and at most {self.most_pairs} find room in {self.length} tokens with a "
                f"gap of {self.gap} and {self.keys} keys; make the sequence longer, the gap shorter, or add keys"
            )
        return found


@dataclass(frozen=True)
class ZoologyTask:
    """Shape of the paper's sequences (figure 2; HazyResearch/zoology, `multiquery_ar`). Token 0 is nothing, the lower
    half of the others are keys, the upper half of the vocabulary values.

    power   exponent of the law of the distances, plus 1: near 0, short ones are the most frequent; 1 makes all alike
    noise   tokens drawn from the whole vocabulary stand for nothing, in place of token 0
    """

    length: int = 64
    vocab_size: int = 8192
    power: float = 0.01
    noise: bool = False

    def problems(self, pairs: int) -> list[str]:
        """Reasons why sequences of `pairs` pairs are impossible, each with the fix."""
        found = []
        if self.length % 2 or self.vocab_size <= self.length:
            found.append(
                f"length {self.length} and a vocabulary of {self.vocab_size}; the length must be even, and below the "
                "vocabulary"
            )
        most = min(self.length // 4, self.vocab_size // 2 - 1)
        if not 1 <= pairs <= most:
            found.append(f"{pairs} pairs: at least 1, and at most {most} find room; make the sequence longer")
        return found


def recall_rows(task: RecallTask, pairs: int, batch: int, seed: int, number: int) -> Rows:
    """Batch `number` of `batch` sequences with `pairs` pairs, each as likely as any other to be asked for.

    Keys of a sequence differ, values need not. Raises ValueError if the pairs have no room.
    """
    if found := task.problems(pairs):
        raise ValueError("; ".join(found))
    random = np.random.default_rng((seed, number, pairs))
    context, step = task.pair_length * pairs, task.pair_length
    first = context + task.gap
    tokens_BT = random.integers(task.noise, size=(batch, task.length))
    targets_BT, source_BT = np.full((2, batch, task.length), IGNORE)
    keys_BP = task.noise + random.permuted(np.tile(np.arange(task.keys), (batch, 1)), axis=1)[:, :pairs]
    keys_end = task.noise + task.keys
    values_BP = keys_end + random.integers(task.values, size=(batch, pairs))
    if task.joined:
        tokens_BT[:, :context] = task.first_pair + (keys_BP - task.noise) * task.values + values_BP - keys_end
    else:
        tokens_BT[:, 0:context:2], tokens_BT[:, 1:context:2] = keys_BP, values_BP
    pair_BQ = random.integers(pairs, size=(batch, task.length - first))
    tokens_BT[:, first:] = np.take_along_axis(keys_BP, pair_BQ, axis=1)
    targets_BT[:, first:] = np.take_along_axis(values_BP, pair_BQ, axis=1)
    source_BT[:, first:] = step * pair_BQ + step - 1
    return Rows(tokens_BT, targets_BT, source_BT)


def zoology_rows(task: ZoologyTask, pairs: int, batch: int, random: np.random.RandomState) -> Rows:
    """The next `batch` sequences of `random`: from RandomState(s), those of the paper's generator with seed s, whose
    noise however is drawn by another generator. Raises ValueError if the pairs have no room."""
    if found := task.problems(pairs):
        raise ValueError("; ".join(found))
    context, first_value = 2 * pairs, task.vocab_size // 2
    places = (task.length - context) // 2
    law = task.power * np.arange(1, places + 1) ** (task.power - 1)

    def drawn(choices: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
        return np.stack([random.choice(choices, pairs, replace=False, p=p) for _ in range(batch)])

    keys_BP = drawn(np.arange(1, first_value))
    values_BP = drawn(np.arange(first_value, task.vocab_size))
    asked_BP = context + 2 * drawn(np.arange(places), law / law.sum())
    tokens_BT = np.zeros((batch, task.length), dtype=np.int64)
    targets_BT, source_BT = np.full((2, batch, task.length), IGNORE)
    tokens_BT[:, :context] = np.stack((keys_BP, values_BP), axis=-1).reshape(batch, -1)
    np.put_along_axis(tokens_BT, asked_BP, keys_BP, axis=1)
    np.put_along_axis(targets_BT, asked_BP, values_BP, axis=1)
    value_at_BP = np.broadcast_to(np.arange(1, context, 2), (batch, pairs))
    np.put_along_axis(source_BT, asked_BP, value_at_BP, axis=1)
    if task.noise:
        noise_BT = random.randint(task.vocab_size, size=tokens_BT.shape)
        tokens_BT = np.where(tokens_BT == 0, noise_BT, tokens_BT)
    return Rows(tokens_BT, targets_BT, source_BT)


def texts(config: RecallConfig) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for every sequence: `rows` to train on, then `val_rows` for val, and as many for test.

    Of one number of pairs, training sequences of kind zoology are those of the paper's generator with the same seed.
    Raises DataError if they are impossible.
    """
    if found := problems(config):
        raise DataError("\n".join(found))
    counts = config.num_pairs
    for number, (split, rows) in enumerate(zip(SPLITS, (config.rows, config.val_rows, config.val_rows), strict=True)):
        each = -(-rows // len(counts))
        made = [_rows(config, pairs, each, number) for pairs in counts]
        for row in range(rows):
            inputs_BT, targets_BT, _ = made[row % len(counts)]
            place = row // len(counts)
            lines = inputs_BT[place], np.maximum(targets_BT[place], 0)
            yield split, "".join(" ".join(map(str, line.tolist())) + "\n" for line in lines)


def problems(config: RecallConfig) -> list[str]:
    """Keys of `source.recall` that make no sequences, each with the fix."""
    found = [] if config.kind in RECALL_KINDS else [f"kind is {config.kind}; choose {', '.join(RECALL_KINDS)}"]
    found += [
        f"{name} is {getattr(config, name)}; it must be at least {least}"
        for name, least in (("length", 2), ("rows", 1), ("val_rows", 1), ("vocab", 10), ("seed", 0))
        if getattr(config, name) < least
    ]
    if config.joined and config.kind == "zoology":
        found.append("joined is of kind=gap; the paper's pairs are two tokens")
    try:
        counts = config.num_pairs
    except (TypeError, ValueError):
        counts = []
    if not counts:
        found.append(f"pairs is {config.pairs}; write a number, or a list of them")
    if not found:
        for pairs in counts:
            found += _task(config, pairs).problems(pairs)
    return [f"source.recall: {problem}" for problem in found]


def joined_pairs(recipe: Mapping[str, Any]) -> bool | None:
    """Tell whether a pair is one token in the data of `recipe` (`Manifest.recipe`); None: it has none of kind gap."""
    recall = recipe["source"].get("recall")
    return bool(recall.get("joined", False)) if recall and recall.get("kind") == "gap" else None


def _task(config: RecallConfig, pairs: int) -> RecallTask | ZoologyTask:
    if config.kind == "zoology":
        return ZoologyTask(config.length, config.vocab, noise=config.noise)
    return RecallTask.of(config.length, pairs, config.vocab, config.joined)


def _rows(config: RecallConfig, pairs: int, rows: int, number: int) -> Rows:
    """Make the sequences of split `number` with so many pairs."""
    task = _task(config, pairs)
    if isinstance(task, ZoologyTask):
        return zoology_rows(task, pairs, rows, np.random.RandomState(config.seed + number))
    return recall_rows(task, pairs, rows, config.seed, number)
