"""Backends agree with the definition on all they claim, forward and backward, and refuse the rest."""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import build, small, tokens
from torch.nn.attention import SDPBackend

import arch.attend
from arch import Decoder, spans
from arch.attend import BACKENDS, Backend, Needs, attend, reference, sdpa, sdpa_batched, select_backend, takes_widths
from arch.attend_kernels import flash_functions
from arch.attention import attention_needs
from arch.masks import Dense, SequenceBatch, Windowed, dense, visible, windowed

CPU = torch.device("cpu")
DENSE = {"sdpa": sdpa, "reference": reference}  # the kernels that take any mask, and run anywhere
DOCUMENTS = torch.tensor([[0] * 2 + [1] * 6 + [2], [0] * 9])


def needs(*features: str, width: int = 64) -> Needs:
    return Needs(frozenset(features), (width,))


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


def own(window: int | None, documents: torch.Tensor | None = None) -> Callable[[], Dense]:
    return lambda: dense(SequenceBatch(2, 9, documents, CPU), window)


MASKS = {
    "causal": (9, 9, own(None)),
    "window": (9, 9, own(4)),
    "documents": (9, 9, own(None, DOCUMENTS)),
    "documents and window": (9, 9, own(4, DOCUMENTS)),
    "step": (1, 9, lambda: Dense(causal=False, allowed=None)),
    "chunk": (3, 9, lambda: Dense(False, visible(torch.arange(6, 9), torch.arange(9), 5))),
    "ragged": (9, 9, lambda: Dense(False, visible(torch.arange(9), torch.arange(9), None, torch.tensor([0, 4])))),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 8), (2, 8), (1, 8), (1, 12)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", DENSE)
