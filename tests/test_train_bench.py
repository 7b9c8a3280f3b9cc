"""The benchmarks: models that are compared are equal, results say what was measured, a killed suite goes on."""

import contextlib
import json
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_in_process, run_script, small, start_script

from arch import resolve
from arch.footprint import kv_bytes, num_params
from data.cli import UsageError
from data.shards import Manifest
from train import pretrain
from train.benchmarks import baselines, gpu_study, gpu_suite, peak_memory
from train.benchmarks import cpu as bench
from train.benchmarks import loader as bench_loader
from train.benchmarks.baselines import BUILDERS, Step, UnavailableError, copy_weights, llama_slot, random_batch
from train.benchmarks.gpu_case import Case, Options
from train.estimates.activations import Execution
from train.loss import cross_entropy_sum
from train.schema import PretrainConfig

CPU = torch.device("cpu")


def suite(out: Path, *arguments: str) -> int:
    return gpu_suite.main(["toy=true", "child=true", f"out={out}", *arguments])


def read(out: Path, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["mha", "gqa4"])
@pytest.mark.parametrize("name", ["hugging_face", "litgpt"])
def test_baselines_are_the_same_model_and_take_the_same_step(name: str, arch: str, tied: bool) -> None:
    """Equal size and, step after step, equal losses: so equal gradients, clipping and updates too."""
    config = small(arch, tie_embeddings=tied, init_std=0.1)
    mine = BUILDERS["ours"](config, CPU, False)
    try:
        theirs = BUILDERS[name](config, CPU, False)
    except UnavailableError as error:
        pytest.skip(str(error))
    counts = [sum(p.numel() for p in baseline.model.parameters()) for baseline in (mine, theirs)]
    assert counts[0] == counts[1]
    copy_weights(config, mine.model.state_dict(), name, theirs)
    steps = [Step(baseline, contextlib.nullcontext) for baseline in (mine, theirs)]
    batch = random_batch(config.size.vocab_size, 3, config.size.seq_len, CPU, seed=0)
    losses = torch.tensor([[step(*batch).item() for step in steps] for _ in range(4)])
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=0, atol=1e-5)
    assert (losses[1:] < losses[:-1]).all()


@pytest.mark.parametrize("arch", ["cla2", "mixattention", "mla", "swa", "bct_gated", "block"])
def test_baselines_refuse_layouts_they_do_not_have(arch: str) -> None:
    with pytest.raises(UnavailableError, match="only mha, gqa and mqa"):
        llama_slot(small(arch))


def test_unequal_models_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = small("mha", d_ff=64)
    monkeypatch.setattr(
        bench, "BUILDERS", {"ours": BUILDERS["ours"], "other": lambda *_: BUILDERS["ours"](larger, CPU, False)}
    )
    with pytest.raises(RuntimeError, match="differ in size"):
        bench.build_all(small("mha"))


@pytest.mark.slow
def test_bench_writes_what_it_measured(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litgpt.config", None)
    # The imports of a spawned process take most of the time; only resident bytes, not looked at here, need it.
    monkeypatch.setattr(peak_memory, "get_context", lambda _: get_context("fork"))
    arguments = ["+arch=gqa4", "+size=tiny", "size.num_layers=2", "size.seq_len=64", "size.vocab_size=640", "repeats=3"]
    arguments += ["documents=40", "loader_repeats=2", f"data.path={corpus}", f"out={tmp_path}"]
    launch_in_process(bench.main, "bench", bench.BenchConfig, arguments)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert "litgpt cannot be imported" in result["skipped"]["litgpt"]
    assert result["versions"]["torch"] == version("torch")
    for model in result["models"].values():
        assert len(model["seconds"]["all"]) == 3
        assert model["seconds"]["min"] <= model["seconds"]["median"] <= model["seconds"]["max"]
        # Weights, gradients and two moments are there at one time.
        assert 16 * model["params"] < model["peak_bytes"]["allocated"] < 100 * 2**20
    assert result["models"]["ours"]["params"] == result["models"]["hugging_face"]["params"]
    against, models = result["ours_against"]["hugging_face"], result["models"]
    ratio = models["hugging_face"]["seconds"]["median"] / models["ours"]["seconds"]["median"]
    assert against["speed"] == pytest.approx(ratio)
    loader = result["loader"]
    if "skipped" not in loader:
        assert loader["ours_over_datasets"]["min"] > 1
        assert loader["tokens"]["ours"] == bench_loader.OURS_PER_BASELINE * loader["tokens"]["datasets"]


def test_bench_refuses_what_no_baseline_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch_in_process(bench.main, "bench", bench.BenchConfig, ["+arch=cla2", "+size=tiny"])
    assert ended.value.code == 2
    assert "+arch=cla2: the baselines have no such layout" in capsys.readouterr().err


def test_suite_without_cuda_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["child=true", f"out={tmp_path}"]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["parts=nothing", "minutes=soon", "part_minutes=0", "toy=maybe", "size=1b", "parts"])
def test_suite_refuses_mistakes(wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong.partition("=")[0]):
        gpu_suite.main([wrong])


