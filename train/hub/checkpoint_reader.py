"""The weights of a checkpoint, read one at a time, whether one process wrote them or several a share each.

Nothing in the files is believed: what a header, a list of files or a configuration says is checked against the rest
before anything of that size is allocated.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arch import ModelConfig, Plan, from_dict, resolve
from arch.convert import ConversionError, Weight
from arch.footprint import num_params
from train.checkpoint import INFO, TrainingError, load_info

PREFIX = "model."
FLOATS = ("F64", "F32", "F16", "BF16")
# What the files need not be: larger counts in a configuration are nonsense, and would take for ever to unfold.
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor from `begin` on, as one file holds them."""

    file: Path
    begin: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """One tensor: its pieces are its rows in order."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Source:
    """The weights of the checkpoint `folder`, by our names. Raises TrainingError where its files make no sense."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = load_info(folder)
        self.saved = join([piece for name in sorted(self.info["files"]) for piece in scan(folder / name)])
        self._open = lru_cache(maxsize=256)(open_file)

    def model(self) -> tuple[ModelConfig, Plan]:
        """What the weights belong to. Raises TrainingError where there is no such model."""
        where, values = self.folder / INFO, self.info.get("config")
        largest = max((max(saved.shape, default=0) for saved in self.saved.values()), default=0)
        try:
            config = from_dict(ModelConfig, values)
            size = config.size
            limits = dict.fromkeys(("d_model", "num_heads", "head_dim", "d_ff", "vocab_size"), largest)
            counts = {f"size.{key}": (getattr(size, key), limit) for key, limit in limits.items()}
            counts["size.num_layers"] = (size.num_layers, len(self.saved))
            if config.arch.block is not None:
                token, shared = config.arch.block.token, limits.keys() - {"vocab_size"}
                counts |= {f"arch.block.token.{key}": (getattr(token, key), largest) for key in shared}
                counts["arch.block.length"] = (config.arch.block.length, largest)
            for key, (count, limit) in counts.items():
                if (count or 0) > limit:
                    raise ValueError(f"{key} is {count}, too large for the weights in the files")
            repeats = re.findall(r"\sx(\d+)", json.dumps(asdict(config.arch)))
            if any(int(number) > MOST_REPEATS for number in repeats):
                raise ValueError(f"arch.pattern repeats an item more than {MOST_REPEATS:,} times")
            plan = resolve(config)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TrainingError(f"{where} describes no model: {error}") from error
        held = sum(saved.elements for saved in self.saved.values())
        if num_params(config, plan) > 8 * held:
            raise TrainingError(
                f"{where} describes a model of {num_params(config, plan):,} parameters; the files hold {held:,}"
            )
        return config, plan

    def check(self, table: list[Weight]) -> None:
        """Raises ConversionError with every weight that is missing, unexpected or of another shape."""
        wanted = {weight.ours: tuple(weight.shape) for weight in table}
        problems = [f"{PREFIX}{name} is missing" for name in wanted if name not in self.saved]
        for name, saved in self.saved.items():
            if name not in wanted:
                problems.append(f"{PREFIX}{name} is unexpected")
            elif saved.shape != wanted[name]:
                shapes = f"{list(saved.shape)}; it must be {list(wanted[name])}"
                problems.append(f"{PREFIX}{name} has the shape {shapes}")
        if problems:
            raise ConversionError(problems)

    def read(self, name: str) -> Tensor:
        """One weight, whole. Raises TrainingError where it cannot be read or is not finite."""
        saved, key = self.saved[name], f"{PREFIX}{name}"
        try:
            if len(saved.pieces) == 1:
                tensor = self._open(saved.pieces[0].file).get_tensor(key)
            else:
                parts = (self._open(piece.file).get_slice(key) for piece in saved.pieces)
                tensor = _stack(saved, parts)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{self.folder}: {key} cannot be read ({error})") from error
        if not tensor.isfinite().all():
            raise TrainingError(f"{self.folder}: {key} is not finite; export an earlier checkpoint")
        return tensor


def _stack(saved: Saved, parts: Any) -> Tensor:
    """The pieces in one tensor, of which no second copy is made."""
    whole: Tensor | None = None
    for piece, part in zip(saved.pieces, parts, strict=True):
        rows = part[:]
        if whole is None:
            whole = torch.empty(saved.shape, dtype=rows.dtype)
        whole[piece.begin : piece.begin + piece.shape[0]] = rows
    assert whole is not None
    return whole


def open_file(path: Path) -> Any:
    return safe_open(path, framework="pt")


def scan(path: Path) -> list[tuple[str, str, Piece]]:
    """(name, type, piece) of every weight in a file; what else a checkpoint holds is passed over.

    Raises TrainingError where the header is none or says what cannot be.
    """
    found = []
    try:
        with open_file(path) as file:
            written = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "null"))
            for key in file.keys():  # noqa: SIM118  it is no mapping
                if not key.startswith(PREFIX):
                    if not key.startswith("optimizer."):
                        raise TrainingError(f"{path}: {key} is unexpected; a checkpoint has {PREFIX}* and optimizer.*")
                    continue
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                offsets = [0] * len(shape) if written is None else written[key]["saved_offsets"]
                rows = _first_row(offsets, len(shape))
                if rows is None:
                    raise TrainingError(f"{path}: {key} begins at {str(offsets)[:80]}; weights are sharded by rows")
                if dtype not in FLOATS:
                    raise TrainingError(f"{path}: {key} is of type {dtype}; weights are one of {', '.join(FLOATS)}")
                found.append((key.removeprefix(PREFIX), dtype, Piece(path, rows, shape)))
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"cannot read {path}: DCP_SHARDING_INFO makes no sense ({error!r})") from error
    return found


def _first_row(offsets: Any, dims: int) -> int | None:
    """Where a piece begins; None where that is no row of a tensor of `dims` dimensions."""
    if not isinstance(offsets, list) or len(offsets) != dims or any(type(number) is not int for number in offsets):
        return None
    if any(offsets[1:]) or any(number < 0 for number in offsets):
        return None
    return offsets[0] if offsets else 0


def join(found: list[tuple[str, str, Piece]]) -> dict[str, Saved]:
    """Tensors from their pieces. Raises TrainingError where rows are missing, or are there twice."""
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, set[str]] = {}
    for name, dtype, piece in found:
        pieces.setdefault(name, []).append(piece)
        dtypes.setdefault(name, set()).add(dtype)
    return {name: _join(name, parts, dtypes[name]) for name, parts in pieces.items()}


def _join(name: str, parts: list[Piece], dtypes: set[str]) -> Saved:
    parts.sort(key=lambda part: (part.begin, part.shape[:1]))  # a process may have had no row
    if len(dtypes) > 1 or len({part.shape[1:] for part in parts}) > 1:
        raise TrainingError(f"{PREFIX}{name}: its pieces are of different types or widths, in {_files(parts)}")
    row = 0
    for part in parts:
        if part.begin != row:
            state = "missing" if part.begin > row else "there twice"
            raise TrainingError(f"{PREFIX}{name}: rows from {min(row, part.begin)} on are {state}, in {_files(parts)}")
        row += part.shape[0] if part.shape else 1
    if not parts[0].shape and len(parts) > 1:
        raise TrainingError(f"{PREFIX}{name} is there twice, in {_files(parts)}")
    shape = (row, *parts[0].shape[1:]) if parts[0].shape else ()
    return Saved(shape, dtypes.pop(), tuple(parts))


def _files(parts: list[Piece]) -> str:
    return ", ".join(str(part.file) for part in parts[:4])
