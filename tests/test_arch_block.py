"""The Block Transformer: the published numbers of its weights and outputs, decoding, and what it costs."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import pytest
import torch
from conftest import build, small, tokens
from conversions import from_neox, from_official
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from arch import (
    ArchConfig,
    BlockConfig,
    BlockTransformer,
    Decoder,
    LatentConfig,
    LayoutError,
    ModelConfig,
    SizeConfig,
    StoreConfig,
    TokenDecoderConfig,
    allocate_blocks,
    from_dict,
    plan_from_dict,
    resolve,
)
from arch.convert import ConversionError, UnsupportedModelError
from arch.convert_stock_export import to_hf_config
from arch.footprint import allocated_bytes, forward_flops, kv_bytes, num_params, prefill_flops
from arch.generation import generate
from arch.plan import KVPlan, resolve_stack
from arch.spans import visible_pairs
from train.loss import cross_entropy_sum

MHA = {"kv": StoreConfig(kv_heads="all")}
NEOX = {"style": "neox", "tie_embeddings": False}
# Layouts of a decoder: (stores, pattern)
LAYOUTS = {
    "mha": (MHA, ["new kv"]),
    "cla2": ({"kv": StoreConfig(kv_heads=1, kv_norm=True)}, ["new kv", "reuse kv"]),
    "gqa": ({"kv": StoreConfig(kv_heads="1/4")}, ["new kv"]),
    "mixed": (
        {"all": StoreConfig(kv_heads=2), "near": StoreConfig(kv_heads=1, window=3, sinks=True)},
        ["new near", "new all", "reuse near"],
    ),
    "mla": ({"kv": StoreConfig(latent=LatentConfig(dim="1/1"))}, ["new kv"]),
}
# Of the block section: name, what differs from the default, of the token decoder's part, of the size
KINDS: dict[str, tuple[dict, dict, dict]] = {
    "prefix2": ({}, {}, {}),
    "prefix1": ({}, {"prefix": 1}, NEOX),
    "prefix3_narrow": (
        {"length": 3, "embedder": "projection", "embed_dim": 5},
        {"prefix": 3, "d_model": 16, "num_heads": 4, "d_ff": 24},
        {},
    ),
    "summation": ({"embedder": "projection"}, {"kind": "summation", "bos_token": 3}, NEOX),
    "start": ({"start": True}, {}, {}),
    "start_summation": ({"start": True, "length": 2}, {"kind": "summation"}, {"tie_embeddings": False}),
    "length1": ({"length": 1}, {"prefix": 1}, {}),
}


def block_config(kind: str = "prefix2", coarse: str = "mha", fine: str = "mha", **size: object) -> ModelConfig:
    block, token, widths = KINDS[kind]
    arch = ArchConfig(*copy.deepcopy(LAYOUTS[coarse]))
    arch.block = BlockConfig(**block, token=TokenDecoderConfig(*copy.deepcopy(LAYOUTS[fine]), **token))
    return small(arch, **({"num_layers": 6, "d_model": 24, "num_heads": 8, "window": None} | widths | size))


def build_block(config: ModelConfig, dtype: torch.dtype = torch.float64, backend: str = "auto") -> BlockTransformer:
    model = BlockTransformer(config, backend)
    model.init_weights(seed=1)
    if model.start is not None:
        torch.nn.init.normal_(model.start, generator=torch.Generator().manual_seed(2))
    return model.to(dtype).eval()


VOCAB, WIDTH, HEADS, LENGTH = 96, 64, 4, 4


def formula(name: str, *shape: int) -> Tensor:
    """The weights under which the outputs were recorded: a hash of the name and the index."""
    x = torch.arange(math.prod(shape)) * 0x9E3779B1 + sum(name.encode()) * 0x85EBCA77
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x &= 0xFFFFFFFF
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x ^= x >> 15
    value = 0.5 * (2 * x.double() / 2**32 - 1)
    return (value + name.endswith(("layernorm.weight", "layer_norm.weight"))).view(shape)


def official_state(prefix: int = 2, kind: str = "prefix", embed_dim: int | None = None) -> dict[str, Tensor]:
    context = prefix if kind == "prefix" else LENGTH
    shapes: dict[str, tuple[int, ...]] = {"embedder.embeddings.weight": (VOCAB, embed_dim or WIDTH // LENGTH)}
    if embed_dim:
        shapes["embedder.projection_layer.weight"] = (WIDTH, embed_dim, LENGTH)
        shapes["embedder.projection_layer.bias"] = (WIDTH,)
    for stack, layers in (("block_decoder", 2), ("token_decoder", 3)):
        shapes[f"{stack}.gpt_neox.embed_in.weight"] = (VOCAB, WIDTH)
        modules = {"final_layer_norm": (WIDTH,)}
        for layer in range(layers):
            modules |= {
                f"layers.{layer}.input_layernorm": (WIDTH,),
                f"layers.{layer}.post_attention_layernorm": (WIDTH,),
                f"layers.{layer}.attention.query_key_value": (3 * WIDTH, WIDTH),
                f"layers.{layer}.attention.dense": (WIDTH, WIDTH),
                f"layers.{layer}.mlp.dense_h_to_4h": (4 * WIDTH, WIDTH),
                f"layers.{layer}.mlp.dense_4h_to_h": (WIDTH, 4 * WIDTH),
            }
        for module, shape in modules.items():
            shapes[f"{stack}.gpt_neox.{module}.weight"] = shape
            shapes[f"{stack}.gpt_neox.{module}.bias"] = shape[:1]
    shapes["token_decoder.expansion_layer.weight"] = (context * WIDTH, WIDTH, 1)
    shapes["token_decoder.expansion_layer.bias"] = (context * WIDTH,)
    shapes["token_decoder.embed_out.weight"] = (VOCAB, WIDTH)
    return {name: formula(name, *shape) for name, shape in shapes.items()}


def official_model(
    prefix: int = 2, kind: str = "prefix", embed_dim: int | None = None
) -> tuple[BlockTransformer, dict[str, Tensor]]:
    embedder = "projection" if embed_dim else "lookup"
    token = TokenDecoderConfig(copy.deepcopy(MHA), ["new kv"], kind=kind, prefix=prefix, layers=3)
    block = BlockConfig(length=LENGTH, embedder=embedder, embed_dim=embed_dim, token=token)
    arch = ArchConfig(copy.deepcopy(MHA), ["new kv"], block=block)
    size = SizeConfig(num_layers=5, d_model=WIDTH, num_heads=HEADS, d_ff=4 * WIDTH, vocab_size=VOCAB, **NEOX)
    model = BlockTransformer(ModelConfig(arch, size)).double()
    state = official_state(prefix, kind, embed_dim)
    model.load_state_dict(from_official(state, HEADS, HEADS))
    return model, state


def oracle_ids() -> Tensor:
    q, b = torch.arange(48).view(2, 24), torch.arange(2)[:, None]
    return 2 + (37 * q + 11 * b + q * q // 3) % 94


def near(actual: Tensor, expected: list[float]) -> None:
    """Recorded to 9 decimals. Half of 1e-6 is room for rotary tables, which differ by a rounding of fp32."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_weights_of_the_oracle() -> None:
    state = official_state()
    assert len(state) == 70
    near(state["embedder.embeddings.weight"].flatten()[:3], [-0.041467646, -0.402923229, 0.387621161])
    near(state["token_decoder.expansion_layer.weight"].flatten()[:2], [-0.339427093, 0.275798647])
    near(state["block_decoder.gpt_neox.layers.0.input_layernorm.weight"][:3], [0.940456704, 1.146387748, 1.211710198])
    ids = oracle_ids()
    assert ids[0, :8].tolist() == [2, 39, 77, 22, 61, 7, 48, 89]
    assert ids[1, :4].tolist() == [59, 18, 72, 33]


