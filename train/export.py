"""Export to Hugging Face format: `python train/export.py checkpoint=<run or checkpoint> out=<folder>`. See --help."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from eval.cli import Choices, launch
from eval.console import PlainConsole
from train.errors import TrainingError
from train.hub.request import ExportConfig, check

if TYPE_CHECKING:
    from train.hub.records import Check


def export(options: ExportConfig, console: Console) -> "list[Check]":
    """Check the options, then export; see `train.hub.exporter.export_checkpoint`."""
    request = check(options)
    from train.hub.exporter import export_checkpoint  # brings torch

    return export_checkpoint(request, console)


def main(config: DictConfig, choices: Choices) -> None:
    options = OmegaConf.to_object(config)
    assert isinstance(options, ExportConfig)
    check(options)
    from arch.convert import ConversionError

    console = PlainConsole()
    try:
        export(options, console)
    except ConversionError as error:
        raise TrainingError(str(error)) from error


if __name__ == "__main__":
    launch(main, "export", ExportConfig)