def test_micro_batch_halves_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, config: object, batch: int, *_: object) -> dict:
        if batch > 1:
            raise torch.cuda.OutOfMemoryError("no")
        return {"micro_batch": batch}

    monkeypatch.setattr(gpu_suite.gpu_train, "run", run)
    found = gpu_suite.gpu_train.measure("ours", small("mha"), Options(toy=True))
    assert found == {"micro_batch": 1, "did_not_fit": [2]}


def test_a_step_of_micro_batches_is_that_of_the_batch() -> None:
    config, batch = small("cla2"), random_batch(61, 4, 16, CPU, seed=0)
    models = [BUILDERS["ours"](config, CPU, False) for _ in range(2)]
    steps = [Step(model, contextlib.nullcontext, accumulate) for model, accumulate in zip(models, (1, 2), strict=True)]
    for _ in range(2):
        whole, parts = (step(*batch).item() for step in steps)
        assert parts == pytest.approx(whole, rel=1e-5)


def test_training_is_measured_at_the_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimate of a run, at the sizes of a GPU; a layout that fits nowhere is tried, and then skipped."""
    gpu_train, options = gpu_suite.gpu_train, Options(toy=False)
    monkeypatch.setattr(Options, "device", torch.device("cuda"))
    monkeypatch.setattr(gpu_train, "free_memory", lambda device: 79 * 2**30)
    sizes = {
        (arch, size, checkpointing): gpu_train.first_micro_batch(
            gpu_train.case_config(arch, size, options), Execution(checkpointing=checkpointing), options
        )
        for arch, size in (("mha", "1b"), ("bct", "1b"), ("mha", "3b"), ("cla2", "3b"), ("bct", "3b"))
        for checkpointing in (False, True)
    }
    assert sizes["mha", "1b", False] == 16 and sizes["cla2", "3b", False] == 2
    assert 1 <= sizes["bct", "1b", False] < 16 and sizes["mha", "3b", True] >= 16
    assert sizes["bct", "3b", False] == 1

    def run(*_: object) -> dict:
        raise torch.cuda.OutOfMemoryError("no")

    monkeypatch.setattr(gpu_train, "run", run)
    with pytest.raises(UnavailableError, match=r"a single sequence does not fit \(\d+ GiB by estimate\)"):
        gpu_train.measure("ours", gpu_train.case_config("bct", "3b", options), options)


def test_cases_of_training() -> None:
    gpu_train, options = gpu_suite.gpu_train, Options(toy=False)
    assert [case.key for case in gpu_train.train_3b(options)][-1] == "ours-mha-3b-2048-checkpointed"
    assert not any("checkpointed" in case.key for case in gpu_train.train_1b(options))
    assert {"mha", "cla2", "mixattention", "block", "bct"} < set(gpu_train.GOAL_MFU) < set(gpu_train.MEASURED)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_measurement_stands_beside_roof_and_goal(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_train = gpu_suite.gpu_train
    monkeypatch.setattr(gpu_train, "peak_flops", lambda device, dtype: 989.5e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    case = gpu_train.record("ours", "cla2", "1b", 2048, Options(toy=True), checkpointing)
    assert case["micro_batch"] == case["accumulate"] == 2
    assert 0 < case["mfu"] < case["roof_mfu"] < 1
    assert case["mfu"] / case["roof_mfu"] == pytest.approx(case["tokens_per_second"] / case["roof_tokens_per_second"])
    assert case["activation_checkpointing"] is checkpointing
    case |= {"goal_mfu": 0.46, "goal_tokens_per_second": 52_325.0, "peak_memory_bytes": 2**36}
    shown = gpu_train.table("train_1b", {"cases": {"ours-cla2": case, "copy": {"gb_per_second": 1}}})
    name, goal, micro = (shown.splitlines()[-1].split(" | ")[column] for column in (0, 2, -1))
    assert (name, goal, micro) == ("| ours-cla2", "52,325", "2 x 2 |")
    assert " | 46.0% | " in shown and " | 64.0 | " in shown
    assert "goal 46%" in gpu_train._line(case) and "roof " in gpu_train._line(case)


def test_floor_of_a_decoded_token() -> None:
    """Its bytes: every weight but the embedding's of a plain decoder; half of a Block Transformer's once per block."""
    gpu_decode, plain, block = gpu_suite.gpu_decode, small("mha"), small("block")
    mha = resolve(plain)
    read = num_params(plain, mha) - 32  # all but the last norm
    assert gpu_decode.floor_bytes(plain, 3, 20) == 2 * read + 3 * kv_bytes(mha, 20).read
    plan = resolve(block)
    whole = gpu_decode.floor_bytes(block, 1, 64) - kv_bytes(plan, 64).read
    assert 0.5 < whole / (2 * num_params(block, plan)) < 0.8


def test_ways_to_take_a_step(tmp_path: Path) -> None:
    assert suite(tmp_path, "parts=decode_steps") == 0
    cases = read(tmp_path, "decode_steps")["cases"]
    assert {key.split("-")[0] for key in cases} == {"ours_static", "ours_plain"}
    for key, case in cases.items():
        assert case["cache_bytes"] == case["formula_bytes"], key
        assert case["kernels"] == ([] if "bct" in key else ["sdpa"])


def test_attention_goes_through_its_own_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it: on a CPU the real one has another subject."""

    @dataclass(frozen=True)
    class AttentionCase:
        backend: str
        dtype: torch.dtype = torch.float32

    module = types.ModuleType("train.benchmarks.attention")
    module.cases = lambda device: [AttentionCase(f"{name}-{device}") for name in ("full", "window")]
    module.run_case = lambda case: {"ms_forward": 1.5, "error": {"out": 0.25, "q": 0.5}}
    monkeypatch.setitem(sys.modules, "train.benchmarks.attention", module)
    assert suite(tmp_path, "parts=attention") == 0
    cases = read(tmp_path, "attention")["cases"]
    device = Options(toy=True).device.type
    assert list(cases) == [f"full-{device}-float32", f"window-{device}-float32"]
    assert all(case["error"] == {"out": 0.25, "q": 0.5} for case in cases.values())


