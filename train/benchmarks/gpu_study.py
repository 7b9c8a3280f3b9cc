"""Part of the GPU suite: a short training study, a few layouts and seeds at size 20m.

Each run is `train/pretrain.py` where all it imports is installed, and otherwise the same recipe in a bare loop: same
batches, initial weights, optimizer, schedule and evaluation. The result says which.

Shapes: B batch, T tokens.
"""

import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arch import LanguageModel, ModelConfig, resolve
from arch.footprint import kv_bytes
from data.batches import EvalBatches, SequenceFormat, TrainBatches
from data.config import PrepareConfig, SourceConfig, TokenizerConfig
from data.mixture import EvalWindows
from data.shards import Manifest, TokenWindows
from eval.environment import ROOT
from train.benchmarks.baselines import UnavailableError, kvfrontier
from train.benchmarks.gpu_case import Case, Options, model_config
from train.loss import cross_entropy_sum
from train.optim import build_optimizer, schedule
from train.schema import DataConfig, OptimConfig, sequence_format

ARCHS = ("mha", "gqa4", "cla2", "mixattention", "block", "bct")
SEEDS = (0, 1)
TOKENS = 20_000_000
NEEDED = ("lightning", "hydra", "wandb", "rich", "matplotlib", "plotly", "tokenizers")


def study(options: Options) -> list[Case]:
    """Seeds outermost, so that a study cut short still compares layouts."""
    seeds, archs = (SEEDS[:1], ARCHS[:1]) if options.toy else (SEEDS, ARCHS)
    return [
        Case(f"{arch}-20m-seed{seed}", 45, functools.partial(train, arch, seed, options), _line)
        for seed in seeds
        for arch in archs
    ]


def _line(result: dict[str, Any]) -> str:
    return f"loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tok/s over all ({result['runner']})"


def train(arch: str, seed: int, options: Options) -> dict[str, Any]:
    folder = options.data or default_data()
    config = model_config(arch, "20m", options)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if options.toy:
        config.size.vocab_size, config.size.batch_size, config.size.tokens = Manifest.load(folder).vocab_size, 4, 960
    else:
        config.size.tokens = TOKENS
    begin = time.perf_counter()
    loss = bare_loop(config, folder, seed, options) if missing else pretrain(arch, config, folder, seed)
    took = time.perf_counter() - begin
    plan = resolve(config)
    return {
        "runner": f"bare loop, {', '.join(missing)} not installed" if missing else "train/pretrain.py",
        "loss": loss,
        "ppl": math.exp(loss),
        "kv_bytes_stored": kv_bytes(plan, config.size.seq_len).stored,
        "tokens": config.size.tokens,
        "tokens_per_second": config.size.tokens / took,
    }


def default_data() -> Path:
    """The standard library's source in 8192 tokens. Raises UnavailableError where it cannot be tokenised here."""
    try:
        from data.prepare import prepare
    except ImportError as error:
        raise UnavailableError(f"text cannot be tokenised here ({error}); give prepared shards with data=") from error
    config = PrepareConfig(
        name="stdlib", source=SourceConfig(corpus="stdlib"), tokenizer=TokenizerConfig(vocab_size=8192)
    )
    prepare(config)
    return config.folder


def pretrain(arch: str, config: ModelConfig, folder: Path, seed: int) -> float:
    """The validation loss that train/pretrain.py reports. Raises RuntimeError with its output where it fails."""
    size = {key: "null" if value is None else value for key, value in asdict(config.size).items()}
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "train/pretrain.py", f"+arch={arch}", "+size=20m", f"seed={seed}", f"folder={run}"]
        command += [f"size.{key}={value}" for key, value in size.items()]
        command += [f"data.path={folder.resolve()}", "logger.wandb=false", "trainer.progress=false"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"train/pretrain.py ended with {done.returncode}: {done.stderr[-2000:]}")
        loss: float = json.loads((run / "summary.json").read_text())["val"]["loss"]
    return loss


def bare_loop(config: ModelConfig, folder: Path, seed: int, options: Options) -> float:
    """Train for `size.tokens` and return the validation loss in nats per token."""
    size, device, optim = config.size, options.device, OptimConfig(lr=config.size.lr)
    manifest = Manifest.load(folder)
    steps = size.tokens // (size.batch_size * size.seq_len)
    micro = math.gcd(size.batch_size, max(1, 32768 // size.seq_len))
    windows = TokenWindows(folder, manifest, "train", size.seq_len)
    made = TrainBatches(
        windows, seed, steps, size.batch_size, micro, sequence_format=sequence_format(resolve(config), DataConfig())
    )
    model = kvfrontier(config, device, compiled=device.type == "cuda").model
    assert isinstance(model, LanguageModel)
    model.init_weights(seed)
    optimizer = build_optimizer(model, optim)
    scheduler = schedule(optimizer, optim, steps)
    for number, batch in enumerate(made, start=1):
        with autocast(device):
            targets_BT = model.predicted(batch["targets"].to(device))
            head = cross_entropy_sum(targets_BT, compiled=device.type == "cuda")
            loss = model(batch["inputs"].to(device), head=head)
        (loss / batch["step_targets"]).backward()
        if number % made.accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return evaluate(model, TokenWindows(folder, manifest, "val", size.seq_len), micro, device, made.sequence_format)


@torch.no_grad()
def evaluate(
    model: LanguageModel, windows: TokenWindows, micro: int, device: torch.device, form: SequenceFormat
) -> float:
    """Nats per token over the windows that train/pretrain.py validates on unless told otherwise."""
    chosen = EvalWindows.of(windows, DataConfig.val_tokens // windows.seq_len)
    total, targets = 0.0, 0
    for batch in EvalBatches(chosen, micro, sequence_format=form):
        with autocast(device):
            targets_BT = model.predicted(batch["targets"].to(device))
            loss = model(batch["inputs"].to(device), head=cross_entropy_sum(targets_BT))
        total, targets = total + loss.item(), targets + batch["step_targets"]
    return total / targets


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on CUDA and fp32 elsewhere, the precision that train/pretrain.py chooses by itself."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
