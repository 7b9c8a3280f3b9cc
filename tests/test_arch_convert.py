"""Parity with the stock Hugging Face classes, both ways: logits, greedy tokens, and every refusal."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build, small, tokens
from conversions import from_hf, to_hf

from arch import (
    ArchConfig,
    Decoder,
    LatentConfig,
    LayoutError,
    ModelConfig,
    StoreConfig,
    convert_stock,
    convert_stock_export,
    convert_stock_import,
    from_dict,
    generate,
    plan_from_dict,
    resolve,
)
from arch.config import RopeScalingConfig, to_dict
from arch.convert import ConversionError, UnsupportedModelError
from arch.convert_stock import GEMMA3, OLMO
from arch.convert_stock_export import to_hf_config
from arch.convert_stock_import import from_hf_config
from arch.layers import rope_table

LENGTH = 20  # more than three windows


def scaled(*names: str, **scaling: Any) -> ArchConfig:
    """A layout of one store, or of sliding and full layers, with the rotation of the stores `names` scaled."""
    if not names:
        return ArchConfig({"kv": StoreConfig("1/4", rope_scaling=RopeScalingConfig(**scaling))}, ["new kv"])
    stores = {"local": StoreConfig("1/4", window=4), "global": StoreConfig("1/4")}
    for name in names:
        stores[name].rope_scaling = RopeScalingConfig(**scaling)
    return ArchConfig(stores, ["new local", "new global"])


STOCK = {
    "mha": "LlamaForCausalLM",
    "gqa2": "LlamaForCausalLM",
    "gqa4": "LlamaForCausalLM",
    "gqa8": "LlamaForCausalLM",
    "mqa": "LlamaForCausalLM",
    "swa": "MinistralForCausalLM",
    "mla": "DeepseekV3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo3": "MinistralForCausalLM",
}
INTERLEAVED = ArchConfig(
    {"local": StoreConfig("1/4", window=4), "global": StoreConfig("1/4")}, ["new local x2", "new global"]
)
TWO_BASES = ArchConfig(
    {"local": StoreConfig("1/4", window=4, rope_theta=50.0), "global": StoreConfig("1/4", rope_theta=900.0)},
    ["new local", "new global"],
)
WIDE_LATENT = ArchConfig({"latent": StoreConfig(latent=LatentConfig(dim=20, rope_dim=10))}, ["new latent"])


def stock(hf: Mapping[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> Any:
    """The stock model, loaded from a folder as anybody would; no tensor may be missing or left over."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    (path / "config.json").write_text(json.dumps(hf))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(report.values()), report
    return model.eval()


def assert_same(ours: Decoder, theirs: Any) -> None:
    """Equal logits, and equal greedy tokens over the cache."""
    batch = tokens(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch).logits, rtol=0, atol=1e-5)
    continued = theirs.generate(batch, max_new_tokens=12, do_sample=False)[:, LENGTH:]
    assert generate(ours, batch.tolist(), 12) == continued.tolist()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Norms too, so that one in another's place shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.rand(parameter.shape, generator=generator) - 0.5  # some start at 1, some at 0
    return model


