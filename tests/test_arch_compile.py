"""A compiled block is one graph, which what a run does in turn does not compile again. Breaks and compilations are
silent: a layout that falls into pieces trains at a fraction of its speed."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ARCHS, BLOCKS, build, small, tokens

from arch import ModelConfig, resolve
from train.parallel import parallelize

LENGTH = 16  # two chunks of a bounded store, which a graph repeats for each


def kinds(name: str, **size: int) -> list[str]:
    """The kind of each block of a layout, as far as the code tells kinds apart: of key/value heads only whether queries
    share them, of angles only whether there are any. Everything else of a store makes a kind of its own."""
    found = []
    config = small(name, **size)
    for number, stack in enumerate(resolve(config).stacks):
        plan = stack.plan
        for layer, owner in enumerate(plan.owners):
            store = plan.store(layer)
            spec = asdict(replace(store, owner=0, name="", rope_theta=float(store.rope_theta > 0)))
            spec["slot"]["kv_heads"] = min(1, store.slot.kv_heads) + (store.slot.kv_heads >= config.size.num_heads)
            found.append(f"{number} {owner == layer} {type(store).__name__} {spec}")
    return found


def covering() -> dict[str, set[str]]:
    """Layouts that together have every kind of block, each with the kinds that none before it has."""
    missing = {name: set(kinds(name)) for name in ARCHS}
    chosen: dict[str, set[str]] = {}
    while any(missing.values()):
        best = max(missing, key=lambda name: len(missing[name]))
        chosen[best] = missing[best]
        missing = {name: rest - chosen[best] for name, rest in missing.items()}
    return chosen


COVERING = covering()


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
