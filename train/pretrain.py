"""Pretrain a model: `python train/pretrain.py +arch=cla2 +size=tiny`. See --help."""

import sys
from datetime import datetime
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from arch import LayoutError, resolve
from data.cli import UsageError
from eval.cli import Choices, launch, require
from train.run import launched_rank, resumed, to_object
from train.schema import PretrainConfig, problems


def main(config: DictConfig, choices: Choices) -> None:
    if config.resume is not None:
        options = resumed(Path(config.resume), list(HydraConfig.get().overrides.task))
    else:
        require(arch=choices.arch, size=choices.size)
        config.name = config.name or default_name(choices)
        config.folder = str(free_folder(config))
        options = to_object(config)
    refuse_impossible(options)
    from train.training import run  # torch, Lightning and wandb: seconds, which a mistake need not wait for

    run(options)


def refuse_impossible(config: PretrainConfig) -> None:
    """Raises LayoutError where the layout or a value makes no sense, on any machine."""
    found = problems(config)
    if found:
        raise LayoutError(found)
    resolve(config.model)


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


def free_folder(config: DictConfig) -> Path:
    """`folder=`, or `<name>-seed<seed>` in runs/<time> or in the folder of the sweep, numbered where that is taken.

    Raises UsageError where `folder=` holds a run already, or would be that of every run of a sweep.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    if config.folder is not None:
        if sweep:
            raise UsageError("folder= is one folder for all runs of a sweep; set hydra.sweep.dir= instead")
        # The other processes of the run are started when the first has written it.
        if launched_rank() == 0 and (Path(config.folder) / "config.yaml").exists():
            raise UsageError(f"{config.folder} holds a run already: resume={config.folder} continues it")
        return Path(config.folder)
    parent = hydra.sweep.dir if sweep else f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    base = Path(parent) / f"{config.name}-seed{config.seed}"
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())


if __name__ == "__main__":
    launch(main, "pretrain", PretrainConfig)
