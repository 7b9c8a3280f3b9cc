"""Linear layers of the blocks in fp8, by torchao; weights, checkpoints and exported models are as in bf16.

Inputs, weights and gradients are scaled by their largest magnitude, each as a whole, in every product (Micikevicius et
al. 2022, "FP8 formats for deep learning"): E4M3 forward, E5M2 for gradients. Outputs are bf16. The output matrix,
embeddings, norms, attention, the routers of bounded stores and the decays of matrices are not touched.
"""

import importlib
from typing import Any

import torch
from torch import nn

from arch import LanguageModel
from data.cli import UsageError

INSTALL = 'pip install -e ".[fp8]"'
NEEDED = (8, 9)  # compute capability
MULTIPLE = 16  # of both widths, which the products take
# From torchao's float8 README: with no more outputs, and no wider input, a product is slower than in bf16.
NARROW_OUT, NARROW_IN = 1024, 4096


def check_fp8(device_type: str) -> None:
    """Raise UsageError unless this machine can compute in fp8."""
    have = torch.cuda.get_device_capability() if device_type == "cuda" else None
    if have is None or have < NEEDED:
        found = "there is no GPU here" if have is None else f"{torch.cuda.get_device_name()} has {have[0]}.{have[1]}"
        raise UsageError(
            f"trainer.precision=fp8 needs a GPU of compute capability {NEEDED[0]}.{NEEDED[1]} or later (L4, RTX 4090, "
            f"H100, B200), and {found}; use trainer.precision=bf16"
        )
    torchao_float8()


def torchao_float8() -> Any:
    """The module torchao.float8. Raises UsageError if it is not installed or does not go with this torch."""
    try:
        return importlib.import_module("torchao.float8")
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"trainer.precision=fp8 needs torchao, which cannot be loaded ({error}): {INSTALL}, or use bf16"
        ) from error


def takes_fp8(module: nn.Module, name: str) -> bool:
    """Tell whether the module `name` of a block is a linear layer that is faster in fp8."""
    if not isinstance(module, nn.Linear) or not {"router", "decay", "pool"}.isdisjoint(name.split(".")):
        return False
    narrow = module.out_features <= NARROW_OUT and module.in_features <= NARROW_IN
    return not (module.in_features % MULTIPLE or module.out_features % MULTIPLE or narrow)


def convert_to_fp8(model: LanguageModel, emulate: bool = False) -> int:
    """Let the linear layers of all blocks that gain from it compute in fp8; return their number.

    Parameters keep their names and types. `emulate`: products in fp32 of what was rounded to fp8, on any device.
    Raises UsageError if no layer is wide enough.
    """
    float8 = torchao_float8()
    config = float8.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # tokens of a micro-batch: any number
    for stack in model.stacks:
        float8.convert_to_float8_training(stack.layers, module_filter_fn=takes_fp8, config=config)
    linear = importlib.import_module("torchao.float8.float8_linear").Float8Linear
    number = sum(isinstance(module, linear) for module in model.modules())
    if not number:
        raise UsageError(
            f"trainer.precision=fp8: no linear layer of the blocks is faster in it; widths must be multiples of "
            f"{MULTIPLE}, and outputs wider than {NARROW_OUT} or inputs wider than {NARROW_IN}: use bf16"
        )
    return number
