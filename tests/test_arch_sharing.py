"""Shared keys and values train alike however the model is run: the failure that other frameworks shipped."""

from collections.abc import Callable
from functools import partialmethod

import pytest
import torch
from conftest import build, small, tokens
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from arch import Decoder
from train.parallel import parallelize


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    batch = tokens(2, 16)
    model.train().zero_grad()
    F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_no_gradient(arch: str) -> None:
    model = build(small(arch), torch.float32)
    expected = gradients(model)
    model.activation_checkpointing = True
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_checkpointing_recomputes() -> None:
    model = build(small("cla2"), torch.float32)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing = True
    gradients(model)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["mixattention", "mla", "swa_sinks", "bct_ring"])
def test_compiled_blocks_change_no_gradient(name: str) -> None:
    """As graphs; test_train_command trains with the code that is made of them."""
    torch._dynamo.reset()
    model = build(small(name), torch.float32)
    expected = gradients(model)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = gradients(model)
    for key, gradient in compiled.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["bct", "mha"])
def test_compiled_bf16_is_no_less_exact_than_uncompiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounded stores compute in fp32 under autocast has gradients in fp32, in the compiled backward pass too."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        model = build(small(name), torch.float32).train()
        parallelize(model, activation_checkpointing=False, compile_blocks=compiled, mesh=None, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens(2, 24)).float().logsumexp(-1).sum()
        loss.backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key


def test_owner_gradients_come_from_all_readers(arch: str) -> None:
    """Freeze what a reader adds to the loss by cutting its slots off: the owner's gradient changes."""
    model = build(small(arch))
    plan = model.plan
    shared = {
        store: readers[-1]
        for store in plan.stores
        if (readers := [*plan.readers(store)[1:], *plan.second_readers(store)])
    }
    if not shared:
        pytest.skip("nothing is shared in this layout")
    expected = gradients(model)
    for store, reader in shared.items():
        handle = model.layers[reader].register_forward_pre_hook(
            lambda _, inputs: (inputs[0], tree_map(torch.Tensor.detach, inputs[1]), *inputs[2:])
        )
        cut = gradients(model)
        handle.remove()
        written = [name for name in expected if name.startswith(f"layers.{store.owner}.writer")]
        for half, of in zip(plan.sources(reader), ("k_proj", "v_proj"), strict=True):
            if plan.stores.index(store) not in half:  # which the reader does not look at
                written = [name for name in written if of not in name]
        assert written
        assert all(not torch.allclose(cut[name], expected[name], rtol=1e-6, atol=0) for name in written)


def test_slots_are_the_owners_tensors_not_copies(arch: str) -> None:
    model, batch = build(small(arch)), tokens(1, 10)
    inputs, outputs = {}, {}

    def keep(layer: int, arguments: tuple, result: tuple) -> None:
        inputs[layer], outputs[layer] = arguments[1], result[1]

    for layer, block in enumerate(model.layers):
        block.register_forward_hook(lambda _, arguments, result, layer=layer: keep(layer, arguments, result))
    with torch.no_grad():
        model(batch)
    for layer, owner in enumerate(model.plan.owners):
        if owner == layer:
            assert inputs[layer] == (), "an owner is handed nothing"
        else:
            first, second = outputs[owner], model.plan.second_read(layer)
            if second is not None:
                other = outputs[model.plan.stores[second.store].owner]
                first = (first[0], other[1]) if second.how == "values" else (*first, *other)
            assert all(a is b for a, b in zip(inputs[layer], first, strict=True))


def test_a_sweep_over_layouts_stays_compiled() -> None:
    """All blocks share one code object, and torch gives up on one after eight variants: not here, where two layouts
    make more. Norms, each a graph of its own, run as they are."""
    executed, variants = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        variants.append(1)

        def call(*arguments: object) -> object:
            executed.append(1)
            return graph(*arguments)

        return call

    for name in ("mha", "mixattention"):
        model = build(small(name, num_layers=6), torch.float32)
        parallelize(model, activation_checkpointing=False, compile_blocks=True, mesh=None, dtype=torch.float32)
        model.norm._compiled_call_impl = None
        for block in model.layers:
            block.compile(backend=backend, fullgraph=True)
        for batch in (2, 1):
            executed.clear()
            with torch.no_grad():
                model(tokens(batch, 16))
            assert len(executed) == 6, f"{name} ran uncompiled"
            executed.clear()
            gradients(model)
            assert len(executed) == 6, f"{name} trained uncompiled"
    assert len(variants) > 8
    assert torch._dynamo.config.fail_on_recompile_limit_hit, "and if it ever would, it says so"
