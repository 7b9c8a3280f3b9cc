"""Hugging Face checkpoints become ours: the same logits and tokens, a run that starts from them, and every refusal."""

import copy
import errno
import json
import os
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, launch_in_process, small, tokens, weights
from conversions import from_hf
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_arch_convert import DEEPSEEK, GEMMA, LATENT, LLAMA, MINISTRAL, SLIDING, WIDTHS, assert_same, randomised

from arch import (
    ArchConfig,
    LayoutError,
    ModelConfig,
    SizeConfig,
    build,
    convert_remote,
    from_dict,
    generate,
    plan_from_dict,
    resolve,
)
from arch.convert import ConversionError, UnsupportedModelError
from arch.convert_formats import read_config
from data.cli import UsageError
from data.files import DataError
from train import checkpoint, import_hf, load, pretrain
from train.errors import TrainingError
from train.export import export
from train.hub import checkpoint_writer, importer
from train.hub.folder_reader import INDEX, SINGLE, HFFolder, refuse_links
from train.hub.request import ExportConfig
from train.import_hf import ImportConfig
from train.schema import PretrainConfig

transformers = pytest.importorskip("transformers")

# Pythia's config.json has the old names of rope_parameters' entries.
PYTHIA = {key: value for key, value in WIDTHS.items() if key != "rope_parameters"} | {
    "model_type": "gpt_neox", "hidden_size": 64, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 700,
    "use_parallel_residual": True, "layer_norm_eps": 1e-2, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama_tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "ministral": ("Ministral", {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8} | MIXED),
    "deepseek": ("DeepseekV3", LATENT),
    "gemma3": ("Gemma3", SLIDING | MIXED | {"head_dim": 6, "query_pre_attn_scalar": 17}),
    "pythia": ("GPTNeoX", PYTHIA),
    "pythia_tied": ("GPTNeoX", PYTHIA | {"tie_word_embeddings": True}),
}


def theirs(family: str, **changes: Any) -> Any:
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    values = {key: value for key, value in (WIDTHS | own | changes).items() if key != "model_type"}
    if name == "GPTNeoX":
        values.pop("rope_parameters")
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**values)
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config)).eval()


def do_import(*arguments: str) -> None:
    launch_in_process(import_hf.main, "import_hf", ImportConfig, import_hf.rename_from_flag([*arguments]))


def ours(folder: Path) -> Any:
    """The model in a checkpoint, as its checkpoint.json has it."""
    info = checkpoint.load_info(folder)
    model = build(from_dict(ModelConfig, info["config"]))
    assert plan_from_dict(info["plan"]) == model.plan
    checkpoint.load(checkpoint.resolve(folder), model)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 5])
def test_an_imported_model_is_the_stock_one(family: str, shards: int, tmp_path: Path) -> None:
    model = theirs(family)
    model.save_pretrained(tmp_path / "hf", max_shard_size="5GB" if shards == 1 else "20KB")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shards > 1)
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    assert_same(ours(tmp_path / "ours"), model)
    parts = {
        group: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.load(path)))
        for group, cls in (("arch", ArchConfig), ("size", SizeConfig))
        for path in (tmp_path / "ours" / group).iterdir()
    }
    assert ModelConfig(**parts) == from_dict(ModelConfig, checkpoint.load_info(tmp_path / "ours")["config"])


