"""Positions that are pooled: the chunks that new tokens fill, and what tokens see of a window and of complete entries.

Position p of a row, or of a segment, is in chunk p // M; the chunk's entry is complete with its last position, and seen
from there on. Over a cache positions count from the first token of each row, wherever that lies in the batch: position
p has slot p mod W of the ring, and entry p // M lies after it.

Of latents there is no ring, entry p // M is in slot p // M, and a token also sees that of its own chunk as far as the
chunk has come (`Places`).

Shapes: B batch, T new tokens, W window (slots of the ring), M stride, C chunks that new tokens touch, E entries, R
latent.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import Rope, rope_table
from .masks import Dense, Seen, SequenceBatch, dense, segment_starts, visible
from .store_spec import RopeKey
from .strided_latent_spec import StridedLatentSpec
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


def chunks_alone(store_window: int | None, stride: int, rope_key: RopeKey, sequences: SequenceBatch) -> Chunks:
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


class Places(NamedTuple):
    """Places of new tokens in the chunks of a store of latents.

    place_BT  [1 or B, T] tokens of its chunk before each
    code_BTR  [1 or B, T, R] code of the chunk of each
    mask      as in Chunks
    cached    None without a cache
    """

    place_BT: Tensor
    code_BTR: Tensor
    mask: Any
    cached: "CachedPlaces | None" = None


class CachedPlaces(NamedTuple):
    """Places of tokens that continue a cache.

    begun_BT      [1 or B, T] tokens of a chunk that began with earlier ones; None: of no row
    slot_B        [1 or B] slot of that chunk
    written_BE    [1 or B, E] entries to which tokens are added
    source_BE     [1 or B, E] the last token of each of them
    num_complete  entries that were complete before, in the row with the most, and are read
    """

    begun_BT: Tensor | None
    slot_B: Tensor
    written_BE: Tensor
    source_BE: Tensor
    num_complete: int


class StepPlace(NamedTuple):
    """Place of one token of each row over a cache; a number where it is the same in all rows and known.

    place    of the token in its chunk, [1 or B]
    slot     of the chunk's entry, [1 or B]
    code_BR  [1 or B, R] code of the chunk
    slots    slots that are read
    mask     as in Chunks
    """

    place: int | Tensor
    slot: int | Tensor
    code_BR: Tensor
    slots: int
    mask: Any


def chunk_codes(chunk: Tensor, dim: int) -> Tensor:
    """Sines and cosines [..., R] of the numbers of chunks, by turns, as of positions in the first transformers."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=chunk.device) / dim
    angle = chunk.to(torch.float32).unsqueeze(-1) * torch.exp(exponent * -math.log(10000.0))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def places_alone(
    stride: int, latent_dim: int, sequences: SequenceBatch, position_BT: Tensor, dtype: torch.dtype
) -> Places:
    """Places of tokens that attend to themselves, without a cache: each to the complete entries before it, as they
    come with their last token, and to its own so far. Codes are of `dtype`, cast once for all layers."""
    before = dense(sequences, None).allowed
    index_T = torch.arange(sequences.length, device=sequences.device)
    if before is None:
        before = visible(index_T, index_T, None)
    complete_BT = (position_BT + 1) % stride == 0
    complete = complete_BT[0] if before.ndim == 2 else complete_BT[:, None, None]
    allowed = before & complete | (index_T == index_T[:, None])
    code_BTR = chunk_codes(position_BT // stride, latent_dim).to(dtype)
    return Places(position_BT % stride, code_BTR, Dense(False, allowed))


def places_after(store: StridedLatentSpec, position_BT: Tensor, offset: int) -> Places:
    """Places of tokens that continue a cache of `offset` tokens, padding of negative position included.

    Readers see the entries that were complete before, then the tokens.
    """
    stride, device, length = store.stride, position_BT.device, position_BT.shape[1]
    begin_B1, last_B1 = position_BT[:, :1].clamp(min=0), position_BT[:, -1:]
    first_B1, chunk_BT = begin_B1 // stride, position_BT.clamp(min=0) // stride
    distance_BTT = position_BT.unsqueeze(-1) - position_BT.unsqueeze(1)
    complete_BT = (position_BT >= 0) & ((position_BT + 1) % stride == 0)
    parts = [(distance_BTT >= 0) & complete_BT.unsqueeze(1) | (distance_BTT == 0)]
    num_complete = offset // stride
    if num_complete:
        there_BE = torch.arange(num_complete, device=device) < first_B1
        parts = [there_BE.unsqueeze(1).expand(-1, length, -1), *parts]
    entry_E = torch.arange(store.num_positions(offset + length), device=device)
    newest_BE = torch.minimum((entry_E + 1) * stride - 1, last_B1)
    cached = CachedPlaces(
        begun_BT=(chunk_BT == first_B1) & (begin_B1 % stride > 0) if offset else None,
        slot_B=first_B1.squeeze(1),
        written_BE=(entry_E >= first_B1) & (entry_E * stride <= last_B1),
        source_BE=(newest_BE - position_BT[:, :1]).clamp(0, length - 1),
        num_complete=num_complete,
    )
    mask = Dense(False, torch.cat(parts, dim=-1).unsqueeze(1))
    return Places(position_BT % stride, chunk_codes(chunk_BT, store.slot.latent_dim), mask, cached)


def step_place(
    store: StridedLatentSpec, position_B1: Tensor, tokens: int, offset: int | None, static: bool
) -> StepPlace:
    """The place of one token of each row, which reads the entries that `tokens` tokens can have. `offset`: where it is
    the position of all, as a number."""
    stride, position_B = store.stride, position_B1.squeeze(1)
    chunk_B = position_B.clamp(min=0) // stride
    code_BR, slots = chunk_codes(chunk_B, store.slot.latent_dim), store.num_positions(tokens)
    if offset is not None:
        return StepPlace(offset % stride, offset // stride, code_BR, slots, Seen(None, None, static))
    allowed = torch.arange(slots, device=position_B.device) <= chunk_B.unsqueeze(-1)
    allowed = allowed if len(allowed) == 1 else allowed[:, None, None]
    return StepPlace(position_B % stride, chunk_B, code_BR, slots, Seen(allowed, None, static))
