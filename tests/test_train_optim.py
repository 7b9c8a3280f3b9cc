"""Optimizers and schedules: which parameter is in which group, the exact schedule, resuming, sharding."""

import copy
import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build, launch_in_process, run_script, small, tokens, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

from arch.delta import ShortConv
from arch.strided import Pool
from train.optim import build_optimizer, lr_share, schedule
from train.pretrain import main
from train.schema import OptimConfig, PretrainConfig, optim_problems

MUON = OptimConfig(name="muon", lr=3e-3)
SMALL = [
    "+arch=mixattention", "+size=tiny", "size.num_layers=3", "size.d_model=32", "size.d_ff=49", "size.vocab_size=600",
    "size.seq_len=32", "size.max_window=8", "batch_size=4", "tokens=1024", "data.val_tokens=256",
    "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv",
]  # fmt: skip


def pretrain(*arguments: str) -> None:
    launch_in_process(main, "pretrain", PretrainConfig, [*arguments])


def column(folder: Path, name: str) -> dict[int, str]:
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("metrics/*/metrics.csv"), key=lambda path: int(path.parent.name)):
        with path.open() as file:
            rows += list(csv.DictReader(file))
    return {int(row["step"]): row[name] for row in rows if row.get(name)}


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.05), (20, 0.0), (100, 0.05), (7153, 0.05)])
def test_every_schedule_warms_up_linearly_and_then_starts_at_the_peak(kind: str, steps: int, warmup: float) -> None:
    config = OptimConfig(schedule=kind, warmup=warmup, decay=0.2)
    rising = round(warmup * steps)
    assert [lr_share(step, steps, config) for step in range(rising)] == [(k + 1) / rising for k in range(rising)]
    if steps > 1:
        assert lr_share(rising, steps, config) == 1.0


def test_cosine_falls_to_its_floor_at_the_last_step() -> None:
    config = OptimConfig(schedule="cosine", warmup=0.05, min_lr=0.1)
    assert lr_share(99, 100, config) == pytest.approx(0.1)
    assert lr_share(52, 100, config) == pytest.approx(0.55)  # halfway between step 5 and step 99
    assert lr_share(100, 100, config) == pytest.approx(0.1)


def test_wsd_is_stable_and_then_falls_as_the_square_root_says() -> None:
    config = OptimConfig(schedule="wsd", warmup=0.05, decay=0.2, min_lr=0.0)
    shares = [lr_share(step, 100, config) for step in range(101)]
    assert shares[5:80] == [1.0] * 75
    assert shares[80:100] == pytest.approx([1 - math.sqrt((k + 1) / 20) for k in range(20)])
    assert shares[84] == 0.5
    assert shares[99] == shares[100] == 0.0
    floor = OptimConfig(schedule="wsd", warmup=0.05, decay=0.2, min_lr=0.1)
    assert lr_share(99, 100, floor) == pytest.approx(0.1)
    assert lr_share(84, 100, floor) == pytest.approx(0.55)


def test_wsd_that_is_all_warm_up_and_decay_has_no_gap() -> None:
    config = OptimConfig(lr=1.0, schedule="wsd", warmup=0.5, decay=0.5, min_lr=0.0)
    assert not optim_problems(config)
    assert [lr_share(step, 3, config) for step in range(3)] == [0.5, 1.0, 0.0]  # both shares would round up
    assert [lr_share(step, 4, config) for step in range(4)] == pytest.approx([0.5, 1.0, 1 - math.sqrt(0.5), 0.0])


