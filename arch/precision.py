"""Types to compute in where half precision would lose too much."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return dtype if dtype == torch.float64 else torch.float32


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast changes no type, on the device of `like`."""
    if not (torch.compiler.is_compiling() or torch.is_autocast_enabled(like.device.type)):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
