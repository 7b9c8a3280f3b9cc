"""Kernels of bounded stores on CUDA: FlexAttention for the window beside the slots, and flash-linear-attention's for
rule `gated`, gated slot attention.

Its recurrence (Zhang et al. 2024) is that of bounded.py with s = p and g = log(1 - p).

Shapes: B batch, T tokens, N query heads, K key/value heads, H head, M slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .attend import BACKENDS, Needs
from .attend_kernels import run_flex
from .config import SizeConfig
from .fla_backend import FlaBackend
from .masks import SequenceBatch, blocks
from .positions import Near, PositionsBackend, TokenPositions
from .spans import Span
from .store_spec import StoreSpec

ENTRY_POINT = ("fla.ops.gsa", "chunk_gsa")
# More slots than the kernel has one tile for, or numbers it pads, are not tried.
NUM_SLOTS = (16, 32, 64, 128, 256)


def gsa(
    function: Callable[..., Any], q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, p_BTM: Tensor, scale: float
) -> Tensor:
    """[B, T, N, H] in the type of the strengths, at least fp32: the kernel keeps states in the type of its inputs.

    Heads are repeated here: versions before 0.6 give wrong shapes of gradients for grouped ones. `g` is always given,
    which the same versions need.
    """
    heads, group = q_BTNH.shape[2], q_BTNH.shape[2] // k_BTKH.shape[2]
    q, k, v = (x.to(p_BTM.dtype) for x in (q_BTNH, k_BTKH, v_BTKH))
    k, v = (repeat(x, "b t k h -> b t (k g) h", g=group) for x in (k, v))
    left_BTM = (1 - p_BTM).clamp(min=torch.finfo(p_BTM.dtype).eps)
    s, g = (repeat(x, "b t m -> b t n m", n=heads) for x in (p_BTM, left_BTM.log()))
    out_BTNH: Tensor = function(q, k, v, s, g, scale=scale)[0]
    return out_BTNH


def gsa_lacks(store: StoreSpec) -> list[str]:
    """List what `store` requires and gated slot attention does not have."""
    reasons = [] if store.rule == "gated" else [f"rule {store.rule}"]
    if store.sinks:
        reasons.append("sinks")
    if store.num_slots not in NUM_SLOTS:
        reasons.append(f"{store.num_slots} slots (it takes {', '.join(map(str, NUM_SLOTS))})")
    return reasons


class FlexWindowBackend(PositionsBackend):
    """The chunk form, whose window is read by FlexAttention."""

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, with the mask of the window, if a kernel reads it in `dtype`."""
        positions = super().mask(sequences, window, dtype)
        if dtype not in BACKENDS["flex"].dtypes:
            return positions
        return positions._replace(near=Near(partial(run_flex, lse=True), blocks(sequences, window)))


def select_bounded_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> PositionsBackend:
    """`fla` where the backend `name` is that, the chunk form for any other; on CUDA with FlexAttention for a window,
    unless another backend is named.

    Raises ValueError where `fla` cannot run.
    """
    if name == "fla":
        backend = FlaBackend(name, "flash-linear-attention's gated slot attention", gsa, ENTRY_POINT)
        backend.check(gsa_lacks(store), store, device, documents)
        return backend
    needs = Needs(widths=(store.slot.k_dim, store.slot.v_dim))
    if store.window is not None and name in ("auto", "flex") and not BACKENDS["flex"].unsupported(needs, device):
        return FlexWindowBackend("chunks+flex", "bounded, plain torch, a window by FlexAttention")
    return PositionsBackend("chunks", "bounded, plain torch")
