"""Command lines with Hydra: mistakes are one line, words are taken as typed, and help explains every key."""

import errno
import inspect
import random
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from conftest import launch_in_process
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from arch import ArchConfig, LayoutError
from data.cli import TaskError, UsageError, word
from data.files import DataError
from eval.cli import launch
from eval.footprint import FootprintConfig
from eval.help import explanations
from eval.outcome import run_script
from eval.overrides import as_typed
from train.benchmarks.cpu import BenchConfig
from train.benchmarks.layouts import LayoutsConfig
from train.errors import TrainingError
from train.estimate import EstimateConfig
from train.hub.request import ExportConfig
from train.import_hf import ImportConfig
from train.schema import PretrainConfig
from train.uptrain import UptrainConfig

TINY = ["+arch=cla2", "+size=tiny"]


def resolved(*arguments: str) -> PretrainConfig:
    """The configuration that a task gets; nothing is trained."""
    found = []
    launch_in_process(
        lambda config, _: found.append(OmegaConf.to_object(config)), "pretrain", PretrainConfig, [*arguments]
    )
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=???"], "name"),
        (["seed=${nope}"], "Interpolation key 'nope' not found"),
        (["seed=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
        (["seed=abc"], "'abc' of type 'str' could not be converted to Integer"),
        (["seed=1.5"], "could not be converted to Integer"),
        (["=1"], "cannot read '=1'; write key=value"),
        (["seed"], "cannot read 'seed'; write key=value"),
        (["seed=1", "--resolve"], "--resolve"),
        (["--cfg", "job", "-m"], "Only one of"),
        (["--cfg"], "--cfg"),
        (["--tokens", "5"], "no flag --tokens; options are written key=value"),
        (["hydra.run.dir=/proc/x"], "/proc/x"),
        (["arch.pattern=[new kv"], "cannot read arch.pattern=[new kv: brackets"),
        (["arch.stores.kv={kv_heads: 1"], "brackets, quotes and braces come in pairs"),
        (["seed='1"], "cannot read seed='1"),
        (["+size=1"], "Could not find 'size/1', did you mean 1b? size is one of 125m, 1b"),
        (["+arch=cla22"], "Could not find 'arch/cla22', did you mean cla2?"),
        (["+experiment=125"], "Could not find 'experiment/125'"),
        (["logger=1e3"], "Could not find 'logger/1e3'"),
        (["logger=wandbb"], "Could not find 'logger/wandbb', did you mean wandb?"),
        (["arch=cla2"], "use +arch=cla2"),
        (["resume=runs/x", "arch=mha"], "arch=mha: a resumed run keeps its layout"),
        (["tokns=5"], "unknown key tokns, did you mean tokens?"),
        (["lr=1"], "unknown key lr, did you mean size.lr or optim.lr?"),
        (["arch.pattern=[+size=tiny, b]"], """write 'arch.pattern=["+size=tiny",b]'"""),
        (["arch.stores.kv.latent=32"], "a section belongs there: latent: {dim: 32}"),
        (
            ["+arch=mla", "+size=tiny", "arch.stores={mem: {}}"],
            "'mem' is not in struct. To append to your config use +",
        ),
        (["arch.block=${seed}"], "arch.block"),
        (["seed=1,2"], "seed"),
        (["~nothing"], "nothing"),
        (["seed=range(1"], "cannot read seed=range(1"),
        (["optim=${seed}"], ""),
        (["tokens=1e400"], "tokens"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture) -> None:
    chosen = [] if any("arch=" in argument or "size=" in argument for argument in arguments) else TINY
    with pytest.raises(SystemExit) as stopped:
        resolved(*chosen, *arguments)
    captured = capfd.readouterr()
    assert stopped.value.code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert captured.out == ""


def test_a_mistake_in_a_file_of_ones_own_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "arch").mkdir()
    (tmp_path / "arch" / "mine.yaml").write_text("stores: {kv: {latent: 32}}\npattern: [new kv]")
    with pytest.raises(SystemExit):
        resolved(f"--config-dir={tmp_path}", "+arch=mine", "+size=tiny")
    text = "error: In 'arch/mine': arch.stores.kv.latent: a section belongs there: latent: {dim: 32}\n"
    assert capfd.readouterr().err == text


def test_an_error_of_the_task_itself_is_not_hidden() -> None:
    def task(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        launch_in_process(task, "pretrain", PretrainConfig, TINY)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("too small"), 2, "too small"),
        (DataError("no data"), 2, "no data"),
        (LayoutError(["layer 0 reads nothing"]), 2, "layer 0 reads nothing"),
        (TaskError("no network"), 1, "no network"),
        (TrainingError("diverged"), 1, "diverged"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left"), None, ""),
        (ZeroDivisionError("a bug"), None, ""),
    ],
)
def test_every_command_ends_in_the_same_way(
    error: Exception, code: int | None, message: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Hydra or without; a defect keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *TINY])

    def task(*_: object) -> None:
        raise error

    for run in (lambda: run_script(task), lambda: launch(task, "pretrain", PretrainConfig)):
        with pytest.raises(SystemExit if code else type(error)) as ended:
            run()
        if code:
            assert (ended.value.code, capfd.readouterr().err) == (code, f"error: {message}\n")


