"""Import of one Hugging Face checkpoint: convert its weights and print what it is."""

import shlex
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from arch import Plan, resolve
from arch.convert import ConversionError
from arch.convert_formats import ImportedTensors, read_config
from arch.footprint import num_params
from data.cli import UsageError
from data.tokenizer import pretrained
from eval.console import PlainConsole
from eval.footprint import plan_tables
from train.hub.checkpoint_writer import next_command, write
from train.hub.folder_reader import DOWNLOAD_PATTERNS, TOKENIZER_FILES, HFFolder

NAME = "imported"


def run(folder: Path, out: Path, name: str) -> None:
    """Import `folder` to `out` and print a summary. Raises ConversionError or one of MISTAKES, and leaves no `out`."""
    reader = HFFolder(folder)
    num_layers = reader.config.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > len(reader.shapes):
        raise ConversionError([f"num_hidden_layers is {num_layers}; there are {len(reader.shapes)} tensors"])
    tokenizer = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    has_tokenizer = folder / "tokenizer.json" in tokenizer
    if has_tokenizer:
        pretrained(str(folder / "tokenizer.json"))
    hf_model = read_config(reader.config)
    model, plan = hf_model.config, resolve(hf_model.config)
    info = {"imported": {"from": name, "architecture": reader.config.get("architectures")}}
    write(out, NAME, model, ImportedTensors(hf_model, reader), info, tokenizer)
    print_plan(name, plan, model.size.seq_len)
    print(f"{num_params(model, plan):,} parameters, kept as fp32: {out}")
    print(f"layout and size: {out}/arch/{NAME}.yaml, {out}/size/{NAME}.yaml")
    if has_tokenizer:
        print(
            f"its tokenizer is beside them; text for it (vocabulary of {model.size.vocab_size:,}):\n"
            f"  python data/prepare.py files source.train=TEXT tokenizer.kind=pretrained "
            f"{shlex.quote(f'tokenizer.name={out}')} path=DATA"
        )
    print(f"to train it further:\n  {next_command(out, NAME)}")


def print_plan(name: str, plan: Plan, context: int) -> None:
    """Print the stores of a model, for 16 bits per element."""
    console = PlainConsole()
    for table in plan_tables(name, plan, context, 2):
        console.print(table)


def resolve_source(name: str, revision: str | None) -> Path:
    """Return the folder `name`, or download that of the hub. Raises UsageError if there is neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"from={name} is a file; give the folder that holds it, with its config.json")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOAD_PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"from={name} is no folder here, and it cannot be downloaded: {reason}\nWithout a network, copy its folder "
            f"here ({', '.join(DOWNLOAD_PATTERNS[:3])}, tokenizer files) and give that"
        ) from error
