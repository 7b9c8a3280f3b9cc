"""Backends agree with the definition on all they claim, forward and backward, and refuse the rest."""

import math

import pytest
import torch
from conftest import build, small, tokens

from arch.attend import BACKENDS, Backend, Mask, causal_mask, choose, reference, visible
from arch.decoder import Decoder, attention_needs


def naive(q, k, v, mask, scale, sinks):
    """Softmax attention one query and head at a time, in fp64."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            for n in range(heads):
                if mask.causal:
                    seen = list(range(t + 1))
                else:
                    row = mask.allowed if mask.allowed is None or mask.allowed.ndim == 2 else mask.allowed[b, 0]
                    seen = list(range(k.shape[1])) if row is None else row[t].nonzero().flatten().tolist()
                scores = [float(q[b, t, n] @ k[b, s, n // group]) * scale for s in seen]
                top = max([*scores, -math.inf if sinks is None else float(sinks[n].detach())])
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[n].detach()) - top))
                for weight, s in zip(weights, seen, strict=True):
                    out[b, t, n] += weight / total * v[b, s, n // group]
    return out


MASKS = {
    "causal": (9, 9, lambda: causal_mask(9, None, torch.device("cpu"))),
    "window": (9, 9, lambda: causal_mask(9, 4, torch.device("cpu"))),
    "step": (1, 9, lambda: Mask(causal=False, allowed=None)),
    "chunk": (3, 9, lambda: Mask(False, visible(torch.arange(6, 9), torch.arange(9), 5))),
    "ragged": (9, 9, lambda: Mask(False, visible(torch.arange(9), torch.arange(9), None, torch.tensor([0, 4])))),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 8), (2, 8), (1, 8), (1, 12)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_the_definition(name: str, mask: str, kv_heads: int, value_width: int, sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    new, slots, make = MASKS[mask]
    shapes = ((2, new, 4, 8), (2, slots, kv_heads, 8), (2, slots, kv_heads, value_width))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    logits = torch.randn(4, generator=generator).requires_grad_() if sinks else None
    out = BACKENDS[name].attend(*inputs, make(), 8**-0.5, logits)
    torch.testing.assert_close(out.double(), naive(*inputs, make(), 8**-0.5, logits), rtol=0, atol=1e-5)

    weight = torch.randn(out.shape, generator=generator)
    wanted = [*inputs, *([logits] if sinks else [])]
    gradients = torch.autograd.grad((out * weight).sum(), wanted)
    doubles = [tensor.detach().double().requires_grad_() for tensor in wanted]
    expected = reference(*doubles[:3], make(), 8**-0.5, doubles[3] if sinks else None)
    for ours, exact in zip(gradients, torch.autograd.grad((expected * weight).sum(), doubles), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink", [None, 3.0, 30.0])
@pytest.mark.parametrize("name", BACKENDS)
def test_half_precision_stays_close(name: str, sink: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, 4, 64, generator=generator).bfloat16() for _ in range(3))
    mask = causal_mask(16, 5, torch.device("cpu"))
    sinks = None if sink is None else torch.full((4,), sink)
    exact = reference(q.double(), k.double(), v.double(), mask, 0.125, None if sink is None else sinks.double())
    half = BACKENDS[name].attend(q, k, v, mask, 0.125, sinks)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value_width", [8, 12])
def test_sdpa_gets_what_fused_kernels_take(value_width: int, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one width: with two, torch quietly takes its slow path."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append({q.shape[-1], k.shape[-1], v.shape[-1]})
        return fused(q, k, v, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, value_width)
    mask = causal_mask(5, 3, torch.device("cpu"))
    out = BACKENDS["sdpa"].attend(q, k, v, mask, 1.0, torch.zeros(4) if sinks else None)
    assert out.shape[-1] == value_width
    assert [len(widths) for widths in seen] == [1]


def test_whole_models_agree_over_backends(arch: str) -> None:
    config, batch = small(arch), tokens(2, 15)
    logits = {}
    for name in BACKENDS:
        model = build(config, torch.float64, name)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
                parameter.copy_(torch.linspace(-2, 2, parameter.numel()))
            logits[name] = model(batch)
    torch.testing.assert_close(logits["sdpa"], logits["reference"], rtol=0, atol=1e-10)


def test_what_is_not_claimed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Backend("poor", reference, devices=frozenset({"cuda"}), windows=False, sinks=False)
    monkeypatch.setitem(BACKENDS, "poor", poor)
    with pytest.raises(ValueError, match="poor lacks sinks, windows, device cpu"):
        Decoder(small("swa_sinks"), "poor")
    with pytest.raises(ValueError, match="poor lacks device cpu"):
        Decoder(small("mha"), "poor")
    with pytest.raises(ValueError, match="no attention backend 'fast'; choose auto, sdpa, reference, poor"):
        choose("fast", set(), "cpu")
    assert choose("auto", {"windows", "sinks"}, "cpu").name == "sdpa"


def test_needs_come_from_the_plan() -> None:
    needs = {name: attention_needs(build(small(name)).plan) for name in ("mha", "swa", "swa_sinks", "mla")}
    assert needs == {
        "mha": set(),
        "swa": {"windows"},
        "swa_sinks": {"windows", "sinks"},
        "mla": {"uneven_value_width"},
    }


def test_sinks_take_weight_away() -> None:
    model = build(small("swa_sinks"))
    batch = tokens(1, 12)
    with torch.no_grad():
        before = model(batch)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
        none = model(batch)
        plain = build(small("swa"))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("sinks")})
        torch.testing.assert_close(none, plain(batch), rtol=0, atol=1e-10)
    assert not torch.allclose(before, none)