@pytest.mark.parametrize("kind", ["wsd", "constant"])
def test_a_longer_run_shares_the_stable_part(kind: str) -> None:
    """So a run stopped before its decay can be extended, and a constant one can be branched into a decay."""
    config = OptimConfig(schedule=kind, warmup=0.05, decay=0.2)
    assert all(lr_share(step, 100, config) == lr_share(step, 200, config) == 1.0 for step in range(10, 80))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "optim.name is sgd; choose adamw, muon"),
        ({"schedule": "linear"}, "optim.schedule is linear; choose cosine, wsd, constant"),
        ({"decay": 1.5}, "optim.decay is 1.5; it must be from 0 to 1"),
        ({"momentum": 1.0}, "optim.momentum is 1.0; it must be at least 0 and below 1"),
        (
            {"schedule": "wsd", "warmup": 0.6, "decay": 0.5},
            "optim.warmup 0.6 and optim.decay 0.5 are more than the run",
        ),
    ],
)
def test_mistakes(changes: dict[str, object], message: str) -> None:
    (found,) = optim_problems(OptimConfig(**{"lr": 1e-3, **changes}))
    assert message in found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_of_every_layout(arch: str, kind: str, tied: bool) -> None:
    """Each parameter once; what decays has two axes; Muon has all the matrices of the blocks and nothing else: the
    channels of a convolution are no axis of a product, nor are the places of a pool."""
    model = build(small(arch, tie_embeddings=tied), torch.float32)
    optimizer = build_optimizer(model, OptimConfig(name=kind, lr=1e-3))
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(name_of.values())
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    outer = {"embed.weight"} if tied else {"embed.weight", "lm_head.weight"}
    outer |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ShortConv)}
    outer |= {f"{name}.position_bias" for name, module in model.named_modules() if isinstance(module, Pool)}
    hidden = {
        f"{name}.weight"
        for name, module in model.layers.named_modules(prefix="layers")
        if isinstance(module, nn.Linear)
    }
    assert matrices == hidden | outer
    expected = [matrices] if kind == "adamw" else [hidden, outer]
    assert [set(group) for group in groups] == [*expected, set(name_of.values()) - matrices]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1] * len(expected) + [0.0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(kind: str) -> None:
    model = build(small("cla2"), torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".reader." in name
    optimizer = build_optimizer(model, OptimConfig(name=kind, lr=1e-3))
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(inside) == 2 * len(model.layers)
    before = model.embed.weight.clone()
    step(model, optimizer)
    assert torch.equal(model.embed.weight, before)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 3) -> float:
    batch = tokens(seed, 14)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def test_one_learning_rate_serves_both_parts() -> None:
    """The root mean square of Muon's first update is about that of AdamW at the same rate (Liu et al., section 2.2)."""
    model = build(small("gqa4", d_model=64, d_ff=96), torch.float32)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1e-2, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    for name, parameter in model.named_parameters():
        if ".mlp." in name or "o_proj" in name:
            rms = (parameter - before[name]).pow(2).mean().sqrt().item()
            assert 0.1e-2 < rms < 0.3e-2, name  # 0.2 lr, up to Newton and Schulz' singular values of 0.7 to 1.2


@pytest.mark.parametrize("by_name", [False, True])
def test_state_comes_back_exactly(by_name: bool) -> None:
    """state_dict, or torch.distributed.checkpoint's by parameter name, into a new object: the same further steps."""
    model, other = (build(small("cla2"), torch.float32) for _ in range(2))
    optimizer, restored = (build_optimizer(m, MUON) for m in (model, other))
    for seed in (1, 2):
        step(model, optimizer, seed)
    other.load_state_dict(model.state_dict())
    if by_name:
        set_optimizer_state_dict(other, restored, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    else:
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file would
    for seed in (3, 4):
        assert step(model, optimizer, seed) == step(other, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    kinds = {tuple(sorted(optimizer.state[p])) for p in optimizer.param_groups[0]["params"]}
    assert kinds == {("momentum_buffer",)}
    kinds = {tuple(sorted(optimizer.state[p])) for group in optimizer.param_groups[1:] for p in group["params"]}
    assert kinds == {("exp_avg", "exp_avg_sq", "step")}


def test_closure_and_schedule_see_one_optimizer() -> None:
    model = build(small("mha"), torch.float32)
    optimizer = build_optimizer(model, MUON)
    scheduler = schedule(optimizer, MUON, steps=40)
    batch = tokens(2, 9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3 * lr_share(1, 40, MUON)] * 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "run"
    pretrain(*SMALL, "optim=muon", "optim.schedule=constant", f"data.path={corpus}", f"folder={folder}")
    return folder


def test_muon_learns(whole: Path) -> None:
    losses = [float(value) for value in column(whole, "train/loss").values()]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3


def test_muon_resumes_bit_for_bit(whole: Path, tmp_path: Path, corpus: Path) -> None:
    """Half the run, then the rest: same losses and weights as in one go."""
    folder = tmp_path / "run"
    options = ["optim=muon", "optim.schedule=constant", "optim.warmup=0.1", f"data.path={corpus}"]
    pretrain(*SMALL, *options, "tokens=512", f"folder={folder}")
    pretrain(f"resume={folder}", "tokens=1024", "optim.warmup=0.05")
    assert column(folder, "train/loss") == column(whole, "train/loss")
    states = [weights(path) for path in (whole, folder)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_constant_run_is_branched_into_a_decay(whole: Path, tmp_path: Path) -> None:
    """A copy of the run goes on at the peak, then falls to the end it was given."""
    branch = tmp_path / "branch"
    shutil.copytree(whole, branch)
    pretrain(f"resume={branch}", "tokens=1536", "optim.schedule=wsd", "optim.decay=0.25", "optim.min_lr=0")
    rates = {step: float(rate) / 3e-3 for step, rate in column(branch, "train/lr").items()}
    assert [rates[step] for step in range(8, 13)] == pytest.approx([1, 1, *(1 - math.sqrt(k / 3) for k in (1, 2, 3))])
    assert sorted(column(whole, "train/lr")) == list(range(1, 9))


def test_a_resumed_run_keeps_its_optimizer(whole: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretrain(f"resume={whole}", "optim.name=adamw")
    assert stopped.value.code == 2
    assert "optim.name=adamw: a resumed run keeps its" in capfd.readouterr().err


@pytest.mark.slow
def test_muon_on_two_processes(whole: Path, tmp_path: Path, corpus: Path) -> None:
    """FSDP2: as one process up to bf16 Newton-Schulz iterations, and its checkpoint goes on in one process."""
    folder = tmp_path / "run"
    options = ["optim=muon", "optim.schedule=constant", f"data.path={corpus}", f"folder={folder}"]
    done = run_script("train/pretrain.py", *SMALL, *options, "trainer=fsdp", "trainer.checkpoint_every=4")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (list(map(float, column(path, "train/loss").values())) for path in (whole, folder))
    assert two == pytest.approx(one, rel=1e-2)
    pretrain(f"resume={folder}", "trainer.devices=1", "trainer.strategy=auto", "tokens=1536")
    assert sorted(column(folder, "train/loss")) == list(range(1, 13))
