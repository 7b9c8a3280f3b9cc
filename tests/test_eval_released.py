"""Released models: bytes of caches from a config.json alone, against arithmetic by hand and transformers' caches."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, launch_in_process

from arch import SizeConfig, model_config, resolve
from arch.footprint import kv_bytes
from data.cli import UsageError
from eval import footprint, pareto, released
from eval.released import FOLDER, ReleasedError, load, released_names
from eval.released.defaults import DEFAULTS
from eval.released.rules import TEXT_TYPES, TYPES, UNFIGURED

CONTEXT = 32768


def gqa(layers: int, heads: int, width: int, v_width: int | None = None) -> int:
    """Bytes of one position in bf16."""
    return 2 * layers * heads * (width + (width if v_width is None else v_width))


def states(layers: int, matrix: int, inputs: int) -> int:
    """A matrix in fp32 and the last inputs of a convolution in bf16."""
    return layers * (4 * matrix + 2 * inputs)


DELTA = 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 4
# Bytes per token, and those that no context changes, by hand.
EXPECTED = {
    "deepseek-v2": (60 * (512 + 64) * 2, 0),
    "deepseek-v3": (61 * (512 + 64) * 2, 0),
    "falcon-7b": (gqa(32, 1, 64), 0),
    "falcon-40b": (gqa(60, 8, 64), 0),
    "gemma-2-2b": (gqa(13, 4, 256), 4096 * gqa(13, 4, 256)),
    "gemma-2-9b": (gqa(21, 8, 256), 4096 * gqa(21, 8, 256)),
    "gemma-2-27b": (gqa(23, 16, 128), 4096 * gqa(23, 16, 128)),
    "gemma-3-1b": (gqa(4, 1, 256), 512 * gqa(22, 1, 256)),
    "gemma-3-4b": (gqa(5, 4, 256), 1024 * gqa(29, 4, 256)),
    "gemma-3-12b": (gqa(8, 8, 256), 1024 * gqa(40, 8, 256)),
    "gemma-3-27b": (gqa(10, 16, 128), 1024 * gqa(52, 16, 128)),
    "gemma-3n-e4b": (gqa(4, 2, 256), 512 * gqa(16, 2, 256)),
    "gemma-4-e2b": (gqa(3, 1, 512), 512 * gqa(12, 1, 256)),
    "gemma-4-e4b": (gqa(4, 2, 512), 512 * gqa(20, 2, 256)),
    "gpt-oss-20b": (gqa(12, 8, 64), 128 * gqa(12, 8, 64)),
    "gpt-oss-120b": (36_864, 128 * 36_864),
    "jamba-v0.1": (gqa(4, 8, 128), states(28, 8192 * 16, 8192 * 4)),
    "kimi-linear-48b-a3b": (7 * (512 + 64) * 2, states(20, 32 * 128 * 128, 3 * 32 * 128 * 4)),
    "llama-2-7b": (gqa(32, 32, 128), 0),
    "llama-2-70b": (gqa(80, 8, 128), 0),
    "llama-3.1-8b": (gqa(32, 8, 128), 0),
    "llama-3.1-405b": (gqa(126, 8, 128), 0),
    "llama-3.2-1b": (gqa(16, 8, 64), 0),
    "llama-4-scout": (gqa(12, 8, 128), 8192 * gqa(36, 8, 128)),
    "longcat-flash": (2 * 28 * (512 + 64) * 2, 0),
    "mimo-v2-flash": (gqa(9, 4, 192, 128), 129 * gqa(39, 8, 192, 128)),
    "ministral-3-8b": (gqa(34, 8, 128), 0),
    "mistral-7b-v0.1": (0, 4096 * gqa(32, 8, 128)),
    "mistral-7b-v0.3": (gqa(32, 8, 128), 0),
    "mistral-small-4": (36 * (256 + 64) * 2, 0),
    "mixtral-8x7b": (gqa(32, 8, 128), 0),
    "nemotron-nano-9b-v2": (gqa(4, 8, 128), states(27, 128 * 80 * 128, (128 * 80 + 2 * 8 * 128) * 4)),
    "olmo-2-7b": (gqa(32, 32, 128), 0),
    "olmo-2-13b": (gqa(40, 40, 128), 0),
    "olmo-3-7b": (gqa(8, 32, 128), 4096 * gqa(24, 32, 128)),
    "phi-2": (gqa(32, 32, 80), 0),
    "phi-4": (gqa(40, 10, 128), 0),
    "pythia-160m": (gqa(12, 12, 64), 0),
    "pythia-1.4b": (gqa(24, 16, 128), 0),
    "pythia-12b": (gqa(36, 40, 128), 0),
    "qwen2.5-0.5b": (gqa(24, 2, 64), 0),
    "qwen2.5-7b": (gqa(28, 4, 128), 0),
    "qwen2.5-72b": (gqa(80, 8, 128), 0),
    "qwen3-0.6b": (gqa(28, 8, 128), 0),
    "qwen3-8b": (gqa(36, 8, 128), 0),
    "qwen3-32b": (gqa(64, 8, 128), 0),
    "qwen3-30b-a3b": (gqa(48, 4, 128), 0),
    "qwen3-235b-a22b": (gqa(94, 4, 128), 0),
    "qwen3-next-80b-a3b": (gqa(12, 2, 256), states(36, *DELTA)),
    "qwen3.5-0.8b": (gqa(6, 2, 256), states(18, 16 * 128 * 128, 3 * 16 * 128 * 4)),
    "seed-oss-36b": (gqa(64, 8, 128), 0),
    "smollm2-135m": (gqa(30, 3, 64), 0),
    "smollm3-3b": (gqa(36, 4, 128), 0),
    "tiny-aya": (gqa(9, 4, 128), 4096 * gqa(27, 4, 128)),
}


def test_bytes_of_the_models_that_ship() -> None:
    assert released_names() == sorted(EXPECTED)
    for name, (slope, constant) in EXPECTED.items():
        kv = kv_bytes(load(name).plan, CONTEXT)
        assert (kv.per_token, kv.constant, kv.stored) == (slope, constant, slope * CONTEXT + constant), name


def test_published_figures() -> None:
    """139 MiB (mlxcel 172); 73,728 B per token before windows fill (hf-mem 60); 3 GiB of full layers (gguf-parser-go
    32); 20 layers of 35 allocate nothing (gemma.cpp 1012)."""
    assert kv_bytes(load("gemma-3-1b").plan, CONTEXT).stored == 145_752_064
    assert kv_bytes(load("gpt-oss-120b").plan, 1).stored == 73_728
    assert kv_bytes(load("gpt-oss-120b").plan, 100).stored == 100 * 73_728
    full = [store for store in load("gpt-oss-20b").plan.stores if store.window is None]
    assert sum(store.nbytes(131_072, 2) for store in full) == 3 << 30
    plan = load("gemma-4-e2b").plan
    assert len(plan.stores) == plan.num_layers - 20
    assert plan.owners[15:] == tuple(14 if layer % 5 == 4 else 13 for layer in range(15, 35))


@pytest.mark.parametrize(
    ("layout", "model", "shape"),
    [
        ("gpt_oss", "gpt-oss-20b", {"num_layers": 24, "num_heads": 64, "head_dim": 64}),
        ("gpt_oss", "gpt-oss-120b", {"num_layers": 36, "num_heads": 64, "head_dim": 64}),
        ("llama4", "llama-4-scout", {"num_layers": 48, "num_heads": 32, "head_dim": 128}),  # 40 query heads there
    ],
)
def test_layouts_have_the_bytes_of_their_models(layout: str, model: str, shape: dict[str, int]) -> None:
    """At the model's shape, layer by layer, before and after windows and chunks fill."""
    plan, released_plan = resolve(model_config(layout, SizeConfig(**shape))), load(model).plan
    assert plan.owners == released_plan.owners
    for context in (1, 127, 128, 8191, 8193, CONTEXT):
        bytes_of = ([store.nbytes(context, 2) for store in each.stores] for each in (plan, released_plan))
        assert next(bytes_of) == next(bytes_of), context


