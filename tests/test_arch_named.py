"""Models by name: `arch.build("cla2", "tiny")`."""

import pytest
import torch
from conftest import small

import arch
from arch.named import UnknownNameError, load_arch, load_size


def test_a_model_is_built_by_name_with_weights() -> None:
    model = arch.build("cla2", "tiny", num_layers=2, d_model=32, d_ff=48)
    assert model.config.arch == load_arch("cla2")
    assert (model.config.size.num_layers, model.config.size.vocab_size) == (2, load_size("tiny").vocab_size)
    tokens = torch.arange(12).view(1, 12)
    assert model(tokens).isfinite().all()
    again, other = (arch.build(model.config, seed=seed) for seed in (0, 1))
    assert torch.equal(again.output_weight, model.output_weight)
    assert not torch.equal(other.output_weight, model.output_weight)


def test_weights_are_those_of_init_weights() -> None:
    config = small("block")
    model = arch.build(config, init=False)
    model.init_weights(seed=3)
    built = dict(arch.build(config, seed=3).named_parameters())
    assert all(torch.equal(parameter, built[name]) for name, parameter in model.named_parameters())


def test_nothing_is_drawn_where_there_are_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch.LanguageModel, "init_weights", lambda *_: pytest.fail("drawn"))
    with torch.device("meta"):
        arch.build("mha", "3b")
    arch.build("mha", "tiny", init=False)


def test_objects_names_and_backends_mix() -> None:
    layout = arch.load_arch("cla2")
    layout.stores["kv"].kv_heads = 2
    size = arch.load_size("tiny")
    assert arch.model_config(layout, "tiny").size == size
    assert arch.build("mqa", size, backend="reference").attention().startswith("kv: reference")
    assert arch.build(arch.ModelConfig(layout, size), backend="reference").attention().startswith("kv: reference")
    assert arch.build(layout, size).plan.stores[0].slot.kv_heads == 2


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("cla22", "tiny"), {}, "there is no layout 'cla22', did you mean cla2?"),
        (("mixatention", "tiny"), {}, "there is no layout 'mixatention', did you mean mixattention?"),
        (("cla2", "tinny"), {}, "there is no size 'tinny', did you mean tiny?"),
        (("cla2", "zzz"), {}, "there is no size 'zzz'; choose one of 125m, 1b, 20m, 350m, 3b, tiny"),
        (("../size/tiny", "tiny"), {}, "there is no layout '../size/tiny'"),
        (("cla2", "tiny"), {"num_layer": 2}, "a size has no num_layer, did you mean num_layers?"),
    ],
)
def test_wrong_names(arguments: tuple, changes: dict, message: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        arch.build(*arguments, **changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_wrong_kinds_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"arch.model_config\('cla2', 'tiny'\)"):
        arch.ModelConfig("cla2", "tiny")
    with pytest.raises(TypeError, match="a ModelConfig has its size"):
        arch.build(small("mha"), arch.SizeConfig())
    with pytest.raises(TypeError, match=r'build\("cla2", "tiny"\)'):
        arch.build("cla2")
    with pytest.raises(arch.LayoutError, match=r"d_model 128 is not a multiple of size\.num_heads 7"):
        arch.build("cla2", "tiny", num_heads=7)


@pytest.mark.parametrize("name", ["cla2", "block"])
def test_prompts_may_be_tensors(name: str) -> None:
    model = arch.build(small(name, num_layers=2))
    prompt = torch.arange(8).view(2, 4)
    rows = arch.generate(model, prompt.tolist(), 3)
    assert arch.generate(model, prompt, 3) == arch.generate(model, list(prompt), 3) == rows
    for single in (prompt[0], [1, 2, 3], "abcd"):
        with pytest.raises(ValueError, match="a batch of prompts"):
            arch.generate(model, single, 3)


def test_everything_that_is_exported_is_there() -> None:
    assert all(hasattr(arch, name) for name in arch.__all__)
    assert sorted(arch.__all__) == dir(arch)
