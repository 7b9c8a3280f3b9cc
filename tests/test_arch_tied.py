"""One tensor for keys and values: each form is its published definition, and every property test passes with all of
them in one model. Layouts of configs/arch are in the tests of all layouts."""

from collections.abc import Callable
from typing import Any

import pytest
import test_arch_cache
import test_arch_documents
import test_arch_model
import test_arch_sharing
import test_arch_static_step
import torch
from conftest import build, small, tokens
from torch import Tensor, nn

from arch import ArchConfig, LayoutError, SizeConfig, StoreConfig, kv_bytes, resolve
from arch.attend import BACKENDS
from arch.attention import build_reader, build_writer
from arch.compression.compressed import allocate_compressed
from arch.compression.method import parse_method
from arch.compression.storage import compressed_bytes
from arch.footprint import num_params
from arch.layers import inverse_rope, rope_table, rotate, rotate_step, step_rope
from arch.masks import SequenceBatch
from arch.stores import resolve_store

# Each form, with and without a window, sinks and other layers that read it, rotated in whole, in part and not at all.
FORMS = ArchConfig(
    {
        "vector": StoreConfig(kv_heads=2, tied="vector", window=6, sinks=True, rope="1/2"),
        "half": StoreConfig(kv_heads=4, tied="half"),
        "projection": StoreConfig(kv_heads=2, tied="projection", head_dim="2/1", rope="1/4"),
        "plain": StoreConfig(kv_heads=1, tied="vector", rope="none"),
        "near": StoreConfig(kv_heads=2, tied="half", window=4, sinks=True),
    },
    ["new vector", "reuse vector", "new half", "reuse half", "new projection", "new plain", "new near"],
)


@pytest.mark.parametrize(
    "check",
    [
        lambda: test_arch_cache.test_bytes(FORMS),
        lambda: test_arch_cache.test_a_head_is_read_in_one_piece(FORMS),
        lambda: test_arch_cache.test_chunks_and_steps_equal_the_forward(build(small(FORMS)), 3),
        lambda: test_arch_cache.test_left_padding_changes_nothing(build(small(FORMS))),
        lambda: test_arch_cache.test_autocast_decodes_like_it_trains(FORMS),
        lambda: test_arch_cache.test_prefill_stops_at_the_last_writer(FORMS),
        lambda: test_arch_cache.test_rows_that_end_take_the_next_prompt(build(small(FORMS))),
        lambda: test_arch_documents.test_packed_documents_are_separate_forwards(FORMS, "sdpa"),
        lambda: test_arch_model.test_readers_have_no_key_value_weights(FORMS),
        lambda: test_arch_model.test_flops(FORMS),
        lambda: test_arch_model.test_flops_of_prefill(FORMS),
        lambda: test_arch_sharing.test_activation_checkpointing_changes_no_gradient(FORMS),
        lambda: test_arch_sharing.test_owner_gradients_come_from_all_readers(FORMS),
        lambda: test_arch_sharing.test_slots_are_the_owners_tensors_not_copies(FORMS),
    ],
    ids=lambda check: check.__code__.co_names[1],
)
def test_every_property_holds_for_every_form(check: Callable[[], None]) -> None:
    check()


def test_compiled_blocks_change_no_gradient() -> None:
    """A block of each form, as a graph."""
    torch._dynamo.reset()
    layout = ArchConfig(
        {form: StoreConfig(kv_heads=2, tied=form, rope=rope) for form, rope in (("vector", "1/2"), ("half", None))},
        ["new vector", "new half"],
    )
    model = build(small(layout, num_layers=2), torch.float32)
    expected = test_arch_sharing.gradients(model)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    for key, gradient in test_arch_sharing.gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_static_steps_equal_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    test_arch_static_step.test_static_steps_equal_the_forward(FORMS, (0, 5, 11), monkeypatch)


def test_bytes_are_those_of_what_is_cached() -> None:
    """Per position: half of keys and values; with the shared half; and both."""
    size = SizeConfig(num_layers=1, d_model=32, num_heads=8, head_dim=8)
    elements = {}
    for form in (None, "vector", "half", "projection"):
        problems: list[str] = []
        elements[form] = resolve_store("kv", StoreConfig(kv_heads=2, tied=form), size, problems).slot.elements
        assert not problems
    assert elements == {None: 2 * (8 + 8), "vector": 2 * 8, "half": 2 * 8 + 4, "projection": 2 * (8 + 8)}
    four = ArchConfig({"kv": StoreConfig(kv_heads=4, tied="vector")}, ["new kv"])
    tied, half, whole = (kv_bytes(resolve(small(arch)), 100) for arch in (four, "gqa2", "gqa4"))
    assert tied == half and 2 * tied.stored == whole.stored and 2 * tied.read == whole.read
    # One projection less, and nothing else.
    for form, saved in (("vector", 32 * 16), ("projection", 32 * 16), ("half", 32 * (16 - 4))):
        config, plain = (
            small(ArchConfig({"kv": StoreConfig(kv_heads=2, tied=each)}, ["new kv"]), num_layers=1)
            for each in (form, None)
        )
        assert num_params(config, resolve(config)) == num_params(plain, resolve(plain)) - saved, form


