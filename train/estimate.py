"""Estimate memory and time of a run: `python train/estimate.py +arch=cla2 +size=3b gpu=h100 gpus=8`. See --help."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from arch import LayoutError, Plan, resolve
from arch.footprint import num_params, train_flops_per_token
from arch.named import load_arch, load_size
from data.cli import UsageError, did_you_mean
from eval.cli import Choices, launch, require
from eval.console import PlainConsole
from eval.hardware import GPUS, TERA, Gpu, find_gpu
from eval.results import training_speeds
from eval.units import bytes_text, count_text, parse_bytes
from train.estimates.activations import Execution
from train.estimates.capacity import does_not_fit, execution, largest_micro_batch, remedies
from train.estimates.memory import step_memory
from train.estimates.roofline import ROOF, Rates, published_rates, step_time
from train.matching import matched
from train.schema import (
    PretrainConfig,
    micro_batch,
    num_steps,
    problems,
)

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# Kinds of store that compute in fp32, at a rate that nobody has published.
UNMEASURED = {"bounded": "bounded stores", "matrix": "matrices per head"}


@dataclass
class EstimateConfig(PretrainConfig):
    """The command line of train/pretrain.py, and the machine to run on.

    gpu      h100, h200, b200, a100-80, ...: the short names in eval/hardware.py; null: the GPU of this machine. For any
             other, set memory= and trainer.peak_tflops= too
    gpus     GPUs per node; null: trainer.devices. Several use fsdp unless trainer.strategy= is set
    nodes    machines, of gpus= GPUs each; null: trainer.num_nodes
    mfu      assumed model FLOPs utilization if docs/results has no measurement of exactly this run; null: the rates of
             published runs for matrix products, attention and memory
    reserve  memory left for the CUDA context, NCCL and fragmentation
    memory   memory of one GPU, such as 80GB; null: that of the data sheet
    json     print a JSON object instead of the tables
    """

    gpu: str | None = None
    gpus: int | None = None
    nodes: int | None = None
    mfu: float | None = None
    reserve: str = "4GiB"
    memory: str | None = None
    json: bool = False


@dataclass(frozen=True)
class Device:
    """One GPU: bytes of memory, and peak FLOP/s in the precision of the run."""

    name: str
    memory: float
    peak: float
    gpu: Gpu | None


@dataclass(frozen=True)
class Speed:
    """Training speed of one GPU; `source` says whether it is measured or assumed."""

    tokens_per_second: float
    mfu: float
    source: str


def pretrain_config(options: EstimateConfig) -> PretrainConfig:
    """The configuration that train/pretrain.py would get. Raises LayoutError if that would refuse it."""
    requested = options.trainer
    gpus = requested.devices if options.gpus is None else options.gpus
    nodes = requested.num_nodes if options.nodes is None else options.nodes
    world = gpus * nodes
    trainer = replace(
        requested,
        accelerator="cuda",
        devices=gpus,
        num_nodes=nodes,
        strategy="fsdp" if requested.strategy == "auto" and world > 1 else requested.strategy,
        precision="bf16" if requested.precision == "auto" else requested.precision,
        compile=True if requested.compile is None else requested.compile,
    )
    config = PretrainConfig(**{key.name: getattr(options, key.name) for key in fields(PretrainConfig)})
    config.trainer = trainer
    found = problems(config)
    if found:
        for key, option in (("trainer.devices", "gpus"), ("trainer.num_nodes", "nodes")):
            found = [problem.replace(key, option) for problem in found]
        raise LayoutError(found)
    return matched(config)[0]


def find_device(options: EstimateConfig) -> Device:
    """The GPU of `gpu=`, or this machine's. Raises UsageError if its memory or peak is not known."""
    precision, peak_tflops = options.trainer.precision, options.trainer.peak_tflops
    name = options.gpu or local_gpu()
    if name is None:
        raise UsageError(f"there is no GPU here; choose gpu= one of: {', '.join(gpu.short for gpu in GPUS)}")
    gpu = find_gpu(name)
    known = gpu.flops("fp32" if precision == "fp32" else "bf16") if gpu else None
    peak = peak_tflops * TERA if peak_tflops else known
    try:
        memory = parse_bytes(options.memory) if options.memory else gpu.memory_bytes if gpu else None
    except ValueError as error:
        raise UsageError(str(error)) from error
    if memory is None or peak is None:
        lacking = " and ".join(["memory="] * (memory is None) + ["trainer.peak_tflops="] * (peak is None))
        shorts = [gpu.short for gpu in GPUS]
        raise UsageError(
            f"gpu={name}: eval/hardware.py does not know its peak in {precision} or its memory"
            f"{did_you_mean(name, shorts).rstrip('.') or ';'} give {lacking}, or choose {', '.join(shorts)}"
        )
    return Device(name, memory, peak, gpu)


