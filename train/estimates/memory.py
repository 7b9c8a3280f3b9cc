"""Peak memory of a training step in one process, counted from the layout.

The formulas follow the modules of arch line by line and change with them: `layer_bytes` with arch/decoder.py and
layers.py, `attention_bytes` with attention.py, `cross_bytes` with cross_attention.py, `encoder_bytes` with encoder.py,
`loss_bytes` with train/loss.py, and what each kind of store keeps, in activations.py. A test compares them with the
storages of real steps.

Bytes throughout. At its peak a step that accumulates has weights, gradients, optimizer state and activations at once.
Weights, gradients and AdamW's two moments are fp32, 16 bytes per parameter; for bf16, matrices are cast in each forward
pass. Attention is taken to be fused: it saves no scores. Tensors inside kernels, the CUDA context and the allocator's
gaps are not counted. Bytes that are "saved" live from the forward to the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from arch import BlockConfig, KVPlan, ModelConfig, Plan, StackPlan, StoreSpec
from arch.block_plan import embed_dim, has_encoder, stack_configs
from arch.config import SizeConfig, style_of
from arch.footprint import between_matrices, encoder_positions, num_norms, num_params, stack_layer_params
from arch.spans import Chunk, Span, query_blocks
from arch.store_spec import gate_width
from train.estimates.activations import ACTIVATIONS, FP32, Execution, norm_bytes
from train.schema import loss_rows

FLEX_BLOCK = 128  # tokens on a side of a block of FlexAttention: masks.BLOCK, in a module that needs torch


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

    outputs  positions whose last residual stream is normalised and used
    """

    config: ModelConfig
    stack: StackPlan
    rows: int
    outputs: int

    @property
    def plan(self) -> KVPlan:
        return self.stack.plan

    @property
    def cross_vectors(self) -> int:
        """Vectors per row that each layer also attends to."""
        return self.stack.num_cross_vectors

    @property
    def within_blocks(self) -> bool:
        """True if a row is a single block."""
        return self.stack.fixed_positions is not None

    @property
    def positions(self) -> int:
        return self.rows * self.config.size.seq_len

    @property
    def layer_params(self) -> list[tuple[int, int]]:
        """Parameters of each layer, and elements of its matrices."""
        return stack_layer_params(self.config, self.stack)


def stack_shapes(config: ModelConfig, plan: Plan, micro_batch: int) -> list[StackShape]:
    """The decoders of a model, the one with the loss last; `encoder_bytes` has the encoder of an embedder."""
    runs = plan.forward_runs(config.size.seq_len)
    return [
        StackShape(with_length(part, run.positions), stack, micro_batch * run.rows, micro_batch * run.outputs)
        for part, stack, run in zip(stack_configs(config), plan.stacks, runs, strict=True)
    ]


def with_length(config: ModelConfig, seq_len: int) -> ModelConfig:
    return replace(config, size=replace(config.size, seq_len=seq_len))


def step_memory(config: ModelConfig, plan: Plan, how: Execution, micro_batch: int) -> Memory:
    """The peak of a step whose micro-batches have `micro_batch` sequences of `size.seq_len` tokens."""
    share = FP32 * -(-num_params(config, plan) // how.shards)
    stacks = stack_shapes(config, plan, micro_batch)
    return Memory(
        weights=share,
        gradients=round(how.trained * share),
        optimizer=2 * round(how.trained * share),
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
        blocks = [params for stack in stacks for params, _ in stack.layer_params]
        blocks += encoder_layer_params(config)[:1]
        root = num_params(config, plan) - sum(blocks)
        whole = FP32 * num_params(config, plan) if how.accumulate > 1 and how.shards > 1 else 0
        return how.itemsize * root + max(blocks) * (4 * how.itemsize + 2 * FP32) + whole
    casts = 0 if how.checkpointing else all_cast_bytes(config, stacks, how)
    between = how.itemsize * between_matrices(config) if how.itemsize < FP32 else 0
    return casts + between + (FP32 * num_params(config, plan) if how.strategy == "ddp" else 0)


def cast_bytes(stack: StackShape, how: Execution) -> list[int]:
    """Copies of each layer's matrices in the type computed in; none under FSDP, which gathers them in that type."""
    if how.itemsize == FP32 or how.strategy == "fsdp":
        return [0] * stack.plan.num_layers
    return [how.itemsize * matrices for _, matrices in stack.layer_params]


def all_cast_bytes(config: ModelConfig, stacks: Sequence[StackShape], how: Execution) -> int:
    """`cast_bytes` of all decoders, and the same of an encoder."""
    encoder = 0 if how.itemsize == FP32 or how.strategy == "fsdp" else sum(encoder_layer_params(config))
    return how.itemsize * encoder + sum(sum(cast_bytes(stack, how)) for stack in stacks)


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
    """Bytes that a stack saves: rotary tables, codes of chunks and places in them, the last norm, and `layer_bytes`,
    `cross_bytes` and `mask_bytes` of its layers.

    With checkpointing the input of each layer instead, the slots that other layers read, and the boolean masks.
    """
    config, plan, size, width = stack.config, stack.plan, stack.config.size, how.itemsize
    whole = FP32 * size.seq_len * sum(key[0] for key in {store.rope_key for store in plan.stores})
    positions = {store.positions_key: ACTIVATIONS[store.kind].positions(store, how) for store in plan.stores}
    whole += (stack.positions if how.documents else size.seq_len) * sum(positions.values())
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
    slots = {store.positions_key: store.dense_slots(size.seq_len) for store in plan.stores if not store.masked}
    masks += size.seq_len * sum(slots.values())
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
        return blocks.queries_per_block * blocks.slots_per_block
    size = window.size if isinstance(window, Chunk) else window
    return 0 if size is None or size >= seq_len else seq_len**2


def last_norm_bytes(size: SizeConfig, how: Execution) -> int:
    """The norm after a stack, per token. Compiled: its input as it is, and 1 / rms, or the mean too."""
    if not how.compiled:
        return norm_bytes(size)
    return how.itemsize * size.d_model + (2 if style_of(size).norm == "layernorm" else 1) * FP32


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
        peaks = [layer for layer in range(plan.num_layers) if ACTIVATIONS[plan.store(layer).kind].peaks]
        block = max([block, *(layer_peak(layer) - above(layer) for layer in peaks)])
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
