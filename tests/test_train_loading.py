"""`load(run)`: the model and tokenizer of a run, a checkpoint, or an imported folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small, weights

from arch import build
from data.cli import UsageError
from data.files import DataError
from eval.identity import Identity
from train import checkpoint, load
from train.errors import TrainingError
from train.optim import build_optimizer
from train.schema import OptimConfig


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of an earlier version, with checkpoints of steps 6 and 8, and its data in the folder `data`."""
    old = ROOT / "tests" / "golden" / "old"
    shutil.copytree(old / "run-mixattention", tmp_path / "run")
    shutil.copytree(old / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_the_newest_checkpoint_of_a_run(run: Path) -> None:
    trained = load(run)
    saved = weights(run)
    assert trained.checkpoint.name == "step-00000008"
    assert trained.config is not None and trained.config.size.num_layers == 4
    assert not trained.model.training
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trained.model.named_parameters())
    model, tokenizer = trained
    assert model is trained.model and tokenizer is trained.tokenizer


def test_another_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "best.json").write_text(json.dumps({"checkpoint": "step-00000006", "val_loss": 5.0}))
    best, named = load(run, which="best"), load(run / "checkpoints" / "step-00000006")
    assert best.checkpoint == named.checkpoint
    assert best.checkpoint.name == "step-00000006"
    assert not torch.equal(best.model.output_weight, load(run).model.output_weight)


def test_text_in_and_out(run: Path) -> None:
    trained = load(str(run))
    text = "def naïve():\n\treturn <|endoftext|> 1"
    tokens = trained.tokenizer.encode(text)
    assert trained.tokenizer.decode(tokens) == text, "a special token spelled out is text"
    assert trained.tokenizer.end not in tokens
    one = trained.generate("def ", 5)
    assert isinstance(one, str)
    assert trained.generate(["def ", "import os"], 5)[0] == one
    assert trained.generate("", 5, temperature=1.0, seed=1) == trained.generate("", 5, temperature=1.0, seed=1)


def test_weights_of_another_type(run: Path) -> None:
    full, half = load(run).model, load(run, dtype=torch.bfloat16).model
    for (name, parameter), (_, narrow) in zip(full.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), narrow), name


def test_a_checkpoint_without_a_run(run: Path, tmp_path: Path) -> None:
    """As import_hf.py and uptrain.py write it: its own record says what the model is."""
    folder = tmp_path / "imported"
    shutil.copytree(run / "checkpoints" / "step-00000008", folder)
    trained = load(folder)
    assert trained.config is None
    assert torch.equal(trained.model.output_weight, load(run).model.output_weight)
    with pytest.raises(UsageError, match=r"there is no tokenizer: .*imported lies in no run; give the prepared folder"):
        trained.generate("text")
    assert load(folder, prepared="data").generate("def ", 3) == load(run).generate("def ", 3)
    shutil.copy(tmp_path / "data" / "tokenizer.json", folder)
    loaded = load(folder)
    assert loaded.generate("def ", 3) == load(run).generate("def ", 3)
    tied = Identity({}, (), (), "0" * 64)
    with pytest.raises(DataError, match=r"was trained with the tokenizer 0000.*prepared="):
        replace(loaded, identity=tied).generate("def ", 3)


def test_without_its_data_there_is_the_model(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    trained = load(run)
    assert trained.model.output_weight.isfinite().all()
    with pytest.raises(UsageError, match=r"the run's data folder data is not here; give .* prepared="):
        _, _ = trained
    assert load(run, prepared=tmp_path / "moved").tokenizer.encode("a") == [97]


def test_a_block_transformer(run: Path, tmp_path: Path) -> None:
    """Without a start context it needs a block of prompt, unless it was trained with padding."""
    shutil.rmtree(run)
    shutil.copytree(ROOT / "tests" / "golden" / "old" / "run-block", run)
    trained = load(run)
    assert trained.config is not None and trained.config.arch.block is not None
    assert trained.generate("d", 5) == trained.generate(["d", "def f"], 5)[0]
    trained.config.arch.block.start = False
    short = replace(trained, model=build(trained.config.model).eval())
    with pytest.raises(ValueError, match="less than a block"):
        short.generate("d", 5)
    trained.config.data.block_padding = True
    assert isinstance(short.generate("d", 5), str)


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("nowhere", {}, UsageError, "nowhere: no run there"),
        ("run", {"which": "oldest"}, UsageError, "which is 'oldest'; choose newest or best"),
        ("data", {}, UsageError, "data: no run there"),
        ("run/checkpoints/step-00000008", {"device": "nothing"}, UsageError, "device is nothing; choose cpu"),
        ("run/checkpoints/step-00000008", {"device": "mps"}, UsageError, "device is mps; choose cpu"),
        ("run/checkpoints/step-00000008", {"device": "cuda"}, UsageError, "sees no CUDA device; use device=cpu"),
    ],
)
def test_mistakes(
    run: Path, path: str, options: dict, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=message):
        load(path, **options)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checkpoint": 3}'])
def test_a_damaged_record_of_the_best(run: Path, content: str) -> None:
    (run / "checkpoints" / "best.json").write_text(content)
    with pytest.raises(TrainingError, match=r"best.json.*take the newest"):
        load(run, which="best")


def test_weights_that_were_altered(run: Path) -> None:
    (shard,) = (run / "checkpoints" / "step-00000008").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(TrainingError, match="altered"):
        load(shard.parent)
    assert load(run).checkpoint.name == "step-00000006", "the newest intact one"


def test_a_checkpoint_that_describes_no_model(tmp_path: Path) -> None:
    model, folder = build(small("mha", num_layers=1)), tmp_path / "step-00000001"
    checkpoint.save(folder, model, build_optimizer(model, OptimConfig(lr=0.1)), 1, {})
    with pytest.raises(TrainingError, match="describes no model"):
        load(folder)
