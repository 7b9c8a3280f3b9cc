"""The house: who may import whom, and what an entry point may be called."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from arch import convert_remote

PACKAGES = ("arch", "data", "eval", "train")
# Arrows of the house; every package may import itself.
MAY_IMPORT = {"arch": set(), "data": set(), "eval": {"arch", "data"}, "train": {"arch", "data", "eval"}}
# Commands of eval/ that open trained runs, whose format train/ knows. Nothing imports them: no arrow is turned round.
OPEN_RUNS = ("eval/evaluate.py", "eval/generate.py")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in the file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[package] | {package} | ({"train"} if str(path.relative_to(ROOT)) in OPEN_RUNS else set())
    for level, module in imports(path):
        root = module.partition(".")[0]
        folders = len(path.relative_to(ROOT).parts) - 1 if package == "arch" else 1
        assert level <= folders, f"{path}: relative imports have a single dot, or lead from a folder of arch/ to arch/"
        if level == 0 and root in PACKAGES:
            assert root in allowed, f"{path} imports {root}"
        assert f"{module.replace('.', '/')}.py" not in OPEN_RUNS, f"{path} imports the command {module}"
        if package == "arch":
            assert level >= 1 or root in {"torch", "einops"} | sys.stdlib_module_names, f"{path} imports {module}"


# Rooms of train/, and those that each knows. Commands know them all; training itself asks the estimates for the size of
# its micro-batches, and they know of it the schema alone.
ROOMS = {"hub": set(), "benchmarks": {"estimates"}, "studies": set(), "estimates": set()}
TRAINING_KNOWS = {"estimates"}
COMMANDS = ("pretrain", "export", "import_hf", "uptrain", "estimate", "study")


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_of_train(path: Path) -> None:
    place = path.relative_to(ROOT / "train").parts
    here = place[0] if len(place) > 1 else path.stem
    for _, module in imports(path):
        parts = module.split(".")
        if parts[0] != "train" or len(parts) < 2 or here in COMMANDS:
            continue
        assert parts[1] not in COMMANDS, f"{path} imports the command {module}"
        assert parts[1] not in ROOMS or parts[1] in ROOMS.get(here, TRAINING_KNOWS) | {here}, f"{path} imports {module}"
        assert here != "estimates" or parts[1] in ("estimates", "schema"), f"{path} imports {module}"


def test_arch_is_flat_and_relative() -> None:
    """But for what is done to caches at evaluation: no model knows of it, and no exported folder has it."""
    folders = {path.name for path in (ROOT / "arch").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders <= {"compression"}
    for path in (ROOT / "arch").glob("*.py"):
        assert not [module for _, module in imports(path) if module.partition(".")[0] == "compression"], path
    for path in (ROOT / "arch").glob("*.py"):
        assert not [module for level, module in imports(path) if level == 0 and module.partition(".")[0] == "arch"], (
            path
        )


def test_what_goes_with_an_export_needs_nothing_of_ours() -> None:
    """transformers copies the files flat, follows `from .sibling import`, and asks the user to install the rest."""
    for name in convert_remote.FILES:
        for level, module in imports(ROOT / "train" / "hf" / name):
            if level:
                assert f"{module}.py" in convert_remote.FILES, f"{name} imports .{module}"
            else:
                root = module.partition(".")[0]
                assert root in {"torch", "transformers"} | sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("module", ["config", "plan", "footprint"])
def test_layouts_and_counts_need_no_torch(module: str) -> None:
    """Loaded as single files, as an export does, so that the package's own __init__ does not bring torch in."""
    code = f"""
import importlib.util, sys, types
package = types.ModuleType("arch"); package.__path__ = [{str(ROOT / "arch")!r}]; sys.modules["arch"] = package
import arch.{module}
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arch_imports_with_torch_and_einops_alone() -> None:
    """Everything else that is installed for this project is blocked."""
    code = f"""
import sys
class Block:
    names = {{"lightning", "hydra", "omegaconf", "wandb", "tokenizers", "transformers", "matplotlib", "plotly", "rich",
             "pandas", "datasets", "yaml", "train", "data", "eval"}}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(ROOT)!r})
import arch, arch.footprint
size = arch.SizeConfig(num_layers=2, d_model=16, num_heads=2, d_ff=16, vocab_size=11)
config = arch.ModelConfig(arch.ArchConfig({{"kv": arch.StoreConfig(kv_heads=1)}}, ["new kv", "reuse kv"]), size)
model = arch.Decoder(config); model.init_weights()
assert len(arch.generate(model, [[1, 2]], 3)[0]) == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_shadow_nothing() -> None:
    """`python train/x.py` puts train/ first on the path for a moment; tests/ must not become a package."""
    assert not (ROOT / "tests" / "__init__.py").exists()
    forbidden = {*PACKAGES, "tests", "configs", "torch", "lightning", "hydra", "wandb", "datasets"}
    forbidden |= set(sys.stdlib_module_names)
    for path in FILES:
        assert path.stem not in forbidden, path


def test_packages_are_those_of_this_repository() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(PACKAGES)
    for package in PACKAGES:
        module = __import__(package)
        assert Path(module.__file__).parent == ROOT / package


def test_top_level() -> None:
    """The user fixed it: eight names, and what may join them."""
    allowed = {
        "pyproject.toml",
        *PACKAGES,
        "configs",
        "tests",
        "README.md",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "docs",
    }
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_importing_a_script_leaves_the_path_alone() -> None:
    code = f"import sys; sys.path.insert(1, {str(ROOT)!r}); before = list(sys.path)\n"
    code += "import data.prepare, eval.evaluate, eval.footprint, eval.pareto\n"
    code += "import train.export, train.estimate, train.pretrain\n"
    code += "assert sys.path == before"
    subprocess.run([sys.executable, "-c", code], check=True)
