"""What layers of bounded stores keep for the backward pass, in the chunk form of arch/chunks.py; see train/memory.py.

Elements and bytes are per token: A address, C tokens of a chunk, N query heads, K key/value heads, H head, M slots,
W window, L positions that a block of queries looks at.
"""

from dataclasses import dataclass

from arch import ModelConfig, Store
from arch.plan import CHUNK, head_dim

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Elements of a token: its keys (of one kind), queries, chunk, slots, states between chunks, and its window.

    states   [M, 2 K H] per chunk, and one more per sequence
    copies   of a key in the blocks of the window
    looked   L
    """

    keys: int
    queries: int
    chunk: int
    slots: int
    states: float
    copies: float
    looked: int


def sizes(config: ModelConfig, store: Store) -> Sizes:
    length, keys = config.size.seq_len, store.slot.kv_heads * store.slot.k_dim
    chunk, looked, copies = min(CHUNK, length), 0, 0.0
    chunks = -(-length // chunk)
    if store.window is not None:
        block = min(-(-store.window // 2), length)
        looked = block + (store.window if length > block else 0)
        copies = looked / block
    states = 2 * keys * store.slots * (chunks + 1) / length
    return Sizes(keys, config.size.num_heads * head_dim(config.size), chunk, store.slots, states, copies, looked)


def slot_bytes(config: ModelConfig, store: Store, itemsize: int) -> float:
    """What an owner hands to later layers: keys and values, strengths, fading and states in fp32, and the window's."""
    s = sizes(config, store)
    return itemsize * 2 * s.keys * (1 if store.window is None else 2) + FP32 * (2 * s.slots + s.states)


def owner_bytes(config: ModelConfig, store: Store, compiled: bool, itemsize: int) -> float:
    """What the writer keeps, beside the input of its projections.

    uncompiled  all in fp32: of the router the address, normalised too, and two or three products over the slots; the
                strengths, what they leave and its logarithm's input, the sums' pattern (C); the share of the chunk's
                last token, keys and values, and the states
    compiled    strengths are made again from the address, which is kept in the type computed in
    """
    s, address = sizes(config, store), store.address_dim
    if compiled:
        exact = address + 1 + (4 + 1 / s.chunk) * s.slots + 2 * s.keys + s.states
        return FP32 * exact + itemsize * (address + s.slots)
    router = 2 * address + 2 + (3 if store.rule == "ring_router" else 2) * s.slots
    return FP32 * (router + (5 + 1 / 4 + 1 / s.chunk) * s.slots + s.chunk + 2 * s.keys + s.states)


def reader_bytes(config: ModelConfig, store: Store, compiled: bool) -> float:
    """What the reader keeps, beside the input of its projections.

    uncompiled  all in fp32: what is left of each token of a chunk in each slot (C M); queries, as products take them,
                and the sum before its division; products within chunks (N C) twice; products with the state as they
                are, and weights, as they are and faded (N M each); keys, values and states as products take them. Of
                the window weights (N L), rotated queries, and a copy of keys and values per block that looks at them
    compiled    what is left in the slots and the sum before its division are made again
    """
    s, heads = sizes(config, store), config.size.num_heads
    near = store.window is not None
    exact = (s.chunk + 1) * s.slots + 2 * heads * s.slots + s.queries + heads * (1 + store.sinks) + heads * s.looked
    operands = heads * s.slots + 2 * heads * s.chunk + 2 * s.keys * (1 + s.slots / s.chunk + s.copies)
    operands += (2 if near else 1) * s.queries
    made_again = 0 if compiled else (1 + 1 / 4) * s.slots + s.queries
    return FP32 * (exact + operands + made_again)


def gradient_bytes(config: ModelConfig, store: Store) -> float:
    """An upper estimate of the gradients alive at a time in the reader's backward pass: of weights, by way of their
    sum and of what they weigh. The window's go before those of the slots and of what is left of each token."""
    s, heads = sizes(config, store), config.size.num_heads
    return FP32 * max(2 * heads * s.looked, (s.chunk + 2 * heads) * s.slots - heads * s.looked)
