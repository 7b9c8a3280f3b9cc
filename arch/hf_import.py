"""Hugging Face checkpoints as ours, one tensor at a time: the stock classes of convert.py, GPT-NeoX (Pythia), and
the two kinds of our own exports that have code with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .convert import ARCHITECTURES, ConversionError, UnsupportedModelError, Weight, model_config, weight_map
from .convert_neox import BUFFERS, from_neox, neox_config, neox_shapes
from .convert_remote import MODEL_TYPE, remote_model_config
from .convert_shipped import MODEL_TYPE as SHIPPED
from .convert_shipped import shipped_model_config, shipped_weights

NEOX = "gpt_neox"


@dataclass(frozen=True)
class Incoming:
    """One tensor of theirs: the shape that it must have, and what it is under our names."""

    shape: torch.Size
    convert: Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """What a config.json describes, as ours.

    tensors   every tensor there must be, by their name
    copies    the tensor that another one, which may be there, is a copy of
    """

    config: ModelConfig
    tensors: dict[str, Incoming]
    copies: dict[str, str]


def source(hf: Mapping[str, Any]) -> Source:
    """What the config.json `hf` describes.

    Raises UnsupportedModelError with every key that says what our models cannot do, and LayoutError where the widths
    are impossible.
    """
    model_type = str(hf.get("model_type"))
    if model_type == NEOX:
        config = neox_config(hf)
        tensors = {
            name: Incoming(shape, partial(_from_neox, name, config.size.num_heads))
            for name, shape in neox_shapes(config).items()
        }
        embed, head = "gpt_neox.embed_in.weight", "embed_out.weight"
    elif model_type in (*ARCHITECTURES, MODEL_TYPE):
        config = remote_model_config(hf) if model_type == MODEL_TYPE else model_config(hf)
        tensors = {w.theirs: Incoming(w.shape, partial(_from_stock, w)) for w in weight_map(config, hf)}
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
    elif model_type == SHIPPED:
        config = shipped_model_config(hf)
        tensors = {w.theirs: Incoming(w.shape, partial(_from_stock, w)) for w in shipped_weights(config)}
        return Source(config, tensors, {})
    else:
        known = ", ".join((*ARCHITECTURES, NEOX, MODEL_TYPE, SHIPPED))
        raise UnsupportedModelError([f"model_type is {model_type!r}; it must be one of {known}"])
    return Source(config, tensors, {head: embed} if config.size.tie_embeddings else {})


def _from_neox(name: str, num_heads: int, tensor: Tensor) -> dict[str, Tensor]:
    return from_neox({name: tensor}, num_heads)


def _from_stock(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    return {weight.ours: weight.from_hf(tensor)}


def convert(
    source: Source, shapes: Mapping[str, Sequence[int]], get: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our name and value of every weight of a checkpoint whose tensors have `shapes`; `get` reads one of them.

    Rotary tables and masks that old checkpoints hold are passed over, as is the second copy of tied embeddings. Raises
    ConversionError with every tensor that is missing, unexpected or of another shape, before the first is read.
    """
    wanted = source.tensors
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    for name, shape in shapes.items():
        if name in wanted and tuple(shape) != tuple(wanted[name].shape):
            problems.append(f"{name} has the shape {list(shape)}; it must be {list(wanted[name].shape)}")
        elif name not in wanted and name not in source.copies and not name.endswith(BUFFERS):
            problems.append(f"{name} is unexpected")
    if problems:
        raise ConversionError(problems)
    for copy, name in source.copies.items():
        if copy in shapes and not torch.equal(get(copy), get(name)):
            raise ConversionError([f"{copy} differs from {name}, and tie_word_embeddings says that it must not"])
    for name, incoming in wanted.items():
        yield from incoming.convert(get(name)).items()


def from_hf(hf: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model that the config.json `hf` describes, and the weights `tensors` for it.

    Raises as `source` and `convert`.
    """
    described = source(hf)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return described.config, dict(convert(described, shapes, tensors.__getitem__))