@pytest.mark.parametrize("num_layers", [30, 42, 60])
def test_gemma4_has_the_bytes_of_its_configuration(num_layers: int) -> None:
    """Layer by layer, at the shape of 31B, whose full layers add 80 KiB per token, and at other depths. Keys and values
    of one projection are both cached."""
    shape = {"num_layers": num_layers, "num_heads": 32, "head_dim": 256}
    plan = resolve(model_config("gemma4", SizeConfig(**shape)))
    keys = {
        "model_type": "gemma4_text",
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "attention_k_eq_v": True,
    }
    released_plan = released.released(keys, "gemma4").plan
    assert plan.owners == released_plan.owners
    for context in (1, 1023, 1025, CONTEXT):
        bytes_of = ([store.nbytes(context, 2) for store in each.stores] for each in (plan, released_plan))
        assert next(bytes_of) == next(bytes_of), context
    assert num_layers < 60 or kv_bytes(plan, CONTEXT).per_token == 80 * 1024


def test_files_hold_what_decides_bytes_and_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    keys = released.Keys
    monkeypatch.setattr(released, "Keys", lambda *given: made.append(keys(*given)) or made[-1])
    for name in released_names():
        values = json.loads((FOLDER / f"{name}.json").read_text())
        load(name)
        unread = {key for key in values if not key.startswith("_")} - made[-1].read - {"model_type"}
        assert not unread, name
        assert values["_source"] and "/" in values["_name_or_path"], name