@torch.no_grad()
def test_outputs_of_the_authors_code() -> None:
    model, _ = official_model()
    ids = oracle_ids()
    embedded = model.embedder(ids)
    near(embedded[0, 0, :4], [0.300123118, -0.275401332, 0.155937086, -0.179601431])
    near(embedded[1, 1, :4], [0.287770908, 0.431970687, -0.436827455, 0.248301591])
    context = model.encode(ids)
    near(context[0, 0, :4], [0.190281390, 0.131893975, 1.549601342, -0.363379078])
    near(context[1, 5, :4], [0.855959156, -0.564634773, -1.487815467, -0.939865157])
    expanded = model.expand(context[0])[0]
    near(expanded[0, :4], [3.237186564, -1.976951848, 1.593150839, 1.904498932])
    near(expanded[1, :4], [1.214443073, -0.627814175, 1.926931932, -0.005084279])

    logits = model(ids)
    blocks = logits.view(2, 5, 4, VOCAB)
    near(blocks[0, 0, 0, :4], [-1.831609055, 1.931137008, -0.150539716, -2.825000377])
    near(blocks[1, 4, 3, :4], [2.339381121, 0.916199384, 2.290718690, -1.829690014])
    near(blocks[0, 2, :, 0], [0.591040079, -1.056015210, 2.742378376, 1.624593310])
    loss = F.cross_entropy(logits.flatten(0, 1), model.select_targets(ids).flatten(), reduction="none").view(10, 4)
    near(loss.mean(), 7.5975505663)
    near(loss.mean(dim=0), [7.52906370, 8.40527820, 6.51074859, 7.94511178])
    # Sums over 3840 logits, each with its 3e-7.
    assert abs(float(logits.sum()) - 701.05757830) < 1e-4
    assert abs(float(logits.square().sum()) - 24337.81493509) < 1e-2
    said = [
        [[63, 67, 50, 24], [28, 17, 22, 10], [28, 63, 81, 85], [17, 67, 47, 63], [28, 47, 22, 48]],
        [[81, 81, 58, 77], [81, 63, 93, 45], [81, 47, 58, 47], [81, 58, 47, 58], [81, 63, 58, 66]],
    ]
    assert blocks.argmax(dim=-1).tolist() == said


