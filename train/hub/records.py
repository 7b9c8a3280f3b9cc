"""Records that the parts of an export hand to each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from arch import ModelConfig
from train.hub.targets import Target


@dataclass(frozen=True)
class Training:
    """The training of a checkpoint; None if a fact is unknown.

    name    of the run
    step    at which the checkpoint was taken
    tokens  trained on until then
    val     validation figures of this very step: loss, and ppl and bpb if the run ended here
    data    name of the text
    seed    of weights and order

    data_digest, tokenizer   sha256 of the prepared data, and of its tokenizer.json
    """

    name: str | None
    step: int | None
    tokens: int | None = None
    val: dict[str, float] | None = None
    data: str | None = None
    seed: int | None = None
    data_digest: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Corpus:
    """The tokenizer, the token that ends a text, and validation windows, one token longer than their inputs.

    There are no windows where the data is not on this machine. An imported model may have a token that `begin`s a text,
    and a chat template.
    """

    tokenizer: Tokenizer
    end: int
    windows: list[list[int]]
    begin: int | None = None
    chat_template: Any = None


@dataclass(frozen=True)
class ExportUnderTest:
    """An exported folder to verify: the checkpoint `source`, written to `folder` as `target` in `dtype`."""

    source: Path
    folder: Path
    config: ModelConfig
    target: Target
    dtype: torch.dtype
    corpus: Corpus


@dataclass(frozen=True)
class Check:
    """One comparison; `passed` is None for a figure that is only reported."""

    name: str
    found: str
    wanted: str
    passed: bool | None