def test_defaults_are_those_of_transformers() -> None:
    mapping = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    assert set(DEFAULTS) == set(TYPES)
    for kind in TYPES:
        of_class = {field.name: field.default for field in dataclasses.fields(mapping[kind])}
        for key, value in DEFAULTS[kind].items():
            assert of_class[key] == value, (kind, key)
    for kind in (*TEXT_TYPES, *UNFIGURED):
        assert kind in mapping or kind in ("kimi_k2", "qwen3_5_moe"), kind


WIDTHS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8, "vocab_size": 64}
WIDTHS |= {"intermediate_size": 32, "max_position_embeddings": 128}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}
LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 9, "head_dim": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4}
EXPERTS |= {"shared_expert_intermediate_size": 16, "num_local_experts": 4, "n_group": 1, "topk_group": 1}
TINY: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"num_hidden_layers": 2, "sliding_window": 6}),
    ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 6, "sliding_window_pattern": 3}),
    (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "sliding_window": 6,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
        },
    ),
    ("gemma2", {"num_hidden_layers": 2, "sliding_window": 6}),
    ("cohere2", {"num_hidden_layers": 4, "sliding_window": 6}),
    ("llama4_text", {"num_hidden_layers": 4, "attention_chunk_size": 6, "intermediate_size_mlp": 32, **EXPERTS}),
    ("mamba2", {"num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2}),
    ("bamba", {"num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_state": 4, "attn_layer_indices": [1]}),
    ("lfm2", {"num_hidden_layers": 2, "full_attn_idxs": [1]}),
    ("gpt_oss", {"num_hidden_layers": 2, "sliding_window": 6, **EXPERTS}),
    (
        "mimo_v2_flash",
        {"num_hidden_layers": 3, "v_head_dim": 4, "num_key_value_heads": 1, "sliding_window": 6, **EXPERTS},
    ),
    ("deepseek_v3", {"num_hidden_layers": 2, **LATENT, **EXPERTS}),
    (
        "qwen3_next",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 4,
            **EXPERTS,
        },
    ),
    (
        "kimi_linear",
        {
            "num_hidden_layers": 2,
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1],
                "head_dim": 8,
                "num_heads": 3,
                "short_conv_kernel_size": 3,
            },
            **LATENT,
            **EXPERTS,
        },
    ),
    (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "mlp", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 2,
        },
    ),
    (
        "jamba",
        {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            **EXPERTS,
        },
    ),
]


