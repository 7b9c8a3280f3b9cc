"""Every attention backend on CUDA against the definition in fp64, forward and backward, eager and compiled."""

import pytest
import torch
from conftest import small, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel

from arch import BlockTransformer, Decoder, resolve
from arch.attend import BACKENDS, FLEX_ROWS, Backend, attend, reference, sdpa
from arch.attention import choose_backends
from arch.masks import Dense, SequenceBatch, dense, visible

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Query heads, key heads, key width, value width.
SHAPES = {"mha": (8, 8, 128, 128), "gqa4": (8, 2, 64, 64), "mqa": (8, 1, 128, 128), "mla": (8, 8, 192, 128)}
# Relative error in the Frobenius norm: a few roundings of the type.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
# The mask kinds in full for one shape; for the others nothing, and everything at once.
EVERY_MASK = [(window, cut, sinks) for window in (None, 100) for cut in (False, True) for sinks in (False, True)]
KINDS = [
    ("gqa4", torch.bfloat16, False),
    *((shape, torch.bfloat16, False) for shape in ("mha", "mqa", "mla")),
    *(("gqa4", dtype, False) for dtype in (torch.float16, torch.float32)),
    *((shape, torch.bfloat16, True) for shape in ("gqa4", "mla")),
]


def claimed(backend: Backend) -> list[tuple]:
    """(shape, dtype, compiled, window, documents?, sinks?) of all that the backend claims and is tried."""
    cases = []
    for shape, dtype, compiled in KINDS:
        _, _, width, value_width = SHAPES[shape]
        if (backend.dtypes and dtype not in backend.dtypes) or (
            width != value_width and not backend.uneven_value_width
        ):
            continue
        whole = (shape, dtype, compiled) == KINDS[0]
        masks = EVERY_MASK if whole else [(None, False, False), (100, True, backend.sinks)]
        cases += [(shape, dtype, compiled, *mask) for mask in masks if backend.sinks or not mask[-1]]
    return cases


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "compiled", "window", "cut", "sinks"),
    [(name, *case) for name, backend in BACKENDS.items() if name != "reference" for case in claimed(backend)],
)
def test_backend_is_the_definition(
    name: str, shape: str, dtype: torch.dtype, compiled: bool, window: int | None, cut: bool, sinks: bool
) -> None:
    torch._dynamo.reset()
    backend = BACKENDS[name]
    if reason := backend.unusable():
        pytest.skip(reason)
    heads, kv_heads, width, value_width = SHAPES[shape]
    generator, length = torch.Generator("cuda").manual_seed(0), 400
    sizes = ((2, length, heads, width), (2, length, kv_heads, width), (2, length, kv_heads, value_width))
    inputs = [torch.randn(size, generator=generator, device="cuda").to(dtype).requires_grad_() for size in sizes]
    if sinks:
        inputs.append(torch.randn(heads, generator=generator, device="cuda").requires_grad_())
    documents = (torch.rand(2, length, generator=generator, device="cuda") < 0.02).cumsum(1) if cut else None
    sequences, scale = SequenceBatch(2, length, documents, torch.device("cuda")), width**-0.5
    run = torch.compile(attend) if compiled else attend
    out = run(*inputs[:3], backend.mask(sequences, window, dtype), scale, inputs[3] if sinks else None)
    weight = torch.randn(out.shape, generator=generator, device="cuda").to(dtype)
    gradients = torch.autograd.grad(out, inputs, weight)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = reference(*doubles[:3], dense(sequences, window), scale, doubles[3] if sinks else None)
    wanted = torch.autograd.grad(exact, doubles, weight.double())
    for ours, expected in zip((out, *gradients), (exact, *wanted), strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("new", "window"), [(64, None), (64, 10), (1, None), (3, 10)])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (8, 1, 288, 256)])
