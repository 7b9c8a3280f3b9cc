"""Batches whose content is a pure function of (seed, step): independent of processes, workers and interruptions.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .mixture import EvalWindows, Mixture
from .shards import TokenWindows

# Target of a position that is not real text: no loss, not counted.
IGNORE = -100


class Batch(TypedDict):
    """Inputs [B, T], the token after each [B, T], and the number of real targets in the whole optimizer step.

    documents_BT  [B, T] number of each input's document within its row, from 0 on, never falling; None without a
                  document mask. An end of text belongs to the document that it ends.
    """

    inputs: Tensor
    targets: Tensor
    step_targets: int
    documents_BT: Tensor | None


def order(num_windows: int, seed: int, epoch: int, corpus: int = 0) -> np.ndarray:
    """The windows of one pass over a corpus, shuffled; 4 bytes each: 195 MB for 100B tokens in windows of 2048."""
    windows = np.arange(num_windows, dtype=np.uint32)
    np.random.default_rng((seed, epoch, corpus)).shuffle(windows)
    return windows


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process from step `start_step` on.

    Sequence g of the run is number k of a corpus, as the mixture says (g itself where there is one corpus): window
    `order(epoch)[k mod num_windows]`. Step s takes the batch_size sequences from s * batch_size on, which the processes
    share out micro-batch by micro-batch. The length counts all micro-batches of the run, those before `start_step`
    too, because the loop's restored counter runs against it.
    """

    windows: TokenWindows | Mixture
    seed: int
    steps: int
    batch_size: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start_step: int = 0
    document_mask: bool = False

    @property
    def accumulate(self) -> int:
        """Micro-batches per step and process."""
        return self.batch_size // (self.micro_batch * self.world)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        mixture = self.windows if isinstance(self.windows, Mixture) else Mixture((self.windows,), (1.0,))
        orders: dict[int, tuple[int, np.ndarray]] = {}  # corpus -> its epoch and the order of that
        for micro_step in range(self.start_step * self.accumulate, len(self)):
            first = (micro_step * self.world + self.rank) * self.micro_batch
            rows = []
            for sequence in range(first, first + self.micro_batch):
                corpus, number = mixture.locate(sequence, self.seed)
                windows = mixture.corpora[corpus]
                epoch, place = divmod(number, len(windows))
                if orders.get(corpus, (-1,))[0] != epoch:
                    orders.pop(corpus, None)  # or two would be held
                    orders[corpus] = epoch, order(len(windows), self.seed, epoch, corpus)
                rows.append(windows[int(orders[corpus][1][place])])
            end = windows.end_of_text if self.document_mask else None
            yield _batch(np.stack(rows), self.batch_size * windows.seq_len, end)


@dataclass(frozen=True)
class EvalBatches:
    """`num_windows` windows, spread over the split, shared out so that every process makes equally many batches of
    equal size; what is missing at the end is padded with ignored targets."""

    windows: TokenWindows | EvalWindows
    num_windows: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    document_mask: bool = False

    def __len__(self) -> int:
        return -(-self.num_windows // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[Batch]:
        chosen = np.linspace(0, len(self.windows) - 1, self.num_windows).round().astype(int)
        end = self.windows.end_of_text if self.document_mask else None
        for step in range(len(self)):
            first = (step * self.world + self.rank) * self.micro_batch
            real = chosen[first : first + self.micro_batch]
            rows = [self.windows[int(index)] for index in real]
            rows += [np.zeros_like(self.windows[0])] * (self.micro_batch - len(rows))
            batch = _batch(np.stack(rows), len(real) * self.windows.seq_len, end)
            batch["targets"][len(real) :] = IGNORE
            yield batch


def documents_of(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """[B, T] how many documents have ended before each token. The end of text is nowhere but at documents' ends."""
    ended_BT = (tokens_BT == end_of_text).long()
    return ended_BT.cumsum(1) - ended_BT


def _batch(tokens_BT: np.ndarray, step_targets: int, end_of_text: int | None) -> Batch:
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    inputs = tokens[:, :-1]
    return {
        "inputs": inputs,
        "targets": tokens[:, 1:].clone(),
        "step_targets": step_targets,
        "documents_BT": None if end_of_text is None else documents_of(inputs, end_of_text),
    }
