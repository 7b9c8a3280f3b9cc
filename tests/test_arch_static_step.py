"""Steps of unchanging shapes equal plain steps, wait for nothing, and are captured once for each bucket."""

import copy

import pytest
import torch
from conftest import DECODERS, WINDOW, Counted, build, small, tokens
from test_arch_block import block_config, build_block
from test_arch_block_parts import BOUNDED, build_part
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from arch import ModelConfig, allocate, generate, generation, static_step
from arch import build as build_model
from arch.buffers import write_slot, zero_slots
from arch.compression.compressed import allocate_compressed
from arch.compression.method import parse_method
from arch.static_step import (
    Recorder,
    StaticBlockStep,
    StaticStep,
    block_logits,
    bucket,
    step_fn,
    step_logits,
    token_logits,
)

BLOCK_MODELS = {
    "block": lambda: build(small("block")),
    "start, windows": lambda: build_block(block_config("start", "mixed", "mixed")),
    "start, summation": lambda: build_block(block_config("start_summation", "gqa", "mla")),
    "one token": lambda: build_block(block_config("length1", "cla2")),
    "three of a prefix": lambda: build_block(block_config("prefix3_narrow", "mla", "gqa")),
    "cross, start": lambda: build_part("cross", "lookup", start=True),
    "cross, bounded": lambda: build_part("cross", "cls", fine=BOUNDED),
    "bounded twice": lambda: build_block(bounded_twice()),
}


def bounded_twice() -> ModelConfig:
    config = block_config("prefix1")
    for part in (config.arch, config.arch.block.token):
        part.stores, part.pattern = copy.deepcopy(BOUNDED)
    return config


@pytest.mark.parametrize("name", ["cla2", "block"])
def test_by_itself_a_compressed_cache_takes_plain_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model would take static ones, as on CUDA."""
    model, prompts = build(small(name)), [[1, 2, 3, 4], [5, 6, 7, 8]]
    monkeypatch.setattr(static_step, "choose_way", lambda model, way: "static" if way == "auto" else way)

    def written(steps: str) -> list[list[int]]:
        cache = allocate_compressed(model.plan, 2, 20, dtype=torch.float32, method=parse_method("int8"))
        return generate(model, prompts, 9, cache=cache, steps=steps)

    assert written("auto") == written("plain")
    with pytest.raises(ValueError, match="a compressed cache takes no steps in unchanging shapes"):
        written("static")


@pytest.mark.parametrize(
    ("name", "starts"),
    [*((name, (0, 5, 11)) for name in DECODERS), *((name, None) for name in ("mixattention", "mla", "bct"))],
)
def test_static_steps_equal_the_forward(
    name: str, starts: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the window's edge and from bucket to bucket, with rows that begin late."""
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 4)
    model, length, first = build(small(name)), 3 * WINDOW, 3
    batch = tokens(3, length)
    with torch.no_grad():
        start_B = None if starts is None else torch.tensor(starts)
        cache = allocate(model.plan, 3, length, dtype=torch.float64, start_B=start_B)
        model(batch[:, :first], cache)
        step = StaticStep(model, cache, "static")
        logits = torch.cat([step(token) for token in batch[:, first:].split(1, dim=1)], dim=1)
        assert cache.length == length
        for row, start in enumerate(starts or (0, 0, 0)):
            alone, begin = model(batch[row : row + 1, start:]), max(first, start)
            torch.testing.assert_close(
                logits[row : row + 1, begin - first :], alone[:, begin - start :], rtol=0, atol=1e-10
            )


def test_buckets() -> None:
    assert [bucket(length, 5000) for length in (1, 256, 257, 4096, 4097)] == [256, 256, 512, 4096, 5000]


