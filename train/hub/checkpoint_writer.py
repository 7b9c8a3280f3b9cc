"""Checkpoints to start from: weights of another origin, in the folder that a run saves.

OUT/checkpoint.json, *.safetensors   as in train/checkpoint.py: no optimizer state, step 0
OUT/arch/NAME.yaml, OUT/size/NAME.yaml   the model, for `pretrain.py --config-dir=OUT +arch=NAME +size=NAME init=OUT`
"""

import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from arch import ModelConfig, build, resolve
from arch.config import to_dict
from arch.convert import TensorReader
from data.cli import UsageError, word
from data.dotted import without_nulls
from data.files import rename, write_json
from train.checkpoint import FORMAT, INFO, check_matches
from train.hub.checkpoint_reader import PREFIX
from train.hub.tensor_files import write_shards

SHARD_BYTES = 2**30  # of one file


def write(
    out: Path,
    name: str,
    config: ModelConfig,
    tensors: TensorReader,
    info: Mapping[str, Any],
    beside: Iterable[Path] = (),
) -> None:
    """Write the checkpoint `out` of the model of `config` with `tensors`, as fp32; whole or not at all.

    `name` is that of its two configuration files; `info` is plain data for checkpoint.json; files `beside` are copied.
    Raises UsageError if it cannot be written, and passes on what `tensors` raises.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = write_shards(partial, tensors, torch.float32, SHARD_BYTES, _shard_name, PREFIX)
        with torch.device("meta"):
            check_matches(partial, build(config))
        for group, values in (("arch", without_nulls(to_dict(config.arch))), ("size", to_dict(config.size))):
            (partial / group).mkdir()
            OmegaConf.save(OmegaConf.create(values), partial / group / f"{name}.yaml")
        model = {"config": to_dict(config), "plan": resolve(config).to_dict()}
        described = {name: file.description for name, file in files.items()}
        for file in beside:
            shutil.copyfile(file, partial / file.name)
        write_json(partial / INFO, {"format": FORMAT, "step": 0, **model, **info, "files": described})
        rename(partial, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}; give another folder with out=") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}.safetensors"


def next_command(out: Path, name: str) -> str:
    """Return the command that trains the checkpoint `out` further; DATA stands for prepared text in its vocabulary."""
    words = [shlex.quote(f"--config-dir={out}"), word("+arch", name), word("+size", name), word("init", out)]
    return f"python train/pretrain.py {' '.join(words)} data.path=DATA {word('name', out.name)}"
