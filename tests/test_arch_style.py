"""Style properties work one by one, and what was written before they existed reads and compares as it did."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import build, small, tokens
from torch.utils.flop_counter import FlopCounterMode

from arch import (
    LayoutError,
    ModelConfig,
    SizeConfig,
    allocate,
    convert_shipped,
    convert_stock_export,
    from_dict,
    resolve,
)
from arch import build as build_model
from arch.config import STYLE_KEYS, STYLES, to_dict
from arch.convert import UnsupportedModelError
from arch.footprint import forward_flops, num_params
from arch.layers import GeluMLP, LayerNorm, SwiGLU

MIXES = {
    "parallel": {"parallel_residual": True},
    "partial-rotary": {"rotary_fraction": 0.5},
    "gelu-bias": {"mlp": "gelu", "bias": True},
    "swiglu-neox": {"style": "neox", "mlp": "swiglu"},
    "rmsnorm-neox": {"style": "neox", "norm": "rmsnorm", "bias": False},
    "layernorm": {"norm": "layernorm"},
    "qk-norm": {"qk_norm": "head", "output_gate": "head", "bias": True},
    "qkv-bias": {"qkv_bias": True, "output_gate": "head"},
    "qk-norm-all": {"qk_norm": "all", "output_gate": "channel"},
    "norms-after": {"norm_placement": "after", "norm": "layernorm"},
    "gemma": {"norm_placement": "both", "mlp": "geglu", "scale_embeddings": True},
    "parallel-after": {"norm_placement": "after", "parallel_residual": True},
}


def mixed(arch: str, mix: dict) -> dict:
    """Latents have no keys that could be normed, and a Block Transformer maps embeddings."""
    missing = {"mla": "qk_norm", "block": "scale_embeddings"}.get(arch)
    return {key: value for key, value in mix.items() if key != missing}


@pytest.mark.parametrize("arch", ["gqa2", "mla", "bct", "cla2", "block", "gqa4_tied", "gemma4"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_parameters_are_counted(arch: str, mix: dict) -> None:
    config = small(arch, **mixed(arch, mix))
    with torch.device("meta"):
        model = build_model(config)
    assert num_params(config, resolve(config)) == sum(parameter.numel() for parameter in model.parameters())


def test_latents_take_no_norm_of_keys() -> None:
    with pytest.raises(LayoutError, match=r"^- size.qk_norm is all, and arch.stores.latent holds latents"):
        resolve(small("mla", qk_norm="all"))


@pytest.mark.parametrize("arch", ["gqa2", "mla", "bct", "gqa4_tied", "gemma4"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
def test_decoding_equals_the_forward(arch: str, mix: dict) -> None:
    model, batch = build(small(arch, **mixed(arch, mix))), tokens(2, 20)
    with torch.no_grad():
        expected = model(batch)
        cache = allocate(model.plan, 2, 20, dtype=torch.float64)
        logits = torch.cat([model(part, cache) for part in batch.split([7, 1, 5, *[1] * 7], dim=1)], dim=1)
        plain = build(small(arch))(batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    changed = mix != {"rotary_fraction": 0.5} or arch != "mla"  # a latent store has a rotary width of its own
    assert torch.equal(expected, plain) != changed


@pytest.mark.parametrize("arch", ["gqa2", "mla", "bct"])
def test_flops_of_gates(arch: str) -> None:
    """What they add to the formula is what they add to the count."""
    added = []
    for gate in ("none", "head", "channel"):
        config = small(arch, output_gate=gate)
        model = build(config, torch.float32, "reference")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(1, 9))
        added.append(counter.get_total_flops() - forward_flops(config, model.plan, 9))
    assert added[0] == added[1] == added[2]


def test_norms_of_queries_and_keys_bound_scores() -> None:
    """They come before the rotation, and what is cached is normed: no key is longer than the square root of its
    width, whatever it is projected from; of all heads together, their squares are."""
    for kind in ("head", "all"):
        model = build(small("gqa2", qk_norm=kind))
        cache = allocate(model.plan, 1, 9, dtype=torch.float64)
        with torch.no_grad():
            model(tokens(1, 9), cache)
        lengths = cache.buffers[0].tensors[0].square().sum(-1)
        wanted = lengths if kind == "head" else lengths.mean(-1)
        torch.testing.assert_close(wanted, torch.full_like(wanted, 8.0), rtol=1e-3, atol=0)


def test_where_norms_are() -> None:
    """Of outputs only, a sublayer adds what has the length of its norm's weights, whatever it reads."""
    for placement, names in (
        ("before", {"attn_norm", "mlp_norm"}),
        ("after", {"attn_out_norm", "mlp_out_norm"}),
        ("both", {"attn_norm", "mlp_norm", "attn_out_norm", "mlp_out_norm"}),
    ):
        model = build(small("gqa2", norm_placement=placement, num_layers=1))
        assert {name.split(".")[2] for name in model.state_dict() if "norm" in name and "layers" in name} == names
        with torch.no_grad():
            model.layers[0].mlp.down_proj.weight.zero_()
            model.layers[0].reader.o_proj.weight.mul_(1000)
            x = model.embed(tokens(1, 9))
            added = model.run(x) - x
        lengths = added.square().mean(-1)
        assert torch.allclose(lengths, torch.ones_like(lengths), rtol=1e-2) == (placement != "before")


