"""Attention of a strided store's readers, for tokens that attend to themselves: a dense mask of tokens and entries."""

from dataclasses import dataclass

import torch

from .attend import Mask, dense_backend
from .bounded_fla import BoundedBackend
from .config import SizeConfig
from .masks import Sequences
from .pooling import chunks_alone
from .positions import TokenPositions, token_positions
from .spans import Span
from .store_spec import StoreSpec
from .strided_spec import StridedSpec


@dataclass(frozen=True)
class StridedBackend(BoundedBackend):
    """A kernel that takes any mask, of one window, stride and rotary table."""

    kernel: str = "sdpa"
    stride: int = 1
    rope_key: tuple[int, float] = (0, 0.0)

    def mask(self, sequences: Sequences, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, with their chunks and the mask of tokens and entries."""
        assert window is None or isinstance(window, int)  # a strided store has a window
        chunks = chunks_alone(window, self.stride, self.rope_key, sequences)
        found = token_positions(sequences)._replace(chunks=chunks)
        return found.with_mask(lambda form: Mask(dense_backend(self.kernel).kernel, form))


def select_strided_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> StridedBackend:
    """`reference` where the backend `name` is that; sdpa for any other: no other kernel takes such a mask."""
    assert isinstance(store, StridedSpec)
    kernel = dense_backend(name).name
    about = "strided, a dense mask of tokens and entries"
    return StridedBackend(kernel, about, kernel=kernel, stride=store.stride, rope_key=store.rope_key)
