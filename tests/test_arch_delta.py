"""Stores of a matrix per head: chunks, steps and the definition agree, and the layers are those of transformers."""

from typing import Any

import pytest
import torch
from conftest import build, small, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from arch import ArchConfig, Decoder, LayoutError, MatrixConfig, StoreConfig, allocate, resolve
from arch.delta import DeltaReader, DeltaWriter, delta_states, read_chunks, read_step
from arch.delta_spec import DELTA_CHUNK, MatrixSpec
from arch.footprint import kv_bytes
from arch.masks import SequenceBatch
from arch.positions import TokenPositions, token_positions
from train.optim import build_optimizer
from train.schema import OptimConfig

RULES = ("gated_delta", "kda")


def layout(rule: str, **matrix: Any) -> ArchConfig:
    return ArchConfig({"state": StoreConfig(matrix=MatrixConfig(rule, **matrix))}, ["new state"])


def modules(rule: str, d_model: int = 32, **matrix: Any) -> tuple[DeltaWriter, DeltaReader]:
    """The writer and the reader of a layer in fp64, with weights that no one would confuse."""
    model = build(small(layout(rule, **matrix), num_layers=1, d_model=d_model, norm_eps=1e-6))
    block = model.layers[0]
    nn.init.normal_(block.reader.norm.weight, 1.0)
    return block.writer, block.reader


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(rule: str, length: int, batch: int = 2, heads: int = 3, k_dim: int = 8, v_dim: int = 6) -> list[Tensor]:
    """Queries, keys of length 1, values, logarithms of decays from none to next to all, and strengths."""
    q, k = (F.normalize(numbers(batch, length, heads, k_dim, seed=n), dim=-1) for n in (1, 2))
    log = -(numbers(batch, length, heads, k_dim if rule == "kda" else 1, seed=4) * 3).exp()
    return [q, k, numbers(batch, length, heads, v_dim, seed=3), log, numbers(batch, length, heads, seed=5).sigmoid()]


def recurrence(q: Tensor, k: Tensor, v: Tensor, log: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    out = []
    for t in range(q.shape[1]):
        state = state * log[:, t].exp().unsqueeze(-1)
        said = torch.einsum("bnk,bnkv->bnv", k[:, t], state)
        state = state + torch.einsum("bnk,bnv->bnkv", k[:, t], b[:, t].unsqueeze(-1) * (v[:, t] - said))
        out.append(torch.einsum("bnk,bnkv->bnv", q[:, t], state))
    return torch.stack(out, dim=1), state


def places(length: int) -> TokenPositions:
    return TokenPositions(torch.arange(length)[None])


@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("rule", RULES)
def test_chunks_and_steps_are_the_recurrence(rule: str, length: int) -> None:
    """From a state that holds something, with and without gradients."""
    given, start = inputs(rule, length), numbers(2, 3, 8, 6, seed=6)
    expected, after = recurrence(*given, start)
    for requires in (False, True):
        with torch.set_grad_enabled(requires):
            out, state = read_chunks(*given, places(length), start)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, after, rtol=0, atol=1e-12)
    state, steps = start.clone(), []
    for t in range(length):
        q, k, v, log, b = (x[:, t] for x in given)
        steps.append(read_step(q, k, v, log.exp(), b, state))
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


