"""The device that a step runs on: when its queue is empty, the rate it can reach, and the memory it has left."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend

from arch import ModelConfig, Plan
from data.cli import UsageError
from eval.hardware import TERA, find_gpu


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Count denormal numbers as zero, which make a CPU's products several times as slow.

    In this thread and those that it starts: threads of torch that run already are as they were, and those that start
    within stay so afterwards.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def device_type(accelerator: str) -> str:
    """The type of device that `trainer.accelerator` means on this machine: cuda or cpu."""
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def named_device(name: str | torch.device) -> torch.device:
    """The device of this name. Raises UsageError if torch sees no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {name}; choose cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device is {name}, and torch sees no CUDA device; use device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {name}, and torch sees {torch.cuda.device_count()}; choose a smaller number")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that is queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, once this process has given back what an earlier run of it has left."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def sdpa_kernel_name(config: ModelConfig, plan: Plan, device: torch.device) -> str:
    """Name the kernel that scaled_dot_product_attention takes on CUDA for the widest plainly causal store in bf16, and
    the version of cuDNN, on which the choice depends: torch leaves cuDNN's attention out below 9.15.1."""
    stores = [store for stack in plan.stacks for store in stack.plan.stores if store.masked and store.window is None]
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    about = f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}"
    if not stores:
        return f"{about}; no store is plainly causal"
    shape = max((store.kernel_heads(config.size) for store in stores), key=lambda heads: heads.k_dim)
    q, k = (
        torch.empty(1, heads, 256, shape.k_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        for heads in (config.size.num_heads, shape.kv_heads)
    )
    with torch.enable_grad():
        chosen = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=len(q[0]) != len(k[0]))
    return f"{about}; scaled_dot_product_attention takes {SDPBackend(chosen).name}"


def peak_flops(device: torch.device, dtype: torch.dtype, peak_tflops: float | None = None) -> float | None:
    """Dense FLOP/s of one device in `dtype`: `peak_tflops`, or its data sheet's; None if it has none we know."""
    if peak_tflops is not None:
        return peak_tflops * TERA
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    fp32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return gpu.flops("bf16" if dtype == torch.bfloat16 else fp32) if gpu else None
