"""Strided stores: a window, and beside it one entry per M positions, pooled by learned weights.

DeepSeek-V4's heavily compressed attention (HCA): each channel of an entry is a weighted mean over the M positions of a
chunk, then normalised, and keys are rotated by the chunk's first position,

    c = norm(sum_j w_j * C_j)        w = softmax_j(Z_j + B_j)        C = x W_c, Z = x W_z, B learned, one row per place

Tokens see their window and all complete entries in one softmax. Weights of a softmax merge: of the positions that no
entry has yet, a cache keeps log sum_j e^{Z_j + B_j} and the mean so far, not the positions (in at least fp32).

Shapes: B batch, T new tokens, D model, K key/value heads; M places of a chunk, C chunks, X what a position pools: all
that a slot holds.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attend import Mask, dense_backend
from .buffers import KV, StateBuffer, Step, Tensors, zero_slots
from .config import SizeConfig, has_qkv_bias
from .delta import apart
from .grouped import GroupedKV, GroupedReader, GroupedWriter
from .layers import RMSNorm, Rope, rotate, rotate_step, step_rope
from .masks import SequenceBatch
from .pooling import CachedChunks, Chunks, StepChunk, chunks_after, chunks_alone, step_chunk
from .positions import NextToken, PositionsBackend, TokenPositions, token_positions
from .precision import at_least_fp32, no_autocast
from .spans import Span
from .store_spec import RopeKey, StoreSpec
from .strided_spec import StridedSpec
from .tied import VectorKV, VectorReader, VectorWriter


class StridedBuffer(StateBuffer):
    """Holds what the slots of a strided store do, [B, W + E, K, H] each: those of its window, position i of a row in
    slot i mod W, then its entries; and last the state [B, 2, K, X] of what no entry has yet, in at least fp32."""

    def append(self, new: Tensors, step: Step) -> Tensors:
        """Write slot `step.offset`, [1 or B] where rows differ; return the first `step.num_slots`."""
        self.write(step.offset, new)
        return tuple(tensor.narrow(1, 0, step.num_slots) for tensor in self.tensors[:-1])

    def write(self, slot: int | Tensor, new: Tensors, where: bool | Tensor = True) -> None:
        """Overwrite a slot with [B, K, H] each, in rows `where` it is so."""
        for tensor, value in zip(self.tensors[:-1], new, strict=True):
            if isinstance(slot, int):
                tensor.select(1, slot).copy_(value)
                continue
            index = slot.view(-1, 1, 1, 1).expand(len(tensor), 1, *tensor.shape[2:])
            value = value.unsqueeze(1).to(tensor.dtype)
            if isinstance(where, Tensor):
                value = torch.where(where.view(-1, 1, 1, 1), value, tensor.gather(1, index))
            tensor.scatter_(1, index, value)


def allocate_strided(
    store: StoreSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
) -> StridedBuffer:
    """An empty buffer of a strided store, for `batch` sequences of up to `capacity` tokens."""
    *slots, (state, _) = store.cache_tensors(capacity)
    tensors = [zero_slots((batch, *shape), dtype, device) for shape, _ in slots]
    return StridedBuffer((*tensors, torch.zeros((batch, *state), dtype=at_least_fp32(dtype), device=device)))


def strided_positions(store: StoreSpec, position_BT: Tensor, capacity: int, offset: int) -> TokenPositions:
    """Positions of tokens that continue a cache, for a strided store, with their chunks."""
    assert isinstance(store, StridedSpec)
    return TokenPositions(position_BT, chunks=chunks_after(store, position_BT, capacity, offset))


def strided_step(store: StoreSpec, token: NextToken) -> TokenPositions:
    """Positions of one token of each row over a cache, for a strided store."""
    assert isinstance(store, StridedSpec)
    chunk = step_chunk(store, token.position_B1, token.capacity, token.num_tokens, token.offset, token.static)
    return TokenPositions(token.position_B1, chunks=chunk)


class Pool(nn.Module):
    """Projections of what is pooled and of its weights, a bias for each place of a chunk, and the norms of entries."""

    def __init__(self, size: SizeConfig, store: StridedSpec):
        super().__init__()
        self.heads, self.widths = store.slot.kv_heads, [width for _, width in store.position_shapes]
        self.proj = nn.Linear(size.d_model, store.slot.elements, bias=has_qkv_bias(size))
        self.gate_proj = nn.Linear(size.d_model, store.slot.elements, bias=False)
        self.position_bias = nn.Parameter(torch.empty(store.stride, store.slot.elements))
        self.norms = nn.ModuleList(RMSNorm(width, size.norm_eps) for width in self.widths)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens [..., D] to what is pooled and to its weights' logarithms, without bias; [..., X]."""
        value, gate = self.proj(x), self.gate_proj(x)
        dtype = at_least_fp32(value.dtype)
        return value.to(dtype), gate.to(dtype)

    def places(self, value_BTX: Tensor, gate_BTX: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """[B, C, M, X] of each place of each chunk: what is pooled, and the logarithms of its weights; those of places
        without a token are minus infinity."""
        bias_MX = self.position_bias.to(gate_BTX.dtype)
        stride = len(bias_MX)
        if chunks.index_BCM is None:
            whole = value_BTX.shape[1] // stride * stride
            value, gate = (apart(x[:, :whole], 1, whole // stride, stride) for x in (value_BTX, gate_BTX))
            return value, gate + bias_MX
        row_B11 = torch.arange(len(value_BTX), device=value_BTX.device)[:, None, None]
        value, gate = (x[row_B11, chunks.index_BCM] for x in (value_BTX, gate_BTX))
        gate = gate + bias_MX
        return value, gate if chunks.there_BCM is None else gate.masked_fill(~chunks.there_BCM.unsqueeze(-1), -math.inf)

    def entries(self, mean: Tensor, rope: Rope, dtype: torch.dtype) -> Tensors:
        """Make slots, [..., K, H] each, of weighted means [..., X]; `rope` is that of a step for [B, X]."""
        heads = torch.split(apart(mean.to(dtype), -1, self.heads, sum(self.widths)), self.widths, dim=-1)
        normed = [norm(x) for norm, x in zip(self.norms, heads, strict=True)]
        return ((rotate_step if mean.ndim == 2 else rotate)(normed[0], rope), *normed[1:])


class StridedWriter(nn.Module):
    """Writes keys and values of the residual stream [B, T, D], and pools it to entries.

    Readers get those of the window, or of new tokens, then entries. With a Step as `offset`, [B, D] is a token of each
    row.
    """

    def __init__(self, size: SizeConfig, store: StoreSpec):
        super().__init__()
        assert isinstance(store, StridedSpec) and store.window is not None
        self.window = store.window
        self.near = (GroupedWriter if store.slot.v_dim else VectorWriter)(size, store)
        self.pool = Pool(size, store)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        positions: TokenPositions,
        buffer: StridedBuffer | None = None,
        offset: int | Step = 0,
    ) -> KV:
        chunks = positions.chunks
        if isinstance(offset, Step):
            assert buffer is not None and isinstance(chunks, StepChunk)
            return self.step(x_BTD, rope, buffer, chunks)
        assert isinstance(chunks, Chunks)
        near: KV = self.near(x_BTD, rope)
        value_BTX, gate_BTX = self.pool.project(x_BTD)
        with no_autocast(value_BTX):
            value, gate = self.pool.places(value_BTX, gate_BTX, chunks)
            if chunks.cached is None:
                mean_BCX = (gate.softmax(dim=2) * value).sum(dim=2)
                far = self.pool.entries(mean_BCX, chunks.rope, near[0].dtype)
                seen = [torch.cat(pair, dim=1) for pair in zip(near, far, strict=True)]
            else:
                assert buffer is not None
                seen = self.continued(near, value, gate, chunks.rope, chunks.cached, buffer)
        make: Any = type(near)
        out: KV = make(*seen)
        return out

    def continued(
        self,
        near: KV,
        value_BCMX: Tensor,
        gate_BCMX: Tensor,
        rope: Rope,
        chunks: CachedChunks,
        buffer: StridedBuffer,
    ) -> list[Tensor]:
        """Return what readers of new tokens over a cache get; the buffer then holds these tokens, too."""
        *slots, state = buffer.tensors
        sum_BX, mean_BX = (x.flatten(1).to(value_BCMX.dtype) for x in state.unbind(dim=1))
        earlier = torch.full_like(gate_BCMX[:, :, :1], -math.inf)  # one more place: what the first chunk began with
        earlier[:, 0, 0] = sum_BX.masked_fill(~chunks.begun_B.unsqueeze(-1), -math.inf)
        value = torch.cat((mean_BX[:, None, None].expand_as(earlier), value_BCMX), dim=2)
        gate = torch.cat((earlier, gate_BCMX), dim=2)
        gate = gate.masked_fill(gate.isneginf().all(dim=2, keepdim=True), 0.0)  # chunks that nobody is in, nor reads
        mean_BCX = (gate.softmax(dim=2) * value).sum(dim=2)
        far = self.pool.entries(mean_BCX, rope, near[0].dtype)
        row_B = torch.arange(len(mean_BCX), device=mean_BCX.device)
        last = torch.stack((gate.logsumexp(dim=2), mean_BCX), dim=2)[row_B, chunks.last_B]
        state.copy_(last.view_as(state))
        seen, length = [], near[0].shape[1]
        newest = min(length, self.window)
        for tensor, new, entry in zip(slots, near, far, strict=True):
            entries = tensor[:, self.window :]
            written = entry[row_B[:, None], chunks.source_BE].to(tensor.dtype)
            entries.copy_(torch.where(chunks.written_BE[:, :, None, None], written, entries))
            before = [] if chunks.empty else [tensor[:, : self.window].to(new.dtype)]
            seen.append(torch.cat((*before, new, entries[:, : chunks.num_entries].to(new.dtype)), dim=1))
            ring_BW = chunks.ring_BT[:, length - newest :]
            tensor[row_B[:, None], ring_BW] = new[:, length - newest :].to(tensor.dtype)
        return seen

    def step(self, x_BD: Tensor, rope: Rope, buffer: StridedBuffer, chunk: StepChunk) -> KV:
        """`continued` for one token of each row."""
        seen: KV = self.near(x_BD, rope, buffer, Step(chunk.ring, chunk.slots))
        value_BX, gate_BX = self.pool.project(x_BD)
        with no_autocast(value_BX):
            *slots, state = buffer.tensors
            gate_BX = gate_BX + self.pool.position_bias.to(gate_BX.dtype)[chunk.place]
            sum_BX, mean_BX = (x.flatten(1).to(value_BX.dtype) for x in state.unbind(dim=1))
            total_BX = torch.logaddexp(sum_BX, gate_BX)
            merged_BX = mean_BX + (value_BX - mean_BX) * (gate_BX - total_BX).exp()
            if isinstance(chunk.place, Tensor):
                first = (chunk.place == 0).unsqueeze(-1)
                total_BX, merged_BX = torch.where(first, gate_BX, total_BX), torch.where(first, value_BX, merged_BX)
            elif chunk.place == 0:
                total_BX, merged_BX = gate_BX, value_BX
            state.copy_(torch.stack((total_BX, merged_BX), dim=1).view_as(state))
            if chunk.complete is not False and slots[0].shape[1] > self.window:
                turn = step_rope(chunk.rope, x_BD.dtype)
                buffer.write(chunk.entry, self.pool.entries(merged_BX, turn, x_BD.dtype), chunk.complete)
        return seen


class StridedReader(GroupedReader):
    """Queries of this layer over a window and entries."""

    def forward(self, x_BTD: Tensor, kv: GroupedKV, rope: Rope, positions: TokenPositions) -> Tensor:  # type: ignore[override]
        assert positions.chunks is not None
        mask: Mask = positions.chunks.mask
        return super().forward(x_BTD, kv, rope, mask)


class StridedVectorReader(VectorReader):
    """The same where keys are values."""

    def forward(self, x_BTD: Tensor, kv: VectorKV, rope: Rope, positions: TokenPositions) -> Tensor:  # type: ignore[override]
        assert positions.chunks is not None
        mask: Mask = positions.chunks.mask
        return super().forward(x_BTD, kv, rope, mask)


def build_strided_reader(size: SizeConfig, store: StoreSpec) -> nn.Module:
    return (StridedReader if store.slot.v_dim else StridedVectorReader)(size, store)


@dataclass(frozen=True)
class StridedBackend(PositionsBackend):
    """The kernel `name` of attend.BACKENDS, which takes any mask, of one window, stride and rotary table."""

    stride: int
    rope_key: RopeKey

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> TokenPositions:
        """Positions of the tokens, with their chunks and the mask of tokens and entries."""
        assert window is None or isinstance(window, int)  # a strided store has a window
        chunks = chunks_alone(window, self.stride, self.rope_key, sequences)
        found = token_positions(sequences)._replace(chunks=chunks)
        return found.with_mask(lambda form: Mask(dense_backend(self.name).kernel, form))


def select_strided_backend(
    name: str, size: SizeConfig, store: StoreSpec, device: str, documents: bool
) -> StridedBackend:
    """`reference` where the backend `name` is that; sdpa for any other: no other kernel takes such a mask."""
    assert isinstance(store, StridedSpec)
    about = "strided, a dense mask of tokens and entries"
    return StridedBackend(dense_backend(name).name, about, store.stride, store.rope_key)
