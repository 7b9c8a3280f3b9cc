"""Peak memory of a training step in one process, counted from the layout.

The formulas follow the modules of arch line by line and change with them: `layer_bytes` with arch/decoder.py and
layers.py, `attention_bytes` with attention.py, `cross_bytes` with cross_attention.py, `encoder_bytes` with encoder.py,
the second half of this file with bounded.py, `loss_bytes` with train/loss.py. A test compares them with the storages of
real steps.

Bytes throughout. At its peak a step that accumulates has weights, gradients, optimizer state and activations at once.
Weights, gradients and AdamW's two moments are fp32, 16 bytes per parameter; for bf16, matrices are cast in each forward
pass. Attention is taken to be fused: it saves no scores. Tensors inside kernels, the CUDA context and the allocator's
gaps are not counted. Bytes that are "saved" live from the forward to the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from arch import BlockConfig, KVPlan, ModelConfig, Plan, StoreSpec
from arch.block_plan import embed_dim, has_encoder, num_embedded_vectors, resolve_block, split_config
from arch.bounded_spec import CHUNK, SCORES, WINDOW_BLOCKS, BoundedSpec
from arch.config import SizeConfig, head_dim, style_of
from arch.delta_spec import MatrixSpec, delta_chunk
from arch.footprint import cross_matrices, cross_params, encoder_positions, layer_params, num_norms, num_params
from arch.latent_spec import LatentSpec
from arch.spans import Chunk, Span, query_blocks
from arch.store_spec import gate_width
from arch.strided_spec import StridedSpec
from arch.tied_spec import TiedSpec
from train.schema import loss_rows

FP32 = 4
FLEX_BLOCK = 128  # tokens on a side of a block of FlexAttention: masks.BLOCK, in a module that needs torch


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

    @property
    def shards(self) -> int:
        """Processes that share the weights of one replica; 1 where each has all."""
        return self.world // self.replicas if self.strategy == "fsdp" else 1


@dataclass(frozen=True)
class Memory:
    """Memory of one process at the peak of a step.

    working      weights in the type computed in, and buffers of FSDP or DDP
    activations  from forward to backward
    temporary    the largest of: the loss, one block's backward pass, FSDP's last reduction
    """

    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class StackShape:
    """A stack of layers that a micro-batch goes through, as `rows` sequences of `config.size.seq_len` positions.

    outputs        positions whose last residual stream is normalised and used
    cross_vectors  vectors per row that each layer also attends to
    """

    config: ModelConfig
    plan: KVPlan
    rows: int
    outputs: int
    cross_vectors: int = 0

    @property
    def positions(self) -> int:
        return self.rows * self.config.size.seq_len


def stack_shapes(config: ModelConfig, plan: Plan, micro_batch: int) -> list[StackShape]:
    """The decoders of a model, the one with the loss last; `encoder_bytes` has the encoder of an embedder."""
    seq_len = config.size.seq_len
    stack, *others = plan.stacks
    if not others:
        return [StackShape(config, stack.plan, micro_batch, micro_batch * seq_len)]
    (block_decoder, token_decoder), (token,) = split_config(config), others
    rows = micro_batch * ((seq_len - plan.num_unpredicted) // plan.block_length)
    contexts = with_length(block_decoder, seq_len // plan.block_length - 1)
    positions = with_length(token_decoder, token.num_positions(seq_len))
    return [
        StackShape(contexts, stack.plan, micro_batch, rows),
        StackShape(positions, token.plan, rows, rows * plan.block_length, token.num_cross_vectors),
    ]


def with_length(config: ModelConfig, seq_len: int) -> ModelConfig:
    return replace(config, size=replace(config.size, seq_len=seq_len))


def step_memory(config: ModelConfig, plan: Plan, how: Execution, micro_batch: int) -> Memory:
    """The peak of a step whose micro-batches have `micro_batch` sequences of `size.seq_len` tokens."""
    share = FP32 * -(-num_params(config, plan) // how.shards)
    stacks = stack_shapes(config, plan, micro_batch)
    return Memory(
        weights=share,
        gradients=share,
        optimizer=2 * share,
        working=working_bytes(config, plan, how),
        activations=activation_bytes(config, plan, how, micro_batch),
        temporary=temporary_bytes(config, stacks, how),
    )


def working_bytes(config: ModelConfig, plan: Plan, how: Execution) -> int:
    """Copies of weights, and buffers for communication, that live as long as the activations.

    One device and DDP: the matrices of all blocks, cast (with checkpointing they go before the backward pass, and
    `temporary_bytes` has them), and those between the decoders of a Block Transformer. DDP also copies gradients into
    buckets. FSDP2 gathers the embedding, output and last norm for the whole step, and a block when it runs: its
    weights, those of the next in flight and their flat buffer; its gradients; and, in fp32, what is reduced of it and
    of the one before. Gradients that are accumulated stay whole, in fp32, until the last micro-batch.
    """
    stacks = stack_shapes(config, plan, 1)
    if how.strategy == "fsdp":
        blocks = [params for stack in stacks for params, _ in stack_layer_params(stack)]
        blocks += encoder_layer_params(config)[:1]
        root = num_params(config, plan) - sum(blocks)
        whole = FP32 * num_params(config, plan) if how.accumulate > 1 and how.shards > 1 else 0
        return how.itemsize * root + max(blocks) * (4 * how.itemsize + 2 * FP32) + whole
    casts = 0 if how.checkpointing else all_cast_bytes(config, stacks, how)
    between = how.itemsize * between_params(config) if how.itemsize < FP32 else 0
    return casts + between + (FP32 * num_params(config, plan) if how.strategy == "ddp" else 0)


def between_params(config: ModelConfig) -> int:
    """Elements of the matrices that a Block Transformer has outside of its stacks, the tables of tokens aside."""
    block = config.arch.block
    if block is None:
        return 0
    block_decoder, token_decoder = split_config(config)
    projection = 0 if block.embedder == "lookup" else num_embedded_vectors(block) * embed_dim(config)
    expansion = resolve_block(config).num_context_vectors * token_decoder.size.d_model
    return block_decoder.size.d_model * (projection + expansion)


def cast_bytes(stack: StackShape, how: Execution) -> list[int]:
    """Copies of each layer's matrices in the type computed in; none under FSDP, which gathers them in that type."""
    if how.itemsize == FP32 or how.strategy == "fsdp":
        return [0] * stack.plan.num_layers
    return [how.itemsize * matrices for _, matrices in stack_layer_params(stack)]


