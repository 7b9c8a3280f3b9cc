"""Attention of one token of each row over a cache: its masks, and the kernels that compute it, best first.

With few key heads there are few rows of a cache to read at a small batch, so that on CUDA a kernel must split the keys
among its blocks. flash-attn's kvcache functions do, where what a row sees is one run of slots; FlexAttention's decoding
kernel does with any mask; scaled_dot_product_attention does without a mask alone.

Shapes: B batch, S slots read, N query heads, K key/value heads, G query heads per key/value head, H key width, V value
width.
"""

import functools
import importlib
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from .attend import CUDA, WIDTHS_OF_FLASH, ClaimedKernel, Mask, reference, sdpa
from .attend_cpu import HALF
from .attend_kernels import FLASH, flash_missing, flex, with_sinks
from .masks import BLOCK, Dense, Seen


class StepMask(NamedTuple):
    """Mask of a step for every kernel.

    bias    0 or minus infinity, in the type that is computed in: for the CPU
    blocks  for FlexAttention
    """

    seen: Seen
    bias: Tensor | None = None
    blocks: BlockMask | None = None


def reference_step(
    q_BNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: StepMask, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`reference` for one token of each row; [B, N, V]."""
    dense = Dense(False, mask.seen.allowed)
    return reference(q_BNH.unsqueeze(1), k_BSKH, v_BSKV, dense, scale, sinks_N).squeeze(1)


def sdpa_step(
    q_BNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: StepMask, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """`sdpa` for one token of each row; [B, N, V]. On the CPU no key is copied, nor is the mask."""
    if q_BNH.device.type != "cpu":
        dense = Dense(False, mask.seen.allowed)
        return sdpa(q_BNH.unsqueeze(1), k_BSKH, v_BSKV, dense, scale, sinks_N).squeeze(1)
    batch, heads, width = q_BNH.shape
    if sinks_N is not None and width != v_BSKV.shape[-1]:  # the fused kernel takes one width
        return reference_step(q_BNH, k_BSKH, v_BSKV, mask, scale, sinks_N)
    # Heads that read the same keys are so many more queries to them.
    q_BKGH = q_BNH.view(batch, k_BSKH.shape[2], -1, width)
    k_BKSH, v_BKSV = k_BSKH.transpose(1, 2), v_BSKV.transpose(1, 2)
    if sinks_N is None:
        out = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSV, attn_mask=mask.bias, scale=scale)
        return out.reshape(batch, heads, -1)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the kernel of the other branch, with its sums
    out, lse = fused(q_BKGH, k_BKSH, v_BKSV, 0.0, False, attn_mask=mask.bias, scale=scale)
    return with_sinks(out.reshape(batch, 1, heads, -1), lse.reshape(batch, heads, 1), sinks_N).squeeze(1)


def flex_step(
    q_BNH: Tensor, k_BSKH: Tensor, v_BSKV: Tensor, mask: StepMask, scale: float, sinks_N: Tensor | None
) -> Tensor:
    """FlexAttention, whose decoding kernel splits the keys; [B, N, V]."""
    assert mask.blocks is not None
    return flex(q_BNH.unsqueeze(1), k_BSKH, v_BSKV, mask.blocks, scale, sinks_N).squeeze(1)


def kvcache_step(
    q_BNH: Tensor,
    k_BSKH: Tensor,
    v_BSKV: Tensor,
    mask: StepMask,
    scale: float,
    sinks_N: Tensor | None,
    *,
    version: int,
) -> Tensor:
    """flash-attn over a cache in the layout that ours has; it splits the keys, and heads share them; [B, N, V]."""
    function, run = kvcache_function(version), mask.seen.run
    assert callable(function) and run is not None
    options: dict[str, Any] = {"cache_seqlens": run.end_B, "softmax_scale": scale, "causal": False}
    if run.first_B is not None:
        options["cache_leftpad"] = run.first_B
    if sinks_N is None:
        out: Tensor = function(q_BNH.unsqueeze(1), k_BSKH, v_BSKV, **options)
        return out.squeeze(1)
    out, lse_BN1, *_ = function(q_BNH.unsqueeze(1), k_BSKH, v_BSKV, return_softmax_lse=True, **options)
    return with_sinks(out, lse_BN1, sinks_N).squeeze(1)


@functools.cache
def kvcache_function(version: int) -> Any:
    """flash_attn_with_kvcache of an installed flash-attn; a text where there is none."""
    for name in FLASH[version].modules:
        try:
            return importlib.import_module(name).flash_attn_with_kvcache
        except (ImportError, AttributeError) as error:
            reason = str(error)
    return f"flash-attn {version} has no kvcache function here ({reason})"


def kvcache_missing(version: int) -> str | None:
    """Explain why flash-attn's kvcache function cannot run here; None if it can."""
    function = kvcache_function(version)
    return function if isinstance(function, str) else flash_missing(version)


@dataclass(frozen=True)
class StepKernel(ClaimedKernel):
    """A kernel of decoding steps, and its claims.

    widths   0 is that of a latent store, whose readers have queries of another width
    gaps     what a row sees may have gaps
    uneven   keys and values may be of different widths
    growing  the number of slots may change from token to token
    traced   it may be part of compiled code, and so may be looked for there
    """

    widths: range = field(default=range(1 << 16), kw_only=True)
    gaps: bool = True
    uneven: bool = True
    growing: bool = True
    traced: bool = True

    def takes(self, device: str, dtype: torch.dtype, widths: tuple[int, ...], seen: Seen) -> bool:
        return (
            (not self.devices or device in self.devices)
            and (not self.dtypes or dtype in self.dtypes)
            and all(width in self.widths for width in widths)
            and (self.uneven or len(set(widths)) == 1)
            and (self.gaps or seen.run is not None)
            and (self.growing or seen.static)
            and (self.traced or not torch.compiler.is_compiling())
            and self.unusable() is None
        )


# Without a mask, torch's own flash kernel splits the keys too, and costs no compilation.
STEP_KERNELS = (
    *(
        StepKernel(
            f"flash{version}-kvcache",
            partial(kvcache_step, version=version),
            devices=CUDA,
            dtypes=HALF,
            widths=WIDTHS_OF_FLASH,
            gaps=False,
            uneven=False,
            traced=False,
            unusable=partial(kvcache_missing, version),
        )
        for version in (3, 2)
    ),
    StepKernel(
        "flex",
        flex_step,
        devices=CUDA,
        dtypes=HALF | {torch.float32},
        widths=range(16, 257),
        growing=False,  # or compiled each time
    ),
    StepKernel("sdpa", sdpa_step, widths=range(1 << 16)),  # 0: latents, whose reader takes the mask alone
)


def select_step_kernel(
    backend: str, device: str, dtype: torch.dtype, width: int, seen: Seen, v_dim: int | None = None
) -> StepKernel:
    """The first kernel that takes such a step; sdpa where nothing is masked, the definition for that backend."""
    if backend == "reference":
        return StepKernel("reference", reference_step)
    if seen.allowed is None:
        return STEP_KERNELS[-1]
    widths = (width, v_dim or width)
    return next(kernel for kernel in STEP_KERNELS if kernel.takes(device, dtype, widths, seen))


def step_mask(
    backend: str, seen: Seen, dtype: torch.dtype, width: int, device: torch.device, v_dim: int | None = None
) -> Mask:
    """The mask of a step for layers with keys of `width`, and values of `v_dim` (None: the same), with the kernel that
    takes it."""
    chosen = select_step_kernel(backend, device.type, dtype, width, seen, v_dim)
    bias = blocks = None
    if seen.allowed is not None and device.type == "cpu":
        bias = torch.zeros(seen.allowed.shape, dtype=dtype).masked_fill_(~seen.allowed, -math.inf)
    if chosen.kernel is flex_step:
        assert seen.allowed is not None
        blocks = step_blocks(seen.allowed)
    return Mask(chosen.kernel, StepMask(seen, bias, blocks))


def step_blocks(allowed: Tensor) -> BlockMask:
    """Block mask of one query over all blocks of slots, [1, S] or [B, 1, 1, S]; slots are told apart within them."""
    seen_BS = allowed.reshape(-1, allowed.shape[-1])
    rows, slots = seen_BS.shape
    count = -(-slots // BLOCK)
    index = torch.arange(count, dtype=torch.int32, device=allowed.device).expand(rows, 1, 1, count).contiguous()
    number = torch.full((rows, 1, 1), count, dtype=torch.int32, device=allowed.device)

    def visible(b: Tensor, h: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return seen_BS[b, slot] if rows > 1 else seen_BS[0, slot]

    return BlockMask.from_kv_blocks(number, index, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(1, slots))
