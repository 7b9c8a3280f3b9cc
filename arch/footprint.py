"""The costs of a model: parameters, training FLOPs, and bytes of KV cache stored, read and allocated.

Pure functions of the configuration and its plan. Bytes of cache are three figures, never one: `stored` grows by a slope
per token up to a constant share, `read` is what decoding one token fetches (sharing does not reduce it), and allocation
is `stored` at the full capacity for every sequence of the batch.
"""

from dataclasses import dataclass
from fractions import Fraction

from .block_plan import BlockPlan, Plan, block_config, embed_dim, has_encoder, num_embedded_vectors, split_config
from .config import BlockConfig, ModelConfig, SizeConfig, style_of
from .plan import KVPlan, StackPlan


@dataclass(frozen=True)
class KVBytes:
    """KV cache of one sequence, in bytes.

    per_token  added by each further token, once all windows are full; of a Block Transformer on average
    constant   windowed stores when full, and bounded ones; a Block Transformer's token decoder
    stored     the whole cache after `context` tokens
    read       fetched from it to decode the token at `context` (that token included), over all layers; of a Block
               Transformer on average over the tokens of the block that comes then
    """

    per_token: int | float
    constant: int
    stored: int
    read: int | float


def kv_bytes(plan: Plan, context: int, itemsize: int = 2) -> KVBytes:
    """Cache bytes of one sequence of `context` tokens with elements of `itemsize` bytes."""
    if isinstance(plan, BlockPlan):
        return block_kv_bytes(plan, context, itemsize)
    return KVBytes(
        per_token=as_int_if_whole(sum((s.slope(itemsize) for s in plan.stores), Fraction(0))),
        constant=sum(s.constant(itemsize) for s in plan.stores),
        stored=sum(s.nbytes(context, itemsize) for s in plan.stores),
        read=sum(plan.store(i).read_bytes(context, itemsize, owner == i) for i, owner in enumerate(plan.owners)),
    )