def test_the_rule_is_that_of_transformers() -> None:
    """Its references in fp32: chunks of 64 and the recurrence, with grouped key heads and an initial state."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    q, k, v, log, b = (x.float() for x in inputs("gated_delta", 150, heads=4))
    log = log / 20  # theirs are differences of sums, which lose what large sums round
    start = numbers(2, 4, 8, 6, seed=6).float()
    ours, state = read_chunks(q * 8**-0.5, k, v, log, b, places(150), start)
    for reference in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        found, after = reference(q, k, v, g=log.squeeze(-1), beta=b, initial_state=start, output_final_state=True)
        torch.testing.assert_close(ours, found, rtol=0, atol=1e-5)
        torch.testing.assert_close(state, after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule: str) -> None:
    """Against finite differences, over three chunks and two documents; and those of the operator between chunks."""
    given = [x.requires_grad_() for x in inputs(rule, 2 * DELTA_CHUNK + 3, 1, 2, 3, 2)]
    documents = torch.tensor([[0] * 50 + [1] * (2 * DELTA_CHUNK - 47)])

    def read(*tensors: Tensor) -> Tensor:
        return read_chunks(
            *tensors, token_positions(SequenceBatch(1, documents.shape[1], documents, given[0].device)), None
        )[0]

    assert torch.autograd.gradcheck(read, given, fast_mode=True)
    channels = 4 if rule == "kda" else 1
    some = (numbers(3, 2, 2, channels), *(numbers(3, 2, 2, 5, n, seed=n) for n in (4, 4, 3)), numbers(2, 2, 4, 3))
    some = (some[0].sigmoid(), *some[1:2], some[1] * 0.1, *some[3:])
    assert torch.autograd.gradcheck(delta_states, tuple(x.clone().requires_grad_() for x in some), fast_mode=True)
    torch.library.opcheck(delta_states, tuple(x.clone().requires_grad_() for x in some))


@pytest.mark.parametrize("rule", RULES)
def test_decays_of_any_size_stay_finite(rule: str) -> None:
    """A token that forgets all but e^-1000 overflows e^{-G} in any chunk, and in rule `kda` only some channels."""
    q, k, v, log, b = (x.float() for x in inputs(rule, 130))
    log = torch.where(numbers(*log.shape, seed=9) > 1, -1000.0, log)
    given = [x.clone().requires_grad_() for x in (q, k, v, log, b)]
    for segments in (None, torch.arange(130).div(45, rounding_mode="floor").expand(2, -1)):
        out, _ = read_chunks(*given, token_positions(SequenceBatch(2, 130, segments, q.device)), None)
        gradients = torch.autograd.grad(out.square().sum(), given)
        assert out.isfinite().all() and all(x.isfinite().all() for x in gradients)
        if segments is None:
            expected, _ = recurrence(*(x.detach().double() for x in given), torch.zeros(2, 3, 8, 6).double())
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def layer(writer: DeltaWriter, reader: DeltaReader, x: Tensor) -> Tensor:
    return reader(x, writer(x, (), places(x.shape[1])), (), places(x.shape[1]))


def test_the_layer_is_qwen3_nexts() -> None:
    """With its weights, which lie group by group of a key head: q, k, values, gates; and strengths, decays."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    writer, reader = modules("gated_delta", heads=4, key_heads=2, k_dim=8, v_dim=6)
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=32,
            num_hidden_layers=1,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
            layer_types=["linear_attention"],
        ),
        0,
    )
    writer.decay.proj.weight.data *= 0.1  # sums of large logarithms are rounded there
    grouped = {"q": writer.q_proj, "k": writer.k_proj, "v": writer.v_proj, "z": reader.gate}
    qkvz = torch.cat([proj.weight.unflatten(0, (2, -1)) for proj in grouped.values()], dim=1).flatten(0, 1)
    ba = [proj.weight.unflatten(0, (2, -1)) for proj in (writer.beta_proj, writer.decay.proj)]
    values = {
        "in_proj_qkvz.weight": qkvz,
        "in_proj_ba.weight": torch.cat(ba, dim=1).flatten(0, 1),
        "conv1d.weight": writer.conv.weight.unsqueeze(1),
        "A_log": writer.decay.A_log,
        "dt_bias": writer.decay.dt_bias,
        "norm.weight": reader.norm.weight,
        "out_proj.weight": reader.o_proj.weight,
    }
    theirs.load_state_dict(values)
    writer, reader, x = writer.float(), reader.float(), numbers(2, 100, 32).float()
    with torch.no_grad():
        torch.testing.assert_close(layer(writer, reader, x), theirs.float()(x), rtol=0, atol=1e-5)


