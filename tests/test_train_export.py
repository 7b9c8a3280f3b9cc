"""Export: folders that others load, what is refused, and checkpoints that somebody has tampered with."""

import errno
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHS, ROOT, build, covering, launch_in_process, run_script, small, whole_depth
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_arch_convert import INTERLEAVED, STOCK, randomised
from test_train_command import SMALL

import train.export
import train.hub.card
import train.hub.checkpoint_reader
import train.hub.exporter
import train.hub.upload
import train.hub.verify
from arch import ArchConfig, Decoder, StoreConfig, generate, resolve
from arch.convert import ConversionError
from arch.convert_stock import GEMMA3, OLMO
from data.cli import UsageError
from data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data.files import sha256
from data.prepare import prepare
from eval.outcome import MISTAKES
from train import checkpoint
from train.checkpoint import save
from train.errors import TrainingError
from train.export import export, main
from train.hub.checkpoint_reader import CheckpointReader
from train.hub.records import Training
from train.hub.request import ExportConfig
from train.hub.run_info import load_corpus
from train.hub.targets import TRANSFORMERS_FLOOR, select_target
from train.hub.verify_protocol import Request, Response
from train.schema import PretrainConfig

QUIET = Console(file=open(os.devnull, "w"), width=140)  # noqa: SIM115  as long as the tests
REFUSALS = (*MISTAKES, TrainingError, ConversionError)


def write_checkpoint(folder: Path, layout: ArchConfig | str, **changes: object) -> Path:
    """A checkpoint of random weights as a run would write it, optimizer state included."""
    config = small(layout, **({"vocab_size": 600, "num_layers": 3} | changes))
    model = randomised(build(config, torch.float32))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    save(folder, model, optimizer, 3, {"config": asdict(config), "plan": model.plan.to_dict()})
    return folder


