"""The cases that the parts of the GPU suite consist of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arch import ModelConfig, SizeConfig
from arch.named import load_arch, load_size

MEASURED = ("mha", "gqa4", "cla2", "mixattention", "mla", "mqa", "swa", "gemma3", "block", "bct")


@dataclass(frozen=True)
class Options:
    """toy: shapes of a test; data: prepared shards for the study."""

    toy: bool
    data: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """One measurement: `run` returns plain data, `line` formats it, `seconds` is roughly its duration on an H100."""

    key: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]


def case_config(arch: str, size: str, options: Options, seq_len: int | None = None) -> ModelConfig:
    """The layout at the named size, or at a toy size that also has eight query heads."""
    if options.toy:
        small = SizeConfig(num_layers=6, d_model=32, num_heads=8, head_dim=8, d_ff=48, vocab_size=67, seq_len=24)
        small.max_window = 8
        return ModelConfig(load_arch(arch), small)
    model_size = load_size(size)
    model_size.seq_len = seq_len or model_size.seq_len
    return ModelConfig(load_arch(arch), model_size)
