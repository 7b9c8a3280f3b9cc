"""Loss by position in the sequence, within the trained length and beyond it.

Shapes: B sequences, T tokens, D model, V vocabulary, E buckets.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from arch import LanguageModel
from data.batches import IGNORE, Batch

MAX_ROWS = 2048  # positions whose logits exist at one time


@dataclass(frozen=True)
class Bucket:
    """Positions `first` to `end` - 1 of the sequences, position 0 being the first target.

    nats   mean loss per real target
    error  standard error of the mean, of sequences as wholes: tokens of one sequence are not independent; None of one
    """

    first: int
    end: int
    nats: float
    error: float | None
    targets: int


def edges(length: int) -> list[int]:
    """Bounds of the buckets: 0, 1, 2, 4, 8, ..., `length`. Each bucket is as wide as all before it."""
    return [0, *(2**power for power in range((length - 1).bit_length())), length]


def token_nats(targets_BT: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Build a head for a model's forward pass that returns the loss [B, T] in fp32, 0 if the target is IGNORE."""

    def head(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        chunks = zip(torch.split(x_ND, MAX_ROWS), torch.split(targets_N, MAX_ROWS), strict=True)
        nats = [F.cross_entropy((x @ weight_VD.T).float(), t, reduction="none", ignore_index=IGNORE) for x, t in chunks]
        return torch.cat(nats).view_as(targets_BT)

    return head


@torch.no_grad()
def score(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss [B, T] in fp32 of the targets of `batch`, and which of them are predicted and real [B, T].

    The loss is 0 at all others. `model` may be one that has only the methods of a LanguageModel.
    """
    targets_BT = batch["targets"]
    if isinstance(model, LanguageModel):
        head = token_nats(model.select_targets(targets_BT))
        nats_BT = model(batch["inputs"], head=head, segment_ids_BT=batch["segment_ids_BT"])
    else:  # its logits are of the token after each input: of a model of blocks, the targets but the first ones
        plan, length = model.plan, targets_BT.shape[1]
        logits_BTV = model.next_token_logits(batch["inputs"][:, : length - 1 + plan.target_offset])
        chosen_BT = targets_BT[:, plan.min_prompt - plan.target_offset :]
        nats_BT = F.cross_entropy(logits_BTV.transpose(1, 2).float(), chosen_BT, reduction="none", ignore_index=IGNORE)
    missing = targets_BT.shape[1] - nats_BT.shape[1]
    real_BT = targets_BT != IGNORE
    real_BT[:, :missing] = False
    return F.pad(nats_BT, (missing, 0)), real_BT


def loss_by_position(model: LanguageModel, batches: Iterable[Batch]) -> list[Bucket]:
    """Mean loss per bucket over `batches` of sequences of one length. Buckets without a real target are left out."""
    return by_position(score(model, batch) for batch in batches)


def by_position(scored: Iterable[tuple[Tensor, Tensor]]) -> list[Bucket]:
    """Mean loss per bucket of what `score` returns for batches whose sequences begin at position 0.

    Buckets without a real target are left out.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    length = 0
    for nats_BT, real_BT in scored:
        length = max(length, nats_BT.shape[1])
        bounds = edges(nats_BT.shape[1])
        widths = [end - first for first, end in pairwise(bounds)]
        for values, parts in ((nats_BT.double(), sums), (real_BT.double(), counts)):
            parts.append(torch.stack([part.sum(1) for part in torch.split(values, widths, dim=1)], dim=1).cpu())
    if not sums:
        return []
    bounds = edges(length)
    sums_BE, counts_BE = (
        torch.cat([F.pad(part, (0, len(bounds) - 1 - part.shape[1])) for part in parts]) for parts in (sums, counts)
    )
    buckets = []
    for (first, end), sum_B, count_B in zip(pairwise(bounds), sums_BE.T, counts_BE.T, strict=True):
        real = count_B > 0
        if real.any():
            means = sum_B[real] / count_B[real]
            error = (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else None
            buckets.append(Bucket(first, end, (sum_B.sum() / count_B.sum()).item(), error, int(count_B.sum().item())))
    return buckets
