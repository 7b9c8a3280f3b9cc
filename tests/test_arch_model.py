"""What a model is: causal, as large as counted, initialised by name, and equal to what is known where it should be."""

import copy
import math

import pytest
import torch
from conftest import ARCHS, SIZES, build, covering, small, tokens
from torch.utils.flop_counter import FlopCounterMode

from arch import ArchConfig, Decoder, LatentConfig, ModelConfig, SizeConfig, StoreConfig, allocate, kv_bytes, resolve
from arch import build as build_model
from arch.attend import BACKENDS, Mask
from arch.bounded_spec import CHUNK
from arch.footprint import forward_flops, num_params, prefill_flops, train_flops_per_token
from arch.grouped import GroupedKV
from arch.layers import rope_table, rotate
from arch.masks import SequenceBatch
from arch.mixed import Mix, TwoKV
from arch.mixed_spec import MixedSpec
from arch.named import load_arch, load_size
from arch.spans import Chunk, Span, visible_pairs
from arch.store_spec import StoreSpec


def causal_mask(length: int, window: Span = None) -> Mask:
    return BACKENDS["sdpa"].mask(SequenceBatch(1, length, None, torch.device("cpu")), window, torch.float64)


def input_gradients(model: Decoder, batch: torch.Tensor, position: int) -> torch.Tensor:
    """[T] largest gradient of the logits at `position` with respect to the embedding of each token."""
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.embed.register_forward_hook(keep)
    weight = torch.randn(model.config.size.vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (model(batch)[0, position] * weight).sum().backward()
    handle.remove()
    return embedded[0].grad[0].abs().amax(dim=-1)


def reach(model: Decoder) -> int | None:
    """How far back a token can look through all layers: windows minus one, summed; None if some layer sees all, as
    merged slots do."""
    stores = [model.plan.store(layer) for layer in range(model.plan.num_layers)]
    windows = [None if store.num_slots else store.window for store in stores]
    return None if None in windows else sum(window - 1 for window in windows)


def test_causal_by_gradient(arch: str) -> None:
    """Exactly zero after the position, non-zero at and before it, zero beyond the reach of the windows."""
    model = build(small(arch, num_layers=3 if arch.startswith("swa") else 7))
    length, position = 24, 19
    gradient = input_gradients(model, tokens(1, length), position)
    edge = reach(model)
    first = 0 if edge is None else max(0, position - edge)
    assert (gradient[position + 1 :] == 0).all()
    assert (gradient[first : position + 1] != 0).all()
    assert (gradient[:first] == 0).all()
    assert first > 0 or not arch.startswith("swa"), "the test reaches past the windows where all layers have one"


@pytest.mark.parametrize("window", [1, 3, 6])
def test_window_edge_in_one_layer(window: int) -> None:
    """A window of n sees the current token and n - 1 before it."""
    gradient = input_gradients(build(small("swa", num_layers=1, window=window)), tokens(1, 12), 9)
    assert gradient.nonzero().flatten().tolist() == list(range(10 - window, 10))


def test_readers_have_no_key_value_weights(arch: str) -> None:
    model = build(small(arch))
    for layer, block in enumerate(model.layers):
        owner = model.plan.owners[layer] == layer
        assert (block.writer is not None) == owner
        assert (block.kv_norm is not None) == (owner and model.plan.store(layer).kv_norm)
        written = {"k_proj", "v_proj", "kv_proj", "kv_down_proj"} & {
            name.split(".")[-2] for name, _ in block.named_parameters()
        }
        assert bool(written) == owner


@pytest.mark.parametrize("name", ARCHS)
def test_parameters(name: str) -> None:
    for tied in (True, False):
        config = small(name, tie_embeddings=tied)
        model = build(config)
        assert num_params(config, model.plan) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_block_builds_as_counted_at_every_size(size: str) -> None:
    """What else a layout may be refused for at a size, test_train_command resolves."""
    for name in covering(ARCHS):
        config = ModelConfig(load_arch(name), load_size(size))
        with torch.device("meta"):
            model = build_model(config)
        assert num_params(config, model.plan) == sum(parameter.numel() for parameter in model.parameters()), name


def test_parameters_of_the_cla_paper() -> None:
    """Facts of section 1.2: H128-MQA with tied embeddings, 0.95 B at 1b and 3.20 B at 3b."""
    for size, billions in (("1b", 0.95), ("3b", 3.20)):
        config = ModelConfig(load_arch("mqa"), load_size(size))
        assert round(num_params(config, resolve(config)) / 1e9, 2) == billions


def unseen_flops(config: ModelConfig, store: StoreSpec, length: int) -> int:
    """FLOPs of pairs that a layer computes and no token sees."""
    if slots := store.dense_slots(length):
        pairs = length * slots
        return store.pair_flops(config.size) * pairs - store.attention_flops(config.size, length, True)
    if not store.num_slots:
        return store.pair_flops(config.size) * (length * length - visible_pairs(length, store.span))
    if not store.window:
        return 0
    # Fused, by heads a coordinate wider: the first window with something else, then blocks of a quarter of a window.
    wide, block = -(-(store.slot.k_dim + 1) // 8) * 8, -(-store.window // 4)
    pairs = (store.window + 1) ** 2 + -(-(length - store.window) // block) * block * (store.window + block)
    seen = store.pair_flops(config.size) * visible_pairs(length, store.window)
    return 4 * config.size.num_heads * wide * pairs - seen


def fused_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: object, **__: object) -> int:
    """Count of the CPU's fused attention."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def added_flops(total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Count of products that are added in place."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def solved_flops(system: tuple[int, ...], wanted: tuple[int, ...], *_: object, **__: object) -> int:
    """Count of a triangular system."""
    return math.prod(wanted) * system[-1]


# What the counter does not know.
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_flops,
    torch.ops.aten.baddbmm_: added_flops,
    torch.ops.aten.linalg_solve_triangular: solved_flops,
}


def test_flops(arch: str) -> None:
    """The counter sees dense attention: with its pairs in place of the visible ones, the formula agrees exactly."""
    config, length = small(arch), 17
    model = Decoder(config, "reference")
    model.init_weights()
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        model.eval()(tokens(1, length))
    expected = forward_flops(config, model.plan, length)
    for layer in range(model.plan.num_layers):
        store = model.plan.store(layer)
        expected += unseen_flops(config, store, length)
    assert counter.get_total_flops() == expected
    assert train_flops_per_token(config, model.plan, length) == 3 * forward_flops(config, model.plan, length) / length


def test_flops_of_prefill(arch: str) -> None:
    """As counted, with the pairs of dense attention in place of the visible ones; the tail looks at all new slots."""
    config, length = small(arch), 17
    model = Decoder(config, "reference").eval()
    model.init_weights()
    plan = model.plan
    cache = model.allocate_cache(1, length)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        model.prefill(tokens(1, length), cache)
    expected = prefill_flops(config, plan, length)
    for layer in range(plan.num_layers):
        store = plan.store(layer)
        if layer < plan.tail:
            expected += unseen_flops(config, store, length)
            if store.num_slots and store.owner == layer:  # the state after the prompt, beside those that are read
                expected += 2 * store.num_slots * store.slot.elements * -(-store.num_written(length) // CHUNK) * CHUNK
        else:
            expected += store.step_flops(config.size) * (length - store.num_positions(length))
    assert counter.get_total_flops() == expected
    assert expected < forward_flops(config, plan, length) or plan.tail == plan.num_layers


@pytest.mark.parametrize("rotary_fraction", [1.0, 0.5])
def test_a_mix_of_rotated_keys_is_the_rotated_mix(rotary_fraction: float) -> None:
    """Whatever the weights are, so that scores go on depending on distances alone; and each channel has its own."""
    store = resolve(small("fusedkv", rotary_fraction=rotary_fraction)).views[-1]
    assert isinstance(store, MixedSpec)
    mix, generator = Mix(store).double(), torch.Generator().manual_seed(0)
    shape = (2, 2, 3, store.slot.kv_heads, store.slot.k_dim)  # keys and values of both, rows and positions
    keys, values = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for weight in mix.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    rope = rope_table(torch.tensor([0, 5, 1000]), *store.rope_key)

    def mixed(one: torch.Tensor, other: torch.Tensor) -> GroupedKV:
        return mix(TwoKV(one, values[0], other, values[1]))

    turned = mixed(rotate(keys[0], rope), rotate(keys[1], rope))
    torch.testing.assert_close(turned.k_BSKH, rotate(mixed(keys[0], keys[1]).k_BSKH, rope), rtol=1e-9, atol=1e-9)
    weights = mix.values.view(2, *shape[3:])
    assert torch.equal(turned.v_BSKH, values[0] * weights[0] + values[1] * weights[1])
    half = store.rope_key[0] // 2
    assert mix.keys.numel() == 2 * store.slot.kv_heads * (store.slot.k_dim - half)
    assert len(mixed(torch.ones_like(keys[0]), 0 * keys[0]).k_BSKH[0, 0].unique()) == mix.keys.numel() // 2


@pytest.mark.parametrize("window", [None, 1, 4, 9, 30, Chunk(1), Chunk(4), Chunk(9), Chunk(30)])
def test_visible_pairs_are_those_of_the_mask(window: Span) -> None:
    length = 9
    mask = causal_mask(length, window).form
    pairs = length * (length + 1) // 2 if mask.causal else int(mask.allowed.sum())
    assert visible_pairs(length, window) == pairs


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    """Two layouts start from the same weights where they share a name and shape."""
    first, again, other = build(small("mha")), build(small("mha")), build(small("cla2"))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    shared = [n for n, p in other.named_parameters() if n in dict(first.named_parameters()) and p.ndim == 2]
    same = [n for n in shared if first.get_parameter(n).shape == other.get_parameter(n).shape]
    assert "layers.3.mlp.up_proj.weight" in same
    assert all(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in same)
    first.init_weights(seed=2)
    assert not torch.equal(first.embed.weight, again.embed.weight)


@pytest.mark.parametrize("name", ["mla", "swa_sinks"])
def test_initial_spread(name: str) -> None:
    size = SizeConfig(num_layers=2, d_model=128, num_heads=8, d_ff=344, init_std=0.01275)
    config = ModelConfig(load_arch(name), size)
    model = Decoder(config)
    model.init_weights()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() / 0.01275 - 1) < 0.03, key
        else:
            assert (parameter == (0 if key.endswith("sinks") else 1)).all(), key


def copy_into(target: Decoder, source: Decoder) -> Decoder:
    target.load_state_dict(source.state_dict())
    return target


def test_cla_of_one_is_gqa() -> None:
    """CLA with groups of one and the KV norm a copy of the attention norm is GQA."""
    gqa = build(small("gqa2"))
    cla = build(small(ArchConfig({"kv": StoreConfig(kv_heads=2, kv_norm=True)}, ["new kv"])))
    weights = dict(gqa.state_dict())
    for layer, block in enumerate(gqa.layers):
        torch.nn.init.normal_(block.attn_norm.weight)
        weights[f"layers.{layer}.kv_norm.weight"] = block.attn_norm.weight
    cla.load_state_dict(weights | {k: v for k, v in gqa.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(cla(tokens(2, 20)), gqa(tokens(2, 20)))


def test_window_as_long_as_the_text_is_no_window(arch: str) -> None:
    length = 12
    narrow = small(arch, window=length)
    free = copy.deepcopy(narrow)
    for store in free.arch.stores.values():
        store.window = 10**6 if store.window and (store.sinks or store.slots or store.stride) else None
        store.stride = store.stride and min(store.stride, length)
        store.chunk = None
        if store.query_scale is not None:
            store.query_scale.tokens = length  # cut with windows
        store.slots = store.slots and min(store.slots, length)  # weights go with them: only windows are compared here
    free.size.max_window = None
    windowed, full = build(narrow), build(free)
    copy_into(full, windowed)
    with torch.no_grad():
        torch.testing.assert_close(windowed(tokens(2, length)), full(tokens(2, length)), rtol=0, atol=1e-12)


def test_absorbed_latent_attention_is_expanded() -> None:
    """Decoding over the cache (absorbed) gives the logits and slots of the forward (expanded)."""
    model, batch = build(small("mla")), tokens(2, 15)
    reader = model.layers[0].reader
    generator = torch.Generator().manual_seed(0)
    q, rope = (torch.randn(2, 15, 8, n, generator=generator, dtype=torch.float64) for n in (8, 4))
    slots = tuple(torch.randn(2, 15, n, generator=generator, dtype=torch.float64) for n in (32, 4))
    mask = causal_mask(15)
    with torch.no_grad():
        torch.testing.assert_close(
            reader.absorbed(q, rope, slots, mask), reader.expanded(q, rope, slots, mask), rtol=0, atol=1e-12
        )
        cache = allocate(model.plan, 2, 15, dtype=torch.float64)
        steps = torch.cat([model(token, cache) for token in batch.split(1, dim=1)], dim=1)
        torch.testing.assert_close(steps, model(batch), rtol=0, atol=1e-11)


def test_latents_without_a_rotary_key() -> None:
    """Beside others and shared: decoding is the forward, and parameters, FLOPs and bytes are those counted."""
    latents = {"nope": LatentConfig("2/1", 0), "rope": LatentConfig()}
    arch = ArchConfig({name: StoreConfig(latent=latent) for name, latent in latents.items()}, [])
    arch.pattern = ["new nope", "new rope", "reuse nope", "reuse rope"]
    config, batch = small(arch, num_layers=4), tokens(2, 15)
    model = build(config)
    assert num_params(config, model.plan) == sum(parameter.numel() for parameter in model.parameters())
    cache = allocate(model.plan, 2, 15, dtype=torch.float64)
    assert cache.nbytes == 2 * kv_bytes(model.plan, 15, 8).stored == 2 * 15 * 8 * (16 + 32 + 4)
    with torch.no_grad():
        steps = torch.cat([model(part, cache) for part in batch.split([4, *[1] * 11], dim=1)], dim=1)
        torch.testing.assert_close(steps, model(batch), rtol=0, atol=1e-11)
        with FlopCounterMode(display=False) as counter:
            build(config, backend="reference")(batch[:1])
    pairs = [unseen_flops(config, model.plan.store(layer), 15) for layer in range(4)]
    assert counter.get_total_flops() == forward_flops(config, model.plan, 15) + sum(pairs)
    alone = small(ArchConfig({"kv": StoreConfig(latent=latents["nope"])}, ["new kv"]), num_layers=1)
    gradient = input_gradients(build(alone), batch[:1, [3, 3, 3, 8]], 3)
    torch.testing.assert_close(gradient[:3], gradient[:1].expand(3), rtol=1e-9, atol=0)  # it knows no positions


def test_each_store_turns_with_its_own_base() -> None:
    """A layer computed by hand, for both of gemma3's rotary bases."""
    model = build(small("gemma3"))
    for layer, theta in ((0, 1e4), (5, 1e6)):
        block, store = model.layers[layer], model.plan.store(layer)
        x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        _, (k, _) = block(x, (), rope_table(torch.arange(4), 8, store.rope_theta), causal_mask(4))
        raw = (block.attn_norm(x) @ block.writer.k_proj.weight.T).view(4, 2, 8)
        for position in range(4):
            for pair in range(4):
                angle = position * theta ** (-2 * pair / 8)
                turn = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64))
                expected = torch.complex(raw[position, :, pair], raw[position, :, pair + 4]) * turn
                ours = torch.complex(k[0, position, :, pair], k[0, position, :, pair + 4])
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    turned = [store.rope_key for store in model.plan.stores]
    assert set(turned) == {(8, 1e4), (8, 1e6)}


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V2, equations 9 to 19 (queries uncompressed), one head and token at a time."""
    model = build(small("mla", num_layers=1))
    block = model.layers[0]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tables = rope_table(torch.arange(5), 4, 10000.0)
    h = block.attn_norm(x)
    slots = block.writer(h, tables)
    ours = block.reader(h, slots, tables, causal_mask(5))
    down = h[0] @ block.writer.kv_down_proj.weight.T
    latent = down[:, :32] / (down[:, :32].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    k_rope = rotate(down[None, :, None, 32:], tables)[0, :, 0]
    q = (h[0] @ block.reader.q_proj.weight.T).view(5, 8, 12)
    up = (latent @ block.reader.kv_up_proj.weight.T).view(5, 8, 16)
    q_rope = rotate(q[None, ..., 8:], tables)[0]
    heads = torch.zeros(5, 8, 8, dtype=torch.float64)
    for t in range(5):
        for n in range(8):
            score = [q[t, n, :8] @ up[s, n, :8] + q_rope[t, n] @ k_rope[s] for s in range(t + 1)]
            weight = (torch.stack(score) / 12**0.5).softmax(0)
            heads[t, n] = sum(w * up[s, n, 8:] for s, w in enumerate(weight))
    expected = heads.flatten(1) @ block.reader.o_proj.weight.T
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-10)
