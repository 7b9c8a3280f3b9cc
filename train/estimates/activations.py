"""Activations that layers of each kind of store save for the backward pass, counted from the layout (memory.py).

The formulas follow the modules of arch, which their docstrings name, line by line and change with them. Bytes and
elements are per token.
"""

from dataclasses import dataclass, replace

from arch import ModelConfig, StoreSpec
from arch.bounded_spec import CHUNK, SCORES, WINDOW_BLOCKS, BoundedSpec
from arch.config import SizeConfig, head_dim, style_of
from arch.delta_spec import MatrixSpec, delta_chunk
from arch.latent_spec import LatentSpec
from arch.spans import query_blocks
from arch.store_spec import gate_width
from arch.strided_latent_spec import StridedLatentSpec
from arch.strided_spec import StridedSpec
from arch.tied_spec import TiedSpec

FP32 = 4


@dataclass(frozen=True)
class Execution:
    """Execution of a step.

    strategy    auto (one device), ddp or fsdp
    world       processes
    replicas    of hsdp, which is fsdp within each of them
    itemsize    of the type computed in: 2 for bf16, 4 for fp32
    accumulate  micro-batches of a step
    documents   rows are packed documents, each of which attends to itself
    pads        documents fill whole blocks of a Block Transformer, with pads between them
    dense       windows are read in blocks and sinks are slots, as in torch's fused attention on a CPU
    trained     share of the parameters that are trained
    """

    strategy: str = "auto"
    world: int = 1
    replicas: int = 1
    itemsize: int = 2
    compiled: bool = True
    checkpointing: bool = False
    accumulate: int = 1
    documents: bool = False
    pads: bool = False
    dense: bool = False
    trained: float = 1.0

    @property
    def shards(self) -> int:
        """Processes that share the weights of one replica; 1 where each has all."""
        return self.world // self.replicas if self.strategy == "fsdp" else 1


def norm_bytes(size: SizeConfig) -> int:
    """A norm of the residual stream, uncompiled, per token. LayerNorm: its input in fp32, the mean and 1 / standard
    deviation; RMSNorm: `rms_norm_bytes`."""
    return FP32 * size.d_model + 2 * FP32 if style_of(size).norm == "layernorm" else rms_norm_bytes(size.d_model)


def rms_norm_bytes(dim: int) -> int:
    """RMSNorm over `dim`, uncompiled, per token: its input in fp32, that divided by the rms, and 1 / rms."""
    return 2 * FP32 * dim + FP32


class Activations:
    """The activations that a kind of store saves beyond its layers."""

    peaks = False  # whether its backward pass, in whatever layer, may need more than that of the last one

    def positions(self, store: StoreSpec, how: Execution) -> int:
        """Bytes per token of positions that all layers with the same `positions_key` share."""
        return 0