def all_cast_bytes(config: ModelConfig, stacks: Sequence[StackShape], how: Execution) -> int:
    """`cast_bytes` of all decoders, and the same of an encoder."""
    encoder = 0 if how.itemsize == FP32 or how.strategy == "fsdp" else sum(encoder_layer_params(config))
    return how.itemsize * encoder + sum(sum(cast_bytes(stack, how)) for stack in stacks)


def stack_layer_params(stack: StackShape) -> list[tuple[int, int]]:
    """Parameters of each layer, and elements of its matrices."""
    result = []
    for layer in range(stack.plan.num_layers):
        params, matrices = layer_params(stack.config, stack.plan, layer)
        if stack.cross_vectors:
            params += cross_params(stack.config, stack.plan, layer)
            matrices += sum(cross_matrices(stack.config, stack.plan, layer))
        result.append((params, matrices))
    return result


def activation_bytes(config: ModelConfig, plan: Plan, how: Execution, micro_batch: int) -> int:
    """Bytes that a micro-batch saves, weights and their copies aside.

    Token numbers (8 bytes each), the gradient of the last residual stream, which the loss has made, and `stack_bytes`
    of each stack. In a Block Transformer also an encoder, the input of the embedder's projection, and the context.
    """
    width, stacks = how.itemsize, stack_shapes(config, plan, micro_batch)
    total = 8 * micro_batch * config.size.seq_len + width * stacks[-1].outputs * stacks[-1].config.size.d_model
    block, outer = config.arch.block, stacks[0]
    if block is not None:
        total += 8 * outer.positions * plan.block_length + width * outer.outputs * outer.config.size.d_model
        if block.embedder != "lookup":  # of an encoder with CLS tokens all outputs, of which they are a view
            vectors = encoder_positions(block) if has_encoder(block) else plan.block_length
            total += width * outer.positions * vectors * embed_dim(config)
        if has_encoder(block):
            total += encoder_bytes(block, outer.positions, how)
        total += width * stacks[-1].rows * stacks[-1].cross_vectors * stacks[-1].config.size.d_model
    total += segment_bytes(stacks[-1], how, micro_batch)
    return total + sum(stack_bytes(stack, how) for stack in stacks)


