"""`train/benchmarks/positions.py` on a run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import small
from omegaconf import OmegaConf
from torch.nn import functional as F

from arch import Decoder, build
from data.batches import EvalBatches
from data.cli import UsageError
from data.config import DataConfig
from data.mixture import EvalWindows, Mixture
from data.shards import Manifest, TokenWindows
from eval.positions import loss_by_position
from train import checkpoint
from train.benchmarks.positions import main
from train.loading import load
from train.loss import cross_entropy_sum
from train.optim import build_optimizer
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
    windows = TokenWindows(corpus, Manifest.load(corpus), "val", 32)
    batches = EvalBatches(EvalWindows.of(windows, 4), 2)
    total = sum(model(b["inputs"], head=cross_entropy_sum(b["targets"])).item() for b in batches)
    mean = sum(bucket["nats"] * bucket["targets"] for bucket in lengths["32"]) / 128
    assert mean == pytest.approx(total / 128, rel=1e-5), "the same windows as in validation"
    text = capsys.readouterr().out
    assert "32 to 63" in text
    main([str(run), "lengths=8", "tokens=8"])
    (buckets,) = json.loads((run / "positions.json").read_text())["lengths"].values()
    assert {bucket["error"] for bucket in buckets} == {None}


def test_a_mixture_by_position_has_its_weights(run: Path, corpus: Path, tmp_path: Path) -> None:
    """Three of four windows are of the first folder, as in validation."""
    other = shutil.copytree(corpus, tmp_path / "other")
    mixed = {"data": {"path": None, "mix": {str(corpus): 3, str(other): 1}}}
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(run / "config.yaml"), mixed), run / "config.yaml")
    main([str(run), "lengths=16", "tokens=128"])
    buckets = json.loads((run / "positions.json").read_text())["lengths"]["16"]
    windows = TokenWindows(corpus, Manifest.load(corpus), "val", 16)
    mixture = EvalWindows.of(Mixture((windows, windows), (3.0, 1.0)), 8)
    expected = loss_by_position(load(run).model, EvalBatches(mixture, 1))
    assert buckets == [asdict(bucket) for bucket in expected]
    assert sum(bucket["targets"] for bucket in buckets) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere: no run there"),
        (["{run}", "lengths=long"], "lengths is long; it must be a list, with commas; each a whole number"),
        (["{run}", "tokens="], "cannot read 'tokens='; write key=value, the keys are lengths, tokens"),
        (["{run}", "length=3"], "unknown key length, did you mean lengths? The command line has lengths, tokens"),
    ],
)
def test_mistakes(arguments: list[str], message: str, run: Path) -> None:
    with pytest.raises(UsageError) as caught:
        main([argument.format(run=run) for argument in arguments])
    assert message in str(caught.value)


@torch.no_grad()
def test_a_block_transformer_by_position(tmp_path: Path, corpus: Path) -> None:
    """Without a start context the first block has no loss; with one, every position has."""
    for start in (False, True):
        model_config = small("block", num_layers=2, vocab_size=600, seq_len=16)
        model_config.arch.block.start = start
        config = PretrainConfig(model_config.arch, model_config.size, DataConfig(path=str(corpus)))
        folder = tmp_path / str(start)
        folder.mkdir()
        OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
        model = build(model_config)
        model.init_weights(3)
        checkpoint.save(folder / "checkpoints/step-00000001", model, build_optimizer(model, OptimConfig(lr=0.1)), 1, {})
        main([str(folder), "lengths=16", "tokens=64"])
        buckets = json.loads((folder / "positions.json").read_text())["lengths"]["16"]
        assert [bucket["first"] for bucket in buckets] == ([0, 1, 2, 4, 8] if start else [4, 8])
        windows = TokenWindows(corpus, Manifest.load(corpus), "val", 16)
        rows = [torch.from_numpy(row[1:].astype("int64")) for row in EvalWindows.of(windows, 4)]
        tokens = torch.stack(rows)
        wanted = model.select_targets(tokens)
        expected = F.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten()).item()
        mean = sum(bucket["nats"] * bucket["targets"] for bucket in buckets) / wanted.numel()
        assert mean == pytest.approx(expected, rel=1e-5)
