"""Kernels of decoding steps: each is the definition, and the best that takes a step is chosen."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import WINDOW, small

from arch import allocate, attend_kernels, attend_step, resolve
from arch.attend import reference
from arch.attend_step import STEP_KERNELS, kvcache_function, select_step_kernel, step_mask
from arch.masks import Dense, Run, Seen

CPU = torch.device("cpu")
SLOTS = 21
KERNELS = {kernel.name: kernel for kernel in STEP_KERNELS}


def kvcache(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, cache_leftpad=None, return_softmax_lse=False):
    """flash_attn_with_kvcache as its package describes it, for one query of each row."""
    assert not causal
    assert cache_seqlens.dtype == torch.int32
    batch, _, heads, _ = q.shape
    slot = torch.arange(k_cache.shape[1])
    first = torch.zeros(batch, dtype=torch.int32) if cache_leftpad is None else cache_leftpad
    allowed = ((slot >= first[:, None]) & (slot < cache_seqlens[:, None]))[:, None, None]
    out = reference(q, k_cache, v_cache, Dense(False, allowed), softmax_scale, None)
    k = k_cache.repeat_interleave(heads // k_cache.shape[2], dim=2)
    score = torch.einsum("btnh,bsnh->bnts", q, k) * softmax_scale
    lse = score.masked_fill(~allowed, -torch.inf).logsumexp(dim=-1)
    return (out, lse) if return_softmax_lse else out


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A flash-attn 3 that computes on the CPU."""
    module = SimpleNamespace(flash_attn_with_kvcache=kvcache, flash_attn_func=kvcache, flash_attn_varlen_func=kvcache)
    kvcache_function.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "flash_attn_interface", module)
    monkeypatch.setattr(attend_step, "flash_missing", lambda version: None if version == 3 else "absent")
    yield
    kvcache_function.cache_clear()


def seen(batch: int, starts: list[int] | None) -> Seen:
    slot, end = torch.arange(SLOTS), torch.full((batch,), SLOTS - 4, dtype=torch.int32)
    if starts is None:
        return Seen((slot < SLOTS - 4)[None], Run(end), True)
    first = torch.tensor(starts, dtype=torch.int32)
    return Seen(((slot >= first[:, None]) & (slot < SLOTS - 4))[:, None, None], Run(end, first), True)


@pytest.mark.parametrize("starts", [None, [0, 3, 11]])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", ["flash3-kvcache", "flex", "sdpa"])
def test_kernels_are_the_definition(name: str, with_sinks: bool, starts: list[int] | None, flash: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, *shape, generator=generator) for shape in ((8, 16), (SLOTS, 2, 16), (SLOTS, 2, 16)))
    sinks, given = torch.randn(8, generator=generator) if with_sinks else None, seen(3, starts)
    mask = step_mask("auto", given, torch.float32, 16, CPU).form
    mask = mask._replace(blocks=attend_step.step_blocks(given.allowed))
    exact = reference(q[:, None], k, v, Dense(False, given.allowed), 0.3, sinks)[:, 0]
    torch.testing.assert_close(KERNELS[name].kernel(q, k, v, mask, 0.3, sinks), exact, rtol=0, atol=1e-5)


def test_the_best_kernel_that_takes_a_step(flash: None) -> None:
    given = seen(3, [0, 3, 11])
    half = torch.bfloat16
    for device, dtype, width, what, name in (
        ("cuda", half, 64, given, "flash3-kvcache"),
        ("cuda", half, 64, given._replace(run=None), "flex"),
        ("cuda", torch.float32, 64, given, "flex"),
        ("cuda", half, 12, given, "sdpa"),
        ("cuda", half, 64, given._replace(run=None, static=False), "sdpa"),
        ("cuda", half, 64, Seen(None), "sdpa"),
        ("cpu", half, 64, given, "sdpa"),
    ):
        assert select_step_kernel("auto", device, dtype, width, what).name == name
    assert select_step_kernel("reference", "cuda", half, 64, given).name == "reference"