def neox_stack(state: dict[str, Tensor], name: str, layers: int, x: Tensor, real: Tensor) -> Tensor:
    """GPT-NeoX as its paper and the library define it, written without anything of ours: [B, S, D] of one batch."""
    state = {key.removeprefix(f"{name}.gpt_neox."): value for key, value in state.items() if key.startswith(name)}
    width, (batch, length) = WIDTH // HEADS, x.shape[:2]
    rotary = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency).repeat(1, 2)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | ~real[:, None, None]
    bias = hidden.to(x.dtype) * torch.finfo(x.dtype).min

    def turned(y: Tensor) -> Tensor:
        head, rest = y[..., :rotary], y[..., rotary:]
        half = torch.cat((-head[..., rotary // 2 :], head[..., : rotary // 2]), dim=-1)
        return torch.cat((head * angle.cos() + half * angle.sin(), rest), dim=-1)

    def norm(y: Tensor, key: str) -> Tensor:
        return F.layer_norm(y, (WIDTH,), state[f"{key}.weight"], state[f"{key}.bias"], 1e-5)

    for layer in range(layers):

        def linear(y: Tensor, key: str, layer: int = layer) -> Tensor:
            return F.linear(y, state[f"layers.{layer}.{key}.weight"], state[f"layers.{layer}.{key}.bias"])

        qkv = linear(norm(x, f"layers.{layer}.input_layernorm"), "attention.query_key_value")
        q, k, v = qkv.view(batch, length, HEADS, 3 * width).transpose(1, 2).split(width, dim=-1)
        weight = (turned(q) @ turned(k).mT * width**-0.5 + bias).softmax(dim=-1)
        attended = linear((weight @ v).transpose(1, 2).flatten(2), "attention.dense")
        inner = F.gelu(linear(norm(x, f"layers.{layer}.post_attention_layernorm"), "mlp.dense_h_to_4h"))
        x = x + attended + linear(inner, "mlp.dense_4h_to_h")
    return norm(x, "final_layer_norm")


def reference_logits(state: dict[str, Tensor], ids: Tensor, real: Tensor, kind: str, prefix: int) -> Tensor:
    """[B, N - 1, L, V] of the authors' model, a row at a time, step by step as their paper tells it."""
    batch, blocks = len(ids), ids.shape[1] // LENGTH
    table = state["embedder.embeddings.weight"]
    x = table[ids].view(batch, blocks, LENGTH, -1)
    if "embedder.projection_layer.weight" in state:
        kernel = state["embedder.projection_layer.weight"]
        convolved = F.conv1d(table[ids].mT, kernel, state["embedder.projection_layer.bias"], stride=LENGTH)
        x = convolved.mT
    x = x.reshape(batch, blocks, WIDTH)
    context = neox_stack(state, "block_decoder", 2, x, real.view(batch, blocks, LENGTH).any(-1))
    expand = partial(
        F.linear,
        weight=state["token_decoder.expansion_layer.weight"][..., 0],
        bias=state["token_decoder.expansion_layer.bias"],
    )
    embed, rows = state["token_decoder.gpt_neox.embed_in.weight"], []
    for b in range(batch):
        for n in range(1, blocks):
            part = slice(n * LENGTH, (n + 1) * LENGTH - 1)
            vectors = expand(context[b, n - 1]).view(-1, WIDTH)
            if kind == "prefix":
                inputs = torch.cat((vectors, embed[ids[b, part]]))
            else:
                inputs = vectors + embed[F.pad(ids[b, part], (1, 0))]
            seen = F.pad(real[b, part], (len(inputs) - LENGTH + 1, 0), value=True)
            out = neox_stack(state, "token_decoder", 3, inputs[None], seen[None])[0, -LENGTH:]
            rows.append(out @ state["token_decoder.embed_out.weight"].T)
    return torch.stack(rows).view(batch, blocks - 1, LENGTH, VOCAB)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("kind", "prefix", "embed_dim"),
    [("prefix", 2, None), ("prefix", 1, None), ("summation", 1, None), ("prefix", 3, WIDTH), ("summation", 2, 6)],
)
@torch.no_grad()
def test_variants_and_padding_against_a_plain_reference(
    kind: str, prefix: int, embed_dim: int | None, padding: bool
) -> None:
    model, state = official_model(prefix, kind, embed_dim)
    ids = oracle_ids()
    real = torch.ones_like(ids, dtype=torch.bool)
    if padding:  # left in the first block, at the end of a document, and left of the next one
        real[0, :3] = real[1, 11] = real[1, 12:14] = real[0, 23] = False
        real[0, 4:8] = False  # a whole block
        ids = ids * real
    expected = reference_logits(state, ids, real, kind, prefix).flatten(1, 2)
    actual = model(ids, segment_ids_BT=segment_ids(real)) if padding else model(ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    if padding:
        assert (model(ids) - actual).abs().max() > 1e-2
    else:
        torch.testing.assert_close(model(ids, segment_ids_BT=segment_ids(real)), actual, rtol=0, atol=1e-12)


@torch.no_grad()
def test_style_neox_is_the_stock_gpt_neox() -> None:
    transformers = pytest.importorskip("transformers")
    config = small("mha", num_layers=3, d_model=64, head_dim=None, num_heads=4, window=None, rope_theta=500.0, **NEOX)
    stock = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=61,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            initializer_range=0.2,
            layer_norm_eps=config.size.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        )
    ).double()
    stock.eval()
    for parameter in stock.parameters():  # biases, which the stock class starts at zero, too
        parameter.normal_(0.0, 0.2)
    model = Decoder(config).double()
    buffers = {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    model.load_state_dict(from_neox(stock.state_dict() | buffers, 4))
    torch.testing.assert_close(model(tokens(2, 9)), stock(tokens(2, 9)).logits, rtol=0, atol=1e-5)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"^- gpt_neox.layers.0.attention.rope.weight is unexpected$"):
        from_neox({"gpt_neox.layers.0.attention.rope.weight": torch.ones(1)}, 1)
    with pytest.raises(ConversionError, match=r"^- other.weight is unexpected$"):
        from_official({"other.weight": torch.ones(1)}, 1, 1)


@torch.no_grad()
def test_style_neox_of_every_layout(arch: str) -> None:
    """Decoding gives the parallel forward's logits, parameters are as counted, the export refuses."""
    config = small(arch, style="neox")
    model = build(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 5)
    assert num_params(config, model.plan) == sum(p.numel() for p in model.parameters())
    rows = generate(model, [[1, 2, 3], [5, 6, 7, 8, 9]], 8)
    for prompt, row in zip(([1, 2, 3], [5, 6, 7, 8, 9]), rows, strict=True):
        logits = model(torch.tensor([[*prompt, *row[:-1]]]))
        assert logits[0, len(prompt) - 1 :].argmax(dim=-1).tolist() == row
    with pytest.raises(UnsupportedModelError, match=r"size.style: neox"):
        to_hf_config(config)


# name: (width, heads, layers of each decoder, layers only, with expansion and norms, embedder, each table, total)
PUBLISHED = {
    "33M": (256, 8, 3, 4_738_560, 4_871_168, 3_219_456, 12_877_824, 33_846_272),
    "77M": (512, 8, 3, 18_914_304, 19_441_664, 6_438_912, 25_755_648, 77_391_872),
    "170M": (768, 12, 6, 85_054_464, 86_238_720, 9_658_368, 38_633_472, 173_164_032),
    "420M": (1024, 16, 12, 302_309_376, 304_412_672, 12_877_824, 51_511_296, 420_313_088),
    "1.0B": (2048, 16, 8, 805_732_352, 814_133_248, 25_755_648, 103_022_592, 1_045_934_080),
    "1.4B": (2048, 16, 12, 1_208_598_528, 1_216_999_424, 25_755_648, 103_022_592, 1_448_800_256),
}
VANILLA = {
    "31M": (256, 8, 6, 30_494_720),
    "70M": (512, 8, 6, 70_426_624),
    "160M": (768, 12, 12, 162_322_944),
    "410M": (1024, 16, 24, 405_334_016),
}


def paper_size(width: int, heads: int, layers: int) -> SizeConfig:
    return SizeConfig(num_layers=layers, d_model=width, num_heads=heads, d_ff=4 * width, vocab_size=50304, **NEOX)


def paper_config(name: str) -> ModelConfig:
    width, heads, layers = PUBLISHED[name][:3]
    token = TokenDecoderConfig(copy.deepcopy(MHA), ["new kv"])
    arch = ArchConfig(copy.deepcopy(MHA), ["new kv"], block=BlockConfig(token=token))
    return ModelConfig(arch, paper_size(width, heads, 2 * layers))


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_paper(name: str) -> None:
    *_, layers, with_adapters, embedder, table, total = PUBLISHED[name]
    config = paper_config(name)
    with torch.device("meta"):
        model = BlockTransformer(config)
    coarse, fine = model.block_decoder, model.token_decoder
    assert count(coarse.layers, fine.layers) == layers
    assert count(coarse, fine.layers, fine.norm, model.expansion) == with_adapters
    assert count(model.embedder) == embedder
    assert count(fine.embed) == count(fine.lm_head) == table
    assert count(model) == num_params(config, model.plan) == total


@pytest.mark.parametrize("name", VANILLA)
def test_parameters_of_the_baseline(name: str) -> None:
    *widths, total = VANILLA[name]
    config = ModelConfig(ArchConfig(copy.deepcopy(MHA), ["new kv"]), paper_size(*widths))
    with torch.device("meta"):
        model = Decoder(config)
    assert count(model) == num_params(config, resolve(config)) == total


def test_bytes_of_the_paper() -> None:
    """Facts of the paper's sizes, bf16: MB of the block cache at 2048 tokens, kB of the token cache."""
    published = {"33M": (1.573, 15.4), "170M": (9.437, 92.2), "420M": (25.17, 245.8), "1.4B": (50.33, 491.5)}
    for name, (block, token) in published.items():
        plan = resolve(paper_config(name))
        cost = kv_bytes(plan, 2048)
        assert f"{(cost.stored - cost.constant) / 1e6:.4g}" == f"{block:.4g}"
        assert f"{cost.constant / 1e3:.1f}" == str(token)
        assert cost.per_token * 2048 == cost.stored - cost.constant
    assert round(float(cost.read) / 1e6, 2) == 12.93  # 1.4B: 12.58 of the block decoder, 0.344 of the token decoder


def test_flops_of_the_paper() -> None:
    """MFLOP per token at 2048 tokens, within the block in 512 that is not predicted, and the diagonal."""
    for name, published in {"33M": 33.1, "170M": 206.5, "420M": 560.4, "1.4B": 2028.8}.items():
        config = paper_config(name)
        assert forward_flops(config, resolve(config), 2048) / 2048 / 1e6 == pytest.approx(published, rel=4e-3)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"length1"}))  # the counter misses products over one slot
