"""Strided stores: chunks, steps and documents agree with the definition, and entries are those of DeepSeek-V4."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import build, small, tokens
from torch import Tensor, nn

from arch import ArchConfig, LayoutError, StoreConfig, allocate, resolve
from arch.footprint import kv_bytes
from arch.layers import rope_table, rotate
from arch.masks import Sequences
from arch.static_step import StaticStep
from arch.strided import StridedReader, StridedWriter
from arch.strided_backend import StridedBackend

SHAPES = [(4, 6), (6, 4), (1, 1), (3, 2), (8, 3)]  # window, stride


def layout(window: int = 4, stride: int = 6, **keys: Any) -> ArchConfig:
    keys = {"kv_heads": 2, "sinks": True, **keys}
    return ArchConfig({"pooled": StoreConfig(window=window, stride=stride, **keys)}, ["new pooled", "reuse pooled"])


def model_of(window: int, stride: int, **keys: Any) -> Any:
    """Two layers, one of which reads the other's store; weights that no one would confuse."""
    model = build(small(layout(window, stride, **keys), num_layers=2, window=None))
    for name, parameter in model.named_parameters():
        if "position_bias" in name or "norms" in name or "sinks" in name:
            nn.init.normal_(parameter, 1.0 if "norms" in name else 0.0, generator=torch.Generator().manual_seed(3))
    return model


def by_definition(writer: StridedWriter, reader: StridedReader, x_TD: Tensor, window: int, stride: int) -> Tensor:
    """[T, D] a layer's attention, token by token and entry by entry."""
    pool, out = writer.pool, []
    places = torch.arange(len(x_TD))
    rope = rope_table(places, 8, 1e4)
    k_TKH, v_TKH = writer.near(x_TD[None], rope)
    entries = []
    for begin in range(0, len(x_TD) - stride + 1, stride):
        chunk = x_TD[begin : begin + stride]
        weight = (pool.gate_proj(chunk) + pool.position_bias).softmax(dim=0)
        mean = (weight * pool.proj(chunk)).sum(dim=0).view(2, 16)
        k, v = pool.norms[0](mean[:, :8]), pool.norms[1](mean[:, 8:])
        entries.append((rotate(k[None, None], rope_table(torch.tensor([begin]), 8, 1e4))[0, 0], v))
    q_TNH = rotate(reader.q_proj(x_TD).view(1, -1, 8, 8), rope)[0]
    for t in places.tolist():
        first, complete = max(0, t - window + 1), (t + 1) // stride
        k = torch.stack([*k_TKH[0, first : t + 1], *(k for k, _ in entries[:complete])])
        v = torch.stack([*v_TKH[0, first : t + 1], *(v for _, v in entries[:complete])])
        score = torch.einsum("kgh,skh->kgs", q_TNH[t].view(2, 4, 8), k) * 8**-0.5
        weight = torch.cat((score, reader.sinks.view(2, 4, 1)), dim=-1).softmax(dim=-1)[..., :-1]
        out.append(reader.o_proj(torch.einsum("kgs,skh->kgh", weight, v).flatten()))
    return torch.stack(out)


@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_the_parallel_form_is_the_definition(window: int, stride: int) -> None:
    model = model_of(window, stride)
    block, length = model.layers[0], 20
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rope, store = rope_table(torch.arange(length), 8, 1e4), model.plan.stores[0]
    sequences = Sequences(1, length, None, x.device)
    positions = StridedBackend(stride=stride, rope_key=store.rope_key).mask(sequences, window, x.dtype)
    with torch.no_grad():
        found = block.reader(x, block.writer(x, rope, positions), rope, positions)
        expected = by_definition(block.writer, block.reader, x[0], window, stride)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("starts", [None, [0, 5, 11]])