def test_without_flash_attn_flex_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_step, "kvcache_function", lambda version: "not installed")
    assert select_step_kernel("auto", "cuda", torch.bfloat16, 64, seen(2, None)).name == "flex"


def test_flex_meets_more_layouts_batches_and_lengths_than_torch_allows_variants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA, where it is compiled by itself: not for each length, but for each batch, or torch's decoding kernel,
    which splits the keys, is not taken."""
    batches: list[list] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        batches.append([x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.shape[-1:] == (16,)])
        return graph

    def run(batch: int, heads: int, slots: int) -> None:
        q, k, v = (torch.ones(batch, *shape) for shape in ((heads, 16), (slots, 1, 16), (slots, 1, 16)))
        given = Seen(torch.ones(batch, 1, 1, slots, dtype=torch.bool))
        mask = attend_step.StepMask(given, blocks=attend_step.step_blocks(given.allowed))
        out = attend_step.flex_step(q, k, v, mask, 1.0, None)
        torch.testing.assert_close(out, torch.ones(batch, heads, 16))

    torch._dynamo.reset()
    attend_kernels.compiled_flex.cache_clear()
    monkeypatch.setattr(attend_kernels, "UNCOMPILED", frozenset())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for batch, heads in ((2, 1), (3, 1), (1, 1), *((2, heads) for heads in range(2, 9))):
        run(batch, heads, SLOTS)
    assert len(batches) > 8
    for slots in (SLOTS + 1, SLOTS + 2, 140, 300):
        run(2, 1, slots)
    before = len(batches)
    for slots in range(301, 320):
        run(2, 1, slots)
    assert len(batches) == before, "no length more is compiled"
    assert all(found and {type(size) for size in found} == {int} for found in batches)
    attend_kernels.compiled_flex.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("starts", [None, [0, 5, 11]])
def test_runs_are_what_is_allowed(starts: list[int] | None) -> None:
    """A ring with padding has none: what a row sees there may be in two parts."""
    start_B = None if starts is None else torch.tensor(starts)
    cache = allocate(resolve(small("mixattention")), 3, 30, dtype=torch.float32, start_B=start_B)
    cache.num_slots = 24
    for length in (11, 12, 23):
        cache.position = torch.tensor([length])
        for window in (None, WINDOW):
            found = cache.step_seen(window, CPU)
            assert found.static
            if starts is not None and window is not None:
                assert found.run is None
                continue
            allowed = found.allowed.reshape(-1, found.allowed.shape[-1]).expand(3, -1)
            slot = torch.arange(allowed.shape[1])
            first = torch.zeros(3) if found.run.first_B is None else found.run.first_B
            assert torch.equal(allowed, (slot >= first[:, None]) & (slot < found.run.end_B[:, None]))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("starts", [None, [0, 5, 11]])
def test_runs_in_windows_of_readers(starts: list[int] | None, static: bool) -> None:
    """Of a store that keeps every position; plain steps hand a layer the last slots alone."""
    start_B = None if starts is None else torch.tensor(starts)
    cache = allocate(resolve(small("mha")), 3, 30, dtype=torch.float32, start_B=start_B)
    cache.num_slots = 24
    for length in (2, 11, 12, 23):
        cache.length, cache.position = length, torch.tensor([length]) if static else None
        found, first = cache.step_seen(None, CPU, 4), torch.tensor(starts or [0, 0, 0])
        num_slots = 24 if static else min(4, length + 1)
        slot = torch.arange(num_slots) + (0 if static else length + 1 - num_slots)
        if found.allowed is None:
            assert starts is None and not static
            continue
        expected = (slot >= first[:, None]) & (slot <= length) & (slot > length - 4)
        rows = first <= length  # others are padding, and see themselves alone
        allowed = found.allowed.reshape(-1, num_slots).expand(3, -1)
        assert torch.equal(allowed[rows], expected[rows])
        index = torch.arange(num_slots)
        in_run = (index >= found.run.first_B[:, None]) & (index < found.run.end_B[:, None])
        assert torch.equal(in_run[rows], expected[rows])
