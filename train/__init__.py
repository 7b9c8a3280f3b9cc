"""Training any layout with Lightning. Import it before torch, which then lets waiting threads sleep, and memory of a
GPU grow in place."""

import os

# OpenMP's threads spin while they wait, unless told otherwise: on a machine that does other work too, they take the
# cores from the very threads they wait for. torch's OpenMP library reads the variable when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Of segments that cannot grow the allocator of CUDA leaves gaps of gigabytes where shapes vary. The variable's former
# name counts too: whatever the user has set wins.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# isort: split
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":  # which brings torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from train.loading import load

    return load
