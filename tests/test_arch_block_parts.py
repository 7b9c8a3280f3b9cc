"""Every kind of token decoder with every embedder: decoding, what is looked at, what it costs, what is refused."""

import copy
import json

import pytest
import torch
from conftest import small, tokens
from einops import repeat
from test_arch_block import LAYOUTS, MHA, NEOX, PROMPTS, build_block, count, gradient_by_token, greedy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import arch.cross_attention
from arch import (
    ArchConfig,
    BlockConfig,
    BlockTransformer,
    EncoderConfig,
    LayoutError,
    ModelConfig,
    StoreConfig,
    TokenDecoderConfig,
    allocate_blocks,
    from_dict,
    generate,
    plan_from_dict,
    resolve,
)
from arch.attend import FLEX_ROWS, Backend, Mask, reference
from arch.block_plan import EMBEDDERS, KINDS
from arch.cross_attention import CrossContext
from arch.footprint import allocated_bytes, forward_flops, kv_bytes, num_params
from arch.layers import rope_table
from arch.masks import LONGEST, Dense, rows_end_to_end
from arch.spans import visible_pairs
from eval.footprint import plan_tables

COMBINATIONS = [(kind, embedder) for kind in KINDS for embedder in EMBEDDERS]
ENCODER = {"layers": 2, "d_model": 12, "num_heads": 3, "d_ff": 20, "cls_tokens": 2}
MIXED = {"all": StoreConfig(kv_heads=2), "near": StoreConfig(kv_heads=1, window=3)}, ["new near", "new all"]


def part_config(kind: str, embedder: str, fine: object = MIXED, *, start: bool = False, **size: object) -> ModelConfig:
    """The kinds take turns with the styles, so that each is in both with one embedder or another."""
    neox = (KINDS.index(kind) + EMBEDDERS.index(embedder)) % 2 == 0
    widths = {"d_model": 16, "num_heads": 4, "d_ff": 24} if embedder == "cls" else {}
    token = TokenDecoderConfig(*copy.deepcopy(fine), kind=kind, bos_token=3, layers=2, **widths)
    block = BlockConfig(embedder=embedder, start=start, token=token)
    if embedder in ("encoder", "cls"):
        block.encoder = EncoderConfig(**ENCODER)
    arch = ArchConfig(copy.deepcopy(MHA), ["new kv"], block=block)
    style = NEOX if neox else {}
    return small(arch, **({"num_layers": 4, "d_model": 24, "num_heads": 4, "window": None} | style | size))


def biased(model: BlockTransformer) -> BlockTransformer:
    """With biases and norms that are not what they start from, and cross-attention that is heard among the rest."""
    for layer in model.token_decoder.layers:
        if layer.cross is not None:
            layer.cross.o_proj.weight.data.mul_(8.0)
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            parameter.data.add_(noise / 5)
    return model


def build_part(kind: str, embedder: str, backend: str = "auto", **options: object) -> BlockTransformer:
    return biased(build_block(part_config(kind, embedder, **options), backend=backend))


BOUNDED = {"kv": StoreConfig(kv_heads=2, slots=3, rule="gated")}, ["new kv"]
every = pytest.mark.parametrize(("kind", "embedder"), COMBINATIONS)
on_off = pytest.mark.parametrize("start", [False, True])


