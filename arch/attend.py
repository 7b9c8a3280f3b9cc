"""Softmax attention over slots: one function and several backends, each of which declares what it supports.

A backend makes a mask in the form its kernel takes, once per forward pass and distinct window. The mask carries the
kernel, so that layers, which get masks, know nothing of backends. Over a cache, for which no other backend has masks,
sdpa always computes attention (or reference, if that is the backend).

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H key width, V value width.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attend_cpu import HALF, fused_attention
from .attend_kernels import flash, flash_mask, flash_missing, flex, flex_rows, varlen
from .masks import Dense, SequenceBatch, Windowed, blocks, dense, last_query, packed, short_rows, visible, windowed
from .precision import at_least_fp32
from .spans import Span

# (q_BTNH, k_BSKH, v_BSKV, mask in the kernel's form, scale, sinks_N) -> [B, T, N, V]
Kernel = Callable[[Tensor, Tensor, Tensor, Any, float, Tensor | None], Tensor]


class Mask(NamedTuple):
    """The slots that each query sees, in the form that `kernel` takes."""

    kernel: Kernel
    form: Any

    def last_query(self, length: int) -> "Mask | None":
        """Mask of the last of `length` queries; None if the kernel takes no single query over all slots."""
        if not isinstance(self.form, Dense | Windowed):
            return None
        return self._replace(form=last_query(self.form, length))


def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Mask, scale: float, sinks_N: Tensor | None) -> Tensor:
    """Compute softmax(q k * scale) v over the slots visible in `mask`; [B, T, N, V].

    Query head n reads key head n // (N / K). `sinks_N` adds one score per query head, of a slot whose value is zero.
    """
    return mask.kernel(q_BTNH, k_BSKH, v_BSKV, mask.form, scale, sinks_N)


def reference(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`attend` by its definition, in fp32 (fp64 for fp64 inputs); [B, T, N, V]. Slow: the other backends are tested
    against it."""
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


# cuDNN, which torch prefers on Hopper, plans anew for each number of slots: tens of milliseconds per decoded token.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# Rows of a batch that torch's CUDA kernels take (pytorch/pytorch#142228); a token decoder, where it is run by sdpa, and
# an encoder of blocks have one for each block.
MAX_ROWS = 65535
# Elements of a gradient of queries in fp32, as FlashAttention's backward pass accumulates it: in whole tiles of 128
# queries and of 32 coordinates. Its indices end at 1 << 31 (Dao-AILab/flash-attention#1500); a quarter is 2 GiB.
MAX_ELEMENTS = 1 << 29