def test_attention_without_its_bench_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "train.benchmarks.attention", None)
    assert suite(tmp_path, "parts=attention") == 0
    result = read(tmp_path, "attention")
    assert "train/benchmarks/attention.py cannot be imported" in result["skipped"]["backends"]
    assert result["cases"] == {}


@pytest.mark.slow
def test_gpu_tests_outcome(tmp_path: Path) -> None:
    """No test of that file needs a GPU: pytest says so with status 5."""
    assert suite(tmp_path, "parts=tests") == 0
    case = read(tmp_path, "tests")["cases"]["pytest"]
    assert case["exit_code"] == 5
    assert "deselected" in case["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mha", "block"])
def test_study_is_a_run_of_pretrain(arch: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_study, "ARCHS", (arch,))
    assert suite(tmp_path, "parts=study", f"data={corpus}") == 0
    case = read(tmp_path, "study")["cases"][f"{arch}-20m-seed0"]
    size = asdict(gpu_study.case_config(arch, "20m", Options(toy=True)).size)
    size |= {"vocab_size": Manifest.load(corpus).vocab_size, "batch_size": 4, "tokens": 960}
    changes = [f"size.{key}={'null' if value is None else value}" for key, value in size.items()]
    run = tmp_path / "run"
    changes += [f"folder={run}", f"data.path={corpus}", "logger=csv", "trainer.progress=false"]
    launch_in_process(pretrain.main, "pretrain", PretrainConfig, [f"+arch={arch}", "+size=20m", *changes])
    summary = json.loads((run / "summary.json").read_text())
    assert case["loss"] == summary["val"]["loss"]
    assert case["tokens"] == summary["tokens"]


