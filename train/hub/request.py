"""Options of an export, checked without the imports that the export itself needs."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from data.cli import UsageError
from eval.units import parse_bytes

TARGET_NAMES = ("stock", "remote", "shipped")  # as in train/hub/targets.py
LICENSE = r"[a-z0-9][a-z0-9.+-]{0,63}"  # identifiers of the hub are in small letters
EXPORT_DTYPES = ("fp32", "bf16")  # of COMPUTE_DTYPES in train/tensor_pieces.py


@dataclass
class ExportConfig:
    """The command line.

    checkpoint      a run (its newest checkpoint) or one checkpoint, sharded or not
    out             a new folder, which appears under this name once it is complete and verified
    target          export format; auto: the first that represents the model exactly of stock (a class of
                    transformers), remote (a decoder with its code: sharing, mixed windows, sinks) and shipped (the code
                    of arch/ itself: Block Transformers, bounded caches, every other layout)
    dtype           dtype of the saved weights: fp32, as trained, or bf16, rounded
    max_shard_size  largest weight file
    prepared        prepared data of the run (tokenizer, validation text), if it has moved
    verify          compare logits, tokens, cache bytes and perplexity with ours; false skips this
    license         license of the weights, for the model card: an identifier of the Hugging Face hub, such as
                    apache-2.0, mit, cc-by-4.0 or other; null: the card names none
    push_to_hub     upload the folder to this repository of the Hugging Face hub; a new one is private
    """

    checkpoint: str | None = None
    out: str | None = None
    target: str = "auto"
    dtype: str = "fp32"
    max_shard_size: str = "5GB"
    prepared: str | None = None
    verify: bool = True
    license: str | None = None
    push_to_hub: str | None = None


@dataclass(frozen=True)
class ExportRequest:
    """A checked command line."""

    checkpoint: Path
    out: Path
    options: ExportConfig
    shard_bytes: float

    @property
    def partial(self) -> Path:
        """The name of the folder until it is complete."""
        return self.out.with_name(f"{self.out.name}.partial")


def check(options: ExportConfig) -> ExportRequest:
    """Check the command line before any work. Raises UsageError if something is missing or wrong."""
    for key, description in (("checkpoint", "the folder of a run or of a checkpoint"), ("out", "a new folder")):
        if not getattr(options, key):
            raise UsageError(f"give {key}=, {description}")
    assert options.checkpoint is not None and options.out is not None
    if options.license is not None and not re.fullmatch(LICENSE, options.license):
        raise UsageError(f"license={options.license}: give an identifier of the hub, such as apache-2.0, mit or other")
    if options.dtype not in EXPORT_DTYPES:
        raise UsageError(f"dtype is {options.dtype}; choose {', '.join(EXPORT_DTYPES)}")
    if options.target != "auto" and options.target not in TARGET_NAMES:
        raise UsageError(f"target is {options.target}; choose auto, {', '.join(TARGET_NAMES)}")
    try:
        shard_bytes = parse_bytes(options.max_shard_size)
    except ValueError as error:
        raise UsageError(f"max_shard_size: {error}") from error
    if shard_bytes <= 0:
        raise UsageError(f"max_shard_size is {options.max_shard_size}; it must be more than nothing")
    out = Path(options.out).absolute()
    if out.exists():
        raise UsageError(f"{options.out} is there already; give another folder with out=, or delete it")
    if not Path(options.checkpoint).is_dir():
        raise UsageError(f"checkpoint={options.checkpoint} is not there; give the folder of a run or of a checkpoint")
    if options.verify and importlib.util.find_spec("transformers") is None:
        raise UsageError("verification needs transformers: pip install transformers, or give verify=false")
    return ExportRequest(Path(options.checkpoint), out, options, shard_bytes)
