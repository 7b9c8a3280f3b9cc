"""Weights and configurations between this project and Hugging Face: what every format shares.

Each module convert_<format>.py has `from_hf_config`, `weights` and, unless the format is only imported, `to_hf_config`;
of the stock classes the first and the last are files of their own. convert_formats.py registers them. What the other
side cannot compute exactly is refused, never approximated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from .config import HF_SIZE_KEYS, STYLE_KEYS, STYLES, ModelConfig, SizeConfig, Style, style_of
from .model import build
from .precision import at_least_fp32
from .store_spec import StoreSpec

# Field of SizeConfig, key of config.json.
SIZE_KEYS = HF_SIZE_KEYS | {"norm_eps": "rms_norm_eps", "init_std": "initializer_range"}
MAX_WIDTH = 2**20  # of any weight; a config.json that names more describes no model, and could not be counted
MAX_SEQ_LEN = 2**40
# Left open in every exported config.json: the stock defaults would end a generation at token 2.
NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Buffers of old checkpoints, which are computed from the configuration: masks and rotary frequencies.
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. The message lists every problem found."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))


class UnsupportedModelError(ConversionError):
    """A model that nothing on the other side computes exactly."""


class TensorReader(Protocol):
    """Named tensors that are read one at a time: shapes of all of them at once, values by `get`."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]: ...

    def get(self, name: str) -> Tensor: ...


class StateDict:
    """Tensors in memory as a TensorReader."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Weight:
    """One parameter and the tensor of a Hugging Face checkpoint that holds it.

    shape   of the parameter
    rotary  the rows come in heads of (plain, rotated) rows, and the P rotated ones are ordered differently: here row i
            is rotated against row i + P/2 (half-split), there row 2i against row 2i + 1 (interleaved)
    fused   (part, num_heads): the tensor holds queries, keys and values head by head, and the parameter is number
            `part` of the three; imported only
    offset, factor  the parameter is (tensor + offset) * factor, in at least fp32: norms of Gemma 3 hold weights less 1
    """

    name: str
    hf_name: str
    shape: torch.Size
    rotary: tuple[int, int] | None = None
    fused: tuple[int, int] | None = None
    offset: float = 0.0
    factor: float = 1.0

    @property
    def hf_shape(self) -> torch.Size:
        return self.shape if self.fused is None else torch.Size((3 * self.shape[0], *self.shape[1:]))

    @property
    def shifted(self) -> bool:
        return (self.offset, self.factor) != (0.0, 1.0)

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Convert the parameter to the tensor; returns `tensor` itself where both are the same."""
        assert self.fused is None, f"{self.name} is part of a fused tensor"
        if self.shifted:
            return tensor.to(at_least_fp32(tensor.dtype)) / self.factor - self.offset
        return self._reorder(tensor, "g (two p) d -> g (p two) d")

    def from_hf(self, tensor: Tensor) -> Tensor:
        """Convert the tensor to the parameter, the inverse of `to_hf`."""
        if self.shifted:
            return (tensor.to(at_least_fp32(tensor.dtype)) + self.offset) * self.factor
        if self.fused is not None:
            part, num_heads = self.fused
            return rearrange(tensor, "(n three h) ... -> three (n h) ...", n=num_heads, three=3)[part]
        return self._reorder(tensor, "g (p two) d -> g (two p) d")

    def _reorder(self, tensor: Tensor, order: str) -> Tensor:
        if self.rotary is None:
            return tensor
        num_plain = self.rotary[0]
        heads = rearrange(tensor, "(g h) d -> g h d", h=sum(self.rotary))
        heads = torch.cat((heads[:, :num_plain], rearrange(heads[:, num_plain:], order, two=2)), dim=1)
        return rearrange(heads, "g h d -> (g h) d")


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of a model of `config`."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in build(config, init=False).named_parameters()}


def tensor_problems(expected: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Every tensor of `shapes` that is missing, of another shape than `expected`, or unexpected."""
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    for name, shape in shapes.items():
        if name not in expected:
            problems.append(f"{name} is unexpected")
        elif tuple(shape) != tuple(expected[name]):
            problems.append(f"{name} has the shape {list(shape)}; it must be {list(expected[name])}")
    return problems


def value_problems(hf: Mapping[str, Any], required: Mapping[str, Any]) -> list[str]:
    """Every key of a config.json that is present and has another value than `required`."""
    return [
        f"{key} is {hf[key]!r}; it must be {value!r}"
        for key, value in required.items()
        if hf.get(key) not in (None, value)
    ]


def size_problems(hf: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """Every size of a config.json that is no size; those of `optional` may be null."""
    problems = []
    for key in (*required, *optional):
        value = hf.get(key)
        largest = MAX_SEQ_LEN if key == "max_position_embeddings" else MAX_WIDTH
        if value is None:
            problems += [] if key in optional else [f"{key} is missing"]
        elif key == "tie_word_embeddings":
            problems += [] if type(value) is bool else [f"{key} is {value!r}; it must be true or false"]
        elif key.endswith(("_eps", "_range")):
            problems += [] if is_positive(value) else [f"{key} is {value!r}; it must be a positive number"]
        elif type(value) is not int or not 1 <= value <= largest:
            problems.append(f"{key} is {value!r}; it must be a whole number from 1 to {largest}")
    return problems


def style_problems(size: SizeConfig, known: Sequence[Style] = (STYLES["llama"],)) -> list[str]:
    """The style of `size` as a reason against an export, unless it is one of `known`."""
    if style_of(size) in known:
        return []
    own = [f"{key} {getattr(size, key)}" for key in STYLE_KEYS if getattr(size, key) is not None]
    return [f"size.style: {', '.join([size.style, *own])} is not exported"]


def quoted(stores: Iterable[StoreSpec]) -> str:
    """The names of `stores`, each once, for a reason against an export."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(store.name for store in stores))


def is_positive(value: Any) -> bool:
    """Test that `value` is a positive, finite number (and no bool)."""
    return type(value) in (int, float) and 0 < value < math.inf