@pytest.mark.parametrize("coarse", LAYOUTS)
def test_parameters_and_flops_are_those_of_the_model(kind: str, coarse: str) -> None:
    """The counter sees every pair; the formula, like that of Decoder, those that are visible."""
    config = block_config(kind, coarse, "cla2")
    model = build_block(config, backend="reference")
    assert count(model) == num_params(config, model.plan)
    length = 4 * model.plan.block_length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, length))
    hidden = 0
    predicted = 4 if model.start is not None else 3
    for stack, slots, rows in ((model.block_decoder, 3, 1), (model.token_decoder, model.plan.num_positions, predicted)):
        for layer in range(stack.plan.num_layers):
            pairs = slots * slots - visible_pairs(slots, stack.plan.store(layer).window)
            hidden += rows * stack.plan.store(layer).pair_flops(stack.config.size) * pairs
    assert counter.get_total_flops() == forward_flops(config, model.plan, length) + hidden


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"length1"}))
def test_flops_of_prefill_are_those_of_the_model(kind: str) -> None:
    """A prompt of whole blocks and a token more: both decoders stop at their last writers."""
    config = block_config(kind, "cla2", "cla2")
    model = build_block(config, backend="reference")
    length = 4 * model.plan.block_length + 1
    cache = model.allocate_cache(1, length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.prefill(tokens(1, length), cache)
    hidden = 0
    positions = model.plan.num_positions - model.plan.block_length + 2
    for stack, slots in ((model.block_decoder, 4), (model.token_decoder, positions)):
        for layer in range(stack.plan.tail):
            pairs = slots * slots - visible_pairs(slots, stack.plan.store(layer).window)
            hidden += stack.plan.store(layer).pair_flops(stack.config.size) * pairs
    assert counter.get_total_flops() == prefill_flops(config, model.plan, length) + hidden
    with pytest.raises(ValueError, match="give a longer context"):
        prefill_flops(config, model.plan, model.plan.min_prompt - 1)


CASES = [(kind, "mha", "mha") for kind in KINDS] + [
    ("prefix2", "cla2", "mixed"),
    ("prefix1", "mixed", "cla2"),
    ("summation", "mla", "gqa"),
    ("prefix3_narrow", "gqa", "mla"),
    ("start", "mixed", "mixed"),
]


@pytest.mark.parametrize(("kind", "coarse", "fine"), CASES)
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_parallel_forward(kind: str, coarse: str, fine: str, chunk: int) -> None:
    """Contexts block by block or in chunks of three, tokens one by one; 7 blocks are more than two windows."""
    model = build_block(block_config(kind, coarse, fine))
    length, blocks = model.plan.block_length, 7
    ids = tokens(2, blocks * length)
    expected = model(ids).unflatten(1, (-1, length))
    cache = allocate_blocks(model.plan, 2, blocks * length, dtype=torch.float64)
    parts = [ids[:, b : b + chunk * length] for b in range(0, blocks * length, chunk * length)]
    context = torch.cat([model.encode(part, cache.blocks) for part in parts], dim=1)
    if model.start is not None:
        context = torch.cat((model.start.expand(2, 1, -1), context), dim=1)
    for number in range(expected.shape[1]):
        block = model.select_targets(ids)[:, number * length : (number + 1) * length]
        vectors = model.expand(context[:, number])
        for begun in (0, length - 1):
            logits = [model.start_block(vectors, block[:, :begun], cache.tokens)]
            for j in range(begun, length - 1):
                logits.append(model.continue_block(vectors, block[:, j : j + 1], j, cache.tokens))
            torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, number, begun:], rtol=0, atol=1e-12)