@pytest.mark.parametrize(("kind", "changes"), TINY, ids=[kind for kind, _ in TINY])
def test_caches_of_transformers_hold_as_many_bytes(kind: str, changes: dict[str, Any]) -> None:
    """A random model of the same pattern fills its cache with 9 tokens in bf16. A window there is one position less:
    the current one comes with the step."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    given = {**WIDTHS, **changes}
    if kind == "nemotron_h":
        config = transformers.AutoConfig.for_model(kind, **given)
    else:
        config = transformers.AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        output = model(torch.arange(3, 12)[None], use_cache=True)
    cache = output.cache_params if kind == "mamba2" else output.past_key_values
    held = [sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in cache.layers]
    for values in ({"model_type": kind, **given}, json.loads(config.to_json_string())):
        stores = released.released(values, "tiny").plan.stores
        figured = [store.nbytes(min(9, store.window - 1) if store.window else 9, 2) for store in stores]
        assert figured == [size for size in held if size]


def tensors_of(layer: Any) -> list[Any]:
    """The tensors of a cache layer, without the scalars that count."""
    found = []
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else [value]
        found += [each for each in values if getattr(each, "ndim", 0) > 1]
    return found


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "a config.json is an object of keys, not list"),
        ({"hidden_size": 8}, "model_type is missing"),
        ({"model_type": []}, "model_type is missing"),
        ({"model_type": {}, "text_config": {}}, "model_type is missing"),
        ({"model_type": "a\nb"}, "model_type a\\nb is not understood"),
        ({"model_type": "lama"}, "model_type lama is not understood, did you mean llama? Known: apertus, arcee"),
        ({"model_type": "deepseek_v32"}, "not figured: an indexer keeps keys of its own"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide the 4 query heads"),
        ({**LLAMA, "num_hidden_layers": "two"}, "num_hidden_layers is 'two'; a whole number of at least 1"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({**LLAMA, "num_hidden_layers": 1 << 24}, "at most 16,384"),
        ({**LLAMA, "num_hidden_layers": [1] * 9999}, "num_hidden_layers is [1, 1"),
        ({**LLAMA, "kv_\n" + "x" * 9999: 2}, "kv_\\nxxx"),
        ({**LLAMA, "hidden_size": 33}, "hidden_size is 33, no multiple of the 4 query heads"),
        (
            {**LLAMA, "sliding_window": 128},
            "sliding_window is 128; it may decide what is cached, and is not understood",
        ),
        ({**LLAMA, "cla_share_factor": 2}, "cla_share_factor is 2; it may decide what is cached"),
        *(
            ({**LLAMA, key: value}, f"{key} is {value!r}; it may decide what is cached, and is not understood")
            for key, value in (
                ("shared_kv_layers", 1),
                ("shared_layers", [0, 0]),
                ("use_shared_kv", True),
                ("use_mla", True),
                ("use_cla", True),
                ("cross_layer_attention", 2),
                ("multi_query", True),
                ("head_dims", [64, 32]),
                ("per_layer_heads", [2, 1]),
                ("num_heads_per_layer", [1, 2]),
                ("attention_sinks", 4),
                ("recurrent_layers", [1]),
            )
        ),
        ({**LLAMA, "v_head_dim": 7}, "v_head_dim is 7 and must be"),
        ({**LLAMA, "attention_head_dim": 7}, "attention_head_dim is 7 and must be"),
        ({**LLAMA, "num_attention_groups": 7}, "num_attention_groups is 7 and must be"),
        (
            {**LLAMA, "model_type": "gemma2", "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 2 layers",
        ),
        (
            {**LLAMA, "model_type": "gemma2", "layer_types": ["x", "y"]},
            "layer_types has 'x'; of this type, full_attention",
        ),
        (
            {**LLAMA, "model_type": "gemma2", "layer_types": "full"},
            "layer_types is 'full'; a list of str belongs there",
        ),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 35}, "num_kv_shared_layers is 35, of 35 layers"),
        (
            {"model_type": "gemma3n_text", "num_kv_shared_layers": 32},
            "no layer below those has the type full_attention",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ({"model_type": "gemma4_text", "per_layer_config": {"5": {"head_dim": 8}}}, "per_layer_config does not say"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "use_sliding_window is false",
        ),
        ({"model_type": "mimo_v2_flash", "swa_head_dim": 64}, "swa_head_dim is 64 and must be 192"),
        ({"model_type": "nemotron_h"}, "hybrid_override_pattern is missing"),
        (
            {"model_type": "kimi_linear", "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [1]}},
            "each once",
        ),
        ({"model_type": "gemma3", "text_config": {"global_kv": 1}}, "global_kv is 1; it may decide"),
        ({"model_type": "hunyuan_v1_dense", "use_cla": True, "cla_share_factor": 2}, "use_cla is true"),
        ({"model_type": "minimax_m2", "attn_type_list": [0] * 62}, "attn_type_list marks layers"),
        ({"model_type": "falcon", "head_dim": 32}, "head_dim is 32 and must be 64"),
        ({"model_type": "gemma2", "sliding_window_size": 8}, "sliding_window_size is 8 and must be 4096"),
    ],
)
def test_what_is_not_understood_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ReleasedError) as refused:
        released.released(values, "m")
    assert message in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 999


def test_keys_of_the_hub_that_decide_nothing() -> None:
    """They are in the hub's files whether the model uses them or not."""
    for values in (
        {"model_type": "minimax_m2", "attn_type_list": [1] * 62, "shared_intermediate_size": 0, "sliding_window": None},
        {"model_type": "hunyuan_v1_dense", "use_cla": False, "cla_share_factor": 2, "attention_head_dim": 128},
        {"model_type": "minimax", "shared_moe_mode": "sigmoid", "shared_intermediate_size": 8},
        {"model_type": "mimo_v2_flash", "add_full_attention_sink_bias": True},
        {"model_type": "deepseek_v2", "qk_nope_head_dim": 128, "qk_head_dim": 192, "q_lora_rank": 1536},
        {"model_type": "qwen3_moe", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 48},
        {"model_type": "gemma2", "cache_implementation": "hybrid", "use_cache": True},
        {"model_type": "gemma2", "sliding_window": 4096, "sliding_window_size": 4096},
        {"model_type": "kimi_linear", "mla_use_nope": True},
        {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "n_shared_experts": 1, "moe_layer_freq": 1},
    ):
        bare = {"model_type": values["model_type"]}
        assert released.released(values, "m").plan == released.released(bare, "m").plan


