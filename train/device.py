"""The device that a step runs on: when its queue is empty, and the rate it can reach."""

import torch

from eval.hardware import TERA, find_gpu


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that is queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, dtype: torch.dtype, peak_tflops: float | None = None) -> float | None:
    """Dense FLOP/s of one device in `dtype`: `peak_tflops`, or its data sheet's; None if it has none we know."""
    if peak_tflops is not None:
        return peak_tflops * TERA
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    fp32 = "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return gpu.flops("bf16" if dtype == torch.bfloat16 else fp32) if gpu else None
