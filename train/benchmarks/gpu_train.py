"""Parts of the GPU suite: how fast each layout trains, next to Hugging Face Llama and litgpt, its roof and its goal.

A step is a whole optimizer step as `train/pretrain.py` takes it on one GPU: the largest micro-batch that fits by
estimate, a few of them accumulated, forward and backward in bf16 autocast over fp32 weights, clipping, fused AdamW.
Ours is built as there and compiled block by block, the baselines as a whole.
"""

import functools
import gc
import math
from typing import Any

import torch

from arch import ModelConfig, resolve
from arch.footprint import num_params, train_flops_per_token
from eval.hardware import find_gpu
from train.benchmarks.baselines import BUILDERS, Step, UnavailableError, kvfrontier, random_batch
from train.benchmarks.gpu_case import MEASURED, Case, Options, case_config
from train.benchmarks.timing import seconds, summary_stats
from train.device import free_memory, peak_flops
from train.estimates.activations import Execution
from train.estimates.capacity import largest_micro_batch, needed_bytes, reserve_of
from train.estimates.roofline import ROOF, step_time

WARMUP = 2
STEPS = 6
# Micro-batches of a step: more where they are small, since what a step does once is then more of it.
ACCUMULATE, OF_SMALL, SMALL = 4, 8, 8192
BASELINES = {"litgpt": ("mha", "gqa4"), "hugging_face": ("mha", "gqa4")}
CHECKPOINTED = {"3b": "mha"}  # one layout that is also measured with activation checkpointing
# What an H100 should reach at 1b and 2048 tokens: model FLOPs utilization; and for layouts that others have too, 1.15
# times the tokens/s of the best published stack (llm-foundry's MPT-1b, 45.5 thousand per GPU).
PLAIN = ("mha", "gqa4", "mqa", "cla2")
GOAL_MFU = dict.fromkeys(PLAIN, 0.46) | {"mixattention": 0.43, "gemma3": 0.43, "mla": 0.43, "block": 0.44, "bct": 0.30}
GOAL_TOKENS_PER_SECOND = dict.fromkeys(PLAIN, 1.15 * 45_500)


def train_1b(options: Options) -> list[Case]:
    return throughput("1b", 2048, 45, options)


def train_1b_8k(options: Options) -> list[Case]:
    return throughput("1b", 8192, 50, options)


def train_3b(options: Options) -> list[Case]:
    return throughput("3b", 2048, 60, options)


def train_3b_8k(options: Options) -> list[Case]:
    return throughput("3b", 8192, 65, options)


def throughput(size: str, seq_len: int, estimate: float, options: Options) -> list[Case]:
    """Make a case for each family, each baseline right after the layout that it shares; the checkpointed one comes
    last."""
    chosen = [("ours", arch, False) for arch in MEASURED]
    for name, archs in BASELINES.items():
        for arch in archs:
            chosen.insert(chosen.index(("ours", arch, False)) + 1, (name, arch, False))
    if size in CHECKPOINTED and seq_len == 2048:
        chosen.append(("ours", CHECKPOINTED[size], True))
    return [
        Case(
            f"{name}-{arch}-{size}-{seq_len}" + "-checkpointed" * checkpointing,
            estimate * (1 if name == "ours" else 2),
            functools.partial(record, name, arch, size, seq_len, options, checkpointing),
            _line,
        )
        for name, arch, checkpointing in chosen
    ]


def _line(result: dict[str, Any]) -> str:
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    if result["goal_mfu"] is not None and mfu:
        mfu += f" (goal {result['goal_mfu']:.0%})"
    roof = "" if result["roof_mfu"] is None else f", roof {result['roof_mfu']:.1%}"
    peak = "" if result["peak_memory_bytes"] is None else f", {result['peak_memory_bytes'] / 2**30:.0f} GiB"
    estimate = f" of {result['estimated_bytes'] / 2**30:.3g} GiB by estimate" if peak else ""
    micro = f"{result['accumulate']} x micro-batch {result['micro_batch']}"
    return f"{result['tokens_per_second']:,.0f} tok/s{mfu}{roof}{peak}{estimate}, {micro}"


def record(
    name: str, arch: str, size: str, seq_len: int, options: Options, checkpointing: bool = False
) -> dict[str, Any]:
    """The measurement, its goal, and the keys by which train/estimate.py finds ours."""
    known = size == "1b" and seq_len == 2048 and name == "ours" and not options.toy
    about = {
        "part": "train" if name == "ours" else "peer",
        "arch": arch,
        "size": "toy" if options.toy else size,
        "gpu": torch.cuda.get_device_name() if options.device.type == "cuda" else None,
        "activation_checkpointing": checkpointing,
        "goal_mfu": GOAL_MFU.get(arch) if known else None,
        "goal_tokens_per_second": GOAL_TOKENS_PER_SECOND.get(arch) if known else None,
    }
    return about | measure(name, case_config(arch, size, options, seq_len), options, checkpointing)


