"""xKV (Chang et al. 2025): the prompt's keys of neighbouring stores as one matrix of low rank, and so their values.

Side by side, tokens by all heads of all stores of a group, they are cut off after the largest singular values: a basis
[S, R] of tokens, which the stores share, and a matrix [R, width] of each store. As in the authors' code, keys are
factorised as they were before rotary embeddings, which spread over more singular values, and rotated again as they are
read; padding counts as zeros. Of latents the latent is factorised, and a rotary key for all heads stays whole.

Shapes: B batch, S tokens of the prompt but the newest, R rank, K key/value heads, H head, X all heads of a store.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buffers import SlotBuffer, Tensors, repeat_row
from ..layers import Rope, rope_table, rotate
from ..precision import at_least_fp32
from ..store_spec import StoreSpec
from .small_buffers import CodedBuffer, CodedTensor, KeptBuffer
from .storage import TensorLayout, basis_layout, kept_slots, ranks, tensor_layouts


class XkvBuffer(KeptBuffer):
    """Whole until `factorise`; then a share of the group's bases, a matrix for each, and the newest and later tokens as
    they are, or with the codec, which the bases then have, too."""

    bases: tuple[CodedTensor, ...] = ()
    matrices: tuple[Tensor | None, ...] = ()  # [B, R, X]; None: the basis is the tensor itself, as it was
    start_B: Tensor | None = None

    @property
    def tensors(self) -> Tensors:
        if self.whole is not None:
            return self.whole.tensors
        assert self.later is not None
        shared = (tensor for basis in self.bases for tensor in basis.tensors)
        return *self.later.tensors, *(matrix for matrix in self.matrices if matrix is not None), *shared

    def compress(self, length: int, start_B: Tensor | None) -> KeptBuffer | CodedBuffer | SlotBuffer:
        assert self.whole is not None
        if not self.bases:
            return super().compress(length, start_B)
        later, codec = tuple(tensor[:, self.base : length] for tensor in self.whole.tensors), self.method.codec
        layouts = tensor_layouts(self.store, codec, self.capacity - self.base)
        self.later = CodedBuffer.allocate(layouts, len(later[0]), later[0].dtype, later[0].device)
        self.later.update(later, 0)
        self.whole, self.start_B = None, start_B
        return self

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; the factorised tokens come back multiplied out."""
        if self.whole is not None:
            return self.whole.update(new, offset)
        assert self.later is not None
        later = self.later.update(new, offset - self.base)
        return tuple(
            torch.cat((past, last.to(past.dtype)), dim=1) for past, last in zip(self.read(), later, strict=True)
        )

    def read(self) -> Tensors:
        """[B, S, ...] the factorised tokens."""
        parts = []
        for index, (basis, matrix) in enumerate(zip(self.bases, self.matrices, strict=True)):
            past = basis.read(0, self.base)
            if matrix is not None:
                dtype, wide = past.dtype, at_least_fp32(past.dtype)
                product = past.to(wide) @ matrix.to(wide)
                past = product.view(*product.shape[:2], *self.store.position_shapes[index])
                rope = rope_of(self.store, index, self.base, past.device, self.start_B)
                past = (past if rope is None else rotate(past, rope)).to(dtype)
            parts.append(past)
        return tuple(parts)

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        """None: slots of all tokens come back, as before compression."""
        return None

    def repeat(self, rows: int) -> "XkvBuffer":
        """A copy with bases of its own; `CompressedCache.repeat` lets stores share them again."""
        copy = super().repeat(rows)
        assert isinstance(copy, XkvBuffer)
        copy.bases = tuple(basis.repeat(rows) for basis in self.bases)
        copy.matrices = tuple(None if matrix is None else repeat_row(matrix, rows) for matrix in self.matrices)
        copy.start_B = None if self.start_B is None else self.start_B.repeat_interleave(rows)
        return copy