def max_batch_rows(heads: int, length: int, width: int) -> int:
    """Largest number of batch rows that one call of any fused kernel accepts, forward and backward."""
    of_row = heads * (-(-length // 128) * 128) * (-(-width // 32) * 32)
    return max(1, min(MAX_ROWS, MAX_ELEMENTS // of_row))


def sdpa_batched(
    rows: int, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`sdpa` over at most `rows` rows of the batch per call; [B, T, N, V]."""
    starts = range(0, q_BTNH.shape[0], rows)
    allowed, outputs = mask.allowed, []
    for q, k, v, start in zip(*(torch.split(x, rows) for x in (q_BTNH, k_BSKH, v_BSKV)), starts, strict=True):
        if allowed is not None and allowed.ndim == 4 and allowed.shape[0] > 1:
            mask = mask._replace(allowed=allowed[start : start + rows])
        outputs.append(sdpa(q, k, v, mask, scale, sinks_N))
    return torch.cat(outputs)


@functools.cache
def _fused_choice(dtype: torch.dtype, width: int, value_width: int) -> int:
    q, v = (torch.empty(1, 1, 256, w, dtype=dtype, device="cuda", requires_grad=True) for w in (width, value_width))
    with torch.enable_grad():
        return int(torch._fused_sdp_choice(q, q, v, is_causal=True))


def takes_widths(device: str, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Tell whether torch runs plainly causal attention by cuDNN with values of another width than keys, as on Hopper.

    FlashAttention takes one width, and the kernel that takes any two is slower than FlashAttention on padded values.
    """
    if device != "cuda" or dtype not in HALF or width % 8 or value_width % 8:
        return False
    return _fused_choice(dtype, width, value_width) == SDPBackend.CUDNN_ATTENTION.value


# As torch.compiler.assume_constant_result does, which imports the compiler: torch's is not to trace it.
takes_widths._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sdpa(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKV: Tensor,
    mask: Dense | Windowed,
    scale: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """`attend` by torch's fused kernels; [B, T, N, V]. Dense masks other than plain causal are slow on CUDA.

    Inputs that torch would silently give to its slowest kernel are first brought into a form that the fused ones
    accept: keys and values of one width (unless cuDNN takes two) that is a multiple of 8, and no grouped heads with a
    mask (or, on CUDA, with fp32).
    """
    if isinstance(mask, Windowed):
        return sdpa_windowed(q_BTNH, k_BSKH, v_BSKV, mask, scale, sinks_N)
    batch, length, heads, width = q_BTNH.shape
    if q_BTNH.is_cuda and batch > (rows := max_batch_rows(heads, length, max(width, v_BSKV.shape[-1]))):
        return sdpa_batched(rows, q_BTNH, k_BSKH, v_BSKV, mask, scale, sinks_N)
    value_width, slots = v_BSKV.shape[-1], k_BSKH.shape[1]
    if sinks_N is not None:
        q_BTNH, k_BSKH, v_BSKV, mask = _sink_as_slot(q_BTNH, k_BSKH, v_BSKV, mask, scale, sinks_N)
    q, k, v = q_BTNH, k_BSKH, v_BSKV
    if not (mask.causal and width != value_width and takes_widths(q.device.type, q.dtype, width, value_width)):
        q, k, v = _one_width(q, k, v)
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q, k, v))
    allowed, group = mask.allowed, q.shape[1] // k.shape[1]
    if group > 1 and not mask.causal and (q.is_cuda or length == 1):
        # Heads that read the same keys are so many more queries to them: no key is copied, but the mask is.
        q = rearrange(q, "b (k g) t h -> b k (g t) h", g=group)
        allowed = None if allowed is None else repeat(allowed, "... t s -> ... (g t) s", g=group)
    elif group > 1 and q.is_cuda and q.dtype == torch.float32:
        k, v = (repeat(x, "b k s h -> b (k g) s h", g=group) for x in (k, v))
    with sdpa_kernel(NOT_CUDNN) if q.is_cuda and length != slots else nullcontext():
        out = fused_attention(q, k, v, allowed, mask.causal, scale)
    return rearrange(out, "b k (g t) v -> b t (k g) v", t=length)[..., :value_width]


def sdpa_windowed(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKV: Tensor, mask: Windowed, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`sdpa` in blocks of queries; [B, T, N, V].

    The first window is plain causal attention. The blocks after it form the batch of one call per row, with keys and
    values that are overlapping views of the row's; views of the whole batch would be copied.
    """
    (batch, length), window, allowed = q_BTNH.shape[:2], mask.window, mask.allowed
    first = sdpa(q_BTNH[:, :window], k_BTKH[:, :window], v_BTKV[:, :window], mask.first, scale, sinks_N)
    size, looked = allowed.shape[-2:]
    queries, value_width = -(-(length - window) // size) * size, v_BTKV.shape[-1]
    q = _fill(q_BTNH[:, window:], queries)
    k, v = (_fill(x, queries - size + looked) for x in (k_BTKH, v_BTKV))
    step = size
    if sinks_N is not None:  # a slot for it after each block of keys, of which a query sees the last that it looks at
        q = _with_sink_logits(q, scale, sinks_N)
        blocks = _with_sink_slot(*(rearrange(x, "b (z c) k h -> (b z) c k h", c=size) for x in (k, v)))
        k, v = (rearrange(x, "(b z) c k h -> b (z c) k h", b=batch) for x in blocks)
        slots = F.pad(rearrange(allowed, "... (n c) -> ... n c", c=size), (0, 1))
        slots[..., -1, -1] = True
        allowed, step = rearrange(slots, "... n c -> ... (n c)"), size + 1
        looked = allowed.shape[-1]
    q, k, v = _one_width(q, k, v)
    bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -math.inf)  # once, for all rows
    biases = [bias] * batch if bias.ndim == 2 else bias.unsqueeze(2).unbind()
    rows = []
    for q_TNH, k_TKH, v_TKV, row_bias in zip(q.unbind(), k.unbind(), v.unbind(), biases, strict=True):
        queries_ZNCH = rearrange(q_TNH, "(z c) n h -> z n c h", c=size)
        k_ZKLH, v_ZKLV = (rearrange(x.unfold(0, looked, step), "z k h l -> z k l h") for x in (k_TKH, v_TKV))
        rows.append(fused_attention(queries_ZNCH, k_ZKLH, v_ZKLV, row_bias, False, scale))
    rest = rearrange(torch.stack(rows), "b z n c v -> b (z c) n v")
    return torch.cat((first, rest[:, : length - window, :, :value_width]), dim=1)


def _fill(x_BTNH: Tensor, length: int) -> Tensor:
    """Pad with zeros after the last token, up to `length` tokens; padding by nothing would copy."""
    more = length - x_BTNH.shape[1]
    return F.pad(x_BTNH, (0, 0, 0, 0, 0, more)) if more > 0 else x_BTNH


def _one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad queries, keys and values with zeros to one width, a multiple of 8; padding by nothing would copy."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _sink_as_slot(
    q: Tensor, k: Tensor, v: Tensor, mask: Dense, scale: float, sinks_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Dense]:
    """Add the sink as one more slot: always visible, of value zero, with the sink logit as its score.

    Queries get two more coordinates, their head's logit and its rounding error in their type; keys get zeros there, and
    the sink's key has ones there and zeros elsewhere.
    """
    allowed = mask.allowed
    if mask.causal:
        index = torch.arange(q.shape[1], device=q.device)
        allowed = visible(index, index, None)
    if allowed is not None:
        allowed = F.pad(allowed, (0, 1), value=True)
    return (
        _with_sink_logits(q, scale, sinks_N),
        *_with_sink_slot(k, v),
        Dense(causal=False, allowed=allowed),
    )


def _with_sink_logits(q_BTNH: Tensor, scale: float, sinks_N: Tensor) -> Tensor:
    logit = (sinks_N.to(at_least_fp32(sinks_N.dtype)) / scale).expand(*q_BTNH.shape[:2], -1).unsqueeze(-1)
    high = logit.to(q_BTNH.dtype)
    return torch.cat((q_BTNH, high, (logit - high).to(q_BTNH.dtype)), dim=-1)


def _with_sink_slot(k_BSKH: Tensor, v_BSKV: Tensor) -> tuple[Tensor, Tensor]:
    sink = F.pad(torch.zeros_like(k_BSKH[:, :1]), (0, 2), value=1.0)
    k = torch.cat((F.pad(k_BSKH, (0, 2)), sink), dim=1)
    return k, torch.cat((v_BSKV, torch.zeros_like(v_BSKV[:, :1])), dim=1)


def dense_backend(name: str) -> "Backend":
    """The backend whose kernel accepts a dense mask when the model runs backend `name`."""
    return BACKENDS["reference" if name == "reference" else "sdpa"]


class Needs(NamedTuple):
    """Requirements of a layer on its backend.

    features  some of windows, documents, sinks, gqa (fewer key than query heads), uneven_value_width
    widths    widths of its queries, keys and values
    """

    features: frozenset[str] = frozenset()
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ClaimedKernel:
    """A kernel, and the inputs and machines it runs on.

    devices, dtypes  empty: all of them
    widths           possible widths of queries, keys and values
    unusable         reason why it cannot run on this machine; None if it can
    """

    name: str
    kernel: Kernel
    devices: frozenset[str] = field(default=frozenset(), kw_only=True)
    dtypes: frozenset[torch.dtype] = field(default=frozenset(), kw_only=True)
    widths: range = field(default=range(1, 1 << 16), kw_only=True)
    unusable: Callable[[], str | None] = field(default=lambda: None, kw_only=True)


@dataclass(frozen=True)
class Backend(ClaimedKernel):
    """A kernel, the maker of its masks, and its claims, which hold for forward and backward.

    about  description for the log
    """

    form: Callable[[SequenceBatch, Span], Any]
    about: str
    windows: bool = True
    documents: bool = True
    sinks: bool = True
    gqa: bool = True
    uneven_value_width: bool = True

    def unsupported(self, needs: Needs, device: str) -> list[str]:
        """List what `needs` and `device` require and this backend lacks, or why it cannot run; empty if it can."""
        reasons = [feature for feature in sorted(needs.features) if not getattr(self, feature)]
        if any(width not in self.widths for width in needs.widths):
            most, step = self.widths[-1], self.widths.step
            takes = f"{self.widths[0]} to {most}" + (f" in steps of {step}" if step > 1 else "")
            reasons.append(f"head width {', '.join(map(str, dict.fromkeys(needs.widths)))} (it takes {takes})")
        if self.devices and device not in self.devices:
            return [*reasons, f"device {device}"]
        broken = self.unusable()
        return reasons if broken is None else [*reasons, f"a way to run: {broken}"]

    def mask(self, sequences: SequenceBatch, window: Span, dtype: torch.dtype) -> Mask:
        """Make the mask of `sequences` attending to themselves, outside of compiled code. Raises as `check_dtype`."""
        self.check_dtype(dtype)
        return Mask(self.kernel, self.form(sequences, window))

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ValueError if computing in `dtype` is not claimed."""
        if self.dtypes and dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            raise ValueError(
                f"attention backend {self.name} takes {names}; the model computes in "
                f"{str(dtype).removeprefix('torch.')}: change the precision, or choose another backend"
            )


CUDA = frozenset({"cuda"})
WIDTHS_OF_FLASH = range(8, 257, 8)
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", sdpa, windowed, "torch's scaled_dot_product_attention"),
        Backend("reference", reference, dense, "the definition, slow"),
        Backend(
            "flex",
            flex,
            blocks,
            "torch's FlexAttention, a block mask",
            devices=CUDA,
            dtypes=HALF | {torch.float32},
            widths=range(16, 257),
        ),
        Backend(
            "varlen",
            varlen,
            packed,
            "torch's varlen_attn, sequences end to end",
            devices=CUDA,
            dtypes=HALF,
            widths=WIDTHS_OF_FLASH,
            sinks=False,
            uneven_value_width=False,
        ),
        *(
            Backend(
                f"flash{version}",
                partial(flash, version=version),
                partial(flash_mask, version=version),
                f"flash-attn {version}",
                devices=CUDA,
                dtypes=HALF,
                widths=WIDTHS_OF_FLASH,
                sinks=version == 4,
                uneven_value_width=version == 4,
                unusable=partial(flash_missing, version),
            )
            for version in (4, 3, 2)
        ),
    )
}

# Of the rows of a token decoder, which no one asks for by name.
FLEX_ROWS = replace(
    BACKENDS["flex"],
    name="flex_rows",
    kernel=flex_rows,
    form=short_rows,
    about="torch's FlexAttention, short rows end to end",
    documents=False,
)


def candidate_backends(name: str, needs: Needs, device: str) -> list[str]:
    """The backends that `name` may stand for, best first.

    auto   on CUDA, FlexAttention for anything but plain causal attention: a dense mask costs 14 to 51 times as much
           there (published for Hopper in pytorch/pytorch#137036), and it needs no package besides torch. Else sdpa
    fla    as auto, since fla itself is for bounded stores and matrices per head
    flash  the newest installed flash-attn that meets the needs
    rows   for short rows: end to end on CUDA, where each row would fill a tile of 128 queries; else sdpa
    """
    if name == "rows":
        return ["flex_rows", "sdpa"] if device == "cuda" else ["sdpa"]
    if name == "flash":
        return ["flash4", "flash3", "flash2"]
    if name not in ("auto", "fla"):
        return [name]
    masked = needs.features & {"windows", "documents", "sinks"}
    return ["flex", "sdpa"] if device == "cuda" and masked else ["sdpa"]


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend, of attention or of stores that are states (fla_backend.py), or
    stands for several."""
    if name not in ("auto", "flash", "fla", "rows", *BACKENDS):
        raise ValueError(f"no attention backend {name!r}; choose auto, {', '.join(BACKENDS)}, flash, fla")


def select_backend(name: str, needs: Needs, device: str) -> Backend:
    """The backend `name`, or for `auto` and `flash` the first candidate that claims `needs` on `device`.

    Raises ValueError if there is none: nothing falls back at run time.
    """
    check_name(name)
    known = BACKENDS | {FLEX_ROWS.name: FLEX_ROWS}
    tried = [known[candidate] for candidate in candidate_backends(name, needs, device)]
    for backend in tried:
        if not backend.unsupported(needs, device):
            return backend
    reasons = "; ".join(f"{b.name} lacks {', '.join(b.unsupported(needs, device))}" for b in tried)
    raise ValueError(f"no attention backend for this layout on {device}: {reasons}; backend=auto takes one that can")
