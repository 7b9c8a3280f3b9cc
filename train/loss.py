"""Next-token cross-entropy.

Shapes: B batch, T tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from data.batches import IGNORE


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum in nats over the real targets (not IGNORE), in fp32 whatever the type of the logits."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
