"""The Hugging Face formats in both directions, and checkpoints in any of them under our names.

A new format is a module convert_<format>.py and one entry in FORMATS; train/hub/targets.py adds what its folder holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import convert_neox, convert_remote, convert_shipped, convert_stock, convert_stock_export, convert_stock_import
from .config import ModelConfig
from .convert import BUFFERS, ConversionError, TensorReader, UnsupportedModelError, Weight, tensor_problems


@dataclass(frozen=True)
class Format:
    """One way in which Hugging Face checkpoints describe a model.

    model_types     values of `model_type` in its config.json
    from_hf_config  config.json -> model; raises UnsupportedModelError or LayoutError
    weights         (model, config.json) -> its parameters, and the tensors that hold them
    to_hf_config    model -> config.json, raises as well; None: import only
    tied            (copy, original): the tensor that a checkpoint of tied embeddings may repeat
    """

    model_types: tuple[str, ...]
    from_hf_config: Callable[[Mapping[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig, Mapping[str, Any]], list[Weight]]
    to_hf_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    tied: tuple[str, str] | None = None

    def to_hf(self, config: ModelConfig) -> tuple[dict[str, Any], list[Weight]]:
        """Return the config.json and the weights of a model of `config`; raises as `to_hf_config`."""
        if self.to_hf_config is None:
            raise UnsupportedModelError([f"{', '.join(self.model_types)}: this format is only imported"])
        hf = self.to_hf_config(config)
        return hf, self.weights(config, hf)


FORMATS: dict[str, Format] = {
    "stock": Format(
        tuple(convert_stock.ARCHITECTURES),
        convert_stock_import.from_hf_config,
        convert_stock.weights,
        convert_stock_export.to_hf_config,
        convert_stock.TIED,
    ),
    "neox": Format(
        (convert_neox.MODEL_TYPE,),
        convert_neox.from_hf_config,
        convert_neox.weights,
        tied=convert_neox.TIED,
    ),
    "remote": Format(
        (convert_remote.MODEL_TYPE,),
        convert_remote.from_hf_config,
        convert_remote.weights,
        convert_remote.to_hf_config,
        convert_remote.TIED,
    ),
    "shipped": Format(
        (convert_shipped.MODEL_TYPE,),
        convert_shipped.from_hf_config,
        convert_shipped.weights,
        convert_shipped.to_hf_config,
    ),
}


@dataclass(frozen=True)
class HFModel:
    """The model that a config.json describes, and the tensors that its checkpoint must have.

    tied  (copy, original) if a tensor may repeat another one, which it then must equal
    """

    config: ModelConfig
    weights: list[Weight]
    tied: tuple[str, str] | None = None


def read_config(hf: Mapping[str, Any]) -> HFModel:
    """Read the config.json `hf`.

    Raises UnsupportedModelError with every key whose value our models cannot have, and LayoutError if the widths are
    impossible.
    """
    model_type = str(hf.get("model_type"))
    for entry in FORMATS.values():
        if model_type in entry.model_types:
            config = entry.from_hf_config(hf)
            return HFModel(config, entry.weights(config, hf), entry.tied if config.size.tie_embeddings else None)
    if model_type in convert_stock_import.REFUSED:
        raise UnsupportedModelError([convert_stock_import.refusal(model_type)])
    known = ", ".join(name for entry in FORMATS.values() for name in entry.model_types)
    raise UnsupportedModelError([f"model_type is {model_type!r}; it must be one of {known}"])


class ImportedTensors:
    """The tensors of a Hugging Face checkpoint as our parameters, a TensorReader: each is converted when it is read.

    Rotary tables and masks of old checkpoints are passed over, as is the copy of tied embeddings. Raises
    ConversionError with every tensor that is missing, unexpected or of another shape, and where the copy differs.
    """

    def __init__(self, model: HFModel, reader: TensorReader):
        expected = {weight.hf_name: weight.hf_shape for weight in model.weights}
        copy, original = model.tied or ("", "")
        ignored = {name for name in reader.shapes if name not in expected and (name == copy or name.endswith(BUFFERS))}
        shapes = {name: shape for name, shape in reader.shapes.items() if name not in ignored}
        problems = tensor_problems(expected, shapes)
        if problems:
            raise ConversionError(problems)
        if copy in reader.shapes and not torch.equal(reader.get(copy), reader.get(original)):
            raise ConversionError(
                [f"{copy} differs from {original}, and tie_word_embeddings requires that they are equal"]
            )
        self.shapes: Mapping[str, Sequence[int]] = {weight.name: weight.shape for weight in model.weights}
        self._weights = {weight.name: weight for weight in model.weights}
        self._reader = reader

    def get(self, name: str) -> Tensor:
        """Read and convert the parameter `name`."""
        weight = self._weights[name]
        return weight.from_hf(self._reader.get(weight.hf_name))


class ExportedTensors:
    """Our parameters as tensors of a Hugging Face checkpoint, a TensorReader: each is converted when it is read."""

    def __init__(self, weights: list[Weight], reader: TensorReader):
        self.shapes: Mapping[str, Sequence[int]] = {weight.hf_name: weight.hf_shape for weight in weights}
        self._weights = {weight.hf_name: weight for weight in weights}
        self._reader = reader

    def get(self, name: str) -> Tensor:
        """Read and convert the parameter that is the tensor `name`."""
        weight = self._weights[name]
        return weight.to_hf(self._reader.get(weight.name))
