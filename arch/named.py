"""Layouts and sizes by name: the files of configs/arch and configs/size in the checkout that this package lies in.

PyYAML is looked up when a file is read and never imported: everything else here must run without it, also in exported
folders, where no name is known.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from .config import ArchConfig, ModelConfig, SizeConfig, from_dict
from .store_spec import LayoutError


class UnknownNameError(LayoutError):
    """A layout, a size or a key of one that does not exist; the message is one line, with the nearest that does."""

    def __init__(self, problem: str):
        super().__init__([problem])
        self.args = (problem,)


CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def names(group: str) -> list[str]:
    """The files of a config group: `arch`, `size` or another folder of configs."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def load_arch(name: str) -> ArchConfig:
    """The layout in `configs/arch/<name>.yaml`. Raises UnknownNameError if there is none."""
    return from_dict(ArchConfig, _read("arch", "layout", name))


def load_size(name: str) -> SizeConfig:
    """The size in `configs/size/<name>.yaml`. Raises UnknownNameError if there is none."""
    return from_dict(SizeConfig, _read("size", "size", name))


def model_config(arch: ArchConfig | str, size: SizeConfig | str, **changes: Any) -> ModelConfig:
    """A layout at a size, each given by name or as an object; `changes` are keys of the size, as in `num_layers=4`.

    Raises UnknownNameError on a name or a key that does not exist.
    """
    size = load_size(size) if isinstance(size, str) else size
    known = [field.name for field in fields(SizeConfig)]
    for key in changes:
        if key not in known:
            raise UnknownNameError(f"a size has no {key}{nearest(key, known)}")
    return ModelConfig(load_arch(arch) if isinstance(arch, str) else arch, replace(size, **changes))


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a clause about the unknown `word`: the nearest of `known`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else f"; choose one of {', '.join(known)}"


def _read(group: str, kind: str, name: str) -> dict[str, Any]:
    """YAML 1.1 takes `1e-3`, without a point, for a string; Hydra and we for a number."""
    known = names(group)
    if name not in known:
        raise UnknownNameError(f"there is no {kind} {name!r}{nearest(name, known) if known else f', nor {CONFIGS}'}")
    try:
        yaml = import_module("yaml")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the {kind} {name!r} is a YAML file; pip install pyyaml to read it") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, five times as fast, where it is there
    values = yaml.load((CONFIGS / group / f"{name}.yaml").read_text(), loader)
    number = re.compile(r"\d+(\.\d*)?[eE][+-]?\d+")
    return {key: float(v) if isinstance(v, str) and number.fullmatch(v) else v for key, v in values.items()}
