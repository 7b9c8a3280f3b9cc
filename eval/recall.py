"""Questions of multi-query associative recall, and the answers of a model; data/recall.py makes the sequences.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.recall import RecallTask, Rows, ZoologyTask, recall_rows, zoology_rows
from data.shards import IGNORE

# Logits [B, T, V] of tokens [B, T].
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Questions:
    """Inputs, targets (IGNORE where nothing is asked) and positions of the answers among the inputs; all [B, T]."""

    inputs_BT: Tensor
    targets_BT: Tensor
    source_BT: Tensor

    @property
    def is_question(self) -> Tensor:
        """True at questions, [B, T]."""
        return self.targets_BT != IGNORE

    @property
    def distance(self) -> Tensor:
        """Tokens from the value to the question, [B, T]; meaningless where nothing is asked."""
        return torch.arange(self.inputs_BT.shape[1]) - self.source_BT


def questions(task: RecallTask, pairs: int, batch: int, seed: int, number: int) -> Questions:
    """`recall_rows` as tensors."""
    return as_tensors(recall_rows(task, pairs, batch, seed, number))


def zoology_questions(task: ZoologyTask, pairs: int, batch: int, random: np.random.RandomState) -> Questions:
    """`zoology_rows` as tensors."""
    return as_tensors(zoology_rows(task, pairs, batch, random))


def as_tensors(rows: Rows) -> Questions:
    return Questions(*(torch.from_numpy(x) for x in rows))


@torch.no_grad()
def recall(
    model: Model, task: RecallTask, pairs: tuple[int, ...], sequences: int, seed: int, batch: int = 64
) -> dict[int, dict[int, tuple[int, int]]]:
    """Count (questions answered right, questions asked) for each number of pairs and each distance.

    The distance from the value to the question is rounded down to a power of 2.
    """
    counts: dict[int, dict[int, tuple[int, int]]] = {}
    for count in pairs:
        found = counts.setdefault(count, {})
        for number in range(-(-sequences // batch)):
            asked = questions(task, count, min(batch, sequences - number * batch), seed, number)
            right = model(asked.inputs_BT).argmax(dim=-1) == asked.targets_BT
            bucket = 2 ** asked.distance[asked.is_question].float().log2().floor().int()
            for distance in sorted(set(bucket.tolist())):
                here = right[asked.is_question][bucket == distance]
                good, total = found.get(distance, (0, 0))
                found[distance] = good + int(here.sum()), total + len(here)
    return counts


def accuracy(counts: dict[int, tuple[int, int]]) -> float:
    """Fraction of the questions answered right, over all distances."""
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())
