"""Multi-query associative recall of random tokens: Zoology's sequences, and ours with a gap (data/recall.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data.cli import UsageError
from data.config import RECALL_KINDS
from eval.intervals import counted_share
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult

if TYPE_CHECKING:
    import torch

    from eval.recall import Questions

LENGTH = 16  # tokens for each pair, as in figure 2 of the paper


@dataclass(frozen=True)
class Options(TaskOptions):
    """Keys and values, then keys whose values are asked for; tokens are drawn, not text.

    kinds      zoology, the paper's sequences; gap, ours, whose second half asks for values of the first tokens
    pairs      numbers of pairs
    length     tokens per sequence; null: 16 for each pair
    vocab      limit of the tokens that Zoology's sequences are drawn from
    noise      random tokens instead of token 0 between the questions of Zoology's sequences
    joined     a pair of kind gap is one token, for models trained with data.source.recall.joined=true
    sequences  sequences for each kind and number of pairs
    batch      sequences per forward pass
    """

    kinds: tuple[str, ...] = RECALL_KINDS
    pairs: tuple[int, ...] = (4, 8, 16)
    length: int | None = None
    vocab: int = 8192
    noise: bool = False
    joined: bool = False
    sequences: int = 100
    batch: int = 16

    def problems(self) -> list[str]:
        found = [
            f"kinds: {kind} is none of {', '.join(RECALL_KINDS)}" for kind in self.kinds if kind not in RECALL_KINDS
        ]
        if self.joined and self.kinds != ("gap",):
            found.append("joined is of kind gap, the paper's pairs are two tokens; set recall.kinds=gap")
        if not self.kinds or not self.pairs:
            found.append("kinds and pairs must not be empty")
        found += [f"pairs: {pairs} is less than 1" for pairs in self.pairs if pairs < 1]
        found += [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("length", "vocab", "sequences", "batch")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        return found


def run(subject: Subject, options: Options) -> TaskResult:
    """Count right answers at the questions alone, by kind, number of pairs and distance from value to question.

    `accuracy`: the value is the likeliest of all tokens; `choice`: the likeliest of the values in its sequence.
    """
    import torch

    cells = [(kind, pairs) for kind in dict.fromkeys(options.kinds) for pairs in dict.fromkeys(options.pairs)]
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    notes = []
    totals: dict[str, torch.Tensor] = {}
    for kind, pairs in subject.progress(cells, len(cells), f"{subject.name}: recall"):
        try:
            counts: dict[int, torch.Tensor] = {}
            for found in subject.each(batches(subject, options, kind, pairs), partial(right, subject)):
                for distance, count in found.items():
                    counts[distance] = counts.get(distance, torch.zeros(3)) + count
            if not counts:
                unanswered = subject.model.plan.min_prompt - 1
                raise ValueError(
                    f"all questions lie in the first {unanswered} tokens, where the model answers none; set a larger "
                    "recall.length"
                )
        except ValueError as problem:
            notes.append(f"{kind} with {pairs} pairs is left out: {problem}")
            continue
        for distance, (accuracy, choice, count) in sorted((d, c.tolist()) for d, c in counts.items()):
            row: dict[str, Any] = {"kind": kind, "pairs": pairs, "distance": distance, "count": int(count)}
            for name, value in (("accuracy", accuracy), ("choice", choice)):
                share = counted_share(value, int(count))
                row |= {name: share["share"], f"{name}_low": share["low"], f"{name}_high": share["high"]}
            rows.append(row)
        total = torch.stack(tuple(counts.values())).sum(dim=0)
        totals[kind] = totals.get(kind, torch.zeros(3)) + total
        figures |= {f"{kind}/{name}/{pairs}": (total[i] / total[2]).item() for i, name in enumerate(NAMES)}
    if not rows:
        raise UsageError("recall: nothing can be asked:\n" + "\n".join(notes))
    for kind, total in totals.items():
        figures |= {f"{kind}/{name}": (total[i] / total[2]).item() for i, name in enumerate(NAMES)}
    notes.append("distance: tokens from the value to the question, rounded down to a power of 2")
    return TaskResult(figures, rows, notes=tuple(notes))


NAMES = ("accuracy", "choice")


def batches(subject: Subject, options: Options, kind: str, pairs: int) -> "Iterator[Questions]":
    """Batches of questions, each a function of (seed, number, pairs). Raises ValueError if they are impossible."""
    import numpy as np

    from data.recall import RecallTask, ZoologyTask
    from eval.recall import questions, zoology_questions

    length, vocab_size = options.length or LENGTH * pairs, len(subject.model.output_weight)
    if length > subject.context:
        raise ValueError(f"{length} tokens are beyond the context of {subject.context}; set recall.length")
    for number in range(-(-options.sequences // options.batch)):
        size = min(options.batch, options.sequences - number * options.batch)
        if kind == "zoology":
            task = ZoologyTask(length, min(options.vocab, vocab_size), noise=options.noise)
            yield zoology_questions(task, pairs, size, np.random.RandomState((subject.seed, number, pairs)))
        else:
            ours = RecallTask.of(length, pairs, vocab_size, options.joined)
            yield questions(ours, pairs, size, subject.seed, number)


def right(subject: Subject, questions: "Questions") -> "dict[int, torch.Tensor]":
    """Answers that are right by accuracy, by choice, and questions, [3], by the power of 2 below their distance.

    Questions that the model does not answer, in its first block, are left out.
    """
    import torch

    from data.batches import IGNORE
    from eval.tasks.likelihood import measure_next

    tokens_BT, targets_BT = (x.to(subject.device) for x in (questions.inputs_BT, questions.targets_BT))
    values_BP = targets_BT.topk(
        int(questions.is_question.sum(dim=1).max()), dim=1
    ).values  # IGNORE, where there are fewer
    known_BP = values_BP != IGNORE

    def measure(logits_NV: "torch.Tensor", row_N: "torch.Tensor", place_N: "torch.Tensor") -> "torch.Tensor":
        target_N = targets_BT[row_N, place_N.clamp(0, targets_BT.shape[1] - 1)]
        logits_NP = logits_NV.gather(1, values_BP[row_N].clamp(min=0)).masked_fill(~known_BP[row_N], -torch.inf)
        chosen_N = values_BP[row_N].gather(1, logits_NP.argmax(dim=1, keepdim=True))[:, 0]
        return torch.stack((logits_NV.argmax(dim=-1) == target_N, chosen_N == target_N), dim=-1).float()

    with torch.no_grad():
        right_BT2 = measure_next(subject.model, tokens_BT, measure).cpu()
    asked_BT, distance_BT = (x[:, -right_BT2.shape[1] :] for x in (questions.is_question, questions.distance))
    power_N = 2 ** distance_BT[asked_BT].float().log2().floor().int()
    counts = {}
    for power in sorted(set(power_N.tolist())):
        here_N2 = right_BT2[asked_BT][power_N == power]
        counts[power] = torch.cat((here_N2.sum(dim=0), torch.tensor([float(len(here_N2))])))
    return counts
