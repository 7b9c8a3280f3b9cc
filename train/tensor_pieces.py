"""The safetensors files of a checkpoint: written one tensor after the other, and their headers, checked before use.

A tensor is one piece, or several, each in a file of its own: the rows that one process had. DCP_SHARDING_INFO, in the
header of a file, has the place of each piece in its tensor.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import TrainingError

SHARDING = "DCP_SHARDING_INFO"
PREFIXES = ("model.", "optimizer.")
PART_BYTES = 2**26  # that are in host memory at one time while a tensor is written
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# As command lines spell them.
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_CODES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor from `first_row` on, as one file has them."""

    file: Path
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its pieces are its rows in order. `dtype` is a name of DTYPES."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    dtype: str = "F32"


class Entry(NamedTuple):
    """A piece of the tensor `name`, and the type that its file gives it."""

    name: str
    dtype: str
    piece: Piece


def open_file(path: Path) -> Any:
    """Open a safetensors file. Raises OSError or SafetensorError."""
    return safe_open(path, framework="pt")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read what the headers of all files in `folder` say, by name: `model.*` and `optimizer.*`.

    Raises TrainingError, naming file and tensor, if a header cannot be read or is impossible, or files contradict
    each other.
    """
    return join([entry for path in sorted(folder.glob("*.safetensors")) for entry in scan(path)])


def scan(path: Path) -> list[Entry]:
    """List the pieces in a file. Raises TrainingError if its header cannot be read or is impossible."""
    entries = []
    try:
        with open_file(path) as file:
            sharding = json.loads((file.metadata() or {}).get(SHARDING, "null"))
            for key in file.keys():  # noqa: SIM118  it is no mapping
                if not key.startswith(PREFIXES):
                    raise TrainingError(f"{path}: {key} is unexpected; a checkpoint has model.* and optimizer.*")
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if dtype not in DTYPES:
                    raise TrainingError(f"{path}: {key} has the type {dtype}; it must be one of {', '.join(DTYPES)}")
                offsets = [0] * len(shape) if sharding is None else sharding[key]["saved_offsets"]
                first_row = _first_row(offsets, len(shape))
                if first_row is None:
                    raise TrainingError(f"{path}: {key} begins at {str(offsets)[:80]}; tensors are sharded by rows")
                entries.append(Entry(key, dtype, Piece(path, first_row, shape)))
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"cannot read {path}: {SHARDING} makes no sense ({error!r})") from error
    return entries


def _first_row(offsets: Any, num_dims: int) -> int | None:
    """Return the row at which a piece begins; None if `offsets` name no row of a tensor of `num_dims` dimensions."""
    if not isinstance(offsets, list) or len(offsets) != num_dims or any(type(number) is not int for number in offsets):
        return None
    if any(offsets[1:]) or any(number < 0 for number in offsets):
        return None
    return offsets[0] if offsets else 0


def join(entries: list[Entry]) -> dict[str, StoredTensor]:
    """Put tensors together from their pieces. Raises TrainingError if rows are missing or repeated."""
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
        raise TrainingError(f"{name}: its pieces are of different types or widths, in {files}")
    row = 0
    for piece in pieces:
        if piece.first_row != row:
            state = "missing" if piece.first_row > row else "there twice"
            raise TrainingError(f"{name}: rows from {min(row, piece.first_row)} on are {state}, in {files}")
        row += piece.shape[0] if piece.shape else 1
    if not pieces[0].shape and len(pieces) > 1:
        raise TrainingError(f"{name} is there twice, in {files}")
    shape = (row, *pieces[0].shape[1:]) if pieces[0].shape else ()
    return StoredTensor(shape, tuple(pieces), dtypes.pop())


class NewPiece(NamedTuple):
    """Type, shape, and offsets in the whole tensor of a piece to be written."""

    dtype: torch.dtype
    shape: Sequence[int]
    offsets: Sequence[int]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(
    path: Path, pieces: Mapping[str, NewPiece], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write `tensors`, in the order of `pieces`, and wait until they are on the disk.

    One of them is alive at a time, and no more than PART_BYTES of it are copied. Return size and sha256 of the file, as
    checkpoint.json has them.
    """
    digest, left = hashlib.sha256(), iter(tensors)
    with path.open("wb") as file, ThreadPoolExecutor(1) as hashing:

        def write(part: bytes | memoryview) -> None:
            hashed = hashing.submit(digest.update, part)
            file.write(part)
            hashed.result()

        def write_tensor(name: str, tensor: Tensor) -> None:
            assert (tensor.dtype, tuple(tensor.shape)) == (pieces[name].dtype, tuple(pieces[name].shape)), name
            for block in _blocks(tensor):
                write(block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        write(header(pieces, metadata))
        for name in pieces:
            write_tensor(name, next(left))
        assert next(left, None) is None
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into views of at most PART_BYTES each; one that is not contiguous into some of its rows each."""
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    rows = max(1, PART_BYTES * len(tensor) // max(1, tensor.nbytes))
    for begin in range(0, len(tensor), rows):
        yield tensor[begin : begin + rows]


def header(pieces: Mapping[str, NewPiece], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: length of the header, header. The tensors follow, one after the other.

    Written here because the writer of the library takes all tensors of a file at once.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, piece in pieces.items():
        begin, end = end, end + piece.num_bytes
        fields[name] = {
            "dtype": DTYPE_CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
