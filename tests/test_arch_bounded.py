"""Bounded stores: the parallel form is the recurrence, known special cases, and a capacity that is kept."""

import copy
import importlib
import sys
import types

import pytest
import torch
from conftest import ROOT, build, small, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from arch import ArchConfig, Decoder, StoreConfig, allocate, resolve
from arch.attend_kernels import run_flex
from arch.attention import choose_backends
from arch.bounded import RingRouter
from arch.bounded_chunks import (
    UNSEEN,
    ChunkWrites,
    FadedSoftmax,
    Recomputed,
    Sight,
    read_chunks,
    read_slots,
    split_states,
)
from arch.bounded_scan import scan, tf32_bmm
from arch.bounded_spec import RULES
from arch.bounded_window import merge, read_window, run_near
from arch.footprint import kv_bytes
from arch.grouped import GroupedKV
from arch.masks import SequenceBatch, blocks, dense
from arch.positions import Near, TokenPositions, token_positions, written_slots

KV_HEADS, HEADS, WIDTH, SLOTS, WINDOW = 2, 8, 8, 5, 4
BOUNDED = ["bct", "bct_gated", "bct_ring", "bct_mixed"]


def store(rule: str, slots: int = SLOTS, window: int = WINDOW, sinks: bool = False) -> StoreConfig:
    return StoreConfig(KV_HEADS, window=window if RULES[rule] else None, slots=slots, rule=rule, sinks=sinks)


def one_layer(kind: StoreConfig) -> Decoder:
    return build(small(ArchConfig({"kv": kind}, ["new kv"]), num_layers=1, window=None))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


def recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """[B, T, N, H] the definition, token by token: write, then read all slots but the `empty` ([B, T, M])."""
    group = q.shape[2] // k.shape[2]
    state_k, state_v = (torch.zeros(x.shape[0], p.shape[-1], *x.shape[2:], dtype=x.dtype) for x in (k, v))
    out = []
    for t in range(q.shape[1]):
        write = p[:, t, :, None, None]
        state_k = (1 - write) * state_k + write * k[:, t, None]
        state_v = (1 - write) * state_v + write * v[:, t, None]
        keys, values = (x.repeat_interleave(group, dim=2) for x in (state_k, state_v))
        score = torch.einsum("bnh,bmnh->bnm", q[:, t], keys) * q.shape[-1] ** -0.5
        share = score.masked_fill(empty[:, t, None], -torch.inf).softmax(-1)
        out.append(torch.einsum("bnm,bmnh->bnh", share, values))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("rule", ["gated", "ring_router"])
@pytest.mark.parametrize("length", [1, 7, 16, 37, 64])
def test_parallel_form_is_the_recurrence(rule: str, length: int) -> None:
    """In a layer, with the strengths its own router gives."""
    block = one_layer(store(rule)).layers[0]
    x, place = numbers(2, length, 32), places(length)
    with torch.no_grad():
        kv = block.writer(x, (), TokenPositions(place, None))
        k, v, p = kv.k_BTKH, kv.v_BTKH, kv.p_BTM
        q = block.reader.q_proj(x).view(2, length, HEADS, WIDTH)
        empty = torch.zeros_like(p, dtype=torch.bool) if rule == "gated" else ~written_slots(place, SLOTS).expand_as(p)
        expected = block.reader.o_proj(recurrence(q, k, v, p, empty).flatten(2))
        ours = block.reader(x, kv, (), TokenPositions(place, None))
    assert (p >= 0).all() and (p.sum(-1) <= 1 + 1e-12).all() and p.max() > 2 * p.median()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [3, 30])