def test_interrupted_before_training(capfd: pytest.CaptureFixture) -> None:
    def task(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        launch_in_process(task, "pretrain", PretrainConfig, TINY)
    assert (stopped.value.code, capfd.readouterr().err) == (130, "error: interrupted\n")


def test_flags_stand_anywhere_and_runs_of_a_sweep_are_counted(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    seeds = []
    arguments = ["+arch=cla2,mha", "-m", "+size=tiny", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    launch_in_process(lambda config, _: seeds.append(config.seed), "pretrain", PretrainConfig, arguments)
    assert seeds == [1, 2, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run 1 of 4: +arch=cla2 +size=tiny seed=1")
    assert lines[3].startswith("run 4 of 4: +arch=mha +size=tiny seed=2")


def test_a_run_that_fails_does_not_end_its_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """They are named at the end; a bug is raised then. Only the first process of a run announces it."""
    seeds, errors = [], {2: UsageError("too small"), 3: TaskError("diverged"), 5: ZeroDivisionError("a bug")}

    def task(config: DictConfig, _: object) -> None:
        seeds.append(config.seed)
        if config.seed in errors:
            raise errors[config.seed]

    arguments = ["-m", "+arch=mha", "+size=tiny", f"hydra.sweep.dir={tmp_path}", "seed=1,2,3,4"]
    with pytest.raises(SystemExit) as stopped:
        launch_in_process(task, "pretrain", PretrainConfig, arguments)
    assert stopped.value.code == 1 and seeds == [1, 2, 3, 4]
    shown = capsys.readouterr()
    assert shown.out.count("run ") == 4
    lines = shown.err.splitlines()
    assert lines[:4] == ["error: too small", "error: diverged", "error:", "2 of the runs of the sweep failed:"]
    assert [line.split()[-1] for line in lines[4:]] == ["seed=2", "seed=3"]
    with pytest.raises(ZeroDivisionError):
        launch_in_process(task, "pretrain", PretrainConfig, [*arguments[:-1], "seed=5,1"])
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setenv("RANK", "1")
        patched.setenv("WORLD_SIZE", "2")
        launch_in_process(task, "pretrain", PretrainConfig, [*arguments[:-1], "seed=2,1"])
    assert stopped.value.code == 2 and seeds == [1, 2, 3, 4, 5, 1, 2]
    assert "run " not in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)  # WORLD_SIZE is taken away after a run
        launch_in_process(task, "pretrain", PretrainConfig, [*arguments[:-1], "seed=2,1"])
    assert stopped.value.code == 2 and seeds == [1, 2, 3, 4, 5, 1, 2, 2]


TEXTS = [
    "plain", "runs/2026-01-31_12-00-00/cla2-tiny-seed0", "1e-3", "007", "1_000", "null", "True", "nan", "-inf",
    "lr=1e-3", "a b", " a", "b ", "é中", "a,b", "x[1]", "[/]", "{a: b}", "(x)", "~", "~/x", "#1", "a #b", "a: b",
    "$HOME", "${seed}", r"\${x}", r"\\${x}", "a\\", r"a\\", r"\'", r'\"', "'", '"', "'a'", '"b"', """it's "so" """,
    "*?", "!x", "@y", "%z", "a\tb", "a\nb", "-x", "--help", "+x", ".", "..", "<&>|;`", "$(rm)", "range(1,3)",
    r"back\slash", r"\n", "=", "a=b=c",
]  # fmt: skip


def test_a_printed_command_is_read_as_it_was_meant() -> None:
    """Through a shell and Hydra's grammar, for these texts and random ones of their characters."""
    parser = OverridesParser.create()
    chance = random.Random(0)
    letters = "".join(TEXTS) + "'\"\\${}[]=,"
    texts = TEXTS + ["".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(600)]
    for text in texts:
        (typed,) = shlex.split(word("resume", text))
        assert as_typed([typed], PretrainConfig, sweep=False) == [typed], "it needs no more quotes"
        value = parser.parse_override(typed).value()
        assert isinstance(value, str)
        config = OmegaConf.create({"seed": 3, "x": 1, "resume": value})
        assert config.resume == text, (text, typed)
    assert word("resume", TEXTS[1]) == f"resume={TEXTS[1]}", "plain ones stay readable"


@pytest.mark.parametrize(
    "text", ["lr=1e-3", "007", "1e-3", "true", "[/]", "[red]x[/bold]", "é", "a(b|c)", "x{1}", "a~b", "x#1", "run: 2"]
)
def test_text_is_taken_as_typed(text: str) -> None:
    (word,) = as_typed([f"train_only={text}"], PretrainConfig, sweep=False)
    assert OverridesParser.create().parse_override(word).value() == text


def test_words_that_hydra_would_read_otherwise_reach_the_task() -> None:
    config = resolved(*TINY, "name=[red]x[/bold]", "folder=1e-3", "train_only=(a|b)", "data.path=runs/lr=1e-3")
    assert (config.name, config.folder, config.train_only) == ("[red]x[/bold]", "1e-3", "(a|b)")
    assert config.data.path == "runs/lr=1e-3"


def test_what_hydra_means_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()

    def words(*typed: str, sweep: bool = False) -> list[str]:
        return as_typed(typed, PretrainConfig, sweep)

    same = ["name=null", "name='a b'", 'name="x"', "name=x-${seed}", "seed=1", "seed=007", "data=stdlib", "+arch=cla2",
            "+experiment=[a,b]", "~logger", "name=", "tokens=1e6", "name=a,c", "arch.pattern=[new kv]"]  # fmt: skip
    assert words(*same) == same
    sweeps = ["name=a,b", "optim.name=adamw,muon", "trainer.backend=choice(a,b)"]
    assert words(*sweeps, sweep=True) == sweeps
    assert words("folder=a,b") == ["folder='a,b'"], "it exists"


SCHEMAS = {
    "pretrain": PretrainConfig, "estimate": EstimateConfig, "export": ExportConfig, "uptrain": UptrainConfig,
    "import_hf": ImportConfig, "footprint": FootprintConfig, "bench": BenchConfig, "bench_layouts": LayoutsConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_explains_every_key(name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the most columns it takes: without a terminal there are 80, which break more lines."""
    monkeypatch.setenv("COLUMNS", "120")
    schema = SCHEMAS[name]
    launch_in_process(lambda *_: None, name, schema, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 120
    own = schema.__annotations__ if schema is EstimateConfig else {field.name for field in fields(schema)}
    for field in fields(schema):
        if field.name not in own or is_dataclass(field.type):
            continue
        key = "from" if field.name == "source" else field.name
        (line,) = [line for line in lines if line.startswith(f"{key}: ")]
        assert len(line.partition(": ")[2].partition("  ")[2].strip()) > 5, line


def test_sections_of_the_help(capsys: pytest.CaptureFixture) -> None:
    launch_in_process(lambda *_: None, "pretrain", PretrainConfig, ["--help", "+size=1b", "optim.lr=0.5"])
    out = capsys.readouterr().out
    for text in ("optim:\n", "  warmup: 0.05 ", "  lr: 0.5 ", "  num_layers: 20 ", "trainer:\n", "train/schema.py"):
        assert text in out, text


def test_every_field_of_a_schema_is_explained() -> None:
    for schema in (*SCHEMAS.values(), ArchConfig, *(field.default_factory for field in fields(PretrainConfig))):
        if not is_dataclass(schema) or schema.__name__ == "DataConfig":
            continue
        known = explanations(schema)
        for field in fields(schema):
            if not is_dataclass(field.type):
                assert known.get(field.name), f"{schema.__name__}.{field.name} in {inspect.getsourcefile(schema)}"
