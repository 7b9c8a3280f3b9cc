"""A reader of two stores of keys and values per head (FusedKV, Lin et al. 2025): it attends to a mix of both.

A layer has weights for each channel of the keys and values of each head, one set for each store. Keys are rotated
before they are mixed: both elements of a pair have one weight, so that the mix turns with the position as they do.

Shapes: B batch, T new tokens, S slots read, D model, K key/value heads, H head (of keys, or of values), J weights of a
head's keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attend import Mask
from .config import SizeConfig
from .grouped import GroupedKV, GroupedReader
from .init import OwnInit
from .layers import Rope
from .mixed_spec import MixedSpec
from .store_spec import StoreSpec


class TwoKV(NamedTuple):
    """Keys and values of the store that a layer reads first, and of the other."""

    k_BSKH: Tensor
    v_BSKH: Tensor
    other_k_BSKH: Tensor
    other_v_BSKH: Tensor


class Mix(OwnInit):
    """Weights of two stores. They have one axis, so that optimizers take them as they do norms: without decay.

    They start at one half: neither store is preferred.
    """

    def __init__(self, store: MixedSpec):
        super().__init__()
        self.kv_heads, self.pairs = store.slot.kv_heads, store.rope_key[0] // 2
        self.keys = nn.Parameter(torch.empty(2 * self.kv_heads * store.mixed_keys))
        self.values = nn.Parameter(torch.empty(2 * self.kv_heads * store.slot.v_dim))

    def draw(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        full.fill_(0.5)

    def forward(self, two: TwoKV) -> GroupedKV:
        keys_KJ, other_keys_KJ = self.keys.to(two.k_BSKH.dtype).view(2, self.kv_heads, -1)
        values_KH, other_values_KH = self.values.to(two.v_BSKH.dtype).view(2, self.kv_heads, -1)
        keys_KH, other_keys_KH = self.of_elements(keys_KJ), self.of_elements(other_keys_KJ)
        return GroupedKV(
            two.k_BSKH * keys_KH + two.other_k_BSKH * other_keys_KH,
            two.v_BSKH * values_KH + two.other_v_BSKH * other_values_KH,
        )

    def of_elements(self, keys_KJ: Tensor) -> Tensor:
        """[K, H] weights of all elements: of the halves that are rotated against each other, and of the others."""
        pairs_KJ = keys_KJ[:, : self.pairs]
        return torch.cat((pairs_KJ, pairs_KJ, keys_KJ[:, self.pairs :]), dim=-1)


class MixedReader(GroupedReader):
    """Queries of this layer over a mix of the keys and values of two stores."""

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__(size, store)
        assert isinstance(store, MixedSpec)
        self.mix = Mix(store)

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, kv: TwoKV, rope: Rope, mask: Mask, query_table: Tensor | None = None
    ) -> Tensor:
        """Attend as GroupedReader does, to the mix."""
        two = TwoKV(*(tensor.to(x_BTD.dtype) for tensor in kv))  # a cache may hold another type
        return super().forward(x_BTD, self.mix(two), rope, mask, query_table)
