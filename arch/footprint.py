"""The costs of a model: parameters, training FLOPs, and bytes of KV cache stored, read and allocated.

Pure functions of the configuration and its plan: a sum over the plan's stacks, the output, and the parts of a Block
Transformer between its stacks. Bytes of cache are three figures, never one: `stored` has a slope per token and a
constant part, `read` is what decoding one token fetches (sharing does not reduce it), and allocation is `stored` at the
full capacity for every sequence of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .block_plan import Plan, embed_dim, has_encoder, num_context_vectors, num_embedded_vectors, stack_configs
from .config import BlockConfig, ModelConfig, SizeConfig, style_of
from .plan import KVPlan, StackPlan, StackRun


@dataclass(frozen=True)
class KVBytes:
    """KV cache of one sequence, in bytes.

    per_token  added by each further token, once all windows are full; in a Block Transformer, on average
    constant   windowed stores when full, and bounded ones; a Block Transformer's token decoder
    stored     the whole cache after `context` tokens
    read       fetched to decode the token at `context` (that token included), over all layers; in a Block Transformer,
               on average over the tokens of the next block
    """

    per_token: int | float
    constant: int
    stored: int
    read: int | float


def kv_bytes(plan: Plan, context: int, itemsize: int = 2) -> KVBytes:
    """Cache bytes of one sequence of `context` tokens with elements of `itemsize` bytes.

    The block decoder of a Block Transformer (paper, 2.3, 2.4, E.2) runs once per block; for the first token of a block
    the token decoder reads only the context's positions. An incomplete block counts in the constant part. Layers with
    cross-attention each cache the keys and values of a block's context, all of which every token reads.
    """
    per_token, constant, stored, read = Fraction(0), 0, 0, Fraction(0)
    for stack in plan.stacks:
        stores, positions, across = stack.plan.stores, stack.num_positions(context), cross_bytes(stack, itemsize)
        held = across + sum(store.nbytes(positions, itemsize) for store in stores)
        stored += held
        if stack.fixed_positions is None:
            per_token += sum(store.slope(itemsize) for store in stores) / Fraction(stack.tokens_per_position)
            constant += across + sum(store.constant(itemsize) for store in stores)
            read += across + Fraction(read_bytes(stack.plan, positions, itemsize), stack.tokens_per_position)
        else:
            steps = range(positions - plan.block_length + 1, positions + 1)
            constant += held
            read += across + Fraction(sum(read_bytes(stack.plan, seen, itemsize) for seen in steps), len(steps))
    return KVBytes(as_int_if_whole(per_token), constant, stored, as_int_if_whole(read))


def read_bytes(plan: KVPlan, positions: int, itemsize: int) -> int:
    """Bytes that the layers of `plan` read to decode the last of `positions`."""
    return sum(plan.store(i).read_bytes(positions, itemsize, owner == i) for i, owner in enumerate(plan.owners))


def cross_bytes(stack: StackPlan, itemsize: int = 2) -> int:
    """Bytes of the keys and values of the vectors outside of its sequence that the layers of `stack` attend to."""
    layers = range(stack.plan.num_layers)
    return stack.num_cross_vectors * itemsize * sum(stack.plan.store(layer).slot.elements for layer in layers)


def as_int_if_whole(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def allocated_bytes(plan: Plan, batch: int, capacity: int, itemsize: int = 2) -> int:
    """Bytes of the tensors that `allocate` makes for `batch` sequences of up to `capacity` tokens."""
    return batch * kv_bytes(plan, capacity, itemsize).stored


def num_params(config: ModelConfig, plan: Plan) -> int:
    """Parameters of the model, embeddings included; tied embeddings count once."""
    configs = stack_configs(config)
    stacks = sum(stack_params(part, stack) for part, stack in zip(configs, plan.stacks, strict=True))
    size = configs[-1].size
    return between_params(config) + stacks + size.vocab_size * size.d_model * (1 if size.tie_embeddings else 2)


def between_params(config: ModelConfig) -> int:
    """Parameters of a Block Transformer outside of its decoders: embedder, start context, and the map between
    decoders."""
    block = config.arch.block
    if block is None:
        return 0
    vectors, width = num_context_vectors(block), config.size.d_model
    biases = vectors * context_width(config, block) + (0 if block.embedder == "lookup" else width)
    tokens = config.size.vocab_size * embed_dim(config) + (encoder_params(block) if has_encoder(block) else 0)
    return tokens + between_matrices(config) + biases + (width if block.start else 0)


def between_matrices(config: ModelConfig) -> int:
    """Elements of the matrices that a Block Transformer has outside of its stacks, the tables of tokens aside."""
    return projection_elements(config) + expansion_elements(config)


def projection_elements(config: ModelConfig) -> int:
    """Elements of the matrix from a block's embedded vectors to the block decoder; 0 if there is none."""
    block = config.arch.block
    if block is None or block.embedder == "lookup":
        return 0
    return num_embedded_vectors(block) * embed_dim(config) * config.size.d_model