def test_the_layer_is_kimi_linears() -> None:
    from transformers import AutoConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    writer, reader = modules("kda", heads=4, key_heads=4, k_dim=6, v_dim=6)
    config = AutoConfig.for_model(
        "kimi_linear", hidden_size=32, num_hidden_layers=1, linear_num_heads=4, linear_head_dim=6, rms_norm_eps=1e-6
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    (f_a, f_b), (g_a, g_b) = writer.decay.proj, reader.gate
    named = {
        "q_proj": writer.q_proj,
        "k_proj": writer.k_proj,
        "v_proj": writer.v_proj,
        "b_proj": writer.beta_proj,
        "forget_gate.f_a_proj": f_a,
        "forget_gate.f_b_proj": f_b,
        "g_a_proj": g_a,
        "g_b_proj": g_b,
        "o_norm": reader.norm,
        "o_proj": reader.o_proj,
    }
    values = {f"{name}.weight": module.weight for name, module in named.items()}
    values["conv1d.weight"] = writer.conv.weight.unsqueeze(1)
    values["forget_gate.A_log"] = writer.decay.A_log.view(1, 1, -1, 1)
    values["forget_gate.dt_bias"] = writer.decay.dt_bias
    theirs.load_state_dict(values)
    writer, reader, x = writer.float(), reader.float(), numbers(2, 100, 32).float()
    with torch.no_grad():
        torch.testing.assert_close(layer(writer, reader, x), theirs.float()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("conv", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_rows_that_begin_late_and_steps(rule: str, conv: int) -> None:
    """Chunks, chunks shorter than the convolution, and steps leave the same state in the same memory; padding none."""
    arch = layout(rule, heads="2/1", k_dim="1/2", conv=conv)
    model, batch, starts = build(small(arch, num_layers=2)), tokens(3, 90), (0, 3, 80)
    with torch.no_grad():
        found = []
        for split in (1, 2, 41):
            cache = model.allocate_cache(3, 90, start_B=torch.tensor(starts))
            before = [tensor.data_ptr() for buffer in cache.buffers for tensor in buffer.tensors]
            logits = torch.cat([model(part, cache) for part in batch.split(split, dim=1)], dim=1)
            for row, start in enumerate(starts):
                alone = model(batch[row : row + 1, start:])
                torch.testing.assert_close(logits[row : row + 1, start:], alone, rtol=0, atol=1e-10)
            found.append([tensor for buffer in cache.buffers for tensor in buffer.tensors])
            assert before == [tensor.data_ptr() for tensor in found[-1]]
        for one, *others in zip(*found, strict=True):
            for other in others:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_bytes_by_hand(rule: str) -> None:
    """States, and the convolution's inputs, in fp32; the same at any context."""
    config = small(layout(rule, heads=6, key_heads=3, k_dim=10, v_dim=4, conv=3), num_layers=2)
    plan = resolve(config)
    expected = 2 * 4 * (6 * 10 * 4 + 2 * (2 * 3 * 10 + 6 * 4))
    for context in (1, 7, 500):
        assert allocate(plan, 3, context, dtype=torch.bfloat16).nbytes == 3 * expected
        kv = kv_bytes(plan, context)
        assert (kv.stored, kv.read, kv.constant, kv.per_token) == (expected, expected, expected, 0)
    assert plan.from_dict(plan.to_dict()) == plan
    assert str(plan) == "0d 1d"
    (spec, _) = plan.stores
    assert isinstance(spec, MatrixSpec) and spec.slot_text == "6 x (10 x 4)"


def test_what_matrices_start_from_and_which_decay() -> None:
    """Decays as the references draw them; the convolution goes to AdamW and decays, what has one axis does not."""
    for rule, least in (("gated_delta", 0.0), ("kda", 1.0)):
        model = build(small(layout(rule), num_layers=2), torch.float32)
        for block in model.layers:
            rate, step = block.writer.decay.A_log.exp(), F.softplus(block.writer.decay.dt_bias)
            assert least < rate.min() and rate.max() < 16 and rate.unique().numel() == 8
            assert step.min() > 0.00099 and step.max() < 0.101
            assert 0.4 < block.writer.conv.weight.abs().max() <= 0.5
        assert not torch.equal(*(block.writer.decay.A_log for block in model.layers))
        groups = build_optimizer(model, OptimConfig(name="muon", lr=1e-3)).param_groups
        place = {id(p): n for n, group in enumerate(groups) for p in group["params"]}
        writer = model.layers[0].writer
        assert groups[place[id(writer.q_proj.weight)]]["muon"]
        conv, vectors = (groups[place[id(p)]] for p in (writer.conv.weight, writer.decay.A_log))
        assert (conv["muon"], vectors["muon"]) == (False, False)
        assert (
            conv["weight_decay"]
            > 0
            == vectors["weight_decay"]
            == groups[place[id(writer.decay.dt_bias)]]["weight_decay"]
        )


@pytest.mark.parametrize(
    ("store", "pattern", "message"),
    [
        ({"matrix": MatrixConfig("delta")}, [], "state.matrix.rule is 'delta'; it is gated_delta or kda"),
        ({"matrix": MatrixConfig(heads="3/8", key_heads="1/4")}, [], "key_heads 2 does not divide its 3 heads"),
        ({"matrix": MatrixConfig(k_dim="1/3")}, [], "state.matrix.k_dim is 1/3, 8/3 with 8"),
        ({"matrix": MatrixConfig(conv=0)}, [], "state.matrix.conv is 0; it counts the current token"),
        ({"matrix": MatrixConfig(), "kv_heads": 2}, [], "has matrix and kv_heads or latent"),
        ({"matrix": MatrixConfig(), "window": 4}, [], "state.window is 4; a matrix per head has no positions"),
        ({"matrix": MatrixConfig(), "slots": 4, "rule": "gated"}, [], "state.slots is 4; a matrix per head"),
        (
            {"matrix": MatrixConfig(), "sinks": True},
            [],
            "state.sinks is True; a matrix per head has no positions, slots",
        ),
        ({"matrix": MatrixConfig(), "rope": "none"}, [], "state.rope is none; a matrix per head has no positions"),
        ({"matrix": MatrixConfig(), "rope_theta": 1e4}, [], "state.rope_theta is 10000.0; a matrix"),
        ({"matrix": MatrixConfig()}, ["reuse state"], "layer 1: `reuse state` is impossible: its queries pass a conv"),
    ],
)
def test_refusals(store: dict[str, Any], pattern: list[str], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(small(ArchConfig({"state": StoreConfig(**store)}, ["new state", *pattern]), num_layers=2))


def test_no_context_is_attended_to_by_matrices() -> None:
    """A token decoder of kind `cross` needs keys and values per head; other kinds take matrices in both decoders."""
    config = small("block")
    for part in (config.arch, config.arch.block.token):
        part.stores, part.pattern = {"state": StoreConfig(matrix=MatrixConfig("kda"))}, ["new state"]
    model = build(config)
    batch = tokens(2, 24)
    with torch.no_grad():
        cache = model.allocate_cache(2, 24)
        for end in range(4, 23):
            new = batch[:, end - 1 : end] if end > 4 else batch[:, :4]
            whole = model.next_token_logits(batch[:, :end])[:, -1:]
            torch.testing.assert_close(model(new, cache, last_only=True), whole, rtol=0, atol=1e-10)
    config.arch.block.token.kind = "cross"
    with pytest.raises(LayoutError, match=r"token.stores.state holds a matrix per head"):
        resolve(config)


# --- flash-linear-attention's kernels, with stand-ins on the CPU


@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_call(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients are those of chunks; queries come scaled, one for each state; decoding is ours."""
    import sys
    from types import SimpleNamespace

    from arch import delta_fla, fla_backend

    calls = []

    def entry(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, **more: Any) -> Any:
        calls.append((q, g, beta))
        assert not more
        log = g if g.ndim == 4 else g.unsqueeze(-1)
        return recurrence(q * scale, k, v, log, beta, v.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1]))

    module, name = delta_fla.KERNELS[rule][1]
    for part in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, part, SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: entry}))
    cached = (fla_backend.entry_point, fla_backend.kernel)
    for one in cached:
        one.cache_clear()
    try:
        config, batch = small(layout(rule, heads="2/1", v_dim="1/2"), num_layers=2), tokens(2, 37)
        own = build(config)
        model = Decoder(config, "fla", "cuda").to(torch.float64)
        model.load_state_dict(own.state_dict())
        assert model.attention().startswith("state: fla (flash-linear-attention's ")
        results = []
        for one in (own, model):
            out = one(batch)
            results.append([out, *torch.autograd.grad(out.square().mean(), list(one.parameters()))])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-12)
        q, g, beta = calls[0]
        assert q.shape == (2, 37, 16, 8) and beta.shape == (2, 37, 16)
        assert g.shape == ((2, 37, 16, 8) if rule == "kda" else (2, 37, 16))
        calls.clear()
        with torch.no_grad():
            cache = model.allocate_cache(2, 37)
            logits = torch.cat([model(part, cache) for part in batch.split([30, 1, 6], dim=1)], dim=1)
            torch.testing.assert_close(logits, own(batch), rtol=0, atol=1e-12)
        assert not calls
        with pytest.raises(ValueError, match="fla lacks documents"):
            model(batch, segment_ids_BT=torch.zeros_like(batch))
        with pytest.raises(ValueError, match=r"arch.stores.state on cpu: fla lacks device cpu"):
            Decoder(config, "fla", "cpu")
        with pytest.raises(ValueError, match=r"fla lacks keys of 512 \(it takes up to 256\)"):
            Decoder(small(layout(rule, k_dim=512), num_layers=1), "fla", "cuda")
    finally:
        for one in cached:
            one.cache_clear()
