"""Time of training on one GPU, counted from the layout: matrix products, attention, and traffic of memory.

Counts are those of arch/footprint.py, and for traffic of memory.py. What turns them into time are `Rates`, the shares
of the data sheet that are reached. ROOF is what kernels reach by themselves, without a gap between them: no run is
faster. HOPPER and AMPERE are what whole runs reached by published tables, from which they were derived.
"""

from dataclasses import dataclass

from arch import ModelConfig, Plan
from arch.config import SizeConfig
from arch.footprint import between_flops, cross_matrices, num_params
from arch.spans import visible_pairs
from arch.store_spec import StoreSpec
from eval.hardware import GIGA, Gpu
from train.estimates.activations import Execution
from train.estimates.memory import (
    StackShape,
    cross_bytes,
    layer_bytes,
    stack_shapes,
)
from train.schema import LOSS_BYTES_ON_CUDA

TILE = 128  # queries, and slots, of what fused attention computes at a time
# What the backward pass needs is written, read, and so are gradients of its size: in all this times the bytes that a
# layer saves. By layout, the compiler's sm_90 code moves 3.4 to 4.7 times as much.
TRAFFIC = 4
H100_BYTES_PER_FLOP = 3350e9 / 989.5e12  # stands for the bandwidth of a device whose data sheet is not known


@dataclass(frozen=True)
class Rates:
    """Fractions of the data sheet: of the peak in the type computed in (fp32 for `fp32_matmul`), and of bandwidth.

    forward, backward                plainly causal attention; the backward pass counts as two forward passes
    masked_forward, masked_backward  attention with windows or sinks, and of a Block Transformer within blocks
    fp32_matmul                      products inside of bounded stores, in fp32
    """

    matmul: float
    forward: float
    backward: float
    masked_forward: float
    masked_backward: float
    fp32_matmul: float
    bandwidth: float


# Matrix products at 700 TFLOP/s of an H100's 989.5, as in a mixed step; cuDNN's attention at 550 and 430, FlexAttention
# at 380 and 260 (assumed), where 2.5 forward passes are computed in the backward pass; TF32 at 280; 3.0 TB/s of 3.35.
ROOF = Rates(0.707, 0.556, 0.348, 0.384, 0.210, 280 / 67, 0.896)
# From llm-foundry's table of MPT on H100 and on A100, and OLMo-core's 1B (tests/test_train_roofline.py has the rows).
# Attention with windows, and products in bounded stores, at the roof's proportions: nobody has published any.
HOPPER = Rates(0.53, 0.16, 0.16, 0.11, 0.11, 0.67, 0.896)
AMPERE = Rates(0.705, 0.255, 0.255, 0.18, 0.18, 0.67, 0.896)


def published_rates(gpu: Gpu | None) -> Rates:
    """The rates of whole runs on `gpu`; of what is neither, Hopper's, which are the lower ones."""
    return AMPERE if gpu is not None and gpu.short.startswith("a100") else HOPPER


@dataclass(frozen=True)
class StepTime:
    """Seconds of one GPU per token: of a micro-batch, and of what is done once per step, over all its tokens."""

    matmul: float
    attention: float
    fp32_matmul: float
    traffic: float
    step: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.fp32_matmul + self.traffic + self.step


@dataclass(frozen=True)
class Counts:
    """FLOPs, of forward passes but for `matmul`, and bytes, per training token."""

    matmul: float = 0
    attention: float = 0
    masked: float = 0
    fp32_matmul: float = 0
    traffic: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def scaled(self, factor: float) -> "Counts":
        return Counts(*(factor * value for value in vars(self).values()))