@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_decoding_is_the_forward(window: int, stride: int, starts: list[int] | None) -> None:
    """Rows of different lengths, in chunks that end anywhere, plain steps and static steps, to a capacity of no use."""
    model, batch = model_of(window, stride), tokens(3, 23)
    start_B = None if starts is None else torch.tensor(starts)
    with torch.no_grad():
        alone = [model(batch[row : row + 1, start:]) for row, start in enumerate(starts or [0, 0, 0])]
        for cuts in ([0, 23], [0, 7, 8, 14, 23], [0, 12], [0, 3]):
            cache = allocate(model.plan, 3, 23, dtype=torch.float64, start_B=start_B)
            parts = [model(batch[:, begin:end], cache) for begin, end in pairwise(cuts)]
            last = cuts[-1]
            if len(cuts) == 2 and last < 23:
                plain = (last + 23) // 2
                parts += [model(token, cache) for token in batch[:, last:plain].split(1, dim=1)]
                step = StaticStep(model, cache, "static")
                parts += [step(token) for token in batch[:, plain:].split(1, dim=1)]
            logits = torch.cat(parts, dim=1)
            for row, expected in enumerate(alone):
                begin = 23 - expected.shape[1]
                torch.testing.assert_close(logits[row, begin:], expected[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_nothing_is_pooled_across_documents(window: int, stride: int) -> None:
    """A document gives the logits that it has alone, wherever chunks would begin in the row."""
    model, lengths = model_of(window, stride), [7, 1, 12, 3]
    batch = tokens(1, sum(lengths))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        together = model(batch, segment_ids_BT=ids).split(lengths, dim=1)
        for document, found in zip(batch.split(lengths, dim=1), together, strict=True):
            torch.testing.assert_close(found, model(document), rtol=0, atol=1e-5)  # rotary tables of other positions


def test_an_entry_is_seen_once_it_is_complete() -> None:
    """By gradient, in the one layer: beyond the window, of whole chunks alone."""
    window, stride, length = 2, 4, 14
    config = small(layout(window, stride), num_layers=1, window=None)
    config.arch.pattern = ["new pooled"]
    model = build(config)
    x = torch.randn(1, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = model.run(x)
    for t in range(length):
        (gradient,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        reached = gradient[0].abs().sum(dim=-1) > 0
        entries = (t + 1) // stride * stride
        expected = [place <= t and (place > t - window or place < entries) for place in range(length)]
        assert reached.tolist() == expected


def test_bytes_by_hand() -> None:
    """Heads of 8: 2 (8 + 8) elements a slot; sums and means in fp32; a layer that reuses the store reads no sums."""
    plan = resolve(small(layout(4, 6), num_layers=2, window=None))
    slot, state = 2 * 16 * 2, 2 * 2 * 16 * 4
    for context in (1, 6, 47, 48):
        kv = kv_bytes(plan, context, 2)
        assert kv.stored == (4 + context // 6) * slot + state
        assert kv.read == 2 * (4 + context // 6) * slot + state
    assert kv.per_token == pytest.approx(slot / 6) and kv.constant == 4 * slot + state
    assert type(plan).from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"kv_heads": 1, "stride": 4}, "stride needs a window: tokens that no entry has yet are seen there"),
        ({"kv_heads": 1, "stride": 0, "window": 4}, "stride is 0; an entry pools at least 1 position"),
        ({"kv_heads": 1, "stride": 4, "slots": 4, "rule": "gated"}, "stride is 4, and a store that is bounded has no"),
        ({"kv_heads": 1, "stride": 4, "window": 4, "rule": "gated"}, "rule gated needs slots"),
    ],
)
def test_refusals(store: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(small(ArchConfig({"kv": StoreConfig(**store)}, ["new kv"]), num_layers=1))


def test_both_decoders_of_a_block_transformer_take_strides() -> None:
    config = small("block")
    for part in (config.arch, config.arch.block.token):
        part.stores, part.pattern = {"pooled": StoreConfig(2, window=2, stride=2, sinks=True)}, ["new pooled"]
    model, batch = build(config), tokens(2, 24)
    with torch.no_grad():
        cache = model.allocate_cache(2, 24)
        for end in range(4, 23):
            new = batch[:, end - 1 : end] if end > 4 else batch[:, :4]
            whole = model.next_token_logits(batch[:, :end])[:, -1:]
            torch.testing.assert_close(model(new, cache, last_only=True), whole, rtol=0, atol=1e-10)
