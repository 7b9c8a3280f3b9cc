"""The two plans of a Block Transformer (Ho et al. 2024), and `resolve`, which tells them from the one of a decoder.

The block decoder has a plan over blocks of `block_length` tokens, and the token decoder one over the positions of a
single block: its context, then its tokens. The last token of a block is no input.
"""

import re
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from .config import MAX_LAYERS, MAX_WIDTH, STYLES, ArchConfig, BlockConfig, EncoderConfig, ModelConfig, style_of
from .plan import KVPlan, StackPlan, StackRun, resolve_stack
from .store_spec import LayoutError, share_of
from .stores import kind_of

EMBEDDERS = ("lookup", "projection", "encoder", "cls")
KINDS = ("prefix", "summation", "cross")


@dataclass(frozen=True)
class BlockPlan:
    """The resolved layout of a Block Transformer. A position's target is its own token.

    block_length         tokens of a block
    num_context_vectors  vectors that a block's context is expanded to
    num_positions        positions per block in the token decoder; the last `block_length` of them predict the block
    start                whether the first block is predicted too, from a learned context
    block, token         plans of the block decoder and of the token decoder
    cross                whether the context is no part of the sequence: each layer of the token decoder has keys and
                         values of it, `num_context_vectors` slots of its own store's shape
    """

    block_length: int
    num_context_vectors: int
    num_positions: int
    start: bool
    block: KVPlan
    token: KVPlan
    cross: bool = False

    target_offset: ClassVar[int] = 0

    @property
    def num_unpredicted(self) -> int:
        """Targets at the start of a sequence that the model does not predict."""
        return 0 if self.start else self.block_length

    @property
    def min_prompt(self) -> int:
        """Tokens after which the model can predict the next one, without padding."""
        return max(1, self.num_unpredicted)

    @property
    def stacks(self) -> tuple[StackPlan, ...]:
        cross = self.num_context_vectors if self.cross else 0
        return (
            StackPlan("block decoder", "block", self.block, self.block_length),
            StackPlan("token decoder", "position", self.token, 1, self.num_positions, cross),
        )

    def forward_runs(self, seq_len: int) -> tuple[StackRun, ...]:
        """A training pass over `seq_len` tokens, for each of `stacks`: the last block is no context."""
        predicted = (seq_len - self.num_unpredicted) // self.block_length
        return (
            StackRun(1, seq_len // self.block_length - 1, predicted),
            StackRun(predicted, self.num_positions, predicted * self.block_length),
        )

    def prefill_runs(self, context: int) -> tuple[StackRun, ...]:
        """A prompt of `context` tokens and the logits of the next one, for each of `stacks`: its whole blocks, and the
        next block as far as it has begun.

        Raises ValueError if the prompt is shorter than `min_prompt`.
        """
        if context < self.min_prompt:
            raise ValueError(f"{context} tokens are less than a block of {self.block_length}; give a longer context")
        blocks, left = divmod(context, self.block_length)
        return StackRun(1, blocks, 1), StackRun(1, self.num_positions - self.block_length + 1 + left, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, under the names of earlier versions; `plan_from_dict` reads it back."""
        values: dict[str, Any] = {"length": self.block_length, "start": self.start, "cross": self.cross}
        values |= {"context": self.num_context_vectors, "slots": self.num_positions}
        return values | {"block": self.block.to_dict(), "token": self.token.to_dict()}

    def __str__(self) -> str:
        return f"blocks of {self.block_length}: {self.block}; within one: {self.token}"


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
    return BlockPlan(
        block_length=values["length"],
        num_context_vectors=values["context"],
        num_positions=values["slots"],
        start=values["start"],
        block=KVPlan.from_dict(values["block"]),
        token=KVPlan.from_dict(values["token"]),
        cross=values.get("cross", False),  # absent in the plans of earlier versions
    )


def resolve_block(config: ModelConfig) -> BlockPlan:
    """The plans of `config`; raises LayoutError with every problem."""
    block_decoder, token_decoder = split_config(config)
    block = block_config(config)
    context = num_context_vectors(block)
    slots = block.length + (context - 1 if block.token.kind == "prefix" else 0)
    plans = resolve_stack(block_decoder), resolve_stack(token_decoder)
    return BlockPlan(block.length, context, slots, block.start, *plans, cross=block.token.kind == "cross")


def block_config(config: ModelConfig) -> BlockConfig:
    if config.arch.block is None:
        raise LayoutError(["arch.block is missing, so this is no Block Transformer: give it, or build a Decoder"])
    return config.arch.block


def stack_configs(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """A ModelConfig for each of a plan's `stacks`. Raises LayoutError with every problem of a Block Transformer."""
    return (config,) if config.arch.block is None else split_config(config)


def split_config(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The ModelConfigs of the block decoder and of the token decoder. Raises LayoutError with every problem of both."""
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
    block_decoder = ModelConfig(
        ArchConfig(deepcopy(layout.stores), list(layout.pattern), layout.short_group),
        replace(size, num_layers=size.num_layers - layers, seq_len=max(1, size.seq_len // max(1, block.length))),
    )
    token_decoder = ModelConfig(
        ArchConfig(deepcopy(token.stores), list(token.pattern), token.short_group),
        replace(size, num_layers=layers, **widths),
    )
    block_problems, token_problems = _problems(block_decoder), _problems(token_decoder)
    problems += block_problems
    for problem in token_problems:
        if "arch." not in problem and problem in block_problems:
            continue  # a width that both take from the size
        where = re.sub(r"\barch\.", "arch.block.token.", problem)
        for name in widths:
            where = where.replace(f"size.{name}", f"arch.block.token.{name}")
        problems.append(f"token decoder: {where}")
    if problems:
        raise LayoutError(problems)
    return block_decoder, token_decoder


def _problems(config: ModelConfig) -> list[str]:
    try:
        resolve_stack(config)
    except LayoutError as error:
        return error.problems
    return []


def _check(config: ModelConfig, block: BlockConfig) -> list[str]:
    """List the problems of the section `arch.block` itself."""
    problems = []
    for name, value in (("length", block.length), ("token.prefix", block.token.prefix)):
        if value < 1:
            problems.append(f"arch.block.{name} is {value}; it must be at least 1")
        elif value > MAX_WIDTH:
            problems.append(f"arch.block.{name} is {value}; it must be at most {MAX_WIDTH:,}")
    if block.token.kind not in KINDS:
        problems.append(f"arch.block.token.kind is {block.token.kind!r}; it is one of {', '.join(KINDS)}")
    kinds = {name: kind_of(store) for name, store in block.token.stores.items()}
    if block.token.kind == "cross":
        problems += [
            f"arch.block.token.stores.{name} {kind.summary}, and arch.block.token.kind is 'cross', whose layers "
            "also have keys and values per head of the context; give it kv_heads alone, or take another kind"
            for name, kind in kinds.items()
            if not kind.crosses or block.token.stores[name].tied  # a strided store may be tied
        ]
    both = (("arch", config.arch.stores), ("arch.block.token", block.token.stores))
    scaled = [f"{where}.stores.{name}" for where, stores in both for name in stores if stores[name].query_scale]
    chunked = [f"{where}.stores.{name}" for where, stores in both for name in stores if stores[name].chunk]
    if scaled or chunked:
        key = f"{scaled[0]}.query_scale" if scaled else f"{chunked[0]}.chunk"
        problems.append(
            f"{key} is of a decoder: positions of a Block Transformer are no tokens of a document; leave it out"
        )
    if config.size.style in STYLES and style_of(config.size).scale_embeddings:
        problems.append(
            "size.scale_embeddings is of a decoder: a Block Transformer maps its embeddings to blocks; leave it out"
        )
    if not 0 <= block.token.bos_token < config.size.vocab_size:
        problems.append(
            f"arch.block.token.bos_token is {block.token.bos_token}; it is no token of {config.size.vocab_size}"
        )
    if block.embedder not in EMBEDDERS:
        problems.append(f"arch.block.embedder is {block.embedder!r}; it is one of {', '.join(EMBEDDERS)}")
    elif block.embed_dim is not None and block.embedder != "projection":
        width = "d_model / length" if block.embedder == "lookup" else "arch.block.encoder.d_model"
        problems.append(
            f"arch.block.embed_dim is of the embedder `projection`; for {block.embedder} it is {width}: drop it"
        )
    elif block.embedder == "lookup" and block.length > 0 and config.size.d_model % block.length:
        problems.append(
            f"size.d_model {config.size.d_model} is not a multiple of arch.block.length {block.length}; change one of "
            "them, or take the embedder `projection`"
        )
    if block.embed_dim is not None and not 1 <= block.embed_dim <= MAX_WIDTH:
        problems.append(
            f"arch.block.embed_dim is {block.embed_dim}; it must be at least 1 and at most {MAX_WIDTH:,}, or null for "
            "d_model"
        )
    return problems + _check_encoder(block)


def _check_encoder(block: BlockConfig) -> list[str]:
    encoder = block.encoder
    if not has_encoder(block):
        unused = f"arch.block.encoder is of the embedders encoder and cls, not of {block.embedder!r}; drop it"
        return [] if encoder == EncoderConfig() else [unused]
    problems = []
    for name, value in asdict(encoder).items():
        limit = MAX_LAYERS if name == "layers" else MAX_WIDTH
        if value < 1:
            problems.append(f"arch.block.encoder.{name} is {value}; it must be at least 1")
        elif value > limit:
            problems.append(f"arch.block.encoder.{name} is {value}; it must be at most {limit:,}")
    if not problems and encoder.d_model % encoder.num_heads:
        problems.append(
            f"arch.block.encoder.d_model {encoder.d_model} is not a multiple of arch.block.encoder.num_heads "
            f"{encoder.num_heads}; change one of them"
        )
    return problems


def has_encoder(block: BlockConfig) -> bool:
    return block.embedder in ("encoder", "cls")


def embed_dim(config: ModelConfig) -> int:
    """Width of one token's embedding in the embedder."""
    block = block_config(config)
    if has_encoder(block):
        return block.encoder.d_model
    return config.size.d_model // block.length if block.embedder == "lookup" else block.embed_dim or config.size.d_model


def num_embedded_vectors(block: BlockConfig) -> int:
    """Vectors of the embedder that stand for a block: of its tokens, or of the CLS tokens."""
    return block.encoder.cls_tokens if block.embedder == "cls" else block.length


def num_context_vectors(block: BlockConfig) -> int:
    """Vectors that a block's context is expanded to."""
    return block.token.prefix if block.token.kind == "prefix" else block.length
