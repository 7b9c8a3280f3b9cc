"""Loss of text, window by window: streams of tokens, the windows that score them, and sums of what they lose.

Shapes: B windows, T tokens, V vocabulary.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arch import Plan
from data.batches import IGNORE, Batch, EvalBatches, SequenceFormat
from data.cli import UsageError
from data.mixture import EvalWindows, Mixture
from data.shards import TokenWindows, text_bytes_of_tokens
from eval.positions import Bucket, by_position, score
from eval.tasks.task import Prepared, Subject

# Batches whose windows are sorted by length together, so that a batch has few pads.
SORTED = 32


@dataclass(frozen=True)
class Stream:
    """Tokens of which all but the first are scored, `sizes` bytes of text behind each; both [N].

    words, text_bytes  of the whole text as it stands in the file
    """

    tokens: np.ndarray
    sizes: np.ndarray
    words: int = 0
    text_bytes: int = 0


class Window(NamedTuple):
    """Inputs from `begin` to `end` - 1 of a stream, of whose targets those from number `scored` on are scored."""

    stream: Stream
    begin: int
    end: int
    scored: int


class Scored(NamedTuple):
    """A batch, and the bytes of text behind each target [B, T]."""

    batch: Batch
    sizes_BT: Tensor


def texts(subject: Subject, protocol: str) -> Iterator[Stream]:
    """The streams of the text of `subject`: a document each, or, for windows and stride, one of them all."""
    tokenizer = subject.tokenizer
    if protocol == "words":
        for page in pages("".join(subject.documents())):
            text = detokenised(page)
            yield _document(subject, text, len(re.split(r"\s+", page)), len(page.encode()))
        return
    if protocol == "documents":
        for text in subject.documents():
            yield _document(subject, text, len(text.split()), len(text.encode()))
        return
    tokens, sizes, words, size = [np.array([tokenizer.begin])], [np.zeros(1)], 0, 0
    for text in subject.documents():
        encoded = tokenizer.encode(text)
        tokens += [np.array(encoded, dtype=np.int64), np.array([tokenizer.end])]
        sizes += [np.asarray(tokenizer.text_bytes(text, encoded), dtype=np.float64), np.zeros(1)]
        words, size = words + len(text.split()), size + len(text.encode())
    yield Stream(np.concatenate(tokens), np.concatenate(sizes), words, size)


def _document(subject: Subject, text: str, words: int, text_bytes: int) -> Stream:
    tokenizer = subject.tokenizer
    tokens = tokenizer.encode(text)
    sizes = [0.0, *tokenizer.text_bytes(text, tokens)]
    return Stream(np.array([tokenizer.begin, *tokens]), np.array(sizes, dtype=np.float64), words, text_bytes)


def prepared_streams(prepared: Prepared, documents: bool) -> Iterator[Stream]:
    """The validation shards as they stand, or their documents, each after an end of text."""
    if len(prepared.folders) > 1:
        raise UsageError("perplexity.protocol: a mixture is scored by windows; give one folder with data.path=")
    ((folder, manifest),) = prepared.folders.items()
    sizes_V = text_bytes_of_tokens(manifest.token_bytes(folder), [manifest.splits["val"]])
    for shard in manifest.splits["val"].shards:
        path = folder / shard.file
        tokens = np.fromfile(path, dtype=manifest.dtype).astype(np.int64)
        if len(tokens) != shard.tokens:
            raise UsageError(f"{path} has {len(tokens)} tokens of {shard.tokens}; prepare the folder again")
        if not documents:
            yield Stream(tokens, sizes_V[tokens].astype(np.float64))
            continue
        ends = np.flatnonzero(tokens == manifest.end_of_text)
        for document in np.split(tokens, ends + 1):
            body = document[document != manifest.end_of_text]
            if len(body):
                whole = np.concatenate(([manifest.end_of_text], body))
                yield Stream(whole, sizes_V[whole].astype(np.float64))


def cut(stream: Stream, window: int, stride: int, whole_last: bool) -> Iterator[Window]:
    """The windows of up to `window` inputs that score each token of `stream` but the first once.

    Each begins `stride` tokens after the one before it; with `whole_last`, the last one is moved back until it is
    whole.
    """
    last, done, begin = len(stream.tokens) - 1, 0, 0
    while done < last:
        end = min(begin + window, last)
        first = max(0, end - window) if whole_last else begin
        yield Window(stream, first, end, done)
        done, begin = end, begin + stride


@dataclass
class TextBatches:
    """Windows of `streams` in batches of windows of similar length, `most` tokens scored in all."""

    streams: Sequence[Stream]
    plan: Plan
    window: int
    stride: int
    batch: int
    whole_last: bool
    most: int | None = None

    @cached_property
    def windows(self) -> list[Window]:
        """All windows, until `most` tokens are scored."""
        found: list[Window] = []
        scored = 0
        for stream in self.streams:
            for window in cut(stream, self.window, self.stride, self.whole_last):
                if self.most is not None and scored >= self.most:
                    return found
                found.append(window)
                scored += window.end - window.scored
        return found

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch)

    def __iter__(self) -> Iterator[Scored]:
        group = SORTED * self.batch
        for first in range(0, len(self.windows), group):
            windows = sorted(self.windows[first : first + group], key=lambda window: window.begin - window.end)
            for number in range(0, len(windows), self.batch):
                yield self._make(windows[number : number + self.batch])

    def _make(self, windows: Sequence[Window]) -> Scored:
        """Pads are on the right, where no scored token sees them, up to whole blocks of which one is predicted."""
        block = self.plan.block_length
        length = -(-max(window.end - window.begin for window in windows) // block) * block
        length = max(length, block + self.plan.num_unpredicted)
        inputs_BT, targets_BT = np.zeros((len(windows), length), np.int64), np.full((len(windows), length), IGNORE)
        sizes_BT = np.zeros((len(windows), length))
        for row, (stream, begin, end, scored) in enumerate(windows):
            shift = 1 - self.plan.target_offset  # the inputs of a Block Transformer are its targets
            inputs_BT[row, : end - begin] = stream.tokens[begin + shift : end + shift]
            kept = slice(scored - begin, end - begin)
            targets_BT[row, kept] = stream.tokens[scored + 1 : end + 1]
            sizes_BT[row, kept] = stream.sizes[scored + 1 : end + 1]
        batch: Batch = {
            "inputs": torch.from_numpy(inputs_BT),
            "targets": torch.from_numpy(targets_BT),
            "step_targets": int((targets_BT != IGNORE).sum()),
            "segment_ids_BT": None,
        }
        return Scored(batch, torch.from_numpy(sizes_BT))


def validation_windows(prepared: Prepared, length: int, count: int) -> EvalWindows:
    """About `count` windows of the validation split, evenly spaced, of `length` inputs."""
    folders = prepared.folders.items()
    corpora = tuple(TokenWindows(folder, manifest, "val", length) for folder, manifest in folders)
    return EvalWindows.of(Mixture(corpora, tuple(prepared.weights)), count)


@dataclass
class ValidationBatches:
    """Windows of the validation split as training reads them: as many as have room in `tokens`, evenly spaced."""

    prepared: Prepared
    plan: Plan
    window: int
    tokens: int
    batch: int

    @cached_property
    def batches(self) -> EvalBatches:
        windows = validation_windows(self.prepared, self.window, self.tokens // self.window)
        form = SequenceFormat(self.plan.target_offset, self.plan.num_unpredicted, self.prepared.document_mask)
        return EvalBatches(windows, self.batch, sequence_format=form)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Scored]:
        (folder, first), *_ = self.prepared.folders.items()
        splits = [manifest.splits["val"] for manifest in self.prepared.folders.values()]
        sizes_V = text_bytes_of_tokens(first.token_bytes(folder), splits, self.prepared.weights)
        for batch in self.batches:
            yield Scored(batch, torch.from_numpy(sizes_V)[batch["targets"].clamp(min=0)])


class BatchScore(NamedTuple):
    """Sums over a batch, as in Scores; and the loss of its targets, with those that count, [B, T] on the CPU."""

    nats: float
    tokens: int
    text_bytes: float
    repeated_nats: float
    repeated: int
    nats_BT: Tensor
    real_BT: Tensor


@torch.no_grad()
def score_batch(subject: Subject, found: Scored) -> BatchScore:
    """Score a batch by one forward pass."""
    batch, device = found.batch, subject.device
    ids_BT = batch["segment_ids_BT"]
    on_device: Batch = {
        "inputs": batch["inputs"].to(device),
        "targets": batch["targets"].to(device),
        "step_targets": batch["step_targets"],
        "segment_ids_BT": None if ids_BT is None else ids_BT.to(device),
    }
    nats_BT, real_BT = (x.cpu() for x in score(subject.model, on_device))
    again_BT = repeats(batch, subject.model.plan.target_offset) & real_BT
    return BatchScore(
        nats_BT.double().sum().item(),
        int(real_BT.sum()),
        (found.sizes_BT * real_BT).sum().item(),
        nats_BT[again_BT].double().sum().item(),
        int(again_BT.sum()),
        nats_BT,
        real_BT,
    )


@dataclass
class Scores:
    """Sums of the loss in nats, the scored tokens and their bytes of text.

    repeated, repeated_nats  tokens that end a pair of tokens seen before in the window, and their loss
    words, raw_bytes         of the text as it stands in the file, where those are to be counted
    """

    nats: float = 0.0
    tokens: int = 0
    text_bytes: float = 0.0
    repeated_nats: float = 0.0
    repeated: int = 0
    words: int = 0
    raw_bytes: int = 0
    scored: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, batch: BatchScore) -> None:
        self.nats += batch.nats
        self.tokens += batch.tokens
        self.text_bytes += batch.text_bytes
        self.repeated_nats += batch.repeated_nats
        self.repeated += batch.repeated
        self.scored.append((batch.nats_BT, batch.real_BT))

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def buckets(self) -> list[Bucket]:
        return by_position(self.scored)


def repeats(batch: Batch, target_offset: int) -> Tensor:
    """True at targets [B, T] that follow a token which they have followed before in the window.

    These are the "associative recall hits" of Zoology (Arora et al. 2023, section 3), here without its limit on how
    often training has seen the pair.
    """
    first_BT = second_BT = batch["inputs"].long()
    if target_offset:  # the target of a row's last token is no input
        targets_BT = batch["targets"].long()
        second_BT = torch.where(targets_BT >= 0, targets_BT, second_BT.roll(-1, dims=1))
    else:
        first_BT = torch.cat((first_BT[:, :1], first_BT[:, :-1]), dim=1)
    pairs_BT = (first_BT << 32) + second_BT
    again_BT = torch.ones_like(pairs_BT, dtype=torch.bool)
    for row_T, pairs_T in zip(again_BT, pairs_BT, strict=True):
        row_T[torch.from_numpy(np.unique(pairs_T.numpy(), return_index=True)[1])] = False
    if not target_offset:
        again_BT[:, 0] = False  # of the first target, the token before it is not an input
    return again_BT


def perplexity_of(nats: float) -> float:
    """exp(nats), infinite where no float holds it."""
    return math.exp(nats) if nats < 700 else math.inf


# A page of WikiText begins with a heading of the first level.
PAGE = re.compile(r"^ = [^=].*[^=] = *$", re.MULTILINE)
# Undo the tokenisation of WikiText: what is found, and what takes its place, in this order.
SPACING = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" \. ", ". "),
    (r" ! ", "! "),
    (r" \? ", "? "),
    (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (f" {chr(176)} ", chr(176)),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def pages(text: str) -> list[str]:
    """The pages of WikiText's raw file; all of it where no line is a heading."""
    begins = [found.start() for found in PAGE.finditer(text)]
    bounds = [*(begins or [0]), len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds) if text[begin:end].strip()]


def detokenised(page: str) -> str:
    """`page` of WikiText as ordinary text, as Megatron-LM and lm-eval score it."""
    for found, instead in SPACING:
        page = re.sub(found, instead, page)
    return page
