"""`train/pretrain.py` as its user meets it: runs, their folders, resuming, and errors before any work."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from conftest import ARCHS, ROOT, SIZES, launch_in_process, run_script, start_script, weights
from fork_server import BLANK
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch._dynamo.utils import counters

import train.loss
from arch import ArchConfig, Decoder, KVPlan, ModelConfig, from_dict, resolve
from arch.named import CONFIGS, load_arch, load_size
from data.shards import TokenWindows
from train.checkpoint import checkpoints, load_info, step_of
from train.errors import TrainingError
from train.lit_module import LossWatch
from train.optim import lr_share
from train.pretrain import main
from train.schema import LoggerConfig, OptimConfig, PretrainConfig, problems

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
    assert plan == resolve(config.model)
    (start,) = json.loads((trained / "run.json").read_text())
    assert start["versions"]["torch"] == torch.__version__
    assert start["from_step"] == 0
    assert start["attention"] == "kv: sdpa (torch's scaled_dot_product_attention)"
    record = {"date", "command", "git", "python", "versions", "hardware"}
    assert set(start) == {"attention", "from_step", "threads", *record}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["tokens"] == 1024
    assert summary["val"]["ppl"] == pytest.approx(torch.tensor(summary["val"]["loss"]).exp().item())
    assert 0 < summary["val"]["bpb"] < 20
    assert [path.name for path in checkpoints(trained)] == ["step-00000008", "step-00000006"]
    assert {path.name for path in (trained / "pareto").iterdir()} == {
        f"pareto.{k}" for k in ("png", "html", "csv", "json")
    }


def test_kv_bytes_are_logged_beside_the_loss(trained: Path) -> None:
    rows = [row for row in read_metrics(trained) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    for row in rows:
        assert int(row["step"]) == 1 or float(row["train/tokens_per_second"]) > 0
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
    info = load_info(checkpoints(trained)[0])
    model = Decoder(from_dict(ModelConfig, info["config"]))
    model.load_state_dict(weights(trained))
    assert KVPlan.from_dict(info["plan"]) == model.plan
    assert all(value.dtype == torch.float32 for value in weights(trained).values())


OPTIONS = ["trainer.checkpoint_every=5", "trainer.val_every=4", "logger=csv"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """An uninterrupted run that the resumed ones must repeat."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain("+arch=mixattention", "+size=tiny", *SMALL, *OPTIONS, f"data.path={corpus}", f"folder={folder}")
    return folder


