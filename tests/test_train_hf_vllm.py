"""The vLLM plugin, against stand-ins for the parts of vLLM that it uses: signatures and attributes as there."""

import ast
import importlib
import inspect
import json
import re
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, build, small, tokens
from conversions import to_hf
from safetensors.torch import save_file
from torch import Tensor, nn

from arch import Decoder, generate
from arch.convert_remote import FILES, to_hf_config
from arch.footprint import kv_bytes
from train.hub.targets import TRANSFORMERS_FLOOR

transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS_FLOOR)

from train.hf import KVFrontierConfig, modeling_kvfrontier, vllm_plugin
from train.hf.configuration_kvfrontier import check_vllm

ARCHITECTURE = "KVFrontierForCausalLM"
LENGTH = 20


class Attention(nn.Module):
    """Keeps what it is given, and attends to all of it that a query may see; shares what its target keeps."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        kv_sharing_target_layer_name: str | None = None,
        context: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ):
        super().__init__()
        assert context is not None and prefix not in context
        context[prefix] = self
        self.context, self.layer_name, self.window = context, prefix, per_layer_sliding_window
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.has_sink = extra_impl_args.get("sinks") is not None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.impl = SimpleNamespace(scale=scale, kv_sharing_target_layer_name=kv_sharing_target_layer_name)
        self.kv_cache: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        target = self.impl.kv_sharing_target_layer_name
        if target is None:
            new = [x.view(len(x), self.num_kv_heads, self.head_size) for x in (key, value)]
            held = self.kv_cache or [x[:0] for x in new]
            self.kv_cache = [torch.cat(both) for both in zip(held, new, strict=True)]
        key, value = (self if target is None else self.context[target]).kv_cache
        groups = self.num_heads // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        query = query.view(-1, self.num_heads, self.head_size)
        distance = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))
        hidden = (distance < 0) | (distance >= (self.window or len(key)))
        score = torch.einsum("tnh,snh->nts", query, key) * self.impl.scale
        weight = score.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("nts,snh->tnh", weight, value).flatten(1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, Attention] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer = attention_instances[module.layer_idx]
    layer.impl.scale = float(scaling)
    length = query.shape[-2]
    return layer(*(x.transpose(1, 2).reshape(length, -1) for x in (query, key, value))), None


class TransformersForCausalLM(nn.Module):
    """vLLM's Transformers backend: a cache for every layer, the base model, and the output matrix."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        config._attn_implementation = "vllm"
        self.model = transformers.AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.attention_instances = {
            layer: Attention(
                config.num_attention_heads,
                config.head_dim,
                1.0,
                num_kv_heads=config.num_key_value_heads,
                per_layer_sliding_window=config.sliding_window if kind == "sliding_attention" else None,
                prefix=f"{layer}.attn",
                context=vllm_config.compilation_config.static_forward_context,
            )
            for layer, kind in enumerate(config.layer_types)
            if layer in vllm_config.stage
        }

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden_states = self.model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            attention_instances=self.attention_instances,
            return_dict=False,
        )[0][0]
        return self.lm_head(hidden_states)


class ModelRegistry:
    models: dict[str, str] = {}  # noqa: RUF012

    @staticmethod
    def get_supported_archs() -> set[str]:
        return set(ModelRegistry.models)

    @staticmethod
    def register_model(model_arch: str, model_cls: str) -> None:
        assert model_arch not in ModelRegistry.models  # vLLM warns
        ModelRegistry.models[model_arch] = model_cls


def extract_layer_index(layer_name: str, num_attn_module: int = 1) -> int:
    (index,) = (int(part) for part in layer_name.split(".") if part.isdigit())
    return index


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """Our class for vLLM, found as vLLM finds it."""
    inside = {
        "vllm": {"ModelRegistry": ModelRegistry},
        "vllm.config": {"VllmConfig": SimpleNamespace},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.transformers": {"TransformersForCausalLM": TransformersForCausalLM},
        "vllm.model_executor.models.utils": {"extract_layer_index": extract_layer_index},
    }
    for name, members in inside.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "train.hf.vllm_model", raising=False)
    monkeypatch.setattr(ModelRegistry, "models", {})
    functions = modeling_kvfrontier.ALL_ATTENTION_FUNCTIONS
    functions.register("vllm", attention_forward)
    vllm_plugin.register()
    vllm_plugin.register()
    path, _, name = ModelRegistry.models[ARCHITECTURE].partition(":")
    yield getattr(importlib.import_module(path), name)
    del functions._global_mapping["vllm"]
    sys.modules.pop("train.hf.vllm_model", None)


