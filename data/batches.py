"""Batches whose content is a pure function of (seed, step): independent of processes, workers and interruptions.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .shards import TokenWindows

# Target of a position that is not real text: no loss, not counted.
IGNORE = -100


class Batch(TypedDict):
    """Inputs [B, T], the token after each [B, T], and the number of real targets in the whole optimizer step."""

    inputs: Tensor
    targets: Tensor
    step_targets: int


def order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The windows of one pass over the data, shuffled."""
    return np.random.default_rng((seed, epoch)).permutation(num_windows)


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process from step `start_step` on.

    Sequence g of the run is window `order(epoch)[g mod num_windows]`. Step s takes the batch_size sequences from
    s * batch_size on, which the processes share out micro-batch by micro-batch. The length counts all micro-batches of
    the run, those before `start_step` too, because the loop's restored counter runs against it.
    """

    windows: TokenWindows
    seed: int
    steps: int
    batch_size: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start_step: int = 0

    @property
    def accumulate(self) -> int:
        """Micro-batches per step and process."""
        return self.batch_size // (self.micro_batch * self.world)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for micro_step in range(self.start_step * self.accumulate, len(self)):
            first = (micro_step * self.world + self.rank) * self.micro_batch
            rows = []
            for sequence in range(first, first + self.micro_batch):
                if sequence // len(self.windows) != epoch:
                    epoch = sequence // len(self.windows)
                    permutation = order(len(self.windows), self.seed, epoch)
                rows.append(self.windows[int(permutation[sequence % len(self.windows)])])
            yield _batch(np.stack(rows), self.batch_size * self.windows.seq_len)


@dataclass(frozen=True)
class EvalBatches:
    """`num_windows` windows, spread over the split, shared out so that every process makes equally many batches of
    equal size; what is missing at the end is padded with ignored targets."""

    windows: TokenWindows
    num_windows: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return -(-self.num_windows // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[Batch]:
        chosen = np.linspace(0, len(self.windows) - 1, self.num_windows).round().astype(int)
        for step in range(len(self)):
            first = (step * self.world + self.rank) * self.micro_batch
            real = chosen[first : first + self.micro_batch]
            rows = [self.windows[int(index)] for index in real]
            rows += [np.zeros_like(self.windows[0])] * (self.micro_batch - len(rows))
            batch = _batch(np.stack(rows), len(real) * self.windows.seq_len)
            batch["targets"][len(real) :] = IGNORE
            yield batch


def _batch(tokens_BT: np.ndarray, step_targets: int) -> Batch:
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].clone(), "step_targets": step_targets}
