"""A model as it is named on a command line, checked before torch is imported."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.cli import UsageError

DTYPE_NAMES = ("auto", "fp32", "bf16", "fp16")
CHECKPOINT = "checkpoint.json"  # train/checkpoint.py writes it


@dataclass(frozen=True)
class Source:
    """A model as it is named on a command line.

    checkpoint  a run, a checkpoint of ours, a folder that transformers loads, or a name on the hub
    which       of a run's checkpoints the newest, or the best
    device      cpu, cuda, ...; auto: cuda where there is one
    dtype       fp32, bf16, fp16, or auto: fp32, and of a model of transformers on a GPU the type that it is stored in
    trust       code that comes with a model of transformers is run
    revision    of the hub
    prepared    the folder of data that has the tokenizer; None: that of the run
    """

    checkpoint: str
    which: str = "newest"
    device: str = "auto"
    dtype: str = "auto"
    trust: bool = False
    revision: str | None = None
    prepared: Path | None = None

    @classmethod
    def of(cls, options: Any) -> "Source":
        """The model that the options of a command name, in fields of these names."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def check(self) -> None:
        """Raise UsageError on a value that no machine takes, and if there is no such model here."""
        if self.dtype not in DTYPE_NAMES:
            raise UsageError(f"dtype is {self.dtype}; choose {', '.join(DTYPE_NAMES)}")
        if self.which not in ("newest", "best"):
            raise UsageError(f"which is {self.which}; choose newest or best")
        kind(self.checkpoint)


def kind(checkpoint: str) -> str:
    """`ours` or `transformers`, by what lies at `checkpoint`. Raises UsageError if it is neither."""
    path = Path(checkpoint)
    if not checkpoint:
        raise UsageError("checkpoint= is not set; give a run, a checkpoint, an exported folder, or a name of the hub")
    if (path / "config.yaml").is_file() or (path / CHECKPOINT).is_file():
        return "ours"
    if (path / "config.json").is_file():
        return "transformers"
    if path.exists():
        raise UsageError(
            f"checkpoint={checkpoint} holds no run (config.yaml), no checkpoint ({CHECKPOINT}) and no model of "
            "transformers (config.json)"
        )
    here = checkpoint.startswith((".", "/", "~", "runs/")) or os.path.isdir(path.parts[0])
    if here or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint):
        raise UsageError(f"checkpoint={checkpoint}: there is no such folder")
    return "transformers"
