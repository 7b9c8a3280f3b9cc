"""What a model costs: parameters, training FLOPs, and bytes of KV cache stored, read and allocated.

Pure functions of the configuration and its plan. Bytes of cache are three figures, never one: `stored` grows by a slope
per token up to a constant share, `read` is what decoding one token fetches (sharing does not reduce it), and allocation
is `stored` at the full capacity for every sequence of the batch.
"""

from dataclasses import dataclass
from fractions import Fraction

from .block_plan import BlockPlan, Plan, block_config, embed_dim, has_encoder, num_embedded_vectors, split_config
from .config import BlockConfig, ModelConfig, SizeConfig, head_dim, style_of
from .plan import CHUNK, KVPlan, StackPlan, StoreSpec


@dataclass(frozen=True)
class KVBytes:
    """KV cache of one sequence, in bytes.

    per_token  what each further token adds, once all windows are full; of a Block Transformer on average
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
        per_token=sum(slot_bytes(s, itemsize) for s in plan.stores if s.max_positions is None),
        constant=sum(store_bytes(s, s.max_positions, itemsize) for s in plan.stores if s.max_positions is not None),
        stored=sum(store_bytes(s, context, itemsize) for s in plan.stores),
        read=sum(store_bytes(plan.store(i), context, itemsize) for i in range(plan.num_layers)),
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
        per_token=_whole(Fraction(block.per_token) / plan.block_length),
        constant=block.constant + token.stored + across,
        stored=block.stored + token.stored + across,
        read=_whole(Fraction(block.read + steps) / plan.block_length + across),
    )


def cross_bytes(stack: StackPlan, itemsize: int = 2) -> int:
    """Keys and values of the vectors that the layers of `stack` attend to besides their own sequence."""
    layers = range(stack.plan.num_layers)
    return stack.num_cross_vectors * sum(slot_bytes(stack.plan.store(layer), itemsize) for layer in layers)


def _whole(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def store_bytes(store: StoreSpec, context: int, itemsize: int = 2) -> int:
    """Bytes of one store after `context` tokens."""
    whole = store.positions(context) - store.num_slots
    return slot_bytes(store, itemsize) * whole + slot_bytes(store, state_itemsize(itemsize)) * store.num_slots


def slot_bytes(store: StoreSpec, itemsize: int = 2) -> int:
    """Bytes of one position; of a merged slot, given `state_itemsize`."""
    return store.slot.elements * itemsize


def state_itemsize(itemsize: int) -> int:
    """Bytes per element of merged slots: sums over all that was written, hence at least fp32."""
    return max(4, itemsize)


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
    size = config.size
    return 2 * size.d_model * size.num_heads * head_dim(size), size.d_model * plan.store(layer).slot.elements


def cross_params(config: ModelConfig, plan: KVPlan, layer: int) -> int:
    """Parameters of one layer's cross-attention, with its norm."""
    size = config.size
    biases = size.num_heads * head_dim(size) + plan.store(layer).slot.elements + size.d_model
    return sum(cross_matrices(config, plan, layer)) + style_of(size).bias * biases + norm_params(size)


def stack_params(config: ModelConfig, plan: KVPlan) -> int:
    """Parameters of the layers and the norm after them."""
    layers = sum(layer_params(config, plan, layer)[0] for layer in range(plan.num_layers))
    return layers + norm_params(config.size)


def norm_params(size: SizeConfig) -> int:
    return size.d_model * (2 if style_of(size).norm == "layernorm" else 1)


def layer_params(config: ModelConfig, plan: KVPlan, layer: int) -> tuple[int, int]:
    """(parameters, those that are factors of a matrix product) of one layer."""
    size, store = config.size, plan.store(layer)
    slot, heads, width = store.slot, config.size.num_heads, head_dim(config.size)
    query_dim = width + slot.rope_dim
    matrices = size.d_model * heads * query_dim + heads * width * size.d_model
    mlp_up = 1 if style_of(size).mlp == "gelu" else 2
    matrices += (mlp_up + 1) * size.d_model * size.d_ff
    others = 2 * norm_params(size) + (heads if store.sinks else 0)
    if style_of(size).bias:
        others += heads * query_dim + size.d_model + mlp_up * size.d_ff + size.d_model
        others += slot.elements if store.owner == layer else 0
    if slot.latent_dim:
        matrices += slot.latent_dim * heads * 2 * width  # from the latent to keys and values, in every reader
    if store.owner == layer:
        matrices += size.d_model * slot.elements
        others += (norm_params(size) if store.kv_norm else 0) + slot.latent_dim
        if store.num_slots:  # the router: a write query where it does not read the keys, addresses, and the gate
            matrices += store.address_dim * (store.num_slots + (0 if store.window else size.d_model))
            others += store.address_dim + store.num_slots
    return matrices + others, matrices