def segment_bytes(stack: StackShape, how: Execution, micro_batch: int) -> int:
    """Bytes of segments and their masks on CUDA in `stack`, which is the token decoder where documents are padded.

    Documents: the number of each token's (8 bytes) and the first that it sees (8), and for each distinct window the
    bounds as the kernel reads them (4), and FlexAttention's lists of blocks, whole and in part, by query and by slot,
    and what they are sorted by (32 bytes for each pair of blocks). Pads: the numbers, and the mask of all pairs of a
    block, which each layer converts and keeps.
    """
    if how.dense or not (how.documents or how.pads):
        return 0
    length = stack.config.size.seq_len
    if how.pads:
        return stack.rows * (8 * length + length**2 * (1 + how.itemsize * stack.plan.num_layers))
    pairs = (-(-length // FLEX_BLOCK)) ** 2
    windows = {None if mask_elements(length, span) == 0 else span for span in stack.plan.spans}
    return micro_batch * (16 * length + len(windows) * (4 * length + 32 * pairs))


def stack_bytes(stack: StackShape, how: Execution) -> int:
    """Bytes that a stack saves: rotary tables, the last norm, and `layer_bytes`, `cross_bytes` and `mask_bytes` of its
    layers.

    With checkpointing the input of each layer instead, the slots that other layers read, and the boolean masks.
    """
    config, plan, size, width = stack.config, stack.plan, stack.config.size, how.itemsize
    whole = FP32 * size.seq_len * sum(key[0] for key in {store.rope_key for store in plan.stores})
    whole += stack.outputs * last_norm_bytes(size, how)
    if width == FP32 or how.compiled:  # the norm's input is no copy, and a slice of it keeps the whole
        whole += width * size.d_model * max(0, stack.positions - stack.outputs)
    if not how.checkpointing:
        layers = range(plan.num_layers)
        per_token = sum(layer_bytes(config, plan, layer, how) + cross_bytes(stack, layer, how) for layer in layers)
        return (
            whole + round(stack.positions * per_token) + sum(mask_bytes(config, plan, layer, how) for layer in layers)
        )
    shared = sum(
        ACTIVATIONS[store.kind].shared(config, store, how)
        for store in (handed_on(plan, number) for number in range(len(plan.stores)))
        if store is not None
    )
    masks = how.dense * sum(mask_elements(size.seq_len, span) for span in plan.spans)
    strided = {store.positions_key: store for store in plan.stores if isinstance(store, StridedSpec)}
    masks += sum(size.seq_len * (size.seq_len + store.num_entries(size.seq_len)) for store in strided.values())
    return whole + round(stack.positions * (width * plan.num_layers * size.d_model + shared)) + masks


def handed_on(plan: KVPlan, number: int) -> StoreSpec | None:
    """Store `number` with the part of its slot that other layers read; None: no other layer reads it."""
    store = plan.stores[number]
    sources = [plan.sources(layer) for layer in range(plan.num_layers) if layer != store.owner]
    keys, values = (any(number in source[half] for source in sources) for half in (0, 1))
    if keys and values:
        return store
    if not (keys or values):
        return None
    return replace(store, slot=replace(store.slot, **{"v_dim" if keys else "k_dim": 0}))


def mask_elements(seq_len: int, window: Span) -> int:
    """Elements of the mask of a window: of a block of queries, or dense; none where it restricts nothing."""
    blocks = query_blocks(seq_len, window)
    if blocks is not None:
        return blocks.size * blocks.looked
    size = window.size if isinstance(window, Chunk) else window
    return 0 if size is None or size >= seq_len else seq_len**2


def norm_bytes(size: SizeConfig) -> int:
    """A norm of the residual stream, uncompiled, per token. LayerNorm: its input in fp32, the mean and 1 / standard
    deviation; RMSNorm: `rms_norm_bytes`."""
    return FP32 * size.d_model + 2 * FP32 if style_of(size).norm == "layernorm" else rms_norm_bytes(size.d_model)


def last_norm_bytes(size: SizeConfig, how: Execution) -> int:
    """The norm after a stack, per token. Compiled: its input as it is, and 1 / rms, or the mean too."""
    if not how.compiled:
        return norm_bytes(size)
    return how.itemsize * size.d_model + (2 if style_of(size).norm == "layernorm" else 1) * FP32


def rms_norm_bytes(dim: int) -> int:
    """RMSNorm over `dim`, uncompiled, per token: its input in fp32, that divided by the rms, and 1 / rms."""
    return 2 * FP32 * dim + FP32


def layer_bytes(config: ModelConfig, plan: KVPlan, layer: int, how: Execution) -> float:
    """Bytes per token that one layer saves.

    Every projection saves its input: the norms' outputs (D, a `kv_norm`'s and a latent's too), attention's output, and
    the product in the feed-forward layer (F). Further,

    uncompiled  two fp32 copies in each norm (`norm_bytes`); gate, silu(gate) and up (F each)
    compiled    the residual stream before and the output of attention (D each), from which the norms are made again
                with 1 / rms; the latent and rotary key as projected; gate and up (F each)

    A GELU MLP has but one projection before its product (up). With parallel residuals both norms have one input.
    Where outputs are normed, not inputs, the residual stream is in the place of the norms' outputs, and parallel
    projections have one input; with both, the norms of outputs come on top.
    Norms of queries and keys, and gates: `head_bytes`.
    Compiled, this is measured to 3 % for the preset styles, and to 12 % where their properties are mixed.
    """
    size, store, width = config.size, plan.store(layer), how.itemsize
    dim = size.d_model
    owner, style, norms = store.owner == layer, style_of(size), num_norms(size)
    total = ACTIVATIONS[store.kind].attention(config, store, owner, how) + head_bytes(size, store, owner, how)
    if how.compiled:
        total += width * ((2 + norms) * dim + (2 if style.mlp == "gelu" else 3) * size.d_ff)
        total += norms * (2 if style.norm == "layernorm" else 1) * FP32
        kv_norm = 0
    else:
        shared_input = FP32 * dim if width == FP32 else 0  # not cast: norms of one input keep it once
        total += width * (2 * dim + (2 if style.mlp == "gelu" else 4) * size.d_ff)
        total += norms * norm_bytes(size)
        total -= style.parallel_residual * (width * dim if style.norm_placement == "after" else shared_input)
        kv_norm = norm_bytes(size) - shared_input
    if owner and store.kv_norm:
        total += width * dim + kv_norm
    return total


def head_bytes(size: SizeConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
    """Bytes per token that norms of queries and keys save, the gates of outputs, and slopes of queries.

    Norms save what RMSNorm does; compiled, queries and keys as projected, and 1 / rms. Slopes save queries and
    factors.
    """
    _, k_dim, v_dim = store.kernel_heads(size)
    total, style = how.itemsize * gate_width(size, v_dim), style_of(size)
    if style.qk_norm != "none":
        heads = size.num_heads + owner * store.slot.kv_heads
        per_element, norms = how.itemsize if how.compiled else 2 * FP32, heads if style.qk_norm == "head" else 1 + owner
        total += per_element * heads * k_dim + FP32 * norms
    if store.query_scale is not None and store.query_scale.slope is None:
        total += size.num_heads * (how.itemsize * k_dim + FP32)
    return total


def cross_bytes(stack: StackShape, layer: int, how: Execution) -> float:
    """Bytes per token that the cross-attention of a layer saves.

    The norm and its output (D), queries and output (N H each), log-sum-exp in fp32, and the share of the token in the
    keys and values of the context.
    """
    if not stack.cross_vectors:
        return 0
    size = stack.config.size
    kv_heads, k_dim, head = stack.plan.store(layer).kernel_heads(size)
    wide = -(-max(k_dim, head) // 8) * 8 if how.dense else max(k_dim, head)
    elements: float = size.d_model + size.num_heads * (2 * wide + (head if wide > head else 0))
    elements += 2 * kv_heads * wide * stack.cross_vectors / size.seq_len
    norm: float = norm_bytes(size)
    if how.compiled:  # made again from the residual stream
        norm = how.itemsize * size.d_model + (2 if style_of(size).norm == "layernorm" else 1) * FP32
    return how.itemsize * elements + FP32 * size.num_heads + norm


def encoder_bytes(block: BlockConfig, sequences: int, how: Execution) -> int:
    """Bytes that the encoder of an embedder saves for `sequences` blocks.

    The first norm, and for each layer its input (E), queries, keys, values and output (E each), log-sum-exp in fp32,
    the input of the MLP (E), its product before and after the GELU (F each), and two LayerNorms.
    """
    encoder, width = block.encoder, how.itemsize
    dim, heads = encoder.d_model, encoder.num_heads
    norm = FP32 * dim + 2 * FP32
    layer = width * dim
    if not how.checkpointing:
        head = dim // heads
        wide = -(-head // 8) * 8 if how.dense else head
        layer += width * (heads * (4 * wide + (head if wide > head else 0)) + dim + 2 * encoder.d_ff)
        layer += FP32 * heads + 2 * norm
    return sequences * encoder_positions(block) * (norm + encoder.layers * layer)


def encoder_layer_params(config: ModelConfig) -> list[int]:
    """Elements of the matrices of each layer of the embedder's encoder; no layer where there is none."""
    block = config.arch.block
    if block is None or not has_encoder(block):
        return []
    encoder = block.encoder
    return [4 * encoder.d_model**2 + 2 * encoder.d_model * encoder.d_ff] * encoder.layers


def mask_bytes(config: ModelConfig, plan: KVPlan, layer: int, how: Execution) -> int:
    """Bytes of the masks that a layer saves, the same for any number of sequences."""
    store = plan.store(layer)
    return ACTIVATIONS[store.kind].masks(config, store, store.owner == layer, how)


def temporary_bytes(model: ModelConfig, stacks: Sequence[StackShape], how: Execution) -> int:
    """The largest of three temporary peaks: in the loss, in a layer's backward pass, at FSDP's last reduction.

    Layer: gradients of gate and up, of the residual stream and a norm's output, of one matrix, as computed and in fp32,
    and of the output matrix where it waits for the embedding's; the last norm is done by then. Where the last layer
    reads a bounded store, that may need more. With checkpointing, also all that the block keeps. FSDP's end: gradients
    of embedding and output, whole, and in fp32 for their reduction.
    """
    stack, width = stacks[-1], how.itemsize  # that with the loss; what comes before it needs less, and later
    config, plan, size = stack.config, stack.plan, stack.config.size
    tokens, casts = stack.positions, cast_bytes(stack, how)
    loss, matrix = loss_bytes(config, how, stack.outputs), size.vocab_size * size.d_model
    mlp = tokens * (width * 2 * (size.d_ff + size.d_model) - last_norm_bytes(size, how))
    # What the feed-forward layer kept is gone when attention's turn comes.
    freed = width * (size.d_model + 3 * size.d_ff)
    last = plan.store(plan.num_layers - 1)

    def layer_peak(layer: int) -> int:
        store = plan.store(layer)
        return max(mlp, round(tokens * (ACTIVATIONS[store.kind].gradients(config, store, how) - freed)))

    def above(layer: int) -> int:
        """Bytes that the layers above kept, which are gone when the turn of `layer` comes."""
        later = range(layer + 1, plan.num_layers)
        per_token = sum(layer_bytes(config, plan, one, how) + cross_bytes(stack, one, how) for one in later)
        return round(tokens * per_token) + sum(mask_bytes(config, plan, one, how) for one in later)

    block = last_peak = layer_peak(plan.num_layers - 1)
    if not how.checkpointing:
        matrices = [layer for layer in range(plan.num_layers) if plan.store(layer).kind == "matrix"]
        block = max([block, *(layer_peak(layer) - above(layer) for layer in matrices)])
    block += size.d_ff * size.d_model * (width + FP32)
    block += matrix * (width if how.strategy == "fsdp" else FP32) if size.tie_embeddings else 0
    if how.checkpointing:
        loss += round(tokens * ACTIVATIONS[last.kind].shared(config, last, how))  # what the last layer read
        loss += (
            0 if how.compiled else all_cast_bytes(model, stacks, how)
        )  # autocast's cache lives to the end of the forward pass
        block += max(
            layer_peak(layer)
            - last_peak
            + round((layer_bytes(config, plan, layer, how) + cross_bytes(stack, layer, how)) * tokens)
            + mask_bytes(config, plan, layer, how)
            + casts[layer]
            for layer in range(plan.num_layers)
        )
    end = (1 if size.tie_embeddings else 2) * matrix * (width + FP32) if how.strategy == "fsdp" else 0
    return max(loss, block, end)


def loss_bytes(config: ModelConfig, how: Execution, tokens: int) -> int:
    """Bytes that train/loss.py needs while it makes the gradients, its inputs included.

    The residual stream and its norm [B T, D]; the gradient of the output matrix [V, D] in fp32, a chunk's share of it,
    where the CPU computes in bf16, and the matrix cast; for a chunk the logits, and their gradient, which uncompiled
    is made of two fp32 copies.
    """
    width, vocab = how.itemsize, config.size.vocab_size
    matrix, rows = vocab * config.size.d_model, loss_rows(tokens, vocab, width, on_cuda=not how.dense)
    cast = width * matrix if width < FP32 and how.strategy != "fsdp" else 0
    logits = rows * vocab
    copies = width if how.compiled else FP32 * (2 if width < FP32 else 1)
    softmax = logits * (width + copies)
    product = logits * width + (matrix * width if how.dense and width < FP32 else 0)
    return 2 * tokens * width * config.size.d_model + FP32 * matrix + cast + max(softmax, product)


# --- what the layers of each kind of store keep; elements and bytes are per token


class MaskedActivations:
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
            queries, slots = window + blocks.queries, blocks.slots
            kept = queries if appended or wide > k_dim else length + blocks.queries * (queries > length)
            if appended:
                slots += slots // blocks.size + 1
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
        sinks = store.sinks * (blocks.looked + store.window * (store.window + 1))
        return how.itemsize * (blocks.size * blocks.looked + sinks)

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
        assert isinstance(store, StridedSpec)
        length = config.size.seq_len
        return how.itemsize * length * (length + store.num_entries(length) + store.sinks)


class BoundedActivations:
    """Activations saved by arch/bounded.py in the chunk form."""

    def shared(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        """Keys and values, of what has left a window with those before it; strengths, what chunks write and the state
        before them; and the window's keys and values."""
        s, length = sizes(config, store), config.size.seq_len
        positions = 1 if store.window is None else 2 + store.window / length
        start = 2 * s.keys * s.slots / length
        return how.itemsize * 2 * s.keys * positions + FP32 * (s.slots + s.writes + start)

    def attention(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> float:
        """Tensors that reader and writer save, and the output."""
        total = reader_bytes(config, store, how)
        total += owner_bytes(config, store, how.compiled, how.itemsize) if owner else 0
        outputs = 2 if gate_width(config.size, 1) else 1
        return total + outputs * how.itemsize * config.size.num_heads * head_dim(config.size)

    def masks(self, config: ModelConfig, store: StoreSpec, owner: bool, how: Execution) -> int:
        """The pattern of a ring and the slots that it has not reached, the same for each sequence."""
        ring = store.rule == "ring_router" and not how.compiled
        return config.size.seq_len * store.num_slots * ((FP32 + 1) * owner + FP32) if ring else 0

    def gradients(self, config: ModelConfig, store: StoreSpec, how: Execution) -> float:
        return gradient_bytes(config, store, how)


class MatrixActivations:
    """Activations saved by arch/delta.py, which recomputes the rule, and the gated norm, in the backward pass."""

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
    "matrix": MatrixActivations(),
}


# --- bounded stores, in the chunk form of arch/bounded.py
#
# Elements and bytes are per token: A address, C tokens of a chunk, N query heads, K key/value heads, H head, M slots,
# W window.


@dataclass(frozen=True)
class Sizes:
    """Elements of a token: its keys (of one kind), queries and slots, what a chunk writes, and its window.

    writes   what is left of the token, and of the chunk, in each slot; keys and values
    pieces   that the reader takes tokens in
    states   [M, 2 K H] before each piece
    near     queries, keys, values and result of attention over the window, a coordinate wider, and rows' sums
    """

    keys: int
    queries: int
    chunk: int
    slots: int
    writes: float
    pieces: float
    states: float
    near: float


def sizes(config: ModelConfig, store: StoreSpec) -> Sizes:
    length, heads, keys = config.size.seq_len, config.size.num_heads, store.slot.kv_heads * store.slot.k_dim
    chunk = min(CHUNK, length)
    chunks = -(-length // chunk)
    pieces = max(1, chunks * heads * chunk * store.num_slots / SCORES)
    near = 0.0
    if store.window is not None:
        wide, first = -(-(store.slot.k_dim + 1) // 8) * 8, min(store.window, length)
        block = min(-(-store.window // WINDOW_BLOCKS), max(1, length - first))
        copies = (first + (length - first) * (1 + store.window / block)) / length
        near = heads * (2 * wide + 1) + 2 * store.slot.kv_heads * wide * copies
    writes = (3 + 1 / chunk) * store.num_slots + 2 * keys
    states = 2 * keys * store.num_slots * pieces / length
    return Sizes(keys, heads * head_dim(config.size), chunk, store.num_slots, writes, pieces, states, near)


def owner_bytes(config: ModelConfig, store: StoreSpec, compiled: bool, itemsize: int) -> float:
    """Bytes per token that the writer saves, besides the input of its projections.

    uncompiled  all in fp32: of the router the address, normalised too, and two or three products over the slots; the
                strengths, what they leave, its logarithm's input, and what is left of a share; what chunks write
    compiled    the address, as projected and in fp32, and keys that have left a window; seven products over the slots
    """
    assert isinstance(store, BoundedSpec)
    s, address = sizes(config, store), store.address_dim
    if compiled:
        left = 0 if store.window is None else s.keys * (1 + store.window / config.size.seq_len)
        return FP32 * (address + 3 + (7 + 1 / s.chunk) * s.slots + 2 * s.keys) + itemsize * (address + left)
    router = 2 * address + 2 + (3 if store.rule == "ring_router" else 2) * s.slots
    return FP32 * (router + 4 * s.slots + s.writes)


def reader_bytes(config: ModelConfig, store: StoreSpec, how: Execution) -> float:
    """Bytes per token that the reader saves, besides the input of its projections.

    uncompiled  all in fp32: queries, and the states before each piece; the slots' result and share where a window is
                merged with it
    compiled    scores, weights, and these as faded (N M each); products within chunks (N C) twice; all states
    not dense   FlexAttention reads the window: its queries and result in the type computed in, and sums of rows
    """
    s, heads = sizes(config, store), config.size.num_heads
    merged = 0.0
    if store.window is not None:
        near = s.near + (2 if how.compiled else 1) * heads
        merged = s.queries + (near if how.dense else 2 * s.queries * how.itemsize / FP32 + 3 * heads)
    read = s.states
    if how.compiled:
        states = 2 * s.keys * s.slots * (1 / s.chunk + 1 / config.size.seq_len)
        read = 3 * heads * s.slots + 2 * heads * s.chunk + states
    return FP32 * (s.queries + read + merged)


def gradient_bytes(config: ModelConfig, store: StoreSpec, how: Execution) -> float:
    """Bytes alive at a time in the reader's backward pass: of a piece the states, scores, weights and their
    gradients, one more where some slots are hidden; the gradients of queries and writes. What was kept of a window is
    gone by then."""
    s, heads = sizes(config, store), config.size.num_heads
    piece = 2 * s.keys * s.slots / s.chunk + 5 * heads * s.slots + heads * s.chunk
    total = piece / s.pieces + s.queries + 2 * s.slots
    if store.window is not None:
        gone = s.near + s.queries + heads if how.dense else 0.0
        total += heads * s.slots / s.pieces + 2 * s.queries - gone
    return FP32 * total
