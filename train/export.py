"""Export to Hugging Face format: `python train/export.py checkpoint=<run or checkpoint> out=<folder>`. See --help."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from arch.convert import ConversionError
from data.cli import UsageError
from eval.cli import Choices, launch
from eval.environment import installed
from eval.footprint import plan_tables
from eval.units import parse_bytes
from train import checkpoint
from train.checkpoint import TrainingError
from train.hub.card import write_card
from train.hub.checkpoint_reader import CheckpointReader
from train.hub.folder_writer import write_settings, write_tokenizer, write_weights
from train.hub.records import Check, Corpus, ExportUnderTest
from train.hub.run_info import describe_training, find_run, load_corpus, load_run_config
from train.hub.targets import TARGETS, Target, choose
from train.hub.tensor_files import DTYPES
from train.hub.upload import check_push, push
from train.hub.verify import require_transformers, table, verify

NUM_WINDOWS = 4  # of validation text, on which perplexity is compared


@dataclass
class ExportConfig:
    """The command line; `configs/export.yaml` explains the keys."""

    checkpoint: str | None = None
    out: str | None = None
    target: str = "auto"
    dtype: str = "fp32"
    max_shard_size: str = "5GB"
    prepared: str | None = None
    verify: bool = True
    push_to_hub: str | None = None


@dataclass(frozen=True)
class Request:
    """A checked command line."""

    checkpoint: Path
    out: Path
    options: ExportConfig
    shard_bytes: float

    @property
    def partial(self) -> Path:
        """The name of the folder until it is complete."""
        return self.out.with_name(f"{self.out.name}.partial")


def check(options: ExportConfig) -> Request:
    """Check the command line before any work. Raises UsageError where something is missing or wrong."""
    for key, description in (("checkpoint", "the folder of a run or of a checkpoint"), ("out", "a new folder")):
        if getattr(options, key) is None:
            raise UsageError(f"give {key}=, {description}")
    if options.dtype not in DTYPES:
        raise UsageError(f"dtype is {options.dtype}; choose {', '.join(DTYPES)}")
    if options.target != "auto" and options.target not in TARGETS:
        raise UsageError(f"target is {options.target}; choose auto, {', '.join(TARGETS)}")
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
    if options.verify:
        require_transformers()
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    return Request(Path(options.checkpoint), out, options, shard_bytes)


def export(options: ExportConfig, console: Console) -> list[Check]:
    """Write the folder, verify it, and give it its name. Returns the checks, none of which failed.

    Raises one of cli.MISTAKES where the model cannot be exported like that; ConversionError or TrainingError where the
    checkpoint is broken, the folder cannot be written (nothing is left of it) or is not the model (it stays, under
    `Request.partial`).
    """
    request = check(options)
    folder = checkpoint.resolve(request.checkpoint)
    reader = CheckpointReader(folder)
    config, plan = reader.model()
    target, refused = choose(config, plan, options.target)
    reader.check(target.weights)
    run = find_run(folder)
    run_config = load_run_config(run)
    training = describe_training(folder, run, run_config, reader.info)
    corpus = load_corpus(folder, run_config, options.prepared, NUM_WINDOWS)
    console.print(*plan_tables(request.out.name, plan, config.size.seq_len, 2))
    for name, reason in refused.items():
        console.print(f"target {name} passed over:\n{reason}", soft_wrap=True)
    console.print(f"target: {target.name}, {target.model_class}; {len(target.weights)} tensors in {options.dtype}")
    dtype, partial = DTYPES[options.dtype], request.partial
    try:
        write(request, reader, target, corpus)
        exported = ExportUnderTest(folder, partial, config, target, dtype, corpus)
        checks = run_checks(exported, console) if options.verify else []
        version = f"transformers {installed('transformers')} and torch {installed('torch')}"
        name = options.push_to_hub or request.out.name
        write_card(partial, name, config, plan, target, training, checks, version)
        partial.rename(request.out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or error
        raise TrainingError(f"cannot write {request.out}: {reason}; give another folder with out=") from error
    console.print(f"exported: {request.out}", soft_wrap=True)
    if options.push_to_hub is not None:
        console.print(f"pushed: {push(request.out, options.push_to_hub)}", soft_wrap=True)
    return checks


def write(request: Request, reader: CheckpointReader, target: Target, corpus: Corpus) -> None:
    """Write all of the folder but its card. Leaves nothing if that fails."""
    folder, size, dtype = request.partial, target.config, DTYPES[request.options.dtype]
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_settings(folder, target, dtype, corpus.end)
        write_tokenizer(folder, corpus.tokenizer, corpus.end, size["vocab_size"], size["max_position_embeddings"])
        write_weights(folder, reader, target.weights, dtype, request.shard_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def run_checks(exported: ExportUnderTest, console: Console) -> list[Check]:
    """Verify the folder and print the checks. Raises TrainingError if one failed; the folder stays for inspection."""
    console.print("verifying in a fresh process")
    checks = verify(exported)
    console.print(table(checks, f"transformers {installed('transformers')}, in a fresh process"))
    failed = [check for check in checks if check.passed is False]
    if failed:
        lines = "\n".join(f"{check.name}: {check.found}, not {check.wanted}" for check in failed)
        raise TrainingError(
            f"what was written is not the model that was trained; it is kept as {exported.folder}\n{lines}"
        )
    return checks


def main(config: DictConfig, choices: Choices) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        export(OmegaConf.to_object(config), console)
    except ConversionError as error:
        raise TrainingError(str(error)) from error


if __name__ == "__main__":
    launch(main, "export", ExportConfig)
