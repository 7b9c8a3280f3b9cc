"""Time a training step and the loader against baselines on the CPU: `python train/benchmarks/cpu.py +arch=X +size=Y`.

Ours, Hugging Face Llama and litgpt have equal shapes, weights, batches and optimizers, and take their steps in turns in
one process, so that whatever else the machine does meets all of them. Where it does much else, threads=1 and the CPU
seconds tell more than the clock. Peak memory is taken in processes of their own.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()
    import train  # noqa: F401  before torch

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from arch import ArchConfig, ModelConfig, SizeConfig
from data.cli import UsageError
from data.config import DataConfig
from eval.cli import Choices, launch, require
from eval.console import PlainConsole
from eval.environment import hardware
from eval.results import write_result
from eval.units import bytes_text
from train.benchmarks import loader as bench_loader
from train.benchmarks.baselines import (
    BUILDERS,
    Baseline,
    UnavailableError,
    copy_weights,
    llama_slot,
    train_in_turns,
)
from train.benchmarks.peak_memory import peak_memory
from train.benchmarks.timing import summary_stats, time_ratios
from train.datamodule import open_data

LOSS_TOLERANCE = 1e-4  # of the first loss, in nats; fp32 and other orders of summation


@dataclass
class BenchConfig:
    """The command line.

    batch_size      sequences per step
    repeats         timed rounds; in each, every model takes one step in turn
    documents       training documents that the streaming loader reads per round
    loader_repeats  rounds of the loaders
    threads         torch threads; null: torch's default
    out             folder of bench.json
    size            one item of the size
    arch            one item of the layout
    data            the text, as in train/pretrain.py
    """

    arch: ArchConfig = field(default_factory=ArchConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 2
    repeats: int = 7
    documents: int = 400
    loader_repeats: int = 3
    threads: int | None = None
    out: str = "docs/results/bench-cpu"


def main(config: DictConfig, choices: Choices) -> None:
    require(arch=choices.arch, size=choices.size)
    options = OmegaConf.to_object(config)
    assert isinstance(options, BenchConfig)
    for name in ("batch_size", "repeats", "documents", "loader_repeats"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} is {getattr(options, name)}; it must be at least 1")
    model = ModelConfig(options.arch, options.size)
    try:
        llama_slot(model)
    except UnavailableError as error:
        raise UsageError(f"+arch={choices.arch}: {error}") from error
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "model": f"{choices.arch}-{choices.size}",
        "batch_size": options.batch_size,
        "seq_len": options.size.seq_len,
        "precision": "fp32",
        "load": {"before": os.getloadavg()},
    }
    result |= step_against_baselines(model, options.batch_size, options.repeats)
    result["loader"] = loader_against_baseline(options)
    result["load"]["after"] = os.getloadavg()
    path = Path(options.out) / "bench.json"
    write_result(path, result)
    print_tables(result)
    print(f"written to {path}")


def step_against_baselines(config: ModelConfig, batch: int, repeats: int) -> dict[str, Any]:
    """Memory, then time, of every model that can be built here; `skipped` names the others with the reason.

    Raises RuntimeError if the first losses, of equal weights on an equal batch, differ.
    """
    baselines, skipped = build_all(config)
    memory = {name: peak_memory(name, config, batch) for name in baselines}
    turns, losses = train_in_turns(baselines, config.size, batch, repeats)
    first = {name: values[0] for name, values in losses.items()}
    if max(first.values()) - min(first.values()) > LOSS_TOLERANCE:
        raise RuntimeError(f"equal weights and an equal batch give other losses: {first}")
    models = {
        name: {
            "version": baseline.version,
            "params": sum(p.numel() for p in baseline.model.parameters()),
            "seconds": summary_stats(turns.seconds[name]),
            "cpu_seconds": summary_stats(turns.cpu_seconds[name]),
            "tokens_per_second": batch * config.size.seq_len / statistics.median(turns.seconds[name]),
            "peak_bytes": memory[name],
            "first_loss": losses[name][0],
            "last_loss": losses[name][-1],
        }
        for name, baseline in baselines.items()
    }
    # More than 1: ours is faster, ours takes less.
    against = {
        name: time_ratios(turns, name, "ours")
        | {"memory": {kind: _ratio(memory[name][kind], memory["ours"][kind]) for kind in memory[name]}}
        for name in baselines
        if name != "ours"
    }
    return {"models": models, "ours_against": against, "skipped": skipped}


def _ratio(numerator: int | None, denominator: int | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def build_all(config: ModelConfig) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Every model with our weights, and the reason for each one that is missing.

    Raises RuntimeError if their sizes differ.
    """
    baselines: dict[str, Baseline] = {}
    skipped: dict[str, str] = {}
    for name, build in BUILDERS.items():
        try:
            baselines[name] = build(config, torch.device("cpu"), False)
        except UnavailableError as error:
            skipped[name] = str(error)
    weights = baselines["ours"].model.state_dict()
    counts = {name: sum(p.numel() for p in baseline.model.parameters()) for name, baseline in baselines.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"the models differ in size, a comparison would mean nothing: {counts}")
    for name, baseline in baselines.items():
        if name != "ours":
            copy_weights(config, weights, name, baseline)
    return baselines, skipped


def loader_against_baseline(options: BenchConfig) -> dict[str, Any]:
    ((folder, manifest),) = open_data(options.data).items()
    corpus = manifest.recipe["source"]["corpus"]
    if corpus is None:
        return {"skipped": f"{folder} was not made of a corpus that is on every machine, such as stdlib"}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "train.jsonl"
        bench_loader.write_text(corpus, text, options.documents)
        try:
            batch, seq_len = options.batch_size, options.size.seq_len
            return bench_loader.measure(
                folder, manifest, text, batch=batch, seq_len=seq_len, repeats=options.loader_repeats
            )
        except UnavailableError as error:
            return {"skipped": str(error)}


def print_tables(result: dict[str, Any]) -> None:
    console = PlainConsole()
    tokens = f"{result['batch_size']} x {result['seq_len']} tokens"
    table = Table("", title=f"{result['model']}, {tokens}, fp32, {hardware()}")
    for column in ("s/step", "min-max", "allocated", "resident", "theirs / ours", "by round", "in CPU s", "by round"):
        table.add_column(column, justify="right")
    for name, model in result["models"].items():
        spent, memory, against = model["seconds"], model["peak_bytes"], result["ours_against"].get(name)
        ratios = []
        for way in ("speed", "cpu") if against else ():
            ratios += [f"{against[way]:.3f}", "{min:.3f}-{max:.3f}".format(**against[f"{way}_by_round"])]
        table.add_row(
            f"{name} {model['version']}".strip(),
            f"{spent['median']:.3f}",
            f"{spent['min']:.3f}-{spent['max']:.3f}",
            bytes_text(memory["allocated"]),
            bytes_text(memory["resident"]) if memory["resident"] else "?",
            *ratios,
        )
    console.print(table)
    for name, reason in result["skipped"].items():
        print(f"{name} skipped: {reason}")
    loader = result["loader"]
    if "skipped" in loader:
        print(f"loader: datasets skipped: {loader['skipped']}")
        return
    for name, speed in loader["tokens_per_second"].items():
        print(f"loader: {name} {speed['median']:,.0f} tokens/s ({speed['min']:,.0f}-{speed['max']:,.0f})")


if __name__ == "__main__":
    launch(main, "bench", BenchConfig)
