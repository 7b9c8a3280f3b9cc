"""Flash-linear-attention's kernel as it is on CUDA, against our chunk form."""

import pytest
import torch
from conftest import build, tokens
from test_arch_bounded_fla import layout

from arch import Decoder
from arch.bounded_fla import ENTRY_POINT
from arch.fla_backend import entry_point


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slots", [16, 64, 256])
def test_kernel_is_the_chunk_form(slots: int) -> None:
    """The model in fp32 against ours in fp64, forward and backward; products of the kernel may run in TF32."""
    if isinstance(found := entry_point(*ENTRY_POINT), str):
        pytest.skip(found)
    config, batch = layout(slots), tokens(2, 300).cuda()
    own = build(config).cuda()
    model = Decoder(config, "fla", "cuda").cuda()
    model.load_state_dict(own.state_dict())
    results = []
    for one in (own, model):
        out = one(batch)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in one.parameters())])
    for exact, found in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found.double() - exact).norm() < 1e-2 * exact.norm() + 1e-9
