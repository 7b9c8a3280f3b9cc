"""Pretrain a model: `python train/pretrain.py +arch=cla2 +size=tiny`. See --help."""

import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TypeVar

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from arch import LayoutError, resolve
from data.cli import UsageError
from data.launcher import launched_rank
from data.shards import Manifest
from eval.cli import Choices, launch, require
from train.matching import matched
from train.run import resumed, to_object
from train.run_lock import locked, new_folder
from train.schema import PretrainConfig, problems

T = TypeVar("T")


def main(config: DictConfig, choices: Choices) -> None:
    refuse_empty(config)
    if config.resume is not None:
        options = resumed(Path(config.resume), list(HydraConfig.get().overrides.task))
        refuse_impossible(options)
        with claimed(locked(Path(config.resume)), None):
            train(options)
        return
    require(arch=choices.arch, size=choices.size)
    config.name = config.name or default_name(choices)
    base = first_folder(config)
    numbered = config.folder is None
    options = to_object(config)
    refuse_impossible(options)
    options, match = matched(options)
    if match is not None and launched_rank() == 0:
        print(match)
    with claimed(new_folder(base, numbered), base) as folder:
        options.folder = str(folder)
        train(options)


def train(config: PretrainConfig) -> None:
    from train.training import run  # torch, Lightning and wandb: seconds, which a mistake need not wait for

    run(config)


def claimed(folder: AbstractContextManager[T], otherwise: T) -> AbstractContextManager[T]:
    """`folder` for the first process of a run. The others, which the first has started or tells, have it from that."""
    return folder if launched_rank() == 0 else nullcontext(otherwise)


def refuse_empty(config: DictConfig) -> None:
    """Raise UsageError if a path is empty, as from a shell variable that is not set, or the name is a path; and
    if the folder is the root, as `$FOLDER/` then is."""
    for key in ("folder", "resume", "init"):
        if config[key] is not None and not config[key].strip():
            raise UsageError(f"{key}= is empty; give a folder, or leave {key}= out")
    if config.folder is not None and Path(config.folder).absolute().parent == Path(config.folder).absolute():
        raise UsageError(f"folder={config.folder} is the root of the file system; give a folder in it")
    name = config.name
    if name and ("/" in name or not name.isprintable()):
        raise UsageError(f"name is {name!r}; it must be one word of a path, without / and control characters")


def refuse_impossible(config: PretrainConfig) -> None:
    """Raise LayoutError if the layout or a value makes no sense, on any machine, and DataError if a folder of data that
    is named is not here."""
    found = problems(config)
    if found:
        raise LayoutError(found)
    resolve(config.model)
    if config.data.path or isinstance(config.data.mix, dict):
        for folder in config.data.folders:
            Manifest.load(folder)


def default_name(choices: Choices) -> str:
    """`<arch>-<size>`; with +experiment=, what was chosen beside it on the command line and its name."""
    hydra = HydraConfig.get()
    experiment = hydra.runtime.choices.get("experiment")
    if experiment is None:
        return f"{choices.arch}-{choices.size}"
    given = {override.lstrip("+").partition("=")[0] for override in hydra.overrides.task}
    pairs = ("arch", choices.arch), ("size", choices.size)
    beside = [choice for group, choice in pairs if choice is not None and group in given]
    return "-".join([*beside, experiment])


def first_folder(config: DictConfig) -> Path:
    """`folder=`, or `<name>-seed<seed>` in runs/<time> or in the folder of the sweep, where others may be already.

    Raises UsageError if `folder=` would be that of every run of a sweep.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    if config.folder is not None:
        if sweep:
            raise UsageError("folder= is one folder for all runs of a sweep; set hydra.sweep.dir= instead")
        return Path(config.folder)
    parent = hydra.sweep.dir if sweep else f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return Path(parent) / f"{config.name}-seed{config.seed}"


if __name__ == "__main__":
    launch(main, "pretrain", PretrainConfig)
