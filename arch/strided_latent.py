"""Strided stores of latents: one latent for each M positions, a sum of theirs (multi-head temporal latent attention,
MTLA, arXiv 2505.13544).

In chunk c each latent counts by a share of its own, computed from it and from sines and cosines of c,

    entry = sum_j s_j * latent_j        s_j = sigmoid((W_c code(c) + b_c) (W_p latent_j + b_p))

and the rotary key of an entry is that of its newest position. A token sees the entries before its own, and its own as
far as it has come. A cache keeps the sum so far in the slot that the entry will have, in its own type.

Shapes: B batch, T new tokens, D model, R latent, P rotary part; M places of a chunk, E entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attend import Mask, dense_backend
from .buffers import StateBuffer, Step, Tensors
from .config import SizeConfig
from .latent import LatentKV, LatentReader, LatentWriter
from .layers import Rope, rotate, rotate_step
from .masks import SequenceBatch
from .pooling import CachedPlaces, Places, StepPlace, places_after, places_alone, step_place
from .positions import NextToken, PositionsBackend, TokenPositions, token_positions
from .precision import at_least_fp32, no_autocast
from .spans import Span
from .store_spec import StoreSpec
from .strided_latent_spec import StridedLatentSpec


class StridedLatentBuffer(StateBuffer):
    """Holds entries [B, E, R] and their rotary keys [B, E, P]: that of chunk c of a row in slot c. The last is a sum to
    which tokens add, so that writing it twice is another state."""

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write slot `step.offset`, [1 or B] where rows differ; return the first `step.num_slots`."""
        for tensor, value in zip(self.tensors, new, strict=True):
            if isinstance(step.offset, int):
                tensor.select(1, step.offset).copy_(value)
            else:
                tensor.scatter_(1, self.rows_of(step.offset, tensor), value.unsqueeze(1).to(tensor.dtype))
        return tuple(tensor.narrow(1, 0, step.num_slots) for tensor in self.tensors)

    def entry(self, slot: int | Tensor) -> Tensor:
        """[B, R] what is in a slot, [1 or B] where rows differ."""
        latent_BER = self.tensors[0]
        if isinstance(slot, int):
            return latent_BER.select(1, slot)
        return latent_BER.gather(1, self.rows_of(slot, latent_BER)).squeeze(1)

    @staticmethod
    def rows_of(slot_B: Tensor, tensor: Tensor) -> Tensor:
        """[B, 1, R] index of a slot of each row, for `gather` and `scatter`."""
        return slot_B.view(-1, 1, 1).expand(len(tensor), 1, tensor.shape[-1])


