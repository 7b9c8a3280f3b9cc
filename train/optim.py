"""AdamW, Muon with AdamW, and the learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from arch.delta import ShortConv
from arch.strided import Pool
from train.schema import OptimConfig


class MuonAdamW(Optimizer):
    """Muon on the groups marked `muon`, fused AdamW on the others, as one optimizer: Lightning's loop takes only one.

    Both work on this object's groups and state, so schedules, clipping and checkpoints treat it as any optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.muon = Muon([group for group in groups if group["muon"]])
        self.adamw = AdamW([group for group in groups if not group["muon"]], fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts: tuple[tuple[Optimizer, bool], ...] = ((self.muon, True), (self.adamw, False))
        for part, muon in parts:
            # Handed over at every step, because loading a checkpoint replaces both.
            part.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            part.state = self.state
            if muon:
                self._take_replica(part)
            part.step()
        return loss

    def _take_replica(self, muon: Optimizer) -> None:
        """Under HSDP give `muon` the parameters, gradients and state of this replica alone, in the same memory.

        It multiplies sharded matrices. On the whole mesh torch would divide these products among the replicas too, and
        wait for the slow links between them in every one.
        """
        (group,) = muon.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        if not any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in params):
            return
        state = {}
        for p in params:
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
            own = _within_replica(p.detach())
            own.grad = _within_replica(p.grad)
            state[own] = {"momentum_buffer": _within_replica(momentum)}
        muon.param_groups, muon.state = [group | {"params": list(state)}], state  # type: ignore[assignment]


def _within_replica(tensor: DTensor) -> Tensor:
    """Return the same shard as one of a tensor of the last dimension of its mesh."""
    mesh, (*_, placement) = tensor.device_mesh, tensor.placements
    assert mesh.mesh_dim_names is not None
    within = mesh[mesh.mesh_dim_names[-1]]
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(tensor.to_local(), within, (placement,), run_check=False, shape=shape, stride=stride)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of `config` for the trained parameters of `model`.

    Matrices, embeddings, short convolutions and biases of places in a pool decay; norms, biases, sinks and decays of
    states (one axis) do not. Muon takes the hidden matrices: not the embedding, not the output matrix (Jordan et al.
    2024, "Muon: an optimizer for hidden layers"), and neither a convolution nor those biases, which are no factors of a
    product.
    """
    outer = {
        parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | ShortConv | Pool) or name.rpartition(".")[2] == "lm_head"
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    if config.name == "adamw":
        members = [matrices, vectors]
    else:
        members = [[p for p in matrices if p not in outer], [p for p in matrices if p in outer], vectors]
    groups = [{"params": params} | options for params, options in zip(members, group_options(config), strict=True)]
    return AdamW(groups, fused=True) if config.name == "adamw" else MuonAdamW(groups)


def group_options(config: OptimConfig) -> list[dict[str, Any]]:
    """Return the options of each parameter group, in the order of `build_optimizer`.

    One learning rate serves both optimizers: Muon's updates are scaled by 0.2 sqrt(max(rows, columns)) to the root mean
    square that AdamW's have (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
    """
    adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    groups = [adamw | {"weight_decay": config.weight_decay}, adamw | {"weight_decay": 0.0}]
    if config.name == "adamw":
        return groups
    muon = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    return [muon | {"muon": True, "adjust_lr_fn": "match_rms_adamw"}, *(group | {"muon": False} for group in groups)]


def schedule(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Build the scheduler that multiplies the learning rate of each group by `lr_share`."""
    return LambdaLR(optimizer, lambda step: lr_share(step, steps, config))


def lr_share(step: int, steps: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at `step` of 0 .. steps - 1: a linear warm-up, then `config.schedule`.

    cosine    from the peak, at the first step after the warm-up, to `min_lr`, at the last one
    constant  the peak
    wsd       the peak until the last `decay` share of the steps, which falls as 1 - sqrt(progress) and reaches `min_lr`
              at the last step (Haegele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training
              durations", section 3: better than a linear fall)
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    falling = min(round(config.decay * steps), steps - warmup) if config.schedule == "wsd" else 0
    since = step - (steps - falling) + 1
    if since <= 0 or falling == 0:
        return 1.0
    return config.min_lr + (1 - config.min_lr) * (1 - math.sqrt(min(1.0, since / falling)))