def decoder(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    model = Decoder(config)
    model.load_state_dict(weights)
    return model.eval()


def assert_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def reasons(error: pytest.ExceptionInfo[Exception]) -> set[str]:
    """What the lines of the message begin with."""
    return {line.removeprefix("- ").partition(":")[0] for line in str(error.value).splitlines()}


def exported(layout: ArchConfig | str, **changes: object) -> tuple[Decoder, dict[str, Any]]:
    """Three layers of `layout`, with a rotary base and an epsilon unlike any default; and the stock config."""
    config = small(layout, **({"num_layers": 3, "rope_theta": 700.0, "norm_eps": 1e-2} | changes))
    model = randomised(build(config, torch.float32))
    return model, to_hf_config(config)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [(name, {"tie_embeddings": tied}) for name in STOCK for tied in (True, False)]
    + [
        (INTERLEAVED, {"num_layers": 7, "window": None}),
        (WIDE_LATENT, {}),
        ("gqa2", {"head_dim": 6}),
        ("gqa2", {"d_model": 36}),  # no multiple of the heads
        ("mla", {"d_model": 36, "head_dim": 12}),
        ("swa", {"window": 2}),
        ("smollm3", {"num_layers": 5}),
        (ArchConfig({"kv": StoreConfig(2, window=4, rope="none")}, ["new kv"]), {}),
        ("gqa2", {"qkv_bias": True}),
        ("gqa2", {"qk_norm": "head"}),
        (INTERLEAVED, {"qk_norm": "head", "d_model": 36, "num_layers": 4}),
        ("gqa2", OLMO | {"head_dim": None}),
        ("mqa", OLMO | {"head_dim": None, "tie_embeddings": False}),
        ("olmo3", OLMO | {"head_dim": None, "num_layers": 5}),
        (TWO_BASES, OLMO | {"head_dim": None, "num_layers": 4}),
        ("gqa2", GEMMA3),
        ("gemma3", GEMMA3 | {"num_layers": 7, "head_dim": 6}),
        (TWO_BASES, GEMMA3 | {"num_layers": 4, "tie_embeddings": False}),
        (scaled(rule="linear", factor=2.0), {}),
        (scaled(rule="llama3", factor=8.0, original=32, low=0.5, high=2.5), {"tie_embeddings": False}),
        (scaled(rule="yarn", factor=4.0, original=16, truncate=False), {"qk_norm": "head"}),
        (scaled("local", "global", rule="yarn", factor=4.0, original=16), {"num_layers": 4}),
        (scaled("global", rule="linear", factor=8.0), GEMMA3 | {"num_layers": 4}),
        (scaled("global", rule="yarn", factor=4.0, original=16), OLMO | {"head_dim": None, "num_layers": 4}),
    ],
)
def test_export_is_the_stock_model(layout: ArchConfig | str, changes: dict[str, object], tmp_path: Path) -> None:
    model, hf = exported(layout, **changes)
    weights = to_hf("stock", model.config, model.state_dict())
    theirs = stock(hf, weights, tmp_path)
    assert [type(theirs).__name__] == hf["architectures"]
    assert_same(model, theirs)
    config, back = from_hf(hf, weights)
    assert_equal(back, model.state_dict())
    assert to_hf_config(config) == hf


