"""Decoding steps whose shapes are the same from token to token, to be captured in a CUDA graph or compiled.

Tokens are written at a position that is a tensor; a step reads a bucket of slots that holds all there are, and a mask
hides the rest. Nothing waits for the device. Where the bucket is full the next one begins, with a graph of its own.

Shapes: B batch, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .buffers import StateBuffer
from .cache import Cache
from .decoder import Decoder
from .language_model import LanguageModel

# Adds one token [B, 1] of each row to a cache and returns the logits [B, 1, V] of the next one.
StepFn = Callable[[Tensor], Tensor]
WAYS = ("auto", "plain", "static", "compiled", "graph")
SMALLEST_BUCKET = 256
WARMUP = 2  # steps on CUDA before one is captured
VARIANTS = 64  # of compiled code: models, batches and buckets


def bucket(length: int, capacity: int) -> int:
    """Slots that a step reads after which the cache has `length` tokens: a power of two, but no more than there are."""
    return min(capacity, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def step_logits(model: Decoder, cache: Cache, tokens_B1: Tensor) -> Tensor:
    """Add one token of each row at `cache.position`, which stays; [B, 1, V]."""
    x_BD = model.step(model.embed(tokens_B1.squeeze(1)), cache)
    return F.linear(model.norm(x_BD), model.output_weight).unsqueeze(1)


@functools.cache
def compiled_logits() -> Callable[[Decoder, Cache, Tensor], Tensor]:
    return torch.compile(step_logits, fullgraph=True, dynamic=False)


class StaticStep:
    """`decode_step` of a decoder over a cache that has its prompts already.

    static    plain operators, in shapes that never change
    compiled  the same by torch's compiler: about half a minute for each size of bucket, and then no overhead
    graph     captured in a CUDA graph. The logits lie in one tensor, which the next step overwrites

    Other steps over the same cache may not come in between.
    """

    def __init__(self, model: Decoder, cache: Cache, way: str):
        self.model, self.cache, self.way = model, cache, way
        device = model.output_weight.device
        cache.position = torch.tensor([cache.length], device=device)
        cache.num_slots = 0
        self.tokens_B1: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits_B1V: Tensor | None = None

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        cache = self.cache
        cache.check(self.model.plan, len(tokens_B1), 1)
        assert cache.position is not None
        if cache.length >= cache.num_slots:
            cache.num_slots = bucket(cache.length + 1, cache.capacity)
            self.graph = None
        logits_B1V = self.run(tokens_B1)
        cache.position += 1
        cache.length += 1
        return logits_B1V

    def run(self, tokens_B1: Tensor) -> Tensor:
        if self.way == "static":
            return step_logits(self.model, self.cache, tokens_B1)
        if self.way == "compiled":
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return compiled_logits()(self.model, self.cache, tokens_B1)
        if self.tokens_B1 is None:
            self.tokens_B1 = tokens_B1.clone()
        self.tokens_B1.copy_(tokens_B1)
        if self.graph is None:
            self.graph, self.logits_B1V = self.capture(self.tokens_B1)
        self.graph.replay()
        assert self.logits_B1V is not None
        return self.logits_B1V

    def capture(self, tokens_B1: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record a step. Its rehearsals write the same slots as the step, but states are put back."""
        states = [t for buffer in self.cache.buffers if isinstance(buffer, StateBuffer) for t in buffer.tensors]
        saved = [tensor.clone() for tensor in states]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                step_logits(self.model, self.cache, tokens_B1)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(states, saved, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_B1V = step_logits(self.model, self.cache, tokens_B1)
        return graph, logits_B1V

    def close(self) -> None:
        """Let the cache go on with steps of any length."""
        self.cache.position = None


def step_fn(model: LanguageModel, cache: object, way: str = "auto") -> StepFn:
    """The function that decodes one token of each row over `cache`, which has its prompts.

    way  plain: `decode_step`; static, compiled, graph: as StaticStep; auto: graph on CUDA, else plain. A Block
         Transformer, whose steps differ within a block, and a model that is sharded, or compiled for training, take
         plain steps

    Raises ValueError on another way, and where `way` is impossible.
    """
    if way not in WAYS:
        raise ValueError(f"steps is {way!r}; choose {', '.join(WAYS)}")
    cuda = model.output_weight.is_cuda
    whole = isinstance(model, Decoder) and isinstance(cache, Cache) and type(model.output_weight.data) is Tensor
    if way == "auto":
        in_training = any(module._compiled_call_impl is not None for module in model.modules())
        way = "graph" if cuda and whole and not in_training else "plain"
    if way == "plain":
        return lambda tokens_B1: model.decode_step(tokens_B1, cache)
    if not whole or (way == "graph" and not cuda):
        needs = "a model on CUDA" if whole else "a decoder in one piece, no Block Transformer"
        raise ValueError(f"steps={way} needs {needs}; take plain or auto")
    assert isinstance(model, Decoder) and isinstance(cache, Cache)
    return StaticStep(model, cache, way)
