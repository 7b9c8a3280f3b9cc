"""Strided stores: chunks, steps and documents agree with the definition, and entries are those of DeepSeek-V4."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import assert_decoding_is_the_forward, assert_documents_are_apart, build, small, tokens
from torch import Tensor, nn

from arch import ArchConfig, BlockTransformer, LayoutError, StoreConfig, resolve
from arch.attention import choose_backends, has_own_kernel
from arch.footprint import kv_bytes
from arch.layers import rope_table, rotate
from arch.masks import SequenceBatch
from arch.strided import StridedBackend, StridedReader, StridedWriter

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
    sequences = SequenceBatch(1, length, None, x.device)
    positions = StridedBackend("sdpa", "", stride, store.rope_key).mask(sequences, window, x.dtype)
    with torch.no_grad():
        found = block.reader(x, block.writer(x, rope, positions), rope, positions)
        expected = by_definition(block.writer, block.reader, x[0], window, stride)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "stride", "tied", "starts"),
    [(4, 6, None, [0, 5, 11]), (6, 4, "vector", [0, 5, 11]), (3, 2, "vector", None), (1, 1, None, [0, 1, 2])],
)
def test_decoding_is_the_forward(window: int, stride: int, tied: str | None, starts: list[int] | None) -> None:
    """Rows of different lengths, in chunks that end anywhere, plain steps and static steps."""
    assert_decoding_is_the_forward(model_of(window, stride, tied=tied), starts)


@pytest.mark.parametrize(("window", "stride", "tied"), [(4, 6, None), (6, 4, "vector"), (3, 2, None)])
def test_nothing_is_pooled_across_documents(window: int, stride: int, tied: str | None) -> None:
    """A document gives the logits that it has alone, wherever chunks would begin in the row."""
    assert_documents_are_apart(model_of(window, stride, tied=tied, rope="none"))


def deepseek_v4(model: Any, stride: int, window: int) -> tuple[Any, Any]:
    """An attention layer of transformers with random weights, which `model` gets, and its configuration.

    Queries are made by two matrices with a norm between them, whose scale the norm after them takes away; outputs too.
    There the last channels of a head are rotated, in neighbouring pairs.
    """
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

    config = theirs.DeepseekV4Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=12,
        partial_rotary_factor=0.5,
        sliding_window=window,
        compress_rates={"heavily_compressed_attention": stride, "compressed_sparse_attention": 4},
        layer_types=["heavily_compressed_attention"],
    )
    config._attn_implementation = "eager"
    attention = theirs.DeepseekV4Attention(config, 0)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in attention.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    writer, reader = model.layers[0].writer, model.layers[0].reader
    order = torch.tensor([4, 6, 5, 7, 0, 1, 2, 3])
    heads = (torch.arange(8)[:, None] * 8 + order).flatten()
    per_group = attention.o_a_proj.weight.unflatten(0, (2, 12))
    weights = {
        reader.q_proj.weight: (attention.q_b_proj.weight * attention.q_a_norm.weight @ attention.q_a_proj.weight)[
            heads
        ],
        reader.q_norm.weight: torch.ones(8),
        reader.o_proj.weight: (attention.o_b_proj.weight @ torch.block_diag(*per_group))[:, heads],
        reader.sinks: attention.sinks,
        writer.near.kv_proj.weight: attention.kv_proj.weight[order],
        writer.near.k_norm.weight: attention.kv_norm.weight[order],
        writer.pool.proj.weight: attention.compressor.kv_proj.weight[order],
        writer.pool.gate_proj.weight: attention.compressor.gate_proj.weight[order],
        writer.pool.position_bias: attention.compressor.position_bias[:, order],
        writer.pool.norms[0].weight: attention.compressor.kv_norm.weight[order],
    }
    for parameter, value in weights.items():
        parameter.data.copy_(value)
    return attention, config


@pytest.mark.parametrize(("window", "stride"), [(4, 6), (6, 4)])
def test_the_layer_is_deepseek_v4s(window: int, stride: int) -> None:
    """Without a cache, and through theirs in a prompt, chunks and steps: the layer's output for every token."""
    from transformers import DynamicCache
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACache, DeepseekV4RotaryEmbedding

    arch = layout(window, stride, kv_heads=1, tied="vector", rope="1/2", rope_theta=160000.0)
    arch.pattern = ["new pooled"]
    model = build(small(arch, num_layers=1, window=None, qk_norm="head", norm_eps=1e-6), torch.float32)
    block, store, length = model.layers[0], model.plan.stores[0], 21
    with torch.no_grad():
        attention, config = deepseek_v4(model, stride, window)
        x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))
        rotary = DeepseekV4RotaryEmbedding(config)

        def theirs(begin: int, end: int, cache: Any) -> Tensor:
            place = torch.arange(begin, end)[None].expand(2, -1)
            distance = place[0][:, None] - torch.arange(max(0, begin - window + 1), end)
            mask = torch.zeros(2, 1, *distance.shape)
            mask = mask.masked_fill((distance < 0) | (distance >= window), float("-inf"))
            tables = {"compress": rotary(x, place, layer_type="compress")}
            return attention(x[:, begin:end], tables, place, mask, cache)[0]

        rope, sequences = rope_table(torch.arange(length), *store.rope_key), SequenceBatch(2, length, None, x.device)
        positions = StridedBackend("sdpa", "", stride, store.rope_key).mask(sequences, window, x.dtype)
        ours = block.reader(x, block.writer(x, rope, positions), rope, positions)
        torch.testing.assert_close(ours, theirs(0, length, None), rtol=0, atol=1e-5)
        cache = DynamicCache(config=config)
        assert isinstance(cache.layers[0], DeepseekV4HCACache)
        ends = [9, 14, *range(15, length + 1)]
        parts = [theirs(begin, end, cache) for begin, end in pairwise([0, *ends])]
        torch.testing.assert_close(ours, torch.cat(parts, dim=1), rtol=0, atol=1e-5)
        assert cache.layers[0].compressed_kv["compressor"].shape[1] == store.num_entries(length)


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
        ({"kv_heads": 1, "stride": 4, "window": 4, "tied": "half"}, "tied is 'half'; entries are pooled apart, or as"),
    ],
)
def test_refusals(store: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(small(ArchConfig({"kv": StoreConfig(**store)}, ["new kv"]), num_layers=1))


def test_both_decoders_of_a_block_transformer_take_strides() -> None:
    config = small("block")
    for part in (config.arch, config.arch.block.token):
        part.stores, part.pattern = {"pooled": StoreConfig(2, window=2, stride=2, sinks=True)}, ["new pooled"]
    model, batch = build(config), tokens(2, 15)
    with torch.no_grad():
        cache = model.allocate_cache(2, 15)
        for end in range(4, 15):
            new = batch[:, end - 1 : end] if end > 4 else batch[:, :4]
            whole = model.next_token_logits(batch[:, :end])[:, -1:]
            torch.testing.assert_close(model(new, cache, last_only=True), whole, rtol=0, atol=1e-10)


def test_backends_of_other_kinds_are_refused() -> None:
    """Also in the token decoder of a Block Transformer alone; beside a store that takes fla, its backend is sdpa."""
    config = small("block")
    config.arch.block.token.stores["kv"] = StoreConfig("all", window=4, stride=2)
    with pytest.raises(ValueError, match=r"^backend fla is for bounded stores and matrix stores, and .* kv pools pos"):
        BlockTransformer(config, "fla", "cuda")
    plan = resolve(config).token
    assert not has_own_kernel("fla", plan)
    chosen = choose_backends("rows", config.size, plan, "cuda")
    assert {(backend.name, backend.about.partition(",")[0]) for backend in chosen} == {("sdpa", "strided")}