def engine(ours: Decoder, **changes: Any) -> Any:
    """What of vLLM's configuration the model reads. Another model has registered a layer before."""
    config = KVFrontierConfig(**to_hf_config(ours.config), vllm_cache=changes.pop("vllm_cache", None))
    context: dict[str, Any] = {}
    Attention(8, 8, 1.0, num_kv_heads=8, prefix="40.attn", context=context)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        stage=changes.pop("stage", range(config.num_hidden_layers)),
        compilation_config=SimpleNamespace(static_forward_context=context),
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
    )


def serve(model: Any, ours: Decoder, batch: Tensor) -> tuple[Tensor, int]:
    """Logits [T, V] in chunks, and the bytes that its layers have kept."""
    weights = to_hf("remote", ours.config, ours.state_dict())
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.double().load_state_dict(weights)
    positions = torch.arange(len(batch))
    with torch.no_grad():
        logits = [model(batch[chunk], chunk) for chunk in positions.split([7, 1, 5, 1, 1, 5])]
    kept = [tensor for layer in model.attention_instances.values() for tensor in layer.kv_cache]
    return torch.cat(logits), sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.parametrize("name", ["cla2", "mixattention", "tail_sharing", "yoco", "characterai", "gemma3"])
def test_sharing_layers_have_one_cache(name: str, model_class: type) -> None:
    """The logits of ours with the plugin and without, where that is accepted; the bytes of our plan with it alone,
    windows aside."""
    ours = build(small(name))
    batch = tokens(1, LENGTH)[0]
    with torch.no_grad():
        expected = ours(batch[None])[0]
    unbounded = sum(store.slot.elements * 8 * LENGTH for store in ours.plan.stores)
    logits, kept = serve(model_class(vllm_config=engine(ours)), ours, batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert kept == unbounded
    logits, kept = serve(TransformersForCausalLM(vllm_config=engine(ours, vllm_cache="per_layer")), ours, batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert kept == unbounded * ours.plan.num_layers // len(ours.plan.stores)


def test_cla2_has_twice_the_blocks(model_class: type) -> None:
    ours = build(small("cla2", num_layers=8))
    batch = tokens(1, LENGTH)[0]
    _, shared = serve(model_class(vllm_config=engine(ours)), ours, batch)
    _, apart = serve(TransformersForCausalLM(vllm_config=engine(ours, vllm_cache="per_layer")), ours, batch)
    assert apart == 2 * shared == 2 * kv_bytes(ours.plan, LENGTH, 8).stored


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cla2", {"stage": range(4)}, "pipeline_parallel_size=1"),
        ("cla2", {"cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
        ("swa_sinks", {}, "have attention sinks"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(
    name: str, changes: dict[str, Any], message: str, model_class: type
) -> None:
    with pytest.raises(ValueError, match=message):
        model_class(vllm_config=engine(build(small(name)), **changes))


@pytest.mark.parametrize(
    ("name", "accepted", "message"),
    [
        ("cla2", None, r"a copy of the keys and values for each of 2 layers .* pip install .* --hf-overrides '{\"vllm"),
        ("cla2", "yes", "a copy of the keys and values for each of 2 layers"),
        ("swa_sinks", "per_layer", "may leave out attention sinks, and the plugin of kvfrontier is not there"),
        ("gqa2", None, None),
    ],
)
@pytest.mark.usefixtures("model_class")
def test_without_the_plugin_the_model_itself_refuses(name: str, accepted: str | None, message: str | None) -> None:
    """vLLM goes on without a plugin that cannot be imported; the exported model is then built all the same."""
    vllm_config = engine(build(small(name)), vllm_cache=accepted)
    if message is None:
        TransformersForCausalLM(vllm_config=vllm_config)
        return
    with pytest.raises(ValueError, match=message):
        TransformersForCausalLM(vllm_config=vllm_config)


def test_windows_and_heads_that_differ_are_refused_with_and_without_it(model_class: type) -> None:
    layers = {"num_hidden_layers": 2, "num_key_value_heads": 4, "layer_key_value_heads": [4, 2]}
    for kind in (model_class, TransformersForCausalLM):
        vllm_config = engine(build(small("gqa2")), vllm_cache="per_layer")
        vllm_config.model_config.hf_config = KVFrontierConfig(**layers, vllm_cache="per_layer")
        with pytest.raises(ValueError, match="cannot serve this model: layer_key_value_heads differ"):
            kind(vllm_config=vllm_config)


def test_values_of_another_layer_are_refused() -> None:
    layers = {"num_hidden_layers": 3, "kv_source_layers": [0, 1, 1], "vllm_cache": "per_layer"}
    check_vllm(KVFrontierConfig(**layers))
    with pytest.raises(ValueError, match="cannot serve this model: its layers read keys of one layer and values of"):
        check_vllm(KVFrontierConfig(**layers, value_source_layers=[0, 1, 0]))


def test_layers_that_differ_are_refused(model_class: type) -> None:
    config = KVFrontierConfig(num_hidden_layers=2, num_key_value_heads=4, layer_key_value_heads=[4, 2])
    layers = {layer: Attention(8, 96, 1.0, prefix=f"{layer}.attn", context={}) for layer in range(2)}
    share = importlib.import_module("train.hf.vllm_model").share_caches
    with pytest.raises(ValueError, match="layer_key_value_heads differ"):
        share(config, layers, "auto")
    shared = KVFrontierConfig(num_hidden_layers=2, kv_source_layers=[0, 0])
    share(shared, layers, "auto")
    with pytest.raises(ValueError, match=r"1\.attn already reads the cache of 0\.attn"):
        share(shared, layers, "auto")


def test_importing_the_plugin_starts_nothing() -> None:
    assert "vllm" not in sys.modules
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    path, _, name = group["kvfrontier"].partition(":")
    assert (path, getattr(vllm_plugin, name)) == ("kvfrontier_hf.vllm_plugin", vllm_plugin.register)
    assert "vllm" not in sys.modules


def test_a_train_of_the_server_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files as a wheel has them, an editable one too: under a name of their own, importing nothing of `train`."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in files["force-include"].items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / place)
    assert {path.parent.name for path in tmp_path.rglob("*.py")} == {"kvfrontier_hf"}
    for name in [name for name in sys.modules if name.partition(".")[0] == "train"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "train", ModuleType("train"))  # a server's own file, say
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "ModelRegistry", ModelRegistry, raising=False)
    monkeypatch.setattr(ModelRegistry, "models", {})
    try:
        importlib.import_module("kvfrontier_hf.vllm_plugin").register()
        assert ModelRegistry.models == {ARCHITECTURE: f"kvfrontier_hf.vllm_model:{ARCHITECTURE}"}
        assert transformers.AutoConfig.for_model("kvfrontier").__module__.startswith("kvfrontier_hf.")
        (module,) = [name for name in files["force-include"].values() if name.endswith("vllm_model.py")]
        imported = re.findall(r"^(?:from|import) (\w+)", (tmp_path / module).read_text(), re.MULTILINE)
        assert set(imported) == {"typing", "vllm"}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvfrontier_hf"]:
            del sys.modules[name]
        transformers.AutoConfig.register("kvfrontier", KVFrontierConfig, exist_ok=True)


def test_source_is_what_engines_look_for() -> None:
    """vLLM takes the one call of what was looked up in ALL_ATTENTION_FUNCTIONS, and its `scaling=self.x`; transformers
    looks for the class and the look-up before it lets anybody change the implementation."""
    source = inspect.getsource(modeling_kvfrontier)
    assert re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == 1
    for kind in (modeling_kvfrontier.KVFrontierAttention, modeling_kvfrontier.KVFrontierOwnerAttention):
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
        looked_up = [
            node.target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        ]
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in looked_up
        ]
        assert len(calls) == 1
        assert [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "scaling"] == ["self.scaling"]


def test_in_vllm(tmp_path: Path) -> None:
    """Greedy tokens of the engine itself. The plugin is found by its entry point, if this repository is installed."""
    vllm = pytest.importorskip("vllm", reason="vLLM has no build for this machine's Python, torch and processor")
    ours = build(small("cla2", d_model=64, num_heads=2, head_dim=32, init_std=0.2), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(ours.config) | {"dtype": "float32"}))
    save_file(
        to_hf("remote", ours.config, ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    for file in FILES:
        shutil.copy(ROOT / "train" / "hf" / file, tmp_path)
    prompt = tokens(1, 9).tolist()
    model = vllm.LLM(str(tmp_path), skip_tokenizer_init=True, trust_remote_code=True, max_model_len=32)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    (request,) = model.generate([{"prompt_token_ids": prompt[0]}], greedy)
    assert list(request.outputs[0].token_ids) == generate(ours, prompt, 12)[0]
