"""Decoding steps whose shapes are the same from token to token, to be captured in a CUDA graph or compiled.

Tokens are written at a position that is a tensor; a step reads a bucket of slots that holds all there are, and a mask
hides the rest. Nothing waits for the device. Where the bucket is full the next one begins, with a graph of its own. A
Block Transformer has two kinds of step: one within a block, and one that completes a block and starts the next.

Shapes: B batch, L block length, D model, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attend_kernels import VARIANTS
from .buffers import StateBuffer, Tensors
from .cache import Cache
from .language_model import LanguageModel, StepFn

if TYPE_CHECKING:
    from .block_transformer import BlockCache, BlockTransformer
    from .decoder import Decoder

WAYS = ("auto", "plain", "static", "compiled", "graph")
SMALLEST_BUCKET = 256
WARMUP = 2  # steps on CUDA before one is captured


def bucket(length: int, capacity: int) -> int:
    """Slots that a step reads after which the cache has `length` tokens: a power of two, but no more than there are."""
    return min(capacity, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def step_logits(model: "Decoder", cache: Cache, tokens_B1: Tensor) -> Tensor:
    """Add one token of each row at `cache.position`, which stays; [B, 1, V]."""
    x_BD = model.step(model.embed(tokens_B1.squeeze(1)), cache)
    return F.linear(model.norm(x_BD), model.output_weight).unsqueeze(1)


def token_logits(model: "BlockTransformer", cache: "BlockCache", tokens_B1: Tensor) -> Tensor:
    """Add one token of each row, which is not the last of its block, at `cache.tokens.position`, which stays;
    [B, 1, V]."""
    assert cache.context_BCD is not None and cache.tokens.position is not None
    decoder = model.token_decoder
    x_BD = decoder.embed(tokens_B1.squeeze(1))
    if model.kind == "summation":
        x_BD = x_BD + cache.context_BCD.index_select(1, cache.tokens.position).squeeze(1)
    return F.linear(decoder.norm(decoder.step(x_BD, cache.tokens)), decoder.output_weight).unsqueeze(1)


def block_logits(model: "BlockTransformer", cache: "BlockCache", tokens_BL: Tensor) -> Tensor:
    """Add the block `tokens_BL` of each row at `cache.blocks.position`, which stays, and start the next; [B, 1, V]."""
    blocks, tokens = cache.blocks, cache.tokens
    assert cache.context_BCD is not None and blocks.position is not None
    decoder = model.block_decoder
    context_BD = decoder.norm(decoder.step(model.embedder(tokens_BL).squeeze(1), blocks))
    cache.context_BCD.copy_(model.expand(model.or_start(context_BD, blocks, blocks.position + 1)))
    position, tokens.position = tokens.position, None  # a block starts at 0, in shapes of its own
    logits_B1V = model.start_block(cache.context_BCD, tokens_BL[:, :0], tokens)
    tokens.position = position
    return logits_B1V


@functools.cache
def compiled(logits: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(logits, fullgraph=True, dynamic=False)


class Recorder:
    """Runs `logits(model, cache, tokens)`, of unchanging shapes, in one of the ways of `choose_way`.

    static    plain operators, in shapes that never change
    compiled  the same by torch's compiler: about half a minute for each size of bucket, and then no overhead
    graph     captured in a CUDA graph. The logits lie in one tensor, which the next step overwrites
    """

    def __init__(
        self,
        logits: Callable[..., Tensor],
        model: LanguageModel,
        cache: "Cache | BlockCache",
        way: str,
    ):
        self.logits, self.model, self.cache, self.way = logits, model, cache, way
        self.tokens: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.derived: list[Tensors] = []
        self.logits_B1V: Tensor | None = None

    def run(self, tokens: Tensor) -> Tensor:
        if self.way == "static":
            return self.logits(self.model, self.cache, tokens)
        if self.way == "compiled":
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return compiled(self.logits)(self.model, self.cache, tokens)
        if self.tokens is None:
            self.tokens = tokens.clone()
        self.tokens.copy_(tokens)
        if self.graph is None:
            self.graph, self.logits_B1V = self.capture(self.tokens)
        self.graph.replay()
        assert self.logits_B1V is not None
        return self.logits_B1V

    def capture(self, tokens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. Its rehearsals write the same slots as the step, but states are put back."""
        every = (buffer for cache in self.cache.stacks for buffer in cache.buffers)
        buffers = [buffer for buffer in every if isinstance(buffer, StateBuffer)]
        states = [tensor for buffer in buffers for tensor in buffer.tensors]
        saved = [tensor.clone() for tensor in states]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.logits(self.model, self.cache, tokens)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(states, saved, strict=True):
            tensor.copy_(value)
        # The graph reads them after the buffer has let go of them.
        self.derived = [buffer.derived for buffer in buffers]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_B1V = self.logits(self.model, self.cache, tokens)
        return graph, logits_B1V

    def next_bucket(self, cache: Cache) -> None:
        """Read a larger bucket of `cache` where the one before is full."""
        if cache.length >= cache.num_slots:
            cache.num_slots = bucket(cache.length + 1, cache.capacity)
            self.graph = None