def visible_pairs(seq_len: int, window: int | None) -> int:
    """Pairs (query, key) that causal attention over `seq_len` tokens looks at."""
    full = min(seq_len, window or seq_len)
    return full * (full + 1) // 2 + (seq_len - full) * full


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
    (coarse, fine), block = split_config(config), block_config(config)
    contexts = seq_len // plan.block_length - 1
    predicted = (seq_len - plan.num_unpredicted) // plan.block_length
    total = stack_flops(coarse, plan.block, contexts)
    if block.embedder != "lookup":
        total += 2 * contexts * num_embedded_vectors(block) * embed_dim(config) * coarse.size.d_model
    if has_encoder(block):
        total += contexts * encoder_flops(block)
    if plan.cross:
        total += predicted * sum(cross_flops(fine, plan, layer) for layer in range(plan.token.num_layers))
    total += predicted * 2 * coarse.size.d_model * plan.num_context_vectors * fine.size.d_model
    total += predicted * stack_flops(fine, plan.token, plan.num_positions)
    return total + predicted * plan.block_length * 2 * fine.size.d_model * fine.size.vocab_size


def encoder_flops(block: BlockConfig) -> int:
    """`forward_flops` of the encoder in the embedder over one block."""
    width, positions = block.encoder.d_model, encoder_positions(block)
    matrices = 4 * width * width + 2 * width * block.encoder.d_ff
    return block.encoder.layers * (2 * positions * matrices + 4 * positions * positions * width)


def cross_flops(config: ModelConfig, plan: BlockPlan, layer: int) -> int:
    """`forward_flops` of the cross-attention of one layer of the token decoder `config` over one block."""
    of_tokens, of_context = cross_matrices(config, plan.token, layer)
    products = 2 * plan.num_positions * of_tokens + 2 * plan.num_context_vectors * of_context
    return products + attention_flops(config, plan.token, layer, plan.num_positions * plan.num_context_vectors)


def stack_flops(config: ModelConfig, plan: KVPlan, seq_len: int) -> int:
    """`forward_flops` of the layers alone."""
    total = 0
    for layer in range(plan.num_layers):
        total += 2 * seq_len * layer_params(config, plan, layer)[1]
        store = plan.store(layer)
        if store.num_slots:
            total += bounded_flops(config, plan, layer, seq_len)
        if store.window or not store.num_slots:
            total += attention_flops(config, plan, layer, visible_pairs(seq_len, store.window))
    return total


def bounded_flops(config: ModelConfig, plan: KVPlan, layer: int, seq_len: int) -> int:
    """FLOPs of one layer's slots over one sequence, in the form that trains: M slots, chunks of C tokens, heads of H.

    Per token and query head, scores and values against the state take 4 M H, against the chunk 4 C H, and what those
    weigh in the slots 4 C M; the owner adds 4 M H per key/value head for the states between chunks, and 2 C M. Whole
    chunks and all pairs in them are computed and counted, unlike the pairs of softmax attention.
    """
    store, heads = plan.store(layer), config.size.num_heads
    chunk, slots, width = min(CHUNK, seq_len), store.num_slots, store.slot.k_dim
    total = heads * 4 * (slots * width + chunk * width + chunk * slots)
    if store.owner == layer:
        total += store.slot.kv_heads * 4 * slots * width + 2 * chunk * slots  # the sums of log(1 - p)
    return total * chunk * -(-seq_len // chunk)


def attention_flops(config: ModelConfig, plan: KVPlan, layer: int, pairs: int) -> int:
    """FLOPs of scores and weighted values of one layer over `pairs` (query, key) pairs."""
    width = head_dim(config.size)
    return 2 * config.size.num_heads * (2 * width + plan.store(layer).slot.rope_dim) * pairs


def train_flops_per_token(config: ModelConfig, plan: Plan, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs per training token (backward = twice forward), without recomputation."""
    seq_len = seq_len or config.size.seq_len
    return 3 * forward_flops(config, plan, seq_len) / seq_len


def max_batch(plan: Plan, context: int, memory: float, weight_bytes: int, itemsize: int = 2) -> int:
    """Sequences of `context` tokens whose cache fits in `memory` bytes beside the weights."""
    return max(0, int((memory - weight_bytes) // kv_bytes(plan, context, itemsize).stored))
