"""Parts of the GPU suite: how fast each layout trains, next to Hugging Face Llama and litgpt.

A step is a whole optimizer step on one micro-batch: forward and backward in bf16 autocast over fp32 weights, clipping,
fused AdamW. Ours is built as `train/pretrain.py` builds it and compiled block by block, the baselines as a whole.
"""

import functools
import gc
import math
from typing import Any

import torch

from arch import ModelConfig, resolve
from arch.footprint import num_params, train_flops_per_token
from train.benchmarks.baselines import BUILDERS, Step, random_batch
from train.benchmarks.gpu_case import FAMILIES, Case, Options, model_config
from train.benchmarks.timing import seconds, summary_stats
from train.device import peak_flops

WARMUP = 3
STEPS = 10
TOKENS = 32768  # of the first micro-batch tried; half as many where that does not fit, and so on
BASELINES = {"litgpt": ("mha", "gqa4"), "hugging_face": ("mha", "gqa4")}


def train_1b(options: Options) -> list[Case]:
    return throughput("1b", 2048, 45, options)


def train_1b_8k(options: Options) -> list[Case]:
    return throughput("1b", 8192, 50, options)


def train_3b(options: Options) -> list[Case]:
    return throughput("3b", 2048, 60, options)


def train_3b_8k(options: Options) -> list[Case]:
    return throughput("3b", 8192, 65, options)


def throughput(size: str, seq_len: int, estimate: float, options: Options) -> list[Case]:
    """Each family, and each baseline right after the layout that it has too."""
    chosen = [("ours", arch) for arch in FAMILIES]
    for name, archs in BASELINES.items():
        for arch in archs:
            chosen.insert(chosen.index(("ours", arch)) + 1, (name, arch))
    return [
        Case(
            f"{name}-{arch}-{size}-{seq_len}",
            estimate * (1 if name == "ours" else 2),
            functools.partial(record, name, arch, size, seq_len, options),
            _line,
        )
        for name, arch in chosen
    ]


def _line(result: dict[str, Any]) -> str:
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    peak = "" if result["peak_memory_bytes"] is None else f", {result['peak_memory_bytes'] / 2**30:.0f} GiB"
    return f"{result['tokens_per_second']:,.0f} tok/s{mfu}{peak}, micro-batch {result['micro_batch']}"


def record(name: str, arch: str, size: str, seq_len: int, options: Options) -> dict[str, Any]:
    """The measurement, and the keys by which train/estimate.py finds ours."""
    about = {
        "part": "train" if name == "ours" else "peer",
        "arch": arch,
        "size": "toy" if options.toy else size,
        "gpu": torch.cuda.get_device_name() if options.device.type == "cuda" else None,
    }
    return about | measure(name, model_config(arch, size, options, seq_len), options)


def measure(name: str, config: ModelConfig, options: Options) -> dict[str, Any]:
    """Measure at the largest micro-batch that fits, halving from TOKENS."""
    batch = 2 if options.toy else max(1, TOKENS // config.size.seq_len)
    tried: list[int] = []
    while True:
        try:
            return run(name, config, batch, options) | {"did_not_fit": tried}
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        # Outside of the handler, which would keep the model alive through the traceback.
        tried.append(batch)
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def run(name: str, config: ModelConfig, batch: int, options: Options) -> dict[str, Any]:
    """Seconds per step after warm-up; the first step's surplus is compilation. Raises RuntimeError on a loss of NaN."""
    device, size = options.device, config.size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    built = BUILDERS[name](config, device, not options.toy)
    step = Step(built, functools.partial(torch.autocast, device.type, dtype=torch.bfloat16))
    batches = [random_batch(size.vocab_size, batch, size.seq_len, device, seed) for seed in range(4)]
    losses: list[torch.Tensor] = []

    def call() -> None:
        losses.append(step(*batches[len(losses) % len(batches)]))

    first = seconds(call, device)
    for _ in range(1 if options.toy else WARMUP):
        call()
    times = [seconds(call, device) for _ in range(3 if options.toy else STEPS)]
    values = [loss.item() for loss in losses]
    if not all(map(math.isfinite, values)):
        raise RuntimeError(f"losses are not finite: {values}")
    plan, spent = resolve(config), summary_stats(times)
    speed = batch * size.seq_len / spent["median"]
    flops = train_flops_per_token(config, plan)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "version": built.version,
        "micro_batch": batch,
        "seq_len": size.seq_len,
        "params": num_params(config, plan),
        "seconds": spent,
        "first_step_seconds": first,
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "mfu": None if peak is None else speed * flops / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "losses": values,
    }