def local_gpu() -> str | None:
    """Name of this machine's GPU; None without one."""
    import torch  # only where no GPU is named

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def measured(config: PretrainConfig, choices: Choices, device: Device, folder: Path) -> Speed | None:
    """The fastest measurement of this very model, sequence length, GPU and checkpointing; None if there is none."""
    model = config.model
    named = load_arch(str(choices.arch)), replace(load_size(str(choices.size)), seq_len=config.size.seq_len)
    if device.gpu is None or (config.arch, replace(config.size, tokens=0, batch_size=0, lr=0)) != (
        named[0],
        replace(named[1], tokens=0, batch_size=0, lr=0),
    ):
        return None
    wanted = (choices.arch, choices.size, config.size.seq_len, config.trainer.activation_checkpointing)
    records = [
        record
        for record in training_speeds(folder)
        if (record.arch, record.size, record.seq_len, record.activation_checkpointing) == wanted
        and find_gpu(record.gpu) is device.gpu
    ]
    if not records:
        return None
    best = max(records, key=lambda record: record.tokens_per_second / record.devices)
    rate = best.tokens_per_second / best.devices
    mfu = rate * train_flops_per_token(model, resolve(model)) / device.peak
    peak = "" if best.peak_memory_bytes is None else f"; {bytes_text(best.peak_memory_bytes)} at its peak there"
    where = best.path.relative_to(folder)
    return Speed(rate, mfu, f"measured on {best.devices} x {best.gpu} ({where}), scaled linearly{peak}")


def assumed(config: PretrainConfig, flops: float, device: Device, mfu: float) -> Speed:
    """The speed at an assumed MFU; recomputation by checkpointing, a quarter of all work, is no useful work."""
    source = f"assumed: {mfu:.0%} of the peak of {device.peak / TERA:,.0f} TFLOP/s"
    if config.trainer.activation_checkpointing:
        mfu, source = mfu * 3 / 4, f"{source}, x 3/4 for recomputation"
    return Speed(mfu * device.peak / flops, mfu, source)


def at_rates(
    config: PretrainConfig, plan: Plan, how: Execution, micro_batch: int, flops: float, device: Device, rates: Rates
) -> Speed:
    """The speed at which matrix products, attention and traffic of memory reach `rates`."""
    seconds = step_time(config.model, plan, how, micro_batch, rates, device.peak, device.gpu).total
    source = (
        f"assumed: matrix products at {rates.matmul:.0%} and attention at {rates.forward:.0%} of the peak of "
        f"{device.peak / TERA:,.0f} TFLOP/s, as in published runs"
    )
    kinds = {store.kind for stack in plan.stacks for store in stack.plan.stores if not store.masked}
    if kinds & set(UNMEASURED):
        merging = " and ".join(name for kind, name in UNMEASURED.items() if kind in kinds)
        source += f", {merging} at {rates.fp32_matmul:.0%} of that in fp32, for which nothing is published"
    elif plan.block_length > 1:
        source += "; nothing is published for Block Transformers"
    if config.trainer.precision == "fp8":
        source += "; in bf16: the gain of fp8 is not measured"
    return Speed(1 / seconds, flops / seconds / device.peak, source)


