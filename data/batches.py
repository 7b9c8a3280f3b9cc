"""Batches whose content is a pure function of (seed, step): independent of processes, workers and interruptions.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .mixture import EvalWindows, Mixture
from .shards import IGNORE as IGNORE
from .shards import TokenWindows

Row = dict[str, np.ndarray]


class Batch(TypedDict):
    """Inputs [B, T], their targets [B, T], and the number of real targets in the whole optimizer step.

    segment_ids_BT  [B, T] number of each input's document within its row, from 0 on; an end of text belongs to the
                    document that it ends. With padding, -1 at pads and 0 elsewhere. None: a row is one segment
    """

    inputs: Tensor
    targets: Tensor
    step_targets: int
    segment_ids_BT: Tensor | None


@dataclass(frozen=True)
class SequenceFormat:
    """Rules by which a row of T + 1 tokens becomes the inputs and targets of a model.

    target_offset    1: inputs are the tokens before their targets; 0: they are the targets themselves, for a model
                     that predicts whole blocks from those before
    num_unpredicted  targets at the start of a row that the model does not predict
    document_mask    documents are segments
    block_padding    a document begins with 0 to block_padding - 1 pads, at random, and is filled up to a multiple of
                     it (Block Transformer, appendix H); what then exceeds the row is cut off. 0: no pads
    """

    target_offset: int = 1
    num_unpredicted: int = 0
    document_mask: bool = False
    block_padding: int = 0


def order(num_windows: int, seed: int, epoch: int, corpus: int = 0) -> np.ndarray:
    """Shuffled window numbers of one epoch of a corpus, [num_windows]; 195 MB for 100B tokens in windows of 2048."""
    windows = np.arange(num_windows, dtype=np.uint32)
    np.random.default_rng((seed, epoch, corpus)).shuffle(windows)
    return windows


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process from step `start_step` on.

    The mixture maps sequence g of the run to number k of a corpus (g itself if there is one corpus), which is window
    `order(epoch)[k mod num_windows]`. Step s takes the batch_size sequences from s * batch_size on; processes take
    micro-batches of them in turn. The length counts all micro-batches of the run, also those before `start_step`,
    because the restored counter of the training loop is compared with it.
    """

    windows: TokenWindows | Mixture
    seed: int
    steps: int
    batch_size: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start_step: int = 0
    sequence_format: SequenceFormat = SequenceFormat()

    @property
    def accumulate(self) -> int:
        """Micro-batches per step and process."""
        return self.batch_size // (self.micro_batch * self.world)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        row = self._rows()
        for step in range(self.start_step, self.steps):
            sequences = range(step * self.batch_size, (step + 1) * self.batch_size)
            make, targets = row, self.batch_size * (self.windows.seq_len - self.sequence_format.num_unpredicted)
            if self.sequence_format.block_padding or Mixture.of(self.windows).has_answers:
                # The number of targets is known once a row is made, so every process makes all rows of the step.
                made = {sequence: row(sequence) for sequence in sequences}
                make, targets = made.__getitem__, sum(int((r["targets"] != IGNORE).sum()) for r in made.values())
            for first in sequences[self.rank * self.micro_batch :: self.micro_batch * self.world]:
                yield _batch([make(sequence) for sequence in range(first, first + self.micro_batch)], targets)

    def _rows(self) -> Callable[[int], Row]:
        """The function from the number of a sequence of the run to its example."""
        mixture = Mixture.of(self.windows)
        orders: dict[int, tuple[int, np.ndarray]] = {}  # corpus -> its epoch and the order of its windows

        def row(sequence: int) -> Row:
            corpus, number = mixture.locate(sequence, self.seed)
            windows = mixture.corpora[corpus]
            epoch, place = divmod(number, len(windows))
            if orders.get(corpus, (-1,))[0] != epoch:
                orders.pop(corpus, None)  # frees it before the next is made
                orders[corpus] = epoch, order(len(windows), self.seed, epoch, corpus)
            tokens = windows[int(orders[corpus][1][place])]
            return _to_example(tokens, self.sequence_format, windows, np.random.default_rng((self.seed, 1, sequence)))

        return row


