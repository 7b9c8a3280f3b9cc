"""Token shards: a folder of raw little-endian integers and a manifest that says what they are.

manifest.json       counts, checksums, tokenizer; written last, so that a folder with one is complete
tokenizer.json      the tokenizer, as `tokenizers` saves it
token_bytes.npy     UTF-8 bytes that each token stands for, for bits per byte
train-00000.bin ... documents one after another, each ended by the end-of-text token
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FORMAT = 1


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """`bytes` and `documents` of the text behind `tokens`, end-of-text tokens included in the latter."""

    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    format: int
    corpus: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_text: int
    dtype: str
    splits: dict[str, Split]

    @property
    def digest(self) -> str:
        """One checksum of tokenizer and tokens: equal digests are equal data."""
        parts = [self.tokenizer_sha256, *(shard.sha256 for split in self.splits.values() for shard in split.shards)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises DataError on a manifest that is missing or is not one of ours."""
        path = folder / "manifest.json"
        if not path.exists():
            raise DataError(f"{path} is missing: {folder} holds no prepared data; run data/prepare.py")
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise DataError(f"{path} has format {values['format']}, this version reads {FORMAT}; prepare it again")
            values["splits"] = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in values["splits"].items()
            }
            return cls(**values)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not a manifest ({error!r}); delete the folder and prepare it again") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenWindows:
    """The windows of `seq_len` + 1 consecutive tokens of one split, memory-mapped.

    Successive windows share a token: the last target of one is the first input of the next, so that every token but a
    shard's first is a target exactly once. A shard's incomplete last window is left out.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, seq_len: int):
        if split not in manifest.splits:
            raise DataError(f"{folder} has no split {split}; it has {', '.join(manifest.splits)}")
        self.seq_len = seq_len
        self.arrays = [_open(folder, shard, np.dtype(manifest.dtype)) for shard in manifest.splits[split].shards]
        counts = [max(0, len(array) - 1) // seq_len for array in self.arrays]
        self.starts = np.cumsum([0, *counts])
        if len(self) == 0:
            raise DataError(
                f"{folder}: no shard of split {split} holds {seq_len + 1} tokens, one window at seq_len {seq_len}; "
                "use a shorter seq_len or more text"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        begin = (index - int(self.starts[shard])) * self.seq_len
        return self.arrays[shard][begin : begin + self.seq_len + 1]


def _open(folder: Path, shard: Shard, dtype: np.dtype) -> np.ndarray:
    path = folder / shard.file
    if path.parent != folder or not path.is_file():
        raise DataError(f"{path} is named by the manifest and is not there; prepare the data again")
    size, expected = path.stat().st_size, shard.tokens * dtype.itemsize
    if size != expected:
        raise DataError(f"{path} has {size} bytes, its manifest says {expected}; prepare it again")
    return np.memmap(path, dtype=dtype, mode="r") if shard.tokens else np.empty(0, dtype)