def step_time(
    config: ModelConfig, plan: Plan, how: Execution, micro_batch: int, rates: Rates, peak: float, gpu: Gpu | None
) -> StepTime:
    """Time per token of a step of `how.accumulate` micro-batches; with checkpointing a forward pass comes again.

    `peak`: FLOP/s in the type computed in. Communication is taken to be hidden, and the processor never waited for.
    """
    counts, params = train_counts(config, plan, how), num_params(config, plan)
    tokens = micro_batch * config.size.seq_len
    bandwidth = rates.bandwidth * (gpu.bandwidth * GIGA if gpu else peak * H100_BYTES_PER_FLOP)
    fp32_peak = gpu.fp32 * 1e12 if gpu else peak * 67 / 989.5
    again = 1 if how.checkpointing else 0
    per_micro_batch = 12 * params  # the cast of each weight, and of its gradient
    per_micro_batch += 12 * params if how.accumulate > 1 else 0  # which is added to a sum
    per_step = 40 * params / how.shards  # clipping, and the optimizer
    return StepTime(
        matmul=(3 + again) * counts.matmul / (rates.matmul * peak),
        attention=(1 + again) * (counts.attention / rates.forward + counts.masked / rates.masked_forward) / peak
        + 2 * (counts.attention / rates.backward + counts.masked / rates.masked_backward) / peak,
        fp32_matmul=(3 + again) * counts.fp32_matmul / (rates.fp32_matmul * fp32_peak),
        traffic=((1 + again / 3) * counts.traffic + per_micro_batch / tokens) / bandwidth,
        step=per_step / (bandwidth * tokens * how.accumulate),
    )


def train_counts(config: ModelConfig, plan: Plan, how: Execution) -> Counts:
    """Counts of a model per token of its sequences; a Block Transformer's from its two decoders and what is between."""
    seq_len, size = config.size.seq_len, config.size
    stacks = stack_shapes(config, plan, 1)
    total = Counts()
    for stack in stacks:
        total += stack_counts(stack, how).scaled(stack.positions / seq_len)
    outputs, between = stacks[-1].outputs, between_flops(config, plan.forward_runs(seq_len))
    head = stacks[-1].config.size.d_model * size.vocab_size
    # Logits are written, read twice, and their gradient is written; the gradient of the matrix is a sum over chunks.
    loss = outputs * (8 * size.vocab_size + 8 * head * size.vocab_size * how.itemsize / LOSS_BYTES_ON_CUDA)
    residual = outputs * 74 * size.d_model  # embedding, last norm, their gradients
    return total + Counts(matmul=(2 * outputs * head + between) / seq_len, traffic=(loss + residual) / seq_len)


def stack_counts(stack: StackShape, how: Execution) -> Counts:
    """Counts of the layers of a stack, per position."""
    config, size, length = stack.config, stack.config.size, stack.config.size.seq_len
    total = Counts()
    for layer, (_, matrices) in enumerate(stack.layer_params):
        store = stack.plan.store(layer)
        saved = layer_bytes(config, stack.plan, layer, how) + cross_bytes(stack, layer, how)
        total += Counts(matmul=2 * matrices, traffic=TRAFFIC * saved)
        total += attention_counts(store, size, length, store.owner == layer, stack.within_blocks).scaled(1 / length)
        if stack.cross_vectors:
            total += Counts(masked=store.pair_flops(size) * stack.cross_vectors)
            total += Counts(
                matmul=2 * cross_matrices(config, stack.plan, layer)[1] * (stack.cross_vectors / length - 1)
            )
    return total


def attention_counts(store: StoreSpec, size: SizeConfig, length: int, owner: bool, within_blocks: bool) -> Counts:
    """Counts of the attention of one layer over a sequence of `length` tokens, as kernels compute it: in whole tiles,
    with values as wide as keys. Rows as short as a block are one long row, of which a tile sees its diagonal."""
    if slots := store.dense_slots(length):
        return Counts(masked=store.pair_flops(size) * length * slots)
    if not store.masked:
        window = 0 if store.window is None else store.pair_flops(size) * visible_pairs(length, store.window)
        rest = store.attention_flops(size, length, owner) - window
        return Counts(masked=window * (1 + TILE / min(store.window or length, length)), fp32_matmul=rest)
    heads = store.kernel_heads(size)
    of_pair = store.pair_flops(size) * 2 * heads.k_dim / (heads.k_dim + heads.v_dim)
    if within_blocks:
        return Counts(masked=of_pair * length * TILE)
    restricted = store.window is not None and store.window < length
    pairs = visible_pairs(length, store.span)
    if restricted or store.sinks:
        return Counts(masked=of_pair * (pairs + length * TILE))
    return Counts(attention=of_pair * (pairs + length * TILE / 2))
