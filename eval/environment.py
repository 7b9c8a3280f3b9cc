"""Environment record (command, git, versions, hardware) stored with every run and every result."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data.cores import cores

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "hydra-core",
    "numpy",
    "tokenizers",
    "wandb",
    "transformers",
    "datasets",
    "litgpt",
)


def environment() -> dict[str, Any]:
    """Everything a result may depend on besides its configuration; only installed packages have a version."""
    return {
        "command": sys.argv,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := installed(package)) is not None},
        "hardware": hardware(),
    }


def installed(package: str) -> str | None:
    """Version of a package, None if it is not installed. Does not import it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> str:
    """`2 x NVIDIA H200` or `AMD EPYC, 2 threads`. GPUs count only in a process that has imported torch."""
    torch = sys.modules.get("torch")  # commands that only read results do without its import
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = cores() if torch is None else torch.get_num_threads()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def driver() -> str | None:
    """Version of the NVIDIA driver; None if there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _processor() -> str:
    """Name of the processor; of one that Linux has no name for, as those of ARM, its maker's numbers."""
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.stdout.strip():
            return asked.stdout.strip()
    described = [line.partition(":") for line in _lines("/proc/cpuinfo")]
    values = {name.strip(): value.strip() for name, _, value in described}
    if "model name" in values:
        return values["model name"]
    numbers = [f"{name} {values[name]}" for name in ("CPU implementer", "CPU part") if name in values]
    return ", ".join([platform.processor() or platform.machine(), *numbers])


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
