"""What the cache of one store holds, and how it takes in new tokens. Writers hand their slots to it.

Shapes: B batch, T new tokens, S slots read, K key/value heads, H head, M slots, W window.
"""

import torch
from torch import Tensor

# The tensors of a store, each [B, S, ...]; passed between layers as explicit arguments and results.
Slots = tuple[Tensor, ...]


class AppendBuffer:
    """Keeps every position, in order."""

    def __init__(self, tensors: Slots):
        self.tensors = tensors

    def update(self, new: Slots, offset: int) -> Slots:
        """Write the slots of tokens `offset`, `offset` + 1, ...; return all that the new tokens may read."""
        end = offset + new[0].shape[1]
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[:, offset:end] = value
        return tuple(tensor[:, :end] for tensor in self.tensors)

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """[S] token index of each slot that `update` returns."""
        return torch.arange(offset + length, device=device)


class RingBuffer:
    """Keeps the last `size` positions: token i lies in slot i mod size."""

    def __init__(self, tensors: Slots):
        self.tensors = tensors
        self.size = tensors[0].shape[1]

    def update(self, new: Slots, offset: int) -> Slots:
        """As in AppendBuffer. A chunk reads what was kept before it and itself; then its own last slots are kept."""
        length = new[0].shape[1]
        if offset == 0:
            live = new
        elif length == 1:
            live = self.tensors
        else:
            live = tuple(torch.cat((t, n.to(t.dtype)), dim=1) for t, n in zip(self.tensors, new, strict=True))
        kept = min(length, self.size)
        where = torch.arange(offset + length - kept, offset + length, device=new[0].device) % self.size
        for tensor, value in zip(self.tensors, new, strict=True):
            tensor[:, where] = value[:, length - kept :].to(tensor.dtype)
        return live

    def indices(self, offset: int, length: int, device: torch.device) -> Tensor:
        """As in AppendBuffer; negative for a slot that holds nothing yet."""
        new = torch.arange(offset, offset + length, device=device)
        if offset == 0:
            return new
        last = offset if length == 1 else offset - 1
        kept = last - (last - torch.arange(self.size, device=device)) % self.size
        return kept if length == 1 else torch.cat((kept, new))


class StateBuffer:
    """A bounded store: the state [B, M, K, 2H], in at least fp32; and its last W positions, in order, where it has a
    window: keys without positions, and values, [B, W, K, H] each."""

    def __init__(self, tensors: Slots):
        self.tensors = tensors

    def keep(self, after: Slots) -> None:
        """Replace what is held by what the writer says is left after new tokens."""
        for tensor, value in zip(self.tensors, after, strict=True):
            tensor.copy_(value)


Buffer = AppendBuffer | RingBuffer | StateBuffer
