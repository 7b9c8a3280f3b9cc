"""Pages under docs: the blocks of a page are executed in one namespace; every file that a page names exists."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, launch_in_process
from safetensors.torch import load_file

import arch
from arch import attend, attention, convert_formats, stores
from eval import footprint
from eval.tasks import TASKS
from train.estimates import activations
from train.hub import request, targets

PAGES = ("library", "extending", "recipes")


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


def cells(page: str) -> Iterator[tuple[str, str | None]]:
    """(code, output) of the Python blocks; the output is a text block right below, if there is one."""
    for found in re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text_of(page), re.DOTALL):
        yield found[1], found[2]


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a block as a notebook does; return the value of its last line if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "page", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "page", "eval"), names)


def run_page(page: str, capsys: pytest.CaptureFixture) -> tuple[dict[str, Any], list[Any]]:
    """Names and values after all blocks of a page, whose outputs must be those that it shows."""
    names: dict[str, Any] = {}
    values = []
    for code, shown in cells(page):
        capsys.readouterr()
        value = run_cell(code, names)
        values.append(value)
        if shown is not None:
            printed = capsys.readouterr().out
            assert (printed or f"{value}\n") == shown, code
    return names, values


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, `runs/mine`, and its data."""
    old = ROOT / "tests" / "golden" / "old"
    shutil.copytree(old / "run-mixattention", tmp_path / "runs" / "mine")
    shutil.copytree(old / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(page)):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target


def test_library(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    names, values = run_page("library", capsys)
    figures = [value for value in values if hasattr(value, "_repr_png_")]
    assert len(figures) == 2
    assert all(figure._repr_png_().startswith(b"\x89PNG") for figure in figures)
    assert not list(workplace.glob("*.png"))
    assert 0 < names["nats"].item() < 20
    assert names["wide"].plan.stores[0].slot.kv_heads == 2


REGISTRIES = (
    attend.BACKENDS,
    attention.STORE_MODULES,
    convert_formats.FORMATS,
    activations.ACTIVATIONS,
    TASKS,
    targets.TARGETS,
)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the page registers is gone after the test."""
    monkeypatch.setattr(stores, "KINDS", stores.KINDS)
    monkeypatch.setattr(request, "TARGET_NAMES", request.TARGET_NAMES)
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    if hasattr(arch.StoreConfig, "nested"):
        del arch.StoreConfig.nested


@torch.no_grad()
def test_extending(workplace: Path, registries: None, capsys: pytest.CaptureFixture) -> None:
    names, values = run_page("extending", capsys)
    # The kind of store: its cache is what the formula says, and decoding over it is the parallel pass.
    nested = arch.ArchConfig({"kv": names["kv"]}, ["new kv", "reuse kv"])
    model = arch.build(nested, "tiny", num_layers=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == arch.num_params(model.config, model.plan)
    assert arch.plan_from_dict(model.plan.to_dict()) == model.plan
    tokens = torch.randint(4096, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = model.allocate_cache(2, 9)
    assert cache.nbytes == arch.allocated_bytes(model.plan, 2, 9, itemsize=4)
    model.prefill(tokens[:, :5], cache)
    stepped = torch.cat([model.decode_step(tokens[:, i : i + 1], cache) for i in range(5, 9)], dim=1)
    torch.testing.assert_close(stepped, model(tokens)[:, 5:], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has keys that are parts of values"):
        convert_formats.FORMATS["stock"].to_hf(model.config)
    # The backend: equal to the definition, and refused what it does not claim.
    same = [arch.build("mha", "tiny", num_layers=2, backend=name) for name in ("products", "reference")]
    torch.testing.assert_close(same[0](tokens), same[1](tokens), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="products lacks gqa"):
        arch.build("mqa", "tiny", backend="products")
    # The export holds every weight, and its configuration says what it is.
    exported = load_file(workplace / "exported" / "plain" / "model.safetensors")
    read = convert_formats.read_config(json.loads((workplace / "exported" / "plain" / "config.json").read_text()))
    assert {weight.hf_name for weight in read.weights} == exported.keys()
    assert 0 <= values[-2] <= 1, "accuracy"
    assert set(json.loads((workplace / "results" / "decoding.json").read_text())["milliseconds"]) == {"mha", "cla2"}


def test_a_layout_from_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text, other = re.findall(r"```yaml\n(.*?)```", text_of("extending"), re.DOTALL)
    plan, reads_two = (
        arch.resolve(arch.model_config(arch.from_dict(arch.ArchConfig, yaml.safe_load(each)), "tiny", max_window=None))
        for each in (text, other)
    )
    assert plan.owners == (0, 0, 0, 3, 4, 4, 4, 7)
    assert str(reads_two) == "0 0s 0s 3 3/0 3/0 3+0 7"
    (tmp_path / "my" / "arch").mkdir(parents=True)
    (tmp_path / "my" / "arch" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    options = ["--config-dir=my", "+arch=mine", "+size=tiny", "picture=null"]
    launch_in_process(footprint.main, "footprint", footprint.FootprintConfig, options)
    assert "mine" in capsys.readouterr().out
