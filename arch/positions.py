"""Positions of new tokens, which stores that are not read by a mask take in its place.

Shapes: B batch, T new tokens, M slots, W window.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import Rope, rope_table
from .masks import Sequences, segment_starts
from .stores import StoreSpec


class TokenPositions(NamedTuple):
    """Positions of the new tokens.

    position_BT   [1 or B, T] tokens before each in its segment; negative: padding, which writes nothing
    evicted_rope  undoes the rotation of the keys that leave a cached window as these tokens come, of W at most; None
                  without a cache
    kernel        (q_BTNH, k_BTKH, v_BTKH, p_BTM, scale) -> [B, T, N, H], in place of the chunk form; None for that
    segmented     there may be several segments in a row, so that positions begin anew
    seen_BS       [1 or B, S] of one token over a cache, the slots that it sees, then those of the ring of its window;
                  None: all
    """

    position_BT: Tensor
    evicted_rope: Rope | None = None
    kernel: Callable[..., Tensor] | None = None
    segmented: bool = False
    seen_BS: Tensor | None = None


def token_positions(sequences: Sequences) -> TokenPositions:
    """Positions of tokens that attend to themselves, without a cache."""
    position_BT = torch.arange(sequences.length, device=sequences.device)[None]
    if sequences.segment_ids_BT is not None:
        position_BT = position_BT - segment_starts(sequences.segment_ids_BT)
    return TokenPositions(position_BT, segmented=sequences.segment_ids_BT is not None)


def cached_positions(store: StoreSpec, position_BT: Tensor) -> TokenPositions:
    """Positions of tokens that continue a cache, for a bounded store."""
    window, seen_BS, rope = store.window, None, None
    if window is not None:
        cos, sin = rope_table((position_BT[:, :window] - window).clamp(min=0), *store.rope_key)
        # Sine and cosine are rounded: a key that is rotated back must not come out longer or shorter.
        squares = cos.double() ** 2 + sin.double() ** 2
        rope = (cos / squares, -sin / squares)
    if position_BT.shape[1] == 1:
        ring = window or (store.num_slots if store.rule == "ring_router" else 0)
        if ring:
            seen_BS = written_slots(position_BT, ring)[:, 0]
            if window is not None:
                seen_BS = torch.cat(((position_BT >= window).expand(-1, store.num_slots), seen_BS), dim=1)
    return TokenPositions(position_BT, rope, seen_BS=seen_BS)


def written_slots(position_BT: Tensor, num_slots: int) -> Tensor:
    """[B, T, M] slots that a ring has written by then."""
    return torch.arange(num_slots, device=position_BT.device) <= position_BT.clamp(min=0).unsqueeze(-1)
