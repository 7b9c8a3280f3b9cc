"""Spans: the positions that a layer sees up to its own; and blocks of queries over a window."""

from typing import NamedTuple


class Chunk(NamedTuple):
    """Chunks of `size` positions, of the current one of which a layer sees those up to its own."""

    size: int


# The positions that a layer sees up to its own: the last so many, those of a chunk, or all.
Span = int | Chunk | None


def visible_pairs(seq_len: int, window: Span) -> int:
    """Pairs (query, key) that causal attention over `seq_len` tokens looks at."""
    if isinstance(window, Chunk):
        whole, rest = divmod(seq_len, window.size)
        return (whole * window.size * (window.size + 1) + rest * (rest + 1)) // 2
    full = min(seq_len, window or seq_len)
    return full * (full + 1) // 2 + (seq_len - full) * full


class QueryBlocks(NamedTuple):
    """Blocks of queries after the first window, in which windowed attention is computed on a CPU (masks.Windowed).

    slots_per_block  slots that a block of queries reads: the window before it and its own, in whole blocks
    """

    queries_per_block: int
    num_blocks: int
    slots_per_block: int

    @property
    def num_queries(self) -> int:
        """Queries of all blocks, with those that fill up the last block."""
        return self.queries_per_block * self.num_blocks

    @property
    def num_slots(self) -> int:
        """Slots that all blocks together read, from the first token on, with those that fill up the last block."""
        return self.num_queries - self.queries_per_block + self.slots_per_block


# Tokens below which a dense mask [T, T] costs no more than the calls that blocks take, several for each row.
SHORT_ROW = 160
# Most queries of a block, the fastest of 16 to 512 for windows of 64 to 1,024.
QUERY_BLOCK = 64


def query_blocks(seq_len: int, window: Span) -> QueryBlocks | None:
    """Blocks for `seq_len` tokens that attend to themselves; None: the mask is dense, or restricts nothing."""
    if window is None or isinstance(window, Chunk) or window >= seq_len or seq_len < SHORT_ROW:
        return None
    size = min(QUERY_BLOCK, max(16, window // 2), seq_len - window)
    return QueryBlocks(size, -(-(seq_len - window) // size), size * (1 + -(-window // size)))
