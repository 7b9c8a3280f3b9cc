"""AdamW and the learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .schema import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW. Matrices and embeddings decay; norms, biases and sinks (one axis) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: lr_share(step, steps, config))


def lr_share(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at `step` of 0 .. steps - 1: linear warm-up, then cosine to `min_lr`.

    The last step is the one that runs at `min_lr`.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return config.min_lr + (1 - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
