"""Part of the GPU suite: a short training study, a few layouts and seeds at size 20m.

Each run has the batches, module and trainer of train/pretrain.py. It is configured here because a GPU machine may have
Lightning without Hydra, OmegaConf and wandb.
"""

import functools
import math
from pathlib import Path
from typing import Any

from arch import ModelConfig, resolve
from arch.footprint import kv_bytes
from data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data.shards import Manifest
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.gpu_case import Case, Options, case_config
from train.benchmarks.timing import timed
from train.schema import OptimConfig, PretrainConfig

ARCHS = ("mha", "gqa4", "cla2", "mixattention", "block", "bct")
SEEDS = (0, 1)
TOKENS = 20_000_000


def study(options: Options) -> list[Case]:
    """All runs, seeds outermost, so that a study cut short still compares layouts."""
    seeds, archs = (SEEDS[:1], ARCHS[:1]) if options.toy else (SEEDS, ARCHS)
    return [
        Case(f"{arch}-20m-seed{seed}", 45, functools.partial(train, arch, seed, options), _line)
        for seed in seeds
        for arch in archs
    ]


def _line(result: dict[str, Any]) -> str:
    return f"loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tok/s over all"


def train(arch: str, seed: int, options: Options) -> dict[str, Any]:
    """Train one layout and validate it at the end."""
    folder = options.data or default_data(options.toy)
    config = case_config(arch, "20m", options)
    if options.toy:
        config.size.vocab_size, config.size.batch_size, config.size.tokens = Manifest.load(folder).vocab_size, 4, 960
    else:
        config.size.tokens = TOKENS
    trained = pretrain_config(config, folder, seed)
    loss, took = timed(lambda: validation_loss(trained, options.device.type), options.device)
    plan = resolve(config)
    return {
        "loss": loss,
        "ppl": math.exp(loss),
        "kv_bytes_stored": kv_bytes(plan, config.size.seq_len).stored,
        "tokens": config.size.tokens,
        "tokens_per_second": config.size.tokens / took,
    }


def pretrain_config(config: ModelConfig, folder: Path, seed: int) -> PretrainConfig:
    """The configuration that train/pretrain.py composes for the layout, size, seed and prepared data."""
    size = config.size
    return PretrainConfig(
        config.arch,
        size,
        DataConfig(path=str(folder)),
        OptimConfig(lr=size.lr),
        tokens=size.tokens,
        batch_size=size.batch_size,
        context=size.seq_len,
        seed=seed,
    )


def validation_loss(config: PretrainConfig, device: str) -> float:
    """Train on one device and return the validation loss in nats. Raises UnavailableError without Lightning."""
    try:
        from train.datamodule import TokenDataModule
        from train.lightning_trainer import lightning_trainer
        from train.lit_module import LitModel
    except ImportError as error:
        raise UnavailableError(f"models cannot be trained here: {error}") from error
    data = TokenDataModule(config)
    module = LitModel(config, data.token_bytes())
    trainer = lightning_trainer(config, device)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    return module.val_metrics["loss"]


def default_data(toy: bool = False) -> Path:
    """The standard library's source, in 8192 tokens that are learned from a part of it; for a toy, a hundredth of it.

    It takes about 20 seconds of one core; a folder that is there already is taken as it is. Raises UnavailableError if
    it cannot be tokenised here.
    """
    try:
        from data.prepare import prepare
    except ImportError as error:
        raise UnavailableError(f"text cannot be tokenised here ({error}); give prepared shards with data=") from error
    config = PrepareConfig(
        name="stdlib",
        source=SourceConfig(corpus="stdlib"),
        tokenizer=TokenizerConfig(vocab_size=512 if toy else 8192, sample_bytes=200_000 if toy else 4_000_000),
        max_tokens=500_000 if toy else None,
    )
    if not (config.folder / "manifest.json").exists():
        prepare(config)
    return config.folder