@on_off
@pytest.mark.parametrize(
    ("kind", "embedder", "fine"), [*((*pair, MIXED) for pair in COMBINATIONS), ("cross", "cls", BOUNDED)]
)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_parallel_forward(kind: str, embedder: str, fine: object, start: bool) -> None:
    """Contexts in chunks of 1 and 2 blocks; blocks of which nothing, something or all is given."""
    model = build_part(kind, embedder, fine=fine, start=start)
    length, ids = model.plan.block_length, tokens(2, 12)
    expected = model(ids).unflatten(1, (-1, length))
    cache = allocate_blocks(model.plan, 2, 12, dtype=torch.float64)
    context = torch.cat([model.encode(part, cache.blocks) for part in ids.split((4, 8), dim=1)], dim=1)
    if model.start is not None:
        context = torch.cat((model.start.expand(2, 1, -1), context), dim=1)
    for number in range(expected.shape[1]):
        block = model.select_targets(ids)[:, number * length : (number + 1) * length]
        vectors = model.expand(context[:, number])
        for begun in range(length):
            logits = [model.start_block(vectors, block[:, :begun], cache.tokens)]
            for j in range(begun, length - 1):
                logits.append(model.continue_block(vectors, block[:, j : j + 1], j, cache.tokens))
            torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, number, begun:], rtol=0, atol=1e-12)


@on_off
@every
def test_generation_is_the_greedy_choice_of_the_parallel_forward(kind: str, embedder: str, start: bool) -> None:
    """Ragged prompts in one batch; short ones are padded where there is no start, which an encoder must not look at."""
    model = build_part(kind, embedder, start=start)
    prompts, expected = [PROMPTS[0], PROMPTS[1], PROMPTS[3]], []
    for prompt in prompts:
        padding = 0 if start else max(0, model.plan.block_length - len(prompt))
        expected.append(greedy(model, [9] * padding + prompt, 6, padding))
    assert len({tuple(row) for row in expected}) == 3
    assert generate(model, prompts, 6, pad_token=9) == expected
    assert generate(model, prompts[:1], 6, pad_token=9) == expected[:1]


@on_off
@every
def test_causal_by_gradient(kind: str, embedder: str, start: bool) -> None:
    model = build_part(kind, embedder, start=start)
    for position in (4, 6, 11):
        gradient = gradient_by_token(model, tokens(1, 12), position)
        assert (gradient != 0).tolist() == [token < position for token in range(12)]


@every
def test_padding_by_gradient(kind: str, embedder: str) -> None:
    """Nobody looks at padding, but it has its place among the vectors of its block, unless CLS tokens stand for it."""
    model = build_part(kind, embedder)
    real = torch.ones(1, 12, dtype=torch.bool)
    real[0, [0, 1, 9]] = False
    gradient = gradient_by_token(model, tokens(1, 12), 11, real)
    placed = embedder != "cls"
    assert (gradient[[0, 1]] != 0).tolist() == [placed, placed]
    assert gradient[9] == gradient[11] == 0
    assert (gradient[[2, 3, 4, 5, 6, 7, 8, 10]] != 0).all()


@every
def test_checkpointing_changes_no_gradient(kind: str, embedder: str) -> None:
    model = build_part(kind, embedder, start=True).train()
    layers = [layer for stack in model.stacks for layer in stack.layers]
    assert len(layers) == 4 + (ENCODER["layers"] if embedder in ("encoder", "cls") else 0)
    calls: list[object] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    gradients = []
    for on in (False, True):
        calls.clear()
        for stack in model.stacks:
            stack.activation_checkpointing = on
        gradients.append(torch.autograd.grad(model(tokens(2, 12)).square().sum(), list(model.parameters())))
        assert len(calls) == (1 + on) * len(layers)
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
        assert plain.abs().max() > 0


