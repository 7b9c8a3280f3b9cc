"""Every layout of configs/arch at a small size, the parameter of most tests; Block Transformers: test_arch_block.py."""

import atexit
import copy
import gc
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Workers share the cores: one thread each, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A compiler that knows the processor's vectors; to ask it takes 14 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # a tenth of a small run

import train  # noqa: F401  before torch

# isort: split
import pytest
import torch
from fork_server import BLANK, MODULES, blank, connect, place_modules
from safetensors.torch import load_file

import data.corpora
from arch import ArchConfig, LanguageModel, ModelConfig, SizeConfig, allocate, resolve
from arch import build as build_model
from arch.named import load_arch, names
from arch.static_step import StaticStep
from data.config import PrepareConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare
from train.checkpoint import checkpoints
from train.parallel import keep_einops_whole

ROOT = Path(__file__).resolve().parents[1]
ARCHS = names("arch")
BLOCKS = [name for name in ARCHS if load_arch(name).block is not None]
DECODERS = [name for name in ARCHS if name not in BLOCKS]
SIZES = names("size")
WINDOW = 6
DEPTH = 5  # few tiles divide it
SHIM = str(ROOT / "tests" / "forked_python.py")

# Where transformers copies the code of exported models to.
os.environ[MODULES] = tempfile.mkdtemp(prefix="kvfrontier-modules-")
atexit.register(shutil.rmtree, os.environ[MODULES], ignore_errors=True)
place_modules()
os.environ.setdefault(BLANK, "1")
# In place of pytest's log_level, which tells each of some thousand loggers twelve times a test.
logging.getLogger().setLevel(logging.INFO)
torch.set_num_threads(1)  # the models are small; tests compare runs bit for bit
keep_einops_whole()  # in blocks that tests compile, as in training


def small(arch: ArchConfig | str, *, window: int | None = WINDOW, **changes: object) -> ModelConfig:
    """`arch` at a size for tests: the least depth at which all of it occurs, windows and slots cut to `window`, weights
    large enough that a wrong slot shows."""
    layout = load_arch(arch) if isinstance(arch, str) else copy.deepcopy(arch)
    size = SizeConfig(
        num_layers=whole_depth(arch) if isinstance(arch, str) else DEPTH,
        d_model=32,
        num_heads=8,
        head_dim=8,
        d_ff=48,
        vocab_size=61,
        seq_len=32,
        init_std=0.2,
        max_window=window,
    )
    for key, value in changes.items():
        setattr(size, key, value)
    return ModelConfig(layout, size)


@cache
def whole_depth(name: str, least: int = DEPTH) -> int:
    """At least `least` layers, and as many as it takes until every item of the pattern occurs."""
    arch = load_arch(name)
    if name in BLOCKS:
        return least // 2 * 2
    wanted = {(match[1], match[2]) for match in re.finditer(r"(new|reuse) (\w+)", str(arch.pattern))}
    for depth in range(least, 40):
        plan = resolve(ModelConfig(arch, SizeConfig(num_layers=depth)))
        found = {
            ("new" if owner == layer else "reuse", plan.store(layer).name) for layer, owner in enumerate(plan.owners)
        }
        if found == wanted:
            return depth
    raise AssertionError(f"{name} never shows all of its pattern")


@cache
def kinds(name: str, **size: int) -> list[str]:
    """The kind of each block of a layout, as far as the code tells kinds apart: of key/value heads only whether queries
    share them, of angles only whether there are any. Everything else of a store makes a kind of its own."""
    found = []
    config = small(name, **size)
    for number, stack in enumerate(resolve(config).stacks):
        plan = stack.plan
        for layer, owner in enumerate(plan.owners):
            store = plan.store(layer)
            spec = asdict(replace(store, owner=0, name="", rope_theta=float(store.rope_theta > 0)))
            spec["slot"]["kv_heads"] = min(1, store.slot.kv_heads) + (store.slot.kv_heads >= config.size.num_heads)
            second = plan.second_read(layer)
            reads = (plan.own_window(layer) is not None, second and second.how)
            found.append(f"{number} {owner == layer} {type(store).__name__} {spec} {reads}")
    return found


def covering(layouts: Iterable[str]) -> dict[str, set[str]]:
    """Those of `layouts` that together have every kind of block, each with the kinds that none before it has: where a
    test takes long and a kind decides what it finds."""
    missing = {name: set(kinds(name)) for name in layouts}
    chosen: dict[str, set[str]] = {}
    while any(missing.values()):
        best = max(missing, key=lambda name: len(missing[name]))
        chosen[best] = missing[best]
        missing = {name: rest - chosen[best] for name, rest in missing.items()}
    return chosen


def build(config: ModelConfig, dtype: torch.dtype = torch.float64, backend: str = "auto") -> LanguageModel:
    """In fp64, so that two ways of computing the same thing agree to rounding and nothing else passes."""
    return build_model(config, backend=backend, seed=1).to(dtype).eval()


