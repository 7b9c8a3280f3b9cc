"""Flash-linear-attention's kernels for stores of a matrix per head: `chunk_gated_delta_rule` and `chunk_kda` are the
rules of delta.py.

Shapes: B batch, T tokens, N states, K and V widths of keys and values, A 1 or K (decays).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import SizeConfig
from .delta_spec import MatrixSpec
from .fla_backend import FlaBackend
from .positions import PositionsBackend
from .store_spec import StoreSpec

# What the log calls each rule's kernel, and its entry point.
KERNELS = {
    "gated_delta": (
        "flash-linear-attention's gated delta rule",
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ),
    "kda": ("flash-linear-attention's KDA", ("fla.ops.kda", "chunk_kda")),
}
MAX_K_DIM = 256  # of both kernels


def apply_rule(
    function: Callable[..., Any],
    q_BTNK: Tensor,
    k_BTNK: Tensor,
    v_BTNV: Tensor,
    log_BTNA: Tensor,
    b_BTN: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """[B, T, N, V] what scaled queries read, in `dtype`: of fp32 the kernel makes TF32, or refuses it.

    Queries and keys come normalised and one for each state: versions differ in what they normalise and group. Decays
    and strengths stay in fp32.
    """
    q, k, v = (x.to(dtype) for x in (q_BTNK, k_BTNK, v_BTNV))
    log = log_BTNA.squeeze(-1) if log_BTNA.shape[-1] == 1 else log_BTNA
    out_BTNV: Tensor = function(q, k, v, log, b_BTN, scale=1.0)[0]
    return out_BTNV


def select_delta_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> PositionsBackend:
    """`fla` where the backend `name` is that, the chunk form for any other.

    Raises ValueError if `fla` cannot run.
    """
    assert isinstance(store, MatrixSpec)
    if name != "fla":
        return PositionsBackend("chunks", "delta rule, plain torch")
    about, entry = KERNELS[store.matrix.rule]
    backend, k_dim = FlaBackend(name, about, apply_rule, entry), store.slot.k_dim
    lacks = [f"keys of {k_dim} (it takes up to {MAX_K_DIM})"] if k_dim > MAX_K_DIM else []
    backend.check(lacks, store, device, documents)
    return backend