@pytest.mark.parametrize("name", ["mixattention", "swa_sinks", "mla", "bct", "bct_gated", "bct_ring", "qwen3_next"])
def test_a_static_step_waits_for_nothing(name: str) -> None:
    """No value of a tensor decides what is computed: those of fake tensors cannot be asked for."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        model = build_model(small(name), init=False).eval()
        cache = allocate(model.plan, 2, 64, dtype=torch.float32, start_B=torch.zeros(2, dtype=torch.int64))
        cache.position, cache.num_slots = torch.tensor([9]), 64
        with torch.no_grad():
            assert step_logits(model, cache, torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 1, 61)


def test_generation_by_static_steps_is_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 4)
    model, prompts = build(small("mixattention")), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    for how in ({}, {"temperature": 1.3, "seed": 2}):
        assert generate(model, prompts, 9, steps="static", **how) == generate(model, prompts, 9, steps="plain", **how)
    cache = model.allocate_cache(1, 7)
    generate(model, prompts[:1], 3, steps="static", cache=cache)
    with torch.no_grad():
        model(tokens(1, 2), cache)  # goes on with steps of any length
    assert cache.length == 7


def test_a_compiled_step_is_one_graph_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced once for each bucket, without a break, for one cache after the other."""
    torch._dynamo.reset()
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    compiled = torch.compile(step_logits, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(static_step, "compiled", lambda logits: compiled)
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 8)
    model, prompts = build(small("mixattention")), [[1, 2, 3], [4]]
    expected = generate(model, prompts, 10, steps="plain")
    for _ in range(2):
        assert generate(model, prompts, 10, steps="compiled") == expected
    assert len(traced) == 2


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 4)])
def test_compiled_code_writes_a_slot_without_copying_the_cache(shape: tuple[int, ...]) -> None:
    """Of a result in another order than the cache's memory the compiler would make a copy for the readers."""

    def write(tensor: torch.Tensor, value: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        write_slot((tensor,), (value,), slot)
        return tensor.clone()  # stands for a reader

    cache = zero_slots(shape, torch.float32, "cpu")
    inputs = cache, torch.ones(shape[0], *shape[2:]), torch.tensor([3])
    graph = make_fx(functionalize(write), decomposition_table=select_decomp_table())(*inputs)
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.index_put.default in operators
    assert operators.count(torch.ops.aten.clone.default) == 1, graph.code
    write(*inputs)
    assert cache[:, 3].eq(1).all() and cache.sum() == inputs[1].numel()


def test_a_model_of_which_a_part_is_elsewhere_takes_plain_steps() -> None:
    """FSDP2 has the output matrix whole after a forward pass, and the blocks in parts."""
    model = build(small("mha")).eval()
    cache, norm = model.allocate_cache(1, 4), model.layers[0].attn_norm
    norm.weight = torch.nn.Parameter(TwoTensor(norm.weight.detach(), norm.weight.detach()))
    with pytest.raises(ValueError, match="needs a model of ours, of which no process holds a part"):
        step_fn(model, cache, "static")


class FakeGraph:
    """Runs what was recorded, as a graph on CUDA would."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1
        self.logits.copy_(self.run())


def test_a_graph_is_captured_for_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph of CUDA replaced: rehearsals change no state, replays read the tokens and the position of now."""
    captured = []

    def capture(self: Recorder, tokens_B1: torch.Tensor) -> tuple:
        graph = FakeGraph()
        graph.run = lambda: step_logits(self.model, self.cache, tokens_B1)
        graph.logits = torch.zeros(len(tokens_B1), 1, 61, dtype=torch.float64)
        captured.append(self.cache.num_slots)
        return graph, graph.logits

    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 8)
    monkeypatch.setattr(Recorder, "capture", capture)
    model, batch = build(small("bct_mixed")), tokens(2, 20)
    with torch.no_grad():
        expected = model(batch)
        cache = allocate(model.plan, 2, 20, dtype=torch.float64)
        model(batch[:, :3], cache)
        step = StaticStep(model, cache, "graph")
        logits = torch.cat([step(token).clone() for token in batch[:, 3:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected[:, 3:], rtol=0, atol=1e-10)
    assert captured == [8, 16, 20]
    assert FakeGraph.replays == 17


def test_what_cannot_be_static() -> None:
    model = build(small("mha"))
    for way, message in (
        ("fast", "steps is 'fast'; choose auto, plain"),
        ("graph", "steps=graph needs a model on CUDA"),
    ):
        for given in (model, build(small("block"))):
            with pytest.raises(ValueError, match=message):
                step_fn(given, given.allocate_cache(1, 8), way)


@pytest.mark.parametrize("name", BLOCK_MODELS)
@pytest.mark.parametrize("starts", [None, (0, 2, 1)])
def test_static_steps_of_a_block_transformer_are_its_plain_ones(
    name: str, starts: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the prompt's place in its block, from bucket to bucket, with rows that begin late; and plain steps go on
    from where static ones ended."""
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 2)
    model = BLOCK_MODELS[name]()
    block = model.plan.block_length
    batch, first = tokens(3, 8 * block), 3 * block + block // 2
    start_B = None if starts is None else torch.tensor(starts)
    found = {}
    with torch.no_grad():
        for way in ("plain", "static"):
            cache = model.allocate_cache(3, 8 * block, start_B=None if start_B is None else start_B.clone())
            model.prefill(batch[:, :first], cache)
            step = step_fn(model, cache, way)
            logits = [step(token) for token in batch[:, first : 6 * block + 1].split(1, dim=1)]
            step.close()
            logits += [model.decode_step(token, cache) for token in batch[:, 6 * block + 1 :].split(1, dim=1)]
            found[way] = torch.cat(logits, dim=1)
    torch.testing.assert_close(found["static"], found["plain"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["block", "start, summation", "cross, start", "bounded twice"])
def test_a_static_step_of_a_block_transformer_waits_for_nothing(name: str) -> None:
    model = BLOCK_MODELS[name]()
    block = model.plan.block_length
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        cache = model.allocate_cache(2, 8 * block, start_B=torch.zeros(2, dtype=torch.int64))
        model(torch.zeros(2, 2 * block, dtype=torch.int64), cache, last_only=True)
        StaticBlockStep(model, cache, "static")
        cache.blocks.num_slots = 4
        assert block_logits(model, cache, torch.zeros(2, block, dtype=torch.int64)).shape[:2] == (2, 1)
        if block > 1:
            assert token_logits(model, cache, torch.zeros(2, 1, dtype=torch.int64)).shape[:2] == (2, 1)


def test_two_graphs_decode_a_block_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graphs of CUDA replaced, and compiled: one for each bucket of blocks, and one within blocks."""
    torch._dynamo.reset()
    captured, traced = [], []

    def capture(self: Recorder, given: torch.Tensor) -> tuple:
        graph = FakeGraph()
        graph.run = lambda: self.logits(self.model, self.cache, given)
        graph.logits = torch.zeros(len(given), 1, 61, dtype=torch.float64)
        captured.append(self.logits)
        return graph, graph.logits

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    compiled = {
        logits: torch.compile(logits, fullgraph=True, dynamic=False, backend=backend)
        for logits in (block_logits, token_logits)
    }
    monkeypatch.setattr(Recorder, "capture", capture)
    monkeypatch.setattr(static_step, "compiled", compiled.get)
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 4)
    model = build(small("block"))
    block = model.plan.block_length
    prompts = [tokens(1, length)[0].tolist() for length in (block + 1, 2 * block)]
    expected = generate(model, prompts, 6 * block)
    assert generate(model, prompts, 6 * block, steps="compiled") == expected
    assert len(traced) == 3
    batch = tokens(2, 7 * block)
    with torch.no_grad():
        plain, graphs = (model.allocate_cache(2, 7 * block) for _ in range(2))
        for cache in (plain, graphs):
            model.prefill(batch[:, :block], cache)
        step = StaticBlockStep(model, graphs, "graph")
        for token in batch[:, block:].split(1, dim=1):
            torch.testing.assert_close(step(token), model.decode_step(token, plain), rtol=0, atol=1e-12)
    assert captured.count(token_logits) == 1 and captured.count(block_logits) == 2


@pytest.mark.parametrize("name", BLOCK_MODELS)
@pytest.mark.parametrize("steps", ["plain", "static"])
def test_rows_of_a_block_transformer_are_refilled(name: str, steps: str) -> None:
    """Between blocks: prompts of less than a block, of whole blocks, of more tokens, each continued as it is alone."""
    model = BLOCK_MODELS[name]()
    block = model.plan.block_length
    lengths = [block + 1, 2 * block, 1, 3 * block + 2, block, 2]
    prompts = [tokens(1, length)[0].tolist() for length in lengths]
    alone = [row for prompt in prompts for row in generate(model, [prompt], 6, pad_token=3)]
    stop = alone[1][2]
    stopped = [row[: row.index(stop)] if stop in row else row for row in alone]
    assert generate(model, prompts, 6, max_batch=1 if steps == "static" else 4, steps=steps, pad_token=3) == alone
    assert generate(model, prompts, 6, max_batch=2, steps=steps, pad_token=3, stop_token=stop) == stopped

    counted, follow = [row[: number + 1] for number, row in enumerate(alone)], Counted()
    assert generate(model, prompts, 6, max_batch=2, steps=steps, pad_token=3, follow=follow) == counted
    assert [follow.given[number] for number in range(len(prompts))] == counted, "no tokens of the prompts"


@pytest.mark.parametrize("max_batch", [1, 2])
def test_rows_are_refilled_on_a_device_that_works_ahead(max_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked every 16 tokens, and a Block Transformer takes rows between blocks: prompts that end within one."""
    model = build(small("mha")), next(iter(BLOCK_MODELS.values()))()
    for each in model:
        prompts = [tokens(1, length)[0].tolist() for length in (5, 9, 4, 13)]
        alone = [row for prompt in prompts for row in generate(each, [prompt], 22)]
        with monkeypatch.context() as patch:
            patch.setattr(generation, "works_ahead", lambda device: True)
            assert generate(each, prompts, 22, max_batch=max_batch) == alone


def test_steps_end_with_an_error_too() -> None:
    """The cache goes on with steps of any length."""
    model = build(small("mha"))
    cache = model.allocate_cache(1, 9)

    def fails(_: object) -> list[int]:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        generate(model, [[1, 2, 3]], 7, steps="static", cache=cache, follow=fails)
    with torch.no_grad():
        assert model(tokens(1, 2), cache).shape[1] == 2
