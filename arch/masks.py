"""Attention masks: the slots that each query sees, in the form that each kernel takes.

A token sees itself and the tokens before it, within its segment and the window. `window` counts the current token; or
it is a Chunk, counted from the start of the segment.
`segment_ids_BT` numbers the segments of each row, such as packed documents: a run of equal numbers is one segment.
Only `padded` takes padding (negative ids) between the tokens of one segment: a query then sees no interval, which needs
a dense mask.

Shapes: B batch, T new tokens, S slots read, I blocks of queries, J blocks of slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from .spans import Chunk, Span, query_blocks

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class SequenceBatch(NamedTuple):
    """`batch` rows of `length` tokens that attend to themselves; `segment_ids_BT` None: a row is one segment."""

    batch: int
    length: int
    segment_ids_BT: Tensor | None
    device: torch.device


class Dense(NamedTuple):
    """Mask for kernels that take every pair, or a flag.

    causal   slot s is visible to query t iff s <= t; requires S == T, and `allowed` is then None
    allowed  [T, S] or [B, 1, T, S], True where visible; None: no restriction but `causal`
    """

    causal: bool
    allowed: Tensor | None


class Windowed(NamedTuple):
    """Mask of tokens that attend to themselves in a window, by blocks of queries that read no more slots than needed.

    window   tokens
    first    mask of the first `window` tokens, which see no others
    allowed  [C, L], or [B, Z, C, L] with segments, True where visible: block z has C queries from token `window` + z C
             on and reads L slots from token z C on; the last block is filled up beyond the last token
    """

    window: int
    first: Dense
    allowed: Tensor


class Run(NamedTuple):
    """Slots without a gap, int32 [B] each: from `first_B` (None: the first) up to `end_B`, exclusive."""

    end_B: Tensor
    first_B: Tensor | None = None


class Seen(NamedTuple):
    """Slots of a cache that the next token of each row sees.

    allowed  [1, S] or [B, 1, 1, S], True where visible; None: all
    run      the same slots if they are a run; None: there may be gaps
    static   S stays the same for later tokens
    """

    allowed: Tensor | None
    run: Run | None = None
    static: bool = False


class Packed(NamedTuple):
    """Mask for kernels that take sequences of several lengths end to end.

    bounds   int32, the first token of each sequence among all B * T, then B * T; None: each row is one sequence.
             Filled up with empty sequences to a power of two, so that compiled code sees few lengths
    longest  upper bound of the sequence lengths
    window   None if it restricts nothing
    """

    bounds: Tensor | None
    longest: int
    window: int | None


class Rows(NamedTuple):
    """Mask of short rows for FlexAttention, which gets `number` of them end to end as one long row.

    A single row would fill whole blocks of queries and slots with a few tokens.
    """

    blocks: BlockMask
    number: int


def segment_starts(segment_ids_BT: Tensor) -> Tensor:
    """Position in the row [B, T] at which the segment of each token begins."""
    index_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    begins_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return torch.where(begins_BT, index_T, 0).cummax(dim=1).values


def first_visible(sequences: SequenceBatch, window: Span) -> Tensor | None:
    """First token [T], or [B, T] with segments, that each token sees; None: all tokens before it."""
    starts_BT = None if sequences.segment_ids_BT is None else segment_starts(sequences.segment_ids_BT)
    size = window.size if isinstance(window, Chunk) else window
    if size is None or size >= sequences.length:
        return starts_BT
    if isinstance(window, Chunk):
        index_T = torch.arange(sequences.length, device=sequences.device)
        return index_T - (index_T if starts_BT is None else index_T - starts_BT) % window.size
    edge_T = (torch.arange(sequences.length, device=sequences.device) - size + 1).clamp(min=0)
    return edge_T if starts_BT is None else torch.maximum(edge_T, starts_BT)


def chunks_as_segments(sequences: SequenceBatch, window: Span) -> tuple[SequenceBatch, int | None]:
    """The sequences with a segment per chunk, if `window` is one, and the window within segments."""
    if not isinstance(window, Chunk):
        return sequences, window
    first = first_visible(sequences, window)
    ids_BT = None if first is None else first.expand(sequences.batch, -1)
    return sequences._replace(segment_ids_BT=ids_BT), None


def dense(sequences: SequenceBatch, window: Span) -> Dense:
    first = first_visible(sequences, window)
    if first is None:
        return Dense(causal=True, allowed=None)
    index = torch.arange(sequences.length, device=sequences.device)
    allowed = (index <= index[:, None]) & (index >= first[..., None])
    return Dense(causal=False, allowed=allowed if allowed.ndim == 2 else allowed.unsqueeze(1))


def windowed(sequences: SequenceBatch, window: Span) -> Dense | Windowed:
    """Mask in blocks on the CPU if a window restricts something, else a dense one."""
    batch, length, segment_ids_BT, device = sequences
    blocks = query_blocks(length, window) if device.type == "cpu" else None
    if blocks is None:
        return dense(sequences, window)
    assert isinstance(window, int)
    query_C, slot_L = (
        torch.arange(window, window + blocks.queries_per_block, device=device),
        torch.arange(blocks.slots_per_block, device=device),
    )
    if segment_ids_BT is None:
        return Windowed(window, Dense(causal=True, allowed=None), visible(query_C, slot_L, window))
    lower_BT = first_visible(sequences, window)
    assert lower_BT is not None
    filled_BT = F.pad(lower_BT[:, window:], (0, blocks.num_queries + window - length))
    begin_Z = blocks.queries_per_block * torch.arange(blocks.num_blocks, device=device)
    lower_BZC = rearrange(filled_BT, "b (z c) -> b z c", c=blocks.queries_per_block) - begin_Z[:, None]
    allowed_BZCL = (slot_L <= query_C[:, None]) & (slot_L >= lower_BZC[..., None])
    first = dense(SequenceBatch(batch, window, segment_ids_BT[:, :window], device), None)
    return Windowed(window, first, allowed_BZCL)


def last_query(form: Dense | Windowed, length: int) -> Dense:
    """Mask of the last of `length` queries."""
    if isinstance(form, Dense):
        allowed = form.allowed
        return Dense(causal=False, allowed=None if allowed is None else allowed[..., -1:, :])
    size = form.allowed.shape[-2]
    block, row = divmod(length - 1 - form.window, size)
    if form.allowed.ndim == 2:
        seen_1S = F.pad(form.allowed[row : row + 1], (block * size, 0))[:, :length]
        return Dense(causal=False, allowed=seen_1S)
    seen_B1L = form.allowed[:, block, row : row + 1]
    return Dense(causal=False, allowed=F.pad(seen_B1L, (block * size, 0))[:, None, :, :length])


def visible(query_T: Tensor, slot_S: Tensor, window: Span, start_B: Tensor | None = None) -> Tensor:
    """Mask over a cache, [T, S], or [B, 1, T, S] given `start_B`: causal, in the window, and only filled slots.

    Indices count tokens from the start of the padded sequence; a slot of negative index is not filled yet. Row b is
    padding before `start_B[b]`; queries there see only themselves, since a softmax over nothing is undefined.
    """
    distance = query_T[:, None] - slot_S[None, :]
    allowed = (distance >= 0) & (slot_S >= 0)
    if isinstance(window, Chunk):
        begin = 0 if start_B is None else start_B[:, None, None]
        allowed = allowed & (slot_S >= begin + (query_T[:, None] - begin) // window.size * window.size)
    elif window is not None:
        allowed &= distance < window
    if start_B is None:
        return allowed
    is_token_BS = slot_S[None, :] >= start_B[:, None]
    return ((allowed & is_token_BS[:, None, :]) | (distance == 0))[:, None]


def padded(segment_ids_BT: Tensor, window: int | None) -> Dense:
    """Mask of one segment per row, with padding (negative ids) anywhere: causal, in the window, no padding as key.

    A query that would see nothing sees itself.
    """
    index = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    allowed_BTS = visible(index, index, window) & (segment_ids_BT >= 0)[:, None, :]
    alone_BTS = ~allowed_BTS.any(dim=-1, keepdim=True) & (index == index[:, None])
    return Dense(causal=False, allowed=(allowed_BTS | alone_BTS)[:, None])


def packed(sequences: SequenceBatch, window: Span) -> Packed:
    """Bounds of all segments. Waits for the device once, to count them."""
    sequences, window = chunks_as_segments(sequences, window)
    batch, length, segment_ids_BT, device = sequences
    total = batch * length
    if segment_ids_BT is None:
        starts = torch.arange(0, total, length, device=device)
    else:
        index_BT = torch.arange(total, device=device).view(batch, length)
        starts = index_BT[segment_starts(segment_ids_BT) == index_BT % length]
    room = 1 << (len(starts) - 1).bit_length()
    bounds = torch.full((room + 1,), total, dtype=torch.int32, device=device)
    bounds[: len(starts)] = starts
    return Packed(bounds, length, effective_window(window, length))


def effective_window(window: int | None, length: int) -> int | None:
    return None if window is None or window >= length else window


# Tokens on a side of a block of FlexAttention.
BLOCK = 128


def blocks(sequences: SequenceBatch, window: Span) -> BlockMask:
    """Block mask for FlexAttention: the blocks of pairs that are partly visible, and those that are fully visible.

    A token sees an interval, whose ends never decrease from one token to the next. So the first query of a block that
    is not before the slots decides whether any pair is visible, and the first and the last query whether all are.
    Unlike torch's create_block_mask, this makes no mask of every pair.
    """
    length, device = sequences.length, sequences.device
    first = first_visible(sequences, window)
    lower_BT = torch.zeros(1, length, dtype=torch.int64, device=device) if first is None else first.view(-1, length)
    begin = torch.arange(0, length, BLOCK, device=device)
    end = (begin + BLOCK).clamp(max=length) - 1
    before_IJ = end < begin[:, None]
    some_BIJ = (begin <= begin[:, None]) & (lower_BT[:, begin, None] <= end)
    whole_BIJ = before_IJ & (lower_BT[:, end, None] <= begin) & (end - begin == BLOCK - 1)[:, None]
    part_count, part_index = _in_order(some_BIJ & ~whole_BIJ)
    whole_count, whole_index = _in_order(whole_BIJ)
    return BlockMask.from_kv_blocks(
        part_count,
        part_index,
        whole_count,
        whole_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=_rule(first),
        seq_lengths=(length, length),
    )


# Tokens of a long row: its block mask grows with the square.
LONGEST = 1 << 15


def rows_end_to_end(batch: int, length: int) -> int:
    """Number of rows of `length` tokens to put end to end: a divisor of `batch`; all rows if no other is long
    enough."""
    fitting = (n for n in range(min(batch, max(1, LONGEST // length)), 0, -1) if batch % n == 0)
    number = next(fitting, batch)
    return number if number * length >= min(batch * length, 8 * BLOCK) else batch


def short_rows(sequences: SequenceBatch, window: Span) -> Rows:
    """Mask of rows without segments that attend to themselves, or with negative ids at padding as `padded`."""
    batch, length, segment_ids_BT, device = sequences
    number = rows_end_to_end(batch, length)
    index_T = torch.arange(number * length, device=device)
    begin_T = index_T - index_T % length
    assert not isinstance(window, Chunk)  # no Block Transformer has any
    first_T = begin_T if window is None else torch.maximum(begin_T, index_T - window + 1)
    if segment_ids_BT is None:
        return Rows(_interval_blocks(first_T, index_T, number * length), number)
    allowed_BTS = padded(segment_ids_BT, window).allowed
    assert allowed_BTS is not None
    visible_RTS = rearrange(allowed_BTS, "(r n) 1 t s -> r (n t) s", n=number)
    return Rows(_interval_blocks(begin_T, begin_T + length - 1, number * length, visible_RTS), number)


def rows_across(batch: int, queries: int, slots: int, device: torch.device) -> Rows:
    """Mask of rows of `queries` tokens, each of which sees all `slots` of its row and no others."""
    number = rows_end_to_end(batch, max(queries, slots))
    begin_T = torch.arange(number, device=device).repeat_interleave(queries) * slots
    return Rows(_interval_blocks(begin_T, begin_T + slots - 1, number * slots), number)


def _interval_blocks(first_T: Tensor, last_T: Tensor, slots: int, visible_RTS: Tensor | None = None) -> BlockMask:
    """Block mask of queries that see slots `first_T` to `last_T`, which never go back from one query to the next; no
    block is visible in whole.

    `visible_RTS`: of the slots from the first on, those that a query sees, for each long row.
    """
    queries, device = len(first_T), first_T.device
    begin_I = torch.arange(0, queries, BLOCK, device=device)
    end_I = (begin_I + BLOCK).clamp(max=queries) - 1
    begin_J = torch.arange(0, slots, BLOCK, device=device)
    some_BIJ = (begin_J <= last_T[end_I, None]) & (begin_J + BLOCK > first_T[begin_I, None])
    some_BIJ = some_BIJ.expand(1 if visible_RTS is None else len(visible_RTS), -1, -1)
    return BlockMask.from_kv_blocks(
        *_in_order(some_BIJ),
        BLOCK_SIZE=BLOCK,
        mask_mod=_interval_rule(first_T.to(torch.int32), last_T.to(torch.int32), visible_RTS),
        seq_lengths=(queries, slots),
    )


def _interval_rule(first_T: Tensor, last_T: Tensor, visible_RTS: Tensor | None) -> MaskRule:
    """The mask of single pairs, read from tensors as `_rule`."""
    if visible_RTS is None:
        return lambda b, h, query, slot: (slot >= first_T[query]) & (slot <= last_T[query])
    most = visible_RTS.shape[-1] - 1

    def rule(b: Tensor, h: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        within = slot - first_T[query]
        return (within >= 0) & (within <= most) & visible_RTS[b, query, within.clamp(0, most)]

    return rule


def _in_order(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """Count the chosen blocks of each block of queries, and list them first: int32, with an axis for heads."""
    chosen = rearrange(chosen_BIJ, "b i j -> b 1 i j").to(torch.int32)
    return chosen.sum(dim=-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _rule(first: Tensor | None) -> MaskRule:
    """The mask of single pairs. Bounds are read from a tensor: a number that differs between layers would be compiled
    as one that varies."""
    if first is None:
        return lambda b, h, query, slot: slot <= query
    bound = first.to(torch.int32)
    if bound.ndim == 1:
        return lambda b, h, query, slot: (slot <= query) & (slot >= bound[query])
    return lambda b, h, query, slot: (slot <= query) & (slot >= bound[b, query])
