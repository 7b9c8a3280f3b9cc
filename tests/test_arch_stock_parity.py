"""Layouts against transformers' own classes with the same weights, where no format is exchanged: logits, greedy tokens,
and bytes of caches."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from arch import ModelConfig, SizeConfig, build, generate, kv_bytes
from arch.config import QueryScaleConfig
from arch.decoder import Decoder
from arch.named import load_arch

transformers = pytest.importorskip("transformers")

LENGTH, STEPS, VOCAB = 21, 6, 61
WIDTHS = {"num_hidden_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB}
WIDTHS |= {"max_position_embeddings": 64, "intermediate_size": 48, "tie_word_embeddings": False}
SIZE = SizeConfig(8, 32, 4, 8, 48, VOCAB, tie_embeddings=False, norm_eps=1e-6, init_std=0.3)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Pair(NamedTuple):
    """A stock decoder without its output matrix, our model with its weights, and bytes of its cache that are ours."""

    stock: nn.Module
    ours: Decoder
    cache_bytes: Callable[[Any], int]


def halves(weight: Tensor, heads: int, width: int, rotary: int) -> Tensor:
    """Rows of heads whose last `rotary` of `width` rotate in adjacent pairs, in our order: pairs half of it apart."""
    kept, turned = weight.view(heads, width, -1).split([width - rotary, rotary], dim=1)
    return torch.cat((kept, turned[:, 0::2], turned[:, 1::2]), dim=1).reshape(weight.shape)


def copy(ours: Decoder, pairs: Iterator[tuple[str, Tensor]]) -> None:
    """Every parameter of `ours`, the output matrix aside, once."""
    left = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in pairs:
            left.pop(name).copy_(value)
    assert set(left) == {"lm_head.weight"}


def mistral_large4() -> Pair:
    """Latents shared within their kind, slopes of queries per head; its indexer takes as many tokens as there are."""
    torch.manual_seed(0)
    sources = [0, 0, 2, 3, 2, 5, 5, 3]
    config = transformers.MistralLarge4TextConfig(
        **WIDTHS,
        num_key_value_heads=4,
        kv_lora_rank=32,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        rms_norm_eps=1e-6,
        rope_parameters=ROPE,
        first_k_dense_replace=8,
        mlp_layer_types=["dense"] * 8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        index_topk=64,
        index_head_dim=8,
        index_n_heads=2,
        kv_source_layers=sources,
    )
    stock = transformers.MistralLarge4TextModel(config).eval()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = build(ModelConfig(load_arch("mistral_large4"), SIZE))
    assert ours.plan.owners == tuple(sources)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield "embed.weight", stock.embed_tokens.weight
        yield "norm.weight", stock.norm.weight
        for index, layer in enumerate(stock.layers):
            attention, rotary = layer.self_attn, 4 * config.no_rope_layers[index]
            prefix = f"layers.{index}."
            yield prefix + "attn_norm.weight", layer.input_layernorm.weight
            yield prefix + "mlp_norm.weight", layer.post_attention_layernorm.weight
            yield prefix + "reader.q_proj.weight", halves(attention.q_proj.weight, 4, 8, rotary)
            yield prefix + "reader.kv_up_proj.weight", attention.kv_b_proj.weight
            yield prefix + "reader.o_proj.weight", attention.o_proj.weight
            yield prefix + "reader.head_scale.slope", attention.softmax_scaling.scale
            yield prefix + "reader.head_scale.bias", attention.softmax_scaling.bias
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield f"{prefix}mlp.{name}.weight", getattr(layer.mlp, name).weight
            if sources[index] == index:
                down = attention.kv_a_proj_with_mqa.weight
                yield prefix + "writer.kv_down_proj.weight", halves(down, 1, len(down), rotary)
                yield prefix + "writer.latent_norm.weight", attention.kv_a_layernorm.weight

    copy(ours, pairs())

    def cache_bytes(cache: Any) -> int:
        """Of latents and rotary keys; the indexer's keys are others."""
        return sum(t.nbytes for i in set(sources) for t in (cache.layers[i].keys, cache.layers[i].values))

    return Pair(stock, ours, cache_bytes)


def llama4() -> Pair:
    """Chunks of 8 positions, and layers that see all and scale their queries; dense, and without norms of queries and
    keys, as Maverick."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **WIDTHS,
        intermediate_size_mlp=48,
        moe_layers=[],
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_parameters=ROPE | {"rope_theta": 500000.0},
        attention_chunk_size=8,
        floor_scale=3,
        attn_scale=0.7,
        use_qk_norm=False,
    )
    stock = transformers.Llama4TextModel(config).eval()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    layout = load_arch("llama4")
    layout.stores["chunk"].chunk = 8
    layout.stores["nope"].query_scale = QueryScaleConfig(0.7, 3)
    ours = build(ModelConfig(layout, SIZE))

    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield "embed.weight", stock.embed_tokens.weight
        yield "norm.weight", stock.norm.weight
        for index, layer in enumerate(stock.layers):
            attention, prefix = layer.self_attn, f"layers.{index}."
            rotary = 8 * config.no_rope_layers[index]
            yield prefix + "attn_norm.weight", layer.input_layernorm.weight
            yield prefix + "mlp_norm.weight", layer.post_attention_layernorm.weight
            yield prefix + "reader.q_proj.weight", halves(attention.q_proj.weight, 4, 8, rotary)
            yield prefix + "writer.k_proj.weight", halves(attention.k_proj.weight, 1, 8, rotary)
            yield prefix + "writer.v_proj.weight", attention.v_proj.weight
            yield prefix + "reader.o_proj.weight", attention.o_proj.weight
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield f"{prefix}mlp.{name}.weight", getattr(layer.feed_forward, name).weight

    copy(ours, pairs())

    def cache_bytes(cache: Any) -> int:
        """Chunks counted with the position that the cache dropped, as from a window."""
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert {t.shape[2] for t in tensors} == {7, LENGTH + STEPS}
        return sum(t.nbytes // 7 * 8 if t.shape[2] == 7 else t.nbytes for t in tensors)

    return Pair(stock, ours, cache_bytes)


@pytest.mark.parametrize("make", [mistral_large4, llama4])
def test_stock_class_with_our_weights(make: Callable[[], Pair]) -> None:
    stock, ours, cache_bytes = make()
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stock(tokens).last_hidden_state @ ours.output_weight.T
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)
        out, row = stock(tokens, use_cache=True), tokens
        for _ in range(STEPS):
            new = (out.last_hidden_state[:, -1:] @ ours.output_weight.T).argmax(-1)
            row = torch.cat((row, new), dim=1)
            out = stock(new, past_key_values=out.past_key_values, use_cache=True)
        assert generate(ours, tokens, STEPS) == row[:, LENGTH:].tolist()
        stored = kv_bytes(ours.plan, LENGTH + STEPS, itemsize=4).stored
        assert cache_bytes(out.past_key_values) == 2 * stored
