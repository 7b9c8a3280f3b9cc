"""Loss, recall and bytes of a cache that is made smaller at test time, by one protocol for every model and method.

text     a prefix of `prefix` tokens goes into the cache, the cache is compressed, and the next `new` tokens are scored
         one after the other over what is left (teacher forcing): the same windows of text for every model and method
recall   keys and values, and noise, before the compression; questions after it (data/recall.py, the sequences of
         `recall.kinds=gap`), none of which the compression has seen
turns    the same, with a first turn of questions for every other key before the compression: the second turn asks for
         those again (`known`), and for keys that nobody had asked for (`new`), which a method that keeps what the first
         questions looked at has thrown away (SCBench, Li et al. 2024); what chance left out of a sequence's first turn
         counts as neither

The first token after the compression is fed and not scored as a target, so that every score comes through the
compressed cache. Bytes are those of the cache's tensors, for one sequence, of `recall` and `turns` for one with the
most pairs: `end_bytes` after the last token, `mean_bytes` over the steps after the compression, `peak_bytes` also
before it, with what the keep notes of the prompt's queries until then. A method that holds tokens in another memory
(ArkVale) has `offloaded_bytes` there, which the others do not count, and copies `recalled_bytes` back per step.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from arch.compression.checks import left_alone
from arch.compression.storage import compressed_bytes, has_formula, offloads
from data.cli import UsageError
from eval.intervals import interval
from eval.methods import name_of
from eval.tasks.recall import BLOCK, LENGTH, NAMES, check_joined, length_problem
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult
from eval.units import counted

if TYPE_CHECKING:
    import torch

    from data.recall import RecallTask

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
PARTS = ("text", "recall", "turns")
# Version of the protocol and of arch/compression, in the digest of every result: raise it where either changes so that
# the same options and methods give other figures. Results of before 2026-11-30 have none.
VERSION = 2
MOST_NEW = 128  # tokens that are scored of a window by default: each is a step


@dataclass(frozen=True)
class Options(TaskOptions):
    """A prefix, compression, and what comes after it through the compressed cache; cache= names the methods.

    parts      text, recall, turns, with commas
    prefix     tokens of text before the compression; null: those of the context but the new ones
    new        tokens of text that are scored after it; null: a quarter of the context, 128 at most
    windows    pieces of text
    pairs      numbers of keys and values in a sequence of recall
    joined     a pair is one token, for models trained on data.source.recall.joined=true
    length     tokens of such a sequence, of which half come before the questions; null: 16 for each pair
    sequences  of recall, and of turns, for each number of pairs
    dtype      type of what is not coded in the cache: bf16, fp16 or fp32, whatever that of the weights
    batch      sequences at a time
    """

    parts: tuple[str, ...] = PARTS
    prefix: int | None = None
    new: int | None = None
    windows: int = 64
    pairs: tuple[int, ...] = (4, 8)
    joined: bool = False
    length: int | None = None
    sequences: int = 64
    dtype: str = "bf16"
    batch: int = BLOCK

    def problems(self) -> list[str]:
        found = [f"parts: {part} is none of {', '.join(PARTS)}" for part in self.parts if part not in PARTS]
        if self.dtype not in ITEMSIZES:
            found.append(f"dtype is {self.dtype}; choose {', '.join(ITEMSIZES)}")
        if not self.parts or not self.pairs:
            found.append("parts and pairs must not be empty")
        found += [f"pairs: {pairs} is less than 2" for pairs in self.pairs if pairs < 2]
        found += [
            f"{name} is {value}; it must be at least 1"
            for name in ("prefix", "new", "windows", "length", "sequences", "batch")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        return found

    def deciding(self) -> dict[str, Any]:
        """All options, `batch` with them, as some methods act on a batch as a whole; and the version, of `none` as of
        methods, whose figures are compared with its."""
        return asdict(self) | {"version": VERSION}


@dataclass
class Bytes:
    """Bytes of a cache for one sequence, as it goes on, of several batches; `offloads`: some are in another memory."""

    offloads: bool = False
    ends: list[float] = field(default_factory=list)
    peak: float = 0.0
    steps: list[float] = field(default_factory=list)
    offloaded: list[float] = field(default_factory=list)
    recalled: float = 0.0

    def see(self, cache: Any, rows: int, step: bool, last: bool = False, beside: int = 0) -> None:
        """Note the bytes of `cache` now, which holds `rows` sequences, and those `beside` it; of a `step` after the
        compression, the `last` of its batch."""
        now = cache.nbytes / rows
        self.peak = max(self.peak, now + beside / rows)
        if step:
            self.steps.append(now)
        if last:
            self.ends.append(now)

    def see_offloaded(self, cache: Any, rows: int) -> None:
        """Note the bytes of `cache` in another memory, and those that were copied back in all steps of its batch."""
        self.offloaded.append(cache.offloaded_nbytes / rows)
        self.recalled += cache.recalled_nbytes / rows

    def figures(self) -> dict[str, float]:
        found = {
            "end_bytes": math.fsum(self.ends) / len(self.ends),
            "mean_bytes": math.fsum(self.steps) / len(self.steps),
            "peak_bytes": self.peak,
        }
        if self.offloads:
            found["offloaded_bytes"] = math.fsum(self.offloaded) / len(self.offloaded)
            found["recalled_bytes"] = self.recalled / len(self.steps)
        return found


def run(subject: Subject, options: Options) -> TaskResult:
    """Measure the parts; those for which the model, or its context, is not made are left out with a note.

    Raises UsageError if there is no text for `text`, or nothing can be measured.
    """
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    samples: dict[str, list[float]] = {}
    parts = [part for part in PARTS if part in options.parts]
    if "text" in parts and subject.prepared is not None and subject.prepared.has_answers:
        parts.remove("text")
        notes.append("text is left out: the data is questions and their answers; give text=FILE")
    for part in parts:
        if part == "text":
            prefix, new = lengths(subject, options)
            if problem := too_little(subject, prefix, prefix + new, options.dtype):
                notes.append(f"text is left out: {problem}")
                continue
        found = of_text(subject, options) if part == "text" else of_recall(subject, options, part)
        figures |= found.figures
        rows += found.rows
        samples |= found.samples
        notes += found.notes
    if not rows:
        raise UsageError("compressed: nothing can be measured:\n" + "\n".join(notes))
    return TaskResult(figures, rows, notes=tuple(dict.fromkeys(notes)), samples=samples)


def row(part: str, what: str, count: int, name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"part": part, "what": what, "count": count, "figure": name, "value": value, "low": low, "high": high}


def through(
    subject: Subject,
    tokens_BT: "torch.Tensor",
    prefix: int,
    dtype: str,
    measure: "Callable[[torch.Tensor, int], None]",
    seen: Bytes,
) -> None:
    """Fill a cache of the subject's method with `prefix` tokens, compress it, and feed the others one by one.

    `measure` is given the logits [B, V] after each token from number `prefix` on, and that number.
    """
    import torch

    rows, length = tokens_BT.shape
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    with torch.no_grad():
        cache = subject.allocate_cache(rows, length, types[dtype])
        subject.model.prefill(tokens_BT[:, :prefix], cache)
        seen.see(cache, rows, step=False, beside=0 if subject.method is None else cache.notes_nbytes)
        if subject.method is not None:
            cache.compress()
        seen.see(cache, rows, step=False)
        for place in range(prefix, length):
            logits_B1V = subject.model.decode_step(tokens_BT[:, place : place + 1], cache)
            measure(logits_B1V[:, -1], place)
            seen.see(cache, rows, step=True, last=place == length - 1)
        if seen.offloads:
            seen.see_offloaded(cache, rows)


def of_text(subject: Subject, options: Options) -> TaskResult:
    """Loss of the tokens after the compression, in nats per token, and the bytes of the cache."""
    import torch

    from eval.tasks.likelihood import wide

    prefix, new = lengths(subject, options)
    seen, nats = Bytes(offloads(subject.method)), list[torch.Tensor]()
    tokens_NT = text_windows(subject, prefix + new + 1, options.windows)
    parts = torch.split(tokens_NT, options.batch)
    for tokens_BT in subject.progress(parts, len(parts), f"{subject.name}: text through {name_of(subject.method)}"):
        of_batch: list[torch.Tensor] = []
        on_device_BT = tokens_BT.to(subject.device)

        def measure(
            logits_BV: torch.Tensor,
            place: int,
            tokens_BT: torch.Tensor = on_device_BT,
            of_batch: list[torch.Tensor] = of_batch,
        ) -> None:
            likely_BV = wide(logits_BV).log_softmax(-1)
            of_batch.append(-likely_BV.gather(1, tokens_BT[:, place + 1, None])[:, 0].cpu())

        through(subject, on_device_BT[:, :-1], prefix, options.dtype, measure, seen)
        nats.append(torch.stack(of_batch, dim=1))
    nats_NT = torch.cat(nats).double()
    means_N = nats_NT.mean(dim=1)
    count, loss = len(means_N), means_N.mean().item()
    half = interval(means_N.tolist()).half
    half = math.nan if half is None else half
    rows = [row("text", f"{new} tokens after {prefix}", count, "loss", loss, loss - half, loss + half)]
    figures = {"loss": loss, **seen.figures()}
    formula = formula_bytes(subject, prefix, new, options.dtype)
    if formula is not None:
        figures["formula_bytes"] = formula
    note = (
        f"text: {counted(count, 'window')} of {prefix:,} tokens, compression, and {new:,} tokens scored one by one, "
        "each window from scratch; the same windows for every model of this tokenizer and every method"
    )
    notes = (*about_stores(subject, prefix + new, options.dtype), note)
    return TaskResult(figures, rows, notes=notes, samples={"loss": means_N.tolist()})


def lengths(subject: Subject, options: Options) -> tuple[int, int]:
    """Tokens of text before the compression and after it. Raises UsageError if they do not fit into the context."""
    new = options.new or min(max(1, subject.context // 4), MOST_NEW)
    prefix = options.prefix or subject.context - new
    if prefix < subject.model.plan.min_prompt:
        raise UsageError(
            f"compressed.prefix is {prefix}; it must be at least {subject.model.plan.min_prompt}, a context of "
            f"{subject.context} less the {new} new tokens"
        )
    if prefix + new > subject.context:
        raise UsageError(
            f"compressed.prefix is {prefix}; with {new} new tokens that is beyond the context of {subject.context}: "
            f"lower it, or set context={prefix + new}"
        )
    return prefix, new


def text_windows(subject: Subject, length: int, count: int) -> "torch.Tensor":
    """Up to `count` windows [N, `length`] of the text, evenly spaced. Raises UsageError if there is none."""
    import numpy as np
    import torch

    from eval.scoring import texts, validation_windows

    if subject.prepared is not None:
        windows = validation_windows(subject.prepared, length - 1, count)
        return torch.from_numpy(np.stack([windows[number] for number in range(len(windows))]).astype(np.int64))
    if not subject.texts:
        raise UsageError(
            "compressed needs text: give text=FILE, data.path=FOLDER of prepared data, or "
            "compressed.parts=recall,turns, which need none"
        )
    (stream,) = texts(subject, "windows")
    room = len(stream.tokens) // length
    if not room:
        raise UsageError(f"compressed: the text has {len(stream.tokens):,} tokens, less than a window of {length:,}")
    chosen = np.linspace(0, room - 1, min(count, room)).round().astype(int)
    return torch.from_numpy(np.stack([stream.tokens[at * length : (at + 1) * length] for at in chosen]))


def of_recall(subject: Subject, options: Options, part: str) -> TaskResult:
    """Shares of questions answered right after the compression; of `turns`, of known and of new ones.

    `accuracy`: the value is the likeliest of all tokens; `choice`: the likeliest of the values in its sequence.
    """
    from eval.tasks.drawn import share_of_sequences

    kinds = ("recall",) if part == "recall" else ("known", "new")
    totals = {kind: [0.0, 0.0, 0.0] for kind in kinds}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    samples: dict[str, list[float]] = {}
    seen_of: dict[int, Bytes] = {}
    for pairs in subject.progress(
        options.pairs, len(options.pairs), f"{subject.name}: {part}, {name_of(subject.method)}"
    ):
        of_pairs: dict[str, list[list[float]]] = {kind: [] for kind in kinds}  # of each sequence
        if problem := impossible(subject, options, part, pairs):
            notes.append(f"{part} with {pairs} pairs is left out: {problem}")
            continue
        seen = seen_of[pairs] = Bytes(offloads(subject.method))
        for asked in batches(subject, options, part, pairs):
            for kind, right_BT3 in right(subject, asked, part, options.dtype, seen).items():
                of_pairs[kind] += right_BT3.sum(dim=1).tolist()
        for kind, found in of_pairs.items():
            found = [counts for counts in found if counts[2]]  # chance asks, too
            if not found:
                notes.append(f"{part} with {pairs} pairs: no question is of kind {kind}; raise compressed.sequences")
                continue
            *answers, count = zip(*found, strict=True)
            for number, (name, right_S) in enumerate(zip(NAMES, answers, strict=True)):
                share = share_of_sequences(right_S, count)
                rows.append(row(kind, f"{pairs} pairs", int(sum(count)), f"{kind}/{name}", *share))
                totals[kind][number] += sum(right_S)
            totals[kind][2] += sum(count)
            samples.setdefault(f"{kind}/accuracy", []).extend(counts[0] / counts[2] for counts in found)
    if not seen_of:
        return TaskResult({}, notes=tuple(notes))
    most = max(seen_of)
    notes += about_stores(subject, length_of(options, most), options.dtype)
    if len(seen_of) > 1:
        notes.append(f"{part}: bytes are those of sequences with {most} pairs, {length_of(options, most):,} tokens")
    figures = {
        f"{kind}/{name}": total[number] / total[2]
        for kind, total in totals.items()
        for number, name in enumerate(NAMES)
        if total[2]
    }
    figures |= {f"{part}/{name}": value for name, value in seen_of[most].figures().items()}
    return TaskResult(figures, rows, notes=tuple(notes), samples=samples)


def length_of(options: Options, pairs: int) -> int:
    """Tokens of a sequence."""
    return options.length or LENGTH * pairs


def shape_of(subject: Subject, options: Options, part: str, pairs: int) -> "tuple[RecallTask, int, int]":
    """The sequences of a part, the number of their tokens before the first question, and before the compression."""
    from data.recall import RecallTask

    length, vocab_size = length_of(options, pairs), subject.numbers or len(subject.model.output_weight)
    task = RecallTask.of(length, pairs, vocab_size, options.joined)
    first = task.pair_length * pairs + task.gap
    return task, first, first + ((length - first) // 2 if part == "turns" else 0)


def impossible(subject: Subject, options: Options, part: str, pairs: int) -> str:
    """Say why a part has no sequences of so many pairs, with the fix; empty: it has."""
    if problem := length_problem(subject, length_of(options, pairs), "compressed.length"):
        return problem
    task, _, prefix = shape_of(subject, options, part, pairs)
    found = task.problems(pairs)
    if prefix < subject.model.plan.min_prompt:
        found.append(
            f"{prefix} tokens before the compression are fewer than the {subject.model.plan.min_prompt} that the model "
            "needs; set a larger compressed.length"
        )
    if not found and (problem := too_little(subject, prefix, task.length, options.dtype)):
        found.append(problem)
    return "; ".join(found)


def too_little(subject: Subject, prefix: int, length: int, dtype: str) -> str:
    """Say why the budget of the method holds nothing of `length` tokens, with the least that does; empty: it does."""
    if subject.method is None or not has_formula(subject.method):
        return ""
    try:
        compressed_bytes(subject.model.plan, subject.method, 1, length, prompt=prefix, itemsize=ITEMSIZES[dtype])
    except ValueError as problem:
        return str(problem)
    return ""


@dataclass(frozen=True)
class RecallBatch:
    """Sequences with questions: inputs [B, T]; the pair that each question asks for [B, T]; values of the pairs [B, P].

    prefix  tokens before the compression
    """

    inputs_BT: "torch.Tensor"
    pair_BT: "torch.Tensor"
    values_BP: "torch.Tensor"
    prefix: int


def batches(subject: Subject, options: Options, part: str, pairs: int) -> Iterator[RecallBatch]:
    """Batches of questions. Of `turns`, half of them are those of the first turn, for keys of the even pairs alone.

    They are drawn in blocks that are functions of (seed, number, pairs). Raises UsageError if the model was trained on
    other pairs.
    """
    from eval.recall import questions
    from eval.tasks.drawn import in_batches

    check_joined(subject, options.joined, "compressed")
    task, first, prefix = shape_of(subject, options, part, pairs)

    def draw(number: int, size: int) -> "tuple[torch.Tensor, ...]":
        asked = questions(task, pairs, size, subject.seed, number)
        pair_BT = asked.source_BT // task.pair_length  # negative before the questions
        keys_BP, values_BP = pairs_of(task, asked.inputs_BT, pairs)
        early_BQ = pair_BT[:, first:prefix] // 2 * 2
        asked.inputs_BT[:, first:prefix] = keys_BP.gather(1, early_BQ)
        pair_BT[:, first:prefix] = early_BQ
        return asked.inputs_BT, pair_BT, values_BP

    for tensors in in_batches(draw, options.sequences, BLOCK, options.batch):
        inputs_BT, pair_BT, values_BP = tensors
        yield RecallBatch(inputs_BT, pair_BT, values_BP, prefix)


def pairs_of(task: "RecallTask", inputs_BT: "torch.Tensor", pairs: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Keys and values [B, P] of sequences."""
    if not task.joined:
        return inputs_BT[:, 0 : 2 * pairs : 2], inputs_BT[:, 1 : 2 * pairs : 2]
    number_BP = inputs_BT[:, :pairs] - task.first_pair
    return task.noise + number_BP // task.values, task.noise + task.keys + number_BP % task.values