def expansion_elements(config: ModelConfig) -> int:
    """Elements of the matrix from a context to the token decoder; 0 if there is none."""
    block = config.arch.block
    if block is None:
        return 0
    return config.size.d_model * num_context_vectors(block) * context_width(config, block)


def context_width(config: ModelConfig, block: BlockConfig) -> int:
    """Width of the vectors that a context is expanded to, that of the token decoder."""
    return block.token.d_model or config.size.d_model


def encoder_positions(block: BlockConfig) -> int:
    """Tokens of one sequence of the encoder in the embedder: a block's, and CLS tokens."""
    return block.length + (block.encoder.cls_tokens if block.embedder == "cls" else 0)


def encoder_params(block: BlockConfig) -> int:
    """Parameters of the encoder in the embedder, without the token embeddings: positions, the first norm, layers."""
    width, d_ff = block.encoder.d_model, block.encoder.d_ff
    layer = 4 * (width + 1) * width + (width + 1) * d_ff + (d_ff + 1) * width + 2 * 2 * width
    return encoder_positions(block) * width + 2 * width + block.encoder.layers * layer


def cross_matrices(config: ModelConfig, plan: KVPlan, layer: int) -> tuple[int, int]:
    """Elements of the matrices of one layer's cross-attention: of queries and output; of keys and values."""
    size, slot = config.size, plan.store(layer).slot
    return size.d_model * size.num_heads * (slot.k_dim + slot.v_dim), size.d_model * slot.elements


def cross_params(config: ModelConfig, plan: KVPlan, layer: int) -> int:
    """Parameters of one layer's cross-attention, with its norm."""
    size, slot = config.size, plan.store(layer).slot
    biases = size.num_heads * slot.k_dim + slot.elements + size.d_model
    return sum(cross_matrices(config, plan, layer)) + style_of(size).bias * biases + norm_params(size)


def stack_params(config: ModelConfig, stack: StackPlan) -> int:
    """Parameters of the layers and the norm after them."""
    return sum(params for params, _ in stack_layer_params(config, stack)) + norm_params(config.size)


def stack_layer_params(config: ModelConfig, stack: StackPlan) -> list[tuple[int, int]]:
    """`layer_params` of each layer, with those of cross-attention."""
    result = []
    for layer in range(stack.plan.num_layers):
        params, matrices = layer_params(config, stack.plan, layer)
        if stack.num_cross_vectors:
            params += cross_params(config, stack.plan, layer)
            matrices += sum(cross_matrices(config, stack.plan, layer))
        result.append((params, matrices))
    return result


def num_norms(size: SizeConfig) -> int:
    """Norms of the attention and the MLP of a layer."""
    return 4 if style_of(size).norm_placement == "both" else 2


def norm_params(size: SizeConfig) -> int:
    return size.d_model * (2 if style_of(size).norm == "layernorm" else 1)


def layer_params(config: ModelConfig, plan: KVPlan, layer: int) -> tuple[int, int]:
    """(parameters, those that are factors of a matrix product) of one layer, without cross-attention."""
    size, store, style = config.size, plan.store(layer), style_of(config.size)
    hidden = size.d_ff * (1 if style.mlp == "gelu" else 2)
    matrices = size.d_model * (hidden + size.d_ff)
    others = num_norms(size) * norm_params(size) + (hidden + size.d_model if style.bias else 0)
    counts = [store.reader_params(size)]
    if store.owner == layer:
        counts.append(store.writer_params(size))
        others += norm_params(size) if store.kv_norm else 0
    matrices += sum(count.matrices for count in counts)
    return matrices + others + sum(count.others for count in counts), matrices


