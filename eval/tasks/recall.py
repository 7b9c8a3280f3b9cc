"""Multi-query associative recall of random tokens: Zoology's sequences, and ours with a gap (data/recall.py)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data.cli import UsageError
from data.config import RECALL_KINDS
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult

if TYPE_CHECKING:
    from torch import Tensor

    from data.recall import RecallTask, ZoologyTask
    from eval.recall import Questions

LENGTH = 16  # tokens for each pair, as in figure 2 of the paper
BLOCK = 16  # sequences that are drawn together
MOST = 8192  # tokens that sequences are drawn from by default, as in the paper
NAMES = ("accuracy", "choice")


@dataclass(frozen=True)
class Options(TaskOptions):
    """Keys and values, then keys whose values are asked for; tokens are drawn, not text.

    kinds      zoology, the paper's sequences; gap, ours, whose second half asks for values of the first tokens
    pairs      numbers of pairs
    length     tokens per sequence; null: 16 for each pair
    vocab      limit of the tokens that sequences are drawn from; null: 8192, and of a model trained on data=recall all
               of its data, which no other limit may change
    noise      random tokens instead of token 0 between the questions of Zoology's sequences
    joined     a pair of kind gap is one token, for models trained with data.source.recall.joined=true
    sequences  sequences for each kind and number of pairs
    batch      sequences per forward pass
    """

    kinds: tuple[str, ...] = RECALL_KINDS
    pairs: tuple[int, ...] = (4, 8, 16)
    length: int | None = None
    vocab: int | None = None
    noise: bool = False
    joined: bool = False
    sequences: int = 100
    batch: int = BLOCK

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

    def deciding(self) -> dict[str, Any]:
        """All options but the sequences per forward pass: any number of them has the digest of the default. The limit
        of tokens that is not set has that of the number it stands for."""
        return asdict(self) | {"batch": BLOCK, "vocab": self.vocab or MOST}


def run(subject: Subject, options: Options) -> TaskResult:
    """Count right answers at the questions alone, by kind, number of pairs and distance from value to question.

    `accuracy`: the value is the likeliest of all tokens; `choice`: the likeliest of the values in its sequence.
    Raises UsageError if nothing can be asked, or with other tokens than those of the model's data.
    """
    import torch

    from eval.recall import right
    from eval.tasks.drawn import share_of_sequences

    cells = [(kind, pairs) for kind in dict.fromkeys(options.kinds) for pairs in dict.fromkeys(options.pairs)]
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    notes = []
    totals: dict[str, list[float]] = {}
    for kind, pairs in subject.progress(cells, len(cells), f"{subject.name}: recall"):
        problem = impossible(subject, options, kind, pairs)
        counts: dict[int, list[Tensor]] = {}
        asked = () if problem else batches(subject, options, kind, pairs)
        for found in subject.each(asked, partial(right, subject.model)):
            for distance, right_B3 in found.items():
                counts.setdefault(distance, []).append(right_B3)
        if not counts:
            unanswered = subject.model.plan.min_prompt - 1
            problem = problem or (
                f"all questions lie in the first {unanswered} tokens, where the model answers none; set a larger "
                "recall.length"
            )
            notes.append(f"{kind} with {pairs} pairs is left out: {problem}")
            continue
        of_pairs = [0.0, 0.0, 0.0]
        for distance, parts in sorted(counts.items()):
            *answers, count_S = torch.cat(parts).T.tolist()
            row: dict[str, Any] = {"kind": kind, "pairs": pairs, "distance": distance, "count": int(sum(count_S))}
            for name, right_S in zip(NAMES, answers, strict=True):
                row |= share_of_sequences(right_S, count_S).entries(name)
            rows.append(row)
            of_pairs = [total + sum(more) for total, more in zip(of_pairs, (*answers, count_S), strict=True)]
        totals[kind] = [total + more for total, more in zip(totals.get(kind, [0.0] * 3), of_pairs, strict=True)]
        figures |= {f"{kind}/{name}/{pairs}": of_pairs[i] / of_pairs[2] for i, name in enumerate(NAMES)}
    if not rows:
        raise UsageError("recall: nothing can be asked:\n" + "\n".join(notes))
    for kind, total in totals.items():
        figures |= {f"{kind}/{name}": total[i] / total[2] for i, name in enumerate(NAMES)}
    notes.append("distance: tokens from the value to the question, rounded down to a power of 2")
    return TaskResult(figures, rows, notes=tuple(notes))


def batches(subject: Subject, options: Options, kind: str, pairs: int) -> "Iterator[Questions]":
    """Batches of questions that are not `impossible`, drawn in blocks that are functions of (seed, number, pairs)."""
    import numpy as np

    from data.recall import ZoologyTask
    from eval.recall import Questions, questions, zoology_questions
    from eval.tasks.drawn import in_batches

    task = task_of(subject, options, kind, pairs)

    def draw(number: int, size: int) -> "tuple[Tensor, ...]":
        if isinstance(task, ZoologyTask):
            random = np.random.RandomState((subject.seed, number, pairs))
            return zoology_questions(task, pairs, size, random)
        return questions(task, pairs, size, subject.seed, number)

    for tensors in in_batches(draw, options.sequences, BLOCK, options.batch):
        yield Questions(*tensors)


def impossible(subject: Subject, options: Options, kind: str, pairs: int) -> str:
    """Say why there are no sequences of so many pairs, with the fix; empty: there are.

    Raises UsageError if the model was trained on others.
    """
    if kind == "gap":
        check_joined(subject, options.joined, "recall")
    problem = length_problem(subject, options.length or LENGTH * pairs, "recall.length")
    return problem or "; ".join(task_of(subject, options, kind, pairs).problems(pairs))


def length_problem(subject: Subject, length: int, option: str) -> str:
    """Say why the model takes no sequences of `length` tokens, which `option` sets; empty: it does."""
    if length > subject.context:
        return f"{length} tokens are beyond the context of {subject.context}; set {option}"
    least = subject.model.plan.min_prompt
    if length < least:
        return f"{length} tokens are fewer than the {least} that the model needs; set {option}={least}"
    return ""


def check_joined(subject: Subject, joined: bool, task: str) -> None:
    """Raise UsageError if the pairs of kind gap are not `joined` as in the model's data. `task`: whose option it is."""
    if subject.joined in (None, joined):
        return
    fix = "false" if joined else "true recall.kinds=gap" if task == "recall" else "true"
    told = f"{task}.joined is {str(joined).lower()}, but in the data of {subject.name}"
    raise UsageError(f"{told} a pair is {'two tokens' if joined else 'one token'}; set {task}.joined={fix}")


def task_of(subject: Subject, options: Options, kind: str, pairs: int) -> "RecallTask | ZoologyTask":
    """The shape of the sequences. Raises UsageError if the model was trained on others."""
    from data.recall import RecallTask, ZoologyTask

    length = options.length or LENGTH * pairs

    def of(vocab: int) -> RecallTask | ZoologyTask:
        if kind == "zoology":
            return ZoologyTask(length, vocab, noise=options.noise)
        return RecallTask.of(length, pairs, vocab, options.joined)

    known = subject.numbers
    if known is None:
        return of(min(options.vocab or MOST, len(subject.model.output_weight)))
    if options.vocab is not None and options.vocab < known and of(options.vocab) != of(known):
        raise UsageError(
            f"recall.vocab is {options.vocab}, but the data of {subject.name} has {known} tokens, of which other ones "
            f"are keys and values; set recall.vocab={known}"
        )
    return of(known)
