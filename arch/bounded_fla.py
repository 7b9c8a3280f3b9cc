"""Kernels of bounded stores on CUDA: FlexAttention for the window beside the slots, and flash-linear-attention's for
rule `gated`, found at run time: gated slot attention.

Its recurrence (Zhang et al. 2024) is that of bounded.py with s = p and g = log(1 - p). It takes the place of the chunk
form where tokens attend to themselves without a cache; decoding is in bounded.py always.

Shapes: B batch, T tokens, N query heads, K key/value heads, H head, M slots.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .attend import BACKENDS, Needs
from .attend_kernels import run_flex
from .config import SizeConfig
from .masks import SequenceBatch, blocks
from .positions import Near, TokenPositions, token_positions
from .spans import Span
from .store_spec import StoreSpec

INSTALL = 'pip install -e ".[fla]"'
# More slots than the kernel has one tile for, or numbers it pads, are not tried.
NUM_SLOTS = (16, 32, 64, 128, 256)


@functools.cache
def chunk_gsa() -> Any:
    """The entry point of an installed flash-linear-attention, or why there is none."""
    try:
        return importlib.import_module("fla.ops.gsa").chunk_gsa
    except (ImportError, AttributeError) as error:
        return f"flash-linear-attention cannot be loaded ({error}): {INSTALL}"


@functools.cache
def kernel() -> Callable[..., Tensor]:
    """`gsa` with that entry point, around which a compiled block breaks, since the compiler does not know it. To make
    outside of compiled code, which would look for it again."""
    disable: Any = torch.compiler.disable
    return partial(gsa, disable(chunk_gsa()))


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


@dataclass(frozen=True)
class BoundedBackend:
    """The kernel of a bounded store's readers, for tokens that attend to themselves: the chunk form in plain torch.

    flex  a window is read by FlexAttention
    """

    name: str = "chunks"
    about: str = "bounded, plain torch"
    flex: bool = False

    def unsupported(self, store: StoreSpec, device: str, documents: bool) -> list[str]:
        """List what `store` and `device` require and it lacks, and why it cannot run here; empty if it can."""
        return []

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, with the mask of a window that a kernel reads; called as `attend.Backend.mask`."""
        positions = token_positions(sequences)
        if window is None or not self.flex or dtype not in BACKENDS["flex"].dtypes:
            return positions
        return positions._replace(near=Near(partial(run_flex, lse=True), blocks(sequences, window)))


@dataclass(frozen=True)
class FlaBackend(BoundedBackend):
    """The kernel of flash-linear-attention in place of the chunk form."""

    name: str = "fla"
    about: str = "flash-linear-attention's gated slot attention"

    def unsupported(self, store: StoreSpec, device: str, documents: bool) -> list[str]:
        reasons = []
        if store.rule != "gated":
            reasons.append(f"rule {store.rule}")
        if store.sinks:
            reasons.append("sinks")
        if store.num_slots not in NUM_SLOTS:
            reasons.append(f"{store.num_slots} slots (it takes {', '.join(map(str, NUM_SLOTS))})")
        if documents:
            reasons.append("documents")
        if device != "cuda":
            return [*reasons, f"device {device}"]
        found = chunk_gsa()
        return [*reasons, f"a way to run: {found}"] if isinstance(found, str) else reasons

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, together with the kernel to run."""
        return token_positions(sequences)._replace(kernel=kernel())


def select_bounded_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> BoundedBackend:
    """`fla` where the backend `name` is that, the chunk form for any other; on CUDA with FlexAttention for a window,
    unless another backend is named.

    Raises ValueError where `fla` cannot run: nothing falls back at run time.
    """
    backend = FlaBackend() if name == "fla" else BoundedBackend()
    if reasons := backend.unsupported(store, device, documents):
        raise ValueError(
            f"arch.stores.{store.name} on {device}: fla lacks {', '.join(reasons)}; choose another backend or auto"
        )
    needs = Needs(widths=(store.slot.k_dim, store.slot.v_dim))
    if store.window is not None and name in ("auto", "flex") and not BACKENDS["flex"].unsupported(needs, device):
        return BoundedBackend("chunks+flex", "bounded, plain torch, a window by FlexAttention", flex=True)
    return backend
