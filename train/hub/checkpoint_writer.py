"""Checkpoints to start from: weights that come from elsewhere, in the folder that a run saves.

OUT/checkpoint.json, *.safetensors   as train/checkpoint.py has them: no optimizer state, step 0
OUT/arch/NAME.yaml, OUT/size/NAME.yaml   the model, for `pretrain.py --config-dir=OUT +arch=NAME +size=NAME init=OUT`
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from arch import ModelConfig, build, resolve
from arch.config import to_dict
from data.cli import UsageError
from data.files import sha256, write_json
from train.checkpoint import FORMAT, INFO, check_matches

SHARD_BYTES = 2**30  # of one file, and so of the weights that are held at a time


def free(out: str) -> Path:
    """The folder `out`, which must not be there yet. Raises UsageError where it is, or where none was given."""
    if not out:
        raise UsageError("out= is not set; give the folder to write")
    path = Path(out)
    if path.exists():
        raise UsageError(f"out={out} is there already; give a new folder")
    return path


def write(
    out: Path, name: str, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], about: Mapping[str, Any]
) -> None:
    """Write the checkpoint `out` of the model of `config` with `tensors`, as fp32; whole or not at all.

    `name` is that of its two configuration files; `about` is plain data for checkpoint.json. Raises UsageError where it
    cannot be written, and passes on what `tensors` raises.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = _shards(partial, tensors)
        with torch.device("meta"):
            check_matches(partial, build(config))
        for group, values in (("arch", _given(to_dict(config.arch))), ("size", to_dict(config.size))):
            (partial / group).mkdir()
            OmegaConf.save(OmegaConf.create(values), partial / group / f"{name}.yaml")
        model = {"config": to_dict(config), "plan": resolve(config).to_dict()}
        write_json(partial / INFO, {"format": FORMAT, "step": 0, **model, **about, "files": files})
        os.rename(partial, out)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}; give another folder with out=") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _given(values: Any) -> Any:
    """`values` without the keys that are null, as they are in a layout unless given."""
    if not isinstance(values, dict):
        return values
    return {key: _given(value) for key, value in values.items() if value is not None}


def _shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write `tensors` to files of at most SHARD_BYTES, or of one tensor; size and checksum of each."""
    files: dict[str, Any] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"shard-{len(files) + 1:05d}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        held.clear()

    size = 0
    for name, tensor in tensors:
        if held and size + 4 * tensor.numel() > SHARD_BYTES:
            flush()
            size = 0
        held[f"model.{name}"] = tensor.float().contiguous()
        size += 4 * tensor.numel()
    flush()
    return files


def command(out: Path, name: str) -> str:
    """What trains the model of the checkpoint `out` further; DATA stands for prepared text in its vocabulary."""
    chosen = f"--config-dir={out} +arch={name} +size={name} init={out}"
    return f"python train/pretrain.py {chosen} data.path=DATA name={out.name}"
