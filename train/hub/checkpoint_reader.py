"""The weights of a run's checkpoint, whether one process wrote them or several wrote a share each.

Nothing in the files is believed: headers, the list of files and the configuration are checked against each other before
anything of the size that they claim is allocated.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch

from arch import ModelConfig, Plan, from_dict, plan_from_dict, resolve
from arch.convert import ConversionError, Weight, tensor_problems
from arch.footprint import num_params
from train.checkpoint import INFO, load_info
from train.errors import TrainingError
from train.hub.tensor_files import SafetensorsReader
from train.tensor_pieces import stored_tensors

PREFIX = "model."
# Larger counts in a configuration are nonsense, and would take unbounded time to expand.
MAX_REPEATS = 10_000


class CheckpointReader(SafetensorsReader):
    """The weights of the checkpoint `folder` by parameter name, a TensorReader.

    Raises TrainingError if its files contradict each other or make no sense.
    """

    prefix = PREFIX
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    not_finite = "is not finite; export an earlier checkpoint"

    def __init__(self, folder: Path):
        self.info = load_info(folder)
        stored = {name: tensor for name, tensor in stored_tensors(folder).items() if name.startswith(PREFIX)}
        super().__init__(folder, {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()})

    def model(self) -> tuple[ModelConfig, Plan]:
        """Return the model of the checkpoint. Raises TrainingError if its configuration describes none."""
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
            if "plan" in self.info and plan_from_dict(self.info["plan"]) != plan:
                raise ValueError("its plan is not that of its config")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RecursionError) as error:
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
