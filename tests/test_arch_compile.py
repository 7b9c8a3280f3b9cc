"""A compiled block is one graph, which what a run does in turn does not compile again. Breaks and compilations are
silent: a layout that falls into pieces trains at a fraction of its speed."""

from collections.abc import Callable

import pytest
import torch
from conftest import ARCHS, BLOCKS, build, covering, kinds, small, tokens

from arch import ModelConfig, generate
from train.parallel import parallelize

LENGTH = 16  # two chunks of a bounded store, which a graph repeats for each


COVERING = covering(ARCHS)


def shallow(name: str) -> ModelConfig:
    """The fewest layers that have every kind of block."""
    depths = range(2, small(name).size.num_layers + 1, 2 if name in BLOCKS else 1)
    depth = next(depth for depth in depths if set(kinds(name, num_layers=depth)) == set(kinds(name)))
    return small(name, num_layers=depth)


@pytest.mark.parametrize("name", COVERING)
def test_a_block_is_one_graph_in_training_validation_and_documents(name: str) -> None:
    """`fullgraph` raises on a break; the second round of train, accumulate, validate and documents compiles nothing."""
    torch._dynamo.reset()
    model = build(shallow(name), torch.float32)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph

    parallelize(model, activation_checkpointing=False, compile_blocks=True, mesh=None, dtype=torch.float32)
    layers = [block for stack in model.stacks for block in stack.layers]
    kind_of = zip(kinds(name, num_layers=len(layers)), layers, strict=True)
    blocks = {kind: block for kind, block in kind_of if kind in COVERING[name]}  # one of each; the rest runs uncompiled
    assert blocks.keys() == COVERING[name]
    for module in (*layers, *(stack.norm for stack in model.stacks)):
        module._compiled_call_impl = None
    for block in blocks.values():
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    batch, documents = tokens(2, LENGTH), torch.arange(LENGTH).div(LENGTH // 2, rounding_mode="floor").expand(2, -1)

    def round_of_a_run() -> int:
        before = len(graphs)
        # Training, an accumulated micro-batch, validation, documents, which a Block Transformer cannot keep apart.
        for segments in (None, None, None if name in BLOCKS else documents):
            model.train()(batch, segment_ids_BT=segments).square().mean().backward()
        with torch.no_grad():
            model.eval()(batch)
        return len(graphs) - before

    assert 0 < round_of_a_run() <= 3 * len(blocks)
    assert round_of_a_run() == 0


@pytest.mark.parametrize("name", ["cla2", "block"])
def test_what_evaluates_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model compiled for training: each length and batch would be a variant. Nor is a sharded one in inference
    mode, in which FSDP would gather weights that cannot be trained."""
    model, graphs, modes = build(small(name)), [], set()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    blocks = [block for stack in model.stacks for block in stack.layers]
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
        block.register_forward_pre_hook(lambda *_: modes.add(torch.is_inference_mode_enabled()))
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    with monkeypatch.context() as sharded:
        sharded.setattr(type(model), "takes_static_steps", False)
        written = generate(model.train(), prompts, 9)
    assert not graphs and modes == {False} and model.training
    assert written == generate(model, prompts, 9) == generate(build(small(name)), prompts, 9)
    assert not graphs and modes == {False, True}
    with torch.no_grad():
        model(tokens(2, LENGTH))
    assert graphs, "it is compiled again afterwards"