def rope_of(
    store: StoreSpec, index: int, count: int, device: torch.device, start_B: Tensor | None, back: bool = False
) -> Rope | None:
    """Table that rotates the first `count` tokens of tensor `index` of a store, or that undoes it; None: they are not
    rotated."""
    if index or store.slot.latent_dim or store.slot.rope_dim:
        return None
    position = torch.arange(count, device=device)
    if start_B is not None:
        position = (position - start_B[:, None]).clamp(min=0)
    cos, sin = rope_table(position, *store.rope_key)
    if not back:
        return cos, sin
    squares = cos.double() ** 2 + sin.double() ** 2  # rounded: what is rotated back must come out as long as it was
    return cos / squares, -sin / squares


def whole_tensor(x_BSX: Tensor, dtype: torch.dtype) -> CodedTensor:
    """`x` as it is, of which nothing is shared."""
    layout = TensorLayout(tuple(x_BSX.shape[2:]), x_BSX.shape[1], None, None, 1, 1, fixed=True)
    made = CodedTensor.allocate(layout, len(x_BSX), dtype, x_BSX.device)
    made.write(x_BSX, 0)
    return made


def factorise(buffers: Sequence[XkvBuffer], length: int, start_B: Tensor | None) -> None:
    """Give the buffers of a group, whole and of `length` tokens, the bases that they share, and each its matrices."""
    first = buffers[0]
    assert first.whole is not None and first.method.keep is not None
    keep, codec, whole = first.method.keep, first.method.codec, first.whole.tensors[0]
    kept = kept_slots(first.store, first.method, length, whole.element_size(), first.capacity)
    if kept is None:
        return
    base, stores = length - kept.newest, [buffer.store for buffer in buffers]
    for buffer in buffers:
        buffer.base, buffer.bases, buffer.matrices = base, (), ()
    for index, rank in enumerate(ranks(stores, keep, base)):
        pasts = [past_of(buffer, index, start_B) for buffer in buffers]
        if not rank:
            bases = [whole_tensor(past, whole.dtype) for past in pasts]
            matrices: list[Tensor | None] = [None] * len(buffers)
        else:
            u_BSR, s_BR, v_BRX = torch.linalg.svd(torch.cat(pasts, dim=-1), full_matrices=False)
            basis = CodedTensor.allocate(basis_layout(rank, base, codec), len(whole), whole.dtype, whole.device)
            basis.write(u_BSR[..., :rank], 0)
            bases = [basis] * len(buffers)
            parts = (s_BR[:, :rank, None] * v_BRX[:, :rank]).split([past.shape[-1] for past in pasts], dim=-1)
            matrices = [part.to(whole.dtype, copy=True, memory_format=torch.contiguous_format) for part in parts]
        for buffer, basis, matrix in zip(buffers, bases, matrices, strict=True):
            buffer.bases, buffer.matrices = (*buffer.bases, basis), (*buffer.matrices, matrix)


def past_of(buffer: XkvBuffer, index: int, start_B: Tensor | None) -> Tensor:
    """[B, S, X] the tokens of a whole buffer that are factorised, keys as before they were rotated, padding as zeros,
    in at least fp32."""
    assert buffer.whole is not None
    past = buffer.whole.tensors[index][:, : buffer.base]
    rope = rope_of(buffer.store, index, buffer.base, past.device, start_B, back=True)
    past = past.to(at_least_fp32(past.dtype))
    past = (past if rope is None else rotate(past, rope)).flatten(2)
    if start_B is None:
        return past
    return past * (torch.arange(buffer.base, device=past.device) >= start_B[:, None])[..., None]


def share_again(copies: Sequence[object], buffers: Sequence[object]) -> None:
    """Let copies of buffers that share bases share theirs."""
    first: dict[int, CodedTensor] = {}
    for copy, buffer in zip(copies, buffers, strict=True):
        if isinstance(copy, XkvBuffer) and isinstance(buffer, XkvBuffer):
            pairs = zip(buffer.bases, copy.bases, strict=True)
            copy.bases = tuple(first.setdefault(id(basis), copied) for basis, copied in pairs)
