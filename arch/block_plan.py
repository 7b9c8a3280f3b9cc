"""The two plans of a Block Transformer (Ho et al. 2024), and `resolve`, which tells them from the one of a decoder.

A coarse plan over blocks of `length` tokens, and a fine one over the positions of a single block: its context, then its
tokens. The last token of a block is no input.
"""

import re
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from .config import ArchConfig, BlockConfig, ModelConfig
from .plan import KVPlan, LayoutError, resolve_stack, share_of


@dataclass(frozen=True)
class BlockPlan:
    """The resolved layout of a Block Transformer.

    length   tokens of a block
    context  vectors that a block's context is expanded to
    slots    positions of the token decoder: it says the tokens of a block from its last `length` ones
    start    whether the first block is predicted too, from a learned context
    block, token   plans of the block decoder and of the token decoder
    """

    length: int
    context: int
    slots: int
    start: bool
    block: KVPlan
    token: KVPlan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `plan_from_dict` reads it back."""
        return asdict(self)

    def __str__(self) -> str:
        return f"blocks of {self.length}: {self.block}; within one: {self.token}"


Plan = KVPlan | BlockPlan


def resolve(config: ModelConfig) -> Plan:
    """The plan of a model: of a decoder, or with `arch.block` the two of a Block Transformer.

    Raises LayoutError with every problem.
    """
    return resolve_stack(config) if config.arch.block is None else resolve_block(config)


def plan_from_dict(values: dict[str, Any]) -> Plan:
    """The plan that `to_dict` wrote."""
    if "block" not in values:
        return KVPlan.from_dict(values)
    parts = {name: KVPlan.from_dict(values[name]) for name in ("block", "token")}
    return BlockPlan(**{**values, **parts})


def resolve_block(config: ModelConfig) -> BlockPlan:
    """The plans of `config`; raises LayoutError with every problem."""
    coarse, fine = stages(config)
    block = block_config(config)
    context = block.token.prefix if block.token.kind == "prefix" else block.length
    slots = block.length + (context - 1 if block.token.kind == "prefix" else 0)
    return BlockPlan(block.length, context, slots, block.start, resolve_stack(coarse), resolve_stack(fine))


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
        resolve_stack(config)
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
