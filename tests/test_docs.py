"""Pages under docs: the blocks of a page are executed in one namespace; every file that a page names exists."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PAGES = ("library", "recipes")


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