def test_whole_models_have_the_cache_of_their_language_model() -> None:
    inner = json.loads((FOLDER / "gemma-3-4b.json").read_text())
    whole = {"model_type": "gemma3", "text_config": inner, "vision_config": {"num_hidden_layers": 27}}
    assert released.released(whole, "m").plan == load("gemma-3-4b").plan
    del inner["model_type"]
    assert released.released(whole, "m").model_type == "gemma3_text"


def test_files_folders_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load(str(tmp_path)).plan == load(str(tmp_path / "config.json")).plan
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: pytest.fail("asked the network for what it has"))
    assert load("some/model").plan == load(str(tmp_path)).plan

    def unreachable(*_: str) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    (tmp_path / "broken.json").write_text("{")
    for given, message in (
        (
            "some/model",
            "some/model is not in the hub's cache on this machine, and cannot be had from the network (no route",
        ),
        (str(tmp_path / "broken.json"), "it is no JSON"),
        (str(tmp_path / "missing.json"), "there is no"),
        (str(tmp_path.parent), "has no config.json"),
        ("gemma-3-1", "did you mean gemma-3-1b?"),
    ):
        with pytest.raises(ReleasedError) as refused:
            load(given)
        assert message in str(refused.value)


def run(*arguments: str) -> None:
    launch_in_process(footprint.main, "footprint", footprint.FootprintConfig, [*arguments])