@dataclass(frozen=True)
class EvalBatches:
    """Validation windows, divided so that every process makes the same number of batches of equal size.

    Missing windows at the end are zeros with ignored targets.
    """

    windows: EvalWindows
    micro_batch: int
    rank: int = 0
    world: int = 1
    sequence_format: SequenceFormat = SequenceFormat()

    def __len__(self) -> int:
        return -(-len(self.windows) // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            first = (step * self.world + self.rank) * self.micro_batch
            real = range(min(first, len(self.windows)), min(first + self.micro_batch, len(self.windows)))
            windows = [self.windows[index] for index in real]
            windows += [np.zeros_like(self.windows[0])] * (self.micro_batch - len(real))
            examples = [_to_example(tokens, self.sequence_format, self.windows) for tokens in windows]
            for filler in examples[len(real) :]:
                filler["targets"][:] = IGNORE
            yield _batch(examples, sum(int((example["targets"] != IGNORE).sum()) for example in examples))


@dataclass(frozen=True)
class Prefetched:
    """`batches` in pinned memory: a thread makes each one while the last one is used. A copy to the GPU then waits for
    nothing; from other memory it would wait for all work queued there.

    An error in the thread is raised when its batch is requested.
    """

    batches: TrainBatches | EvalBatches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        left, device = iter(self.batches), torch.cuda.current_device()  # which each thread chooses for itself

        def make() -> Batch | None:
            batch = next(left, None)
            return None if batch is None else _pinned(batch)

        with ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,)) as thread:
            ahead = thread.submit(make)
            while (batch := ahead.result()) is not None:
                ahead = thread.submit(make)
                yield batch


def _pinned(batch: Batch) -> Batch:
    ids = batch["segment_ids_BT"]
    return {
        "inputs": batch["inputs"].pin_memory(),
        "targets": batch["targets"].pin_memory(),
        "step_targets": batch["step_targets"],
        "segment_ids_BT": None if ids is None else ids.pin_memory(),
    }


def documents_of(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Number the documents of a row of tokens from 0, [T]. An end of text stands only at the end of a document."""
    ends = (tokens == end_of_text).astype(np.int64)
    numbers: np.ndarray = ends.cumsum(-1) - ends
    return numbers


def padded(
    tokens: np.ndarray, end_of_text: int, block: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pack `tokens` again so that every document fills whole blocks; return (tokens, segment ids), both [T].

    Pads are `end_of_text`. The first document, which may have begun in another row, has pads only at its end. Tokens
    beyond T are cut off.
    """
    begins = np.flatnonzero(np.concatenate(([True], tokens[:-1] == end_of_text)))
    lengths = np.diff(begins, append=len(tokens))
    left = np.concatenate(([0], generator.integers(block, size=len(lengths) - 1)))
    rooms = -(-(left + lengths) // block) * block
    position = np.arange(len(tokens)) + np.repeat(rooms.cumsum() - rooms + left - begins, lengths)
    fits = position < len(tokens)
    result, segment_ids = np.full_like(tokens, end_of_text), np.full(len(tokens), -1)
    result[position[fits]], segment_ids[position[fits]] = tokens[fits], 0
    return result, segment_ids


def answered(tokens: np.ndarray, form: SequenceFormat) -> Row:
    """Make T inputs and T targets of a sequence with its answers, 2 T tokens; no answer, 0, is no target.

    A model whose targets are its inputs learns the answer in the place of the token after the question.
    """
    inputs, answers = tokens.astype(np.int64).reshape(2, -1)
    targets = np.where(answers == 0, IGNORE, answers)
    if form.target_offset == 0:
        targets = np.concatenate(([IGNORE], targets[:-1]))
    targets[: form.num_unpredicted] = IGNORE
    return {"inputs": inputs, "targets": targets}


def _to_example(
    tokens: np.ndarray,
    form: SequenceFormat,
    windows: TokenWindows | EvalWindows,
    generator: np.random.Generator | None = None,
) -> Row:
    """Make T inputs, T targets, and segment ids where there are any, of one of `windows`: T + 1 tokens, or T with their
    answers."""
    if windows.has_answers:
        return answered(tokens, form)
    tokens, end_of_text = tokens.astype(np.int64), windows.end_of_text
    inputs, targets = tokens[1 - form.target_offset : len(tokens) - form.target_offset], tokens[1:]
    row = {}
    if form.block_padding:
        assert form.target_offset == 0 and generator is not None
        inputs, row["segment_ids_BT"] = padded(inputs, end_of_text, form.block_padding, generator)
        targets = np.where(row["segment_ids_BT"] < 0, IGNORE, inputs)
    elif form.document_mask:
        row["segment_ids_BT"] = documents_of(inputs, end_of_text)
    targets = np.concatenate((np.full(form.num_unpredicted, IGNORE), targets[form.num_unpredicted :]))
    return {"inputs": inputs, "targets": targets, **row}


def _batch(rows: Sequence[Row], step_targets: int) -> Batch:
    tensors = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    return {
        "inputs": tensors["inputs"],
        "targets": tensors["targets"],
        "step_targets": step_targets,
        "segment_ids_BT": tensors.get("segment_ids_BT"),
    }