def test_failures_are_kept_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [True]

    def fragile() -> dict:
        if broken:
            raise ZeroDivisionError("of the test")
        return {"value": 1}

    def absent() -> dict:
        raise UnavailableError("not here")

    cases = [
        Case("fragile", 1, fragile, str),
        Case("absent", 1, absent, str),
        Case("good", 1, lambda: {"value": 2}, str),
    ]
    monkeypatch.setitem(gpu_suite.PARTS, "ceilings", lambda options: cases)
    assert suite(tmp_path, "parts=ceilings") == 1
    result = read(tmp_path, "ceilings")
    assert list(result["cases"]) == ["good"]
    assert "ZeroDivisionError: of the test" in result["failed"]["fragile"]
    assert result["skipped"] == {"absent": "not here"}
    broken.clear()
    assert suite(tmp_path, "parts=ceilings") == 0
    result = read(tmp_path, "ceilings")
    assert result["failed"] == {}
    assert {key: case["start"] for key, case in result["cases"].items()} == {"good": 0, "fragile": 1}


def test_nothing_starts_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("long", 100, lambda: {"value": 1}, str), Case("short", 1, lambda: {"value": 2}, str)]
    monkeypatch.setitem(gpu_suite.PARTS, "ceilings", lambda options: cases)
    assert suite(tmp_path, "parts=ceilings", "part_minutes=1") == 0
    result = read(tmp_path, "ceilings")
    assert (list(result["cases"]), result["left"]) == (["short"], ["long"])