@cache
def shared(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """`build(small(name))`, one for all tests of this process, which only read it."""
    return build(small(name), dtype)


def tokens(batch: int, length: int, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(batch * 1000 + length))


class Counted:
    """Follows a generation: keeps what it is given, and ends the prompt of number n after n + 1 tokens."""

    def __init__(self) -> None:
        self.given: defaultdict[int, list[int]] = defaultdict(list)

    def __call__(self, new: Mapping[int, int]) -> list[int]:
        for number, token in new.items():
            self.given[number].append(token)
        return [number for number in new if len(self.given[number]) == number + 1]


def assert_decoding_is_the_forward(model: LanguageModel, starts: list[int] | None) -> None:
    """Three rows that begin at `starts`, in chunks that end anywhere, plain steps and static steps."""
    batch = tokens(3, 23)
    start_B = None if starts is None else torch.tensor(starts)
    with torch.no_grad():
        alone = [model(batch[row : row + 1, start:]) for row, start in enumerate(starts or [0, 0, 0])]
        for cuts in ([0, 23], [0, 7, 8, 14, 23], [0, 12], [0, 3]):
            cache = allocate(model.plan, 3, 23, dtype=torch.float64, start_B=start_B)
            parts = [model(batch[:, begin:end], cache) for begin, end in pairwise(cuts)]
            last = cuts[-1]
            if len(cuts) == 2 and last < 23:
                plain = (last + 23) // 2
                parts += [model(token, cache) for token in batch[:, last:plain].split(1, dim=1)]
                step = StaticStep(model, cache, "static")
                parts += [step(token) for token in batch[:, plain:].split(1, dim=1)]
            logits = torch.cat(parts, dim=1)
            for row, expected in enumerate(alone):
                begin = 23 - expected.shape[1]
                torch.testing.assert_close(logits[row, begin:], expected[0], rtol=0, atol=1e-10)


def assert_documents_are_apart(model: LanguageModel) -> None:
    """Each of four documents in a row gives the logits that it has alone."""
    lengths = [7, 1, 12, 3]
    batch = tokens(1, sum(lengths))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        together = model(batch, segment_ids_BT=ids).split(lengths, dim=1)
        for document, found in zip(batch.split(lengths, dim=1), together, strict=True):
            torch.testing.assert_close(found, model(document), rtol=0, atol=1e-10)


KINDS = list(covering(DECODERS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Workers are forks of one process that has imported the packages (a fork cannot use CUDA that was looked at).
    Meanwhile this one imports the tests, whose assertions would else be rewritten by each worker."""
    if sys.platform == "linux" and torch.version.cuda is None:
        os.environ["FORK_SERVER"] = forked_python()["FORK_SERVER"]
        for spec in specs:
            spec.python = SHIM
    asked = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    for path in sorted(ROOT.glob("tests/test_*.py")):
        if asked & {path, *path.parents}:
            with suppress(Exception, pytest.skip.Exception):  # which the workers, that import it too, report
                importlib.import_module(path.stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported lives as long as the process: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DECODERS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def shared_model(arch: str) -> Iterator[LanguageModel]:
    """The model of `shared`, looked at again after the test: one that changes a model builds its own."""
    model = shared(arch)
    yield model
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def documents() -> Iterator[tuple[str, str]]:
    """A small corpus with something to learn and more than ASCII."""
    for n in range(600):
        text = f"def function_{n}(x):\n    return x * {n}  # naïve {'ä' * (n % 3)}\n"
        yield ("val", "test", "train", "train")[n % 4], text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared shards of `documents`, with a vocabulary of 600."""
    data.corpora.CORPORA["unit"] = documents
    path = tmp_path_factory.mktemp("data") / "unit"
    source, tokenizer = SourceConfig(corpus="unit"), TokenizerConfig(vocab_size=600)
    prepare(PrepareConfig(path=str(path), name="unit", source=source, tokenizer=tokenizer, workers=1))
    yield path
    del data.corpora.CORPORA["unit"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's newest checkpoint."""
    folder = checkpoints(run)[0]
    tensors = load_file(next(folder.glob("*.safetensors")))
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a test that does not look at them: drawing takes longer than what it looks at."""
    for picture in ("pareto.draw_panels", "pareto.plot_pareto_html", "curves.draw_curves"):
        monkeypatch.setattr(f"eval.plots.{picture}", blank)


def launch_in_process(task: Callable, name: str, schema: type, arguments: list[str]) -> None:
    """A script's command line, without the seconds that a new process takes to import torch.

    The error of a task that fails is raised as it is. Pictures of runs are blank: they would take half of the time.
    """
    from data.cli import TaskError
    from eval.cli import launch

    argv = sys.argv
    sys.argv = [f"{name}.py", *arguments]
    try:
        with patch("eval.plots.pareto.draw_panels", blank), patch("eval.plots.pareto.plot_pareto_html", blank):
            launch(task, name, schema)
    except SystemExit as ended:
        if isinstance(ended.__context__, TaskError):
            raise ended.__context__ from None
        raise
    finally:
        sys.argv = argv


def process_environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell, without what tests that train in this process leave in it."""
    ours = {"PYTHONPATH", "PL_GLOBAL_SEED", "WANDB_SERVICE", "WANDB_MODE"}
    return {key: value for key, value in os.environ.items() if key not in ours} | changes


def start_script(
    script: str | Path,
    *arguments: str,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.Popen[str]:
    """A script in a process of its own, as typed; with `fresh`, in a new interpreter too, which takes seconds."""
    start = subprocess.Popen if fresh else connect(process_environment())
    return start(
        [sys.executable, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=process_environment(**(environment or {})),
    )


def forked_python() -> dict[str, str]:
    """The environment by which train/launch starts forks in place of interpreters, if the system allows it."""
    if sys.platform != "linux":
        return {}
    return {"PYTHON": SHIM, "PYTHON_EXEC": SHIM, "FORK_SERVER": connect(process_environment()).address}


def run_script(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script as of `start_script`, until it ends."""
    with start_script(script, *arguments, **options) as process:
        try:
            out, errors = process.communicate(timeout=240)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
