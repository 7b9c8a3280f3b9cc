"""The layouts and sizes in configs/arch and configs/size, read without Hydra, which a GPU machine may lack."""

import re
from pathlib import Path
from typing import Any

import yaml

from arch import ArchConfig, SizeConfig, from_dict

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def names(group: str) -> list[str]:
    """The files of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def load_arch(name: str) -> ArchConfig:
    """The layout in `configs/arch/<name>.yaml`."""
    return from_dict(ArchConfig, _read("arch", name))


def load_size(name: str) -> SizeConfig:
    """The size in `configs/size/<name>.yaml`."""
    return from_dict(SizeConfig, _read("size", name))


def _read(group: str, name: str) -> dict[str, Any]:
    """YAML 1.1 takes `1e-3`, without a point, for a string; Hydra and we for a number."""
    values = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    number = re.compile(r"\d+(\.\d*)?[eE][+-]?\d+")
    return {key: float(v) if isinstance(v, str) and number.fullmatch(v) else v for key, v in values.items()}
