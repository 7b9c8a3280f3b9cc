"""The Lightning trainer that runs a PretrainConfig. Needs no package of the command line or of the loggers."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from data.cli import UsageError
from train.device import free_memory
from train.estimates.capacity import choose_micro_batch, record_micro_batch, recorded_micro_batch
from train.schema import PretrainConfig, micro_batch, num_steps


class MicroBatchByMemory(L.Callback):
    """Choose, before anything is built, the largest micro-batch that fits into the GPU with the least free memory.

    Rank 0 chooses for all processes; a resumed run in `folder` keeps its micro-batch if that fits. Accumulation keeps
    the batch of a step as it is.
    """

    def __init__(self, config: PretrainConfig, folder: Path | None):
        self.config, self.folder = config, folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        free = torch.tensor(free_memory(device), dtype=torch.float64, device=device)
        least = float(trainer.strategy.reduce(free, reduce_op="min"))
        chosen = self.choose(least) if trainer.is_global_zero else None
        chosen = trainer.strategy.broadcast(chosen)
        if isinstance(chosen, str):
            raise UsageError(chosen)  # by all processes at once
        assert isinstance(chosen, int)
        before, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, self.accumulate(chosen)
        trainer.val_check_interval = trainer.val_check_interval // before * trainer.accumulate_grad_batches

    def choose(self, free: float) -> int | str:
        """Return the micro-batch, which is printed and recorded, or the reason why there is none."""
        recorded = None if self.folder is None else recorded_micro_batch(self.folder)
        try:
            chosen = choose_micro_batch(self.config, free, recorded)
        except UsageError as error:
            return str(error)
        print(chosen, flush=True)
        if self.folder is not None:
            record_micro_batch(self.folder, chosen.size)
        return chosen.size

    def accumulate(self, size: int) -> int:
        return self.config.batch_size // (size * self.config.trainer.devices * self.config.trainer.num_nodes)


def lightning_trainer(
    config: PretrainConfig,
    device: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[L.Callback] = (),
    folder: Path | None = None,
    progress: bool = False,
) -> L.Trainer:
    """A trainer for all steps of the run, kept in `folder`, on devices of type `device`.

    On CUDA the micro-batch is chosen by memory, when training begins. Weights and optimizer are fp32 in every case;
    LitModel computes in the precision of the configuration.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on dataloader workers, which we have none of
    options, steps = config.trainer, num_steps(config)
    world = options.devices * options.num_nodes
    accumulate = config.batch_size // (micro_batch(config) * world)
    by_memory = [MicroBatchByMemory(config, folder)] if device == "cuda" else []
    val_every = options.val_every or -(-steps // 4)
    sharded = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    strategies: dict[str, str | Strategy] = {
        "auto": "auto",
        # Not static_graph: with it torch fails, or reduces nothing, where gradients are accumulated (pytorch#143580).
        "ddp": DDPStrategy(gradient_as_bucket_view=True),
        "fsdp": sharded,
        "hsdp": sharded,  # LitModel divides the processes again
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
        callbacks=[*by_memory, *callbacks],
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
