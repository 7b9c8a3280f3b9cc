"""The window beside the slots of a bounded store, which shares one softmax with them.

Shapes: as in bounded.py.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .attend import sdpa
from .bounded_spec import WINDOW_BLOCKS
from .grouped import GroupedKV
from .masks import Dense
from .positions import Near, TokenPositions


def run_near(q_BTNH: Tensor, window: GroupedKV, near: Near, scale: float) -> tuple[Tensor, Tensor]:
    """[B, T, N, H] attention over the window by its kernel, in the type of its values, and [B, T, N] the logarithm of
    the sum that weights were divided by."""
    dtype = window.v_BSKH.dtype
    out_BTNH, lse_BNT = near.kernel(*(x.to(dtype) for x in (q_BTNH, *window)), near.form, scale)
    return out_BTNH, lse_BNT.transpose(1, 2)


def merge(near_BTNH: Tensor, lse_BTN: Tensor, far_BTNH: Tensor, total_BTN: Tensor) -> Tensor:
    """One softmax of two, each with the logarithm of its sum; [B, T, N, H] in the type of the second."""
    share_BTN1 = torch.sigmoid(total_BTN - lse_BTN).unsqueeze(-1)
    return torch.lerp(near_BTNH.to(far_BTNH.dtype), far_BTNH, share_BTN1)


def read_window(
    q_BTNH: Tensor, weight_BTN: Tensor, window: GroupedKV, positions: TokenPositions, length: int
) -> tuple[Tensor, Tensor]:
    """[B, T, N, H] attention over the last `length` positions, and [B, T, N] the share in its softmax of something else
    whose score is `weight_BTN`, which is worth nothing here. Queries are scaled; keys and values as in BoundedKV.

    The score is one more coordinate of a query, and the something else a key that has nothing but 1 there.
    """
    width, tokens = q_BTNH.shape[-1], q_BTNH.shape[1]
    pad = -(width + 1) % 8
    q = torch.cat((q_BTNH, weight_BTN.unsqueeze(-1), q_BTNH.new_zeros(()).expand(*weight_BTN.shape, pad)), dim=-1)
    k, v = (F.pad(x.to(q.dtype), (0, 1 + pad)) for x in window)
    other = (torch.arange(q.shape[-1], device=q.device) == width).to(q.dtype)
    first = min(length, tokens) if positions.plain else 0
    outs = []
    if first:
        outs.append(read_first(q[:, :first], k[:, :first], v[:, :first], other))
    if first < tokens:
        outs.append(read_blocks(q[:, first:], k, v, other, None if positions.plain else positions, length))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out[..., :width], out[..., width].contiguous()  # a view would keep all of it for the backward pass


def read_first(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    """Read what is before a token, no more than a window. The other key comes first, and a query for it."""
    q = F.pad(q, (0, 0, 0, 0, 1, 0))
    k, v = (torch.cat((other.expand_as(x[:, :1]), x), dim=1) for x in (k, v))
    return sdpa(q, k, v, Dense(causal=True, allowed=None), 1.0, None)[:, 1:]


def read_blocks(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, positions: TokenPositions | None, window: int
) -> Tensor:
    """Read windows, by blocks of queries that look at the positions of the block and the W before it.

    Of these, the first is too far from all, and its place is taken by the other key. `positions` None: all queries have
    a whole window before them, of those that come first in `k`.
    """
    batch, length = q.shape[:2]
    block = min(-(-window // WINDOW_BLOCKS), length)
    fill, before = -length % block, k.shape[1] - length
    front, looked = window - before, window + block
    key = torch.arange(looked, device=q.device)
    distance = torch.arange(window, looked, device=q.device)[:, None] - key
    allowed = (distance >= 0) & (distance < window)
    if positions is not None:
        place_BT = positions.position_BT[:, -length:]
        place = F.pad(place_BT.clamp(min=0), (0, fill)).view(place_BT.shape[0], -1, 1, block, 1)
        allowed = (allowed & (distance <= place)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    allowed = allowed | (key == 0)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, front, fill)).unfold(1, looked, block).permute(0, 1, 4, 2, 3)[:, :, 1:] for x in (k, v)
    )
    k, v = (torch.cat((other.expand_as(x[:, :, :1]), x), dim=2).flatten(0, 1) for x in (keys, values))
    q = rearrange(F.pad(q, (0, 0, 0, 0, 0, fill)), "b (z c) n h -> (b z) c n h", c=block)
    out = sdpa(q, k, v, Dense(causal=False, allowed=allowed), 1.0, None)
    return rearrange(out, "(b z) c n h -> b (z c) n h", b=batch)[:, :length]
