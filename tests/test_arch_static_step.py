"""Steps of unchanging shapes equal plain steps, wait for nothing, and are captured once for each bucket."""

import pytest
import torch
from conftest import DECODERS, WINDOW, build, small, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from arch import allocate, generate, static_step
from arch import build as build_model
from arch.static_step import StaticStep, bucket, step_fn, step_logits

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("name", ["mixattention", "swa_sinks", "mla", "bct", "bct_gated", "bct_ring"])
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
    monkeypatch.setattr(static_step, "compiled_logits", lambda: compiled)
    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 8)
    model, prompts = build(small("mixattention")), [[1, 2, 3], [4]]
    expected = generate(model, prompts, 10, steps="plain")
    for _ in range(2):
        assert generate(model, prompts, 10, steps="compiled") == expected
    assert len(traced) == 2


class FakeGraph:
    """Runs what was recorded, as a graph on CUDA would."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1
        self.logits.copy_(self.run())


def test_a_graph_is_captured_for_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph of CUDA replaced: rehearsals change no state, replays read the tokens and the position of now."""
    captured = []

    def capture(self: StaticStep, tokens_B1: torch.Tensor) -> tuple:
        graph = FakeGraph()
        graph.run = lambda: step_logits(self.model, self.cache, tokens_B1)
        graph.logits = torch.zeros(len(tokens_B1), 1, 61, dtype=torch.float64)
        captured.append(self.cache.num_slots)
        return graph, graph.logits

    monkeypatch.setattr(static_step, "SMALLEST_BUCKET", 8)
    monkeypatch.setattr(StaticStep, "capture", capture)
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
    model, block = build(small("mha")), build(small("block"))
    for given, way, message in (
        (model, "fast", "steps is 'fast'; choose auto, plain"),
        (model, "graph", "steps=graph needs a model on CUDA"),
        (block, "static", "no Block Transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            step_fn(given, given.allocate_cache(1, 8), way)
    assert step_fn(block, block.allocate_cache(1, 8)) is not None


def test_rows_of_a_block_transformer_cannot_be_refilled() -> None:
    model, prompts = build(small("block")), [[1] * 4, [2] * 4]
    with pytest.raises(ValueError, match="max_batch is 1 for 2 prompts: rows of a Block Transformer"):
        generate(model, prompts, 4, max_batch=1)
    assert generate(model, prompts, 4, max_batch=2) == generate(model, prompts, 4)