def first_micro_batch(config: ModelConfig, how: Execution, options: Options) -> int:
    """The largest that fits by estimate beside what is there, as in train/pretrain.py; a single sequence if none does.

    Of the batch of the size, so that it is one that a run on one GPU has.
    """
    if options.device.type != "cuda":
        return 2
    free = free_memory(options.device)
    batch = config.size.batch_size
    return largest_micro_batch(config, resolve(config), how, batch, free - reserve_of(free)) or 1


def measure(name: str, config: ModelConfig, options: Options, checkpointing: bool = False) -> dict[str, Any]:
    """Measure at the largest micro-batch that fits by estimate, halving where it does not.

    Raises UnavailableError if not even a single sequence fits.
    """
    how = Execution(checkpointing=checkpointing)
    batch = first_micro_batch(config, how, options)
    tried: list[int] = []
    while True:
        try:
            return run(name, config, batch, options, how) | {"did_not_fit": tried}
        except torch.cuda.OutOfMemoryError as error:
            if batch == 1:
                needed = needed_bytes(config, resolve(config), how, 2, 1) / 2**30
                raise UnavailableError(f"a single sequence does not fit ({needed:.0f} GiB by estimate)") from error
        # Outside of the handler, which would keep the model alive through the traceback.
        tried.append(batch)
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def run(name: str, config: ModelConfig, batch: int, options: Options, how: Execution) -> dict[str, Any]:
    """Seconds per step after warm-up; the first step's surplus is compilation. Raises RuntimeError on a loss of NaN."""
    device, size = options.device, config.size
    accumulate = 2 if options.toy else OF_SMALL if batch * size.seq_len <= SMALL else ACCUMULATE
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    build = functools.partial(kvfrontier, activation_checkpointing=True) if how.checkpointing else BUILDERS[name]
    built = build(config, device, not options.toy)
    step = Step(built, functools.partial(torch.autocast, device.type, dtype=torch.bfloat16), accumulate)
    rows = batch * accumulate
    batches = [random_batch(size.vocab_size, rows, size.seq_len, device, seed) for seed in range(4)]
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
    speed = rows * size.seq_len / spent["median"]
    flops = train_flops_per_token(config, plan)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "version": built.version,
        "micro_batch": batch,
        "accumulate": accumulate,
        "seq_len": size.seq_len,
        "params": num_params(config, plan),
        "seconds": spent,
        "first_step_seconds": first,
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "mfu": None if peak is None else speed * flops / peak,
        **roof(config, how, batch, accumulate, peak, device),
        "estimated_bytes": needed_bytes(config, plan, how, rows, batch),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "losses": values,
    }


def roof(
    config: ModelConfig, how: Execution, batch: int, accumulate: int, peak: float | None, device: torch.device
) -> dict[str, float | None]:
    """The speed at which every kernel would run as by itself; of our layout, also where a baseline is measured."""
    if peak is None:
        return {"roof_tokens_per_second": None, "roof_mfu": None}
    plan, gpu = resolve(config), find_gpu(torch.cuda.get_device_name(device))
    whole = Execution(checkpointing=how.checkpointing, accumulate=accumulate)
    speed = 1 / step_time(config, plan, whole, batch, ROOF, peak, gpu).total
    return {"roof_tokens_per_second": speed, "roof_mfu": speed * train_flops_per_token(config, plan) / peak}


COLUMNS = (
    *("case", "tokens/s", "goal tokens/s", "roof tokens/s", "MFU", "goal MFU", "roof MFU"),
    *("GiB at the peak", "GiB by estimate", "micro-batches"),
)


def table(part: str, result: dict[str, Any]) -> str | None:
    """The results of a part as a table in Markdown, measured figures beside goal and roof; None if it has none."""
    cases = {key: case for key, case in result["cases"].items() if case.get("part") in ("train", "peer")}
    if not cases:
        return None
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for key, case in cases.items():
        speeds = [case.get(f"{kind}tokens_per_second") for kind in ("", "goal_", "roof_")]
        shares = [case.get(f"{kind}mfu") for kind in ("", "goal_", "roof_")]
        memory = [case.get("peak_memory_bytes"), case.get("estimated_bytes")]
        texts = [_text(value, "{:,.0f}") for value in speeds] + [_text(value, "{:.1%}") for value in shares]
        texts += [_text(value and value / 2**30, "{:.1f}") for value in memory]
        rows.append((key, *texts, f"{case.get('accumulate', 1)} x {case['micro_batch']}"))
    return f"{part}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
