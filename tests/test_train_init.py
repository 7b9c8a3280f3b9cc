"""A run may start from the weights of another, train a part of them, and go on at another length."""

import re
from pathlib import Path

import pytest
import torch
from conftest import weights
from test_train_command import SMALL, losses, pretrain

from train.checkpoint import checkpoints


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A first stage, as MixAttention's: all weights, short sequences."""
    folder = tmp_path_factory.mktemp("stages") / "first"
    pretrain("+arch=mixattention", "+size=tiny", *SMALL, "logger=csv", f"data.path={corpus}", f"folder={folder}")
    return folder


def test_a_second_stage(first: Path, tmp_path: Path, corpus: Path) -> None:
    """Longer sequences, another rotary base, attention weights only: the others stay bit for bit."""
    folder = tmp_path / "second"
    options = ["size.seq_len=64", "batch_size=2", "size.rope_theta=8e6", "train_only=reader|writer", f"init={first}"]
    options += ["logger=csv", f"data.path={corpus}", f"folder={folder}", "trainer.checkpoint_every=4"]
    pretrain("+arch=mixattention", "+size=tiny", *SMALL, *options)
    before, after = weights(first), weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "reader" in name or "writer" in name}
    assert float(losses(folder)[1]) < float(losses(first)[1]) - 0.3, "it does not start from scratch"
    pretrain(f"resume={folder}", "tokens=1536")
    again = weights(folder)
    assert {name for name in before if not torch.equal(before[name], again[name])} == changed
    assert sorted(losses(folder)) == list(range(1, 13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["init=/nowhere"], "/nowhere is neither a checkpoint nor a run that has saved one"),
        (["train_only='('"], "train_only is no regular expression"),
        (["train_only=nothing_like_this"], "train_only=nothing_like_this matches no parameter"),
    ],
)
def test_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", *SMALL, *options, f"data.path={corpus}", f"folder={tmp_path / 'run'}")
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_refused(
    first: Path, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture
) -> None:
    """Before any work: the folder is still free for the same command, mended."""
    options = [f"init={checkpoints(first)[0]}", "logger=csv", f"data.path={corpus}", f"folder={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", *SMALL, *options)
    assert stopped.value.code == 2
    assert re.search(r"is of another model: model.layers.\S+ .* here, .* there", capfd.readouterr().err)
    assert not (tmp_path / "run").exists()