def assert_same_run(whole: Path, other: Path, rel: float = 0) -> None:
    """The same losses at every step, the same validation, the same weights: bit for bit, unless `rel` is given."""
    expected, ours = losses(whole), losses(other)
    assert sorted(ours) == sorted(expected) == list(range(1, 9))
    results = [json.loads((folder / "summary.json").read_text())["val"] for folder in (whole, other)]
    states = [weights(folder) for folder in (whole, other)]
    if rel:
        assert [float(ours[k]) for k in sorted(ours)] == pytest.approx([float(v) for v in expected.values()], rel=rel)
        return
    assert ours == expected
    assert results[0] == results[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from eval.cli import launch
from train.lit_module import LitModel
from train.pretrain import main
from train.schema import PretrainConfig
step = LitModel.training_step
def slow(self, batch, batch_idx):
    time.sleep(0.1)
    return step(self, batch, batch_idx)
LitModel.training_step = slow
launch(main, "pretrain", PretrainConfig)
"""


def start(folder: Path, corpus: Path, *arguments: str) -> subprocess.Popen:
    """The command in a process of its own, whose steps take a tenth of a second so that a signal can hit one."""
    script = folder.parent / "slow.py"
    script.write_text(SLOW)
    options = [*SMALL, *OPTIONS, f"data.path={corpus}", f"folder={folder}", *arguments]
    return start_script(script, "+arch=mixattention", "+size=tiny", *options, cwd=folder.parent)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_killed_run_goes_on_where_it_was(whole: Path, tmp_path: Path, corpus: Path, micro_batch: int) -> None:
    """SIGKILL after the checkpoint of step 5. Resumed with other micro-batches it is the same run up to rounding."""
    folder = tmp_path / "run"
    process = start(folder, corpus)
    while not (folder / "checkpoints" / "step-00000005").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "summary.json").exists()
    assert 5 <= max(losses(folder)) < 8, "what was logged before the end is on disk"
    pretrain(f"resume={folder}", f"trainer.micro_batch={micro_batch}")
    assert_same_run(whole, folder, rel=0 if micro_batch == 4 else 1e-5)
    assert len(json.loads((folder / "run.json").read_text())) == 2


def test_an_interrupted_run_is_saved(whole: Path, tmp_path: Path, corpus: Path) -> None:
    """Ctrl-C, between checkpoints and between micro-batches: saved at once, and nothing is lost."""
    folder = tmp_path / "run"
    process = start(folder, corpus, "trainer.micro_batch=1")
    while not losses(folder):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"resume={folder} continues" in errors
    done = max(losses(folder))
    assert done < 5, "there had been no checkpoint yet"
    assert checkpoints(folder)[0].name == f"step-{done:08d}"
    pretrain(f"resume={folder}")
    assert_same_run(whole, folder, rel=1e-5)


def test_a_finished_run_resumed_changes_nothing_until_it_is_extended(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "run"
    pretrain("+arch=cla2", "+size=tiny", *SMALL, "logger=csv", f"data.path={corpus}", f"folder={folder}")
    before, steps = json.loads((folder / "summary.json").read_text()), losses(folder)
    pretrain(f"resume={folder}")
    assert json.loads((folder / "summary.json").read_text())["val"] == before["val"]
    assert losses(folder) == steps
    pretrain(f"resume={folder}", "tokens=2048")
    after = json.loads((folder / "summary.json").read_text())
    assert (before["tokens"], after["tokens"]) == (1024, 2048)
    assert sorted(losses(folder)) == list(range(1, 17))
    assert after["val"]["loss"] < before["val"]["loss"]


def test_best_checkpoint_is_the_best(tmp_path: Path, corpus: Path) -> None:
    """Also where the last step is the best one and no validation was due at it."""
    folder = tmp_path / "run"
    options = ["logger=csv", "trainer.val_every=3", f"data.path={corpus}", f"folder={folder}"]
    pretrain("+arch=cla2", "+size=tiny", *SMALL, *options)
    validations = {int(row["step"]): float(row["val/loss"]) for row in read_metrics(folder) if row["val/loss"]}
    assert sorted(validations) == [3, 6, 8]
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == f"step-{min(validations, key=validations.get):08d}"
    assert best["val_loss"] == min(validations.values())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val"]["loss"] == validations[8]


def test_logged_learning_rate_is_that_of_the_step(trained: Path) -> None:
    config = OptimConfig(lr=3e-3)
    logged = [float(row["train/lr"]) for row in read_metrics(trained) if row["train/loss"]]
    assert logged == pytest.approx([3e-3 * lr_share(step, 8, config) for step in range(8)])


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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    pretrain("+arch=mixattention", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv", f"folder={folder}")
    return losses(folder)


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=bf16"],
        ["trainer.activation_checkpointing=true"],
        ["trainer.backend=reference"],
        ["trainer.compile=true"],
    ],
)
def test_how_a_run_is_executed_changes_little(
    tmp_path: Path, corpus: Path, plain: dict[int, str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are traced with their backward passes, and run as traced: C++ would take a minute; test_train_loss.py has
    it."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(train.loss, "fused_nll_and_gradient", train.loss.nll_and_gradient)
    counters.clear()
    base = ["+arch=mixattention", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv"]
    pretrain(*base, *options, f"folder={tmp_path / 'other'}")
    other = losses(tmp_path / "other")
    assert bool(counters["stats"]["unique_graphs"]) == ("trainer.compile=true" in options)
    tolerance = 1e-2 if "bf16" in options[0] else 1e-5
    assert [float(value) for value in plain.values()] == pytest.approx(
        [float(v) for v in other.values()], rel=tolerance
    )
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "other").values()), (
        "master weights are fp32"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+size=tiny"], "choose +arch= one of: bct, bct_gated,"),
        (["+arch=cla2"], "choose +size= one of: 125m, 1b,"),
        ([], "choose +arch= one of"),
        (["+arch=cla7", "+size=tiny"], "Could not find 'arch/cla7'"),
        (["+arch=cla2", "+size=tinny"], "Could not find 'size/tinny'"),
        (["arch=cla2", "+size=tiny"], "use +arch=cla2"),
        (["+arch=cla2", "+arch=mha", "+size=tiny"], "Multiple values for arch"),
        (
            ["+arch=cla2", "+size=tiny", "+arch.typo=1"],
            "unknown key arch.typo. arch has block, pattern, short_group, stores",
        ),
        (["+arch=cla2", "+size=tiny", "optim.lrr=1"], "unknown key optim.lrr, did you mean lr?"),
        (["+arch=cla2", "+size=tiny", "+optim.lrr=1"], "unknown key optim.lrr, did you mean lr?"),
        (["+arch=cla2", "+size=tiny", "+arch.stores.kv.latent.dim=2"], "lies under one that is null"),
        (["+arch=cla2", "+size=tiny", "+arch.block={length: 4}"], "lies under one that is null"),
        (["+arch=cla2", "+size=tiny", "optim=adam"], "Could not find 'optim/adam'"),
        (["+arch=cla2", "+size=tiny", "tokens=lots"], "could not be converted to Integer"),
        (["+arch=cla2", "+size=tiny", "arch.stores.kv.kv_heads=3"], "does not divide the 8 query heads"),
        (["+arch=cla2", "+size=tiny", "arch.pattern=[reuse kv]"], "layer 0: `reuse kv` has nothing to reuse"),
        (["+arch=cla2", "+size=tiny", "size.num_layers=0"], "it must be at least 1"),
        (["+arch=cla2", "+size=tiny", "trainer.strategy=ddd"], "choose auto, ddp, fsdp"),
        (["+arch=cla2", "+size=tiny", "trainer.precision=fp4"], "choose auto, fp32, bf16, fp8"),
        (["+arch=cla2", "+size=tiny", "trainer.devices=2"], "2 processes need trainer.strategy=ddp"),
        (["+arch=cla2", "+size=tiny", "trainer=ddp", "batch_size=3"], "not a multiple of the 2 processes"),
        (["+arch=cla2", "+size=tiny", "trainer=fsdp", "trainer.replicas=2"], "for trainer.strategy=hsdp alone"),
        (["+arch=cla2", "+size=tiny", "trainer=hsdp", "trainer.replicas=3"], "does not divide the 4 processes"),
        (
            ["+arch=cla2", "+size=tiny", "trainer.checkpoint_minutes=0"],
            "checkpoint_minutes is 0.0; it must be positive",
        ),
        (["+arch=cla2", "+size=tiny", "trainer.micro_batch=3"], "does not divide the"),
        (["+arch=cla2", "+size=tiny", "tokens=10"], "is less than one step"),
        (["+arch=cla2", "+size=tiny", "optim.lr=0"], "it must be positive"),
        (["+arch=cla2", "+size=tiny", "optim.warmup=2"], "it must be from 0 to 1"),
        (["+arch=cla2", "+size=tiny", "trainer.log_every=0"], "trainer.log_every is 0; it must be at least 1"),
        (["+arch=cla2", "+size=tiny", "trainer.backend=fast"], "no attention backend 'fast'; choose auto, sdpa"),
        (
            ["+arch=cla2", "+size=tiny", "data.source.corpus=books", "data.name=books"],
            "no corpus 'books'; choose stdlib",
        ),
        (["resume=/nowhere"], "no run there"),
        (["+arch=cla2", "+size=tiny", "trainer.accelerator=tpu"], "choose auto, cpu, cuda"),
        (["+arch=cla2", "+size=tiny", "trainer.val_every=0"], "trainer.val_every is 0; it must be at least 1"),
        (["+arch=cla2", "+size=tiny", "trainer.micro_batch=0"], "trainer.micro_batch is 0"),
        (["+arch=cla2", "+size=tiny", "data.val_tokens=9"], "less than one sequence"),
        (["+arch=cla2", "+size=tiny", "seed=-1"], "seed is -1"),
        (["+arch=cla2", "+size=tiny", "optim.lr=nan"], "optim.lr is nan; it must be positive and finite"),
        (["+arch=cla2", "+size=tiny", "optim.beta1=2"], "optim.beta1 is 2.0"),
        (["+arch=cla2", "+size=tiny", "optim.clip=-1"], "optim.clip is -1.0"),
        (["+arch=cla2", "+size=tiny", "optim.weight_decay=-1"], "optim.weight_decay is -1.0"),
        (["+arch=cla2", "+size=tiny", "data.document_mask=-1"], "data.document_mask is -1; it must be true or false"),
        (["+arch=cla2", "+size=tiny", "logger.wandb=on"], "logger.wandb is on; it must be true or false"),
        (["+arch=cla2", "+size=tiny", "+arch.stores.kv={kv_heads: 1, sinks: 2}"], "arch.stores.kv.sinks is 2; it must"),
        (["+arch=cla2", "+size=tiny", "arch.block=${seed}"], "arch.block is 0; a section belongs there"),
        (["+arch=cla2", "+size=tiny", "arch.pattern=${size.lr}"], "arch.pattern is 0.003; a list belongs there"),
        (["+arch=cla2", "+size=tiny", f"tokens={2**70}"], "it must be at most 1,000,000,000,000,000"),
        (["+arch=cla2", "+size=tiny", f"seed={2**70}"], "it must be at least 0 and at most"),
        (["+arch=cla2", "+size=tiny", "size.seq_len=0"], "size.seq_len is 0; it must be at least 1"),
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


@pytest.mark.parametrize("change", ["+arch=mha", "size.d_model=64", "seed=1", "trainer=ddp", "batch_size=8"])
def test_resume_keeps_what_decides_the_run(trained: Path, capfd: pytest.CaptureFixture, change: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain(f"resume={trained}", change)
    assert stopped.value.code == 2
    assert f"{change}: a resumed run keeps its arch, size, data" in capfd.readouterr().err


def test_a_run_is_never_overwritten(trained: Path, capfd: pytest.CaptureFixture, tmp_path: Path, corpus: Path) -> None:
    arguments = ["+arch=mha", "+size=tiny", *SMALL, f"data.path={corpus}"]
    for options, message in (
        ([f"folder={trained}"], f"{trained} holds a run already: resume={trained} continues it"),
        (["-m", f"folder={tmp_path}", f"hydra.sweep.dir={tmp_path}"], "set hydra.sweep.dir= instead"),
        ([f"folder={corpus / 'manifest.json' / 'run'}"], "give another with folder="),
    ):
        with pytest.raises(SystemExit) as stopped:
            pretrain(*options, *arguments)
        assert stopped.value.code == 2
        assert message in capfd.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, corpus: Path) -> None:
    """The weights of the steps before are kept: what is not finite is never saved."""
    folder = tmp_path / "run"
    options = ["trainer.log_every=8", "trainer.checkpoint_every=1", "logger=csv", f"data.path={corpus}"]
    pretrain("+arch=mha", "+size=tiny", *SMALL, *options, f"folder={folder}")
    with pytest.raises(
        TrainingError, match=r"lower optim.lr, or warm up longer. The last good checkpoint is .*step-0000"
    ):
        pretrain(f"resume={folder}", "tokens=4096", "optim.lr=1e30", "optim.clip=1e30")
    assert all(value.isfinite().all() for value in weights(folder).values())
    done = run_script(
        "train/pretrain.py", "+arch=mha", "+size=tiny", *SMALL, f"data.path={corpus}", "logger=csv",
        "optim.lr=1e30", "optim.warmup=0", "optim.clip=1e30", f"folder={tmp_path / 'other'}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "There was no checkpoint yet" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved from the first report of it on, and a resumed run knows how low the loss was."""
    see, folder = LossWatch.see, tmp_path / "run"
    monkeypatch.setattr(LossWatch, "see", lambda watch, loss, step: see(watch, loss + 9 * (step > 4), step))
    options = ["trainer.log_every=1", "trainer.checkpoint_every=1", "logger=csv", f"data.path={corpus}"]
    for words in (["+arch=mha", "+size=tiny", *SMALL, *options, f"folder={folder}"], [f"resume={folder}"]):
        with pytest.raises(
            TrainingError, match=r"exploded, .* at step 6 after .*last good checkpoint is .*step-00000004"
        ):
            pretrain(*words)


@pytest.mark.parametrize("prefetched", [False, True])
def test_a_token_that_no_vocabulary_has_stops_the_run_after_a_save(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, prefetched: bool
) -> None:
    """In a shard that its checksum does not protect: altered on the disk, as by a machine that compared it before. Also
    with batches that are made in a thread, as on CUDA."""
    monkeypatch.setattr("train.training.verify_once", lambda *_: None)
    if prefetched:
        monkeypatch.setattr("train.datamodule.TokenDataModule.on_cuda", True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
        monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    shutil.copytree(corpus, tmp_path / "data")
    places: list[tuple[Path, int]] = []
    read = TokenWindows._read

    def noting(self: TokenWindows, shard: int, begin: int, tokens: int) -> Any:
        if tokens == 33:
            places.append((self.files[shard][0], begin))
        return read(self, shard, begin, tokens)

    base = ["+arch=mha", "+size=tiny", *SMALL, f"data.path={tmp_path / 'data'}", "logger=csv"]
    with monkeypatch.context() as recording:
        recording.setattr(TokenWindows, "_read", noting)
        pretrain(*base, f"folder={tmp_path / 'whole'}")
    path, begin = next(place for place in places[20:] if "train" in place[0].name and places.count(place) == 1)
    with path.open("r+b") as file:
        file.seek(2 * begin)
        file.write(b"\xff\xff")
    with pytest.raises(TrainingError, match=r"token 65535 in a vocabulary of 600.*last good checkpoint is .*step-0000"):
        pretrain(*base, f"folder={tmp_path / 'run'}")
    assert 0 < step_of(checkpoints(tmp_path / "run")[0]) < 8


def test_wandb_gets_what_the_user_names_and_warns_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from train.loggers import wandb_logger

    monkeypatch.setenv("WANDB_MODE", "offline")
    named = LoggerConfig(project="caches", entity="lab", group="sweep", tags=["cla", "short"], notes="first try")
    for options, expected in ((named, ("lab", "sweep", ("cla", "short"), "first try")), (LoggerConfig(), None)):
        config = PretrainConfig(load_arch("cla2"), load_size("tiny"), logger=options, name="cla2-tiny")
        (tmp_path / options.project).mkdir()
        logger = wandb_logger(config, tmp_path / options.project)
        try:
            run = logger.experiment
            assert (run.project, run.name) == (options.project, options.project)
            found = (run.entity, run.group, run.tags, run.notes)
            assert found == expected if expected else found[1:] == ("cla2-tiny", (), None)
        finally:
            wandb.finish()
        assert list((tmp_path / options.project / "wandb").glob("offline-run-*")), "what `wandb sync` is given"
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("logger.project=team/caches", "Invalid project name 'team/caches'.*logger.entity"),
        (f"logger.tags=[{'long' * 20}]", "is 80 characters. Tags must be between 1 and 64 characters. Change"),
    ],
)
def test_what_wandb_refuses_leaves_no_folder(
    option: str, message: str, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", *SMALL, f"data.path={corpus}", option, f"folder={tmp_path / 'run'}")
    assert stopped.value.code == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_failed_run_of_a_sweep_keeps_its_wandb_run_to_itself(tmp_path: Path, corpus: Path) -> None:
    options = [*SMALL, f"data.path={corpus}", "optim.clip=1e30", "optim.warmup=0"]
    with pytest.raises(TrainingError):
        pretrain("+arch=mha", "+size=tiny", *options, "optim.lr=1e30", f"folder={tmp_path / 'bad'}")
    pretrain("+arch=mha", "+size=tiny", *options, f"folder={tmp_path / 'good'}")
    assert [len(list((tmp_path / name / "wandb").glob("offline-run-*"))) for name in ("bad", "good")] == [1, 1]


def test_wandb_can_be_disabled(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    pretrain("+arch=mha", "+size=tiny", *SMALL, f"data.path={corpus}", f"folder={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "wandb").exists()


def test_wandb_key_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.loggers import wandb_key

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine my.server login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://my.server")
    assert wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert not wandb_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    assert wandb_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    assert not wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_key()


def test_neighbours_that_are_no_runs_are_passed_over(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "summary.json").write_text('{"a": 1}')
    (tmp_path / "file").write_text("")
    pretrain("+arch=mha", "+size=tiny", *SMALL, "logger=csv", f"data.path={corpus}", f"folder={tmp_path / 'run'}")
    assert len(json.loads((tmp_path / "run" / "pareto" / "pareto.json").read_text())) == 1


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
    arguments.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = run_script("train/pretrain.py", *arguments, cwd=tmp_path, environment={BLANK: ""})
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")) == [
        "cla2-tiny-seed0",
        "cla2-tiny-seed1",
        "mha-tiny-seed0",
        "mha-tiny-seed1",
    ]
    assert (tmp_path / "sweep" / "cla2-tiny-seed0" / "pareto" / "pareto.png").stat().st_size > 5000
    assert "step 2/2  loss" in done.stdout
    done = run_script("eval/pareto.py", str(tmp_path / "sweep"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (first, second) = json.loads((tmp_path / "sweep" / "pareto.json").read_text())
    assert (first["name"], first["runs"], second["name"], second["runs"]) == ("cla2-tiny", 2, "mha-tiny", 2)


def test_cuda_where_there_is_none(capfd: pytest.CaptureFixture, corpus: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=mha", "+size=tiny", "trainer.accelerator=cuda", f"data.path={corpus}")
    assert stopped.value.code == 2
    assert "torch sees no CUDA device; use trainer.accelerator=auto" in capfd.readouterr().err


def test_torchrun_with_other_processes_than_configured(
    capfd: pytest.CaptureFixture, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "kvfrontier")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        pretrain("+arch=mha", "+size=tiny", "trainer=ddp", "trainer.accelerator=cpu", f"data.path={corpus}")
    text = "torchrun has started 1 processes, and trainer.devices=2 on each of trainer.num_nodes=1 are 2; give both as"
    assert text in capfd.readouterr().err


def test_help() -> None:
    done = run_script("train/pretrain.py", "--help")
    assert done.returncode == 0
    for word in ("+arch=cla2", "mixattention", "tiny", "resume=", "warmup: 0.05"):
        assert word in done.stdout
    assert ROOT.is_dir()


def test_every_arch_and_size_composes() -> None:
    """Sizes as typed, layouts all at once, each under its own name: as we read them without Hydra, which knows that
    `1e-3` is a number. Each layout can be trained at each size."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose(overrides=[f"+arch@{name}={name}" for name in ARCHS])
        for size in SIZES:
            config = OmegaConf.to_object(compose("pretrain", overrides=["+arch=block", f"+size={size}"]))
            assert config.size == load_size(size)
            assert config.tokens == config.size.tokens
            assert config.optim.lr == config.size.lr
            for name in ARCHS:
                config.arch = load_arch(name)
                assert not problems(config)
                resolve(config.model)
    for name in ARCHS:
        typed = OmegaConf.merge(OmegaConf.structured(ArchConfig), composed[name])
        assert OmegaConf.to_object(typed) == load_arch(name)
