"""Perplexity and bits per byte of text, by position in the context.

Protocols differ in the tokens that each scored token is conditioned on:

windows    as in validation: the text, each document followed by an end of text, is cut into windows of `window` tokens,
           each scored from its second token on, given the tokens before it in the window
documents  each document after an end (or begin) of text; a document longer than the window is scored by windows that
           move by `stride`: a token sees at least `window` - `stride` tokens before it. The end is not scored
stride     the same with the whole text as one document, its documents each followed by an end, which is scored
words      WikiText by the word-level protocol: pages of the raw file, detokenised, each scored as a document, with
           windows that do not overlap; per word and per byte of the raw text

The first block of each window is not scored if a Block Transformer does not predict it. The last window of a document
is moved back until it is full. Bytes are those of the text of the scored tokens. `repeat_ppl` is the perplexity of
tokens that end a pair of tokens seen before in the window (a fraction `repeat_share` of all): recall in text.

Shapes: B windows, T tokens.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from data.cli import UsageError
from eval.tasks.task import Options as TaskOptions
from eval.tasks.task import Subject, TaskResult

if TYPE_CHECKING:
    from eval.scoring import Scores, Stream

PROTOCOLS = ("auto", "windows", "documents", "stride", "words")


@dataclass(frozen=True)
class Options(TaskOptions):
    """Perplexity of text=FILE or of prepared data.

    protocol  windows, documents, stride or words (of WikiText's raw file); auto: windows for prepared data, documents
              for text
    window    tokens per window; null: the context of the model
    stride    tokens by which windows move, for documents and stride; null: half a window
    tokens    limit of scored tokens; null: for prepared data as many as in validation, for text all
    batch     windows per forward pass
    """

    protocol: str = "auto"
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    batch: int = 8

    def problems(self) -> list[str]:
        found = []
        if self.protocol not in PROTOCOLS:
            found.append(f"protocol is {self.protocol}; choose {', '.join(PROTOCOLS)}")
        for name in ("window", "stride", "tokens", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} is {value}; it must be at least 1")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            found.append(f"stride is {self.stride}, more than the window of {self.window}: tokens would be left out")
        return found


def run(subject: Subject, options: Options) -> TaskResult:
    """Score the text. Raises UsageError if there is none, or nothing of it can be scored."""
    from eval.scoring import Scores, TextBatches, ValidationBatches, score_batch

    protocol, plan = protocol_of(subject, options), subject.model.plan
    window = (options.window or subject.context) // plan.block_length * plan.block_length
    if window <= plan.num_unpredicted:
        raise UsageError(f"perplexity.window is {window}; it must hold two blocks of {plan.block_length} tokens")
    stride = window if protocol in ("windows", "words") else options.stride or max(1, window // 2)
    if stride > window:
        raise UsageError(f"perplexity.stride is {stride}, more than the window of {window}: tokens would be left out")
    tokens = options.tokens or (None if subject.prepared is None else subject.prepared.val_tokens)
    all_counted = protocol == "words" and tokens is None and not plan.num_unpredicted
    scores = Scores()
    batches: ValidationBatches | TextBatches
    if subject.prepared is not None and tokens is not None and protocol == "windows":
        batches = ValidationBatches(subject.prepared, plan, window, tokens, options.batch)
    else:
        streams = streams_of(subject, protocol)
        batches = TextBatches(streams, plan, window, stride, options.batch, protocol != "windows", tokens)
        if all_counted:
            scores.words = sum(stream.words for stream in streams)
            scores.raw_bytes = sum(stream.text_bytes for stream in streams)
    shown = subject.progress(batches, len(batches), f"{subject.name}: perplexity")
    for scored in subject.each(shown, partial(score_batch, subject)):
        scores.add(scored)
    if not scores.tokens:
        where = f"text={','.join(map(str, subject.texts))}" if subject.texts else "the prepared data"
        least = f"document of {plan.num_unpredicted + 1} tokens" if plan.num_unpredicted else "text"
        raise UsageError(f"perplexity: nothing can be scored: {where} has no {least}; give other text")
    return result(subject, scores, describe(subject, protocol, window, stride, all_counted))


def protocol_of(subject: Subject, options: Options) -> str:
    """The protocol for the text of `subject`. Raises UsageError if there is no text, or not one for it."""
    if not subject.texts and subject.prepared is None:
        raise UsageError("perplexity needs text: give text=FILE, or data.path=FOLDER of prepared data")
    if options.protocol == "auto":
        return "documents" if subject.texts else "windows"
    if options.protocol == "words" and not subject.texts:
        raise UsageError("perplexity.protocol=words reads WikiText's raw file; give text=FILE")
    return options.protocol


def streams_of(subject: Subject, protocol: str) -> "list[Stream]":
    """The token streams that `protocol` scores, from the text or from prepared data."""
    from eval.scoring import prepared_streams, texts

    if subject.prepared is not None:
        return list(prepared_streams(subject.prepared, documents=protocol == "documents"))
    return list(texts(subject, protocol))


def describe(subject: Subject, protocol: str, window: int, stride: int, all_counted: bool) -> str:
    """A sentence about what each scored token is conditioned on."""
    seen = f"of up to {window:,} tokens"
    if protocol == "windows":
        text = f"windows {seen}, each from scratch: a token sees those before it in its window"
    elif stride == window:
        text = f"windows {seen} that do not overlap, each from scratch but the last, which is moved back to be whole"
    else:
        text = f"windows {seen} that move by {stride:,}: a token sees {window - stride:,} or more before it, where the "
        text += "document has them"
    of = {"documents": "each document by itself, its end not scored; ", "stride": "the text as one document; "}
    text = of.get(protocol, "") + text
    if protocol == "words":
        text = f"pages of WikiText, detokenised, each by itself; {text}"
        if all_counted:
            text += "; words and bytes are those of the raw file"
    if subject.model.plan.num_unpredicted:
        text += f"; the first {subject.model.plan.num_unpredicted} targets of a window, a block, are not scored"
    return text


def result(subject: Subject, scores: "Scores", note: str) -> TaskResult:
    """Figures, the loss by position as a table, and its picture."""
    from eval.plots.positions import draw_positions
    from eval.scoring import perplexity_of

    text_bytes = scores.raw_bytes or scores.text_bytes
    figures = {
        "loss": scores.loss,
        "ppl": perplexity_of(scores.loss),
        "bpb": scores.nats / math.log(2) / text_bytes if text_bytes else math.nan,
        "tokens": float(scores.tokens),
    }
    if scores.repeated:
        figures["repeat_ppl"] = perplexity_of(scores.repeated_nats / scores.repeated)
        figures["repeat_share"] = scores.repeated / scores.tokens
    if scores.words:
        figures["word_ppl"] = perplexity_of(scores.nats / scores.words)
    buckets = scores.buckets
    picture = draw_positions({subject.name: buckets}, f"{subject.name}: loss by position in the context")
    return TaskResult(figures, [asdict(bucket) for bucket in buckets], {"positions": picture}, (note,))
