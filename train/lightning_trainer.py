"""The Lightning trainer that runs a PretrainConfig. Needs no package of the command line or of the loggers."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from train.schema import PretrainConfig, micro_batch, num_steps


def lightning_trainer(
    config: PretrainConfig,
    device: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[L.Callback] = (),
    folder: Path | None = None,
    progress: bool = False,
) -> L.Trainer:
    """A trainer for all steps of the run on devices of type `device`.

    Weights and optimizer are fp32 in every case; LitModel computes in the precision of the configuration.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on dataloader workers, which we have none of
    options, steps = config.trainer, num_steps(config)
    world = options.devices * options.num_nodes
    accumulate = config.batch_size // (micro_batch(config) * world)
    val_every = options.val_every or -(-steps // 4)
    strategies: dict[str, str | Strategy] = {
        "auto": "auto",
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    }
    return L.Trainer(
        accelerator=device,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=strategies[options.strategy],
        precision="32-true",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config.optim.clip,
        val_check_interval=min(val_every, steps) * accumulate,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=list(loggers),
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
