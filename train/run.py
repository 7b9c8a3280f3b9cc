"""The folder of a run: what was asked, where it ran, and what came out.

config.yaml    the resolved configuration; resume=FOLDER starts from it
plan.json      the resolved KV layout
run.json       command, git revision, versions, hardware
metrics/       metrics.csv, one folder for each time the run was started
checkpoints/   the newest ones and the best: train/checkpoint.py
summary.json   the result, written when training ends
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from arch import KVPlan, ModelConfig
from arch.footprint import kv_bytes, num_params, train_flops_per_token
from eval.cli import UsageError

from .schema import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
# What decides the course of a run: a resumed one keeps it. Of the other groups it can change single keys.
FIXED = ("arch", "size", "data", "optim.name", "batch_size", "seed", "init", "train_only", "name", "folder")
GROUPS = ("optim", "trainer", "logger")
PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "tokenizers", "wandb")


def write_start(folder: Path, config: PretrainConfig, plan: KVPlan, about: dict[str, Any]) -> None:
    """All but the results. Each start of the run, `about` it included, is one more entry of run.json.

    Raises UsageError where the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the run folder {folder} ({error.strerror}); give another with folder="
        ) from error
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    write_json(folder / "plan.json", plan.to_dict())
    path = folder / "run.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write_json(path, [*starts, {**about, **environment()}])


def environment() -> dict[str, Any]:
    """What else than the configuration a result may depend on."""
    return {
        "command": sys.argv,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "hardware": hardware(),
    }


def hardware() -> str:
    """`2 x NVIDIA H200` or `AMD EPYC, 2 threads`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def git_revision() -> str | None:
    """Commit of this checkout, `+` if it has been changed since; None outside of git."""
    try:
        revision = _git("rev-parse", "HEAD")
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def constants(config: PretrainConfig, plan: KVPlan) -> dict[str, float]:
    """The figures of a run that do not change while it trains, under the names they have in logs and in wandb."""
    model = ModelConfig(config.arch, config.size)
    kv = kv_bytes(plan, config.context, config.kv_itemsize)
    return {
        "kv/bytes_per_token": float(kv.per_token),
        "kv/bytes_constant": float(kv.constant),
        "kv/bytes_stored": float(kv.stored),
        "kv/bytes_read": float(kv.read),
        "model/params": float(num_params(model, plan)),
        "model/train_flops_per_token": train_flops_per_token(model, plan),
    }


def summarize(config: PretrainConfig, plan: KVPlan, data: str, steps: int, val: dict[str, float]) -> dict[str, Any]:
    """What a Pareto plot needs of a run of `steps` steps on the data of checksum `data`.

    `experiment` is all that decides it except the seed.
    """
    asked = asdict(config)
    experiment = {key: asked[key] for key in ("arch", "size", "optim", "batch_size", "init", "train_only")}
    experiment |= {"steps": steps, "val_tokens": config.data.val_tokens, "data": data}
    return {
        "name": config.name,
        "seed": config.seed,
        "experiment": experiment,
        "params": num_params(ModelConfig(config.arch, config.size), plan),
        "tokens": steps * config.batch_size * config.size.seq_len,
        "seq_len": config.size.seq_len,
        "val": val,
        "environment": environment(),
    }


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def resumed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run `config.resume`, changed by what else was given on the command line.

    Raises UsageError where there is no such run, or where `overrides` would change what decides its course.
    """
    folder = Path(config.resume)
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"resume={folder}: no run there, config.yaml is missing; give the folder of a run")
    changes = [override for override in overrides if not override.startswith("resume=")]
    for change in changes:
        key = change.lstrip("+~").partition("=")[0]
        if change[0] in "+~" or key in GROUPS or f"{key}.".startswith(tuple(f"{fixed}." for fixed in FIXED)):
            raise UsageError(f"{change}: a resumed run keeps its {', '.join(FIXED)} and its groups; start another run")
    saved = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(folder / "config.yaml"))
    result = OmegaConf.merge(saved, OmegaConf.from_dotlist(changes), {"resume": str(folder), "folder": str(folder)})
    assert isinstance(result, DictConfig)
    return result