def test_command(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    run("hf=kimi-linear-48b-a3b", f"picture={picture}")
    text = capsys.readouterr().out
    for words in (
        "8,064 B",
        "one sequence of 32,768 tokens",
        "32 x 128 x 128 + 12,288 x 4",
        "a state",
        "ownership map",
    ):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    run("hf=nemotron-nano-9b-v2", "picture=null", "context=1")
    text = capsys.readouterr().out
    assert "25 layers of its own count cache nothing" in text and "ownership map" not in text
    run("hf=[gemma-3-1b,llama-3.1-8b]", "itemsize=1", "json=true")
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gemma-3-1b"]["kv_bytes_stored"] == 145_752_064 // 2
    run("hf='phi-2,phi-4'")
    assert "phi-4" in capsys.readouterr().out
    run("hf=all")
    text = capsys.readouterr().out
    assert all(name in text for name in released_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf=gemma-3-1b", "+size=1b"], "leave +arch= and +size= out"),
        (["hf=gemma-3-1b", "context=0"], "must be at least 1"),
        (["hf=nowhere.json"], "there is no nowhere.json"),
        (["hf=[]"], "names no model"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


OLD_RUN = ROOT / "tests" / "golden" / "old" / "run-mixattention"


def test_lines_of_a_pareto_plot(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is named, no name is over another; lines widen the axis, and stand on the page too."""
    from eval.plots import pareto as pictures

    drawn: dict[str, Any] = {}
    original = pictures._refer

    def refer(axes: Any, references: Any) -> list[Any]:
        boxes = original(axes, references)
        drawn.update(names=[text.get_text() for text in axes.texts], boxes=boxes, limits=axes.get_xlim())
        return boxes

    monkeypatch.setattr(pictures, "_refer", refer)
    names = ["gemma-3-1b", "llama-3.1-8b", "mistral-7b-v0.3", "mixtral-8x7b", "qwen3-8b"]
    pareto.main([str(OLD_RUN), "context=1000", f"out={tmp_path}", f"reference=[{','.join(names)}]"])
    assert "gemma-3-1b: 14.9 MiB on the axis stored" in capsys.readouterr().out
    shown = ["gemma-3-1b", "llama-3.1-8b, mistral-7b-v0.3, mixtral-8x7b", "qwen3-8b"]
    assert drawn["names"] == shown, "one line where bytes are equal"
    boxes = drawn["boxes"]
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]
    assert drawn["limits"][1] > 1000 * gqa(36, 8, 128)
    page = (tmp_path / "pareto.html").read_text()
    assert all(f'"text":"{name}: ' in page for name in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x=params", "reference=gemma-3-1b"], "x=params is not; choose x=stored, read"),
        (["reference=nowhere"], "there is no nowhere"),
    ],
)
def test_lines_that_cannot_be_drawn(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        pareto.main([str(OLD_RUN), f"out={tmp_path}", *arguments])


def test_lines_are_bytes_of_the_axis(capsys: pytest.CaptureFixture) -> None:
    lines = dict(pareto.reference_lines(["gemma-3-1b", "mistral-7b-v0.1"], "per_token", 8, 2))
    assert lines == {"gemma-3-1b": gqa(4, 1, 256)}
    assert "mistral-7b-v0.1 has no bytes on the axis per_token" in capsys.readouterr().err
    every = pareto.reference_lines(["gemma-3-1b", "all"], "stored", 8, 2)
    assert [name for name, _ in every].count("gemma-3-1b") == 1 and len(every) == len(released_names())
    stored = dict(pareto.reference_lines(["gemma-4-e2b"], "read", CONTEXT, 2))
    assert stored["gemma-4-e2b"] == 7 * CONTEXT * gqa(1, 1, 512) + 28 * 512 * gqa(1, 1, 256)


def test_a_window_that_no_context_fills_is_none() -> None:
    """As of Phi-3 with 128k positions, whose window has twice as many."""
    phi = LLAMA | {"model_type": "phi3", "max_position_embeddings": 131072}
    for window, per_token in ((262144, 2 * 2 * 32 * 2), (2048, 0)):
        plan = released.released(phi | {"sliding_window": window}, "phi").plan
        assert kv_bytes(plan, 4096).per_token == per_token


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("phi3", {"full_attn_mod": 1}),
        ("minimax_m2", {"layernorm_linear_attention_beta": 1.0, "swa_rope_theta": -1.0, "attn_window_size": None}),
        ("qwen3_next", {"mamba_ssm_dtype": "float32"}),
        ("jamba", {"mamba_inner_layernorms": True}),
    ],
)
def test_keys_of_the_hubs_files_that_decide_no_byte(kind: str, keys: dict[str, Any]) -> None:
    values = {**LLAMA, "model_type": kind, "num_hidden_layers": 8, "num_key_value_heads": 4}
    plain, full = (released.released(each, "hub").plan for each in (values, values | keys))
    assert kv_bytes(plain, 4096) == kv_bytes(full, 4096)
