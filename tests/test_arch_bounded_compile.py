"""A compiled block is one graph, which what a run does in turn does not compile again. Breaks and compilations are
silent: a layout that falls into pieces trains at a fraction of its speed."""

from collections.abc import Callable

import pytest
import torch
from conftest import ARCHS, build, small, tokens

from arch.decoder import Block
from train.parallel import parallelize

BOUNDED = [name for name in ARCHS if name.startswith("bct")]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHS if name not in BOUNDED]
LENGTH = 24
LAYERS = {"bct": 1, "bct_gated": 1, "bct_ring": 1, "bct_mixed": 3}  # a block of each kind


@pytest.mark.parametrize("name", [*BOUNDED, *OTHERS])
def test_a_block_is_one_graph_in_training_validation_and_documents(name: str) -> None:
    """`fullgraph` raises on a break; the second round of train, accumulate, validate and documents compiles nothing."""
    torch._dynamo.reset()
    config = small(name) if name.startswith("block") else small(name, num_layers=LAYERS.get(name, 4))
    model = build(config, torch.float32)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph

    parallelize(model, activation_checkpointing=False, compile_blocks=True, mesh=None, dtype=torch.float32)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    batch, documents = tokens(2, LENGTH), torch.arange(LENGTH).div(LENGTH // 2, rounding_mode="floor").expand(2, -1)

    def round_of_a_run() -> int:
        before = len(graphs)
        for segments in (None, None, documents):  # training, an accumulated micro-batch, documents
            model.train()(batch, segment_ids_BT=segments).square().mean().backward()
            with torch.no_grad():
                model.eval()(batch, segment_ids_BT=segments)
        return len(graphs) - before

    assert 0 < round_of_a_run() <= 4 * len(blocks)
    assert round_of_a_run() == 0
