"""One LightningModule for every architecture."""

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from arch import LanguageModel, ModelConfig, build
from arch.config import to_dict
from data.batches import IGNORE, Batch, besides
from train import checkpoint
from train.checkpoint import TrainingError
from train.clock import Clock
from train.loss import cross_entropy_sum
from train.optim import build_optimizer, schedule
from train.parallel import parallelize
from train.schema import PretrainConfig, num_steps

# What to try against a loss or weights that went astray.
LESS = "lower optim.lr, or warm up longer"


class LitModel(L.LightningModule):
    """Trains a model on next-token prediction.

    token_bytes  [V] UTF-8 bytes of each token, for bits per byte
    """

    def __init__(self, config: PretrainConfig, token_bytes: Tensor):
        super().__init__()
        self.config = config
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.model: LanguageModel | None = None
        self.last_val: dict[str, float] = {}
        self.clock = Clock()
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
            self.model = build(ModelConfig(self.config.arch, self.config.size), trainer.backend, device.type)
        parallelize(
            self.model,
            activation_checkpointing=trainer.activation_checkpointing,
            compile_blocks=self.compiled,
            mesh=mesh,
            dtype=self.compute_dtype,
        )
        self.model.to_empty(device=device)
        self.model.init_weights(self.config.seed)
        if self.config.init is not None and not checkpoint.checkpoints(Path(self.config.folder)):
            checkpoint.load(checkpoint.resolve(Path(self.config.init)), self.model)
        if self.config.train_only is not None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(re.search(self.config.train_only, name) is not None)

    @property
    def compiled(self) -> bool:
        asked = self.config.trainer.compile
        return self.trainer.strategy.root_device.type == "cuda" if asked is None else asked

    @property
    def compute_dtype(self) -> torch.dtype:
        on_cuda = self.trainer.strategy.root_device.type == "cuda"
        precision = self.config.trainer.precision
        return torch.bfloat16 if precision == "bf16" or (precision == "auto" and on_cuda) else torch.float32

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss in nats over the real targets of a micro-batch."""
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            head = cross_entropy_sum(self.model.predicted(batch["targets"]), self.compiled)
            return self.model(batch["inputs"], head=head, **besides(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the real targets of the whole optimizer step.

        Lightning divides by the micro-batches of the step and averages over processes, which the factor undoes.
        """
        return self(batch) * (self.trainer.accumulate_grad_batches * self.trainer.world_size / batch["step_targets"])

    def on_train_start(self) -> None:
        """The learning rate is that of the step, also where a run is resumed with other settings."""
        scheduler = self.lr_schedulers()
        scheduler.last_epoch = self.trainer.global_step
        for group, base, share in zip(
            self.optimizers(use_pl_optimizer=False).param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * share(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sharded gradients are reduced once per step, not once per micro-batch."""
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
        """Loss in nats per token, perplexity, and bits per UTF-8 byte, over all processes."""
        sums = self.trainer.strategy.reduce(self.val_sums, reduce_op="sum")
        nats, tokens, text_bytes = sums.tolist()
        loss = nats / tokens
        self.last_val = {"loss": loss, "ppl": torch.tensor(loss).exp().item(), "bpb": nats / math.log(2) / text_bytes}
        for logger in self.loggers:
            logger.log_metrics({f"val/{k}": v for k, v in self.last_val.items()}, step=self.trainer.global_step)
        self.shown["val/ppl"] = self.last_val["ppl"]

    def check_finite(self) -> None:
        """Raises TrainingError if a weight of any process is not finite."""
        broken = torch.stack([(~local(p).isfinite()).any() for p in self.parameters()]).sum()
        if self.trainer.strategy.reduce(broken.float(), reduce_op="sum").item():
            raise TrainingError(f"weights are not finite after step {self.trainer.global_step}: {LESS}")

    def describe(self) -> dict[str, Any]:
        """What the weights belong to, as plain data: the authored configuration and the resolved plan."""
        config = ModelConfig(self.config.arch, self.config.size)
        return {"config": to_dict(config), "plan": self.model.plan.to_dict()}

    def go_on_after(self, step: int) -> None:
        """Set the loop's counters as they are after `step` steps, in as many micro-batches as a step has now.

        Where a validation is due after this step, it comes first: the run may have been stopped before its end.
        """
        loop = self.trainer.fit_loop
        state = loop.state_dict()
        progress = state["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts |= dict.fromkeys(counts, step * self.trainer.accumulate_grad_batches)
        steps = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counts in (steps["current"], steps["total"]):
            counts |= dict.fromkeys(counts, step)
        state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        state["epoch_loop.val_loop.batch_progress"]["total"] |= begun
        state["epoch_progress"]["current"] |= begun
        loop.load_state_dict(state)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.config.optim)
        scheduler = schedule(optimizer, self.config.optim, num_steps(self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def local(parameter: Tensor) -> Tensor:
    """This process' share of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
