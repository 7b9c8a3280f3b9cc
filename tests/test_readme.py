"""Every command of the README is executed, shortened where it would take long; every file it names exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ARCHS, ROOT, run_script

from data.presets import load
from eval.readme import updated

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.strip().splitlines()]
SHORT = [
    "size.num_layers=2", "size.d_model=32", "size.num_heads=8", "size.d_ff=48", "size.vocab_size=4096",
    "size.seq_len=32", "batch_size=4", "tokens=512", "data.val_tokens=128", "trainer.accelerator=cpu", "logger=csv",
    "trainer.log_every=1",
]  # fmt: skip


def of(word: str) -> list[str]:
    found = [command for command in COMMANDS if word in command]
    assert found, f"README lost its commands with {word}"
    return found


def test_nothing_in_the_readme_is_left_out() -> None:
    """Each command is of a kind that a test below, or CI, executes."""
    scripts = ("train/pretrain", "train/estimate", "train/export", "train/import_hf", "train/uptrain", "data/prepare")
    scripts += ("eval/footprint", "eval/pareto", "eval/curves")
    kinds = (*(f"python {script}.py" for script in scripts), "make ", "uv ")
    by_hand = ("source .venv/bin/activate", "python -m venv .venv", ".venv/bin/pip install -c constraints.txt")
    for command in COMMANDS:
        assert command.startswith(kinds + by_hand), command


@pytest.mark.slow
def test_prepare_train_and_compare(tmp_path: Path) -> None:
    """In the README's order and from a folder of the user's own: prepare, train, sweep, shard, resume, compare."""
    (tmp_path / "books").mkdir()
    for number in range(600):
        text = "\n".join(f"Chapter {line} of book {number}: {'many words ' * (line % 5)}" for line in range(8))
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
            arguments += ["data=stdlib"] if any("cla_1b" in argument for argument in arguments) else []
            arguments += ["tokens=640"] if f"resume={resumable}" in arguments else SHORT
        done = run_script(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        resumable = resumable or next(tmp_path.glob("runs/*/cla2-tiny-seed0"))
    (command,) = of("python eval/pareto.py")
    _, script, *arguments = shlex.split(command)
    done = run_script(script, *arguments, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "context=4096" in command
    assert (tmp_path / "runs" / "pareto.png").exists()
    (command,) = of("python eval/curves.py")
    _, script, *arguments = shlex.split(command)
    done = run_script(script, *arguments, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (command,) = of("python train/export.py")
    _, script, checkpoint, *arguments = shlex.split(command)
    assert checkpoint.endswith("/cla2-tiny-seed0")
    done = run_script(script, f"checkpoint={resumable}", *arguments, cwd=tmp_path, fresh=True)
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
        done = run_script(script, *arguments, cwd=tmp_path, fresh=True)
        assert done.returncode == 0, done.stderr
        assert "python train/pretrain.py" in done.stdout
    assert (tmp_path / "uptrained" / "pythia-70m" / "checkpoint.json").exists()


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
    assert (tmp_path / "mixattention-1b.png").exists()


def test_make_runs_what_it_says() -> None:
    """`make test` is what CI runs; the demo is two commands tested above, bench and gpu have tests of their own."""
    recipes = {
        "make demo": (
            "train/pretrain.py -m +arch=mha,gqa4,mqa,cla2,mixattention,block,bct +size=tiny",
            "eval/pareto.py runs/demo-",
        ),
        "make test": ("-m pytest",),
        "make bench": ("train/benchmarks/cpu.py +arch=gqa4 +size=20m",),
        "make gpu": ("train/benchmarks/gpu_suite.py",),
    }
    assert set(of("make ")) == set(recipes)
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
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
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
    assert updated(TEXT) == TEXT, "run: python eval/readme.py"
    assert all(f"| `{name}` |" in TEXT for name in ARCHS)
