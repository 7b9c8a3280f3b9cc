"""Safetensors files, read and written with one tensor in memory at a time.

Readers fulfil `arch.convert.TensorReader`. CheckpointReader (checkpoint_reader.py) and HFFolder (folder_reader.py) find
and check the files of their kind of folder; how a tensor is read is here, once, as is how files are written.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arch.convert import TensorReader
from train.errors import TrainingError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # that can be written
HEADER_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor from `first_row` on, as one file has them."""

    file: Path
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its pieces are its rows in order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


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


def open_file(path: Path) -> Any:
    """Open a safetensors file. Raises OSError or SafetensorError."""
    return safe_open(path, framework="pt")


def write_shards(
    folder: Path,
    tensors: TensorReader,
    dtype: torch.dtype,
    shard_bytes: float,
    file_name: Callable[[int, int], str],
    prefix: str = "",
) -> dict[str, list[str]]:
    """Write `tensors` as `dtype` to files of at most `shard_bytes`; a larger tensor has a file to itself.

    file_name  (number from 1 on, number of files) -> name
    prefix     before every name in the files

    Returns the names, prefix included, in each file. Raises TrainingError where a value is too large for `dtype`,
    OSError where a file cannot be written, and passes on what `tensors` raises.
    """
    layout = {
        name: torch.empty(torch.Size(shape), dtype=dtype, device="meta") for name, shape in tensors.shapes.items()
    }
    split = split_torch_state_dict_into_shards(layout, max_shard_size=int(shard_bytes))
    shards = list(split.filename_to_tensors.values())
    written = {}
    for number, names in enumerate(shards, start=1):
        path = folder / file_name(number, len(shards))
        with path.open("wb") as file:
            file.write(_header({f"{prefix}{name}": layout[name] for name in names}))
            for name in names:
                _write_tensor(file, name, tensors.get(name), layout[name])
            file.flush()
            os.fsync(file.fileno())
        written[path.name] = [f"{prefix}{name}" for name in names]
    return written


def _header(layout: Mapping[str, Tensor]) -> bytes:
    """The beginning of a safetensors file: length of the header, header. The tensors follow, one after the other.

    Written here because the writer of the library takes all tensors of a file at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in layout.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": HEADER_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, layout: Tensor) -> None:
    assert tensor.shape == layout.shape, name
    tensor = tensor.to(layout.dtype).contiguous()
    if not tensor.isfinite().all():
        raise TrainingError(f"{name} has elements too large for {HEADER_NAMES[tensor.dtype]}")
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