def test_rotary_tables_are_theirs_to_the_bit() -> None:
    """Logits far into a long context would part: an angle is position times frequency, rounding included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(head_dim=96, rope_parameters={"rope_type": "default", "rope_theta": 700.0})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 1000, 8191, 100_000])
    for table, their_table in zip(
        rope_table(positions, 96, 700.0), theirs(torch.zeros(1), positions[None]), strict=True
    ):
        assert torch.equal(torch.cat((table, table), dim=-1), their_table[0])


@pytest.mark.parametrize("delta", [-1, 1])
def test_window_counts_the_current_token_there_too(delta: int, tmp_path: Path) -> None:
    """Parity would not hold with a window one shorter or longer."""
    model, hf = exported("swa")
    hf["sliding_window"] += delta
    theirs = stock(hf, to_hf("stock", model.config, model.state_dict()), tmp_path)
    with torch.no_grad():
        assert (model(tokens(2, LENGTH)) - theirs(tokens(2, LENGTH)).logits).abs().max() > 0.01


def test_exported_config_leaves_nothing_to_defaults(tmp_path: Path) -> None:
    """What the stock classes fill in for a missing key would be wrong, or stop a generation."""
    transformers = pytest.importorskip("transformers")
    for name in ("mha", "swa", "mla"):
        _, hf = exported(name)
        (tmp_path / "config.json").write_text(json.dumps(hf))
        read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        assert {key: read[key] for key in hf if key != "rope_theta"} == {k: hf[k] for k in hf if k != "rope_theta"}
        assert read["rope_parameters"] == {"rope_type": "default", "rope_theta": 700.0}


def test_every_other_layout_is_refused(arch: str) -> None:
    """With the reason, and no other, that can be read from its file."""
    config = small(arch)
    stores = config.arch.stores.values()
    expected = {"sharing"} if "reuse" in str(config.arch.pattern) else set()
    expected |= {"reader_windows"} if "window=" in str(config.arch.pattern) else set()
    expected |= {"second_reads"} if re.search("(values|mix)=", str(config.arch.pattern)) else set()
    expected |= {"sinks"} if any(store.sinks for store in stores) else set()
    expected |= {"slots"} if any(store.slots for store in stores) else set()
    expected |= {"kv_norm"} if any(store.kv_norm for store in stores) else set()
    expected |= {"chunk"} if any(store.chunk for store in stores) else set()
    expected |= {"query_scale"} if any(store.query_scale for store in stores) else set()
    divided = any(store.latent and (store.latent.heads, store.latent.k_dim) != (None, None) for store in stores)
    expected |= {"latent.heads, latent.k_dim"} if divided else set()
    bases = {store.rope_theta for store in stores if store.rope != "none"}
    expected |= {"rope_theta"} if len(bases) > 1 else set()
    plan = resolve(config)
    windows = {store.window for store in plan.stores} - {None}
    expected |= {"v_dim"} if any(store.slot.k_dim != store.slot.v_dim for store in plan.stores) else set()
    expected |= {"matrix"} if any(store.matrix for store in stores) else set()
    expected |= {"stride"} if any(store.stride for store in stores) else set()
    expected |= {"tied"} if any(store.tied and not store.stride for store in stores) else set()
    unrotated = any(store.slot.latent_dim and not store.slot.rope_dim for store in plan.stores)
    expected |= {"rope"} if unrotated or any(store.rotary_dim for store in plan.stores) else set()
    expected |= {"kv_heads, latent"} if len({store.slot for store in plan.stores}) > 1 else set()
    latent_window = any(store.latent and store.window for store in stores)
    expected |= {"window"} if len(windows) > 1 or 1 in windows or latent_window else set()
    if arch in STOCK or not expected:  # or a layout of one's own
        assert not expected
        assert to_hf_config(config)["architectures"] == [STOCK.get(arch, to_hf_config(config)["architectures"][0])]
    else:
        with pytest.raises(UnsupportedModelError) as error:
            to_hf("stock", config, {})
        assert reasons(error) == expected


def test_refused_layouts_that_no_file_has() -> None:
    scaling = RopeScalingConfig(factor=2.0)
    for stores, expected in (
        ({"a": StoreConfig(2, window=3), "b": StoreConfig(2, window=4)}, {"window"}),
        ({"a": StoreConfig(2, window=1), "b": StoreConfig(2)}, {"window"}),
        ({"a": StoreConfig(2), "b": StoreConfig(4)}, {"kv_heads, latent"}),
        ({"a": StoreConfig(2), "b": StoreConfig(2, window=3, rope_scaling=scaling)}, {"rope_scaling"}),
        ({"a": StoreConfig(2), "b": StoreConfig(latent=LatentConfig(), window=3)}, {"window", "kv_heads, latent"}),
    ):
        config = small(ArchConfig(stores, ["new a", "new b"]))
        with pytest.raises(UnsupportedModelError) as error:
            to_hf_config(config)
        assert reasons(error) == expected


def test_a_reason_nobody_thought_of_is_still_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_stock_export, "_unsupported", lambda plan: [])
    monkeypatch.setattr(convert_stock_export, "_rope_problems", lambda size, plan: [])
    for name in ("cla2", "swa_sinks", "gemma3"):
        with pytest.raises(UnsupportedModelError, match="layout"):
            to_hf_config(small(name))


WIDTHS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 10,
    "num_key_value_heads": 8,
    "first_k_dense_replace": 3,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
# Scaled within the context of WIDTHS: frequencies of heads of 8 fall below, between and above.
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
YARN = SCALED["yarn"] | {"beta_fast": 3.0, "beta_slow": 0.25, "truncate": False, "attention_factor": 1.25}
SLIDING = {"num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": None, "rope_parameters": BASES}
SWITCHED = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("name", "own", "window"),
    [
        ("Llama", {}, None),
        ("Llama", {"num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-2}, None),
        ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, None),
        *[
            ("Llama", {"head_dim": 8, "rope_parameters": {"rope_theta": 700.0} | rope}, None)
            for rope in SCALED.values()
        ],
        ("Llama", {"head_dim": 16, "rope_parameters": {"rope_theta": 50.0} | YARN}, None),
        ("Qwen2", {"num_key_value_heads": 2, "rope_scaling": SCALED["yarn"] | {"factor": None}}, None),
        ("Qwen3", SWITCHED | {"head_dim": 8, "rope_scaling": SCALED["yarn"], "max_window_layers": 1}, [None, 5, 5]),
        ("SmolLM3", {"no_rope_layers": [0, 1, 0], "rope_scaling": SCALED["linear"], "pad_token_id": None}, None),
        ("Olmo3", SLIDING | {"layer_types": MIXED, "rope_scaling": SCALED["yarn"]}, 5),
        ("Gemma3", SLIDING | {"layer_types": MIXED, "head_dim": 6, "rope_scaling": SCALED["linear"]}, 5),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "hidden_size": 36, "head_dim": 8}, None),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}, 5),
        ("Ministral", {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8}, 5),
        ("Ministral", {"num_key_value_heads": 4, "sliding_window": 5, "head_dim": 8, "layer_types": MIXED}, 5),
        ("DeepseekV3", LATENT | {"rope_interleave": True, "rms_norm_eps": 1e-2}, None),
        ("DeepseekV3", LATENT | {"rope_interleave": False, "tie_word_embeddings": True}, None),
        ("DeepseekV3", LATENT | {"qk_rope_head_dim": 2, "kv_lora_rank": 7}, None),
        ("Qwen2", {"num_key_value_heads": 2, "sliding_window": 5}, None),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}, None),
        ("Qwen3", SWITCHED | {"max_window_layers": 1, "head_dim": 8}, [None, 5, 5]),
        ("Qwen2", SWITCHED | {"layer_types": MIXED}, 5),
        ("SmolLM3", {"no_rope_layers": [0, 1, 0], "pad_token_id": None}, None),
        ("SmolLM3", SWITCHED | {"no_rope_layer_interval": 2, "pad_token_id": None}, [None, 5, None]),
        ("Olmo2", {"num_key_value_heads": 2, "pad_token_id": None, "rms_norm_eps": 1e-2}, None),
        ("Olmo2", {"num_key_value_heads": 8, "pad_token_id": None, "tie_word_embeddings": True}, None),
        ("Olmo3", SLIDING | {"num_hidden_layers": 5}, [5, 5, 5, None, 5]),
        ("Olmo3", SLIDING | {"layer_types": MIXED}, 5),
        ("Gemma3", SLIDING | {"head_dim": 6, "query_pre_attn_scalar": 6, "num_hidden_layers": 7}, [5] * 5 + [None, 5]),
        ("Gemma3", SLIDING | {"layer_types": MIXED, "head_dim": 6, "query_pre_attn_scalar": 17}, 5),
        ("Gemma3", SLIDING | {"sliding_window_pattern": 2, "head_dim": 6, "tie_word_embeddings": False}, [5, None, 5]),
    ],
)
def test_import_is_the_stock_model(
    name: str, own: dict[str, Any], window: int | list[int | None] | None, tmp_path: Path
) -> None:
    """From the folder that the stock class saves."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    torch.manual_seed(0)
    options = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**(WIDTHS | own))
    theirs = getattr(transformers, f"{name}ForCausalLM")(options)
    randomised(theirs).eval().save_pretrained(tmp_path)
    hf, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    config, weights = from_hf(hf, tensors)
    ours = decoder(config, weights)
    windows = [window if kind == "sliding_attention" else None for kind in own.get("layer_types", [])] or [window] * 3
    windows = window if isinstance(window, list) else windows
    assert [ours.plan.store(layer).window for layer in range(ours.plan.num_layers)] == windows
    assert config.size.seq_len == 64
    assert_same(ours, theirs)
    again = to_hf("stock", config, weights)
    if name == "Gemma3":  # norms, less 1, are rounded; queries' make up for the scale that is exported, the heads'
        (tmp_path / "again").mkdir()
        exported_again = to_hf_config(config)
        assert exported_again["query_pre_attn_scalar"] == 6
        assert_same(ours, stock(exported_again, again, tmp_path / "again"))
    elif own.get("rope_interleave") is False:  # exported interleaved: the same model, other rows
        assert_equal(from_hf(to_hf_config(config), again)[1], weights)
    else:
        assert_equal(again, tensors)


LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **WIDTHS}
MINISTRAL = LLAMA | {"model_type": "ministral", "head_dim": 8, "sliding_window": 5}
QWEN3 = LLAMA | SWITCHED | {"model_type": "qwen3"}
SMOLLM3 = LLAMA | {"model_type": "smollm3"}
OLMO2 = LLAMA | {"model_type": "olmo2"}
OLMO3 = LLAMA | SLIDING | {"model_type": "olmo3"}
GEMMA = OLMO3 | {"model_type": "gemma3_text", "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
DEEPSEEK = LLAMA | {"model_type": "deepseek_v3", **LATENT}


@pytest.mark.parametrize(
    ("hf", "change"),
    [
        (LLAMA, {"model_type": "qwen3_moe"}),
        (QWEN3, {"attention_bias": True}),
        (QWEN3, {"max_window_layers": -1}),
        (SMOLLM3, {"no_rope_layers": [1, 0]}),
        (SMOLLM3, {"no_rope_layer_interval": 0}),
        (OLMO2, {"sliding_window": 5}),
        (OLMO2, {"attention_bias": True}),
        (OLMO3, {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
        (OLMO3, {"sliding_window": None}),
        (GEMMA, {"hidden_activation": "gelu"}),
        (GEMMA, {"final_logit_softcapping": 30.0}),
        (GEMMA, {"attn_logit_softcapping": 50.0}),
        (GEMMA, {"use_bidirectional_attention": True}),
        (GEMMA, {"query_pre_attn_scalar": 0}),
        (GEMMA, {"sliding_window_pattern": 0}),
        (GEMMA | {"rope_parameters": None}, {"rope_local_base_freq": -1.0}),
        (GEMMA, {"model_type": "gemma3"}),
        (GEMMA, {"model_type": "gemma4_text"}),
        (GEMMA, {"model_type": "gpt_oss"}),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}),
        (LLAMA, {"hidden_act": "gelu"}),
        (LLAMA, {"attention_bias": True}),
        (LLAMA, {"mlp_bias": True}),
        (LLAMA, {"attention_dropout": 0.1}),
        (LLAMA, {"pretraining_tp": 2}),
        (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}),
        (LLAMA, {"per_layer_config": {"0": {"num_key_value_heads": 1}}}),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}}),
        (LLAMA | {"rope_scaling": SCALED["linear"]}, {"rope_scaling.factor": -1.0}),
        (LLAMA | {"rope_scaling": SCALED["linear"]}, {"rope_scaling.beta_fast": 1.0}),
        (LLAMA | {"rope_scaling": SCALED["llama3"]}, {"rope_scaling.low_freq_factor": None}),
        (LLAMA | {"rope_scaling": SCALED["llama3"]}, {"rope_scaling.original_max_position_embeddings": 0.5}),
        (LLAMA | {"rope_scaling": SCALED["yarn"]}, {"rope_scaling.attention_factor": "big"}),
        (LLAMA | {"rope_scaling": SCALED["yarn"]}, {"rope_scaling.truncate": 1}),
        (LLAMA | {"rope_scaling": SCALED["yarn"]}, {"rope_scaling.llama_4_scaling_beta": 0.1}),
        (OLMO3 | {"rope_scaling": SCALED["yarn"]}, {"rope_scaling.truncate": False}),
        (OLMO3 | {"rope_scaling": {"factor": 8.0}}, {"rope_scaling.type": "linear"}),
        (GEMMA | {"rope_scaling": {"factor": 8.0}}, {"rope_scaling.type": "linear"}),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        (LLAMA, {"rope_parameters.partial_rotary_factor": 0.25}),
        (LLAMA, {"sliding_window": 4}),
        (LLAMA, {"layer_types": MIXED}),
        (LLAMA, {"head_dim": None, "hidden_size": 33}),
        (MINISTRAL | {"model_type": "mistral"}, {"layer_types": MIXED}),
        (MINISTRAL, {"layer_types": MIXED[:2]}),
        (MINISTRAL, {"layer_types": ["chunked_attention"] * 3}),
        (MINISTRAL | {"layer_types": MIXED}, {"sliding_window": None}),
        (DEEPSEEK, {"q_lora_rank": 16}),
        (DEEPSEEK, {"first_k_dense_replace": 2}),
        (DEEPSEEK, {"v_head_dim": 12}),
        (DEEPSEEK, {"head_dim": 10}),
        (DEEPSEEK, {"num_key_value_heads": 4}),
        (DEEPSEEK, {"sliding_window": 4}),
        (DEEPSEEK, {"rope_scaling": {"type": "yarn", "factor": 40}}),
    ],
    ids=lambda value: next(iter(value)) if len(value) < 3 else None,
)
def test_what_a_decoder_cannot_do_is_refused(hf: dict[str, Any], change: dict[str, Any]) -> None:
    """One line, with the key and its value."""
    hf = copy.deepcopy(hf)
    from_hf_config(hf)
    key, value = next(iter(change.items()))
    outer, _, inner = key.partition(".")
    hf.update({outer: hf[outer] | {inner: value}} if inner else change)
    with pytest.raises(UnsupportedModelError) as error:
        from_hf_config(hf)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith(
        f"- {key} is {'missing' if key == 'head_dim' and value is None else repr(value)}"
    )


