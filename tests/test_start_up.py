"""Help, mistakes and footprints are answered before anything heavy is imported; how OpenMP's threads wait."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"torch", "lightning", "torchmetrics", "transformers", "wandb", "matplotlib", "plotly", "pandas", "datasets"}
TINY = "+arch=cla2 +size=tiny"


CASES = [
    ("train/pretrain.py --help", 0, "Pretrain a language model"),
    (f"train/pretrain.py {TINY} tokns=4096", 2, "did you mean tokens?"),
    (f"train/pretrain.py {TINY} +trainer.devces=2", 2, "did you mean devices?"),
    ("train/pretrain.py +arch=cla2", 2, "choose +size= one of"),
    (f"train/pretrain.py {TINY} trainer.strategy=zero", 2, "choose auto, ddp, fsdp"),
    (f"train/pretrain.py {TINY} 'arch.pattern=[reuse kv]'", 2, "layer 0"),
    (f"train/pretrain.py {TINY} data.path=/nowhere", 2, "/nowhere holds no prepared data"),
    ("train/pretrain.py resume=nowhere", 2, "config.yaml is missing"),
    ("train/estimate.py --help", 0, "Does a training run fit"),
    (f"train/estimate.py {TINY} gpu=abacus", 2, "does not know its peak"),
    (f"train/estimate.py {TINY} gpu=h100", 0, "verdict: fits"),
    ("train/export.py --help", 0, "Hugging Face"),
    ("train/export.py", 2, "give checkpoint="),
    ("train/export.py checkpoint=arch out=nowhere dtype=fp8", 2, "choose fp32, bf16"),
    ("train/export.py checkpoint=arch out=nowhere target=gguf", 2, "choose auto, stock, remote, shipped"),
    ("train/import_hf.py --help", 0, "Hugging Face"),
    ("train/import_hf.py from=somewhere out=arch", 2, "is there already"),
    ("train/uptrain.py --help", 0, "Block Transformer"),
    ("train/uptrain.py out=nowhere", 2, "from= is not set"),
    ("train/study.py --help", 0, "Compare layouts"),
    ("train/study.py +study=cpu others=mix", 2, "choose refuse, keep, ignore"),
    ("eval/study.py --help", 0, "Student's t"),
    ("eval/study.py nowhere/results.jsonl", 2, "there is no such file"),
    ("data/prepare.py --help", 0, "Turn text into token shards"),
    ("eval/footprint.py +size=1b", 0, "mixattention"),
    (f"eval/footprint.py {TINY} picture=null", 0, "cla2"),
    ("eval/footprint.py hf=gemma-3-1b picture=null", 0, "139 MiB"),
    ("eval/footprint.py hf=nowhere", 2, "Give a config.json"),
    ("eval/pareto.py --help", 0, "bytes per element"),
    ("eval/pareto.py runs itemsze=4", 2, "did you mean itemsize?"),
    ("eval/evaluate.py --help", 0, "perplexity."),
    ("eval/evaluate.py checkpoint=nowhere perplexity.strde=3", 2, "did you mean stride?"),
    ("eval/evaluate.py checkpoint=runs/nowhere", 2, "there is no such folder"),
    ("eval/evaluate.py checkpoint=nowhere cache=none,int5", 2, "codecs are bf16"),
    ("eval/evaluate.py checkpoint=nowhere cache=int4 tasks=perplexity", 2, "tasks that run over a cache (compressed)"),
    ("eval/generate.py checkpoint=nowhere cache=snapvk@25%", 2, "keeps (with a budget"),
    ("eval/generate.py --help", 0, "Continue text with a model"),
    ("eval/generate.py checkpoint=runs/nowhere prompt=x", 2, "there is no such folder"),
    ("eval/curves.py --help", 0, "wall, or cpu"),
    ("eval/curves.py nowhere", 2, "is not a folder"),
]
# In one process, one after the other: what one imports, the next would not be blamed for.
ALL_AT_ONCE = """
import contextlib, io, json, runpy, sys, traceback
heavy, answers = set(json.loads(sys.argv[1])), []
for script, *arguments in json.loads(sys.argv[2]):
    sys.argv, code, before = [script, *arguments], 0, set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    answers.append((code, out.getvalue(), sorted(heavy & set(sys.modules) - before)))
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, output and heavy imports of every command of CASES."""
    commands = [command for command, _, _ in CASES]
    arguments = [json.dumps(sorted(HEAVY)), json.dumps([shlex.split(command) for command in commands])]
    done = subprocess.run([sys.executable, "-c", ALL_AT_ONCE, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("command", "code", "message"), CASES)
def test_answers_without_heavy_imports(
    command: str, code: int, message: str, answers: dict[str, tuple[int, str, list[str]]]
) -> None:
    ended, output, imported = answers[command]
    assert ended == code, output
    assert message in output
    assert not imported


def test_names_checked_early_are_those_of_the_export() -> None:
    from train.hub import request, targets

    assert tuple(targets.TARGETS) == request.TARGET_NAMES


def test_waiting_threads_sleep_unless_the_user_chose_otherwise() -> None:
    assert "OMP_WAIT_POLICY" in os.environ, "tests set it before torch is imported, too"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    program = "import os, sys, train; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    for chosen, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment | chosen
        )
        assert done.stdout.strip() == expected, done.stderr