def test_generation_over_the_cache_of_style_neox(tmp_path: Path) -> None:
    """Prompts of unequal length, each as if it were alone."""
    model = theirs("pythia")
    model.save_pretrained(tmp_path / "hf")
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    prompts = [tokens(1, 3)[0], tokens(1, 9)[0]]
    alone = [model.generate(p[None], max_new_tokens=6, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    assert generate(ours(tmp_path / "ours"), [p.tolist() for p in prompts], 6) == alone


def test_a_file_of_old_pythia(tmp_path: Path) -> None:
    """Masks, of a type that no weight may have, and rotary tables are in its files, too; they are not read."""
    model = theirs("pythia")
    model.save_pretrained(tmp_path / "hf")
    prefix = "gpt_neox.layers.2.attention"
    mask = {f"{prefix}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool), f"{prefix}.masked_bias": torch.tensor(-1e9)}
    edit_tensors(tmp_path / "hf", lambda t: t.update(mask | {f"{prefix}.rotary_emb.inv_freq": torch.ones(2)}))
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    assert_same(ours(tmp_path / "ours"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_the_same_numbers_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs("llama").to(dtype)
    model.save_pretrained(tmp_path / "hf")
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_same(ours(tmp_path / "ours"), model)
    (shard,) = (tmp_path / "ours").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.float32}


def test_large_models_are_held_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is read, nothing is alive of those before it; files have a limit, or one tensor that exceeds it."""
    model = theirs("llama")
    model.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(checkpoint_writer, "SHARD_BYTES", 8000)
    alive, largest, read = [0], [0], HFFolder.get

    def counted(self: HFFolder, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive[0] += tensor.nbytes
        largest[0] = max(largest[0], alive[0])
        weakref.finalize(tensor.untyped_storage(), lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(HFFolder, "get", counted)
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    written = [load_file(path) for path in (tmp_path / "ours").glob("*.safetensors")]
    assert len(written) > 4
    for held in written:
        assert len(held) == 1 or sum(4 * tensor.numel() for tensor in held.values()) <= 8000
    assert largest[0] == max(tensor.nbytes for held in written for tensor in held.values())
    assert alive[0] == 0
    assert_same(ours(tmp_path / "ours"), model)


def test_training_goes_on_from_it(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """By the command that it prints: with next to no learning rate the weights stay as they came."""
    theirs("pythia", vocab_size=600).save_pretrained(tmp_path / "hf")
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    (command,) = [line.split() for line in capsys.readouterr().out.splitlines() if "train/pretrain.py" in line]
    command = [word.replace("data.path=DATA", f"data.path={corpus}") for word in command]
    short = ["size.seq_len=32", "batch_size=2", "tokens=128", "data.val_tokens=64", "logger=csv"]
    more = ["optim.lr=1e-30", "trainer.accelerator=cpu", f"folder={tmp_path / 'run'}"]
    launch_in_process(pretrain.main, "pretrain", PretrainConfig, [*command[2:], *short, *more])
    trained, started = weights(tmp_path / "run"), ours(tmp_path / "ours").state_dict()
    assert trained.keys() == started.keys()
    assert all(torch.equal(trained[name], started[name]) for name in started)


def test_a_tokenizer_beside_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    theirs("llama", vocab_size=600).save_pretrained(tmp_path / "hf")
    shutil.copyfile(corpus / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    do_import("from=hf", "out=new/ours")
    assert "tokenizer.name=new/ours" in capsys.readouterr().out
    assert (tmp_path / "new" / "ours" / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()


def test_a_full_disk_leaves_no_import_without_its_tokenizer(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    theirs("llama", vocab_size=600).save_pretrained(tmp_path / "hf")
    shutil.copyfile(corpus / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    monkeypatch.setattr(shutil, "copyfile", full)
    message = refusal(capfd, f"from={tmp_path / 'hf'}", f"out={tmp_path / 'ours'}")
    assert f"cannot write {tmp_path / 'ours'}: No space left on device" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_how_a_text_begins_and_ends_is_kept(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """From the folder of the hub to the import and its export: the begin of a text, its end, and the chat template."""
    from rich.console import Console
    from tokenizers import Tokenizer, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    fast = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    begin = "<|begin|>"
    fast.add_special_tokens([begin, "<|turn_end|>"])
    number = fast.token_to_id(begin)
    fast.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, number)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=begin, eos_token="<|turn_end|>", chat_template="{{ messages[0]['content'] }}"
    )
    theirs("llama", vocab_size=608).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    do_import("from=hf", "out=ours")
    found = load("ours").tokenizer
    assert (found.begin, found.end) == (number, tokenizer.eos_token_id)
    assert found.prompt("def f") == tokenizer("def f")["input_ids"] == [number, *found.encode("def f")]
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    whole = hf.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0]
    assert load("ours").generate("def f", 5) == found.decode(whole[len(found.prompt("def f")) :].tolist())
    export(ExportConfig("ours", "exported"), Console(quiet=True))
    again = AutoTokenizer.from_pretrained("exported")
    for name in ("bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again("def f")["input_ids"] == tokenizer("def f")["input_ids"]
    config = json.loads(Path("exported/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (number, tokenizer.eos_token_id)
    (tmp_path / "ours" / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is no JSON"):
        load("ours").tokenizer  # noqa: B018


# What is refused


def refusal(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        do_import(*arguments)
    assert stopped.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x"], "from= is not set; give a folder, or a name on the hub"),
        (["from=x"], "out= is not set"),
        (["from=x", f"out={ROOT}"], f"out={ROOT} is there already; give a new folder"),
        (["from=x", "out=x", "revison=main"], "unknown key revison, did you mean revision?"),
    ],
)
def test_what_the_command_needs(arguments: list[str], message: str, capfd: pytest.CaptureFixture) -> None:
    assert message in refusal(capfd, *arguments)


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """A folder of the same name goes first; what is downloaded is no code and no pickle."""
    theirs("pythia").save_pretrained(tmp_path / "hf")
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if name != "someone/pythia":
            raise LocalEntryNotFoundError("no network, nothing cached")
        return str(tmp_path / "hf")

    monkeypatch.setattr(importer, "snapshot_download", download)
    do_import("from=someone/pythia", "revision=step3000", f"out={tmp_path / 'ours'}")
    assert [request[:2] for request in asked] == [("someone/pythia", "step3000")]
    assert not [pattern for pattern in asked[0][2] if "py" in pattern or "bin" in pattern or pattern == "*"]
    do_import(f"from={tmp_path / 'hf'}", f"out={tmp_path / 'local'}")
    assert len(asked) == 1
    message = refusal(capfd, "from=someone/else", f"out={tmp_path / 'other'}")
    assert "from=someone/else is no folder here, and it cannot be downloaded: no network, nothing cached" in message
    assert "copy its folder here" in message
    message = refusal(capfd, f"from={tmp_path / 'hf' / 'config.json'}", f"out={tmp_path / 'other'}")
    assert "is a file; give the folder that holds it" in message


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_pct": 0.5},
        {"rotary_emb_base": -1},
        {"use_parallel_residual": False},
        {"hidden_act": "gelu_new"},
        {"attention_bias": False},
        {"attention_dropout": 0.1},
        {"hidden_dropout": 0.1},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": ["GPTNeoXForSequenceClassification"]},
        {"hidden_size": 0},
        {"layer_norm_eps": "small"},
        {"tie_word_embeddings": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_style_neox_cannot_do_is_refused(change: dict[str, Any]) -> None:
    read_config(PYTHIA)
    with pytest.raises(UnsupportedModelError) as error:
        read_config(PYTHIA | change)
    (key,) = change
    assert str(error.value).startswith(f"- {key} is {change[key]!r}; it must be ")
    assert len(str(error.value).splitlines()) == 1


def test_where_style_neox_takes_its_rotation_from() -> None:
    new = {key: value for key, value in PYTHIA.items() if not key.startswith("rotary")}
    assert read_config(new).config.size.rope_theta == 10000.0
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}
    assert read_config(new | {"rope_parameters": rope}).config.size.rope_theta == 5e4
    with pytest.raises(
        UnsupportedModelError, match=r"^- rope_parameters.partial_rotary_factor is 1.0; it must be 0.25$"
    ):
        read_config(new | {"rope_parameters": rope | {"partial_rotary_factor": 1.0}})
    with pytest.raises(LayoutError, match=r"rotary_fraction 0.25 of the head dimension 12 is 3; .* a multiple of 8"):
        read_config(PYTHIA | {"hidden_size": 96})
    with pytest.raises(
        UnsupportedModelError, match=r"^- model_type is 'gpt2'; .* llama.*gpt_neox, kvfrontier, kvf\w+$"
    ):
        read_config(PYTHIA | {"model_type": "gpt2"})


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4_text", "gpt_oss"])
def test_classes_that_no_decoder_is_are_refused_with_the_reason(model_type: str) -> None:
    key = {"gemma3": "vision_config", "gemma4_text": "layer_scalar", "gpt_oss": "num_local_experts"}[model_type]
    with pytest.raises(UnsupportedModelError, match=f"^- model_type is '{model_type}', which has .*{key}"):
        read_config(LLAMA | {"model_type": model_type})


def test_masks_and_tables_of_old_pythia_files_are_passed_over() -> None:
    model = theirs("pythia_tied")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "embed_out.weight"}
    buffers = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    more = {f"gpt_neox.layers.1.{name}": torch.ones(1) for name in buffers}
    hf = PYTHIA | {"tie_word_embeddings": True}
    tensors.pop("lm_head.weight", None)
    config, state = from_hf(hf, tensors | more)
    assert state.keys() == {name for name, _ in build(config).named_parameters()}
    embed = tensors["gpt_neox.embed_in.weight"]
    assert from_hf(hf, tensors | {"embed_out.weight": embed.clone()})[1].keys() == state.keys()
    with pytest.raises(ConversionError, match=r"embed_out.weight differs from gpt_neox.embed_in.weight"):
        from_hf(hf, tensors | {"embed_out.weight": embed + 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in a single file, one in many."""
    folder = tmp_path_factory.mktemp("saved")
    theirs("llama").save_pretrained(folder / "single")
    theirs("pythia").save_pretrained(folder / "sharded", max_shard_size="20KB")
    return {name: folder / name for name in ("single", "sharded")}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def header(folder: Path, length: int) -> None:
    """A file that says that its header has `length` bytes."""
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + content[8:])


def as_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def move(name: str, file: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / INDEX, lambda index: index["weight_map"].update({name: file}))


def set_to(name: str, place: int, value: float) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors[name].view(-1)[place].fill_(value))


ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "Adapter_Config.JSON",
            "adapter_model-00001-of-00002.safetensors", "adapters.safetensors", "pytorch_adapter.bin",
            "lora.safetensors", "pytorch_lora_weights.bin")  # fmt: skip


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../single", "linked"])
def test_an_adapter_beside_the_weights_is_refused(
    spelling: str, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """It would be left out, in silence; also where there is nothing but the adapter."""
    folder = shutil.copytree(saved["single"], tmp_path / "single")
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for name in ADAPTERS if spelling == "{}" else ADAPTERS[:1]:
        (folder / name).touch()
        message = refusal(capfd, f"from={spelling.format(folder)}", "out=ours")
        assert f"has an adapter, {name}, which would be left out; merge it" in message
        assert "merge_and_unload().save_pretrained(NEW)" in message
        (folder / name).unlink()
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").touch()
    assert "has an adapter" in refusal(capfd, f"from={spelling.format(folder)}", "out=ours")


def test_links_out_of_a_foreign_folder_are_refused(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """What they lead to would be copied, or read; the hub's cache keeps its files as links to its blobs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.json").write_text("{}")
    folder = shutil.copytree(saved["single"], tmp_path / "models--x" / "snapshots" / "abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (folder / SINGLE).rename(blobs / "1")
    (folder / SINGLE).symlink_to("../../blobs/1")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to("../../../secret.json")
    message = refusal(capfd, f"from={folder}", "out=ours")
    assert f"{folder / 'tokenizer.json'} is a link out of the folder, to {tmp_path / 'secret.json'}" in message
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer" in refusal(capfd, f"from={folder}", "out=ours")
    (folder / "tokenizer.json").unlink()
    refuse_links(folder)
    assert not (tmp_path / "ours").exists()


NORM, HEAD, Q = "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
EMBED = "gpt_neox.embed_in.weight"
BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pickle": ("single", as_pickle, "pytorch_model.bin, a pickle, which can execute code"),
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), f"has neither {SINGLE} nor {INDEX}"),
    "no config": ("single", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no json": ("single", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "deep json": ("single", lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
    "a list": ("single", lambda f: (f / "config.json").write_text("[]"), "config.json holds no mapping"),
    "cut off": ("single", lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-1]), f"{SINGLE} cannot be"),
    "empty": ("single", lambda f: (f / SINGLE).write_bytes(b""), f"{SINGLE} cannot be read"),
    "long header": ("single", lambda f: header(f, 2**62), f"{SINGLE} cannot be read"),
    "other header": ("single", lambda f: header(f, 100), f"{SINGLE} cannot be read"),
    "missing": ("single", lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "extra": ("single", lambda f: edit_tensors(f, lambda t: t.update(a=torch.ones(1))), "a is unexpected"),
    "shape": (
        "single",
        lambda f: edit_tensors(f, lambda t: t.update({Q: t[Q][:8].clone()})),
        f"{Q} has the shape [8, 32]; it must be [32, 32]",
    ),
    "type": (
        "single",
        lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        f"{NORM} has the type torch.int8; it must be one of torch.float32, torch.bfloat16, torch.float16",
    ),
    "nan": ("single", set_to(HEAD, 5, float("nan")), f"{HEAD} has values that are not finite"),
    "infinity": ("single", set_to(Q, -1, float("inf")), f"{Q} has values that are not finite"),
    "depth": (
        "single",
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
        "num_hidden_layers is 1000000000; there are 30 tensors",
    ),
    "width": (
        "single",
        lambda f: edit(f / "config.json", lambda c: c.update(hidden_size=10**12)),
        "hidden_size is 1000000000000; it must be a whole number from 1 to",
    ),
    "other widths": (
        "single",
        lambda f: edit(f / "config.json", lambda c: c.update(intermediate_size=2**20)),
        "mlp.up_proj.weight has the shape [48, 32]; it must be [1048576, 32]",
    ),
    "outside": ("sharded", move(EMBED, "../x.safetensors"), f"{EMBED} is in '../x.safetensors'; it must"),
    "absolute": ("sharded", move(EMBED, "/etc/passwd"), f"{EMBED} is in '/etc/passwd'; it must"),
    "number": ("sharded", move(EMBED, 3), f"{EMBED} is in 3; it must"),
    "not there": ("sharded", move(EMBED, "other.safetensors"), "other.safetensors cannot be read"),
    "not listed": (
        "sharded",
        lambda f: edit(f / INDEX, lambda index: index["weight_map"].pop(EMBED)),
        f"{EMBED} is in it, and not in {INDEX}",
    ),
    "not in the file": (
        "sharded",
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update(b=i["weight_map"][EMBED])),
        f"b is not in it, but in {INDEX}",
    ),
    "two kinds": (
        "sharded",
        lambda f: save_file({"a": torch.ones(1)}, f / SINGLE),
        f"one of them is left of an earlier saving. transformers reads {SINGLE}; remove the one that is not meant",
    ),
    "no map": ("sharded", lambda f: (f / INDEX).write_text("{}"), "weight_map is missing"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_malformed_is_refused_by_name(
    how: str, saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """And leaves nothing behind."""
    kind, change, message = BROKEN[how]
    folder = shutil.copytree(saved[kind], tmp_path / "hf")
    change(folder)
    assert message in refusal(capfd, f"from={folder}", f"out={tmp_path / 'ours'}")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_index_of_files_that_are_gone_is_passed_over(saved: dict[str, Path], tmp_path: Path) -> None:
    """As save_pretrained leaves it beside the one file that it writes later."""
    folder = shutil.copytree(saved["single"], tmp_path / "hf")
    shutil.copy(saved["sharded"] / INDEX, folder)
    assert attempt(folder, tmp_path / "ours")


def attempt(folder: Path, out: Path) -> bool:
    """Whether `folder` is imported; what is not is refused in words."""
    try:
        importer.run(folder, out, "fuzzed")
    except (UsageError, ConversionError, LayoutError) as error:
        assert str(error)
        assert not out.exists()
        return False
    shutil.rmtree(out)
    return True


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_random_damage(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Bytes changed, cut out, doubled anywhere: refused in words, or no damage that shows (another finite weight)."""
    chance, outcomes = random.Random(0), []
    folder = shutil.copytree(saved[kind], tmp_path / "hf")
    files = [path for path in sorted(folder.iterdir()) if path.name != "generation_config.json"]
    for _ in range(75):
        path = chance.choice(files)
        original = content = path.read_bytes()
        at = chance.randrange(min(len(content), chance.choice((12, 2000, len(content)))))
        size = chance.choice((1, 1, 8, 100))
        new = (chance.randbytes(size), b"", content[at : at + size] * 2, b"9" * size)[chance.randrange(4)]
        path.write_bytes(content[:at] + new + content[at + size :])
        outcomes.append(attempt(folder, tmp_path / "ours"))
        path.write_bytes(original)
    assert attempt(folder, tmp_path / "ours")
    assert 5 < sum(outcomes) < 70


ODD = [
    None,
    "x",
    "",
    -1,
    0,
    3,
    1.5,
    True,
    [],
    ["x"],
    [[]],
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": "x"},
    [None] * 8,
    [2**70] * 8,
    10**30,
    float("nan"),
    float("inf"),
]


REMOTE = convert_remote.to_hf_config(small("mixattention", num_layers=8))


@pytest.mark.parametrize(
    "hf",
    [LLAMA, MINISTRAL, GEMMA, DEEPSEEK, PYTHIA, REMOTE],
    ids=["llama", "ministral", "gemma3", "deepseek", "pythia", "remote"],
)
def test_odd_values_in_a_config(hf: dict[str, Any]) -> None:
    """Each key of a config.json with each of them: a model that can be built, or a refusal in words."""
    extra = {key: None for key in ("layer_types", "rope_scaling", "head_dim", "num_key_value_heads", "architectures")}
    built = 0
    for key in hf | extra | {"rope_parameters": None}:
        for value in ODD:
            changed = copy.deepcopy(hf) | {key: value}
            if key == "num_hidden_layers" and value == 10**30:
                continue  # counted against the tensors first
            try:
                config = read_config(changed).config
            except (UnsupportedModelError, LayoutError) as error:
                assert str(error)
                continue
            resolve(config)
            built += 1
    assert built > 20


def test_what_checkpoints_are_is_still_checked(saved: dict[str, Path], tmp_path: Path) -> None:
    """An imported folder is one like any other: altered, it is refused; of another size, too."""
    importer.run(saved["single"], tmp_path / "ours", "single")
    config = from_dict(ModelConfig, checkpoint.load_info(tmp_path / "ours")["config"])
    config.size.d_ff += 8
    with pytest.raises(TrainingError, match=r"is of another model: model.layers.0.mlp.gate_proj.weight"):
        checkpoint.check_matches(tmp_path / "ours", build(config))
    shard = tmp_path / "ours" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"abcd")
    with pytest.raises(TrainingError, match="has been altered"):
        checkpoint.resolve(tmp_path / "ours")
