"""Every command of the README is executed, shortened where it would take long; every file it names exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from conftest import ROOT, launch_in_process, run_script
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from arch.named import load_arch, load_size, names
from data.cli import parse
from data.presets import load
from eval import study as report
from eval.readme import committed, updated
from train import study
from train.schema import PretrainConfig
from train.studies.schema import StudyConfig

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.strip().splitlines()]
SHORT = [
    "size.num_layers=2", "size.d_model=32", "size.num_heads=8", "size.d_ff=48", "size.vocab_size=4096",
    "size.seq_len=32", "batch_size=4", "tokens=512", "data.val_tokens=128", "trainer.accelerator=cpu", "logger=csv",
    "trainer.log_every=1",
]  # fmt: skip
# A tenth of the standard library, which training prepares at first use.
LITTLE = ["data.max_tokens=1_000_000", "data.max_eval_tokens=100_000", "data.tokenizer.sample_bytes=1_000_000"]


def of(word: str) -> list[str]:
    found = [command for command in COMMANDS if word in command]
    assert found, f"README lost its commands with {word}"
    return found


def test_nothing_in_the_readme_is_left_out() -> None:
    """Each command is of a kind that a test below, or CI, executes."""
    scripts = ("train/pretrain", "train/estimate", "train/export", "train/import_hf", "train/uptrain", "data/prepare")
    scripts += (
        "train/study",
        "eval/study",
        "eval/footprint",
        "eval/pareto",
        "eval/curves",
        "eval/evaluate",
        "eval/generate",
    )
    kinds = (*(f"python {script}.py" for script in scripts), "make ", "uv ", "wandb sync ")
    by_hand = ("source .venv/bin/activate", "python -m venv .venv", ".venv/bin/pip install -c constraints.txt")
    for command in COMMANDS:
        assert command.startswith(kinds + by_hand), command


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen commands
def test_prepare_train_and_compare(tmp_path: Path) -> None:
    """In the README's order and from a folder of the user's own: prepare, train, sweep, shard, resume, compare."""
    (tmp_path / "books").mkdir()
    for number in range(10):
        text = "\n".join(f"Chapter {line} of book {number}: {'many words ' * (line % 5)}" for line in range(400))
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    prepare = of("python data/prepare.py")
    assert len(prepare) == 3
    for command in prepare:
        _, script, name, *options = shlex.split(command)
        if name == "slimpajama":  # which needs the network
            assert load(name, options).max_tokens == 31_000_000_000
            continue
        done = run_script(script, name, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    resumable = None
    for command in of("python train/pretrain.py"):
        _, script, *arguments = shlex.split(command)
        if "--help" not in arguments:
            arguments = [argument.replace("devices=8", "devices=2") for argument in arguments]
            arguments = [f"resume={resumable}" if a.startswith("resume=") else a for a in arguments]
            arguments += ["tokens=640"] if f"resume={resumable}" in arguments else SHORT
            if not any(argument.startswith(("resume=", "data.path=")) for argument in arguments):
                arguments += [*LITTLE, f"data.name={tmp_path / 'little'}"]
        done = run_script(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        resumable = resumable or next(tmp_path.glob("runs/*/cla2-tiny-seed0"))
    command, _ = of("python eval/pareto.py")  # the other one: test_evaluate
    _, script, *arguments = shlex.split(command)
    done = run_script(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "context=4096" in command
    assert (tmp_path / "runs" / "pareto.png").exists()
    (command,) = of("python eval/curves.py")
    _, script, *arguments = shlex.split(command)
    done = run_script(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (command,) = of("python train/export.py")
    _, script, checkpoint, *arguments = shlex.split(command)
    assert checkpoint.endswith("/cla2-tiny-seed0")
    done = run_script(script, f"checkpoint={resumable}", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exported" / "cla2" / "modeling_kvfrontier.py").exists()


def test_import_and_uptrain(tmp_path: Path) -> None:
    """With a small model in place of the one that would be downloaded."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    config = transformers.GPTNeoXConfig(vocab_size=64, max_position_embeddings=32, rotary_pct=0.25, **small)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "EleutherAI" / "pythia-70m")
    for command in (*of("python train/import_hf.py"), *of("python train/uptrain.py")):
        _, script, *arguments = shlex.split(command)
        done = run_script(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "python train/pretrain.py" in done.stdout
    assert (tmp_path / "uptrained" / "pythia-70m" / "checkpoint.json").exists()


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """The plan on data that is there; the report from the rows of a study that are in the repository."""
    (command,) = of("python train/study.py")
    monkeypatch.chdir(tmp_path)
    launch_in_process(study.main, "study", StudyConfig, [*shlex.split(command)[2:], f"data.path={corpus}"])
    assert "30 runs of 5,000,000 tokens (10 layouts, 3 seeds)" in capsys.readouterr().out
    (command,) = of("python eval/study.py")
    rows = tmp_path / shlex.split(command)[2]
    rows.parent.mkdir(parents=True)
    shutil.copy(ROOT / "docs/results/shakespeare-char/neox.jsonl", rows)
    report.main(shlex.split(command)[2:])
    assert rows.with_name("report.html").exists()


def test_plan(tmp_path: Path) -> None:
    (command,) = of("python train/estimate.py")
    _, script, *arguments = shlex.split(command)
    done = run_script(script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout


def test_count(tmp_path: Path) -> None:
    for command in of("python eval/footprint.py"):
        _, script, *arguments = shlex.split(command)
        done = run_script(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "footprint" / "mixattention-1b.png").exists()


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Tasks, a text and a plot of both, on a run in the place that the commands name."""
    from eval import evaluate, generate, pareto

    command, compressed = of("python eval/evaluate.py")
    place = next(word for word in shlex.split(command) if word.startswith("checkpoint=")).removeprefix("checkpoint=")
    old = ROOT / "tests" / "golden" / "old"
    shutil.copytree(old / "run-mixattention", tmp_path / place)
    shutil.copytree(old / "data", tmp_path / "data")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. The rain fell in torrents. " * 20)
    monkeypatch.chdir(tmp_path)
    for command, main in (
        *((command, evaluate.main) for command in of("python eval/evaluate.py")),
        *((command, generate.main) for command in of("python eval/generate.py")),
        (of("python eval/pareto.py")[1], pareto.main),
    ):
        small = ["recall.pairs=2"] if main is evaluate.main else []  # whose sequences have room in a context of 32
        if command == compressed:
            small = [f"compressed.{word}" for word in ("pairs=2", "length=16", "windows=2", "sequences=2")]
        main([*shlex.split(command)[2:], *small])
    out = capsys.readouterr().out
    assert "difference to none, paired" in out
    assert "perplexity@book.txt/ppl" in out and "recall/zoology/accuracy" in out and "def " in out
    assert list((tmp_path / "runs").rglob("pareto.png"))


def test_measurements(tmp_path: Path) -> None:
    """The table names every script of train/benchmarks that is a command; tests of their own run them.

    Here their command lines are read: by their own parser, or composed by Hydra without running them.
    """
    commands = re.findall(r"^\| `(python train/benchmarks/[^`]+)`", TEXT, re.MULTILINE)
    named = {shlex.split(command)[1] for command in commands}
    behind_make = {f"train/benchmarks/{name}.py" for name in ("cpu", "gpu_suite", "faults")}
    scripts = (ROOT / "train" / "benchmarks").glob("*.py")
    assert named | behind_make == {str(p.relative_to(ROOT)) for p in scripts if "__main__" in p.read_text()}
    from train.benchmarks import bounded_study, decode_study, layouts, positions

    for command in commands:
        _, script, *arguments = shlex.split(command)
        if script.endswith("positions.py"):
            assert parse(positions.PositionsConfig, arguments, positional="runs").runs == ("runs/RUN",)
        elif script.endswith("bounded_study.py"):
            assert parse(bounded_study.Settings, arguments) == bounded_study.Settings()
        elif script.endswith("decode_study.py"):
            assert parse(decode_study.DecodeConfig, arguments) == decode_study.DecodeConfig()
        elif script.endswith("layouts.py"):
            with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                ConfigStore.instance().store(name="bench_layouts_schema", node=layouts.LayoutsConfig)
                assert compose("bench_layouts", arguments).archs == ["mha", "cla2"]
        else:
            assert not arguments


def test_wandb_sync_finds_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline folders lie in the folders of the runs, and each has the file that is sent."""
    from train.loggers import wandb_logger

    (command,) = of("wandb sync")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = PretrainConfig(load_arch("cla2"), load_size("tiny"), name="cla2-tiny")
    folder = tmp_path / "runs" / "2026-01-31_12-00-00" / "cla2-tiny-seed0"
    folder.mkdir(parents=True)
    wandb_logger(config, folder)
    wandb.finish()
    (found,) = tmp_path.glob(shlex.split(command)[-1])
    assert list(found.glob("run-*.wandb"))


def test_make_runs_what_it_says() -> None:
    """`make test` is what CI runs; the demo is two commands tested above, bench and gpu have tests of their own."""
    recipes = {
        "make demo": (
            "+size=tiny tokens=200_000 'evals={tasks: [perplexity]}' hydra.sweep.dir=runs/demo-",
            "+experiment=recall hydra.sweep.dir=runs/demo-",
            "/recall +arch=mha,gqa2,mqa,cla2,mixattention,block,bct",
            "/recall +arch=mha seed=1,2",
            "y=perplexity/ppl,recall/gap/accuracy baseline=mha",
        ),
        "make test": ("-m pytest",),
        "make bench": ("train/benchmarks/cpu.py +arch=gqa4 +size=20m", "train/benchmarks/decode_study.py size=20m"),
        "make gpu": ("train/benchmarks/gpu_suite.py",),
        "make faults": ("train/benchmarks/faults.py",),
        "make help": ("Makefile",),
    }
    assert set(re.findall(r"`?(make \w+)(?:`|   )", TEXT)) == set(recipes)
    for command, expected in recipes.items():
        words = [*command.split(), "-n"]
        recipe = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert all(part in recipe for part in expected), command
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_install_commands_resolve(tmp_path: Path) -> None:
    """What the by-hand commands ask for is what is installed; uv, where there is one, resolves it too."""
    command = [
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-c",
        "constraints.txt",
    ]
    done = subprocess.run([sys.executable, *command, "torch"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("uv") is None:
        pytest.skip("no uv on this machine")
    subprocess.run(["uv", "venv", str(tmp_path / "venv")], check=True)


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_layouts_shown_are_the_files() -> None:
    """The left column of the layouts' block is cla2.yaml, without its comments."""
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    left = [line[:46].rstrip() for line in block.splitlines()]
    shown = [line for line in left if line and not line.startswith("#") and not line.startswith("      ")]
    text = (ROOT / "configs" / "arch" / "cla2.yaml").read_text()
    written = [line.partition("  #")[0].rstrip() for line in text.splitlines() if not line.startswith("#")]
    assert shown[: len(written)] == written


def test_table_of_layouts_is_that_of_the_configs() -> None:
    assert updated(TEXT) == TEXT, (
        "a layout was added, changed or removed: run  python eval/readme.py  and commit README.md"
    )
    assert all(f"| `{name}` |" in TEXT for name in committed())


def test_a_layout_of_ones_own_is_not_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It turns no test red: what git does not track is passed over; without git every file counts."""
    from eval import readme

    assert set(committed()) <= set(names("arch"))
    monkeypatch.setattr(readme, "names", lambda group: [*names(group), "mine"])
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode == 0:
        assert "mine" not in readme.committed()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "mine" in readme.committed()


def test_the_example_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (path,) = re.findall(r'load\("([^"]+)"\)', code)
    old = ROOT / "tests" / "golden" / "old"
    shutil.copytree(old / "run-mixattention", tmp_path / path)
    shutil.copytree(old / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out