def test_refusals_come_together() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        from_hf_config(LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "dynamic"}})
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(UnsupportedModelError) as error:
        from_hf_config({"model_type": "deepseek_v3", "q_lora_rank": None, "attention_bias": True} | WIDTHS)
    assert {line.split()[1] for line in str(error.value).splitlines()} == {
        "attention_bias",
        *convert_stock_import.LATENT_WIDTHS,
    }
    with pytest.raises(LayoutError, match="kv_heads 3 does not divide"):
        from_hf_config(LLAMA | {"num_key_value_heads": 3})


def test_scaled_rotations_over_a_cache_and_in_files() -> None:
    """Windows and keys that are handed on, too; what is cached is rotated as training rotates it."""
    stores = {
        "local": StoreConfig("1/4", window=4, rope_scaling=RopeScalingConfig("yarn", 4.0, 16)),
        "global": StoreConfig("1/4", tied="projection", rope_scaling=RopeScalingConfig("llama3", 4.0, 16)),
    }
    model, batch = build(small(ArchConfig(stores, ["new local", "new global", "reuse local"]))), tokens(2, LENGTH)
    with torch.no_grad():
        expected, cache = model(batch), model.allocate_cache(2, LENGTH)
        logits = torch.cat([model(part, cache) for part in batch.split([7, 1, 5, *[1] * 7], dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(model.config)))) == model.config
    assert plan_from_dict(json.loads(json.dumps(model.plan.to_dict()))) == model.plan


