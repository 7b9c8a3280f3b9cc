"""Questions of multi-query associative recall, and the answers of a model; data/recall.py makes the sequences.

Shapes: B sequences, T tokens, P pairs, N logits, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arch import LanguageModel
from data.recall import RecallTask, Rows, ZoologyTask, recall_rows, zoology_rows
from data.shards import IGNORE
from eval.tasks.likelihood import measure_next


class Questions(NamedTuple):
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
def right(model: LanguageModel, questions: Questions) -> dict[int, Tensor]:
    """Answers of each sequence that are right by accuracy, by choice, and its questions, [B, 3], by the power of 2
    below the distance from the value to the question.

    By accuracy the value is the likeliest of all tokens, by choice the likeliest of the values asked for in its
    sequence. Questions that the model does not answer, in its first block, are left out.
    """
    device = model.output_weight.device
    tokens_BT, targets_BT = questions.inputs_BT.to(device), questions.targets_BT.to(device)
    values_BP = targets_BT.topk(int(questions.is_question.sum(dim=1).max()), dim=1).values  # IGNORE where fewer are
    known_BP = values_BP != IGNORE

    def measure(logits_NV: Tensor, row_N: Tensor, place_N: Tensor) -> Tensor:
        target_N = targets_BT[row_N, place_N.clamp(0, targets_BT.shape[1] - 1)]
        logits_NP = logits_NV.gather(1, values_BP[row_N].clamp(min=0)).masked_fill(~known_BP[row_N], -torch.inf)
        chosen_N = values_BP[row_N].gather(1, logits_NP.argmax(dim=1, keepdim=True))[:, 0]
        return torch.stack((logits_NV.argmax(dim=-1) == target_N, chosen_N == target_N), dim=-1).float()

    right_BT2 = measure_next(model, tokens_BT, measure).cpu()
    asked_BT, distance_BT = (x[:, -right_BT2.shape[1] :] for x in (questions.is_question, questions.distance))
    right_BT3 = torch.cat((right_BT2, torch.ones_like(right_BT2[..., :1])), dim=-1)
    power_BT = 2 ** distance_BT.float().log2().floor().int()
    return {
        power: (right_BT3 * (asked_BT & (power_BT == power))[..., None]).sum(dim=1)
        for power in sorted(set(power_BT[asked_BT].tolist()))
    }