def allocate_strided_latents(
    store: StoreSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> StridedLatentBuffer:
    """An empty buffer of a strided store of latents, for `batch` sequences of up to `capacity` tokens."""
    shapes = [tensor.shape for tensor in store.cache_tensors(capacity)]
    return StridedLatentBuffer(tuple(torch.zeros((batch, *shape), dtype=dtype, device=device) for shape in shapes))


def strided_latent_positions(store: StoreSpec, position_BT: Tensor, capacity: int, offset: int) -> TokenPositions:
    """Positions of tokens that continue a cache, for a strided store of latents, with their places in chunks."""
    assert isinstance(store, StridedLatentSpec)
    return TokenPositions(position_BT, chunks=places_after(store, position_BT, offset))


def strided_latent_step(store: StoreSpec, token: NextToken) -> TokenPositions:
    """Positions of one token of each row over a cache, for a strided store of latents."""
    assert isinstance(store, StridedLatentSpec)
    place = step_place(store, token.position_B1, token.num_tokens, token.offset, token.static)
    return TokenPositions(token.position_B1, chunks=place)


class MergeWeight(nn.Module):
    """The factor of each latent [..., R] in the entry of a chunk of `code` [..., R]; [..., 1] in at least fp32."""

    def __init__(self, store: StridedLatentSpec):
        super().__init__()
        self.code_proj = nn.Linear(store.slot.latent_dim, store.share_dim)
        self.latent_proj = nn.Linear(store.slot.latent_dim, store.share_dim)

    def forward(self, latent: Tensor, code: Tensor) -> Tensor:
        product = self.code_proj(code.to(latent.dtype)) * self.latent_proj(latent)
        score: Tensor = product.sum(dim=-1, keepdim=True)
        return score.to(at_least_fp32(score.dtype)).sigmoid()


def sums_within_chunks(x_BTR: Tensor, place_BT: Tensor, stride: int) -> Tensor:
    """[B, T, R] sum of each token and those before it in its chunk, by pairs, fours, and so on."""
    place_BT1, count = place_BT.unsqueeze(-1), 1
    while count < min(stride, x_BTR.shape[1]):
        before = F.pad(x_BTR[:, :-count], (0, 0, count, 0))
        x_BTR = x_BTR + before.masked_fill(place_BT1 < count, 0.0)
        count *= 2
    return x_BTR


class StridedLatentWriter(LatentWriter):
    """Projects the residual stream [B, T, D] to latents and rotated keys, and sums latents within chunks.

    Readers get for each new token its entry so far, after the entries that were complete before. With a Step as
    `offset`, [B, D] is a token of each row, and readers get all entries.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__(size, store)
        assert isinstance(store, StridedLatentSpec)
        self.stride = store.stride
        self.share = MergeWeight(store)

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        rope: Rope,
        positions: TokenPositions,
        buffer: StridedLatentBuffer | None = None,
        offset: int | Step = 0,
    ) -> LatentKV:
        places = positions.chunks
        if isinstance(offset, Step):
            assert buffer is not None and isinstance(places, StepPlace)
            return self.add(x_BTD, rope, buffer, places)
        assert isinstance(places, Places)
        latent_BTR, k_rope_BTP = self.kv_down_proj(x_BTD).split(self.widths, dim=-1)
        latent_BTR, k_rope_BTP = self.latent_norm(latent_BTR), rotate(k_rope_BTP.unsqueeze(2), rope).squeeze(2)
        share_BT1 = self.share(latent_BTR, places.code_BTR)
        with no_autocast(latent_BTR):
            sum_BTR = sums_within_chunks(share_BT1 * latent_BTR, places.place_BT, self.stride)
            if places.cached is not None and places.cached.begun_BT is not None:
                assert buffer is not None
                earlier_B1R = buffer.entry(places.cached.slot_B).unsqueeze(1).to(sum_BTR.dtype)
                sum_BTR = sum_BTR + earlier_B1R.masked_fill(~places.cached.begun_BT.unsqueeze(-1), 0.0)
        new = LatentKV(sum_BTR.to(latent_BTR.dtype), k_rope_BTP)
        if places.cached is None:
            return new
        assert buffer is not None
        return self.continued(new, places.cached, buffer)

    def continued(self, new: LatentKV, places: CachedPlaces, buffer: StridedLatentBuffer) -> LatentKV:
        """Return what readers of new tokens over a cache get; the buffer then holds these tokens, too."""
        seen, row_B1 = [], torch.arange(len(new.latent_BSR), device=new.latent_BSR.device)[:, None]
        for tensor, value in zip(buffer.tensors, new, strict=True):
            seen.append(torch.cat((tensor[:, : places.num_complete].to(value.dtype), value), dim=1))
            entries = tensor[:, : places.written_BE.shape[1]]
            written = value[row_B1, places.source_BE].to(tensor.dtype)
            entries.copy_(torch.where(places.written_BE.unsqueeze(-1), written, entries))
        return LatentKV(*seen)

    def add(self, x_BD: Tensor, rope: Rope, buffer: StridedLatentBuffer, place: StepPlace) -> LatentKV:
        """`continued` for one token of each row."""
        latent_BR, k_rope_BP = self.kv_down_proj(x_BD).split(self.widths, dim=-1)
        latent_BR = self.latent_norm(latent_BR)
        k_rope_BP = rotate_step(k_rope_BP.unsqueeze(1), rope).squeeze(1)
        share_B1 = self.share(latent_BR, place.code_BR)
        with no_autocast(latent_BR):
            sum_BR = share_B1 * latent_BR
            if isinstance(place.place, Tensor):
                earlier_BR = buffer.entry(place.slot).to(sum_BR.dtype)
                sum_BR = sum_BR + earlier_BR.masked_fill((place.place == 0).unsqueeze(-1), 0.0)
            elif place.place:
                sum_BR = sum_BR + buffer.entry(place.slot).to(sum_BR.dtype)
        return LatentKV(*buffer.append((sum_BR, k_rope_BP), Step(place.slot, place.slots)))


class StridedLatentReader(LatentReader):
    """Queries of this layer over entries, and without a cache over those so far of every token."""

    def forward(self, x_BTD: Tensor, kv: LatentKV, rope: Rope, positions: TokenPositions) -> Tensor:  # type: ignore[override]
        assert positions.chunks is not None
        mask: Mask = positions.chunks.mask
        return super().forward(x_BTD, kv, rope, mask)


@dataclass(frozen=True)
class StridedLatentBackend(PositionsBackend):
    """The kernel `name` of attend.BACKENDS, which takes any mask, of one stride and width of latents."""

    stride: int
    latent_dim: int

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, with their places in chunks and the mask of entries so far."""
        found = token_positions(sequences)
        places = places_alone(self.stride, self.latent_dim, sequences, found.position_BT, dtype)
        return found._replace(chunks=places).with_mask(lambda form: Mask(dense_backend(self.name).kernel, form))


def select_strided_latent_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> StridedLatentBackend:
    """`reference` where the backend `name` is that; sdpa for any other: no other kernel takes such a mask."""
    assert isinstance(store, StridedLatentSpec)
    about = "strided latents, a dense mask of entries so far"
    return StridedLatentBackend(dense_backend(name).name, about, store.stride, store.slot.latent_dim)