def test_dense_backend_is_the_definition(name: str, mask: str, kv_heads: int, value_width: int, sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    new, slots, make = MASKS[mask]
    shapes = ((2, new, 4, 8), (2, slots, kv_heads, 8), (2, slots, kv_heads, value_width))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    logits = torch.randn(4, generator=generator).requires_grad_() if sinks else None
    out = DENSE[name](*inputs, make(), 8**-0.5, logits)
    torch.testing.assert_close(out.double(), naive(*inputs, make(), 8**-0.5, logits), rtol=0, atol=1e-5)

    weight = torch.randn(out.shape, generator=generator)
    wanted = [*inputs, *([logits] if sinks else [])]
    gradients = torch.autograd.grad((out * weight).sum(), wanted)
    doubles = [tensor.detach().double().requires_grad_() for tensor in wanted]
    expected = reference(*doubles[:3], make(), 8**-0.5, doubles[3] if sinks else None)
    for ours, exact in zip(gradients, torch.autograd.grad((expected * weight).sum(), doubles), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("length", "window", "kv_heads", "value_width"), [(64, 1, 4, 8), (97, 6, 2, 12), (150, 41, 1, 8), (100, 97, 4, 8)]
)
def test_windows_in_blocks_are_the_definition(
    length: int,
    window: int,
    kv_heads: int,
    value_width: int,
    documents: bool,
    sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks and windows that do not divide the length, one block, windows of one token; forward and backward."""
    monkeypatch.setattr(spans, "SHORT_ROW", 64)
    generator = torch.Generator().manual_seed(0)
    cut = (torch.rand(2, length, generator=generator) < 0.05).cumsum(1) if documents else None
    sequences = SequenceBatch(2, length, cut, CPU)
    shapes = [(2, length, 4, 8), (2, length, kv_heads, 8), (2, length, kv_heads, value_width), *[(4,)] * sinks]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    logits = inputs[3] if sinks else None
    mask = BACKENDS["sdpa"].mask(sequences, window, torch.float64)
    assert isinstance(mask.form, Windowed)
    results = []
    for out in (
        attend(*inputs[:3], mask, 8**-0.5, logits),
        reference(*inputs[:3], dense(sequences, window), 8**-0.5, logits),
    ):
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    last = mask.last_query(length)
    assert last is not None
    one = attend(inputs[0][:, -1:], *inputs[1:3], last, 8**-0.5, logits)
    torch.testing.assert_close(one, results[1][0][:, -1:], rtol=0, atol=1e-12)


def test_blocks_look_at_their_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair more than the window and a block for each query, no key copied, one small mask."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((q, k, options.get("attn_mask")))
        return fused(q, k, v, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    length, window, block = 1024, 128, 64
    q, k, v = (torch.randn(2, length, heads, 8) for heads in (4, 2, 2))
    attend(q, k, v, BACKENDS["sdpa"].mask(SequenceBatch(2, length, None, CPU), window, torch.float32), 1.0, None)
    assert [query.shape[2] * keys.shape[2] for query, keys, _ in calls] == [window**2, *[block * (window + block)] * 2]
    assert all(keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for _, keys, _ in calls)
    assert calls[1][2] is calls[2][2] and calls[1][2].shape == (block, window + block)


@pytest.mark.parametrize("sink", [None, 3.0, 30.0])
@pytest.mark.parametrize("name", DENSE)
def test_half_precision_stays_close(name: str, sink: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, 4, 64, generator=generator).bfloat16() for _ in range(3))
    mask = dense(SequenceBatch(2, 16, None, CPU), 5)
    sinks = None if sink is None else torch.full((4,), sink)
    exact = reference(q.double(), k.double(), v.double(), mask, 0.125, None if sink is None else sinks.double())
    half = DENSE[name](q, k, v, mask, 0.125, sinks)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_sinks_of_half_precision_lose_nothing() -> None:
    """Divided by a scale that is no power of two, they are rounded twice, and both parts are kept."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, 4, 96, generator=generator).bfloat16() for _ in range(3))
    mask, sinks = dense(SequenceBatch(2, 32, None, CPU), 16), torch.tensor([3.03, 6.03, 9.06, 12.1]).bfloat16()
    half, single = (sdpa(q, k, v, mask, 96**-0.5, given) for given in (sinks, sinks.float()))
    assert torch.equal(half, single)


@pytest.mark.parametrize(("length", "window", "kv_heads"), [(40, None, 4), (40, 6, 2), (9, 4, 1)])
def test_half_precision_on_the_cpu_has_gradients_of_fp32(length: int, window: int | None, kv_heads: int) -> None:
    """To the bit the outputs of a pass without gradients; gradients within the rounding of the inputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, heads, 16) for heads in (4, kv_heads, kv_heads))
    half = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in half]
    mask = windowed(SequenceBatch(2, length, None, CPU), window)
    out = sdpa(*half, mask, 0.25, None)
    assert "BackwardInFp32" in graph_nodes(out)
    with torch.no_grad():
        assert torch.equal(out, sdpa(*half, mask, 0.25, None))
    weight = torch.randn(out.shape, generator=generator).bfloat16()
    grads = torch.autograd.grad((out * weight).sum(), half)
    true = torch.autograd.grad((sdpa(*exact, mask, 0.25, None) * weight).sum(), exact)
    for grad, expected in zip(grads, true, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - expected).norm() < 4e-3 * expected.norm()


def graph_nodes(out: torch.Tensor) -> str:
    """Names of all nodes of the graph that computed `out`."""
    nodes: set[Any] = set()
    todo: list[Any] = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in nodes)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value_width", [8, 12])
@pytest.mark.parametrize("length", [1, 5])
def test_sdpa_gets_what_fused_kernels_take(
    value_width: int, sinks: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of one width, else torch quietly takes its slow path; a step folds heads into its one query."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append({q.shape[-1], k.shape[-1], v.shape[-1]})
        assert q.shape[-1] % 8 == 0
        assert (q.shape[1] == k.shape[1]) == (length == 1)
        assert options["enable_gqa"] == (length > 1)
        return fused(q, k, v, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    q, k, v = torch.randn(1, length, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, value_width)
    mask = Dense(False, visible(torch.arange(5 - length, 5), torch.arange(5), 3))
    out = sdpa(q, k, v, mask, 1.0, torch.zeros(4) if sinks else None)
    assert out.shape[-1] == value_width
    assert [len(widths) for widths in seen] == [1]


@pytest.mark.parametrize("takes", [False, True])
def test_values_keep_their_width_where_cudnn_takes_it(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of MLA are filled up for FlashAttention alone. Plainly causal, in half precision, forward and backward."""
    seen, fused = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return fused(q, k, v, **options)

    chosen = SDPBackend.CUDNN_ATTENTION if takes else SDPBackend.EFFICIENT_ATTENTION
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    monkeypatch.setattr(arch.attend, "_fused_choice", lambda *shape: chosen.value)
    widths = ("cuda", torch.bfloat16, 24, 16)
    assert takes_widths(*widths) == takes
    assert not takes_widths("cpu", *widths[1:]) and not takes_widths("cuda", torch.float32, 24, 16)
    assert not takes_widths(*widths[:3], 12)
    monkeypatch.setattr(
        arch.attend, "takes_widths", lambda device, *shape: takes_widths("cuda", torch.bfloat16, *shape[1:])
    )
    given = [torch.randn(2, 9, 4, width, dtype=torch.float64, requires_grad=True) for width in (24, 24, 16)]
    results = [kernel(*given, Dense(True, None), 0.2, None) for kernel in (sdpa, reference)]
    assert seen == [(24, 24, 16 if takes else 24)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    for ours, exact in zip(*(torch.autograd.grad(out.square().sum(), given) for out in results), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_whole_models_agree_over_backends(arch: str) -> None:
    config, batch = small(arch), tokens(2, 15)
    logits = {}
    for name in DENSE:
        model = build(config, torch.float64, name)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
                parameter.copy_(torch.linspace(-2, 2, parameter.numel()))
            logits[name] = model(batch)
    torch.testing.assert_close(logits["sdpa"], logits["reference"], rtol=0, atol=1e-10)


def test_flex_on_cpu_is_the_definition() -> None:
    """Unfused and forward only there, but the same masks, grouping, widths and sinks."""
    generator = torch.Generator().manual_seed(0)
    cut = (torch.rand(2, 300, generator=generator) < 0.02).cumsum(1)
    for kv_heads, value_width, window, documents, with_sinks in (
        (4, 16, None, None, False),
        (2, 16, 130, None, True),
        (1, 16, None, cut, True),
        (4, 24, 40, cut, False),
    ):
        shapes = ((2, 300, 4, 16), (2, 300, kv_heads, 16), (2, 300, kv_heads, value_width))
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        sinks = torch.randn(4, generator=generator) if with_sinks else None
        sequences = SequenceBatch(2, 300, documents, CPU)
        out = attend(q, k, v, BACKENDS["flex"].mask(sequences, window, torch.float32), 0.25, sinks)
        exact = reference(q, k, v, dense(sequences, window), 0.25, sinks)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)


def test_flex_in_compiled_blocks_meets_new_documents_without_recompiling() -> None:
    torch._dynamo.reset()
    config = small("mixattention", head_dim=16, window=40)
    models = [Decoder(config, "flex", "cuda"), Decoder(config, "reference")]
    for model in models:
        model.init_weights()
    for block in models[0].layers:
        block.compile(backend="aot_eager", fullgraph=True)
    generator, batch = torch.Generator().manual_seed(0), tokens(2, 150)
    counts = []
    with torch.no_grad():
        for _ in range(4):
            documents = (torch.rand(2, 150, generator=generator) < 0.05).cumsum(1)
            ours, exact = (model(batch, segment_ids_BT=documents) for model in models)
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert len(set(counts)) == 1


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float, left: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of sequences end to end, [total, heads, width], as flash-attn documents it: a query sees `left`
    tokens before itself (-1: all), heads are grouped in order, the logsumexp is [heads, total]."""
    assert bounds.dtype == torch.int32
    assert (int(bounds[0]), int(bounds[-1])) == (0, len(q))
    outs, sums = [], []
    group = q.shape[1] // k.shape[1]
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert 0 <= end - begin <= longest
        index = torch.arange(end - begin)
        distance = index[:, None] - index
        keep = (distance >= 0) & (distance <= (left if left >= 0 else len(q)))
        keys, values = (x[begin:end].repeat_interleave(group, dim=1) for x in (k, v))
        score = torch.einsum("tnh,snh->nts", q[begin:end], keys) * scale
        score = score.masked_fill(~keep, -math.inf)
        sums.append(score.logsumexp(-1))
        outs.append(torch.einsum("nts,snv->tnv", score.softmax(-1), values))
    return torch.cat(outs), torch.cat(sums, dim=-1)


def stand_in(version: int) -> ModuleType:
    """A flash-attn of this version whose kernels are `packed_attention`; other arguments than its own are refused."""
    module = ModuleType("stand_in")
    none = None if version == 4 else -1

    def run(q: Any, k: Any, v: Any, bounds: Any, longest: int, softmax_scale: float, causal: bool, window: Any) -> Any:
        assert causal
        assert window == (none, none) or (window[0] >= 0 and window[1] == 0)
        left = -1 if window[0] is None else window[0]
        return packed_attention(q, k, v, bounds, longest, softmax_scale, left)

    def varlen(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (none, none),
        **more: bool,
    ) -> Any:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert set(more) <= ({"return_lse"} if version == 4 else set())
        out = run(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size)
        return out if version == 4 else out[0]

    def rows(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, window_size: Any = None, **more: bool
    ) -> Any:
        assert set(more) <= ({"return_lse"} if version == 4 else set())
        batch, length = q.shape[:2]
        bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse = run(*flat, bounds, length, softmax_scale, causal, window_size or (none, none))
        out, lse = out.unflatten(0, (batch, length)), lse.unflatten(1, (batch, length)).transpose(0, 1)
        return (out, lse) if version == 4 else out

    module.flash_attn_func, module.flash_attn_varlen_func = rows, varlen
    return module


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CUDA-only package is there, its kernels are emulated, and masks are made for fp64 too."""

    def varlen_attn(
        q: Any,
        k: Any,
        v: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: Any,
        enable_gqa: bool = False,
    ) -> Any:
        assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k and window_size[1] == 0
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return packed_attention(q, k, v, cu_seq_q, max_q, scale, window_size[0])[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    for version, name in ((4, "flash_attn.cute"), (3, "flash_attn_interface"), (2, "flash_attn")):
        monkeypatch.setitem(sys.modules, name, stand_in(version))
    flash_functions.cache_clear()
    yield
    flash_functions.cache_clear()


@pytest.mark.parametrize("takes_gqa", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("name", ["varlen", "flash4", "flash3", "flash2"])
def test_packed_kernels_are_called_by_their_conventions(
    name: str,
    window: int | None,
    documents: torch.Tensor | None,
    takes_gqa: bool,
    stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arch.attend_kernels.VARLEN_TAKES_GQA", takes_gqa)
    backend, generator = BACKENDS[name], torch.Generator().manual_seed(0)
    value_width = 12 if backend.uneven_value_width else 8
    shapes = ((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, value_width), *([(4,)] if backend.sinks else []))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    sinks = inputs[3] if backend.sinks else None
    sequences = SequenceBatch(2, 9, documents, CPU)
    out = attend(*inputs[:3], backend.mask(sequences, window, torch.bfloat16), 0.3, sinks)
    exact = reference(*inputs[:3], dense(sequences, window), 0.3, sinks)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours, wanted = (torch.autograd.grad((result * weight).sum(), inputs) for result in (out, exact))
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_compiled_code_breaks_around_flash_attn(documents: torch.Tensor | None, stand_ins: None) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 9, 4, 8, generator=generator).requires_grad_() for _ in range(3)]
    inputs.append(torch.randn(4, generator=generator).requires_grad_())
    mask = BACKENDS["flash4"].mask(SequenceBatch(2, 9, documents, CPU), 4, torch.bfloat16)
    results = []
    for run in (attend, torch.compile(attend, backend="aot_eager")):
        out = run(*inputs[:3], mask, 0.3, inputs[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_flash_is_the_newest_that_fits(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert select_backend("flash", needs("windows", "sinks"), "cuda").name == "flash4"
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    flash_functions.cache_clear()
    assert select_backend("flash", needs("windows"), "cuda").name == "flash3"
    with pytest.raises(ValueError, match=r'flash4 lacks .*pip install -e "\.\[kernels\]"; flash3 lacks sinks; flash2'):
        select_backend("flash", needs("sinks"), "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert select_backend("flash", needs("windows"), "cuda").name == "flash2"


def test_an_empty_namespace_is_no_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    flash_functions.cache_clear()
    with pytest.raises(ValueError, match=r"flash-attn 2 cannot be loaded .*flash_attn_func"):
        select_backend("flash2", needs(), "cuda")
    flash_functions.cache_clear()


def test_what_is_not_claimed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Backend("poor", reference, dense, "", devices=frozenset({"cuda"}), windows=False, sinks=False)
    monkeypatch.setitem(BACKENDS, "poor", poor)
    with pytest.raises(ValueError, match="poor lacks sinks, windows, device cpu"):
        Decoder(small("swa_sinks"), "poor")
    with pytest.raises(ValueError, match="poor lacks device cpu"):
        Decoder(small("mha"), "poor")
    with pytest.raises(ValueError, match="no attention backend 'fast'; choose auto, sdpa, reference, flex, varlen"):
        select_backend("fast", needs(), "cpu")
    with pytest.raises(ValueError, match=r"varlen lacks sinks, uneven_value_width, head width 20 \(it takes 8 to 256"):
        select_backend("varlen", needs("sinks", "uneven_value_width", width=20), "cuda")
    with pytest.raises(ValueError, match="flash4 lacks device cpu; flash3 lacks device cpu"):
        select_backend("flash", needs(), "cpu")
    with pytest.raises(ValueError, match="varlen takes bfloat16, float16; the model computes in float32"):
        Decoder(small("mha"), "varlen", "cuda")(tokens(1, 4))


def test_auto() -> None:
    for features in ((), ("gqa",), ("uneven_value_width",)):
        assert select_backend("auto", needs(*features), "cuda").name == "sdpa"
    for features in (("windows",), ("sinks",), ("documents", "gqa")):
        assert select_backend("auto", needs(*features), "cuda").name == "flex"
        assert select_backend("auto", needs(*features), "cpu").name == "sdpa"


def test_needs_come_from_the_plan() -> None:
    found = {}
    for name in ("mha", "mqa", "swa", "swa_sinks", "mla"):
        model = build(small(name))
        found[name] = attention_needs(model.config.size, model.plan.stores[0])
    assert found == {
        "mha": Needs(frozenset(), (8, 8)),
        "mqa": Needs(frozenset({"gqa"}), (8, 8)),
        "swa": Needs(frozenset({"windows", "gqa"}), (8, 8)),
        "swa_sinks": Needs(frozenset({"windows", "sinks", "gqa"}), (8, 8)),
        "mla": Needs(frozenset({"uneven_value_width"}), (12, 8)),
    }
    assert attention_needs(model.config.size, model.plan.stores[0], documents=True).features == {
        "uneven_value_width",
        "documents",
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


@pytest.mark.parametrize("shape", [None, (6, 6), (1, 1, 6, 6), (7, 1, 6, 6)])
def test_a_batch_sdpa_batched(shape: tuple[int, ...] | None) -> None:
    """What more rows than a CUDA grid has come to: a batch cut up, and a mask with it where it has the batch's rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 6, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    allowed = None if shape is None else torch.rand(shape, generator=generator).ge(0.5) | torch.eye(6, dtype=torch.bool)
    sinks = torch.randn(4, dtype=torch.float64, generator=generator)
    for mask, sink in ((Dense(allowed is None, allowed), None), (Dense(allowed is None, allowed), sinks)):
        whole = sdpa(q, k, v, mask, 0.3, sink)
        torch.testing.assert_close(sdpa_batched(3, q, k, v, mask, 0.3, sink), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "parts"),
    [(2048, 5, 16, [2048]), (4096, 5, 16, [2048] * 2), (32769, 5, 1, [32768, 1]), (2, 2048, 16, [2])],
)
def test_no_call_on_cuda_has_more_rows_than_its_kernels_take(
    batch: int, length: int, heads: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 128: 2^29 elements in whole tiles of 128 queries are 2048 rows of 16 heads."""
    seen = []

    def spy(q: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(q.shape[0])
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    q = torch.empty(batch, length, heads, 128, device="meta", dtype=torch.bfloat16)
    assert sdpa(q, q, q, Dense(True, None), 1.0, None).shape == q.shape
    assert seen == parts