@on_off
@every
def test_parameters_and_flops_are_those_of_the_model(kind: str, embedder: str, start: bool) -> None:
    """The counter sees every pair; the formula those that are visible."""
    model = build_part(kind, embedder, "reference", start=start)
    config, plan = model.config, model.plan
    assert count(model) == num_params(config, plan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, 16))
    hidden = 0
    for stack, slots, rows in (
        (model.block_decoder, 3, 1),
        (model.token_decoder, plan.num_positions, 4 if start else 3),
    ):
        for layer in range(stack.plan.num_layers):
            pairs = slots * slots - visible_pairs(slots, stack.plan.store(layer).window)
            hidden += rows * stack.plan.store(layer).pair_flops(stack.config.size) * pairs
    assert counter.get_total_flops() == forward_flops(config, plan, 16) + hidden


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fine", [MIXED, BOUNDED, LAYOUTS["cla2"]])
def test_bytes_stored_are_those_of_the_storages(kind: str, fine: object) -> None:
    """Where layers attend across, each has slots of the context, also one that shares the store of its sequence."""
    plan = resolve(part_config(kind, "encoder", fine))
    for context in (1, 4, 11, 80):
        for batch in (1, 3):
            nbytes = allocate_blocks(plan, batch, context, dtype=torch.bfloat16).nbytes
            assert nbytes == allocated_bytes(plan, batch, context) == batch * kv_bytes(plan, context).stored
    layers = [plan.token.store(layer) for layer in range(plan.token.num_layers)]
    own = kv_bytes(plan.token, plan.num_positions).stored
    across = 2 * plan.block_length * sum(store.slot.elements for store in layers) if kind == "cross" else 0
    assert kv_bytes(plan, 80).constant == own + across
    title = str(plan_tables("name", plan, 80, 2)[1].title)
    assert title.startswith(
        f"keys and values of a block's context, all layers: {across:,} B\n" if across else "token decoder"
    )


