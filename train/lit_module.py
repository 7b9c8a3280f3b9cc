"""One LightningModule for every architecture."""

import math
import re
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from arch import LanguageModel, build
from arch.config import to_dict
from data.batches import IGNORE, Batch
from eval.identity import Identity
from train.clock import Clock
from train.errors import DIVERGENCE_HINT, TrainingError
from train.fp8 import convert_to_fp8
from train.loss import cross_entropy_sum
from train.optim import build_optimizer, schedule
from train.parallel import hybrid_mesh, parallelize
from train.processes import local_shard
from train.schema import PretrainConfig, num_replicas, num_steps


class LossWatch:
    """The lowest loss so far, and whether the last one has `risen` above it by more than `max_rise` nats."""

    def __init__(self, max_rise: float):
        self.max_rise, self.lowest, self.risen = max_rise, math.inf, False

    def see(self, loss: float, step: int) -> None:
        """Take the loss of a report. Raises TrainingError if it is not finite, or has risen twice in a row."""
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}: {DIVERGENCE_HINT}")
        rising = loss > self.lowest + self.max_rise
        if rising and self.risen:
            values = f"{loss:.3f} at step {step} after {self.lowest:.3f}"
            raise TrainingError(f"the loss exploded, {values}: {DIVERGENCE_HINT}")
        self.lowest, self.risen = min(loss, self.lowest), rising


class LitModel(L.LightningModule):
    """Train a model on next-token prediction.

    token_bytes  [V] UTF-8 bytes of each token, for bits per byte
    identity     of the run, for its checkpoints
    """

    model: LanguageModel  # from `configure_model` on
    token_bytes: Tensor
    val_sums: Tensor  # nats, targets and bytes of this validation so far

    def __init__(self, config: PretrainConfig, token_bytes: Tensor, identity: Identity | None = None):
        super().__init__()
        self.config, self.identity = config, identity
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.val_metrics: dict[str, float] = {}  # of the last validation
        self.clock, self.loss_watch = Clock(), LossWatch(config.trainer.max_rise)
        self.progress_metrics: dict[str, float] = {}  # for the progress bar; `log(prog_bar=True)` waits at every step
        self.register_buffer("val_sums", torch.zeros(3, dtype=torch.float64), persistent=False)

    def configure_model(self) -> None:
        """Build on the meta device, shard, then initialise: no process ever holds more than its shard."""
        if hasattr(self, "model"):
            return
        trainer = self.config.trainer
        device = self.trainer.strategy.root_device
        mesh = None
        if trainer.strategy == "fsdp":
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
        elif trainer.strategy == "hsdp":
            mesh = hybrid_mesh(device.type, num_replicas(trainer))
        with torch.device("meta"):
            self.model = build(self.config.model, device_type=device.type, backend=trainer.backend)
        if trainer.precision == "fp8":
            convert_to_fp8(self.model)
        parallelize(
            self.model,
            activation_checkpointing=trainer.activation_checkpointing,
            compile_blocks=self.compiled,
            mesh=mesh,
            dtype=self.compute_dtype,
        )
        self.model.to_empty(device=device)
        self.model.init_weights(self.config.seed)
        if self.config.train_only is not None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(re.search(self.config.train_only, name) is not None)

    @property
    def compiled(self) -> bool:
        setting = self.config.trainer.compile
        return self.trainer.strategy.root_device.type == "cuda" if setting is None else setting

    @property
    def compute_dtype(self) -> torch.dtype:
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        precision = self.config.trainer.precision
        return torch.bfloat16 if precision in ("bf16", "fp8") or (precision == "auto" and on_cuda) else torch.float32

    def forward(self, batch: Batch) -> Tensor:
        """Sum the loss in nats over the real targets (not IGNORE) of a micro-batch; a scalar.

        The head runs inside the model's forward: only there does FSDP2 gather the output matrix.
        """
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            positions = self.config.batch_size * self.config.size.seq_len if self.training else batch["inputs"].numel()
            few = 2 * batch["step_targets"] < positions
            head = cross_entropy_sum(self.model.select_targets(batch["targets"]), self.compiled, few)
            loss: Tensor = self.model(batch["inputs"], head=head, segment_ids_BT=batch["segment_ids_BT"])
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Scale the summed loss to its part of the mean over all real targets of the optimizer step.

        Lightning divides by the micro-batches of the step and averages over processes; the factor undoes both.
        """
        loss: Tensor = self(batch)
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["step_targets"])

    def on_train_start(self) -> None:
        """Set the learning rate of the step, also when a run is resumed with another schedule."""
        scheduler, optimizer = self.lr_schedulers(), self.optimizers(use_pl_optimizer=False)
        assert isinstance(scheduler, LambdaLR) and isinstance(optimizer, Optimizer)
        scheduler.last_epoch = self.trainer.global_step
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reduce sharded gradients once per step, not once per micro-batch."""
        if isinstance(self.model, FSDPModule):
            last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
            self.model.set_requires_gradient_sync(last)

    def on_validation_epoch_start(self) -> None:
        self.val_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        targets_BT = batch["targets"]
        real = targets_BT != IGNORE
        text_bytes = (self.token_bytes[targets_BT.clamp(min=0)] * real).sum()
        self.val_sums += torch.stack([self(batch).double(), real.sum().double(), text_bytes.double()])

    def on_validation_epoch_end(self) -> None:
        """Log loss in nats per token, perplexity, and bits per UTF-8 byte, over all processes."""
        sums = self.trainer.strategy.reduce(self.val_sums, reduce_op="sum")
        nats, tokens, text_bytes = sums.tolist()
        loss = nats / tokens
        self.val_metrics = {
            "loss": loss,
            "ppl": torch.tensor(loss).exp().item(),
            "bpb": nats / math.log(2) / text_bytes,
        }
        for logger in self.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in self.val_metrics.items()}, step=self.trainer.global_step)
        self.progress_metrics["val/ppl"] = self.val_metrics["ppl"]

    def check_finite(self) -> None:
        """Raise TrainingError if a weight of any process is not finite."""
        broken = torch.stack([(~local_shard(p).isfinite()).any() for p in self.parameters()]).sum()
        if self.trainer.strategy.reduce(broken.float(), reduce_op="sum").item():
            raise TrainingError(f"weights are not finite after step {self.trainer.global_step}: {DIVERGENCE_HINT}")

    def describe(self) -> dict[str, Any]:
        """Configuration and plan of the model, and what the run is tied to, as plain data."""
        tied = {} if self.identity is None else {"identity": self.identity.to_dict()}
        return {"config": to_dict(self.config.model), "plan": self.model.plan.to_dict(), **tied}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.config.optim)
        scheduler = schedule(optimizer, self.config.optim, num_steps(self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lit_model(module: L.LightningModule) -> LitModel:
    """Narrow the type of the module that Lightning passes to callbacks."""
    assert isinstance(module, LitModel)
    return module
