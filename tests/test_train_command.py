"""`train/pretrain.py` as its user meets it: runs, their folders, resuming, and errors before any work."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_in_process, run_script
from omegaconf import OmegaConf

from arch import Decoder, KVPlan, ModelConfig, from_dict, resolve
from train.lit_module import LitDecoder
from train.pretrain import main
from train.schema import PretrainConfig

SMALL = [
    "size.num_layers=3",
    "size.d_model=32",
    "size.d_ff=48",
    "size.vocab_size=600",
    "size.seq_len=32",
    "size.max_window=8",
    "batch_size=4",
    "tokens=1024",
    "data.val_tokens=256",
    "trainer.log_every=1",
]


def pretrain(*arguments: str) -> None:
    launch_in_process(main, "pretrain", PretrainConfig, [*arguments])


def read_metrics(folder: Path) -> list[dict[str, str]]:
    rows = []
    for path in sorted(folder.glob("metrics/*/metrics.csv"), key=lambda path: int(path.parent.name)):
        with path.open() as file:
            rows += list(csv.DictReader(file))
    return rows


def losses(folder: Path) -> dict[int, str]:
    return {int(row["step"]): row["train/loss"] for row in read_metrics(folder) if row.get("train/loss")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run with everything on: CSV and wandb, eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    pretrain("+arch=cla2", "+size=tiny", *SMALL, f"data.path={corpus}", f"folder={folder}")
    return folder


def test_run_folder(trained: Path) -> None:
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(trained / "config.yaml"))
    )
    assert (config.size.num_layers, config.tokens, config.name) == (3, 1024, "cla2-tiny")
    plan = KVPlan.from_dict(json.loads((trained / "plan.json").read_text()))
    assert plan == resolve(ModelConfig(config.arch, config.size))
    (start,) = json.loads((trained / "run.json").read_text())
    assert start["versions"]["torch"] == torch.__version__
    assert set(start) == {"command", "git", "python", "versions", "hardware"}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["tokens"] == 1024
    assert summary["val"]["ppl"] == pytest.approx(torch.tensor(summary["val"]["loss"]).exp().item())
    assert 0 < summary["val"]["bpb"] < 20
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert {path.name for path in (trained / "pareto").iterdir()} == {
        f"pareto.{k}" for k in ("png", "html", "csv", "json")
    }


def test_kv_bytes_are_logged_beside_the_loss(trained: Path) -> None:
    rows = [row for row in read_metrics(trained) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    for row in rows:
        assert float(row["train/tokens_per_second"]) > 0
        assert float(row["kv/bytes_per_token"]) == 2 * 2 * 2 * 4  # two stores of K and V, 4 wide, in bf16
        assert float(row["kv/bytes_stored"]) == 32 * 32
        assert float(row["kv/bytes_constant"]) == 0
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])


def test_wandb_run_was_written_offline(trained: Path) -> None:
    (run,) = (trained / "wandb").glob("offline-run-*")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"WANDB_ERROR_REPORTING": "false"},
    )
    summary = json.loads(done.stdout)["summary"]
    expected = json.loads((trained / "summary.json").read_text())["val"]
    for name, value in expected.items():
        assert summary[f"final/{name}"] == pytest.approx(value)
    assert summary["kv/bytes_stored"] == 32 * 32
    assert list((run / "files" / "media" / "images" / "pareto").glob("*.png"))
    assert list((run / "files" / "media" / "table" / "pareto").glob("*.json"))


def test_checkpoint_is_plain_data_and_says_what_it_is(trained: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    config = from_dict(ModelConfig, checkpoint["model"]["config"])
    model = Decoder(config)
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    model.load_state_dict(weights)
    assert KVPlan.from_dict(checkpoint["model"]["plan"]) == model.plan
    assert all(value.dtype == torch.float32 for value in weights.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_repeats_the_losses(tmp_path: Path, corpus: Path, accumulate: int) -> None:
    """Stopped after a checkpoint at step 5 and resumed: bit-identical losses, validation and weights."""
    options = ["+arch=mixattention", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv"]
    options += [f"trainer.micro_batch={4 // accumulate}", "trainer.checkpoint_every=5", "trainer.val_every=4"]
    pretrain(*options, f"folder={tmp_path / 'whole'}")
    pretrain_until(6, *options, f"folder={tmp_path / 'cut'}")
    assert not (tmp_path / "cut" / "summary.json").exists()
    pretrain(f"resume={tmp_path / 'cut'}")
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert cut == whole
    assert sorted(whole) == list(range(1, 9))
    results = [json.loads((tmp_path / name / "summary.json").read_text())["val"] for name in ("whole", "cut")]
    assert results[0] == results[1]
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert len(json.loads((tmp_path / "cut" / "run.json").read_text())) == 2


class CutError(Exception):
    pass


def pretrain_until(step: int, *arguments: str) -> None:
    """Train, and break off after `step` steps without a chance to save."""

    def training_step(self: LitDecoder, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step >= step:
            raise CutError
        return original(self, batch, batch_idx)

    original, LitDecoder.training_step = LitDecoder.training_step, training_step
    try:
        with pytest.raises(CutError):
            pretrain(*arguments)
    finally:
        LitDecoder.training_step = original


def test_accumulation_changes_no_loss(tmp_path: Path, corpus: Path) -> None:
    for micro in (4, 1):
        options = [
            f"data.path={corpus}",
            "logger=csv",
            f"trainer.micro_batch={micro}",
            f"folder={tmp_path / str(micro)}",
        ]
        pretrain("+arch=gqa4", "+size=tiny", *SMALL, *options)
    whole, split = losses(tmp_path / "4"), losses(tmp_path / "1")
    assert [float(value) for value in whole.values()] == pytest.approx([float(v) for v in split.values()], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=bf16"],
        ["trainer.activation_checkpointing=true"],
        ["trainer.backend=reference"],
        pytest.param(["trainer.compile=true"], marks=pytest.mark.slow),
    ],
)
def test_how_a_run_is_executed_changes_little(tmp_path: Path, corpus: Path, options: list[str]) -> None:
    base = ["+arch=mixattention", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv"]
    pretrain(*base, f"folder={tmp_path / 'plain'}")
    pretrain(*base, *options, f"folder={tmp_path / 'other'}")
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    tolerance = 1e-2 if "bf16" in options[0] else 1e-5
    assert [float(value) for value in plain.values()] == pytest.approx(
        [float(v) for v in other.values()], rel=tolerance
    )
    checkpoint = torch.load(tmp_path / "other" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values()), "master weights are fp32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+size=tiny"], "choose +arch= one of: characterai, cla2,"),
        (["+arch=cla2"], "choose +size= one of: 125m, 1b,"),
        ([], "choose +arch= one of"),
        (["+arch=cla7", "+size=tiny"], "Could not find 'arch/cla7'"),
        (["+arch=cla2", "+size=tinny"], "Could not find 'size/tinny'"),
        (["arch=cla2", "+size=tiny"], "use +arch=cla2"),
        (["+arch=cla2", "+arch=mha", "+size=tiny"], "Multiple values for arch"),
        (["+arch=cla2", "+size=tiny", "+arch.typo=1"], "unknown key arch.typo. arch has pattern, short_group, stores"),
        (["+arch=cla2", "+size=tiny", "optim.lrr=1"], "unknown key optim.lrr, did you mean lr?"),
        (["+arch=cla2", "+size=tiny", "+optim.lrr=1"], "unknown key optim.lrr, did you mean lr?"),
        (["+arch=cla2", "+size=tiny", "optim=adam"], "Could not find 'optim/adam'"),
        (["+arch=cla2", "+size=tiny", "tokens=lots"], "could not be converted to Integer"),
        (["+arch=cla2", "+size=tiny", "arch.stores.kv.kv_heads=3"], "does not divide the 8 query heads"),
        (["+arch=cla2", "+size=tiny", "arch.pattern=[reuse kv]"], "layer 0: `reuse kv` has nothing to reuse"),
        (["+arch=cla2", "+size=tiny", "size.num_layers=0"], "it must be at least 1"),
        (["+arch=cla2", "+size=tiny", "trainer.strategy=ddd"], "choose auto, ddp, fsdp"),
        (["+arch=cla2", "+size=tiny", "trainer.precision=fp8"], "choose auto, fp32, bf16"),
        (["+arch=cla2", "+size=tiny", "trainer.devices=2"], "2 processes need trainer.strategy=ddp"),
        (["+arch=cla2", "+size=tiny", "trainer=ddp", "batch_size=3"], "not a multiple of the 2 processes"),
        (["+arch=cla2", "+size=tiny", "trainer.micro_batch=3"], "does not divide the"),
        (["+arch=cla2", "+size=tiny", "tokens=10"], "is less than one step"),
        (["+arch=cla2", "+size=tiny", "optim.lr=0"], "it must be positive"),
        (["+arch=cla2", "+size=tiny", "optim.warmup=2"], "it is a share, from 0 to 1"),
        (["+arch=cla2", "+size=tiny", "trainer.log_every=0"], "trainer.log_every is too small"),
        (["+arch=cla2", "+size=tiny", "trainer.backend=fast"], "no attention backend 'fast'; choose auto, sdpa"),
        (["+arch=cla2", "+size=tiny", "data.path=/nowhere"], "holds no prepared data"),
        (["+arch=cla2", "+size=tiny", "data.corpus=books", "data.vocab_size=999"], "no corpus 'books'; choose stdlib"),
        (["resume=/nowhere"], "no run there"),
    ],
)
def test_errors_name_the_fix(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        pretrain(*arguments)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir()), "refused before any work"


def test_a_vocabulary_too_large_for_the_model(corpus: Path, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", "size.vocab_size=599", f"data.path={corpus}", f"folder={tmp_path / 'run'}")
    assert stopped.value.code == 2
    assert "has a vocabulary of 600 tokens, the model of 599; set size.vocab_size=600" in capfd.readouterr().err


def test_resume_keeps_the_architecture(trained: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain(f"resume={trained}", "+arch=mha")
    assert stopped.value.code == 2
    assert "a resumed run keeps its arch, size and groups" in capfd.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, corpus: Path) -> None:
    done = run_script(
        "train/pretrain.py", "+arch=mha", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv",
        "optim.lr=1e30", "optim.warmup=0", "optim.clip=1e30", f"folder={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: the loss is" in done.stderr
    assert "lower optim.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_itself(tmp_path: Path, corpus: Path) -> None:
    """As typed, from another directory, uninstalled: sweeps over architectures and seeds, one folder each."""
    arguments = [
        "-m",
        "+arch=mha,cla2",
        "+size=tiny",
        "seed=0,1",
        *SMALL,
        "tokens=256",
        "logger=csv",
        f"data.path={corpus}",
    ]
    done = run_script("train/pretrain.py", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")) == [
        "cla2-tiny-seed0",
        "cla2-tiny-seed1",
        "mha-tiny-seed0",
        "mha-tiny-seed1",
    ]
    assert "step 2/2  loss" in done.stdout
    done = run_script("eval/pareto.py", str(tmp_path / "sweep"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (first, second) = json.loads((tmp_path / "sweep" / "pareto.json").read_text())
    assert (first["name"], first["seeds"], second["name"], second["seeds"]) == ("cla2-tiny", 2, "mha-tiny", 2)


def test_help() -> None:
    done = run_script("train/pretrain.py", "--help")
    assert done.returncode == 0
    for word in ("+arch=cla2", "mixattention", "tiny", "resume=", "warmup: 0.05"):
        assert word in done.stdout
    assert ROOT.is_dir()
