"""Positions that are pooled: the chunks that new tokens fill, and what tokens see of a window and of complete entries.

Position p of a row, or of a segment, is in chunk p // M; the chunk's entry is complete with its last position, and seen
from there on. Over a cache positions count from the first token of each row, wherever that lies in the batch: position
p has slot p mod W of the ring, and entry p // M lies after it.

Shapes: B batch, T new tokens, W window (slots of the ring), M stride, C chunks that new tokens touch, E entries.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import Rope, rope_table
from .masks import Dense, Seen, Sequences, dense, segment_starts, visible
from .store_spec import RopeKey
from .strided_spec import StridedSpec


class Chunks(NamedTuple):
    """Chunks of new tokens.

    index_BCM  [1 or B, C, M] the token in each place; None: tokens fill the chunks in order
    rope       table for the entries, by the first position of each
    there_BCM  places that have a new token; None: all
    mask       of tokens over what the writer hands to readers: a form, then with its kernel
    cached     None without a cache
    """

    index_BCM: Tensor | None
    rope: Rope
    there_BCM: Tensor | None
    mask: Any
    cached: "CachedChunks | None" = None


class CachedChunks(NamedTuple):
    """Chunks of tokens that continue a cache; the first may have begun with earlier ones.

    begun_B      [1 or B] it has
    last_B       [1 or B] chunk of the last token
    written_BE   [1 or B, E] entries that are complete now and were not before
    source_BE    [1 or B, E] the chunk that each of them comes from
    ring_BT      [1 or B, T] slot of each token's position
    num_entries  entries that are read
    empty        no token came before
    """

    begun_B: Tensor
    last_B: Tensor
    written_BE: Tensor
    source_BE: Tensor
    ring_BT: Tensor
    num_entries: int
    empty: bool


class StepChunk(NamedTuple):
    """The chunk of one token of each row over a cache; a number or bool where it is the same in all rows and known.

    place     of the token in its chunk, [1 or B]
    complete  with it the chunk is
    ring      slot of the token's position, [1 or B]
    entry     slot of the chunk's entry, [1 or B]
    rope      table for the entry
    slots     slots that are read
    mask      as in Chunks
    """

    place: int | Tensor
    complete: bool | Tensor
    ring: int | Tensor
    entry: int | Tensor
    rope: Rope
    slots: int
    mask: Any


def chunks_alone(store_window: int | None, stride: int, rope_key: RopeKey, sequences: Sequences) -> Chunks:
    """Chunks of tokens that attend to themselves, without a cache. Readers see the tokens, then T // M entries."""
    batch, length, segment_ids_BT, device = sequences
    index_T = torch.arange(length, device=device)
    near = dense(sequences, store_window).allowed
    if near is None:
        near = visible(index_T, index_T, None)
    entries = length // stride
    if segment_ids_BT is None:
        begin_E = torch.arange(entries, device=device) * stride
        far_TE = begin_E + stride <= index_T[:, None] + 1
        return Chunks(None, rope_table(begin_E, *rope_key), None, Dense(False, torch.cat((near, far_TE), dim=-1)))
    starts_BT = segment_starts(segment_ids_BT)
    ends_BT = (index_T - starts_BT + 1) % stride == 0
    last_BE = torch.where(ends_BT, index_T, length).sort(dim=-1).values[:, :entries]  # `length`: there is none
    begin_BE = last_BE - stride + 1
    far_BTE = (last_BE[:, None] <= index_T[:, None]) & (begin_BE[:, None] >= starts_BT[:, :, None])
    index_BEM = (begin_BE.unsqueeze(-1) + torch.arange(stride, device=device)).clamp(max=length - 1)
    allowed = torch.cat((near.expand(batch, 1, -1, -1), far_BTE.unsqueeze(1)), dim=-1)
    return Chunks(index_BEM, rope_table(begin_BE, *rope_key), None, Dense(False, allowed))