@pytest.mark.parametrize("rope", [*SCALED.values(), YARN, SCALED["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.5}])
def test_scaled_rotary_tables_are_theirs_to_the_bit(rope: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    options = LLAMA | {"head_dim": 96, "rope_parameters": {"rope_theta": 700.0} | rope}
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**options))
    positions = torch.tensor([0, 1, 1000, 8191, 100_000])
    key = resolve(from_hf_config(options)).stores[0].rope_key
    for table, their_table in zip(rope_table(positions, *key), theirs(torch.zeros(1), positions[None]), strict=True):
        assert torch.equal(torch.cat((table, table), dim=-1), their_table[0])


def test_missing_keys_are_the_stock_defaults() -> None:
    """As in configs of early checkpoints, and as the installed classes have it."""
    transformers = pytest.importorskip("transformers")
    for model_type, names in convert_stock_import.MODEL_DEFAULTS.items():
        theirs = transformers.AutoConfig.for_model(model_type, hidden_size=32, num_attention_heads=8)
        for key, value in (convert_stock_import.DEFAULTS | names).items():
            if key == "rope_theta":
                rope = theirs.rope_parameters
                assert rope.get("full_attention", rope)["rope_theta"] == value
            elif value is not None:
                assert getattr(theirs, key) == value, (model_type, key)
    for model_type, (key, value) in convert_stock.LOCAL_BASES.items():
        local = {key: value} if key else {}
        theirs = transformers.AutoConfig.for_model(model_type, rope_theta=7.0, num_hidden_layers=12, **local)
        hf = LLAMA | {"model_type": model_type, "rope_theta": 7.0, "num_hidden_layers": 12}
        del hf["rope_parameters"]
        config = from_hf_config(hf)
        plan, bases = resolve(config), {kind: rope["rope_theta"] for kind, rope in theirs.rope_parameters.items()}
        assert [plan.store(layer).rope_theta for layer in range(12)] == [bases[kind] for kind in theirs.layer_types]
    theirs = transformers.AutoConfig.for_model("deepseek_v3")
    assert theirs.rope_interleave  # DeepSeek's; `weights` counts on it
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"} | {"rope_theta": 500.0}
    assert from_hf_config(old).size.rope_theta == 500.0
    assert from_hf_config(old).arch.stores["global"].kv_heads == 8
    for key in ("q_lora_rank", "first_k_dense_replace"):
        with pytest.raises(UnsupportedModelError, match=f"^- {key} is "):
            hf = {name: value for name, value in DEEPSEEK.items() if name != key}
            from_hf_config(hf | {"num_hidden_layers": 4} if key == "first_k_dense_replace" else hf)


def test_tensors_that_do_not_fit_are_named() -> None:
    model, hf = exported("mla")
    weights = to_hf("stock", model.config, model.state_dict())
    del weights["model.norm.weight"]
    weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(1)
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 32)
    with pytest.raises(ConversionError) as error:
        from_hf(hf, weights)
    assert str(error.value).splitlines() == [
        "- model.norm.weight is missing",
        "- model.layers.1.self_attn.q_proj.weight has the shape [8, 32]; it must be [96, 32]",
        "- model.layers.3.mlp.up_proj.weight is unexpected",
    ]
    with pytest.raises(ConversionError, match=r"^- embed.weight is missing\n- _orig_mod.embed.weight is unexpected$"):
        state = model.state_dict()
        to_hf("stock", model.config, state | {"_orig_mod.embed.weight": state.pop("embed.weight")})


def test_copies_and_tables_in_a_checkpoint_are_passed_over() -> None:
    model, hf = exported("gqa2")
    weights = to_hf("stock", model.config, model.state_dict())
    more = weights | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }
    assert_equal(from_hf(hf, more)[1], model.state_dict())
    more["lm_head.weight"] += 1
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        from_hf(hf, more)
