"""Repeated sequences: are they copied, and how much does the second occurrence gain (induction; Olsson et al. 2022)?

begin x1 x2 ... xn x1 x2 ... xn        scored: x2 to xn of the second occurrence, of which x1 cannot be known
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data.cli import UsageError
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eval.positions import Bucket

    Draw = Callable[[Subject, int, int, int], Tensor]  # sequences [B, N] of (subject, B, N, number)

SOURCES = ("random", "text")
NAMES = ("accuracy", "generated")  # of what is copied
COPY_BLOCK, INDUCTION_BLOCK = 16, 8  # sequences that are drawn together


@dataclass(frozen=True)
class CopyOptions(TaskOptions):
    """Random tokens, and the same again.

    lengths    tokens to repeat; null: 8, 32, 128, ..., as far as they fit into the context twice, or the most that
               does; one of which the model does not predict all that is scored is left out
    sequences  sequences of each length
    generate   also let the model write the second half of the copy, greedily
    batch      sequences per forward pass
    """

    lengths: tuple[int, ...] | None = None
    sequences: int = 50
    generate: bool = True
    batch: int = COPY_BLOCK

    def problems(self) -> list[str]:
        found = [f"lengths: {length} is less than 2" for length in self.lengths or () if length < 2]
        return found + at_least_one(self, "sequences", "batch")

    def deciding(self) -> dict[str, Any]:
        """All options but the sequences per forward pass: any number of them has the digest of the default."""
        return asdict(self) | {"batch": COPY_BLOCK}


@dataclass(frozen=True)
class InductionOptions(TaskOptions):
    """Random tokens or text, and the same again.

    sources    random: uniformly drawn tokens; text: text= or validation text, else plain sentences
    length     tokens to repeat; null: as many as fit into the context twice
    sequences  sequences of each source
    batch      sequences per forward pass
    """

    sources: tuple[str, ...] = SOURCES
    length: int | None = None
    sequences: int = 32
    batch: int = INDUCTION_BLOCK

    def problems(self) -> list[str]:
        found = [
            f"sources: {source} is none of {', '.join(SOURCES)}" for source in self.sources if source not in SOURCES
        ]
        if self.length is not None and self.length < 2:
            found.append(f"length is {self.length}; it must be at least 2")
        return found + at_least_one(self, "sequences", "batch")

    def deciding(self) -> dict[str, Any]:
        """All options but the sequences per forward pass: any number of them has the digest of the default."""
        return asdict(self) | {"batch": INDUCTION_BLOCK}


def at_least_one(options: TaskOptions, *names: str) -> list[str]:
    return [f"{name} is {value}; it must be at least 1" for name in names if (value := getattr(options, name)) < 1]


def copy(subject: Subject, options: CopyOptions) -> TaskResult:
    """Share of the second occurrence that is predicted, given all before, and that is generated, given its first half.

    Raises UsageError if no length is possible.
    """
    from eval.tasks.drawn import share_of_sequences

    least = max(2, subject.model.plan.min_prompt - 2)  # n + 2 tokens come before the second x2
    most = (subject.context - 1) // 2
    room = room_for_two(subject, least, most)
    lengths = options.lengths or tuple(4**power // 2 for power in range(2, 9) if 4**power // 2 <= most)
    rows: list[dict[str, Any]] = []
    fitting = [length for length in dict.fromkeys(lengths) if least <= length <= most]
    if not fitting and options.lengths is None and least <= most:
        fitting = [most]
    if not fitting:
        raise UsageError(f"copy.lengths: {room}")
    for length in subject.progress(fitting, len(fitting), f"{subject.name}: copy"):
        batches = list(drawn(random_tokens, subject, options, length, COPY_BLOCK))
        predicted = subject.each(batches, partial(predicted_right, subject))
        row: dict[str, Any] = {"length": length, "sequences": options.sequences}
        asked = {"accuracy": (predicted, length - 1)}
        if options.generate:
            generated = subject.each(batches, partial(generated_right, subject), same_passes=False)
            asked["generated"] = (generated, length - length // 2)
        for name, (parts, count) in asked.items():
            right = [some for part in parts for some in part]  # of each sequence
            row |= share_of_sequences(right, [count] * len(right)).entries(name)
            row[f"{name}_count"] = count * len(right)
        rows.append(row)
    names = NAMES[: 1 + options.generate]
    figures: dict[str, float] = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    figures |= {f"{name}/{row['length']}": row[name] for row in rows for name in names}
    left_out = [length for length in dict.fromkeys(lengths) if length not in fitting]
    notes = tuple(f"{length} tokens are left out: {room}" for length in left_out)
    return TaskResult(figures, rows, notes=notes)


def room_for_two(subject: Subject, least: int, most: int) -> str:
    return f"the model needs {least} or more, and a context of {subject.context} has room for {most} twice"


def drawn(
    draw: "Draw", subject: Subject, options: CopyOptions | InductionOptions, length: int, block: int
) -> "Iterator[Tensor]":
    """Batches [B, N] of the sequences that `draw` makes, a block at a time."""
    from eval.tasks.drawn import in_batches

    blocks = in_batches(
        lambda number, size: (draw(subject, size, length, number),), options.sequences, block, options.batch
    )
    return (x_BN for (x_BN,) in blocks)


def predicted_right(subject: Subject, x_BN: "torch.Tensor") -> list[int]:
    """Tokens of the second occurrence of each of `x_BN`, but the first one, that are the likeliest in their places."""
    import torch

    from eval.tasks.likelihood import next_token_likelihoods

    with torch.no_grad():
        _, greedy_BT = next_token_likelihoods(subject.model, repeated(subject, x_BN))
    right: list[int] = greedy_BT[:, 1 - x_BN.shape[1] :].sum(dim=1).tolist()
    return right


def generated_right(subject: Subject, x_BN: "torch.Tensor") -> list[int]:
    """Tokens of the second half of each of `x_BN` that greedy decoding writes in their places, after all and the first
    half."""
    half = x_BN.shape[1] // 2
    rows = x_BN.tolist()
    prompts = [[subject.tokenizer.begin, *row, *row[:half]] for row in rows]
    written = subject.generate(prompts, x_BN.shape[1] - half)
    return [sum(a == b for a, b in zip(row[half:], new, strict=False)) for row, new in zip(rows, written, strict=True)]


def random_tokens(subject: Subject, batch: int, length: int, number: int) -> "torch.Tensor":
    """Tokens [B, N], each as likely as any other but those that begin or end a text; of batch `number`."""
    import numpy as np
    import torch

    special = {subject.tokenizer.begin, subject.tokenizer.end}
    plain = np.array([token for token in range(len(subject.model.output_weight)) if token not in special])
    random = np.random.default_rng((subject.seed, number, length))
    return torch.from_numpy(plain[random.integers(len(plain), size=(batch, length))]).to(subject.device)


def repeated(subject: Subject, x_BN: "torch.Tensor") -> "torch.Tensor":
    """The begin of a text, then `x_BN` twice: [B, 1 + 2 N]."""
    import torch

    return torch.cat((torch.full_like(x_BN[:, :1], subject.tokenizer.begin), x_BN, x_BN), dim=1)


def induction(subject: Subject, options: InductionOptions) -> TaskResult:
    """Loss of the second occurrence minus that of the first, in nats per token: below 0 if the model has learned to
    look up what followed the last time.

    Raises UsageError if the context is too short, or has no text of that length.
    """
    from eval.plots.positions import draw_positions

    most = (subject.context - 1) // 2
    length = most if options.length is None else options.length
    least = max(2, subject.model.plan.min_prompt + 1)
    if not least <= length <= most:
        raise UsageError(f"induction.length is {length}; {room_for_two(subject, least, most)}")
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    series: dict[str, list[Bucket]] = {}
    for source in subject.progress(options.sources, len(options.sources), f"{subject.name}: induction"):
        first, second, accuracy = occurrences(subject, options, source, length)
        figures[source] = mean_nats(second) - mean_nats(first)
        figures[f"{source}/first"], figures[f"{source}/second"] = mean_nats(first), mean_nats(second)
        figures[f"{source}/accuracy"] = accuracy
        series |= {f"{source}, first time": first, f"{source}, second time": second}
        for one, other in zip(first, second, strict=True):
            row = {"source": source, **asdict(one), "second": other.nats, "second_error": other.error}
            rows.append({**row, "score": other.nats - one.nats})
    picture = draw_positions(series, f"{subject.name}: a sequence of {length:,} tokens, and the same again")
    return TaskResult(figures, rows, {"positions": picture})


def occurrences(
    subject: Subject, options: InductionOptions, source: str, length: int
) -> "tuple[list[Bucket], list[Bucket], float]":
    """Loss by place in the sequence, the first and the second time, and the share predicted the second time.

    The first token is left out, and those that the model does not predict the first time.
    """
    import torch

    from eval.positions import by_position
    from eval.tasks.likelihood import next_token_likelihoods

    @torch.no_grad()
    def scored(x_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nats_BT, greedy_BT = next_token_likelihoods(subject.model, repeated(subject, x_BN))
        return nats_BT.cpu(), greedy_BT.cpu()

    draw = random_tokens if source == "random" else text_tokens
    batches = drawn(draw, subject, options, length, INDUCTION_BLOCK)
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    second: list[tuple[torch.Tensor, torch.Tensor]] = []
    right, total = 0, 0
    skipped = max(0, subject.model.plan.min_prompt - 1)  # of x, in the first block
    for nats_BT, greedy_BT in subject.each(batches, scored):
        size = len(nats_BT)
        real_BN = torch.ones(size, length, dtype=torch.bool)
        real_BN[:, : max(1, skipped)] = False
        missing = torch.zeros(size, skipped)
        one_BN = torch.cat((missing, -nats_BT[:, : length - skipped]), dim=1)
        other_BN = -nats_BT[:, length - skipped :]
        first.append((one_BN * real_BN, real_BN))
        second.append((other_BN * real_BN, real_BN))
        right += int(greedy_BT[:, length - skipped :][real_BN].sum())
        total += int(real_BN.sum())
    return by_position(first), by_position(second), right / total


def mean_nats(buckets: "Sequence[Bucket]") -> float:
    return sum(bucket.nats * bucket.targets for bucket in buckets) / sum(bucket.targets for bucket in buckets)


def text_tokens(subject: Subject, batch: int, length: int, number: int) -> "torch.Tensor":
    """Pieces of text [B, N], each from a random sentence on, in tokens; of batch `number`."""
    import numpy as np
    import torch

    from eval.tasks.haystack import Haystack, haystack_sentences

    random = np.random.default_rng((subject.seed, number, length))
    parts = haystack_sentences(subject)
    rows = []
    for _ in range(batch):
        source, words = Haystack.text(parts, random), length
        tokens: list[int] = []
        while len(tokens) < length + 1:
            tokens = subject.tokenizer.encode(" ".join(word for part in source.first(words) for word in part))
            words *= 2
        rows.append(tokens[:length])
    return torch.tensor(rows, device=subject.device)