def test_sdpa_is_fused(
    shape: tuple[int, ...], new: int, window: int | None, dtype: torch.dtype, with_sinks: bool
) -> None:
    """The math kernel, which holds all scores, is never what is left, with or without a cache."""
    heads, kv_heads, width, value_width = shape
    if new == 64 and width > 256:
        pytest.skip("absorbed latents are read over a cache only")
    q = torch.randn(2, new, heads, width, device="cuda", dtype=dtype)
    k = torch.randn(2, 64, kv_heads, width, device="cuda", dtype=dtype)
    v = torch.randn(2, 64, kv_heads, value_width, device="cuda", dtype=dtype)
    sinks = torch.randn(heads, device="cuda") if with_sinks else None
    index = torch.arange(64, device="cuda")
    if new == 64:
        mask = dense(SequenceBatch(2, 64, None, q.device), window)
    else:
        mask = Dense(False, None if window is None else visible(index[-new:], index, window))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        out = sdpa(q, k, v, mask, width**-0.5, sinks)
    exact = reference(q.double(), k.double(), v.double(), mask, width**-0.5, None if sinks is None else sinks.double())
    assert (out.double() - exact).norm() < TOLERANCE[dtype] * exact.norm()


def test_decoding_is_not_planned_anew_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k = (torch.randn(1, length, 8, 64, device="cuda", dtype=torch.bfloat16) for length in (1, 40))
    sdpa(q, k, k, Dense(False, None), 0.1, None)
    sdpa(k, k, k, Dense(True, None), 0.1, None)
    assert seen == [False, True]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *((backend, name) for backend in ("auto", "flex", "flash4") for name in ("mixattention", "swa_sinks", "mla")),
        ("varlen", "mixattention"),
        ("flash3", "mixattention"),
        ("flash2", "mixattention"),
    ],
)
def test_models_train_as_the_definition(backend: str, name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    config, batch = small(name, head_dim=32, window=50), tokens(2, 300).cuda()
    if backend in BACKENDS and (reason := BACKENDS[backend].unusable()):
        pytest.skip(reason)
    choose_backends(backend, config.size, resolve(config), "cuda", documents=True)
    documents = (torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.02).cumsum(1).cuda()
    gradients = []
    for choice in (backend, "reference"):
        model = Decoder(config, choice, "cuda")
        model.init_weights(seed=1)
        model.cuda().train()
        if compiled and choice == backend:
            for block in model.layers:
                block.compile()
        for packed in (None, documents):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = model(batch, segment_ids_BT=packed)
            torch.nn.functional.cross_entropy(out.float().flatten(0, 1), batch.flatten()).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, exact in gradients[1].items():
        assert (gradients[0][key] - exact).norm() < 0.05 * exact.norm() + 1e-6, key


@pytest.mark.parametrize("kind", ["prefix", "summation", "cross"])
@pytest.mark.parametrize("padding", [False, True])
def test_block_transformers_train_as_the_definition(kind: str, padding: bool) -> None:
    """Compiled, with the rows of the token decoder end to end."""
    torch._dynamo.reset()
    config, batch = small("block", head_dim=16), tokens(2, 800).cuda()
    config.arch.block.token.kind = kind
    ids = -(torch.rand(2, 800, generator=torch.Generator().manual_seed(0)) < 0.2).long().cuda() if padding else None
    gradients = []
    for backend in ("auto", "reference"):
        model = BlockTransformer(config, backend, "cuda")
        model.init_weights(seed=1)
        model.cuda().train()
        if backend == "auto":
            assert model.token_decoder.chosen[False][0] is FLEX_ROWS
            for block in model.token_decoder.layers:
                block.compile(dynamic=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(batch, segment_ids_BT=ids)
        targets = model.select_targets(batch).flatten()
        torch.nn.functional.cross_entropy(out.float().flatten(0, 1), targets).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, exact in gradients[1].items():
        assert (gradients[0][key] - exact).norm() < 0.05 * exact.norm() + 1e-6, key