def make_estimate(
    options: EstimateConfig, choices: Choices, results: Path = RESULTS, typed: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that is shown, as plain data. `typed`: the words of the command line. Raises one of MISTAKES."""
    config, device = pretrain_config(options), find_device(options)
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UsageError(f"mfu is {options.mfu}; it is a share of the peak, above 0 and at most 1")
    try:
        reserve = parse_bytes(options.reserve)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model = config.model
    plan, how = resolve(model), execution(config)
    per_rank_batch, available = config.batch_size // how.world, device.memory - reserve
    micro = config.trainer.micro_batch or largest_micro_batch(model, plan, how, per_rank_batch, available) or 1
    how = replace(how, accumulate=per_rank_batch // micro)
    memory, flops = step_memory(model, plan, how, micro), train_flops_per_token(model, plan)
    roof = at_rates(config, plan, how, micro, flops, device, ROOF)
    speed = measured(config, choices, device, results)
    if speed is None and options.mfu is not None:
        speed = assumed(config, flops, device, options.mfu)
    elif speed is None:
        speed = at_rates(config, plan, how, micro, flops, device, published_rates(device.gpu))
    steps, rate = num_steps(config), speed.tokens_per_second * how.world
    step_tokens = config.batch_size * config.size.seq_len
    hours = steps * step_tokens / rate / 3600
    fits = memory.total <= available
    return {
        "arch": choices.arch,
        "size": choices.size,
        "seq_len": config.size.seq_len,
        "params": num_params(model, plan),
        "flops_per_token": flops,
        "gpu": device.name,
        "world": how.world,
        "strategy": config.trainer.strategy,
        "micro_batch": micro,
        "default_micro_batch": micro_batch(config),
        "accumulate": per_rank_batch // micro,
        "memory": asdict(memory) | {"reserve": int(reserve), "total": int(memory.total + reserve)},
        "gpu_memory": int(device.memory),
        "fits": fits,
        "remedies": [] if fits else remedies(config, plan, available),
        "steps": steps,
        "step_tokens": step_tokens,
        "step_seconds": step_tokens / rate,
        "tokens_per_second": rate,
        "mfu": speed.mfu,
        "source": speed.source,
        "roof_tokens_per_second": roof.tokens_per_second * how.world,
        "roof_mfu": roof.mfu,
        "hours": hours,
        "gpu_hours": hours * how.world,
        "command": pretrain_command(config, typed, micro),
    }


def pretrain_command(config: PretrainConfig, typed: Sequence[str], micro: int) -> str:
    """The command line that starts the run: the typed words, and the estimated execution."""
    trainer = config.trainer
    execution = tuple(f"trainer.{key}=" for key in ("micro_batch", "strategy", "devices", "num_nodes"))
    own = ("gpu=", "gpus=", "nodes=", "mfu=", "reserve=", "memory=", "json=", "trainer=", *execution)
    words = ["python", "train/pretrain.py", *(word for word in typed if not word.startswith(own))]
    if trainer.strategy != "auto":
        words += [f"trainer={trainer.strategy}", f"trainer.devices={trainer.devices}"]
    if trainer.num_nodes > 1:
        words.append(f"trainer.num_nodes={trainer.num_nodes}")
    return shlex.join([*words, f"trainer.micro_batch={micro}"])


PARTS = {
    "weights": "weights (fp32)",
    "gradients": "gradients (fp32)",
    "optimizer": "AdamW moments (fp32)",
    "working": "working copies, buffers",
    "activations": "activations",
    "temporary": "loss or one block's backward pass",
    "reserve": "reserve (stated, not computed)",
    "total": "total",
}


def memory_table(found: dict[str, Any]) -> Table:
    result = Table(title="Memory of each GPU", title_justify="left")
    result.add_column("part")
    result.add_column("memory", justify="right")
    for part, text in PARTS.items():
        result.add_row(text, bytes_text(found["memory"][part]), style="bold" if part == "total" else None)
    result.add_row("the GPU has", bytes_text(found["gpu_memory"]))
    return result


def time_table(found: dict[str, Any]) -> Table:
    result = Table(title="Time", title_justify="left", show_header=False)
    result.add_column()
    result.add_column(justify="right")
    result.add_row("steps", f"{found['steps']:,}")
    result.add_row("tokens of a step", f"{found['step_tokens']:,} in {found['accumulate']} micro-batches")
    result.add_row("a step takes", f"{found['step_seconds']:.3g} s")
    result.add_row("tokens/s", f"{found['tokens_per_second']:,.0f}")
    result.add_row("MFU", f"{found['mfu']:.1%}")
    result.add_row("roof", f"{found['roof_tokens_per_second']:,.0f} tokens/s, {found['roof_mfu']:.1%}")
    result.add_row("hours", f"{found['hours']:,.1f}")
    result.add_row("GPU-hours", f"{found['gpu_hours']:,.0f}")
    return result


def main(config: DictConfig, choices: Choices) -> None:
    require(arch=choices.arch, size=choices.size)
    options = OmegaConf.to_object(config)
    assert isinstance(options, EstimateConfig)
    found = make_estimate(options, choices, typed=list(HydraConfig.get().overrides.task))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    console = PlainConsole()
    console.print(
        f"{found['arch']} at {found['size']}, {count_text(found['params'])} parameters, on {found['world']} x "
        f"{found['gpu']}, micro_batch {found['micro_batch']} x {found['seq_len']:,} tokens"
    )
    console.print(memory_table(found))
    console.print(time_table(found))
    console.print("memory: counted from the layout, with fused attention; an upper estimate for compiled blocks")
    console.print(f"speed: {found['source']}")
    console.print("roof: every kernel as fast as by itself, communication hidden; 80 to 92 % of it is a good run")
    needed, has = bytes_text(found["memory"]["total"]), bytes_text(found["gpu_memory"])
    if found["fits"]:
        console.print(f"verdict: fits, {needed} of {has}")
        console.print(found["command"], soft_wrap=True)
    else:
        console.print(f"verdict: {does_not_fit(found['memory']['total'], found['gpu_memory'], found['remedies'])}")


if __name__ == "__main__":
    launch(main, "estimate", EstimateConfig)
