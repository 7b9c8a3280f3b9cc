"""`train/positions.py` on a run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small
from omegaconf import OmegaConf

from arch import Decoder
from data.batches import EvalBatches
from data.config import DataConfig
from data.shards import Manifest, TokenWindows
from eval.cli import UsageError
from train import checkpoint
from train.loss import cross_entropy_sum
from train.optim import build_optimizer
from train.positions import main
from train.schema import OptimConfig, PretrainConfig


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    """A run folder with what the command reads of one."""
    model_config = small("bct", num_layers=2, vocab_size=600, seq_len=16)
    data = DataConfig(path=str(corpus))
    config = PretrainConfig(model_config.arch, model_config.size, data)
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    model = Decoder(model_config)
    model.init_weights(3)
    checkpoint.save(folder / "checkpoints/step-00000001", model, build_optimizer(model, OptimConfig(lr=0.1)), 1, {})
    return folder


@torch.no_grad()
def test_a_run_by_position(run: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(run), "tokens=128"])
    lengths = json.loads((run / "positions.json").read_text())["lengths"]
    assert list(lengths) == ["16", "32", "64"]
    assert [bucket["first"] for bucket in lengths["32"]] == [0, 1, 2, 4, 8, 16]
    model = Decoder(small("bct", num_layers=2, vocab_size=600, seq_len=16))
    model.init_weights(3)
    batches = EvalBatches(TokenWindows(corpus, Manifest.load(corpus), "val", 32), 4, 2)
    total = sum(model(b["inputs"], head=cross_entropy_sum(b["targets"])).item() for b in batches)
    mean = sum(bucket["nats"] * bucket["targets"] for bucket in lengths["32"]) / 128
    assert mean == pytest.approx(total / 128, rel=1e-5), "the same windows as in validation"
    text = capsys.readouterr().out
    assert "32 to 63" in text
    main([str(run), "lengths=8", "tokens=8"])
    (buckets,) = json.loads((run / "positions.json").read_text())["lengths"].values()
    assert {bucket["error"] for bucket in buckets} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere: no run there"),
        (["{run}", "lengths=long"], "lengths is long; write whole numbers"),
        (["{run}", "tokens="], "tokens is ; write whole numbers"),
        (["{run}", "length=3"], "unknown key length; the keys are lengths, tokens"),
    ],
)
def test_mistakes(arguments: list[str], message: str, run: Path) -> None:
    with pytest.raises(UsageError) as caught:
        main([argument.format(run=run) for argument in arguments])
    assert message in str(caught.value)
