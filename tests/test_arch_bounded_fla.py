"""Flash-linear-attention's kernel in place of the chunk form: against a stand-in on the CPU, and as it is on CUDA."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build, small, tokens
from torch import Tensor

from arch import ArchConfig, Decoder, ModelConfig, StoreConfig, allocate
from arch.fla_backend import entry_point, kernel


def layout(slots: int = 16, rule: str = "gated", sinks: bool = False) -> ModelConfig:
    """Two layers, the second of which reads the slots of the first."""
    window = 4 if rule == "ring_slots" else None
    store = StoreConfig(2, window=window, slots=slots, rule=rule, sinks=sinks)
    return small(ArchConfig({"kv": store}, ["new kv", "reuse kv"]), num_layers=2, head_dim=16, window=None)


def naive(calls: list[SimpleNamespace]) -> Any:
    """The recurrence token by token, of the signature that fla.ops.gsa.chunk_gsa has in version 0.6."""

    def chunk_gsa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        initial_state: tuple[Tensor, Tensor] | None = None,
        output_final_state: bool = False,
        checkpoint_level: int = 2,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[None]]:
        calls.append(SimpleNamespace(**locals()))
        hk = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], s.shape[-1])
        hv = q.new_zeros(q.shape[0], q.shape[2], s.shape[-1], v.shape[-1])
        out = []
        for t in range(q.shape[1]):
            kept = g[:, t].exp()
            hk = hk * kept[..., None, :] + k[:, t, ..., None] * s[:, t, ..., None, :]
            hv = hv * kept[..., None] + s[:, t, ..., None] * v[:, t, ..., None, :]
            share = torch.einsum("bnk,bnkm->bnm", q[:, t] * scale, hk).softmax(-1)
            out.append(torch.einsum("bnm,bnmv->bnv", share, hv))
        return torch.stack(out, dim=1), [None, None]

    return chunk_gsa


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    seen: list[SimpleNamespace] = []
    monkeypatch.setitem(sys.modules, "fla.ops.gsa", SimpleNamespace(chunk_gsa=naive(seen)))
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops", SimpleNamespace())
    for cached in (entry_point, kernel):
        cached.cache_clear()
    yield seen
    for cached in (entry_point, kernel):
        cached.cache_clear()


def with_fla(config: ModelConfig, own: Decoder) -> Decoder:
    model = Decoder(config, "fla", "cuda").to(torch.float64)
    model.load_state_dict(own.state_dict())
    return model


def test_the_call_and_what_comes_of_it(calls: list[SimpleNamespace]) -> None:
    """Logits and gradients are those of the chunk form; heads are repeated, strengths shared, the scale ours."""
    config, batch = layout(), tokens(2, 37)
    own = build(config)
    model = with_fla(config, own)
    assert model.attention() == "kv: fla (flash-linear-attention's gated slot attention)"
    ours, theirs = own(batch), model(batch)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, mine), other in zip(own.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad, rtol=0, atol=1e-12, msg=name)
    assert len(calls) == 2, "once for each layer that reads"
    call = calls[0]
    assert [tuple(x.shape) for x in (call.q, call.k, call.v, call.s, call.g)] == [(2, 37, 8, 16)] * 5
    assert call.scale == 16**-0.5
    assert call.initial_state is None and call.cu_seqlens is None and not call.kwargs
    torch.testing.assert_close(call.g, (1 - call.s).log(), rtol=0, atol=1e-12)
    assert torch.equal(call.k[:, :, :4], call.k[:, :, :1].expand(-1, -1, 4, -1)), "query heads 0 to 3 read key head 0"


def test_half_precision_keeps_states_in_fp32(calls: list[SimpleNamespace]) -> None:
    config = layout()
    model = Decoder(config, "fla", "cuda")
    model.init_weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(1, 20))
    assert {x.dtype for x in (calls[0].q, calls[0].k, calls[0].v, calls[0].s, calls[0].g)} == {torch.float32}


def test_a_compiled_block_breaks_but_around_the_kernel(calls: list[SimpleNamespace]) -> None:
    config, batch, graphs = layout(), tokens(2, 24), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = Decoder(config, "fla", "cuda")
    model.init_weights()
    expected = model(batch)
    reasons = torch._dynamo.utils.counters["graph_break"]
    reasons.clear()
    for block in model.layers:
        block.compile(backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(batch).float(), expected, rtol=0.1, atol=0.1)
    assert graphs
    assert {call.q.dtype for call in calls} == {torch.float32}
    assert all("disable()" in reason for reason in reasons), reasons


def test_decoding_is_ours(calls: list[SimpleNamespace]) -> None:
    config, batch = layout(), tokens(2, 24)
    own = build(config)
    model = with_fla(config, own)
    with torch.no_grad():
        cache = allocate(model.plan, 2, 24, dtype=torch.float64)
        logits = torch.cat([model(part, cache) for part in batch.split([17, 1, 6], dim=1)], dim=1)
        assert not calls
        torch.testing.assert_close(logits, own(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        (layout(), "cpu", "arch.stores.kv on cpu: fla lacks device cpu"),
        (layout(slots=24), "cuda", "fla lacks 24 slots"),
        (layout(rule="ring_router"), "cuda", "fla lacks rule ring_router"),
        (layout(rule="ring_slots", sinks=True), "cuda", "fla lacks rule ring_slots, sinks"),
        (small("mha"), "cuda", "backend fla is for bounded stores"),
    ],
)
def test_refusals(calls: list[SimpleNamespace], config: ModelConfig, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(config, "fla", device)


def test_what_is_missing_is_said(calls: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.gsa", None)
    with pytest.raises(ValueError, match=r"fla lacks a way to run: flash-linear-attention cannot be loaded .*\[fla\]"):
        Decoder(layout(), "fla", "cuda")


def test_documents_are_refused(calls: list[SimpleNamespace]) -> None:
    model = Decoder(layout(), "fla", "cuda")
    with pytest.raises(ValueError, match="fla lacks documents"):
        model(tokens(1, 8), segment_ids_BT=torch.tensor([[0] * 3 + [1] * 5]))


@pytest.mark.parametrize("name", ["auto", "reference", "flash"])
def test_other_backends_leave_bounded_stores_as_they_are(calls: list[SimpleNamespace], name: str) -> None:
    assert Decoder(layout(), name, "cuda").attention() == "kv: chunks (bounded, plain torch)"