def test_ring_and_slots_by_hand(length: int) -> None:
    """One softmax over the window, what has left it, merged by the recurrence, and the sink."""
    model = one_layer(store("ring_slots", sinks=True))
    block, place = model.layers[0], places(length)
    torch.nn.init.normal_(block.reader.sinks)
    x, rope = numbers(2, length, 32), (torch.ones(length, 4), torch.zeros(length, 4))  # no rotation
    with torch.no_grad():
        slots = block.writer(x, rope, TokenPositions(place, None))
        ours = block.reader(x, slots, rope, TokenPositions(place, None))
        k, v = (proj(x).view(2, length, KV_HEADS, WIDTH) for proj in (block.writer.k_proj, block.writer.v_proj))
        p = block.writer.router(k.flatten(2), place)
        q = block.reader.q_proj(x).view(2, length, KV_HEADS, HEADS // KV_HEADS, WIDTH) / WIDTH**0.5
        state = torch.zeros(2, SLOTS, KV_HEADS, 2 * WIDTH, dtype=torch.float64)
        rows = []
        for t in range(length):
            keys, values = k[:, max(0, t - WINDOW + 1) : t + 1], v[:, max(0, t - WINDOW + 1) : t + 1]
            if t >= WINDOW:
                left = t - WINDOW
                write = p[:, left, :, None, None]
                state = (1 - write) * state + write * torch.cat((k[:, left], v[:, left]), dim=-1)[:, None]
                keys = torch.cat((keys, state[..., :WIDTH]), dim=1)
                values = torch.cat((values, state[..., WIDTH:]), dim=1)
            score = torch.einsum("bkgh,bskh->bkgs", q[:, t], keys)
            sink = block.reader.sinks.view(1, KV_HEADS, -1, 1).expand(2, -1, -1, -1)
            share = torch.cat((score, sink), dim=-1).softmax(-1)[..., :-1]
            rows.append(torch.einsum("bkgs,bskh->bkgh", share, values).flatten(1))
        expected = block.reader.o_proj(torch.stack(rows, dim=1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [4, 21, 50])
def test_a_ring_that_only_overwrites_is_a_sliding_window(length: int) -> None:
    """Strength 1 in turn. An overwritten slot keeps a rounding error's share, the least that logarithms allow."""
    block = one_layer(store("ring_router")).layers[0]
    x, place = numbers(1, length, 32), places(length)
    with torch.no_grad():
        block.writer.router.gate_bias.fill_(100.0)
        slots = block.writer(x, (), TokenPositions(place, None))
        ours = block.reader(x, slots, (), TokenPositions(place, None))
        k, v = (proj(x).view(1, length, KV_HEADS, WIDTH) for proj in (block.writer.k_proj, block.writer.v_proj))
        q = block.reader.q_proj(x).view(1, length, HEADS, WIDTH)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        allowed = (distance >= 0) & (distance < SLOTS)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        expected = block.reader.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(slots.p_BTM, F.one_hot(place % SLOTS, SLOTS).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 11, 12, 13])
def test_nothing_has_left_the_window_yet(length: int) -> None:
    """Then ring and slots are full attention with the same sink; and not one token later."""
    bounded = one_layer(store("ring_slots", window=12, sinks=True))
    full = one_layer(StoreConfig(KV_HEADS, window=10**6, sinks=True))
    torch.nn.init.normal_(bounded.layers[0].reader.sinks)
    full.load_state_dict({key: bounded.state_dict()[key] for key in full.state_dict()})
    with torch.no_grad():
        difference = (bounded(tokens(2, length)) - full(tokens(2, length))).abs().amax(dim=(0, 2))
    assert (difference[:12] < 1e-12).all()
    assert (difference[12:] > 1e-6).all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("length", [5, 13, 30])
def test_slots_are_left_out_until_the_window_is_full(length: int, sinks: bool) -> None:
    """Which changes no value and no gradient."""
    block, x = one_layer(store("ring_slots", window=12, sinks=sinks)).layers[0], numbers(2, length, 32)
    parameters = [*block.writer.parameters(), *block.reader.parameters()]
    rope = numbers(length, 4).cos(), numbers(length, 4).sin()
    found = []
    for plain in (False, True):
        place = TokenPositions(places(length), plain=plain)
        kv = block.writer(x, rope, place)
        assert kv.p_BTM.shape[1] == (length - 12 if plain and length > 12 else length)
        out = block.reader(x, kv, rope, place)
        found.append([out, *torch.autograd.grad((out * numbers(*out.shape, seed=3)).sum(), parameters)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", list(RULES))
def test_a_padded_row_alone_is_the_row_without_padding(rule: str) -> None:
    model, batch = one_layer(store(rule)), tokens(1, 20)
    with torch.no_grad():
        padded = model(batch, model.allocate_cache(1, 20, start_B=torch.tensor([3])))
        torch.testing.assert_close(padded[:, 3:], model(batch[:, 3:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_blocks_of_the_window_are_its_mask(window: int) -> None:
    length, documents = 23, torch.tensor([[0] * 5 + [1] * 18, [3] * 23])
    k, v, q = (numbers(2, length, n, 4, seed=n) for n in (2, 2, 6))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = (distance >= 0) & (distance < window)
    for segments, allowed in ((documents, near & (documents[:, :, None] == documents[:, None])), (None, near[None])):
        place = token_positions(SequenceBatch(2, length, segments, documents.device))
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed[:, None], scale=1.0, enable_gqa=True
        )
        nothing = torch.full((2, length, 6), UNSEEN, dtype=torch.float64)
        ours, share = read_window(q, nothing, GroupedKV(k, v), place, window)
        torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-12)
        assert share.eq(0).all()


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: torch.Tensor, scale: float) -> tuple:
    """What a kernel returns of the pairs allowed in `form`, [T, S] or [B, 1, T, S]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    score = (torch.einsum("btnh,bsnh->bnts", q, k) * scale).masked_fill(~form, -torch.inf)
    return torch.einsum("bnts,bsnh->btnh", score.softmax(-1), v), score.logsumexp(-1)


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_a_window_merged_with_the_slots(window: int, documents: bool) -> None:
    """The results of two kernels, by the logarithms of their sums, are one softmax; values and gradients."""
    ids = torch.tensor([[0] * 5 + [1] * 18, [3] * 23]) if documents else None
    sequences = SequenceBatch(2, 23, ids, torch.device("cpu"))
    allowed = dense(sequences, window).allowed
    form = torch.ones(23, 23, dtype=torch.bool).tril() if allowed is None else allowed
    given = [numbers(2, 23, n, 4, seed=n).requires_grad_() for n in (6, 2, 2, 6)]
    total = (numbers(2, 23, 6) * 3).index_fill(1, torch.arange(3), UNSEEN).requires_grad_()
    q, k, v, far = given
    near, share = read_window(q / 2, total, GroupedKV(k, v), token_positions(sequences), window)
    plain = near + share.unsqueeze(-1) * far
    ours = merge(*run_near(q, GroupedKV(k, v), Near(dense_attention, form), 0.5), far, total)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    weight = numbers(*ours.shape, seed=9)
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), [*given, total]) for x in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
def test_a_window_by_flex_attention(documents: bool) -> None:
    """A layer whose window that kernel reads, as on CUDA, is the same layer. Forward: the CPU has no more of it."""
    layer = one_layer(store("ring_slots", window=6, sinks=True)).float().layers[0]
    torch.nn.init.normal_(layer.reader.sinks)
    ids = torch.tensor([[0] * 9 + [1] * 21, [3] * 30]) if documents else None
    sequences = SequenceBatch(2, 30, ids, torch.device("cpu"))
    places, x = token_positions(sequences), numbers(2, 30, 32).float()
    rope = torch.linspace(0, 1, 120).view(30, 4).cos(), torch.linspace(0, 1, 120).view(30, 4).sin()
    near = Near(lambda *given: run_flex(*given, lse=True), blocks(sequences, 6))
    with torch.no_grad():
        plain, ours = (
            layer.reader(x, layer.writer(x, rope, place), rope, place) for place in (places, places._replace(near=near))
        )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_cuda_reads_a_window_by_flex_attention() -> None:
    """Where the backend is not named otherwise; other rules have no window."""
    names = {
        (rule, name): choose_backends(name, config.size, resolve(config), "cuda")[0].name
        for rule in RULES
        for name in ("auto", "sdpa")
        for config in [small(ArchConfig({"kv": store(rule)}, ["new kv"]), head_dim=16)]
    }
    expected = {key: "chunks+flex" if key == ("ring_slots", "auto") else "chunks" for key in names}
    assert names == expected


def test_products_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator with gradients, which leaves the switch as it was. With factors cut to 10 bits, as tensor cores cut
    them, slots are read to that precision: sums of logarithms have no part in it."""
    left, right = numbers(3, 4, 5).requires_grad_(), numbers(3, 5, 2, seed=1).requires_grad_()
    torch.library.opcheck(tf32_bmm, (left, right))
    assert torch.autograd.gradcheck(tf32_bmm, (left, right))
    before = torch.backends.cuda.matmul.fp32_precision
    assert torch.equal(tf32_bmm(left, right), torch.bmm(left, right))
    assert torch.backends.cuda.matmul.fp32_precision == before
    products = []

    def cut(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append(left.shape)
        return torch.bmm(*((x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (left, right)))

    monkeypatch.setattr("arch.bounded_scan.tf32_bmm", cut)
    block, place = one_layer(store("gated", slots=16)).layers[0], TokenPositions(places(64))
    torch.nn.init.constant_(block.writer.router.gate_bias, 6.0)  # strengths near 1: factors up to e^60
    x = numbers(2, 64, 32)
    with torch.no_grad():
        kv = block.writer(x, (), place)
        q = block.reader.q_proj(x).view(2, 64, HEADS, WIDTH)
        exact, _ = read_slots(q, kv.chunks, place, None, False)
        block.float()
        kv = block.writer(x.float(), (), place)
        ours, _ = read_slots(q.float(), kv.chunks, place, None, False, tf32=True)
    assert len(products) == 7
    assert 1e-6 < (ours - exact).abs().max() / exact.abs().max() < 3e-3


@pytest.mark.parametrize("bias", [-30.0, 0.0, 12.0])
@pytest.mark.parametrize("rule", list(RULES))
def test_gradients_where_strengths_are_near_0_and_1(rule: str, bias: float) -> None:
    """Against finite differences, through three chunks. A single slot takes its strength to the gate's limits."""
    block = one_layer(store(rule, slots=1 if rule != "ring_router" else 3, window=2)).layers[0]
    torch.nn.init.constant_(block.writer.router.gate_bias, bias)
    place, rope = places(35), (torch.ones(35, 4), torch.zeros(35, 4))
    p = block.writer(numbers(1, 35, 32), rope, TokenPositions(place, None)).p_BTM
    assert bias <= 0 or p.max() > 1 - 1e-5
    if rule != "ring_router":  # where the bias moves what is overwritten to the ring, and back to content
        assert bias >= 0 or 0 < p.max() < 1e-10

    def layer(x: torch.Tensor) -> torch.Tensor:
        slots = block.writer(x, rope, TokenPositions(place, None))
        return block.reader(x, slots, rope, TokenPositions(place, None))

    assert torch.autograd.gradcheck(layer, numbers(1, 35, 32).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_gradients_of_faded_weights(hidden: bool, more: bool) -> None:
    """They are written by hand: those of differences."""
    scores, faded = numbers(2, 1, 2, 3, 4), numbers(2, 1, 1, 3, 4, seed=1).exp()
    bias = torch.zeros(2, 1, 1, 3, 4, dtype=scores.dtype)
    bias[..., :1] = UNSEEN

    def weights(scores: torch.Tensor, faded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, total = FadedSoftmax.apply(scores, faded, bias if hidden else None, more)
        return (out, total) if more else (out,)

    assert torch.autograd.gradcheck(weights, (scores.requires_grad_(), faded.requires_grad_()))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rule", list(RULES))
def test_the_backward_pass_by_hand_is_autograds_to_the_bit(
    rule: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = one_layer(store(rule, sinks=True)).float(), tokens(2, 40)
    ids = torch.arange(40).expand(2, -1) // 17 if documents else None

    def gradients() -> list[torch.Tensor]:
        loss = model(batch, segment_ids_BT=ids).square().mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    by_hand = gradients()

    def apply(sight: Sight, q: torch.Tensor, *of_writes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        writes = ChunkWrites(*of_writes)
        return read_chunks(sight, q, writes, *split_states(scan(*writes[2:], sight.tf32)))

    monkeypatch.setattr(Recomputed, "apply", apply)
    for one, other in zip(by_hand, gradients(), strict=True):
        assert torch.equal(one, other)


def test_scan_is_a_proper_operator() -> None:
    """Schema, gradients, and what compilers are told of its shapes."""
    inputs = (*(numbers(5, 2, *n).sigmoid() for n in ((3,), (4, 3))), *(numbers(5, 2, 2, 4, 3, seed=n) for n in (1, 2)))
    for some in (inputs, tuple(x[:1] for x in inputs)):
        some = (*some, numbers(2, 2, 3, 6))
        torch.library.opcheck(scan, tuple(x.clone().requires_grad_() for x in some))
        assert torch.autograd.gradcheck(scan, tuple(x.clone().requires_grad_() for x in some))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_saturated_gates_train_in_fp32(name: str, bias: float) -> None:
    """Strengths of exactly 0 and 1: losses and gradients stay finite."""
    model = build(small(name), torch.float32)
    for block in model.layers:
        if block.writer is not None and hasattr(block.writer, "router"):
            torch.nn.init.constant_(block.writer.router.gate_bias, bias)
    model(tokens(2, 40)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", BOUNDED)
def test_long_after_the_prefill(name: str) -> None:
    """The state is handed on exactly across many chunks, from a prefill that ends inside one."""
    model, batch = build(small(name)), tokens(2, 120)
    with torch.no_grad():
        cache = allocate(model.plan, 2, 120, dtype=torch.float64)
        parts = [batch[:, :53], *batch[:, 53:60].split(1, dim=1), batch[:, 60:]]
        logits = torch.cat([model(part, cache) for part in parts], dim=1)
        torch.testing.assert_close(logits, model(batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", list(RULES))
def test_one_token_at_a_time(rule: str, sinks: bool) -> None:
    """Its own form gives the logits of the chunk form, where rows start late too, and leaves the state of chunks in the
    same memory; nothing that it does depends on data."""
    model, batch = one_layer(store(rule, sinks=sinks)), tokens(3, 21)
    if sinks:
        torch.nn.init.normal_(model.layers[0].reader.sinks)
    with torch.no_grad():
        steps, chunked = (model.allocate_cache(3, 30, start_B=torch.tensor([0, 3, 19])) for _ in range(2))
        before = [tensor.data_ptr() for tensor in steps.buffers[0].tensors]
        logits = torch.cat([model(part, steps) for part in batch.split(1, dim=1)], dim=1)
        expected = torch.cat([model(part, chunked) for part in batch.split(7, dim=1)], dim=1)
        for row, start in enumerate((0, 3, 19)):
            torch.testing.assert_close(logits[row, start:], expected[row, start:], rtol=0, atol=1e-12)
        for one, other in zip(steps.buffers[0].tensors, chunked.buffers[0].tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert before == [tensor.data_ptr() for tensor in steps.buffers[0].tensors]
        with FakeTensorMode(allow_non_fake_inputs=True):  # raises where an operation needs a value
            assert model(batch[:, :1], steps).shape == (3, 1, 61)


@pytest.mark.parametrize("rule", list(RULES))
def test_what_steps_keep_of_weights_is_forgotten_by_other_passes(rule: str) -> None:
    batch, found = tokens(2, 20), []
    for forget in (False, True):
        model = one_layer(store(rule))
        with torch.no_grad():
            cache = model.allocate_cache(2, 20)
            model(batch[:, :7], cache)
            model(batch[:, 7:8], cache)
            assert cache.buffers[0].derived
            model.layers[0].writer.router.slot_keys.weight.neg_()
            model(batch[:, 8:11], cache)
            if forget:
                cache.buffers[0].derived = ()
            found.append(model(batch[:, 11:12], cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", list(RULES))
def test_pieces_of_the_reader_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of a reader that takes a chunk at a time, in its backward pass too, with documents."""
    segments = torch.tensor([[0] * 11 + [1] * 29, [0] * 40])
    found = []
    for scores in (1 << 30, 1):
        monkeypatch.setattr("arch.bounded_chunks.SCORES", scores)
        model = one_layer(store(rule, sinks=True))
        logits = model(tokens(2, 40), segment_ids_BT=segments)
        logits.square().mean().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(2, 40), segment_ids_BT=segments), logits, rtol=0, atol=1e-12)
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bct", "bct_gated", "bct_ring"])
def test_capacity_does_not_depend_on_the_context(name: str) -> None:
    """Not in what is allocated, and not in the formula: state in fp32, positions of the window as asked for."""
    plan = resolve(small(name))
    sizes = {allocate(plan, 2, context, dtype=torch.bfloat16).nbytes for context in (1, 32, 4 * 32, 64 * 32)}
    spec = plan.stores[0]
    elements = 2 * spec.slot.kv_heads * spec.slot.k_dim
    expected = 2 * len(plan.stores) * elements * (4 * spec.num_slots + 2 * (spec.window or 0))
    assert sizes == {expected}
    assert {kv_bytes(plan, context).stored for context in (1, 32, 4 * 32, 64 * 32)} == {expected // 2}
    assert kv_bytes(plan, 32).per_token == 0


@pytest.mark.parametrize("name", BOUNDED)
def test_far_tokens_change_what_is_read(name: str) -> None:
    """Beyond every window, through the slots alone."""
    model, batch = build(small(name, num_layers=2)), tokens(1, 60)
    other = copy.deepcopy(batch)
    other[0, 3] = (other[0, 3] + 1) % 61
    with torch.no_grad():
        assert (model(batch)[0, -1] - model(other)[0, -1]).abs().max() > 0


def test_a_fresh_router_tells_slots_apart() -> None:
    """Scores are normalised, so that small initial weights do not make every slot the same average."""
    model = build(small("bct_gated", num_layers=1, init_std=0.02))
    with torch.no_grad():
        p = model.layers[0].writer.router(numbers(4, 50, 32), places(50))
    assert (p.amax(-1) > 1.5 * p.mean(-1)).all()


def test_ring_slots_that_were_not_reached_are_neither_written_nor_read() -> None:
    router = one_layer(store("ring_router")).layers[0].writer.router
    assert isinstance(router, RingRouter)
    with torch.no_grad():
        p = router(numbers(1, 9, 32), places(9))
    assert torch.equal(p[0] > 0, written_slots(places(9), SLOTS)[0])


def test_unknown_backends_are_refused_without_softmax_attention_too() -> None:
    with pytest.raises(ValueError, match="no attention backend 'fast'"):
        Decoder(small("bct"), "fast")
    assert Decoder(small("bct_mixed")).attention().startswith("global, local: sdpa")


def test_a_copy_of_the_file_has_operators_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As exported folders have one: an operator that is defined again leaves the first one's calls dangling."""
    package = types.ModuleType("copy_of_arch")
    package.__path__ = [str(ROOT / "arch")]
    monkeypatch.setitem(sys.modules, "copy_of_arch", package)
    other = importlib.import_module("copy_of_arch.bounded_scan")
    assert other.scan._opoverload.name() != scan._opoverload.name()
    arguments = (*(numbers(3, 2, *n) for n in ((4,), (7, 4), (5, 7, 3), (5, 7, 3))), numbers(2, 5, 4, 6))
    assert torch.equal(other.scan(*arguments), scan(*arguments))