def test_scaled_embeddings() -> None:
    batch, width = tokens(2, 9), 32
    plain, scaled = (build(small("gqa2", scale_embeddings=scale)).embed for scale in (False, True))
    torch.testing.assert_close(scaled(batch), plain(batch) * width**0.5, rtol=1e-12, atol=0)
    half = scaled.to(torch.bfloat16)(batch)  # as the stock class has it, which rounds the factor
    assert torch.equal(half, plain.to(torch.bfloat16)(batch) * torch.tensor(width**0.5, dtype=torch.bfloat16))
    with pytest.raises(LayoutError, match=r"^- size.scale_embeddings is of a decoder: .*; leave it out$"):
        resolve(small("block", scale_embeddings=True))


def test_a_preset_is_its_properties() -> None:
    for name, style in STYLES.items():
        spelt = {"style": "llama" if name == "neox" else "neox", **asdict(style)}
        batch, models = tokens(2, 9), [build(small("gqa2", **size)) for size in ({"style": name}, spelt)]
        assert models[0].state_dict().keys() == models[1].state_dict().keys()
        with torch.no_grad():
            assert torch.equal(models[0](batch), models[1](batch))
    assert isinstance(models[0].layers[0].mlp, GeluMLP) and isinstance(models[0].norm, LayerNorm)
    assert isinstance(build(small("gqa2", style="neox", mlp="swiglu")).layers[0].mlp, SwiGLU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batchnorm"}, "size.norm is 'batchnorm'; it is rmsnorm or layernorm"),
        ({"qk_norm": "heads"}, "size.qk_norm is 'heads'; it is none, head or all"),
        ({"output_gate": "all"}, "size.output_gate is 'all'; it is none, head or channel"),
        ({"mlp": "relu"}, "size.mlp is 'relu'; it is swiglu, gelu or geglu"),
        ({"norm_placement": "post"}, "size.norm_placement is 'post'; it is before, after or both"),
        ({"rotary_fraction": 0.0}, "size.rotary_fraction is 0.0"),
        ({"rotary_fraction": 1.5}, "size.rotary_fraction is 1.5"),
        ({"rotary_fraction": 0.125}, "0.125 of the head dimension 8 is 1; .* multiple of 16"),
    ],
)
def test_impossible_properties(change: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(small("gqa2", **change))


def test_properties_that_are_null_are_not_written() -> None:
    old = small("gqa2", style="neox")
    written = json.loads(json.dumps(to_dict(old)))
    assert not set(STYLE_KEYS) & set(written["size"])
    assert from_dict(ModelConfig, written) == old == convert_shipped.from_hf_config(convert_shipped.to_hf_config(old))
    assert set(asdict(SizeConfig())) - set(written["size"]) == set(STYLE_KEYS)
    new = small("gqa2", bias=True, rotary_fraction=0.5)
    assert (
        from_dict(ModelConfig, to_dict(new)) == new == convert_shipped.from_hf_config(convert_shipped.to_hf_config(new))
    )


def test_only_the_llama_preset_is_a_stock_class() -> None:
    spelt = small("gqa2", style="neox", **asdict(STYLES["llama"]))
    assert convert_stock_export.to_hf_config(spelt) == convert_stock_export.to_hf_config(small("gqa2"))
    with pytest.raises(UnsupportedModelError, match=r"size\.style: llama, bias True is not exported"):
        convert_stock_export.to_hf_config(small("gqa2", bias=True))