@pytest.mark.slow
def test_a_killed_suite_goes_on(tmp_path: Path) -> None:
    """SIGKILL after the first result, start again, nothing done twice: the results are those of one run."""
    command = ["train/benchmarks/gpu_suite.py", "toy=true", "parts=decode", f"out={tmp_path}"]
    process = start_script(*command, "child=true")
    path, deadline = tmp_path / "decode.json", time.monotonic() + 120
    while not path.exists() or not read(tmp_path, "decode")["cases"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    killed = read(tmp_path, "decode")
    before = killed["cases"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    after = read(tmp_path, "decode")
    assert len(before) < len(after["cases"])
    assert len(after["starts"]) == 2
    assert list(after["cases"])[-1] == killed["running"]
    assert after["running"] is None
    for key, case in after["cases"].items():
        assert case["start"] == (0 if key in before else 1)
        assert before.get(key, case) == case
    check_decode(after["cases"])


def check_decode(cases: dict[str, dict]) -> None:
    """Caches hold the bytes of the formula, of each family and of the baselines."""
    for key, case in cases.items():
        # The baseline's cache grows as it goes: one token of the last step is not in it, nor has it room to spare.
        assert case["cache_bytes"] == case["formula_bytes"], key
        assert case["decode_tokens_per_second"] > 0
    cache = {key.split("-")[1]: case["cache_bytes"] for key, case in cases.items() if key.startswith("ours")}
    assert cache["mha"] == 2 * cache["gqa4"] == 8 * cache["mqa"] == 16 * cache["cla2"]
    assert cache["block"] < cache["mha"] / 4
    assert "bct" in cache
    assert any(not key.startswith("ours") for key in cases)


def run_without(packages: tuple[str, ...], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code where `packages` are not installed, and the repository is what is imported."""
    script = folder / "without.py"
    script.write_text(f"""
import sys
for name in list(sys.modules):
    if name.partition(".")[0] in {packages}:
        del sys.modules[name]
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(ROOT)!r})
{code}
""")
    return run_script(script)


@pytest.mark.slow
def test_the_core_runs_on_torch_einops_numpy_and_yaml(tmp_path: Path) -> None:
    absent = ("lightning", "hydra", "omegaconf", "wandb", "tokenizers", "transformers", "matplotlib", "plotly", "rich")
    arguments = ["toy=true", "child=true", "parts=ceilings,train_1b,attention,decode", "git=abc", f"out={tmp_path}"]
    code = f"from train.benchmarks import gpu_suite\nsys.exit(gpu_suite.main({arguments}))"
    done = run_without((*absent, "datasets", "litgpt", "pytest"), code, tmp_path)
    assert done.returncode == 0, done.stderr
    trained = read(tmp_path, "train_1b")
    assert set(trained["skipped"]) == {
        f"{name}-{arch}-1b-2048" for name in ("hugging_face", "litgpt") for arch in ("mha", "gqa4")
    }
    assert len(trained["cases"]) == 10
    assert {"ours-block-1b-2048", "ours-bct-1b-2048"} < trained["cases"].keys()
    for case in trained["cases"].values():
        tokens = case["accumulate"] * case["micro_batch"] * case["seq_len"]
        assert tokens / case["seconds"]["median"] == pytest.approx(case["tokens_per_second"])
        assert len(case["losses"]) == 5
        assert {"arch", "size", "gpu", "seq_len", "peak_memory_bytes"} <= case.keys()  # of train/estimate.py
        assert case["part"] == "train"
    ceilings = read(tmp_path, "ceilings")
    assert ceilings["starts"][0]["git"] == "abc"
    assert {"driver", "hardware", "versions", "date", "command"} <= set(ceilings["starts"][0])
    assert ceilings["cases"]["matmul-bf16-64"]["tflops"]["median"] > 0
    assert len(ceilings["cases"]["copy"]["gb_per_second"]["all"]) == 7
    assert len(read(tmp_path, "decode")["cases"]) == 8
    assert len(read(tmp_path, "attention")["cases"]) == 3


def test_study_runs_with_lightning_alone(corpus: Path, tmp_path: Path) -> None:
    """On a GPU machine without the packages of the command line and of the loggers."""
    arguments = ["toy=true", "child=true", "parts=study", f"data={corpus}", f"out={tmp_path}"]
    code = f"from train.benchmarks import gpu_suite\nsys.exit(gpu_suite.main({arguments}))"
    done = run_without(("hydra", "omegaconf", "wandb", "datasets", "plotly"), code, tmp_path)
    assert done.returncode == 0, done.stderr
    study = read(tmp_path, "study")
    assert list(study["cases"]) == ["mha-20m-seed0"], study["skipped"]


def test_gpu_tests_are_collected_without_hydra(tmp_path: Path) -> None:
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_arch_attend_gpu.py"]
    code = f"""
import os
os.chdir({str(ROOT)!r})
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hydra brings one
import pytest
sys.exit(pytest.main({arguments}))"""
    done = run_without(("lightning", "hydra", "omegaconf", "wandb"), code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_tests_that_take_too_long_leave_their_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pytest", 1, output=b"test_one PASSED")

    monkeypatch.setattr(gpu_suite.gpu_checks.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="test_one PASSED"):
        gpu_suite.gpu_checks.gpu_tests(Options(toy=False))


def test_ours_is_measured_with_the_loss_it_is_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(baselines, "parallelize", lambda model, **_: None)
    monkeypatch.setattr(
        baselines, "cross_entropy_sum", lambda targets, compiled: asked.append(compiled) or cross_entropy_sum(targets)
    )
    inputs, targets = random_batch(61, 1, 8, torch.device("cpu"), seed=0)
    for compiled in (False, True):
        baselines.kvfrontier(small("mha"), torch.device("cpu"), compiled).loss(inputs, targets)
    assert asked == [False, True]


def test_study_prepares_its_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("data.prepare.prepare", made.append)
    folder = gpu_study.default_data()
    assert (folder.name, made[0].source.corpus, made[0].tokenizer.vocab_size) == ("stdlib-bpe8192", "stdlib", 8192)
    assert made[0].tokenizer.sample_bytes < 5_000_000, "a tokenizer of all of it takes minutes"


def test_study_takes_what_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.config.PREPARED", tmp_path)
    (tmp_path / "stdlib-bpe512").mkdir()
    (tmp_path / "stdlib-bpe512" / "manifest.json").touch()
    assert gpu_study.default_data(toy=True) == tmp_path / "stdlib-bpe512"
