"""The two plans of a Block Transformer (Ho et al. 2024), and what it costs: parameters, FLOPs, bytes of KV cache.

A coarse plan over blocks of `length` tokens, and a fine one over the positions of a single block: its context, then its
tokens. The last token of a block is no input. Pure functions of the configuration.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction

from .config import ArchConfig, BlockConfig, ModelConfig
from .footprint import kv_bytes, stack_flops, stack_params
from .plan import KVPlan, LayoutError, resolve, share_of


@dataclass(frozen=True)
class BlockPlan:
    """The resolved layout of a Block Transformer.

    length   tokens of a block
    context  vectors that a block's context is expanded to
    slots    positions of the token decoder: it says the tokens of a block from its last `length` ones
    block, token   plans of the block decoder and of the token decoder
    """

    length: int
    context: int
    slots: int
    block: KVPlan
    token: KVPlan


def resolve_block(config: ModelConfig) -> BlockPlan:
    """The plans of `config`; raises LayoutError with every problem."""
    coarse, fine = stages(config)
    block = block_config(config)
    context = block.token.prefix if block.token.kind == "prefix" else block.length
    slots = block.length + (context - 1 if block.token.kind == "prefix" else 0)
    return BlockPlan(block.length, context, slots, resolve(coarse), resolve(fine))


def block_config(config: ModelConfig) -> BlockConfig:
    if config.arch.block is None:
        raise LayoutError(["arch.block is missing, so this is no Block Transformer: give it, or build a Decoder"])
    return config.arch.block


def stages(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The block decoder and the token decoder as models of their own. Raises LayoutError with every problem of both."""
    block, size = block_config(config), config.size
    problems = _check(config, block)
    share = share_of(block.token.layers, size.num_layers)
    layers = 0 if share is None else int(share)
    if not 0 < layers < size.num_layers:
        problems.append(
            f"arch.block.token.layers is {block.token.layers!r}; write a number of the {size.num_layers} layers, or a "
            "share such as 1/2, that leaves both decoders at least one"
        )
        raise LayoutError(problems)
    widths = {
        name: getattr(block.token, name)
        for name in ("d_model", "num_heads", "head_dim", "d_ff")
        if getattr(block.token, name) is not None
    }
    layout, token = config.arch, block.token
    coarse = ModelConfig(
        ArchConfig(deepcopy(layout.stores), list(layout.pattern), layout.short_group),
        replace(size, num_layers=size.num_layers - layers, seq_len=max(1, size.seq_len // max(1, block.length))),
    )
    fine = ModelConfig(
        ArchConfig(deepcopy(token.stores), list(token.pattern), token.short_group),
        replace(size, num_layers=layers, **widths),
    )
    of_coarse, of_fine = _problems(coarse), _problems(fine)
    problems += of_coarse
    for problem in of_fine:
        if "arch." not in problem and problem in of_coarse:
            continue  # a width that both take from the size
        where = re.sub(r"\barch\.", "arch.block.token.", problem)
        for name in widths:
            where = where.replace(f"size.{name}", f"arch.block.token.{name}")
        problems.append(f"token decoder: {where}")
    if problems:
        raise LayoutError(problems)
    return coarse, fine


def _problems(config: ModelConfig) -> list[str]:
    try:
        resolve(config)
    except LayoutError as error:
        return error.problems
    return []


def _check(config: ModelConfig, block: BlockConfig) -> list[str]:
    """What is wrong with the section `arch.block` itself."""
    problems = []
    for name, value in (("length", block.length), ("token.prefix", block.token.prefix)):
        if value < 1:
            problems.append(f"arch.block.{name} is {value}; it must be at least 1")
    if block.token.kind not in ("prefix", "summation"):
        problems.append(f"arch.block.token.kind is {block.token.kind!r}; it is prefix or summation")
    if not 0 <= block.token.bos_token < config.size.vocab_size:
        problems.append(
            f"arch.block.token.bos_token is {block.token.bos_token}; it is no token of {config.size.vocab_size}"
        )
    if block.embedder not in ("lookup", "projection"):
        problems.append(f"arch.block.embedder is {block.embedder!r}; it is lookup or projection")
    elif block.embedder == "lookup" and block.embed_dim is not None:
        problems.append("arch.block.embed_dim is of the embedder `projection`; for lookup it is d_model / length")
    elif block.embedder == "lookup" and block.length > 0 and config.size.d_model % block.length:
        problems.append(
            f"size.d_model {config.size.d_model} is not a multiple of arch.block.length {block.length}; change one of "
            "them, or take the embedder `projection`"
        )
    if block.embed_dim is not None and block.embed_dim < 1:
        problems.append(f"arch.block.embed_dim is {block.embed_dim}; it must be at least 1, or null for d_model")
    return problems


def embed_dim(config: ModelConfig) -> int:
    """Width of one token's embedding in the embedder."""
    block = block_config(config)
    return config.size.d_model // block.length if block.embedder == "lookup" else block.embed_dim or config.size.d_model


@dataclass(frozen=True)
class BlockKVBytes:
    """KV cache of one sequence, in bytes.

    per_token  what each further token adds on average, once all windows are full
    constant   the token decoder's cache, and windowed stores of the block decoder when full
    stored     the whole cache after `context` tokens; a block that is not complete is in the constant part
    read       fetched to decode one token of the block that comes then, on average over its tokens
    """

    per_token: Fraction
    constant: int
    stored: int
    read: Fraction


def block_kv_bytes(plan: BlockPlan, context: int, itemsize: int = 2) -> BlockKVBytes:
    """Cache bytes of one sequence of `context` tokens with elements of `itemsize` bytes (paper, 2.3, 2.4, E.2).

    The block decoder runs once per block; the token decoder reads, for the first token, the context's positions alone.
    """
    block = kv_bytes(plan.block, context // plan.length, itemsize)
    token = kv_bytes(plan.token, plan.slots, itemsize)
    first = plan.slots - plan.length + 1
    steps = sum(kv_bytes(plan.token, seen, itemsize).read for seen in range(first, plan.slots + 1))
    return BlockKVBytes(
        per_token=Fraction(block.per_token, plan.length),
        constant=block.constant + token.stored,
        stored=block.stored + token.stored,
        read=Fraction(block.read + steps, plan.length),
    )


def block_allocated_bytes(plan: BlockPlan, batch: int, capacity: int, itemsize: int = 2) -> int:
    """Bytes of what `block_transformer.allocate_blocks` makes for sequences of up to `capacity` tokens."""
    return batch * block_kv_bytes(plan, capacity, itemsize).stored


def num_block_params(config: ModelConfig) -> int:
    """Parameters of the Block Transformer, embeddings included; tied embeddings count once."""
    (coarse, fine), plan, block = stages(config), resolve_block(config), block_config(config)
    width, vocab_size = embed_dim(config), config.size.vocab_size
    embedder = vocab_size * width
    if block.embedder == "projection":
        embedder += block.length * width * coarse.size.d_model + coarse.size.d_model
    expansion = plan.context * fine.size.d_model * (coarse.size.d_model + 1)
    start = coarse.size.d_model if block.start else 0
    tables = vocab_size * fine.size.d_model * (1 if config.size.tie_embeddings else 2)
    return embedder + start + stack_params(coarse, plan.block) + expansion + stack_params(fine, plan.token) + tables


def block_forward_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of the forward pass over one sequence of `seq_len` tokens, a multiple of the block length.

    Counted as in `footprint.forward_flops`. The last block is no context; the first is not predicted without `start`.
    """
    (coarse, fine), plan, block = stages(config), resolve_block(config), block_config(config)
    contexts = seq_len // plan.length - 1
    predicted = contexts + (1 if block.start else 0)
    total = stack_flops(coarse, plan.block, contexts)
    if block.embedder == "projection":
        total += 2 * contexts * block.length * embed_dim(config) * coarse.size.d_model
    total += predicted * 2 * coarse.size.d_model * plan.context * fine.size.d_model
    total += predicted * stack_flops(fine, plan.token, plan.slots)
    return total + predicted * plan.length * 2 * fine.size.d_model * fine.size.vocab_size
