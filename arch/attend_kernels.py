"""Attention kernels for CUDA: torch's FlexAttention and varlen_attn, and the flash-attn packages.

Each takes a mask in its own form (masks.py); attend.py lists what it supports. Windows in flash-attn's convention,
(left, right), do not count the current token.

Shapes: as in attend.py.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .masks import Packed, Rows, SequenceBatch, chunks_as_segments, effective_window, packed
from .spans import Span


def with_sinks(out_BTNV: Tensor, lse_BNT: Tensor, sinks_N: Tensor) -> Tensor:
    """Turn attention without sinks into attention with one sink per head, whose value is zero; [B, T, N, V].

    The slots keep sum(exp(score)) / (sum(exp(score)) + exp(sink)) of the weight, which is sigmoid(lse - sink).
    """
    share_BNT = torch.sigmoid(lse_BNT - sinks_N[:, None].to(lse_BNT.dtype))
    return (out_BTNV * rearrange(share_BNT, "b n t -> b t n 1")).to(out_BTNV.dtype)


VARIANTS = 128  # of compiled code in one process: layouts, batches and buckets; torch's own limit is 8


def flex_of_one_query(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """flex_attention, compiled for each batch anew: where that may vary, torch leaves its kernel that splits the keys.
    The number of slots may vary."""
    for x in (q, k, v):
        torch._dynamo.mark_static(x, 0)
    return flex_attention(q, k, v, **options)


@functools.cache
def compiled_flex(one_query: bool) -> Any:
    """FlexAttention, compiled by itself."""
    function: Any = flex_of_one_query if one_query else flex_attention
    return torch.compile(function, fullgraph=True)  # an error beyond the limit of variants, not silent eager code


# For FlexAttention's backward pass with heads of 129 to 256 in half precision. torch gives four warps tiles of 64 x 64,
# whose sums alone fill their registers: on an H100 each thread spills 1.6 KB at 256, and 192 bytes with these.
WIDE_BACKWARD = {"bwd_num_warps": 8, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}


def kernel_options(q_BTNH: Tensor, v_BSKV: Tensor) -> dict[str, int] | None:
    """Options of FlexAttention's kernels where torch's own choice is a poor one; None: its choice."""
    wide = 128 < max(q_BTNH.shape[-1], v_BSKV.shape[-1]) <= 256
    return WIDE_BACKWARD if wide and q_BTNH.is_cuda and q_BTNH.dtype in (torch.bfloat16, torch.float16) else None


UNCOMPILED = frozenset({"cpu"})  # devices on which FlexAttention is not compiled by itself


def run_flex(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: BlockMask, scale: float, lse: bool) -> Any:
    """[B, T, N, V], and where `lse`, [B, N, T] the logarithm of the sum that weights were divided by; or None.

    Outside of compiled code the kernel is compiled by itself on CUDA. On the CPU it is not, and has no backward pass.
    """
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q_BTNH, k_BSKH, v_BSKV))
    options: dict[str, Any] = {
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "kernel_options": kernel_options(q_BTNH, v_BSKV),
        "return_aux": AuxRequest(lse=True) if lse else None,
    }
    if torch.compiler.is_compiling() or q.device.type in UNCOMPILED:
        result = flex_attention(q, k, v, **options)
    else:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            result = compiled_flex(q.shape[2] == 1)(q, k, v, **options)
    return rearrange(result[0] if lse else result, "b n t v -> b t n v"), result[1].lse if lse else None


def flex(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: BlockMask, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`attend` by FlexAttention, which skips blocks without a visible pair; [B, T, N, V]."""
    out_BTNV: Tensor
    out_BTNV, lse_BNT = run_flex(q_BTNH, k_BSKH, v_BSKV, mask, scale, lse=sinks_N is not None)
    return out_BTNV if sinks_N is None else with_sinks(out_BTNV, lse_BNT, sinks_N)


