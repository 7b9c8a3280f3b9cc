"""Kernels of flash-linear-attention, found at run time, for stores that are states: where tokens attend to themselves
without a cache they take the place of the chunk form. Decoding is in plain torch always."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .masks import SequenceBatch
from .positions import PositionsBackend, TokenPositions
from .spans import Span
from .store_spec import StoreSpec


@functools.cache
def entry_point(module: str, name: str) -> Any:
    """A function of an installed flash-linear-attention, or why there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f'flash-linear-attention cannot be loaded ({error}): pip install -e ".[fla]"'


@functools.cache
def kernel(call: Callable[..., Tensor], module: str, name: str) -> Callable[..., Tensor]:
    """`call` with that entry point, around which a compiled block breaks, since the compiler does not know it. To make
    outside of compiled code, which would look for it again."""
    disable: Any = torch.compiler.disable
    return functools.partial(call, disable(entry_point(module, name)))


@dataclass(frozen=True)
class FlaBackend(PositionsBackend):
    """A kernel of flash-linear-attention: `call` with the function `entry` of a module as its first argument."""

    call: Callable[..., Tensor]
    entry: tuple[str, str]

    def check(self, lacks: list[str], store: StoreSpec, device: str, documents: bool) -> None:
        """Raise ValueError with what the kernel `lacks` for `store`, and what else keeps it from running: nothing falls
        back at run time."""
        reasons = [*lacks, "documents"] if documents else list(lacks)
        if device != "cuda":
            reasons.append(f"device {device}")
        elif isinstance(found := entry_point(*self.entry), str):
            reasons.append(f"a way to run: {found}")
        if reasons:
            raise ValueError(
                f"arch.stores.{store.name} on {device}: fla lacks {', '.join(reasons)}; choose another backend or auto"
            )

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, together with the kernel to run."""
        return super().mask(sequences, window, dtype)._replace(kernel=kernel(self.call, *self.entry))