def segment_ids(real: Tensor | None) -> Tensor | None:
    """0 where `real`, -1 at padding."""
    return None if real is None else real.long() - 1


PROMPTS = [[7], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 2], [3] * 11, [4, 4, 60, 1]]


def greedy(model: BlockTransformer, prompt: list[int], new: int, padding: int = 0) -> list[int]:
    """By the parallel forward alone, a token at a time; what follows the last token does not matter.

    The first `padding` tokens are no part of the prompt.
    """
    row = list(prompt)
    while len(row) < len(prompt) + new:
        filled = row + [0] * (-(len(row) + 1) % model.plan.block_length + 1)
        real = (torch.arange(len(filled)) >= padding)[None] if padding else None
        with torch.no_grad():
            logits = model(torch.tensor([filled]), segment_ids_BT=segment_ids(real))[0]
        row.append(int(logits[len(row) - len(filled)].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(("kind", "coarse", "fine"), CASES)
def test_generation_is_the_greedy_choice_of_the_parallel_forward(kind: str, coarse: str, fine: str) -> None:
    """Prompts of all lengths in one batch, and each by itself."""
    model = build_block(block_config(kind, coarse, fine))
    prompts = [p for p in PROMPTS if model.start is not None or len(p) >= model.plan.block_length]
    expected = [greedy(model, prompt, 10) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 3
    assert generate(model, prompts, 10) == expected
    for new in (1, 2):
        assert generate(model, prompts, new) == [row[:new] for row in expected]
    assert [generate(model, [prompt], 10)[0] for prompt in prompts[:2]] == expected[:2]
    stop = expected[0][4]
    stopped = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert generate(model, prompts, 10, stop_token=stop) == stopped


def test_generation_ends_when_all_rows_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_block(block_config())
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    stop = greedy(model, prompts[0], 1)[0]
    monkeypatch.setattr(
        model, "continue_block", None
    )  # the first token is said by `start_block`, given what the prompt left over
    assert generate(model, prompts, 500, stop_token=stop) == [[], []]


def test_a_stop_token_in_a_prompt_stops_nothing() -> None:
    """Row 1 is given the token, in the block that both rows share, when row 0 says it."""
    model = build_block(block_config())
    stop = greedy(model, [1, 2, 3, 4], 1)[0]
    expected = greedy(model, [9, 8, 7, 6, stop], 9)
    assert stop not in expected[:3]
    rows = generate(model, [[1, 2, 3, 4], [9, 8, 7, 6, stop]], 3, stop_token=stop)
    assert rows == [[], expected[:3]]


def test_short_prompts() -> None:
    model = build_block(block_config())
    with pytest.raises(ValueError, match=r"has 2 tokens, less than a block of 4: .* pad_token"):
        generate(model, [[1, 2, 3, 4], [1, 2]], 3)
    assert generate(model, [[1, 2]], 5, pad_token=9) == [greedy(model, [9, 9, 1, 2], 5)]


def test_a_used_cache_is_refused() -> None:
    """After a block, and before the first one is complete."""
    model = build_block(block_config("start"))
    for prompt, new in (([1, 2], 1), ([1, 2, 3], 1), ([1, 2, 3], 3), ([1, 2, 3, 4], 1)):
        cache = allocate_blocks(model.plan, 1, 16, dtype=torch.float64)
        assert generate(model, [prompt], new, cache=cache) == [greedy(model, prompt, new)]
        with pytest.raises(ValueError, match="prompts need an empty one"):
            generate(model, [prompt], new, cache=cache)


def test_sampling_takes_a_seed() -> None:
    model = build_block(block_config())
    draw: Callable[[int], list] = lambda seed: generate(model, [[1] * 6], 12, temperature=1.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(("kind", "coarse", "fine"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_stored_are_those_of_the_storages(kind: str, coarse: str, fine: str, batch: int) -> None:
    plan = resolve(block_config(kind, coarse, fine))
    for context in (1, plan.block_length, 3 * plan.block_length - 1, 3 * plan.block_length, 20 * plan.block_length):
        cache = allocate_blocks(plan, batch, context, dtype=torch.bfloat16)
        assert cache.nbytes == allocated_bytes(plan, batch, context)
    cache = allocate_blocks(plan, 1, 8 * plan.block_length, dtype=torch.float32)
    assert cache.nbytes == kv_bytes(plan, 8 * plan.block_length, 4).stored


@pytest.mark.parametrize(("kind", "coarse", "fine"), CASES)
@torch.no_grad()
def test_bytes_read_are_those_handed_to_attention(kind: str, coarse: str, fine: str) -> None:
    """One block said after 6, the pass of the block decoder that makes its context included."""
    model = build_block(block_config(kind, coarse, fine))
    length, blocks = model.plan.block_length, 6
    ids = tokens(1, (blocks + 1) * length)
    cache = allocate_blocks(model.plan, 1, blocks * length, dtype=torch.float64)
    model.encode(ids[:, : (blocks - 1) * length], cache.blocks)
    read = []
    for stack in (model.block_decoder, model.token_decoder):
        for block in stack.layers:
            block.reader.register_forward_pre_hook(lambda _, args: read.append(sum(slot.nbytes for slot in args[1])))
    context = model.encode(ids[:, (blocks - 1) * length : blocks * length], cache.blocks)[:, -1]
    vectors = model.expand(context)
    model.start_block(vectors, ids[:, :0], cache.tokens)
    for j in range(length - 1):
        model.continue_block(vectors, ids[:, j : j + 1], j, cache.tokens)
    expected = kv_bytes(model.plan, blocks * length, 8).read * length
    first = model.plan.num_positions - length + 1
    # The first pass of the token decoder has not filled a window yet: a chunk that begins reads its own slots.
    extra = sum(
        (first - store.num_positions(first)) * store.slot.elements * 8
        for store in map(model.token_decoder.plan.store, range(model.token_decoder.plan.num_layers))
    )
    # A ring that is not full yet is handed over whole.
    for seen in range(first + 1, model.plan.num_positions + 1):
        extra += sum(
            (min(store.window, model.plan.num_positions) - store.num_positions(seen)) * store.slot.elements * 8
            for store in map(model.token_decoder.plan.store, range(model.token_decoder.plan.num_layers))
            if store.window is not None
        )
    assert sum(read) == expected + extra


def gradient_by_token(model: BlockTransformer, ids: Tensor, position: int, real: Tensor | None = None) -> Tensor:
    """How much the logits of token `position` of the one row depend on the embeddings of each token."""
    gradient = torch.zeros(ids.shape[1], dtype=torch.float64)
    leaves: list[Tensor] = []

    def keep(_: object, __: object, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    length = model.plan.block_length
    handles = [m.register_forward_hook(keep) for m in (model.embedder.embed, model.token_decoder.embed)]
    model(ids, segment_ids_BT=segment_ids(real))[
        0, position - (0 if model.start is not None else length)
    ].square().sum().backward()
    for handle in handles:
        handle.remove()
    by_block, by_token = (leaf.grad.abs().sum(-1).flatten() for leaf in leaves)
    gradient[: len(by_block)] += by_block
    rows = by_token.view(-1, len(by_token) // len(model.select_targets(ids)[0].view(-1, length)))[:, -(length - 1) :]
    first = 0 if model.start is not None else 1
    for number, row in enumerate(rows, start=first):
        gradient[number * length : number * length + length - 1] += row
    return gradient


@pytest.mark.parametrize("kind", ["prefix2", "summation", "start"])
def test_causal_by_gradient(kind: str) -> None:
    """A prediction depends on the blocks before and on its own block's tokens before it, and on nothing else."""
    model = build_block(block_config(kind))
    ids = tokens(1, 16)
    for position in (4, 6, 11, 13):
        gradient = gradient_by_token(model, ids, position)
        assert (gradient != 0).tolist() == [token < position for token in range(16)]


@pytest.mark.parametrize("kind", ["prefix2", "start_summation"])
def test_chunked_loss_is_the_loss(kind: str) -> None:
    model = build_block(block_config(kind), torch.float32).train()
    ids = tokens(3, 16)
    targets = model.select_targets(ids)
    total = model(ids, head=cross_entropy_sum(targets))
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(total, plain)
    assert targets.shape == (3, 16 if model.start is not None else 12)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (total, plain)]
    for chunked, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-4)
        assert chunked.abs().max() > 0


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = build_block(block_config("prefix2", "cla2", "cla2")).train()
    gradients = []
    for on in (False, True):
        model.block_decoder.activation_checkpointing = model.token_decoder.activation_checkpointing = on
        gradients.append(torch.autograd.grad(model(tokens(2, 12)).square().sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_weights() -> None:
    model = BlockTransformer(block_config("prefix3_narrow", d_model=48, head_dim=6, num_heads=8))
    model.init_weights()
    assert float(model.expansion.weight.detach().std()) == pytest.approx(48**-0.5, rel=0.05)
    assert float(model.embedder.proj.weight.detach().std()) == pytest.approx(15**-0.5, rel=0.1)
    assert float(model.token_decoder.embed.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert not model.expansion.bias.any()


def test_plans_of_the_two_decoders() -> None:
    config = block_config("prefix2", "mixed", "cla2", num_layers=7)
    config.arch.block.token.layers = 3
    plan = resolve(config)
    assert (str(plan.block), str(plan.token)) == ("0s 1 0s 3s", "0 0 2")
    assert (plan.block_length, plan.num_context_vectors, plan.num_positions) == (4, 2, 5)
    assert hash(plan) == hash(resolve(config))
    assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(LayoutError, match=r"arch.block makes this a Block Transformer"):
        resolve_stack(config)
    with pytest.raises(LayoutError, match=r"arch.block is missing"):
        BlockTransformer(small("mha"))


def test_all_problems_are_told_at_once() -> None:
    config = block_config("prefix2", d_model=18, head_dim=8)
    config.arch.pattern = ["new k"]
    block = config.arch.block
    block.embed_dim, block.token.kind, block.token.bos_token, block.token.prefix = 7, "postfix", 61, 0
    block.token.stores["kv"].kv_heads = 3
    with pytest.raises(LayoutError) as error:
        BlockTransformer(config)
    for part in (
        "arch.block.token.prefix is 0; it must be at least 1",
        "arch.block.token.kind is 'postfix'; it is one of prefix, summation, cross",
        "arch.block.token.bos_token is 61; it is no token of 61",
        "arch.block.embed_dim is of the embedder `projection`",
        "- arch.pattern: `new k` names no store type",
        "token decoder: arch.block.token.stores.kv.kv_heads 3 does not divide the 8 query heads",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 5}, "size.d_model 24 is not a multiple of arch.block.length 5"),
        ({"length": 0}, "arch.block.length is 0"),
        ({"embedder": "sum"}, "arch.block.embedder is 'sum'; it is one of lookup, projection, encoder, cls"),
        ({"embedder": "projection", "embed_dim": 0}, "arch.block.embed_dim is 0"),
    ],
)
def test_impossible_blocks(change: dict, message: str) -> None:
    config = block_config()
    for key, value in change.items():
        setattr(config.arch.block, key, value)
    with pytest.raises(LayoutError, match=message):
        resolve(config)


def test_no_layer_attends_across_with_one_vector_for_key_and_value() -> None:
    config = block_config("prefix2")
    config.arch.block.token.kind = "cross"
    for store in (StoreConfig(2, window=2, stride=2, tied="vector"), StoreConfig(2, tied="vector")):
        config.arch.block.token.stores = {"kv": store}
        with pytest.raises(LayoutError, match=r"arch\.block\.token\.kind is 'cross'"):
            resolve(config)


def test_widths_are_told_once_and_by_their_name() -> None:
    config = block_config("prefix3_narrow", head_dim=None, d_model=26)
    config.arch.block.token.num_heads = 5
    with pytest.raises(LayoutError) as error:
        resolve(config)
    coarse, fine = str(error.value).splitlines()
    assert coarse.startswith("- size.d_model 26 is not a multiple of size.num_heads 8")
    assert "arch.block.token.d_model 16 is not a multiple of arch.block.token.num_heads 5" in fine
    config = block_config(head_dim=7)
    with pytest.raises(LayoutError) as error:
        resolve(config)
    assert str(error.value) == "- the head dimension is 7; rotary embeddings need an even one"


@pytest.mark.parametrize("layers", [0, 6, "1/1", "half", "1/7"])
def test_impossible_shares_of_layers(layers: object) -> None:
    config = block_config()
    config.arch.block.token.layers = layers
    with pytest.raises(LayoutError, match=r"arch.block.token.layers is .*; write a number of the 6 layers"):
        resolve(config)


@pytest.mark.parametrize(("change", "message"), [({"style": "gpt"}, "size.style is 'gpt'"), ({"head_dim": 4}, "of 8")])
def test_impossible_styles(change: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(small("mha", **({"style": "neox"} | change)))


@pytest.mark.parametrize("length", [4, 6, 0])
def test_lengths_that_no_block_fits(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens per row; give a multiple of the block length 4"):
        build_block(block_config())(tokens(1, length))


def test_configuration_is_read_from_yaml_as_from_json() -> None:
    text = """
    stores: {kv: {kv_heads: all}}
    pattern: [new kv]
    block:
      embedder: projection
      token: {kind: summation, layers: 2, stores: {kv: {kv_heads: 1}}, pattern: [new kv, reuse kv]}
    """
    schema = OmegaConf.structured(ArchConfig)
    arch = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(text)))
    assert arch == from_dict(ArchConfig, asdict(arch))
    assert arch.block.token.layers == 2
    with pytest.raises(ConfigKeyError, match="lenght"):
        OmegaConf.merge(schema, {"block": {"lenght": 3}})
    with pytest.raises(
        ValueError, match="BlockConfig has no lenght; its keys are embed_dim, embedder, encoder, length"
    ):
        from_dict(ArchConfig, {"block": {"lenght": 3}})


def test_plans_without_a_rotary_width_are_still_read() -> None:
    plan = resolve(small("mha", style="neox"))
    assert {store.rotary_dim for store in plan.stores} == {2}
    assert KVPlan.from_dict(plan.to_dict()) == plan
    values = resolve(small("mha")).to_dict()
    for store in values["stores"]:
        del store["rotary_dim"]
    assert KVPlan.from_dict(values) == resolve(small("mha"))
