"""Softmax attention over slots: one function, several backends, each of which says what it can do.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H key width, V value width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from .layers import at_least_fp32


class Mask(NamedTuple):
    """Which slots a query sees.

    causal   slot s is visible to query t iff s <= t; requires S == T, and `allowed` is then None
    allowed  [T, S] or [B, 1, T, S], True where visible; None: no restriction but `causal`
    """

    causal: bool
    allowed: Tensor | None


def causal_mask(length: int, window: int | None, device: torch.device) -> Mask:
    """The mask of `length` tokens that attend to themselves; `window` counts the current token."""
    if window is None or window >= length:
        return Mask(causal=True, allowed=None)
    index = torch.arange(length, device=device)
    return Mask(causal=False, allowed=visible(index, index, window))


def visible(query_T: Tensor, slot_S: Tensor, window: int | None, start_B: Tensor | None = None) -> Tensor:
    """[T, S], or [B, 1, T, S] given `start_B`: causal, in the window, filled (index >= 0), and not left padding.

    Indices count tokens from the start of the padded sequence; row b is padding before `start_B[b]`, whose queries see
    themselves alone, since a softmax over nothing is undefined.
    """
    distance = query_T[:, None] - slot_S[None, :]
    allowed = (distance >= 0) & (slot_S >= 0)
    if window is not None:
        allowed &= distance < window
    if start_B is None:
        return allowed
    real = slot_S[None, :] >= start_B[:, None]
    return ((allowed & real[:, None, :]) | (distance == 0))[:, None]


Attend = Callable[[Tensor, Tensor, Tensor, Mask, float, Tensor | None], Tensor]


def reference(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Mask, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """The definition, in fp32 (fp64 for fp64 inputs). Slow and exact; the other backends are tested against it."""
    dtype = at_least_fp32(q_BTNH.dtype)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k = repeat(k_BSKH.to(dtype), "b s k h -> b (k g) s h", g=group)
    v = repeat(v_BSKV.to(dtype), "b s k v -> b (k g) s v", g=group)
    score = torch.einsum("btnh,bnsh->bnts", q_BTNH.to(dtype), k) * scale
    allowed = mask.allowed
    if mask.causal:
        index = torch.arange(score.shape[-1], device=score.device)
        allowed = index[None, :] <= index[:, None]
    if allowed is not None:
        score = score.masked_fill(~allowed, -math.inf)
    if sinks_N is not None:
        sink = sinks_N.to(dtype)[None, :, None, None].expand(*score.shape[:3], 1)
        score = torch.cat((score, sink), dim=-1)
    weight = score.softmax(dim=-1)[..., : v.shape[2]]
    return torch.einsum("bnts,bnsv->btnv", weight, v).to(q_BTNH.dtype)


def sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Mask, scale: float, sinks_N: Tensor | None) -> Tensor:
    """torch's fused attention. A window is a dense boolean mask."""
    value_width = v_BSKV.shape[-1]
    if sinks_N is not None:
        q_BTNH, k_BSKH, v_BSKV, mask = _sink_as_slot(q_BTNH, k_BSKH, v_BSKV, mask, scale, sinks_N)
    # Fused kernels want keys and values of one width. A pad by nothing would copy.
    width = max(q_BTNH.shape[-1], v_BSKV.shape[-1])
    wide = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q_BTNH, k_BSKH, v_BSKV))
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in wide)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.allowed,
        is_causal=mask.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return rearrange(out, "b n t v -> b t n v")[..., :value_width]


def _sink_as_slot(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, sinks_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """A sink is one more slot, always visible, worth nothing, whose score is the sink logit.

    Queries get two more coordinates that hold their head's logit and what its type cut off of it; keys get zeros there,
    and the sink's key has ones there and zeros elsewhere.
    """
    batch, length = q.shape[:2]
    logit = (sinks_N / scale).expand(batch, length, -1).unsqueeze(-1)
    high = logit.to(q.dtype)
    q = torch.cat((q, high, (logit - high).to(q.dtype)), dim=-1)
    sink = F.pad(torch.zeros_like(k[:, :1]), (0, 2), value=1.0)
    k = torch.cat((F.pad(k, (0, 2)), sink), dim=1)
    v = torch.cat((v, torch.zeros_like(v[:, :1])), dim=1)
    allowed = mask.allowed
    if mask.causal:
        index = torch.arange(length, device=q.device)
        allowed = visible(index, index, None)
    if allowed is not None:
        allowed = F.pad(allowed, (0, 1), value=True)
    return q, k, v, Mask(causal=False, allowed=allowed)


@dataclass(frozen=True)
class Backend:
    """An implementation of `Attend` and its claims. `devices` empty: any device."""

    name: str
    attend: Attend
    devices: frozenset[str] = field(default_factory=frozenset)
    windows: bool = True
    sinks: bool = True
    uneven_value_width: bool = True

    def missing(self, needs: set[str], device: str) -> list[str]:
        """What of `needs` (names of the boolean claims) and of `device` this backend does not claim."""
        lacking = [need for need in sorted(needs) if not getattr(self, need)]
        return lacking + ([f"device {device}"] if self.devices and device not in self.devices else [])


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", sdpa),
        Backend("reference", reference),
    )
}


def choose(name: str, needs: set[str], device: str) -> Backend:
    """The backend `name`, or for `auto` the first of the table that claims all of `needs` on `device`.

    Raises ValueError where there is none: nothing falls back at run time.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    candidates = list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]
    for backend in candidates:
        if not backend.missing(needs, device):
            return backend
    reasons = "; ".join(f"{b.name} lacks {', '.join(b.missing(needs, device))}" for b in candidates)
    raise ValueError(f"no attention backend for this layout on {device}: {reasons}; choose another backend or auto")
