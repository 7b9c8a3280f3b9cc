"""Bounded stores on CUDA, compiled block by block as in training, against uncompiled ones of the definition."""

import pytest
import torch
from conftest import small
from test_arch_block_gpu import losses_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["bct", "bct_gated", "bct_ring", "bct_mixed"])
def test_compiled_blocks_train_as_the_definition(name: str) -> None:
    """In bf16: slots by products in TF32, a window by FlexAttention merged with them; against both in plain torch."""
    config = small(name, head_dim=32, num_layers=5)
    losses, ours = losses_and_gradients(config, "auto", compiled=True)
    expected, exact = losses_and_gradients(config, "reference", compiled=False)
    assert losses == pytest.approx(expected, rel=0.01)
    for parameter, gradient in exact.items():
        assert (ours[parameter] - gradient).norm() < 0.08 * gradient.norm() + 1e-6, parameter