def flex_rows(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Rows, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`attend` by FlexAttention over short rows end to end, which are views; [B, T, N, V]."""
    q, k, v = (x.reshape(-1, mask.number * x.shape[1], *x.shape[2:]) for x in (q_BTNH, k_BSKH, v_BSKV))
    return flex(q, k, v, mask.blocks, scale, sinks_N).reshape(*q_BTNH.shape[:3], v_BSKV.shape[-1])


VARLEN_TAKES_GQA = torch.__version__ >= "2.12"


def varlen(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: Packed, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`attend` by the flash kernel of torch, over sequences end to end; [B, T, N, V].

    Its log-sum-exp has no gradient, hence no sinks.
    """
    from torch.nn.attention.varlen import varlen_attn  # seconds to import

    assert sinks_N is None and mask.bounds is not None
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    left = -1 if mask.window is None else mask.window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    if group > 1 and VARLEN_TAKES_GQA:
        options["enable_gqa"] = True
    elif group > 1:
        k_BSKH, v_BSKV = (repeat(x, "b s k h -> b s (k g) h", g=group) for x in (k_BSKH, v_BSKV))
    q, k, v = (x.flatten(0, 1) for x in (q_BTNH, k_BSKH, v_BSKV))
    out = varlen_attn(q, k, v, mask.bounds, mask.bounds, mask.longest, mask.longest, **options)
    assert isinstance(out, Tensor)
    return out.reshape(q_BTNH.shape)


class FlashPackage(NamedTuple):
    """A version of flash-attn: its modules, the major compute capabilities it has kernels for, how to install it."""

    modules: tuple[str, ...]
    capabilities: frozenset[int]
    install: str


FLASH = {
    4: FlashPackage(("flash_attn.cute",), frozenset({9, 10, 11}), 'pip install -e ".[kernels]"'),
    3: FlashPackage(
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        frozenset({9}),
        "build it from the hopper folder of the flash-attention repository",
    ),
    2: FlashPackage(("flash_attn",), frozenset({8, 9, 10, 12}), "pip install --no-build-isolation flash-attn"),
}


class FlashFunctions(NamedTuple):
    """The two entry points of flash-attn: for whole rows, and for sequences end to end."""

    rows: Any
    packed: Any


@functools.cache
def flash_functions(version: int) -> FlashFunctions | str:
    """Find the entry points of an installed flash-attn, or return why there are none. Compiled code breaks around them.

    An importable module proves nothing: where only version 4 is installed, `flash_attn` is an empty namespace.
    """
    reasons = []
    for name in FLASH[version].modules:
        try:
            module = importlib.import_module(name)
            functions = module.flash_attn_func, module.flash_attn_varlen_func
        except (ImportError, AttributeError) as error:
            reasons.append(str(error))
        else:
            return FlashFunctions(*map(torch.compiler.disable, functions))
    return f"flash-attn {version} cannot be loaded ({'; '.join(reasons)}): {FLASH[version].install}"


def flash_missing(version: int) -> str | None:
    """Explain why flash-attn `version` cannot run here; None if it can."""
    functions = flash_functions(version)
    if isinstance(functions, str):
        return functions
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    if major not in FLASH[version].capabilities | {None}:
        return f"flash-attn {version} has no kernels for compute capability {major}.x"
    return None


class FlashMask(NamedTuple):
    """The function to call, looked up outside of compiled code, and its sequences."""

    function: Any
    packed: Packed


def flash_mask(sequences: SequenceBatch, window: Span, *, version: int) -> FlashMask:
    """Make the mask of `flash`; only on a machine where `flash_missing` returns None."""
    sequences, window = chunks_as_segments(sequences, window)
    functions = flash_functions(version)
    assert isinstance(functions, FlashFunctions), functions
    if sequences.segment_ids_BT is None:
        return FlashMask(functions.rows, Packed(None, sequences.length, effective_window(window, sequences.length)))
    return FlashMask(functions.packed, packed(sequences, window))


def flash(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKV: Tensor,
    mask: FlashMask,
    scale: float,
    sinks_N: Tensor | None,
    *,
    version: int,
) -> Tensor:
    """`attend` by a flash-attn package; [B, T, N, V]. Only version 4 has a gradient of the log-sum-exp, hence sinks."""
    assert sinks_N is None or version == 4
    bounds, longest, window = mask.packed
    unlimited = None if version == 4 else -1
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    options["window_size"] = (unlimited, unlimited) if window is None else (window - 1, 0)
    if sinks_N is not None:
        options["return_lse"] = True
    q, k, v = q_BTNH, k_BSKH, v_BSKV
    if bounds is not None:
        options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    result = mask.function(q, k, v, **options)
    out: Tensor = result[0] if isinstance(result, tuple) else result  # by version
    out = out.reshape(*q_BTNH.shape[:3], v.shape[-1])
    if sinks_N is None:
        return out
    lse_BNT = result[1] if bounds is None else rearrange(result[1], "n (b t) -> b n t", b=len(q_BTNH))
    return with_sinks(out, lse_BNT, sinks_N)