def attention(store: StoreConfig, size: SizeConfig) -> tuple[Callable[[Tensor], Tensor], nn.Module, nn.Module, Any]:
    """A layer's attention over the tokens at hand, its writer, its reader and its store, with random weights."""
    problems: list[str] = []
    spec = resolve_store("kv", store, size, problems)
    assert not problems, problems
    writer, reader = build_writer(size, spec), build_reader(size, spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in (*writer.parameters(), *reader.parameters()):
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)

    def run(x_BTD: Tensor) -> Tensor:
        rope = rope_table(torch.arange(x_BTD.shape[1]), *spec.rope_key)
        mask = BACKENDS["reference"].mask(SequenceBatch(*x_BTD.shape[:2], None, x_BTD.device), spec.window, x_BTD.dtype)
        with torch.no_grad():
            return reader(x_BTD, writer(x_BTD, rope), rope, mask)

    return run, writer, reader, spec


def causal(length: int, window: int) -> Tensor:
    """The mask of transformers' eager attention."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.zeros(length, length).masked_fill((distance < 0) | (distance >= window), -torch.inf)[None, None]


SIZE = SizeConfig(d_model=32, num_heads=4, head_dim=16, norm_eps=1e-6, qk_norm="head")


def test_a_vector_is_deepseek_v4s() -> None:
    """Its windowed layers: one head, normed, of which a part is rotated, sinks, and the output rotated back. There the
    last channels are rotated, in pairs of neighbours; queries and outputs pass through factors, which are multiplied
    here."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    run, writer, reader, _ = attention(StoreConfig(kv_heads=1, tied="vector", window=5, sinks=True, rope="1/2"), SIZE)
    config = DeepseekV4Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        layer_types=["sliding_attention"],
        sliding_window=5,
        o_groups=1,
        o_lora_rank=24,
        attn_implementation="eager",
    )
    other = theirs.DeepseekV4Attention(config, 0).eval()
    place = torch.cat((torch.arange(8, 16, 2), torch.arange(9, 16, 2), torch.arange(8)))  # there, of each channel here
    there = place.argsort()
    reader.q_norm.weight.data.fill_(1.0)
    o_a = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    o_b = torch.randn(32, 24, generator=torch.Generator().manual_seed(2)) / 10
    reader.o_proj.weight.data = (o_b @ o_a).unflatten(1, (4, 16))[:, :, place].flatten(1)
    other.load_state_dict(
        {
            "q_a_proj.weight": torch.eye(32),
            "q_a_norm.weight": torch.ones(32),
            "q_b_proj.weight": reader.q_proj.weight.unflatten(0, (4, 16))[:, there].flatten(0, 1),
            "kv_proj.weight": writer.kv_proj.weight[there],
            "kv_norm.weight": writer.k_norm.weight[there],
            "o_a_proj.weight": o_a,
            "o_b_proj.weight": o_b,
            "sinks": reader.sinks,
        }
    )
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt()  # the norm of queries' first factor changes nothing
    positions = torch.arange(13)[None]
    rope = {"main": theirs.DeepseekV4RotaryEmbedding(config)(x, positions, "main")}
    with torch.no_grad():
        expected, _ = other(x, rope, positions, causal(13, 5))
    torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-5)


def test_a_projection_is_gemma_4s() -> None:
    """Its full layers: keys normed and rotated, values normed without a scale. There scores are not scaled, and the
    channels that turn lie at the beginning of each half of a head, with the frequencies of the whole (p-RoPE)."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4 import modeling_gemma4 as theirs

    # In configs/arch/gemma4.yaml heads are twice as wide as in layers with a window, here they are of the size.
    store = StoreConfig(kv_heads=2, tied="projection", rope="1/4", rope_theta=31.622776601683793)
    run, writer, reader, _ = attention(store, SIZE)
    config = Gemma4TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["full_attention"],
        attention_k_eq_v=True,
        attn_implementation="eager",
    )
    other = theirs.Gemma4TextAttention(config, 0).eval()
    half = torch.arange(8)
    place = torch.cat((half[:2], half[:2] + 8, half[2:], half[2:] + 8))  # there, of each channel here
    there = place.argsort()

    def heads_there(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, 16))[:, there].flatten(0, 1)

    other.load_state_dict(
        {
            "q_proj.weight": heads_there(reader.q_proj.weight),
            "q_norm.weight": reader.q_norm.weight[there] / 4,
            "k_proj.weight": heads_there(writer.kv_proj.weight),
            "k_norm.weight": writer.k_norm.weight[there],
            "o_proj.weight": heads_there(reader.o_proj.weight.T).T,
        }
    )
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(3))
    rope = theirs.Gemma4TextRotaryEmbedding(config)(x, torch.arange(13)[None], "full_attention")
    with torch.no_grad():
        expected, _ = other(x, rope, causal(13, 13), {})
    torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-5)


def test_a_half_is_gtas() -> None:
    """By hand, in the words of the paper's code: keys are the first half of the values, then what is rotated."""
    size = SizeConfig(d_model=32, num_heads=4, head_dim=16)
    run, writer, reader, spec = attention(StoreConfig(kv_heads=2, tied="half"), size)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    rope = rope_table(torch.arange(9), 8, 10000.0)
    with torch.no_grad():
        value = (x @ writer.kv_proj.weight[:32].T).view(2, 9, 2, 16).repeat_interleave(2, dim=2)
        shared = rotate((x @ writer.kv_proj.weight[32:].T).view(2, 9, 1, 8), rope).expand(2, 9, 4, 8)
        query = (x @ reader.q_proj.weight.T).view(2, 9, 4, 16)
        query = torch.cat((query[..., :8], rotate(query[..., 8:], rope)), dim=-1)
        key = torch.cat((value[..., :8], shared), dim=-1)
        score = torch.einsum("btnh,bsnh->bnts", query, key) / 4 + causal(9, 9)
        out = torch.einsum("bnts,bsnh->btnh", score.softmax(-1), value).flatten(2) @ reader.o_proj.weight.T
    assert spec.slot_text == "2 x 16 + rope 8" and writer.kv_proj.weight.shape == (2 * 16 + 8, 32)
    torch.testing.assert_close(run(x), out, rtol=0, atol=1e-5)