def right(subject: Subject, asked: RecallBatch, part: str, dtype: str, seen: Bytes) -> "dict[str, torch.Tensor]":
    """Score each kind of question after the compression, [B, T, 3]: right by accuracy, by choice, and asked."""
    import torch

    inputs_BT, pair_BT, values_BP = (x.to(subject.device) for x in (asked.inputs_BT, asked.pair_BT, asked.values_BP))
    found: list[torch.Tensor] = []

    def measure(logits_BV: torch.Tensor, place: int) -> None:
        best_B = values_BP.gather(1, logits_BV.gather(1, values_BP).argmax(dim=1, keepdim=True))[:, 0]
        target_B = values_BP.gather(1, pair_BT[:, place, None])[:, 0]
        found.append(torch.stack((logits_BV.argmax(-1) == target_B, best_B == target_B), dim=-1).cpu())

    through(subject, inputs_BT, asked.prefix, dtype, measure, seen)
    right_BT2 = torch.stack(found, dim=1).double()
    right_BT3 = torch.cat((right_BT2, torch.ones_like(right_BT2[..., :1])), dim=-1)
    if part == "recall":
        return {"recall": right_BT3}
    pair_BT, early_BQ = asked.pair_BT[:, asked.prefix :], asked.pair_BT[:, : asked.prefix]
    known_BT = (pair_BT[:, :, None] == early_BQ[:, None]).any(dim=-1)
    return {"known": right_BT3 * known_BT[..., None], "new": right_BT3 * (pair_BT % 2 == 1)[..., None]}


def about_stores(subject: Subject, capacity: int, dtype: str) -> list[str]:
    """A note of the stores that the method leaves alone in caches for `capacity` tokens, if there are any."""
    if subject.method is None:
        return []
    left = left_alone(subject.model.plan, subject.method, capacity, ITEMSIZES[dtype])
    return [f"{subject.method.text} drops nothing of {left}"] if left else []


def formula_bytes(subject: Subject, prefix: int, new: int, dtype: str) -> float | None:
    """Bytes that the formula gives for the cache of one window at its end; None if the text decides them."""
    from arch.footprint import allocated_bytes

    plan, itemsize = subject.model.plan, ITEMSIZES[dtype]
    if subject.method is None:
        return float(allocated_bytes(plan, 1, prefix + new, itemsize))
    if not has_formula(subject.method):
        return None
    return float(compressed_bytes(plan, subject.method, 1, prefix + new, prompt=prefix, itemsize=itemsize))
