"""One LightningModule for every architecture."""

import math
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from arch import Decoder, ModelConfig
from data.batches import IGNORE, Batch

from .loss import cross_entropy_sum
from .optim import adamw, schedule
from .parallel import parallelize
from .schema import PretrainConfig, num_steps


class TrainingError(RuntimeError):
    """A run that must not go on; the message says why."""


class LitDecoder(L.LightningModule):
    """Trains a Decoder on next-token prediction.

    token_bytes  [V] UTF-8 bytes of each token, for bits per byte
    """

    def __init__(self, config: PretrainConfig, token_bytes: Tensor):
        super().__init__()
        self.config = config
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.model: Decoder | None = None
        self.last_val: dict[str, float] = {}
        self.shown: dict[str, float] = {}  # beside the progress bar; `log(prog_bar=True)` would wait at every step
        self.register_buffer("val_sums", torch.zeros(3, dtype=torch.float64), persistent=False)

    def configure_model(self) -> None:
        """Build on the meta device, shard, then initialise: no process ever holds more than its share."""
        if self.model is not None:
            return
        trainer = self.config.trainer
        device = self.trainer.strategy.root_device
        mesh = self.device_mesh["data_parallel"] if trainer.strategy == "fsdp" else None
        with torch.device("meta"):
            self.model = Decoder(ModelConfig(self.config.arch, self.config.size), trainer.backend, device.type)
        parallelize(
            self.model,
            activation_checkpointing=trainer.activation_checkpointing,
            compile_blocks=device.type == "cuda" if trainer.compile is None else trainer.compile,
            mesh=mesh,
            dtype=self.compute_dtype,
        )
        self.model.to_empty(device=device)
        self.model.init_weights(self.config.seed)

    @property
    def compute_dtype(self) -> torch.dtype:
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        precision = self.config.trainer.precision
        return torch.bfloat16 if precision == "bf16" or (precision == "auto" and on_cuda) else torch.float32

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats over the real targets of a micro-batch."""
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.model(batch["inputs"], head=cross_entropy_sum(batch["targets"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the real targets of the whole optimizer step.

        Lightning divides by the micro-batches of the step and averages over processes, which the factor undoes.
        """
        return self(batch) * (self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["step_targets"])

    def on_train_start(self) -> None:
        """Optimizer settings are those of the configuration, also where a resumed run changed them."""
        config = self.config.optim
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        scheduler.base_lrs = [config.lr for _ in scheduler.base_lrs]
        share = scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group |= {"lr": config.lr * share, "betas": (config.beta1, config.beta2), "eps": config.eps}
            group["weight_decay"] = decay

    def on_validation_epoch_start(self) -> None:
        self.val_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        targets_BT = batch["targets"]
        real = targets_BT != IGNORE
        text_bytes = self.token_bytes[targets_BT.clamp(min=0)][real].sum()
        self.val_sums += torch.stack([self(batch).double(), real.sum().double(), text_bytes.double()])

    def on_validation_epoch_end(self) -> None:
        """Loss in nats per token, perplexity, and bits per UTF-8 byte, over all processes."""
        sums = self.trainer.strategy.reduce(self.val_sums, reduce_op="sum")
        nats, tokens, text_bytes = sums.tolist()
        loss = nats / tokens
        self.last_val = {"loss": loss, "ppl": torch.tensor(loss).exp().item(), "bpb": nats / math.log(2) / text_bytes}
        for logger in self.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in self.last_val.items()}, step=self.trainer.global_step)
        self.log("val/loss", loss, logger=False)  # for the best checkpoint
        self.shown["val/ppl"] = self.last_val["ppl"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights belong to, as plain data: the authored configuration and the resolved plan.

        Raises TrainingError, and keeps the checkpoint before, if a weight is not finite.
        """
        broken = torch.stack([(~local(p).isfinite()).any() for p in self.parameters()]).sum()
        if self.trainer.strategy.reduce(broken.float(), reduce_op="sum").item():
            raise TrainingError(f"weights are not finite after step {self.trainer.global_step}")
        config = ModelConfig(self.config.arch, self.config.size)
        checkpoint["model"] = {"format": 1, "config": asdict(config), "plan": self.model.plan.to_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on after the last whole step, in as many micro-batches per step as there are now, also after the end."""
        loop = checkpoint["loops"]["fit_loop"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = loop["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts |= dict.fromkeys(counts, done)
        progress["is_last_batch"] = False
        loop["epoch_progress"]["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        checkpoint["epoch"] = 0

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = adamw(self.model, self.config.optim)
        scheduler = schedule(optimizer, self.config.optim, num_steps(self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def local(parameter: Tensor) -> Tensor:
    """This process' share of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