def test_rotated_values_depend_on_distances_alone() -> None:
    """A text that begins later in the row has the same logits: outputs are rotated back. Rotated forth and back, in
    tables and in steps, is what it was."""
    model = build(small(FORMS))
    with torch.no_grad():
        cache = model.allocate_cache(1, 30)
        alone = model(tokens(1, 9), cache)
        late = model.allocate_cache(1, 30, start_B=torch.tensor([11]))
        padded = model(torch.cat((tokens(1, 11), tokens(1, 9)), dim=1), late)[:, 11:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-10)
    table = rope_table(torch.arange(5, 8), 6, 100.0)
    x = torch.randn(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(x, table), inverse_rope(table)), x)
    step = step_rope(tuple(part[None] for part in (table[0][0], table[1][0])))
    for rope in (step, (torch.cat((table[0][0],) * 2)[None, None], torch.cat((-table[1][0], table[1][0]))[None, None])):
        torch.testing.assert_close(rotate_step(rotate_step(x[:, 0], rope), inverse_rope(rope)), x[:, 0])


@pytest.mark.parametrize(
    "text",
    [
        "int8(group=4,recent=2)",
        "int4(keys=token,group=3,recent=2,hadamard=true)",
        "knorm@5",
        "h2o@9(every=2)",
        "int8(group=4,recent=2)+scissorhands@4(history=3,recent=2,every=2,merge=true)",
        "streaming@100%",
    ],
)
def test_compressed_caches_hold_one_tensor(text: str) -> None:
    """Of every form: bytes are those of the formula, what is dropped leaves logits finite, and 8 bits are near."""
    model, batch, method = build(small(FORMS), torch.float32), tokens(2, 21), parse_method(text)

    def logits(cache: Any) -> Tensor:
        with torch.no_grad():
            parts = [model.prefill(batch[:, :13], cache, 5)]
            if hasattr(cache, "compress"):
                cache.compress()
            parts += [model(batch[:, 13:16], cache, last_only=True)]
            return torch.cat(parts + [model.decode_step(token, cache) for token in batch[:, 16:18].split(1, 1)], 1)

    starts = torch.tensor([0, 5])
    expected = logits(model.allocate_cache(2, 21, start_B=starts.clone()))
    cache = allocate_compressed(model.plan, 2, 21, dtype=torch.float32, method=method, start_B=starts.clone())
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 21, itemsize=4)
    got = logits(cache)
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 21, prompt=13, itemsize=4, chosen=cache.chosen_slots)
    assert got.isfinite().all()
    if text == "streaming@100%":
        assert torch.equal(got, expected)
    elif text.startswith("int8(group=4,recent=2)") and method.keep is None:
        assert (got - expected).abs().max() < 0.1 * expected.std()


def test_keeps_that_need_keys_of_their_own_are_refused() -> None:
    for form, keep, message in (
        ("vector", "think", "store kv has one tensor for keys and values, and think drops channels of keys alone"),
        ("half", "think", "store kv has keys of which a half is that of all heads, and think compares queries"),
        ("half", "zipcache", "store kv has keys of which a half is that of all heads, and zipcache compares"),
    ):
        plan = resolve(small(ArchConfig({"kv": StoreConfig(kv_heads=2, tied=form)}, ["new kv"])))
        with pytest.raises(ValueError, match=message):
            allocate_compressed(plan, 1, 8, dtype=torch.float32, method=parse_method(keep))
    with pytest.raises(LayoutError, match=r"take size\.qk_norm=none, or tied vector"):
        resolve(small(ArchConfig({"kv": StoreConfig(kv_heads=2, tied="half")}, ["new kv"]), qk_norm="head"))
