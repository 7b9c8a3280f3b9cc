"""Retrieval from long text: passkey, needles, variable tracking and common words, by length and depth.

Each sample is scored twice: `match`, the share of its answers that occur in the generated text, as in RULER; and
`choice`, whether the likeliest of a few continuations of the prompt is an answer, which is above chance long before a
model writes one. As far as possible all choices have the same number of tokens; they are compared per token. `margin`
is how much likelier an answer is than another choice, in nats per token, on average.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from data.cli import UsageError
from eval.intervals import counted_share
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult
from eval.units import counted

if TYPE_CHECKING:
    from eval.tasks.samples import Sample

# Kind, length, depth, and what makes a sample of (length, depth, number).
Cell = tuple[str, int, float | None, Callable[[int, float | None, int], "Sample"]]
WITH_DEPTH = ("passkey", "single", "multikey", "multivalue", "multiquery")
KINDS = (*WITH_DEPTH, "variables", "words")
NAMES = ("match", "choice", "margin")


@dataclass(frozen=True)
class Options(TaskOptions):
    """Needles in text=, or in validation text, else in plain sentences; RULER's definitions.

    kinds     passkey, single, multikey, multivalue, multiquery, variables (tracking), words (common ones)
    lengths   tokens of the prompt and the generated text together; null: a quarter, half and all of the context
    depths    depth of the first needle asked for, in percent of the text; variables and words have none
    samples   samples for each kind, length and depth
    choices   continuations whose likelihoods are compared
    generate  also generate, and look for the answers
    chains    chains of variables, one of which is asked for
    common    words that are more frequent than the others
    batch     sequences generated at a time
    """

    kinds: tuple[str, ...] = ("passkey", "single", "multikey")
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    samples: int = 10
    choices: int = 10
    generate: bool = True
    chains: int = 1
    common: int = 10
    batch: int = 8

    def problems(self) -> list[str]:
        found = [f"kinds: {kind} is none of {', '.join(KINDS)}" for kind in self.kinds if kind not in KINDS]
        found += [f"depths: {depth} is not between 0 and 100" for depth in self.depths if not 0 <= depth <= 100]
        if not self.kinds or not self.depths or self.lengths == ():
            found.append("kinds, lengths and depths must not be empty")
        found += [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("samples", 1), ("choices", 2), ("chains", 1), ("common", 1), ("batch", 1))
            if getattr(self, name) < least
        ]
        return found


@dataclass(frozen=True)
class Score:
    """Scores of one sample: share of the answers generated (None: nothing was generated), whether the likeliest choice
    is an answer (a fraction if several tie), the chance of that without knowledge, and the margin in nats per
    token."""

    match: float | None
    choice: float
    chance: float
    margin: float


def run(subject: Subject, options: Options) -> TaskResult:
    """Score every kind at every length and depth at which it fits; the others are left out with a note."""
    lengths = options.lengths or tuple(sorted({max(1, subject.context // part) for part in (4, 2, 1)}))
    makers = list(all_makers(subject, options))
    cells = [
        (kind, length, depth, make)
        for kind, make in makers
        for length in lengths
        for depth in (options.depths if kind in WITH_DEPTH else (None,))
    ]

    def measure(cell: Cell) -> dict[str, Any] | str:
        """A row of the table, or why there is none."""
        kind, length, depth, make = cell
        try:
            samples = [make(length, depth, number) for number in range(options.samples)]
        except ValueError as problem:
            return f"{kind} at {length:,} tokens is left out: {problem}"
        return row_of(kind, length, depth, samples, scores(subject, options, samples))

    found = subject.each(subject.progress(cells, len(cells), f"{subject.name}: needles"), measure, same_passes=False)
    rows = [row for row in found if not isinstance(row, str)]
    notes = [note for note in found if isinstance(note, str)]
    if not rows:
        raise UsageError("needles: nothing fits:\n" + "\n".join(dict.fromkeys(notes)))
    return TaskResult(figures_of(rows), rows, pictures_of(subject.name, rows), tuple(dict.fromkeys(notes)))


def all_makers(
    subject: Subject, options: Options
) -> "Iterator[tuple[str, Callable[[int, float | None, int], Sample]]]":
    """The kinds, each with the function that makes a sample of (length, depth, number)."""
    import numpy as np

    from eval.tasks import samples
    from eval.tasks.haystack import Haystack, haystack_sentences

    text = haystack_sentences(subject)
    needles = {
        "single": samples.NeedleTask(),
        "multikey": samples.NeedleTask(keys=4),
        "multivalue": samples.NeedleTask(values=4),
        "multiquery": samples.NeedleTask(keys=4, queries=4),
    }

    def maker(kind: str, index: int) -> "Callable[[int, float | None, int], Sample]":
        def make(length: int, depth: float | None, number: int) -> "Sample":
            random = np.random.default_rng((subject.seed, number, index))
            if kind == "words":
                seeds = (subject.seed, number, index)
                return samples.common_words(subject.tokenizer, length, options.common, seeds)
            if kind == "variables":
                draft = samples.variables(subject.tokenizer, random, options.chains, hops=4)
            elif kind == "passkey":
                draft = samples.passkey(subject.tokenizer, random, depth or 0.0, options.choices)
            else:
                draft = samples.needle(needles[kind], subject.tokenizer, random, depth or 0.0, options.choices)
            most = 30 if kind == "variables" else 128
            if kind in ("passkey", "variables"):
                return samples.fill_draft(draft, Haystack.noise, subject.tokenizer, length, most)
            return samples.fill_draft(draft, lambda: Haystack.text(text, random), subject.tokenizer, length, most)

        return make

    for kind in dict.fromkeys(options.kinds):
        yield kind, maker(kind, KINDS.index(kind))


def scores(subject: Subject, options: Options, samples: "Sequence[Sample]") -> list[Score]:
    """The score of each of `samples`."""
    from eval.tasks.likelihood import pieces

    generated: list[str | None] = [None] * len(samples)
    if options.generate:
        generated = []
        for part in pieces(samples, options.batch):
            prompts, new = [sample.tokens for sample in part], max(sample.new_tokens for sample in part)
            rows = subject.generate(prompts, new, stop_token=subject.tokenizer.end)
            cut = [row[: sample.new_tokens] for row, sample in zip(rows, part, strict=True)]
            generated += [subject.tokenizer.decode(row) for row in cut]
    return [score(subject, sample, text) for sample, text in zip(samples, generated, strict=True)]


def score(subject: Subject, sample: "Sample", generated: str | None) -> Score:
    """The score of a sample whose prompt the model continues with `generated`."""
    from eval.tasks.likelihood import continuation_likelihoods

    prefix, choices = split_choices(subject, sample)
    found = continuation_likelihoods(subject.model, prefix, choices, subject.tokenizer.end)
    nats = [likelihood.nats / len(tokens) for likelihood, tokens in zip(found, choices, strict=True)]
    right = len(sample.right)
    best = [index for index, value in enumerate(nats) if value >= max(nats) - 1e-6]  # rounding
    return Score(
        match=None if generated is None else match(generated, sample.answers),
        choice=sum(index < right for index in best) / len(best),
        chance=right / len(nats),
        margin=fmean(nats[:right]) - fmean(nats[right:]),
    )


def match(generated: str, answers: Sequence[str]) -> float:
    """Share of `answers` that occur in a text, whatever their case."""
    return sum(answer.lower() in generated.lower() for answer in answers) / len(answers)


def split_choices(subject: Subject, sample: "Sample") -> tuple[list[int], list[list[int]]]:
    """The tokens that all choices of `sample` begin with, and the rest of each: of the right ones, then the wrong ones.

    The text is encoded with each choice, since a tokenizer may join the end of the prompt with it.
    """
    wholes = [subject.tokenizer.prompt(sample.text + choice) for choice in (*sample.right, *sample.wrong)]
    common = min(len(sample.tokens), *(len(whole) - 1 for whole in wholes))
    while any(whole[:common] != sample.tokens[:common] for whole in wholes):
        common -= 1
    return sample.tokens[:common], [whole[common:] for whole in wholes]


def row_of(
    kind: str, length: int, depth: float | None, samples: "Sequence[Sample]", found: Sequence[Score]
) -> dict[str, Any]:
    """A row of the table: shares of match and choice with their intervals, of `count` samples each."""
    row: dict[str, Any] = {"kind": kind, "length": length, "depth": depth, "count": len(found)}
    row["tokens"] = fmean(len(sample.tokens) + sample.new_tokens for sample in samples)
    depths = [sample.token_depth for sample in samples if sample.token_depth is not None]
    row["token_depth"] = fmean(depths) if depths else None
    matches = [score.match for score in found if score.match is not None]
    for name, values in (("match", matches), ("choice", [score.choice for score in found])):
        share = counted_share(sum(values), len(values))
        row |= {name: share["share"], f"{name}_low": share["low"], f"{name}_high": share["high"]}
    row["chance"] = fmean(score.chance for score in found)
    row["margin"] = fmean(score.margin for score in found)
    return row


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over depths: `KIND/choice` over all lengths, `KIND/choice/LENGTH` at each; match and margin likewise."""
    figures: dict[str, float] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        lengths = list(dict.fromkeys(row["length"] for row in of_kind))
        for name in NAMES:
            if of_kind[0][name] is None:
                continue
            figures[f"{kind}/{name}"] = fmean(row[name] for row in of_kind)
            for length in lengths if len(lengths) > 1 else ():
                figures[f"{kind}/{name}/{length}"] = fmean(row[name] for row in of_kind if row["length"] == length)
    return figures


def pictures_of(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A heat map, length by depth, of each kind that has depths: of choice, and of match where texts were generated."""
    from eval.plots.heatmap import Panel, draw_heatmap

    pictures = {}
    for kind in dict.fromkeys(row["kind"] for row in rows if row["depth"] is not None):
        of_kind = [row for row in rows if row["kind"] == kind]
        panels = [
            Panel(title, {(row["length"], row["depth"]): row[key] for row in of_kind}, chance)
            for key, title, chance in (
                ("match", "answers generated", None),
                ("choice", "answer likelier than others", of_kind[0]["chance"]),
            )
            if of_kind[0][key] is not None
        ]
        pictures[kind] = draw_heatmap(panels, f"{name}: {kind}, {counted(of_kind[0]['count'], 'sample')} each")
    return pictures
