"""Folders that an earlier version wrote still load: runs, their data, and exported models (tests/golden/old)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch_in_process, run_script, tokens
from rich.console import Console

from arch import LanguageModel, ModelConfig, build, from_dict, plan_from_dict, resolve
from eval import pareto
from train import checkpoint, import_hf
from train.export import export
from train.hub.request import ExportConfig
from train.import_hf import ImportConfig

OLD = ROOT / "tests" / "golden" / "old"
RUNS = sorted(path.name for path in OLD.glob("run-*"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in: the runs name their data `data`, relative to where they were started."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def model_of(run: Path) -> LanguageModel:
    """The trained model, from the newest checkpoint alone."""
    folder = checkpoint.resolve(run)
    info = checkpoint.load_info(folder)
    config = from_dict(ModelConfig, info["config"])
    assert plan_from_dict(info["plan"]) == resolve(config)
    model = build(config)
    checkpoint.load(folder, model)
    return model.eval()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_ended_is_read_again(name: str, old: Path) -> None:
    """`resume=` on a finished run opens its data, loads its newest checkpoint and validates: the recorded loss."""
    recorded = json.loads((old / name / "summary.json").read_text())
    done = run_script("train/pretrain.py", f"resume={name}", cwd=old, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((old / name / "summary.json").read_text())
    assert again["val"] == pytest.approx(recorded["val"], rel=1e-5)
    assert again["experiment"] == recorded["experiment"]


def test_a_run_that_was_killed_goes_on(old: Path) -> None:
    run = old / "run-mixattention"
    recorded = json.loads((run / "summary.json").read_text())
    for path in (run / "checkpoints" / "step-00000008", run / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run_script("train/pretrain.py", f"resume={run.name}", cwd=old, environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "summary.json").read_text())["val"] == pytest.approx(recorded["val"], rel=1e-5)


def test_runs_are_compared(old: Path, capsys: pytest.CaptureFixture) -> None:
    pareto.main([str(old / name) for name in RUNS])
    shown = capsys.readouterr().out
    assert all(name.removeprefix("run-") in shown for name in RUNS)


@pytest.mark.parametrize("name", ["mixattention", "bct"])
def test_a_run_is_exported_to_the_same_files(name: str, old: Path) -> None:
    """Configuration, tokenizer and weights are those of the earlier export; the card may read differently, and there is
    one more class to load by."""
    export(ExportConfig(f"run-{name}", "again", verify=False), Console(quiet=True))
    before_folder = old / f"export-{name}"
    before = {path.name: path for path in before_folder.iterdir()}
    assert before.keys() - {"README.md"} <= {path.name for path in (old / "again").iterdir()}
    config, earlier = (json.loads((folder / "config.json").read_text()) for folder in (old / "again", before_folder))
    if name == "mixattention":
        added = config["auto_map"].pop("AutoModelForSequenceClassification")
        assert added == "modeling_kvfrontier.KVFrontierForSequenceClassification"
    assert config == earlier
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((old / "again" / file).read_text()) == json.loads(before[file].read_text()), file
    assert (old / "again" / "model.safetensors").read_bytes() == before["model.safetensors"].read_bytes()


@pytest.mark.parametrize("name", ["mixattention", "bct"])
def test_an_export_is_imported(name: str, old: Path) -> None:
    pytest.importorskip("transformers")
    launch_in_process(import_hf.main, "import_hf", ImportConfig, [f"source={old / f'export-{name}'}", "out=imported"])
    imported, ours = (dict(model_of(old / folder).named_parameters()) for folder in ("imported", f"run-{name}"))
    assert imported.keys() == ours.keys()
    assert all(torch.equal(imported[key], ours[key]) for key in ours)


def test_an_export_runs_its_own_code(old: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = str(old / "export-mixattention")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ours, tokens_BT = model_of(old / "run-mixattention"), tokens(2, 20, 257)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT).logits, ours(tokens_BT), atol=1e-5, rtol=0)