def forward_flops(config: ModelConfig, plan: Plan, seq_len: int) -> int:
    """FLOPs of the forward pass over one sequence: 2 per multiply-add of a matrix product, visible pairs only.

    Norms, rotary embeddings, softmax and the embedding lookup are not counted; the output projection is. A Block
    Transformer takes whole blocks.
    """
    return _flops(config, plan, plan.forward_runs(seq_len), stack_flops)


def prefill_flops(config: ModelConfig, plan: Plan, context: int) -> int:
    """FLOPs of adding a prompt of `context` tokens to an empty cache, for the logits of the next token alone.

    Like `forward_flops`, but the layers from `KVPlan.tail` on, and the output, run on the last position only. A Block
    Transformer encodes the prompt's whole blocks, and starts the next block with the remaining tokens. Raises
    ValueError where the prompt is shorter than `plan.min_prompt`.
    """
    return _flops(config, plan, plan.prefill_runs(context), stack_prefill_flops)


def _flops(
    config: ModelConfig,
    plan: Plan,
    runs: Sequence[StackRun],
    flops_of: Callable[[ModelConfig, StackPlan, int], int],
) -> int:
    configs, total = stack_configs(config), between_flops(config, runs)
    for part, stack, run in zip(configs, plan.stacks, runs, strict=True):
        total += run.rows * flops_of(part, stack, run.positions) if run.positions else 0
    size = configs[-1].size
    return total + 2 * runs[-1].outputs * size.d_model * size.vocab_size


def between_flops(config: ModelConfig, runs: Sequence[StackRun]) -> int:
    """`forward_flops` of a Block Transformer's embedder and of the map between its decoders."""
    block, (outer, *_) = config.arch.block, runs
    encoder = encoder_flops(block) if block is not None and has_encoder(block) else 0
    embedder = encoder + 2 * projection_elements(config)
    return outer.positions * embedder + 2 * outer.outputs * expansion_elements(config)


def encoder_flops(block: BlockConfig) -> int:
    """`forward_flops` of the encoder in the embedder over one block."""
    width, positions = block.encoder.d_model, encoder_positions(block)
    matrices = 4 * width * width + 2 * width * block.encoder.d_ff
    return block.encoder.layers * (2 * positions * matrices + 4 * positions * positions * width)


def cross_flops(config: ModelConfig, stack: StackPlan, layer: int, positions: int) -> int:
    """`forward_flops` of the cross-attention of one layer at `positions` of a row; 0 if there is none."""
    if not stack.num_cross_vectors:
        return 0
    of_positions, of_context = cross_matrices(config, stack.plan, layer)
    products = 2 * positions * of_positions + 2 * stack.num_cross_vectors * of_context
    return products + stack.plan.store(layer).pair_flops(config.size) * positions * stack.num_cross_vectors


def stack_flops(config: ModelConfig, stack: StackPlan, seq_len: int, num_layers: int | None = None) -> int:
    """`forward_flops` of the first `num_layers` layers alone, over one row; None: of all."""
    plan, total = stack.plan, 0
    for layer in range(plan.num_layers if num_layers is None else num_layers):
        store = plan.store(layer)
        total += 2 * seq_len * layer_params(config, plan, layer)[1]
        total += store.attention_flops(config.size, seq_len, store.owner == layer)
        total += cross_flops(config, stack, layer, seq_len)
    return total


def stack_prefill_flops(config: ModelConfig, stack: StackPlan, context: int) -> int:
    """`prefill_flops` of the layers alone."""
    size, plan = config.size, stack.plan
    total = stack_flops(config, stack, context, plan.tail)
    for layer in range(plan.tail, plan.num_layers):
        store, matrices = plan.store(layer), layer_params(config, plan, layer)[1]
        written = store.writer_params(size).matrices if store.owner == layer else 0
        total += 2 * (context * written + matrices - written)
        total += store.step_flops(size) * store.num_positions(context)
        total += cross_flops(config, stack, layer, 1)
    return total


def train_flops_per_token(config: ModelConfig, plan: Plan, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs per training token (backward = twice forward), without recomputation."""
    seq_len = seq_len or config.size.seq_len
    return 3 * forward_flops(config, plan, seq_len) / seq_len


def max_batch(plan: Plan, context: int, memory: float, weight_bytes: int, itemsize: int = 2) -> int:
    """Sequences of `context` tokens whose cache fits in `memory` bytes beside the weights."""
    return max(0, int((memory - weight_bytes) // kv_bytes(plan, context, itemsize).stored))