def chunks_after(store: StridedSpec, position_BT: Tensor, capacity: int, offset: int) -> Chunks:
    """Chunks of tokens that continue a cache of `offset` tokens, padding of negative position included.

    Readers see the ring as it was, unless it is empty, the tokens, and entries.
    """
    window, stride, device = store.window, store.stride, position_BT.device
    assert window is not None
    length, total = position_BT.shape[1], store.num_entries(capacity)
    begin_B = position_BT[:, :1].clamp(min=0)
    first_B1, last_B1 = begin_B // stride, position_BT[:, -1:]
    chunk_C = torch.arange((length + 2 * stride - 2) // stride, device=device)
    place_BCM = ((first_B1 + chunk_C) * stride).unsqueeze(-1) + torch.arange(stride, device=device)
    token_BCM = place_BCM - position_BT[:, :1].unsqueeze(-1)
    entry_E = torch.arange(total, device=device)
    source_BE = entry_E - first_B1
    done_BE = (entry_E + 1) * stride <= last_B1 + 1
    seen = min(total, store.num_entries(offset + length))
    query_BT1 = position_BT.unsqueeze(-1)
    distance_BTT = query_BT1 - position_BT.unsqueeze(1)
    allowed = (distance_BTT >= 0) & (distance_BTT < window) & (position_BT >= 0).unsqueeze(1) | (distance_BTT == 0)
    parts = [allowed, (entry_E[:seen] + 1) * stride <= query_BT1 + 1]
    if offset:
        before_B1 = position_BT[:, :1] - 1
        slot_BW = before_B1 - (before_B1 - torch.arange(window, device=device)) % window
        parts = [(slot_BW >= 0).unsqueeze(1) & (query_BT1 - slot_BW.unsqueeze(1) < window), *parts]
    cached = CachedChunks(
        begun_B=begin_B.squeeze(1) % stride > 0,
        last_B=(last_B1 // stride - first_B1).clamp(min=0).squeeze(1),
        written_BE=done_BE & (source_BE >= 0),
        source_BE=source_BE.clamp(0, len(chunk_C) - 1),
        ring_BT=position_BT % window,
        num_entries=seen,
        empty=offset == 0,
    )
    return Chunks(
        token_BCM.clamp(0, length - 1),
        rope_table((first_B1 + chunk_C) * stride, *store.rope_key),
        (token_BCM >= 0) & (token_BCM < length),
        Dense(False, torch.cat(parts, dim=-1).unsqueeze(1)),
        cached,
    )


def step_chunk(
    store: StridedSpec, position_B1: Tensor, capacity: int, tokens: int, offset: int | None, static: bool
) -> StepChunk:
    """The chunk of one token of each row, which reads the entries that `tokens` tokens can have. `offset`: where it is
    the position of all, as a number."""
    window, stride, device = store.window, store.stride, position_B1.device
    assert window is not None
    total = store.num_entries(capacity)
    seen = min(total, store.num_entries(tokens))
    position_B = position_B1.squeeze(1)
    allowed = None
    if offset is None or offset < window - 1:
        slot_S = torch.arange(window + seen, device=device)
        there_BS = position_B1 - (position_B1 - slot_S) % window  # the position in a slot of the ring
        near_BS = (there_BS >= 0) | (there_BS == position_B1)
        # In one formula: FlexAttention cannot take a mask of two joined parts into its kernel.
        allowed = torch.where(slot_S < window, near_BS, (slot_S - window + 1) * stride <= position_B1 + 1)
        allowed = allowed if len(allowed) == 1 else allowed[:, None, None]
    rope = rope_table(position_B1 // stride * stride, *store.rope_key)
    mask, slots = Seen(allowed, None, static), window + seen
    if offset is not None:
        ring, place = offset % window, offset % stride
        return StepChunk(place, place == stride - 1, ring, window + offset // stride, rope, slots, mask)
    complete = (position_B >= 0) & ((position_B + 1) % stride == 0)
    entry = window + (position_B // stride).clamp(0, max(0, total - 1))
    return StepChunk(position_B % stride, complete, position_B % window, entry, rope, slots, mask)