@torch.no_grad()
def test_bytes_read_across_are_those_handed_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the course of one block; keys and values of its context are made once, in the first step."""
    model = build_part("cross", "lookup", fine=LAYOUTS["gqa"])
    cache = allocate_blocks(model.plan, 1, 8, dtype=torch.float64)
    read: list[int] = []
    made: list[object] = []
    attend = arch.cross_attention.attend

    def counting(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        read.append(k.nbytes + v.nbytes)
        return attend(q, k, v, *rest)

    monkeypatch.setattr(arch.cross_attention, "attend", counting)
    for block in model.token_decoder.layers:
        block.cross.k_proj.register_forward_hook(lambda *_: made.append(0))
        block.reader.register_forward_pre_hook(lambda _, args: read.append(sum(slot.nbytes for slot in args[1])))
    for block in model.block_decoder.layers:
        block.reader.register_forward_pre_hook(lambda _, args: read.append(sum(slot.nbytes for slot in args[1])))
    ids = tokens(1, 8)
    model.encode(ids[:, :4], cache.blocks)
    read.clear()
    vectors = model.expand(model.encode(ids[:, 4:], cache.blocks)[:, -1])
    model.start_block(vectors, ids[:, :0], cache.tokens)
    for j in range(3):
        model.continue_block(vectors, ids[:, j : j + 1], j, cache.tokens)
    assert sum(read) == kv_bytes(model.plan, 8, 8).read * 4
    assert len(made) == 2


@pytest.mark.parametrize("embedder", ["lookup", "projection"])  # style neox, style llama
@torch.no_grad()
def test_cross_attention_is_what_it_says(embedder: str) -> None:
    """Between attention and MLP, of the normalised stream, without positions; heads of queries share those of keys."""
    model = build_part("cross", embedder)
    stack, block = model.token_decoder, model.token_decoder.layers[1]
    x, context = torch.randn(2, 4, 24).double(), torch.randn(2, 4, 24).double()
    store = stack.plan.store(1)
    rope = rope_table(torch.arange(4), *store.rope_key)
    mask = Mask(reference, Dense(True, None))
    actual, slots = block(
        x, (), rope, mask, cross_context=CrossContext(context, None, Mask(reference, Dense(False, None)))
    )
    attended = x + block.reader(block.attn_norm(x), slots, rope, mask)
    cross = block.cross
    q = cross.q_proj(cross.norm(attended)).view(2, 4, 4, 8)
    k, v = (repeat(proj(context), "b c (k h) -> b c (k g) h", k=2, g=2) for proj in (cross.k_proj, cross.v_proj))
    weight = (torch.einsum("btnh,bcnh->bntc", q, k) * 8**-0.5).softmax(dim=-1)
    attended = attended + cross.o_proj(torch.einsum("bntc,bcnh->btnh", weight, v).flatten(2))
    neox = embedder == "lookup"
    assert (cross.q_proj.bias is not None) == neox
    expected = attended + block.mlp(block.mlp_norm(x if neox else attended))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_read_back(kind: str) -> None:
    plan = resolve(part_config(kind, "cls"))
    assert plan.cross == (kind == "cross")
    values = json.loads(json.dumps(plan.to_dict()))
    assert plan_from_dict(values) == plan
    del values["cross"]  # not in plans of before there was such a thing
    assert (plan_from_dict(values) == plan) == (kind != "cross")


def test_defaults_of_the_encoder_are_those_of_the_paper() -> None:
    config = part_config("prefix", "cls", d_model=768, num_heads=12, head_dim=None, vocab_size=50304, num_layers=12)
    config.arch.block.encoder = from_dict(EncoderConfig, {})
    with torch.device("meta"):
        model = BlockTransformer(config)
    # RoBERTa of 3 layers of width 256 with 1 token type and 7 positions, and a convolution over 3 of its outputs.
    layer = 4 * (256 * 256 + 256) + 256 * 1024 + 1024 + 1024 * 256 + 256 + 4 * 256
    assert count(model.embedder) == 50304 * 256 + 7 * 256 + 2 * 256 + 3 * layer + 3 * 256 * 768 + 768
    assert count(model) == num_params(config, model.plan)


def test_initial_weights_of_an_encoder() -> None:
    model = BlockTransformer(part_config("cross", "cls", d_model=48, num_heads=4))
    model.init_weights()
    assert float(model.embedder.proj.weight.detach().std()) == pytest.approx(24**-0.5, rel=0.1)
    layer, across = model.embedder.encoder.layers[0], model.token_decoder.layers[0].cross
    assert float(model.embedder.encoder.position.weight.detach().std()) == pytest.approx(0.2, rel=0.2)
    assert float(across.q_proj.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert not layer.q_proj.bias.any()
    assert (layer.attn_norm.weight == 1).all()


@pytest.mark.parametrize(
    ("embedder", "change", "message"),
    [
        (
            "encoder",
            {"num_heads": 5},
            "arch.block.encoder.d_model 12 is not a multiple of arch.block.encoder.num_heads 5",
        ),
        ("cls", {"cls_tokens": 0}, "arch.block.encoder.cls_tokens is 0; it must be at least 1"),
        ("encoder", {"layers": 0, "d_ff": -1}, r"arch.block.encoder.layers is 0; .*\n- arch.block.encoder.d_ff is -1"),
        ("lookup", {"layers": 2}, "arch.block.encoder is of the embedders encoder and cls, not of 'lookup'; drop it"),
    ],
)
def test_impossible_encoders(embedder: str, change: dict, message: str) -> None:
    config = part_config("prefix", embedder)
    for key, value in change.items():
        setattr(config.arch.block.encoder, key, value)
    with pytest.raises(LayoutError, match=message):
        resolve(config)


def test_impossible_parts() -> None:
    config = part_config("cross", "cls", LAYOUTS["mla"])
    with pytest.raises(
        LayoutError, match=r"^- arch.block.token.stores.kv holds latents, and .*'cross'.*; give it kv_heads"
    ):
        resolve(config)
    config = part_config("prefix", "encoder")
    config.arch.block.embed_dim = 7
    with pytest.raises(LayoutError, match=r"for encoder it is arch.block.encoder.d_model: drop it"):
        resolve(config)
    config = part_config("prefix", "cls")
    config.arch.block.token.kind = "attention"
    with pytest.raises(LayoutError, match=r"token.kind is 'attention'; it is one of prefix, summation, cross"):
        resolve(config)


def test_within_a_block_rows_go_end_to_end_on_cuda() -> None:
    """FlexAttention has one grid row per sequence, of which a token decoder has too many, unless they are one."""
    config = small("block", head_dim=16)
    for layout in (config.arch, config.arch.block.token):
        layout.stores["kv"].window = 3
    with torch.device("meta"):
        models = {name: BlockTransformer(config, name, "cuda") for name in ("auto", "flex", "sdpa")}
        narrow = BlockTransformer(small("block", head_dim=8), "auto", "cuda")
    chosen = {name: [stack.chosen[False][0].name for stack in model.stacks] for name, model in models.items()}
    assert chosen == {"auto": ["flex", "flex_rows"], "flex": ["flex", "flex_rows"], "sdpa": ["sdpa", "sdpa"]}
    assert [stack.chosen[False][0].name for stack in narrow.stacks] == ["sdpa", "sdpa"]


def dense_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """FlexAttention by its definition, with a backward pass on the CPU: visible is what blocks and rule allow."""
    mask, (queries, slots) = options["block_mask"], (q.shape[2], k.shape[2])
    b, h, query, slot = torch.meshgrid(
        *(torch.arange(n) for n in (len(mask.kv_num_blocks), 1, queries, slots)), indexing="ij"
    )
    within = mask.to_dense().bool().repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :queries, :slots]
    allowed = mask.mask_mod(b, h, query, slot) & within
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, scale=options["scale"], enable_gqa=options["enable_gqa"]
    )


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "summation", "cross"])
def test_rows_end_to_end_are_the_rows(kind: str, padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, logits and gradients: positions are those of each row, so nothing but the order of sums may differ."""
    monkeypatch.setattr("arch.attend_kernels.flex_attention", dense_flex)
    monkeypatch.setattr(Backend, "check_dtype", lambda *_: None)
    monkeypatch.setattr("arch.masks.rows_end_to_end", lambda batch, length: batch // 4)
    config = part_config(kind, "lookup", d_model=64, head_dim=16)
    ids = torch.zeros(4, 160, dtype=torch.int64)
    if padding:
        ids[torch.rand(4, 160, generator=torch.Generator().manual_seed(0)) < 0.3] = -1
    results = []
    for device in ("cpu", "cuda"):
        model = BlockTransformer(config, "auto", device)
        model.init_weights()
        model.double()
        rows = FLEX_ROWS.name if device == "cuda" else "sdpa"
        assert model.token_decoder.chosen[False][0].name == rows
        out = model(tokens(4, 160), segment_ids_BT=ids if padding else None)
        out.square().sum().backward()
        results.append((out, *(parameter.grad for parameter in model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_rows_end_to_end_compile_once() -> None:
    torch._dynamo.reset()
    config = part_config("cross", "lookup", d_model=64, head_dim=16)
    models = [BlockTransformer(config, "auto", device) for device in ("cuda", "cpu")]
    for model in models:
        model.init_weights()
    for block in models[0].token_decoder.layers:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    generator, counts = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(3):
            ids = -(torch.rand(2, 80, generator=generator) < 0.3).long()
            ours, exact = (model(tokens(2, 80), segment_ids_BT=ids) for model in models)
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_rows_end_to_end_of_any_number() -> None:
    for batch, length in ((1, 5), (8192, 5), (16 * 511, 5), (509, 5), (8191, 5), (100003, 5), (3, 4096), (2, 40000)):
        number = rows_end_to_end(batch, length)
        assert batch % number == 0
        assert number * length <= LONGEST or number in (1, batch)
        assert number * length >= min(batch * length, 1024)


def test_residual_streams_are_of_the_type_computed_in() -> None:
    """As under FSDP, whose embeddings are of that type already."""
    config = small("block")
    config.arch.block.embedder = "cls"
    model, seen = BlockTransformer(config), set()
    model.init_weights()
    for stack in model.stacks:
        for layer in stack.layers:
            layer.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(2, 16))
    assert seen == {torch.bfloat16}
