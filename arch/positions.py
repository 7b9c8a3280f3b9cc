"""Positions of new tokens, which stores that are not read by a mask take instead of one.

Shapes: B batch, T new tokens, M slots, W window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import Rope, rope_table, step_rope
from .masks import SequenceBatch, segment_starts
from .pooling import Chunks, Places, StepChunk, StepPlace
from .spans import Span
from .store_spec import StoreSpec


class TokenPositions(NamedTuple):
    """Positions of the new tokens.

    position_BT   [1 or B, T] tokens before each in its segment; negative: padding, which writes nothing
    evicted_rope  undoes the rotation of the keys that leave a cached window as these tokens come, of W at most; None
                  without a cache
    kernel        (q_BTNH, k_BTKH, v_BTKH, p_BTM, scale) -> [B, T, N, H], in place of the chunk form; None for that
    near          kernel of the window beside the slots; None: it is read in blocks (bounded_window.py)
    segmented     there may be several segments in a row, each of which starts at position 0
    plain         each row is one segment without padding, and nothing is cached before it
    step          of one token of each row over a cache; `evicted_rope` is then of `step_rope`, for keys beside values
    chunks        of a strided store
    """

    position_BT: Tensor
    evicted_rope: Rope | None = None
    kernel: Callable[..., Tensor] | None = None
    near: "Near | None" = None
    segmented: bool = False
    plain: bool = False
    step: "StepPositions | None" = None
    chunks: Chunks | StepChunk | Places | StepPlace | None = None

    def with_mask(self, make: Callable[[Any], Any]) -> "TokenPositions":
        """Return these positions with `make(mask)` in the place of a strided store's mask."""
        return self if self.chunks is None else self._replace(chunks=self.chunks._replace(mask=make(self.chunks.mask)))


class Near(NamedTuple):
    """A kernel of attention that also returns what its weights were divided by, and its mask of a window.

    kernel  (q_BTNH, k_BTKH, v_BTKH, form, scale) -> [B, T, N, H], and [B, N, T] the logarithm of the sum
    """

    kernel: Callable[..., tuple[Tensor, Tensor]]
    form: Any


class StepPositions(NamedTuple):
    """Position of one token of each row over a cache, as its bounded store needs it.

    ring        slot of its window's ring: a number, or [1 or B, 1] where rows differ or no number may be known; that
                of a store without a window means nothing
    hidden_B1S  [1 or B, 1, S] slots that it does not see, then those of the ring; None: it sees all
    all_write   each row has a token to write to the slots
    written_B   [1 or B] position of that token; negative where there is none
    """

    ring: int | Tensor
    hidden_B1S: Tensor | None
    all_write: bool
    written_B: Tensor


class NextToken(NamedTuple):
    """One token of each row over a cache, as the cache describes it to a store that is not read by a mask.

    position_B1  [1 or B, 1] its position; negative: padding
    offset       the same as a number, if it is that of all rows and may be known
    capacity     tokens that the cache has room for
    num_tokens   tokens that it has with this one, at most
    static       shapes are the same at every position
    dtype        of the token
    """

    position_B1: Tensor
    offset: int | None
    capacity: int
    num_tokens: int
    static: bool
    dtype: torch.dtype


def token_positions(sequences: SequenceBatch) -> TokenPositions:
    """Positions of tokens that attend to themselves, without a cache."""
    position_BT = torch.arange(sequences.length, device=sequences.device)[None]
    if sequences.segment_ids_BT is None:
        return TokenPositions(position_BT, plain=True)
    return TokenPositions(position_BT - segment_starts(sequences.segment_ids_BT), segmented=True)


@dataclass(frozen=True)
class PositionsBackend:
    """The backend of readers that take token positions: the form in plain torch, unless a subclass adds a kernel.

    about  description for the log
    """

    name: str
    about: str

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, which attend to themselves; called as `attend.Backend.mask`."""
        return token_positions(sequences)


def cached_positions(store: StoreSpec, position_BT: Tensor, capacity: int, offset: int) -> TokenPositions:
    """Positions of tokens that continue a cache of `offset` tokens with room for `capacity`, for a store that is a
    state."""
    return TokenPositions(position_BT, evicted_rope(store, position_BT))


def step_positions(store: StoreSpec, token: NextToken) -> TokenPositions:
    """Positions of one token of each row over a cache, for a store that is a state."""
    window, num_slots = store.window, store.num_slots
    position_B1, offset = token.position_B1, token.offset
    ring = window or (num_slots if store.rule == "ring_router" else 0)
    table = evicted_rope(store, position_B1)
    hidden_B1S = None
    if ring and (offset is None or offset < ring):
        hidden_B1S = ~written_slots(position_B1, ring)
        if window is not None:
            before = (position_B1 < window).unsqueeze(-1).expand(-1, -1, num_slots)
            hidden_B1S = torch.cat((before, hidden_B1S), dim=-1)
    slot = position_B1 % (window or 1) if offset is None else offset % (window or 1)
    written_B = position_B1.squeeze(1) if window is None else position_B1.squeeze(1) - window
    step = StepPositions(slot, hidden_B1S, offset is not None and offset >= (window or 0), written_B)
    back = None if table is None else step_rope(table, token.dtype, store.slot.k_dim + store.slot.v_dim)
    return TokenPositions(position_B1, back, step=step)


def evicted_rope(store: StoreSpec, position_BT: Tensor) -> Rope | None:
    """Table that undoes the rotation of keys that leave a window as tokens come; None without one."""
    window = store.window
    if window is None:
        return None
    cos, sin = rope_table((position_BT[:, :window] - window).clamp(min=0), *store.rope_key)
    # Sine and cosine are rounded: a key that is rotated back must not come out longer or shorter.
    squares = cos.double() ** 2 + sin.double() ** 2
    return cos / squares, -sin / squares


def written_slots(position_BT: Tensor, num_slots: int) -> Tensor:
    """[B, T, M] slots that a ring has written by then."""
    return torch.arange(num_slots, device=position_BT.device) <= position_BT.clamp(min=0).unsqueeze(-1)
