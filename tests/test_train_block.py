"""Block Transformers through the commands: one override changes a decoder's layout, and every result says which targets
it is over."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCKS, launch_in_process, weights
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch.nn import functional as F

from arch import BlockTransformer, build, plan_from_dict, resolve
from arch.named import CONFIGS
from data.batches import IGNORE
from eval.footprint import FootprintConfig
from eval.footprint import main as footprint
from eval.pareto import differences
from eval.runs import finished_run
from train.datamodule import TokenDataModule
from train.lit_module import LitModel
from train.pretrain import main
from train.run import static_metrics
from train.schema import PretrainConfig, problems

SMALL = [
    "+size=tiny", "size.num_layers=4", "size.d_model=32", "size.d_ff=48", "size.vocab_size=600", "size.seq_len=32",
    "size.init_std=0.2", "batch_size=4", "tokens=768", "data.val_tokens=256", "trainer.log_every=1", "logger=csv",
    "trainer.accelerator=cpu",
]  # fmt: skip


def pretrain(*arguments: str) -> None:
    launch_in_process(main, "pretrain", PretrainConfig, [*SMALL, *arguments])


def composed(*overrides: str) -> PretrainConfig:
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_object(compose("pretrain", overrides=[*SMALL, *overrides]))


@pytest.mark.parametrize(
    ("override", "plan", "elements"),
    [
        ("arch.pattern=[new kv,reuse kv]", "0 0", 2 * 8 * 4),
        ("arch.stores.kv.kv_heads=1/4", "0 1", 2 * 2 * 4),
        ("arch.stores.kv.window=3", "0s 1s", 2 * 8 * 4),
    ],
)
def test_one_override_changes_the_block_decoder(override: str, plan: str, elements: int) -> None:
    config = composed("+arch=block", override)
    model = build(config.model)
    assert str(model.plan) == f"blocks of 4: {plan}; within one: 0 1"
    assert model.plan.block.stores[0].slot.elements == elements
    model.init_weights()
    assert model(torch.zeros(1, 32, dtype=torch.int64)).shape == (1, 32, 600)


@pytest.fixture(scope="module", params=["start", "paper", "padded"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = {
        "start": [],
        "paper": ["arch.block.start=false"],
        "padded": ["arch.block.start=false", "data.block_padding=true"],
    }[request.param]
    pretrain("+arch=block", f"data.path={corpus}", f"folder={folder}", *options)
    return folder


def test_the_loss_is_over_the_targets_that_are_said(trained: Path, corpus: Path) -> None:
    """Computed again from the checkpoint, the plain way, over whole validation windows."""
    stored = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(trained / "config.yaml"))
    config: PretrainConfig = OmegaConf.to_object(stored)
    model = build(config.model)
    assert isinstance(model, BlockTransformer)
    model.load_state_dict(weights(trained))
    summary = json.loads((trained / "summary.json").read_text())
    skipped = summary["experiment"]["unpredicted"]
    assert skipped == (0 if trained.name == "start" else 4)
    windows = TokenDataModule(config).val.corpora[0]
    spread = torch.linspace(0, len(windows) - 1, 256 // 32).round().int().tolist()
    tokens = torch.stack([torch.from_numpy(windows[index][1:].astype("int64")) for index in spread])
    with torch.no_grad():
        logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, skipped:].flatten()).item()
    assert summary["val"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert plan_from_dict(json.loads((trained / "plan.json").read_text())) == model.plan == finished_run(trained).plan


def test_training_leaves_pads_and_the_unpredicted_out(corpus: Path) -> None:
    """A step's loss is the mean over its real targets, whatever the micro-batches."""
    config = composed("+arch=block", "arch.block.start=false", "data.block_padding=true", f"data.path={corpus}")
    config.trainer.micro_batch = 2
    data, module = TokenDataModule(config), LitModel(config, torch.zeros(600))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0, accumulate_grad_batches=2, strategy=strategy)
    data.trainer = module.trainer = trainer
    module.configure_model()
    first, second, *_ = data.train_dataloader()
    total, targets = 0.0, 0
    for batch in (first, second):
        segment_ids = batch["segment_ids_BT"]
        real = segment_ids == 0
        assert not real.all() and torch.equal(batch["targets"][:, 4:] != IGNORE, real[:, 4:])
        logits = module.model(batch["inputs"], segment_ids_BT=segment_ids)
        wanted = batch["targets"][:, 4:].flatten()
        total += F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum").item()
        targets += int((wanted != IGNORE).sum())
    assert first["step_targets"] == targets
    reported = sum(module.training_step(batch, 0).item() for batch in (first, second)) / 2
    assert reported == pytest.approx(total / targets, rel=1e-5)


def test_what_was_counted_is_printed(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    runs = []
    for name, option in (("all", "true"), ("paper", "false")):
        pretrain("+arch=block", f"data.path={corpus}", f"folder={tmp_path / name}", f"arch.block.start={option}")
        said = "of targets 5 to 32 of each 32" in capsys.readouterr().out
        assert said == (name == "paper")
        runs.append(finished_run(tmp_path / name))
    assert differences(runs) == ["the positions that are predicted (arch.block.start=true predicts all)"]
    assert differences(runs[:1] * 2) == []


@pytest.mark.parametrize("name", BLOCKS)
def test_figures_of_a_run_are_those_of_its_plan(name: str) -> None:
    config = composed(f"+arch={name}")
    model = config.model
    figures = static_metrics(config, resolve(model))
    assert figures["model/params"] == sum(p.numel() for p in build(model).parameters())
    assert all(math.isfinite(value) and value > 0 for value in figures.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["size.seq_len=30"], "size.seq_len 30 is not a multiple of arch.block.length 4"),
        (["size.seq_len=4"], "size.seq_len 4 is one block"),
        (
            ["data.block_padding=true", "arch.stores.kv.slots=4", "arch.stores.kv.rule=gated"],
            "data.block_padding is not for bounded stores",
        ),
        (["data.document_mask=true"], "data.document_mask is not for a Block Transformer"),
        (["arch.block.length=16", "size.d_model=24"], "size.d_model 24 is not a multiple of arch.block.length 16"),
        (["arch.block.token.kind=postfix"], "arch.block.token.kind is 'postfix'"),
        (["arch.block.token.stores.kv.kv_heads=3"], "token decoder: arch.block.token.stores.kv.kv_heads 3"),
        (["trainer.backend=varlen"], "trainer.backend: "),
    ],
)
def test_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain("+arch=block", f"folder={tmp_path / 'run'}", *options)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padding_is_for_blocks() -> None:
    assert problems(composed("+arch=mha", "data.block_padding=true")) == [
        "data.block_padding is for a Block Transformer; choose one, or leave it out"
    ]


def test_footprint_adds_the_two_plans(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "map.png"
    arguments = ["+size=1b", "+arch=block", "context=32768", f"picture={picture}"]
    launch_in_process(footprint, "footprint", FootprintConfig, arguments)
    text = capsys.readouterr().out
    for words in (
        "block: blocks of 4 tokens, 20,480 B per token, 640 MiB at 32,768 tokens",
        "block decoder: 10 stores for 10 layers, 81,920 B per block, 640 MiB at 8,192 blocks",
        "token decoder: 10 stores for 10 layers, 81,920 B per position, 400 KiB at 5 positions",
    ):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