def in_process(folder: Path, request: Request) -> tuple[Response, dict[str, torch.Tensor]]:
    """What the fresh process does, without the seconds that it takes to import transformers."""
    pytest.importorskip("transformers")
    from train.hub.verify_child import examine

    response, logits = examine(str(folder), json.loads(json.dumps(request)))
    return response | {"imported_packages": []}, logits


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of a run exported as typed has one; drawing it takes longer than the rest of an export."""
    monkeypatch.setattr(train.hub.card, "draw_plan", lambda plan, name, context, itemsize, path: path.touch())


@pytest.mark.parametrize("theirs", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_differs(theirs: float) -> None:
    """It is said in the table of checks, where a process that ends would say nothing."""
    exported: Any = SimpleNamespace(corpus=SimpleNamespace(windows=[[1, 2, 3]]))
    read = json.loads(json.dumps(theirs))  # as the response travels
    (check,) = train.hub.verify.check_loss(exported, read, 1.0, 1e-3, first=0)
    assert check.passed is False and check.found == str(theirs)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.hub.verify, "fresh_process", in_process)


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000003", "gqa2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A real run of eight steps, sharded over two processes; the one that these tests train."""
    folder = tmp_path_factory.mktemp("runs") / "swa-tiny"
    options = [*SMALL, "size.init_std=0.2", "logger=csv", "trainer.accelerator=cpu", f"data.path={corpus}"]
    options += ["trainer=fsdp", f"folder={folder}"]
    done = run_script("train/pretrain.py", "+arch=swa", "+size=tiny", *options, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


SHIPPED = {"bct", "bct_gated", "bct_mixed", "bct_ring", "block", "cla4_window", "kimi_linear", "mimo", "mla_cla2"}
SHIPPED |= {"qwen3_next", "fusedkv", "gla2", "mistral_large4", "deepseek_v4_hca", "gemma4", "llama4", "mtla"}
HALF = ArchConfig({"kv": StoreConfig(kv_heads=2, tied="half")}, ["new kv"])
TWO_WINDOWS = ArchConfig({"near": StoreConfig(2, window=4), "far": StoreConfig(2, window=7)}, ["new near", "new far"])


def target_of(name: str) -> str:
    """Of a file of configs/arch; a new one is of the remote decoder, unless somebody says so here."""
    return STOCK.get(name) or ("KVFrontierShippedForCausalLM" if name in SHIPPED else "KVFrontierForCausalLM")


@pytest.mark.parametrize("name", ARCHS)
def test_which_target_a_layout_gets(name: str) -> None:
    config = small(name)
    target, passed = select_target(config, resolve(config))
    assert target.model_class == target_of(name)
    before = {"Shipped": ["stock", "remote"], "KVFrontier": ["stock"]}
    assert list(passed) == next((names for part, names in before.items() if part in target.model_class), [])


def test_the_oldest_transformers_is_one_number() -> None:
    """In the model card, where packages are declared, and in the README."""
    declared = re.findall(r'"transformers>=([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert set(declared) == {TRANSFORMERS_FLOOR}
    assert set(re.findall(r"`transformers` >=\s(\d[\d.]*\d)", (ROOT / "README.md").read_text())) == {TRANSFORMERS_FLOOR}


# Of each target the layouts that together have every kind of block.
BY_TARGET = [
    name
    for target in sorted({target_of(name) for name in ARCHS})
    for name in covering(name for name in ARCHS if target_of(name) == target)
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "layout", [*BY_TARGET, INTERLEAVED, TWO_WINDOWS], ids=[*BY_TARGET, "interleaved", "two_windows"]
)
def test_every_kind_comes_back_the_same(
    layout: ArchConfig | str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the target that `auto` takes, at the least depth that shows all of its pattern; of stock layouts three layers
    do. That every layout is the model of its target: test_arch_convert, test_train_hf_decoder, _export_shipped. Prompts
    are shorter and longer than a window, so that a few tokens after them show what a cache does."""
    monkeypatch.setattr(train.hub.verify, "NUM_NEW_TOKENS", 5)
    depth = whole_depth(layout, least=3) if isinstance(layout, str) else 3
    source = write_checkpoint(tmp_path / "step-00000003", layout, tie_embeddings=layout != "gqa4", num_layers=depth)
    checks = export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(corpus)), QUIET)
    assert {check.name: check.passed for check in checks if check.passed is not True}.keys() == {
        "bf16: KL divergence from fp32, nats",
        "bf16: the same most likely token",
        "perplexity on validation text",
    }
    assert len(checks) > 15
    assert checks[0].name == "class"
    own = STOCK["swa"] if layout is INTERLEAVED else "KVFrontierForCausalLM"
    assert checks[0].found == (target_of(layout) if isinstance(layout, str) else own)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("layout", "style", "dtype"),
    [("olmo3", OLMO | {"head_dim": None}, "fp32"), ("gemma3", GEMMA3, "fp32"), ("gemma3", GEMMA3, "bf16")],
)
def test_released_styles_are_the_stock_class(
    layout: str, style: dict[str, Any], dtype: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure, of the cache too; in half precision what is rounded is the tensor of the file, a norm less 1."""
    monkeypatch.setattr(train.hub.verify, "NUM_NEW_TOKENS", 5)
    source = write_checkpoint(tmp_path / "step-00000003", layout, num_layers=6, **style)
    checks = export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(corpus), dtype=dtype), QUIET)
    assert not [check for check in checks if check.passed is False]
    assert checks[0].found == {"olmo3": "Olmo3ForCausalLM", "gemma3": "Gemma3ForCausalLM"}[layout]
    assert {check.name for check in checks if "cache" in check.name} >= {"bytes of the static cache"}


@pytest.mark.slow
def test_the_command_on_a_run(run: Path, tmp_path: Path) -> None:
    """As typed, verified in a process of its own; then loaded by the code in its card, which is run as it stands."""
    pytest.importorskip("transformers")
    done = run_script("train/export.py", f"checkpoint={run}", "out=mine", "max_shard_size=40KB", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "mine"
    assert "target: stock, MinistralForCausalLM" in done.stdout
    assert re.search(r"our packages imported +│ +none", done.stdout)
    assert re.search(r"perplexity on 128 validation tokens.* ok ", done.stdout)
    assert len(list(checkpoint.resolve(run).glob("*.safetensors"))) == 2

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sum((out / name).stat().st_size > 45_000 for name in files) == 1 < len(files) - 1  # the embedding
    held = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert {name: file for file in files for name in load_file(out / file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    with safe_open(out / files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}

    card = (out / "README.md").read_text()
    assert "| our packages imported | none | none |" in card
    summary = json.loads((run / "summary.json").read_text())
    assert f"validation perplexity: {summary['val']['ppl']:.3f}" in card
    assert "- tokens: 1,024, in sequences of 32" in card
    assert "| constant (windows, when full) | 768 B | 0 B |" in card  # 3 layers x 8 positions x 2 x 2 heads x 4 x 2 B
    assert (out / "architecture.png").read_bytes().startswith(b"\x89PNG")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'from_pretrained("mine"' in code
    (tmp_path / "card.py").write_text(code)
    shown = fork_script([str(tmp_path / "card.py")], str(tmp_path), {})
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Once upon a time")


def shard(folder: Path, cuts: int = 2) -> None:
    """Split the one file of a checkpoint by rows, as FSDP2 does: a process may get no row of a small tensor."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    for rank in range(cuts):
        parts, offsets = {}, {}
        for name, tensor in tensors.items():
            rows = -(-len(tensor) // cuts) if tensor.ndim else 0
            begin = min(rank * rows, len(tensor)) if tensor.ndim else 0
            if tensor.ndim or rank == 0:
                parts[name] = tensor[begin : begin + rows].contiguous() if tensor.ndim else tensor
                offsets[name] = {"saved_offsets": [begin] + [0] * (tensor.ndim - 1) if tensor.ndim else []}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        save_file(parts, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata)
    sign(folder)


def sign(folder: Path, **changes: object) -> None:
    """Make checkpoint.json fit the files that are there, as who tampers with them would."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in folder.glob("*.safetensors")}
    info = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(info | {"files": files} | changes))


def exported(source: Path, corpus: Path, name: str = "out", **options: object) -> dict[str, torch.Tensor]:
    """The tensors of an export that is not verified."""
    out = source.parent / name
    export(ExportConfig(str(source), str(out), prepared=str(corpus), verify=False, **options), QUIET)
    return {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_shards_of_several_processes_become_the_same_files(gqa: Path, corpus: Path) -> None:
    """Also where there are more processes than rows; what was refused before is accepted when all rows are there."""
    whole = exported(gqa, corpus)
    for cuts in (3, 40):
        other = shutil.copytree(gqa, gqa.parent / f"cut-{cuts}")
        shard(other, cuts)
        parts = exported(other, corpus, f"out-{cuts}", max_shard_size="1KB")
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert len(list((gqa.parent / "out-40").glob("*.safetensors"))) > 10


def test_one_weight_in_memory_at_a_time(gqa: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is read, nothing is alive any more when the next weight is; shards hold many."""
    alive, largest = [0], [0]
    read = CheckpointReader.get

    def counted(self: CheckpointReader, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive[0] += tensor.nbytes
        largest[0] = max(largest[0], alive[0])
        weakref.finalize(tensor.untyped_storage(), lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(CheckpointReader, "get", counted)
    shard(gqa)
    tensors = exported(gqa, corpus)
    assert largest[0] == max(tensor.nbytes for tensor in tensors.values())
    assert alive[0] == 0


@pytest.mark.usefixtures("here")
def test_bf16_is_the_rounded_model(gqa: Path, corpus: Path) -> None:
    checks = export(ExportConfig(str(gqa), str(gqa.parent / "out"), prepared=str(corpus), dtype="bf16"), QUIET)
    assert all(check.passed is not False for check in checks)
    (path,) = (gqa.parent / "out").glob("*.safetensors")
    model = Decoder(CheckpointReader(gqa).model()[0])
    checkpoint.load(gqa, model)
    assert torch.equal(load_file(path)["lm_head.weight" if model.lm_head else "model.embed_tokens.weight"],
                       model.output_weight.bfloat16())  # fmt: skip
    assert json.loads((gqa.parent / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("here")
def test_bytes_as_tokens(tmp_path: Path, corpus: Path) -> None:
    data = tmp_path / "bytes"
    config = PrepareConfig(
        str(data), source=SourceConfig(corpus="unit"), tokenizer=TokenizerConfig(kind="bytes"), workers=1
    )
    prepare(config)
    source = write_checkpoint(tmp_path / "step-00000003", "mqa", vocab_size=257)
    checks = export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(data)), QUIET)
    assert {check.name: check.found for check in checks}["texts tokenized and back"] == "4 of 4"
    assert {check.name: check.found for check in checks}["end of text"] == "256 and 256"


def test_a_tokenizer_adds_nothing_that_training_did_not(gqa: Path, corpus: Path) -> None:
    """Of a pretrained one, what puts a start token before a text stays behind."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(gqa / "tokenizer.json"))  # beside the weights, as an import leaves it
    assert tokenizer.encode("abc").ids[0] == 0
    export(ExportConfig(str(gqa), str(gqa.parent / "out"), verify=False), QUIET)
    theirs = transformers.AutoTokenizer.from_pretrained(gqa.parent / "out")
    assert theirs("abc")["input_ids"] == tokenizer.encode("abc", add_special_tokens=False).ids
    config = json.loads((gqa.parent / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # which readers older than 5 have


@pytest.mark.usefixtures("here")
def test_what_differs_is_named_and_kept(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is one too short, a weight that is another: nothing is deleted, and nothing has the asked name."""
    source = write_checkpoint(tmp_path / "step-00000003", "swa")
    write = train.hub.exporter.write

    def broken(change: Callable[[Path], None]) -> list[str]:
        def wrong(request: Any, *rest: Any) -> None:
            write(request, *rest)
            change(request.partial)

        monkeypatch.setattr(train.hub.exporter, "write", wrong)
        with pytest.raises(TrainingError, match="is not the model that was trained; it is kept") as error:
            export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(corpus)), QUIET)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial" / "config.json").exists()
        return [line.partition(":")[0] for line in str(error.value).splitlines()[1:]]

    def shorter_window(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": config["sliding_window"] - 1}))

    def other_weight(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1 + 1e-4  # far from rounding, and no token is another
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    found = broken(shorter_window)
    assert found[0] == "logits in fp32, largest difference"
    assert found[-3:] == [
        "bytes of the cache, to 31 tokens",
        "bytes it keeps alive, 31 tokens",
        "bytes of the static cache",
    ]
    assert broken(other_weight) == ["logits in fp32, largest difference"]
    monkeypatch.setattr(train.hub.exporter, "write", write)
    export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(corpus)), QUIET)
    assert not (tmp_path / "out.partial").exists()


def fork_script(command: list[str], cwd: str, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a Python script in a fork of this process, which has imported all that it needs."""
    script = next(number for number, word in enumerate(command) if word.endswith(".py"))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sys.argv, sys.stdout, sys.stderr = command[script:], out, errors
                os.chdir(cwd)
                os.environ.update(env)
                torch.set_num_threads(1)  # torch's pool after a fork, before two threads make it at once and one fails
                runpy.run_path(command[script], run_name="__main__")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                out.flush()
                errors.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        texts = [stream.seek(0) or stream.read() for stream in (out, errors)]
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *texts)


def test_a_folder_that_does_not_load_says_why(gqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the other process itself, without a traceback of ours."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(train.hub.verify.subprocess, "run", fork_script)
    (gqa.parent / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TrainingError, match=r"cannot be loaded or run by transformers:[^$]*model.safetensors"):
        train.hub.verify.fresh_process(gqa.parent, {"trust_remote_code": False})


def refused(source: Path, *arguments: str, data: Path | None = None) -> str:
    """The message of the command, which ends with code 1 or 2 and leaves nothing."""
    out = source.parent / "out"
    with pytest.raises(REFUSALS) as error:
        options = {"checkpoint": str(source), "out": str(out), "verify": False, "prepared": data and str(data)}
        export(ExportConfig(**(options | dict(argument.split("=", 1) for argument in arguments))), QUIET)
    assert not out.with_name("out.partial").exists()
    return str(error.value)


def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "step-00000003", "gqa2")
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, message in (
        (["out=" + str(taken)], r"taken is there already; give another folder with out="),
        (["dtype=fp8"], "dtype is fp8; choose fp32, bf16"),
        (["target=gguf"], "target is gguf; choose auto, stock"),
        (["max_shard_size=big"], "max_shard_size: cannot read 'big'"),
        (["max_shard_size=0"], "it must be more than nothing"),
        (["license=Apache 2.0"], "license=Apache 2.0: give an identifier of the hub, such as apache-2.0"),
        (["out="], "give out=, a new folder"),
        (["checkpoint=" + str(tmp_path / "gone")], "gone is not there"),
        (["checkpoint=" + str(taken)], "taken is neither a checkpoint nor a run that has saved one"),
        (["prepared=" + str(taken)], "holds no prepared data"),
        ([], "there is no tokenizer: .*lies in no run; give the prepared folder that it was trained on with prepared="),
    ):
        assert re.search(message, refused(source, *arguments)), arguments
    assert taken.is_dir()
    small_vocabulary = write_checkpoint(tmp_path / "step-00000004", "gqa2", vocab_size=61)
    assert "the tokenizer has 600 tokens, the model 61" in refused(small_vocabulary, data=corpus)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="verification needs transformers: pip install"):
        export(ExportConfig(str(source), str(tmp_path / "out"), prepared=str(corpus)), QUIET)


def test_names_in_a_card_are_text_of_one_line() -> None:
    """A run or its data may have been named by somebody else."""
    training = Training(
        "a\n\n## Verified <script>", 8, data="b\x1b[31m\r- seed: 9", data_digest="f\n- x", tokenizer="<i>"
    )
    lines = train.hub.card.training_list(small("mha"), training).splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == [
        "- run", "- step", "- data", "- digest of the data", "- digest of the tokenizer",
    ]  # fmt: skip
    assert lines[0] == "- run: a ## Verified &lt;script&gt;" and lines[2] == r"- data: b\x1b[31m - seed: 9"


def test_what_a_target_does_not_hold_is_refused_with_the_reason(tmp_path: Path, corpus: Path) -> None:
    """Where it is the one asked for."""
    refusals: tuple[tuple[ArchConfig | str, str, str], ...] = (
        ("cla2", "stock", "sharing: layers 2 read"),
        ("block", "stock", "block: a Block Transformer is two decoders"),
        ("block", "remote", "block: a Block Transformer is no stack"),
        ("bct", "remote", "slots: `memory` is bounded"),
        ("qwen3_next", "remote", "matrix: `state` holds a matrix per head"),
        ("qwen3_next", "stock", "matrix: `state` holds a matrix per head"),
        ("deepseek_v4_hca", "stock", "stride: `pooled` pools positions"),
        ("mtla", "remote", "stride: `latent` pools latents; the remote decoder has keys and values of every position"),
        ("gqa4_tied", "stock", "tied: `kv` has one tensor for keys and values; stock classes that have that"),
        (HALF, "remote", "tied: `kv` has one tensor for keys and values; the remote decoder has"),
    )
    for number, (name, target, reason) in enumerate(refusals):
        source = write_checkpoint(tmp_path / str(number) / "step-00000003", name)
        message = refused(source, f"target={target}", data=corpus)
        assert f"cannot be exported exactly, and is not approximated\ntarget {target} does not hold it:\n- " in message
        assert reason in message


def test_the_command_line_ends_with_a_message(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch_in_process(train.export.main, "export", ExportConfig, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: give checkpoint=, the folder of a run or of a checkpoint\n"
    for words in (["checkpoint=" + "a" * 300, "out=x"], ["checkpoint=arch", "out=" + "a" * 300]):
        with pytest.raises(SystemExit) as stopped:
            launch_in_process(train.export.main, "export", ExportConfig, words)
        assert stopped.value.code == 2
        assert re.fullmatch(r"error: \S*a{300}: File name too long\n", capsys.readouterr().err)


def test_disk_full_and_folders_that_cannot_be_written(gqa: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = gqa.parent / "file"
    blocked.touch()
    assert "cannot write" in refused(gqa, f"out={blocked / 'out'}", data=corpus)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    for function in ("write_weights", "write_card"):
        with monkeypatch.context() as patch:
            patch.setattr(train.hub.exporter, function, full)
            message = refused(gqa, data=corpus)
        assert re.search("cannot write .*out: No space left on device; give another folder with out=", message)
    assert {path.name for path in gqa.parent.iterdir()} == {"file", gqa.name}


class Hub:
    """A stand-in for HfApi."""

    def __init__(self, error: Exception | None = None):
        self.error, self.sent = error, []

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        self.sent.append((repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.sent.append((repo_id, {path.name for path in folder_path.iterdir()}))


def test_push_to_the_hub(gqa: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.hub.upload, "get_token", lambda: None)
    assert "needs a token: run `hf auth login`, or set HF_TOKEN" in refused(gqa, "push_to_hub=me/x", data=corpus)
    assert "push_to_hub=a/b/c" in refused(gqa, "push_to_hub=a/b/c", data=corpus)
    monkeypatch.setattr(train.hub.upload, "get_token", lambda: "a token")
    hub = Hub()
    monkeypatch.setattr(train.hub.upload, "HfApi", lambda: hub)
    exported(gqa, corpus, push_to_hub="me/x")
    files = {"README.md", "architecture.png", "config.json", "generation_config.json", "model.safetensors"}
    assert hub.sent == [("me/x", True, True), ("me/x", files | {"tokenizer.json", "tokenizer_config.json"})]
    monkeypatch.setattr(train.hub.upload, "HfApi", lambda: Hub(ConnectionError("no network")))
    message = refused(gqa, "push_to_hub=me/x", f"out={gqa.parent / 'second'}", data=corpus)
    assert re.search(r"second is complete, and could not be sent to me/x \(no network\); `hf upload me/x", message)
    assert (gqa.parent / "second" / "README.md").exists()


@pytest.mark.slow
def test_lm_eval_scores_the_folder(tmp_path: Path, corpus: Path) -> None:
    """By its stock `hf` model, on a local task file, without a network; the score is what our own model says."""
    for module in ("lm_eval", "accelerate"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -c constraints.txt -e '.[eval]'")
    source = write_checkpoint(tmp_path / "step-00000003", "mqa")
    export(ExportConfig(str(source), str(tmp_path / "mine"), prepared=str(corpus), verify=False), QUIET)
    lines = [{"question": f"def function_{n}(x):\n    return x", "answer": f" * {n}"} for n in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    task = f"""
task: local_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.jsonl"}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
    (tmp_path / "local_code.yaml").write_text(task)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=mine,dtype=float32",
               "--tasks", "local_code", "--include_path", ".", "--device", "cpu", "--output_path", "scores.json",
               "--batch_size", "2"]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (scores,) = tmp_path.glob("scores*.json")
    result = json.loads(scores.read_text())["results"]["local_code"]
    assert result["perplexity,none"] == pytest.approx(answer_perplexity(source, corpus), rel=1e-4)


def answer_perplexity(folder: Path, corpus: Path) -> float:
    """exp of minus the mean log-probability of the answers above, by our own model."""
    model = Decoder(CheckpointReader(folder).model()[0])
    checkpoint.load(folder, model)
    tokenizer = load_corpus(folder, None, str(corpus), 0).tokenizer
    total = 0.0
    for n in range(4):
        text = f"def function_{n}(x):\n    return x"
        context = len(tokenizer.encode(text).ids)
        ids = tokenizer.encode(f"{text} * {n}").ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        total += sum(logprobs[i - 1, ids[i]].item() for i in range(context, len(ids)))
    return math.exp(-total / 4)


@pytest.fixture
def made_up(tmp_path: Path, corpus: Path) -> Path:
    """The folder of a run that was never trained: configuration, two checkpoints, which of them is best, a summary."""
    folder = tmp_path / "run"
    model = small("gqa2", vocab_size=600, num_layers=1)
    config = PretrainConfig(arch=model.arch, size=model.size, name="mine", batch_size=4, seed=7)
    config.data = DataConfig(path=str(corpus), name="unit")
    for step in (3, 6):
        write_checkpoint(folder / "checkpoints" / f"step-{step:08d}", "gqa2", num_layers=1)
    for number, path in ((3, folder / "checkpoints" / "step-00000003"), (6, folder / "checkpoints" / "step-00000006")):
        info = json.loads((path / "checkpoint.json").read_text())
        (path / "checkpoint.json").write_text(json.dumps(info | {"step": number}))
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    (folder / "checkpoints" / "best.json").write_text('{"checkpoint": "step-00000003", "val_loss": 2.5}')
    val = {"loss": 3.0, "ppl": 20.0855, "bpb": 1.25}
    (folder / "summary.json").write_text(json.dumps({"tokens": 6 * 4 * 32, "val": val}))
    return folder


def test_the_card_says_of_the_run_what_is_true_of_this_checkpoint(made_up: Path) -> None:
    def training(checkpoint: Path, name: str) -> str:
        export(ExportConfig(str(checkpoint), str(made_up.parent / name), verify=False), QUIET)
        card = (made_up.parent / name / "README.md").read_text()
        assert "Not verified: it was exported with `verify=false`." in card
        return card.partition("## Training")[2].partition("## Load")[0]

    last = training(made_up, "last")
    assert "license" not in (made_up.parent / "last" / "README.md").read_text().partition("# last")[0]
    lines = ["run: mine", "step: 6", "tokens: 768, in sequences of 32", "data: unit", "seed: 7"]
    lines += ["validation loss: 3.0000 nats per token", "validation perplexity: 20.085", "bits per byte: 1.2500"]
    assert all(f"- {line}\n" in last for line in lines), last
    best = training(made_up / "checkpoints" / "step-00000003", "best")
    assert "- validation loss: 2.5000 nats per token\n" in best
    assert "perplexity" not in best
    (made_up / "checkpoints" / "best.json").unlink()
    assert "validation" not in training(made_up / "checkpoints" / "step-00000003", "early")


def test_a_run_whose_files_are_broken_or_gone(made_up: Path, corpus: Path) -> None:
    for name, text, message in (
        ("summary.json", "[1]", "summary.json is no mapping; put it back"),
        ("summary.json", "{", "holds no readable run: summary.json: JSONDecodeError"),
        ("summary.json", '{"tokens": 768, "val": {"loss": NaN}}', "its validation figures are {'loss': nan}"),
        (
            "summary.json",
            f'{{"tokens": 768, "val": {{"loss": 1{"0" * 400}}}}}',
            "its validation figures are {'loss': 10000",
        ),
        ("config.yaml", "arch: [", "config.yaml is not the configuration of a run"),
        ("config.yaml", "nonsense: 1", "config.yaml is not the configuration of a run"),
        ("config.yaml", "data: {path: /gone}", "the run's data folder /gone is not here; give the prepared folder"),
    ):
        before = (made_up / name).read_text()
        (made_up / name).write_text(text)
        assert message in refused(made_up)
        if "gone" in text:
            exported(made_up, corpus, "found again")
        (made_up / name).write_text(before)


@pytest.mark.usefixtures("here")
def test_perplexity_is_compared_on_the_text_of_the_run(made_up: Path) -> None:
    checks = export(ExportConfig(str(made_up), str(made_up.parent / "out")), QUIET)
    (check,) = [check for check in checks if check.name == "perplexity on 128 validation tokens"]
    assert check.passed
    assert float(check.found) == pytest.approx(float(check.wanted), rel=1e-5)
    assert float(check.found) > 2


def test_tokens_that_differ_count_unless_it_is_a_tie() -> None:
    model, prompt = build(small("gqa2"), torch.float32), [1, 2, 3]
    with torch.inference_mode():
        (ours,) = generate(model, [prompt], 8)
        theirs = [*ours[:3], (ours[3] + 1) % 61, *ours[4:]]
        assert train.hub.verify.agreement(model, prompt, ours, ours, 1e-5) == 8
        assert train.hub.verify.agreement(model, prompt, theirs, ours, 1e-5) == 3
        assert train.hub.verify.agreement(model, prompt, theirs, ours, 1e3) == 8


def test_every_key_of_the_help_can_be_typed(tmp_path: Path, corpus: Path) -> None:
    """Names of config groups, such as data, cannot: Hydra keeps them for itself."""
    source = write_checkpoint(tmp_path / "step-00000003", "mqa")
    keys = [f"checkpoint={source}", f"out={tmp_path / 'out'}", "target=auto", "dtype=fp32", "max_shard_size=5GB"]
    keys += [f"prepared={corpus}", "verify=false", "license=mit", "push_to_hub=null"]
    assert {key.partition("=")[0] for key in keys} == {item.name for item in fields(ExportConfig)}
    launch_in_process(main, "export", ExportConfig, keys)
    assert (tmp_path / "out" / "config.json").exists()
    front = (tmp_path / "out" / "README.md").read_text().partition("---\n#")[0]
    assert "license: mit\n" in front
