"""Make a Hugging Face checkpoint one of ours: `python train/import_hf.py from=FOLDER out=FOLDER`. See --help.

The model keeps the layout that it has. To change that (grouped heads to CLA, say) is a step of its own, from one of our
checkpoints to another: uptrain.py is the one there is.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from omegaconf import DictConfig
from rich.console import Console

from arch import Plan, resolve
from arch.convert import ConversionError
from arch.footprint import num_params
from arch.hf_import import convert, source
from data.cli import UsageError
from eval.cli import Choices, launch
from eval.footprint import plan_tables
from train.hub.checkpoint_writer import command, free, write
from train.hub.folder_reader import PATTERNS, TOKENIZER, HFFolder

NAME = "imported"


@dataclass
class ImportConfig:
    """What to import.

    source    a folder, or else a name on the hub; on the command line `from=`
    out       the folder to write
    revision  branch, tag or commit on the hub
    """

    source: str = ""
    out: str = ""
    revision: str | None = None


def main(config: DictConfig, choices: Choices) -> None:
    if not config.source:
        raise UsageError("from= is not set; give a folder, or a name on the hub")
    out = free(config.out)
    try:
        run(local(config.source, config.revision), out, config.source)
    except ConversionError as error:
        raise UsageError(f"{config.source} cannot be imported:\n{error}") from error


def run(folder: Path, out: Path, name: str) -> None:
    """Import `folder`, and say what it is. Raises ConversionError or a mistake of the user; then `out` is not there."""
    with HFFolder(folder) as theirs:
        depth = theirs.config.get("num_hidden_layers")
        if isinstance(depth, int) and depth > len(theirs.shapes):
            raise ConversionError([f"num_hidden_layers is {depth}; there are {len(theirs.shapes)} tensors"])
        described = source(theirs.config)
        model, plan = described.config, resolve(described.config)
        about = {"imported": {"from": name, "architecture": theirs.config.get("architectures")}}
        write(out, NAME, model, convert(described, theirs.shapes, theirs.get), about)
    tokenizer = [file for file in TOKENIZER if (folder / file).is_file()]
    for file in tokenizer:
        shutil.copyfile(folder / file, out / file)
    show(name, plan, model.size.seq_len)
    print(f"{num_params(model, plan):,} parameters, kept as fp32: {out}")
    print(f"layout and size: {out}/arch/{NAME}.yaml, {out}/size/{NAME}.yaml")
    if "tokenizer.json" in tokenizer:
        print(
            f"its tokenizer is beside them; text for it (vocabulary of {model.size.vocab_size:,}):\n"
            f"  python data/prepare.py files source.train=TEXT tokenizer.kind=pretrained tokenizer.name={out} path=DATA"
        )
    print(f"to train it further:\n  {command(out, NAME)}")


def show(name: str, plan: Plan, context: int) -> None:
    """The stores of a model, for 16 bits per element."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in plan_tables(name, plan, context, 2):
        console.print(table)


def local(name: str, revision: str | None) -> Path:
    """The folder `name`, or where that of the hub was downloaded to. Raises UsageError where there is neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"from={name} is a file; give the folder that holds it, with its config.json")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"from={name} is no folder here, and it cannot be downloaded: {reason}\nWithout a network, copy its folder "
            f"here ({', '.join(PATTERNS[:3])}, tokenizer files) and give that"
        ) from error


def typed(arguments: list[str]) -> list[str]:
    """`from=` is the field `source`: Python has no field of a keyword's name."""
    return [f"source={a.removeprefix('from=')}" if a.startswith("from=") else a for a in arguments]


if __name__ == "__main__":
    sys.argv[1:] = typed(sys.argv[1:])
    launch(main, "import_hf", ImportConfig)
