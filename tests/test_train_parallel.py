"""Two gloo processes do what one does, with every kind of block: DDP, and FSDP2 with and without checkpointing."""

import csv
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ARCHS, build, covering, run_script, small, start_script, tokens
from torch.nn.parallel import DistributedDataParallel

from arch import Decoder, ModelConfig, from_dict
from eval import evaluate
from train.checkpoint import checkpoints, load, load_info, step_of
from train.parallel import parallelize

SMALL = [
    "size.num_layers=3", "size.d_model=32", "size.d_ff=48", "size.vocab_size=600", "size.seq_len=32",
    "size.max_window=8", "batch_size=4", "tokens=1024", "data.val_tokens=320", "trainer.log_every=1", "logger=csv",
    "trainer.accelerator=cpu",
]  # fmt: skip


def test_gradients_of_every_kind_of_block(tmp_path: Path) -> None:
    both = [start_script("tests/parallel_worker.py", str(rank), str(tmp_path / "store")) for rank in range(2)]
    for process in both:
        out, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        assert f"{len(covering(ARCHS))} layouts agree" in out


def test_sharded_within_replicas(tmp_path: Path) -> None:
    """HSDP: gradients, clipping, Muon, and checkpoints to and from FSDP2 and one process."""
    four = [start_script("tests/hsdp_worker.py", str(rank), str(tmp_path)) for rank in range(4)]
    for process in four:
        out, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-3000:]
        assert "replicas agree" in out


def column(folder: Path, name: str, start: int = 0) -> list[float]:
    with (folder / "metrics" / str(start) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def whole_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint, put together in this one process."""
    folder = checkpoints(run)[0]
    model = Decoder(from_dict(ModelConfig, load_info(folder)["config"]))
    load(folder, model)
    return model.state_dict()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    arguments = [*SMALL, f"data.path={corpus}", f"folder={folder}"]
    done = run_script("train/pretrain.py", "+arch=mixattention", "+size=tiny", *arguments)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "options",
    [["trainer=ddp"], ["trainer=fsdp"], ["trainer=fsdp", "trainer.micro_batch=1", "trainer.checkpoint_async=true"]],
)
def test_two_processes_train_like_one(single: Path, tmp_path: Path, corpus: Path, options: list[str]) -> None:
    """The command itself, launched on two processes: the same losses and validation, also when it accumulates, writes
    checkpoints in the background, and has tasks of evaluation in between, which they share; one of them generates."""
    folder = tmp_path / "run"
    evals = "evals={every: 3, tasks: [perplexity, copy], options: {copy: {sequences: 3, batch: 1}}}"
    arguments = [*SMALL, *options, evals, f"data.path={corpus}", f"folder={folder}"]
    arguments += ["trainer.checkpoint_minutes=1e-9", "trainer.keep_checkpoints=9"]
    done = run_script("train/pretrain.py", "+arch=mixattention", "+size=tiny", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step_of(path) for path in checkpoints(folder)] == [8, 7, 6, 5, 4, 3, 2], "by rank 0's clock"
    for name in ("train/loss", "val/loss", "val/bpb"):
        assert column(folder, name) == pytest.approx(column(single, name), rel=1e-5), name
    evaluated = column(folder, "evaluations/perplexity/loss")
    assert len(evaluated) == 3 and evaluated[1:] == pytest.approx([column(folder, "val/loss")[n] for n in (-2, -1)])
    copied = json.loads((folder / "evaluations" / "copy.json").read_text())["figures"]
    assert any("generated" in name for name in copied)
    evaluate.main([f"checkpoint={folder}", "tasks=copy", "copy.sequences=3", "copy.batch=1"])
    assert json.loads((folder / "evaluations" / "copy.json").read_text())["figures"] == pytest.approx(copied)
    expected, ours = whole_weights(single), whole_weights(folder)
    assert expected.keys() == ours.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_bf16_is_the_same_sharded_or_not(tmp_path: Path, corpus: Path) -> None:
    for name, options in {"one": [], "two": ["trainer=fsdp"]}.items():
        arguments = [*SMALL, *options, "trainer.precision=bf16", f"data.path={corpus}", f"folder={tmp_path / name}"]
        done = run_script("train/pretrain.py", "+arch=cla2", "+size=tiny", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (column(tmp_path / name, "train/loss") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3)


def test_frozen_weights_and_muon_on_two_processes(single: Path, tmp_path: Path, corpus: Path) -> None:
    """Muon on a part of the weights, from another run's: what one process does, two do; and one goes on after two."""
    # A small rate: torch orthogonalises in bf16, where the rounding of sums in another order grows from step to step.
    options = [
        "optim=muon",
        "optim.lr=1e-3",
        "train_only=reader|writer",
        f"init={single}",
        "trainer.checkpoint_every=4",
    ]
    for name, trainer in {"one": [], "fsdp": ["trainer=fsdp"]}.items():
        arguments = [*SMALL, *options, *trainer, f"data.path={corpus}", f"folder={tmp_path / name}"]
        done = run_script("train/pretrain.py", "+arch=mixattention", "+size=tiny", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    expected = column(tmp_path / "one", "train/loss")
    assert column(tmp_path / "fsdp", "train/loss") == pytest.approx(expected, rel=1e-5)
    before, after = whole_weights(single), whole_weights(tmp_path / "fsdp")
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {key for key in before if "reader" in key or "writer" in key}
    shutil.rmtree(checkpoints(tmp_path / "fsdp")[0])
    arguments = [f"resume={tmp_path / 'fsdp'}", "trainer.strategy=auto", "trainer.devices=1"]
    done = run_script("train/pretrain.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    again = column(tmp_path / "fsdp", "train/loss", start=1)
    assert 0 < len(again) < len(expected) == 8
    assert again == pytest.approx(expected[-len(again) :], rel=1e-5)


def test_one_process_checks_the_shards_for_all(tmp_path: Path, corpus: Path) -> None:
    """Launched together, both end with what the first has found, and no run is begun."""
    data = shutil.copytree(corpus, tmp_path / "data")
    shard = data / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [*SMALL, "trainer=ddp", f"data.path={data}", f"folder={tmp_path / 'run'}"]
    both = []
    for rank in range(2):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        environment = {key: str(value) for key, value in launcher.items()}
        both.append(start_script("train/pretrain.py", "+arch=mha", "+size=tiny", *arguments, environment=environment))
    size = shard.stat().st_size
    for process in both:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 2, errors[-3000:]
        assert f"error: {shard} has {size} bytes, its manifest says {size + 2}; prepare it again\n" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What the compiler is given of the blocks of a model, which then runs as it is; not of norms, each a graph."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    compile_module = torch.nn.Module.compile

    def compile_block(module: torch.nn.Module, **options: object) -> None:
        if [*module.children()]:
            compile_module(module, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    return seen


def compiled(name: str) -> torch.nn.Module:
    model = build(small(name), torch.float32)
    parallelize(model, activation_checkpointing=False, compile_blocks=True, mesh=None, dtype=torch.float32)
    return model


def test_two_stacks_are_compiled_for_their_own_shapes(graphs: list[torch.fx.GraphModule]) -> None:
    compiled("block")(tokens(2, 16))
    inputs = [node.meta["example_value"] for graph in graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert len(graphs) == 2
    assert all(isinstance(size, int) for tensor in inputs for size in tensor.shape)


def test_ddp_cuts_no_block(graphs: list[torch.fx.GraphModule]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(compiled("mha"), bucket_cap_mb=1e-3)(tokens(2, 16))
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1, "all blocks are alike"
