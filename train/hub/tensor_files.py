"""Safetensors files, read and written with one tensor in memory at a time.

Readers fulfil `arch.convert.TensorReader`. CheckpointReader (checkpoint_reader.py) and HFFolder (folder_reader.py) find
and check the files of their kind of folder; train/tensor_pieces.py has the format of one file.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor

from arch.convert import TensorReader
from train.errors import TrainingError
from train.tensor_pieces import DTYPE_CODES, NewPiece, StoredTensor, open_file, write_file


class SafetensorsReader:
    """The tensors of `folder`, wherever in its files they are.

    prefix      of every name in the files
    dtypes      that a tensor may have
    error       raised where a tensor cannot be read, has another type, or has values that are not finite
    not_finite  the end of the message in that last case
    """

    prefix = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    error: type[Exception] = TrainingError
    not_finite = "has values that are not finite"

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]):
        self.folder = folder
        self.tensors = tensors
        self._open = lru_cache(maxsize=256)(open_file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        """Read the tensor `name`, whole and in the type that it has there."""
        stored, key = self.tensors[name], f"{self.prefix}{name}"
        try:
            if len(stored.pieces) == 1:
                tensor: Tensor = self._open(stored.pieces[0].file).get_tensor(key)
            else:
                tensor = _join_rows(stored, (self._open(piece.file).get_slice(key) for piece in stored.pieces))
        except (OSError, SafetensorError) as error:
            raise self.error(f"{self.folder}: {key} cannot be read ({error})") from error
        if tensor.dtype not in self.dtypes:
            allowed = ", ".join(map(str, self.dtypes))
            raise self.error(f"{self.folder}: {key} has the type {tensor.dtype}; it must be one of {allowed}")
        if not tensor.isfinite().all():
            raise self.error(f"{self.folder}: {key} {self.not_finite}")
        return tensor


def _join_rows(stored: StoredTensor, slices: Iterable[Any]) -> Tensor:
    """Copy the pieces into one tensor, of which no second copy is made."""
    whole: Tensor | None = None
    for piece, part in zip(stored.pieces, slices, strict=True):
        rows = part[:]
        if whole is None:
            whole = torch.empty(stored.shape, dtype=rows.dtype)
        whole[piece.first_row : piece.first_row + piece.shape[0]] = rows
    assert whole is not None
    return whole


class WrittenFile(NamedTuple):
    """Names of the tensors in a file, prefix included, and its size and sha256, as checkpoint.json has them."""

    names: list[str]
    description: dict[str, Any]


def write_shards(
    folder: Path,
    tensors: TensorReader,
    dtype: torch.dtype,
    shard_bytes: float,
    file_name: Callable[[int, int], str],
    prefix: str = "",
) -> dict[str, WrittenFile]:
    """Write `tensors` as `dtype` to files of at most `shard_bytes`; a larger tensor has a file to itself.

    file_name  (number from 1 on, number of files) -> name
    prefix     before every name in the files

    Returns what each file holds, by its name. Raises TrainingError if a value is too large for `dtype`,
    OSError if a file cannot be written, and passes on what `tensors` raises.
    """
    layout = {
        name: torch.empty(torch.Size(shape), dtype=dtype, device="meta") for name, shape in tensors.shapes.items()
    }
    split = split_torch_state_dict_into_shards(layout, max_shard_size=int(shard_bytes))
    shards = list(split.filename_to_tensors.values())
    written = {}
    for number, names in enumerate(shards, start=1):
        path = folder / file_name(number, len(shards))
        pieces = {f"{prefix}{name}": NewPiece(dtype, tensors.shapes[name], ()) for name in names}
        converted = (_converted(name, tensors.get(name), dtype) for name in names)
        written[path.name] = WrittenFile(list(pieces), write_file(path, pieces, converted, {"format": "pt"}))
    return written


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise TrainingError(f"{name} has elements too large for {DTYPE_CODES[dtype]}")
    return tensor