def block_kv_bytes(plan: BlockPlan, context: int, itemsize: int) -> KVBytes:
    """The two plans of a Block Transformer together (paper, 2.3, 2.4, E.2).

    The block decoder runs once per block; the token decoder reads, for the first token, the context's positions alone.
    What is not yet a complete block is in the constant part. Where layers attend across, each has the keys and values
    of a block's context, all of which every token reads.
    """
    block = kv_bytes(plan.block, context // plan.block_length, itemsize)
    token = kv_bytes(plan.token, plan.num_positions, itemsize)
    first = plan.num_positions - plan.block_length + 1
    steps = sum(kv_bytes(plan.token, seen, itemsize).read for seen in range(first, plan.num_positions + 1))
    across = cross_bytes(plan.stacks[1], itemsize)
    return KVBytes(
        per_token=as_int_if_whole(Fraction(block.per_token) / plan.block_length),
        constant=block.constant + token.stored + across,
        stored=block.stored + token.stored + across,
        read=as_int_if_whole(Fraction(block.read + steps) / plan.block_length + across),
    )


def cross_bytes(stack: StackPlan, itemsize: int = 2) -> int:
    """Keys and values of the vectors that the layers of `stack` attend to besides their own sequence."""
    layers = range(stack.plan.num_layers)
    return stack.num_cross_vectors * itemsize * sum(stack.plan.store(layer).slot.elements for layer in layers)


def as_int_if_whole(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def allocated_bytes(plan: Plan, batch: int, capacity: int, itemsize: int = 2) -> int:
    """Bytes of the tensors that `allocate` makes for `batch` sequences of up to `capacity` tokens."""
    return batch * kv_bytes(plan, capacity, itemsize).stored


def num_params(config: ModelConfig, plan: Plan) -> int:
    """Parameters of the model, embeddings included; tied embeddings count once."""
    if isinstance(plan, BlockPlan):
        return block_params(config, plan)
    size = config.size
    embedding = size.vocab_size * size.d_model * (1 if size.tie_embeddings else 2)
    return embedding + stack_params(config, plan)


def block_params(config: ModelConfig, plan: BlockPlan) -> int:
    """Parameters of a Block Transformer: embedder, start context, both decoders, and the map between them."""
    (coarse, fine), block = split_config(config), block_config(config)
    width, d_model = embed_dim(config), coarse.size.d_model
    embedder = config.size.vocab_size * width
    if block.embedder != "lookup":
        embedder += num_embedded_vectors(block) * width * d_model + d_model
    if has_encoder(block):
        embedder += encoder_params(block)
    expansion = plan.num_context_vectors * fine.size.d_model * (d_model + 1)
    start = d_model if plan.start else 0
    across = sum(cross_params(fine, plan.token, layer) for layer in range(plan.token.num_layers)) if plan.cross else 0
    return embedder + start + stack_params(coarse, plan.block) + expansion + num_params(fine, plan.token) + across


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


def stack_params(config: ModelConfig, plan: KVPlan) -> int:
    """Parameters of the layers and the norm after them."""
    layers = sum(layer_params(config, plan, layer)[0] for layer in range(plan.num_layers))
    return layers + norm_params(config.size)


def num_norms(size: SizeConfig) -> int:
    """Norms of the attention and the MLP of a layer."""
    return 4 if style_of(size).norm_placement == "both" else 2


def norm_params(size: SizeConfig) -> int:
    return size.d_model * (2 if style_of(size).norm == "layernorm" else 1)


def layer_params(config: ModelConfig, plan: KVPlan, layer: int) -> tuple[int, int]:
    """(parameters, those that are factors of a matrix product) of one layer."""
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
    if isinstance(plan, BlockPlan):
        return block_flops(config, plan, seq_len)
    return 2 * seq_len * config.size.d_model * config.size.vocab_size + stack_flops(config, plan, seq_len)


def block_flops(config: ModelConfig, plan: BlockPlan, seq_len: int) -> int:
    """`forward_flops` of a Block Transformer.

    The last block is no context; the first is not predicted without a start context.
    """
    coarse, fine = split_config(config)
    contexts = seq_len // plan.block_length - 1
    predicted = (seq_len - plan.num_unpredicted) // plan.block_length
    total = stack_flops(coarse, plan.block, contexts) + contexts * embedder_flops(config)
    if plan.cross:
        layers = range(plan.token.num_layers)
        total += predicted * sum(cross_flops(fine, plan, layer, plan.num_positions) for layer in layers)
    total += predicted * 2 * coarse.size.d_model * plan.num_context_vectors * fine.size.d_model
    total += predicted * stack_flops(fine, plan.token, plan.num_positions)
    return total + predicted * plan.block_length * 2 * fine.size.d_model * fine.size.vocab_size


def embedder_flops(config: ModelConfig) -> int:
    """`forward_flops` of the embedder over one block."""
    block, total = block_config(config), 0
    if block.embedder != "lookup":
        total += 2 * num_embedded_vectors(block) * embed_dim(config) * config.size.d_model
    return total + (encoder_flops(block) if has_encoder(block) else 0)


def encoder_flops(block: BlockConfig) -> int:
    """`forward_flops` of the encoder in the embedder over one block."""
    width, positions = block.encoder.d_model, encoder_positions(block)
    matrices = 4 * width * width + 2 * width * block.encoder.d_ff
    return block.encoder.layers * (2 * positions * matrices + 4 * positions * positions * width)


def cross_flops(config: ModelConfig, plan: BlockPlan, layer: int, positions: int) -> int:
    """`forward_flops` of the cross-attention of one layer of the token decoder `config` at `positions` of a block."""
    of_tokens, of_context = cross_matrices(config, plan.token, layer)
    products = 2 * positions * of_tokens + 2 * plan.num_context_vectors * of_context
    return products + plan.token.store(layer).pair_flops(config.size) * positions * plan.num_context_vectors


def stack_flops(config: ModelConfig, plan: KVPlan, seq_len: int, num_layers: int | None = None) -> int:
    """`forward_flops` of the first `num_layers` layers alone; None: of all."""
    total = 0
    for layer in range(plan.num_layers if num_layers is None else num_layers):
        store = plan.store(layer)
        total += 2 * seq_len * layer_params(config, plan, layer)[1]
        total += store.attention_flops(config.size, seq_len, store.owner == layer)
    return total


def prefill_flops(config: ModelConfig, plan: Plan, context: int) -> int:
    """FLOPs of adding a prompt of `context` tokens to an empty cache, for the logits of the next token alone.

    As `forward_flops`, but the layers from `KVPlan.tail` on run on the last position, and so does the output. A Block
    Transformer encodes the prompt's whole blocks, and begins the next one with the tokens that are left.
    """
    if isinstance(plan, BlockPlan):
        return block_prefill_flops(config, plan, context)
    return 2 * config.size.d_model * config.size.vocab_size + stack_prefill_flops(config, plan, context)


def stack_prefill_flops(config: ModelConfig, plan: KVPlan, context: int) -> int:
    """`prefill_flops` of the layers alone."""
    size, total = config.size, stack_flops(config, plan, context, plan.tail)
    for layer in range(plan.tail, plan.num_layers):
        store, matrices = plan.store(layer), layer_params(config, plan, layer)[1]
        written = store.writer_params(size).matrices if store.owner == layer else 0
        total += 2 * (context * written + matrices - written)
        total += store.step_flops(size) * store.num_positions(context)
    return total


def block_prefill_flops(config: ModelConfig, plan: BlockPlan, context: int) -> int:
    """`prefill_flops` of a Block Transformer. Raises ValueError where the prompt is shorter than `plan.min_prompt`."""
    coarse, fine = split_config(config)
    blocks, left = divmod(context, plan.block_length)
    if context < plan.min_prompt:
        raise ValueError(f"{context} tokens are less than a block of {plan.block_length}; give a longer context")
    total = blocks * embedder_flops(config)
    total += stack_prefill_flops(coarse, plan.block, blocks) if blocks else 0
    total += 2 * coarse.size.d_model * plan.num_context_vectors * fine.size.d_model
    positions = plan.num_positions - plan.block_length + 1 + left
    total += stack_prefill_flops(fine, plan.token, positions)
    if plan.cross:
        for layer in range(plan.token.num_layers):
            asked = positions if layer < plan.token.tail else 1
            total += cross_flops(fine, plan, layer, asked)
    return total + 2 * fine.size.d_model * fine.size.vocab_size


def train_flops_per_token(config: ModelConfig, plan: Plan, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs per training token (backward = twice forward), without recomputation."""
    seq_len = seq_len or config.size.seq_len
    return 3 * forward_flops(config, plan, seq_len) / seq_len


def max_batch(plan: Plan, context: int, memory: float, weight_bytes: int, itemsize: int = 2) -> int:
    """Sequences of `context` tokens whose cache fits in `memory` bytes beside the weights."""
    return max(0, int((memory - weight_bytes) // kv_bytes(plan, context, itemsize).stored))
