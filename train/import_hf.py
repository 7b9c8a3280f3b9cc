"""Import a Hugging Face checkpoint: `python train/import_hf.py from=FOLDER out=FOLDER`. See --help.

The model keeps its layout. Another layout (CLA instead of grouped heads, say) is a conversion between two of our own
checkpoints: see uptrain.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from omegaconf import DictConfig

from data.cli import UsageError
from eval.cli import Choices, launch, require_new_folder


@dataclass
class ImportConfig:
    """Options of the import.

    source    output of save_pretrained (config.json and safetensors), or a name on the hub; on the command line `from=`
    out       a new folder, written completely or not at all
    revision  branch, tag or commit on the hub
    """

    source: str = ""
    out: str = ""
    revision: str | None = None


def main(config: DictConfig, choices: Choices) -> None:
    if not config.source:
        raise UsageError("from= is not set; give a folder, or a name on the hub")
    out = require_new_folder(config.out)
    from arch.convert import ConversionError  # brings torch
    from train.hub.importer import resolve_source, run

    try:
        run(resolve_source(config.source, config.revision), out, config.source)
    except ConversionError as error:
        raise UsageError(f"{config.source} cannot be imported:\n{error}") from error


def rename_from_flag(arguments: list[str]) -> list[str]:
    """Rename `from=` to the field `source=`: Python has no field of a keyword's name."""
    return [f"source={a.removeprefix('from=')}" if a.startswith("from=") else a for a in arguments]


if __name__ == "__main__":
    sys.argv[1:] = rename_from_flag(sys.argv[1:])
    launch(main, "import_hf", ImportConfig)
