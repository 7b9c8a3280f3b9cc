"""The weights of a run's checkpoint, whether one process wrote them or several wrote a share each.

Nothing in the files is believed: headers, the list of files and the configuration are checked against each other before
anything of the size that they claim is allocated.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from arch import ModelConfig, Plan, from_dict, resolve
from arch.convert import ConversionError, Weight, tensor_problems
from arch.footprint import num_params
from train.checkpoint import INFO, load_info
from train.errors import TrainingError
from train.hub.tensor_files import Piece, SafetensorsReader, StoredTensor, open_file

PREFIX = "model."
# Larger counts in a configuration are nonsense, and would take unbounded time to expand.
MAX_REPEATS = 10_000


class Entry(NamedTuple):
    """A piece of the weight `name`, and the type that its file gives it."""

    name: str
    dtype: str
    piece: Piece


class CheckpointReader(SafetensorsReader):
    """The weights of the checkpoint `folder` by parameter name, a TensorReader.

    Raises TrainingError where its files contradict each other or make no sense.
    """

    prefix = PREFIX
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    not_finite = "is not finite; export an earlier checkpoint"

    def __init__(self, folder: Path):
        self.info = load_info(folder)
        super().__init__(folder, join([entry for name in sorted(self.info["files"]) for entry in scan(folder / name)]))

    def model(self) -> tuple[ModelConfig, Plan]:
        """Return the model of the checkpoint. Raises TrainingError where its configuration describes none."""
        path, values = self.folder / INFO, self.info.get("config", {})
        largest = max((max(shape, default=0) for shape in self.shapes.values()), default=0)
        try:
            config = from_dict(ModelConfig, values)
            for key, count, limit in _counts(config, largest, len(self.tensors)):
                if (count or 0) > limit:
                    raise ValueError(f"{key} is {count}, too large for the weights in the files")
            repeats = re.findall(r"\sx(\d+)", json.dumps(asdict(config.arch)))
            if any(int(number) > MAX_REPEATS for number in repeats):
                raise ValueError(f"arch.pattern repeats an item more than {MAX_REPEATS:,} times")
            plan = resolve(config)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TrainingError(f"{path} describes no model: {error}") from error
        num_elements = sum(math.prod(shape) for shape in self.shapes.values())
        if num_params(config, plan) > 8 * num_elements:
            raise TrainingError(
                f"{path} describes a model of {num_params(config, plan):,} parameters; the files hold {num_elements:,}"
            )
        return config, plan

    def check(self, weights: list[Weight]) -> None:
        """Raise ConversionError with every one of `weights` that is missing, unexpected or of another shape."""
        expected = {f"{PREFIX}{weight.name}": weight.shape for weight in weights}
        problems = tensor_problems(expected, {f"{PREFIX}{name}": shape for name, shape in self.shapes.items()})
        if problems:
            raise ConversionError(problems)


def _counts(config: ModelConfig, largest: int, num_tensors: int) -> list[tuple[str, int | None, int]]:
    """List (key, value, limit) of every size in `config`, given the largest dimension and the number of tensors."""
    size, widths = config.size, ("d_model", "num_heads", "head_dim", "d_ff", "vocab_size")
    counts = [(f"size.{key}", getattr(size, key), largest) for key in widths]
    counts.append(("size.num_layers", size.num_layers, num_tensors))
    if config.arch.block is not None:
        block = config.arch.block
        counts += [(f"arch.block.token.{key}", getattr(block.token, key), largest) for key in widths[:-1]]
        counts.append(("arch.block.length", block.length, largest))
    return counts


def scan(path: Path) -> list[Entry]:
    """List the weights in a file; optimizer state is passed over.

    Raises TrainingError where its header cannot be read or is impossible.
    """
    entries = []
    try:
        with open_file(path) as file:
            sharding = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "null"))
            for key in file.keys():  # noqa: SIM118  it is no mapping
                if not key.startswith(PREFIX):
                    if not key.startswith("optimizer."):
                        raise TrainingError(f"{path}: {key} is unexpected; a checkpoint has {PREFIX}* and optimizer.*")
                    continue
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                offsets = [0] * len(shape) if sharding is None else sharding[key]["saved_offsets"]
                first_row = _first_row(offsets, len(shape))
                if first_row is None:
                    raise TrainingError(f"{path}: {key} begins at {str(offsets)[:80]}; weights are sharded by rows")
                entries.append(Entry(key.removeprefix(PREFIX), dtype, Piece(path, first_row, shape)))
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"cannot read {path}: DCP_SHARDING_INFO makes no sense ({error!r})") from error
    return entries


def _first_row(offsets: Any, num_dims: int) -> int | None:
    """Return the row at which a piece begins; None where `offsets` name no row of a tensor of `num_dims` dimensions."""
    if not isinstance(offsets, list) or len(offsets) != num_dims or any(type(number) is not int for number in offsets):
        return None
    if any(offsets[1:]) or any(number < 0 for number in offsets):
        return None
    return offsets[0] if offsets else 0


def join(entries: list[Entry]) -> dict[str, StoredTensor]:
    """Put tensors together from their pieces. Raises TrainingError where rows are missing or repeated."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.name, []).append(entry)
    return {
        name: _join(name, [entry.piece for entry in group], {entry.dtype for entry in group})
        for name, group in grouped.items()
    }


def _join(name: str, pieces: list[Piece], dtypes: set[str]) -> StoredTensor:
    pieces.sort(key=lambda piece: (piece.first_row, piece.shape[:1]))  # a process may have had no row
    files = ", ".join(str(piece.file) for piece in pieces[:4])
    if len(dtypes) > 1 or len({piece.shape[1:] for piece in pieces}) > 1:
        raise TrainingError(f"{PREFIX}{name}: its pieces are of different types or widths, in {files}")
    row = 0
    for piece in pieces:
        if piece.first_row != row:
            state = "missing" if piece.first_row > row else "there twice"
            raise TrainingError(f"{PREFIX}{name}: rows from {min(row, piece.first_row)} on are {state}, in {files}")
        row += piece.shape[0] if piece.shape else 1
    if not pieces[0].shape and len(pieces) > 1:
        raise TrainingError(f"{PREFIX}{name} is there twice, in {files}")
    shape = (row, *pieces[0].shape[1:]) if pieces[0].shape else ()
    return StoredTensor(shape, tuple(pieces))
