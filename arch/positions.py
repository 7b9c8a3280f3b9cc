"""Positions of new tokens, which stores that are not read by a mask take in its place.

Shapes: B batch, T new tokens, W window.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import Sequences, segment_starts


class TokenPositions(NamedTuple):
    """Positions of the new tokens.

    position_BT  [1 or B, T] tokens before each in its segment; negative: padding, which writes nothing
    window_rope  (cos, sin) of the W positions that a cache holds before the new tokens; None without a cache
    kernel       (q_BTNH, k_BTKH, v_BTKH, p_BTM, scale) -> [B, T, N, H], in place of the chunk form; None for that
    """

    position_BT: Tensor
    window_rope: tuple[Tensor, Tensor] | None = None
    kernel: Callable[..., Tensor] | None = None


def token_positions(sequences: Sequences) -> TokenPositions:
    """Positions of tokens that attend to themselves, without a cache."""
    position_BT = torch.arange(sequences.length, device=sequences.device)[None]
    if sequences.segment_ids_BT is not None:
        position_BT = position_BT - segment_starts(sequences.segment_ids_BT)
    return TokenPositions(position_BT)
