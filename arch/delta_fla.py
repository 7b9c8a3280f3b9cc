"""Flash-linear-attention's kernels for stores of a matrix per head, found at run time.

`chunk_gated_delta_rule` and `chunk_kda` are the rules of delta.py. They take the place of its chunk form where tokens
attend to themselves without a cache; decoding is in delta.py always.

Shapes: B batch, T tokens, N states, K and V widths of keys and values, A 1 or K (decays).
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bounded_fla import INSTALL, BoundedBackend
from .config import SizeConfig
from .delta_spec import MatrixSpec
from .masks import SequenceBatch
from .positions import TokenPositions, token_positions
from .spans import Span
from .store_spec import StoreSpec

# Where each rule's entry point is.
ENTRY_POINTS = {
    "gated_delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
}
MAX_K_DIM = 256  # of both kernels


@functools.cache
def entry_point(rule: str) -> Any:
    """The entry point of an installed flash-linear-attention, or why there is none."""
    module, name = ENTRY_POINTS[rule]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"flash-linear-attention cannot be loaded ({error}): {INSTALL}"


@functools.cache
def kernel(rule: str) -> Callable[..., Tensor]:
    """`apply_rule` with that entry point, around which a compiled block breaks, since the compiler does not know it. To
    make outside of compiled code, which would look for it again."""
    disable: Any = torch.compiler.disable
    return functools.partial(apply_rule, disable(entry_point(rule)))


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


@dataclass(frozen=True)
class DeltaBackend(BoundedBackend):
    """The chunk form of delta.py."""

    about: str = "delta rule, plain torch"


@dataclass(frozen=True)
class DeltaFlaBackend(DeltaBackend):
    """The kernel of flash-linear-attention in place of the chunk form."""

    name: str = "fla"
    about: str = "flash-linear-attention's gated delta rule"
    rule: str = "gated_delta"

    def unsupported(self, store: StoreSpec, device: str, documents: bool) -> list[str]:
        reasons = []
        if store.slot.k_dim > MAX_K_DIM:
            reasons.append(f"keys of {store.slot.k_dim} (it takes up to {MAX_K_DIM})")
        if documents:
            reasons.append("documents")
        if device != "cuda":
            return [*reasons, f"device {device}"]
        found = entry_point(self.rule)
        return [*reasons, f"a way to run: {found}"] if isinstance(found, str) else reasons

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, together with the kernel to run."""
        return token_positions(sequences)._replace(kernel=kernel(self.rule))


def select_delta_backend(name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool) -> DeltaBackend:
    """`fla` where the backend `name` is that, the chunk form for any other.

    Raises ValueError if `fla` cannot run: nothing falls back at run time.
    """
    assert isinstance(store, MatrixSpec)
    about = {"gated_delta": DeltaFlaBackend.about, "kda": "flash-linear-attention's KDA"}[store.matrix.rule]
    backend = DeltaFlaBackend(about=about, rule=store.matrix.rule) if name == "fla" else DeltaBackend()
    if reasons := backend.unsupported(store, device, documents):
        raise ValueError(
            f"arch.stores.{store.name} on {device}: fla lacks {', '.join(reasons)}; choose another backend or auto"
        )
    return backend
