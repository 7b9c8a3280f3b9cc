"""Command lines: Hydra over a typed schema, with errors that name the fix and exit code 2.

A script calls `launch(task, "name", Schema)`; `configs/name.yaml` is its primary config and starts from the node
`name_schema`. `task` gets a typed object, whose `arch` and `size` are filled in from `+arch=X +size=Y`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from arch import LayoutError
from data.cli import TaskError, UsageError, fail, unknown_key
from data.files import DataError
from eval.layouts import CONFIGS, names

MISTAKES = (UsageError, LayoutError, DataError)


@dataclass(frozen=True)
class Choices:
    """The names given with `+arch=` and `+size=`; None where a script was started without."""

    arch: str | None
    size: str | None


def launch(task: Callable[[DictConfig, Choices], None], name: str, schema: type) -> None:
    """Compose `configs/<name>.yaml` with the command line, check it against `schema` and run `task` on it.

    A mistake of the user (MISTAKES, or what Hydra finds) is printed without a traceback, and the process ends with code
    2; so is a TaskError, with code 1. The script of a task imports what takes seconds (torch, Lightning) inside the
    task, after its own checks, so that help and mistakes are answered at once.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's own printer, which exits with 1

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
    def job(config: DictConfig) -> None:
        picked = HydraConfig.get().runtime.choices
        try:
            unknown = list(unknown_keys(config))
            if unknown:
                raise UsageError("\n".join(unknown))
            task(config, Choices(picked.get("arch"), picked.get("size")))
        except MISTAKES as error:  # here, or Hydra would announce it with the whole command line
            fail(str(error))
        except TaskError as error:
            fail(str(error), code=1)

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        fail(_explain(error))
    except (AssertionError, AttributeError) as error:
        if not any(text in str(error) for text in NULL_PARENT):
            raise
        fail("a key on the command line lies under one that is null, which OmegaConf cannot fill; write it in a file")


# What OmegaConf says where a key's parent is null: `+arch.stores.kv.latent.dim=2` without a latent.
NULL_PARENT = ("Unexpected type for root", "'NoneType' object has no attribute 'get'")


def require(**chosen: str | None) -> None:
    """Raises UsageError, listing the choices, for each group that was not chosen with `+group=name`."""
    missing = [group for group, choice in chosen.items() if choice is None]
    if missing:
        raise UsageError("\n".join(f"choose +{group}= one of: {', '.join(names(group))}" for group in missing))


def require_new_folder(out: str) -> Path:
    """Return the folder `out`. Raises UsageError where it is empty or names something that exists."""
    if not out:
        raise UsageError("out= is not set; give the folder to write")
    path = Path(out)
    if path.exists():
        raise UsageError(f"out={out} is there already; give a new folder")
    return path


def unknown_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield a message for each key that its dataclass does not have: `+arch.typo=1` passes Hydra."""
    cls = OmegaConf.get_type(config)
    for key in map(str, config):
        if is_dataclass(cls) and key not in cls.__dataclass_fields__:
            yield unknown_key(f"{prefix}{key}", sorted(cls.__dataclass_fields__))
        elif not OmegaConf.is_interpolation(config, key) and isinstance(config[key], DictConfig):
            yield from unknown_keys(config[key], f"{prefix}{key}.")


def _explain(error: Exception) -> str:
    """Hydra's or OmegaConf's message; for an unknown key, a message with the known ones."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        cls = cause.object_type
        if is_dataclass(cls) and cause.key not in cls.__dataclass_fields__:
            return unknown_key(str(cause.full_key), sorted(cls.__dataclass_fields__))
    message = str(error).split("Set the environment variable")[0].split("Config search path")[0].strip()
    return message if cause is error else f"{message.splitlines()[0]}: {str(cause).splitlines()[0]}"