class StaticStep(Recorder):
    """`decode_step` of a decoder over a cache that has its prompts already.

    Other steps over the same cache may not come in between.
    """

    cache: Cache

    def __init__(self, model: "Decoder", cache: Cache, way: str):
        super().__init__(step_logits, model, cache, way)
        cache.hold_position()

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        cache = self.cache
        assert cache.position is not None
        cache.check(cache.plan, len(tokens_B1), 1)
        self.next_bucket(cache)
        logits_B1V = self.run(tokens_B1)
        cache.position += 1
        cache.length += 1
        return logits_B1V

    def close(self) -> None:
        """Let the cache go on with steps of any length."""
        self.cache.position = None


class StaticBlockStep:
    """`decode_step` of a Block Transformer over a cache that has its prompts already; as StaticStep.

    A step that completes a block and one that does not are of different shapes, each recorded by itself.
    """

    def __init__(self, model: "BlockTransformer", cache: "BlockCache", way: str):
        plan = model.plan
        self.cache, self.length = cache, plan.block_length
        self.first_length = plan.num_positions - plan.block_length + 1  # positions of a block before its first token
        self.token_step = Recorder(token_logits, model, cache, way)
        self.block_step = Recorder(block_logits, model, cache, way)
        assert cache.context_BCD is not None
        cache.context_BCD = cache.context_BCD.clone()
        num_partial = cache.partial_BL.shape[1]
        self.tokens_BL = cache.partial_BL.new_zeros((len(cache.partial_BL), self.length))
        self.tokens_BL[:, :num_partial] = cache.partial_BL
        cache.blocks.hold_position()
        cache.tokens.hold_position()
        cache.tokens.num_slots = cache.tokens.capacity

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        cache, blocks, tokens = self.cache, self.cache.blocks, self.cache.tokens
        assert blocks.position is not None and tokens.position is not None
        last = cache.partial_BL.shape[1]
        if last + 1 < self.length:
            tokens.check(tokens.plan, len(tokens_B1), 1)
            self.tokens_BL[:, last : last + 1] = tokens_B1
            logits_B1V = self.token_step.run(tokens_B1)
            tokens.position += 1
            tokens.length += 1
        else:
            blocks.check(blocks.plan, len(tokens_B1), 1)
            self.block_step.next_bucket(blocks)
            self.tokens_BL[:, last:] = tokens_B1
            logits_B1V = self.block_step.run(self.tokens_BL)
            blocks.position += 1
            blocks.length += 1
            tokens.length = self.first_length
            tokens.position.fill_(tokens.length)
        cache.partial_BL = self.tokens_BL[:, : (last + 1) % self.length]
        return logits_B1V

    def close(self) -> None:
        """Let the cache go on with steps of any length."""
        self.cache.blocks.position = self.cache.tokens.position = None


@dataclass
class PlainStep:
    """`decode_step` of any model."""

    model: LanguageModel
    cache: Any

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        return self.model.decode_step(tokens_B1, self.cache)

    def close(self) -> None:
        pass


def step_fn(model: LanguageModel, cache: Any, way: str = "auto") -> StepFn:
    """The function that decodes one token of each row over `cache`, which has its prompts.

    way  as of `choose_way`; auto is plain over a compressed cache

    Raises ValueError as `choose_way`.
    """
    chosen = choose_way(model, way)
    if way == "auto" and chosen != "plain" and not cache.takes_static_steps:
        chosen = "plain"
    return PlainStep(model, cache) if chosen == "plain" else model.static_step(cache, chosen)


def choose_way(model: LanguageModel, way: str) -> str:
    """The way `model` decodes: `way`, or what auto stands for.

    way  plain: `decode_step`; static, compiled, graph: as Recorder; auto: graph on CUDA, else plain. A sharded model
         takes plain steps

    Raises ValueError on another way, and where `way` is impossible.
    """
    if way not in WAYS:
        raise ValueError(f"steps is {way!r}; choose {', '.join(WAYS)}")
    cuda = model.output_weight.is_cuda
    whole = model.takes_static_steps
    if way == "auto":
        way = "graph" if cuda and whole else "plain"
    if way != "plain" and (not whole or (way == "graph" and not cuda)):
        needs = "a model on CUDA" if whole else "a model of ours, of which no process holds a part"
        raise ValueError(f"steps={way} needs {needs}; take plain or auto")
    return way