class MaskedActivations(Activations):
    """Activations saved by layers that read their store by softmax attention (arch/grouped.py and the kernels)."""

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Keys and values that the owner hands to later layers."""
        return how.itemsize * store.slot.elements

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Queries, keys, values, output, and log-sum-exp in fp32.

        Keys and values belong to the owner of the store, unless a sink is appended to them. All are as wide as the
        kernel's keys; where heads are narrower, or a sink or gate takes its share afterwards, the output is kept again.
        In blocks of queries it always is, and what fills up blocks or widths is copied.
        """
        heads, appended, wide = config.size.num_heads, store.sinks and how.dense, self.width(config, store, how)
        kv_heads, k_dim, v_dim = store.kernel_heads(config.size)
        blocks = query_blocks(config.size.seq_len, store.span) if how.dense else None
        if blocks is not None:
            assert store.window is not None
            length, window = config.size.seq_len, store.window
            queries, slots = window + blocks.num_queries, blocks.num_slots
            kept = queries if appended or wide > k_dim else length + blocks.num_queries * (queries > length)
            if appended:
                slots += slots // blocks.queries_per_block + 1
            total = heads * wide * (kept + queries)
            for copied in (appended or wide > k_dim, appended or wide > v_dim):
                read = window if copied else length * (owner or self.expands)
                total += kv_heads * wide * (read + (slots if copied or slots > length else 0))
            total += heads * v_dim * length * (2 if gate_width(config.size, 1) else 1)
            return (how.itemsize * total + FP32 * heads * queries) / length
        elements = 2 * heads * wide
        for width in (k_dim, v_dim):
            if owner or appended or self.expands or wide > width:
                elements += kv_heads * wide
        if wide > v_dim or store.sinks or gate_width(config.size, 1):
            elements += heads * v_dim
        return how.itemsize * elements + FP32 * heads

    expands = False  # whether every layer makes keys and values of its own from the slots

    def width(self, config: ModelConfig, store: StoreSpec, how: Execution) -> int:
        """Width of the kernel's keys and values, the wider ones."""
        width = max(store.kernel_heads(config.size)[1:])
        return -(-(width + 2 * (store.sinks and how.dense)) // 8) * 8 if how.dense else width

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        """The mask of a window, which each layer converts and keeps: of a block of queries, with sinks also of the
        first window; dense [T, T] in short rows."""
        length, blocks = config.size.seq_len, query_blocks(config.size.seq_len, store.span)
        if not how.dense or not (store.sinks or (store.window is not None and store.window < length)):
            return 0
        if blocks is None:
            return how.itemsize * length * (length + store.sinks)
        assert store.window is not None
        sinks = store.sinks * (blocks.slots_per_block + store.window * (store.window + 1))
        return how.itemsize * (blocks.queries_per_block * blocks.slots_per_block + sinks)

    def gradients(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Gradients alive at a time in the reader's backward pass, where they may be more than the block's."""
        return 0


class LatentActivations(MaskedActivations):
    """Activations saved by arch/latent.py: the expanded keys and values, and in the owner the latent and its norm's.

    Values that the kernel takes as they are keep the part of keys beside which they were expanded.
    """

    expands = True

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        latent, rope = store.slot.latent_dim, store.slot.rope_dim
        norm = how.itemsize * (latent + rope) + FP32 if how.compiled else rms_norm_bytes(latent)
        total = super().attention(config, store, owner, how) + (how.itemsize * latent + norm if owner else 0)
        if not how.compiled and not store.sinks and self.width(config, store, how) == head_dim(config.size):
            assert isinstance(store, LatentSpec)
            total += how.itemsize * config.size.num_heads * store.expanded_dim(config.size)
        return total


class MixedActivations(MaskedActivations):
    """Activations saved by arch/mixed.py: every layer mixes keys and values of its own from what owners wrote."""

    expands = True

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Keys and values of both stores."""
        return 2 * super().shared(config, store, how)


class TiedActivations(MaskedActivations):
    """Activations saved by arch/tied.py: one tensor where keys are values, keys made anew by each reader in `half`, and
    the output again where it is rotated back."""

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Values in `half` are a view that holds the shared half, too; of one projection that is neither rotated nor
        normed, keys and values are one tensor."""
        assert isinstance(store, TiedSpec)
        if self.one_tensor(config.size, store):
            return how.itemsize * store.slot.kv_heads * store.slot.k_dim
        return super().shared(config, store, how) + how.itemsize * store.slot.rope_dim

    def one_tensor(self, size: SizeConfig, store: TiedSpec) -> bool:
        """Keys and values are the same tensor in training."""
        plain = store.rotary_dim == 0 and style_of(size).qk_norm == "none"
        return store.tied == "vector" or (store.tied == "projection" and plain)

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        assert isinstance(store, TiedSpec)
        size, elements, total = config.size, 0, super().attention(config, store, owner, how)
        kv_heads, k_dim, v_dim = store.kernel_heads(size)
        wide, norms = self.width(config, store, how), style_of(size).qk_norm != "none"
        gate, copied = gate_width(size, 1), (store.sinks and how.dense) or wide > k_dim
        if not copied:
            if store.tied == "half":
                elements += store.slot.rope_dim if owner else kv_heads * k_dim
            elif owner and self.one_tensor(size, store):
                elements -= kv_heads * k_dim
        in_blocks = how.dense and query_blocks(size.seq_len, store.window) is not None
        if store.turns_back and not in_blocks and (gate or not (wide > v_dim or store.sinks)):
            elements += size.num_heads * v_dim
        if store.tied == "projection" and owner and norms:  # of values, without a scale
            cast = 0 if how.compiled or how.itemsize == FP32 else FP32 * kv_heads * k_dim
            total += cast + FP32 * (kv_heads if style_of(size).qk_norm == "head" else 1)
        return total + how.itemsize * elements


class StridedActivations(MaskedActivations):
    """Activations saved by arch/strided.py, whose readers run torch's fused attention with a dense mask anywhere."""

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Keys and values of tokens and entries."""
        return how.itemsize * store.slot.elements * (1 + self.entries(config, store))

    def entries(self, config: ModelConfig, store: StoreSpec) -> float:
        """Entries per token."""
        assert isinstance(store, StridedSpec)
        return store.num_entries(config.size.seq_len) / config.size.seq_len

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Bytes per token as of grouped stores, with keys and values of entries and a sink for each row; and what an
        owner pools, in fp32: what tokens give, its weights, and the entries and their norms."""
        assert isinstance(store, StridedSpec)
        heads, length, how = config.size.num_heads, config.size.seq_len, replace(how, dense=True)
        entries, wide, (kv_heads, k_dim, v_dim) = (
            self.entries(config, store),
            self.width(config, store, how),
            store.kernel_heads(config.size),
        )
        elements = 2.0 * heads * wide
        for width in (k_dim, v_dim):
            if owner or store.sinks or wide > width:
                elements += kv_heads * wide * (1 + entries + store.sinks / length)
        if not (store.slot.v_dim or store.sinks or wide > k_dim):  # keys are values
            elements -= owner * kv_heads * k_dim * (1 + entries)
        gate = gate_width(config.size, 1) > 0
        if wide > v_dim or store.sinks or gate or store.turns_back:
            elements += heads * v_dim * (1 + (gate and store.turns_back))
        total = how.itemsize * elements + FP32 * heads
        if owner:
            norms = sum(rms_norm_bytes(width) for _, width in store.position_shapes)
            total += FP32 * store.slot.elements * (1 + entries * store.stride) + entries * kv_heads * norms
        return total

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        length = config.size.seq_len
        return how.itemsize * length * (store.dense_slots(length) + store.sinks)


class StridedLatentActivations(LatentActivations):
    """Activations saved by arch/strided_latent.py, whose readers run torch's fused attention with a dense mask
    anywhere."""

    def positions(self, store: StoreSpec, how: Execution) -> int:
        """Bytes of the codes of chunks, cast, and of each token's chunk and place in it."""
        return how.itemsize * store.slot.latent_dim + 2 * 8

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Add, for the owner, the running entries, which are expanded in place of the latents, and the inputs of the
        shares: the projected latents, and the share in fp32. With documents each sequence has its own chunks and
        codes."""
        assert isinstance(store, StridedLatentSpec)
        total = super().attention(config, store, owner, replace(how, dense=True))
        elements = store.slot.latent_dim + store.share_dim * (2 if how.documents else 1)
        return total + owner * (how.itemsize * elements + FP32)

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        """Bytes of the mask, and of the projected codes of chunks."""
        assert isinstance(store, StridedLatentSpec)
        length, codes = config.size.seq_len, store.share_dim if owner and not how.documents else 0
        return how.itemsize * length * (store.dense_slots(length) + store.sinks + codes)

    def gradients(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Bytes of the backward pass on a CPU in half precision, which computes in fp32: queries, keys, values, output
        and its gradient, and the mask of one sequence (arch/attend_cpu.py). The gradients of the first three take the
        place of what the norms saved."""
        if not how.dense or how.itemsize == FP32:
            return 0
        elements = 5 * config.size.num_heads * self.width(config, store, how)
        return FP32 * (elements + store.dense_slots(config.size.seq_len))


class BoundedActivations(Activations):
    """Activations saved by arch/bounded.py and bounded_chunks.py in the chunk form."""

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Keys and values, of what has left a window with those before it; strengths, what chunks write and the state
        before them; and the window's keys and values."""
        s, length = sizes(config, store, how), config.size.seq_len
        positions = 1.0
        if store.window is not None:
            positions = 1.5 if s.written < 1 else 2 + store.window / length
        start = 2 * s.keys * store.num_slots / length
        return how.itemsize * 2 * s.keys * positions + FP32 * (s.slots + s.writes + start)

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Tensors that reader and writer save, and the output."""
        total = reader_bytes(config, store, how)
        total += owner_bytes(config, store, how) if owner else 0
        outputs = 2 if gate_width(config.size, 1) else 1
        return total + outputs * how.itemsize * config.size.num_heads * head_dim(config.size)

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        """The pattern of a ring and the slots that it has not reached, the same for each sequence."""
        ring = store.rule == "ring_router" and not how.compiled
        return config.size.seq_len * store.num_slots * ((FP32 + 1) * owner + FP32) if ring else 0

    def gradients(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        return gradient_bytes(config, store, how)


class MatrixActivations(Activations):
    """Activations saved by arch/delta.py, which recomputes the rule, and the gated norm, in the backward pass."""

    peaks = True

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """No other layer reads it."""
        return 0

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Inputs of the rule (queries, keys, values, strengths and decays, as projected); what it reads, in fp32; the
        gate and the output. In rule `kda` also what lies within both projections of low rank."""
        assert isinstance(store, MatrixSpec)
        values = store.slot.kv_heads * store.slot.v_dim
        projected = store.num_channels + store.slot.kv_heads + store.num_decays + 2 * values
        inner = 2 * store.slot.v_dim if store.matrix.rule == "kda" else 0
        return how.itemsize * (projected + inner) + FP32 * values

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        return 0

    def gradients(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """The rule, computed again, and its gradients; what the reader and the MLP with its norm kept is gone by then.

        Tensors of fp32 as wide as what passes the convolution (4), keys and values of the states (9 and 8, or 8 and 5
        where products of pairs, 6 or 8, are wider), and the states between chunks. In rule `kda`, where every level of
        `faded_by_halves` has keys of its own, about so many.
        """
        assert isinstance(store, MatrixSpec)
        length, values = config.size.seq_len, store.slot.kv_heads * store.slot.v_dim
        keys, chunk = store.slot.kv_heads * store.slot.k_dim, delta_chunk(config.size.seq_len)
        states = keys * store.slot.v_dim * (1 / chunk + 1 / length)
        pairs = store.slot.kv_heads * chunk
        if store.matrix.rule == "kda":
            rule = max(38 * keys + 8 * values + 2 * pairs + states, 39 * keys + 5 * values + 5 * pairs)
        else:
            rule = max(8 * keys + 5 * values + 8 * pairs, 9 * keys + 8 * values + 6 * pairs + states)
        gone = FP32 * values + how.itemsize * 2 * values
        gone += 0 if how.compiled else how.itemsize * config.size.d_ff + norm_bytes(config.size)
        return FP32 * (4 * store.num_channels + rule) - gone


ACTIVATIONS: dict[str, MaskedActivations | BoundedActivations | MatrixActivations] = {
    "grouped": MaskedActivations(),
    "mixed": MixedActivations(),
    "latent": LatentActivations(),
    "tied": TiedActivations(),
    "bounded": BoundedActivations(),
    "strided": StridedActivations(),
    "strided_latent": StridedLatentActivations(),
    "matrix": MatrixActivations(),
}


# --- bounded stores, in the chunk form of arch/bounded_chunks.py
#
# Elements and bytes are per token: A address, C tokens of a chunk, N query heads, K key/value heads, H head, M slots,
# W window.


@dataclass(frozen=True)
class Sizes:
    """Elements of a token: its keys (of one kind), queries and slots, what a chunk writes, and its window.

    written  share of the tokens that are written to slots and read them
    slots    of these, per token
    writes   what is left of the token, and of the chunk, in each slot; keys and values
    pieces   that the reader takes tokens in
    states   [M, 2 K H] before each piece
    near     queries, keys, values and result of attention over the window, a coordinate wider, and rows' sums
    """

    keys: int
    queries: int
    chunk: int
    written: float
    slots: float
    writes: float
    pieces: float
    states: float
    near: float


def sizes(config: ModelConfig, store: StoreSpec, how: Execution) -> Sizes:
    assert isinstance(store, BoundedSpec)
    length, heads, keys = config.size.seq_len, config.size.num_heads, store.slot.kv_heads * store.slot.k_dim
    written = length if how.documents else store.num_written(length)
    chunk = min(CHUNK, written)
    chunks = -(-written // chunk)
    pieces = max(1, chunks * heads * chunk * store.num_slots / SCORES)
    near = 0.0
    if store.window is not None:
        wide, first = -(-(store.slot.k_dim + 1) // 8) * 8, min(store.window, length)
        block = min(-(-store.window // WINDOW_BLOCKS), max(1, length - first))
        copies = (first + (length - first) * (1 + store.window / block)) / length
        near = heads * (2 * wide + 1) + 2 * store.slot.kv_heads * wide * copies
    share = written / length
    writes = share * ((3 + 1 / chunk) * store.num_slots + 2 * keys)
    states = 2 * keys * store.num_slots * pieces / length
    queries, slots = heads * head_dim(config.size), share * store.num_slots
    return Sizes(keys, queries, chunk, share, slots, writes, pieces, states, near)


def owner_bytes(config: ModelConfig, store: StoreSpec, how: Execution) -> float:
    """Bytes per token that the writer saves, besides the input of its projections.

    uncompiled  all in fp32: of the router the address, normalised too, and two or three products over the slots; the
                strengths, what they leave, its logarithm's input, and what is left of a share; what chunks write
    compiled    the address, as projected and in fp32, and keys that have left a window; seven products over the slots
    """
    assert isinstance(store, BoundedSpec)
    s = sizes(config, store, how)
    address = s.written * store.address_dim
    if how.compiled:
        left = 0 if store.window is None else s.keys * (1 + store.window / config.size.seq_len)
        wide = address + 3 * s.written + (7 + 1 / s.chunk) * s.slots + 2 * s.keys * s.written
        return FP32 * wide + how.itemsize * (address + left)
    router = 2 * address + 2 * s.written + (3 if store.rule == "ring_router" else 2) * s.slots
    return FP32 * (router + 4 * s.slots + s.writes)


def reader_bytes(config: ModelConfig, store: StoreSpec, how: Execution) -> float:
    """Bytes per token that the reader saves, besides the input of its projections.

    uncompiled  all in fp32: queries, and the states before each piece; the slots' result, the logarithm of their sum
                and shares where a window is merged with it
    compiled    scores, weights, and these as faded (N M each); products within chunks (N C) twice; all states
    not dense   FlexAttention reads the window: its queries and result in the type computed in, and sums of rows
    """
    s, heads = sizes(config, store, how), config.size.num_heads
    merged = 0.0
    if store.window is not None:
        near = s.near + (2 if how.compiled else 4) * heads
        merged = s.queries + (near if how.dense else 2 * s.queries * how.itemsize / FP32 + 3 * heads)
    read = s.states
    if how.compiled:
        states = 2 * s.keys * (s.slots / s.chunk + store.num_slots / config.size.seq_len)
        read = 3 * heads * s.slots + 2 * heads * s.chunk * s.written + states
    return FP32 * (s.queries * s.written + read + merged)


def gradient_bytes(config: ModelConfig, store: StoreSpec, how: Execution) -> float:
    """Bytes alive at a time in the reader's backward pass: of a piece the states, scores, weights and their
    gradients, one more where documents hide some slots; the gradients of queries and writes. What was kept of a
    window is gone by then."""
    s, heads = sizes(config, store, how), config.size.num_heads
    piece = 2 * s.keys * s.slots / s.chunk + 5 * heads * s.slots + heads * s.chunk * s.written
    total = piece / s.pieces + s.queries * s.written + 2 * s.slots
    if store.window is not None:
        gone = s.near + s.queries + heads if how.dense else 0.0
        total += how.documents * heads * s.slots / s.pieces + 2 * s.queries - gone
    return FP32 * total
