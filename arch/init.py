"""Weights before training."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .layers import LayerNorm, RMSNorm


class OwnInit(nn.Module, ABC):
    """A module whose own parameters start neither from N(0, std) nor from constants."""

    @abstractmethod
    def draw(self, name: str, full: Tensor, generator: torch.Generator) -> None:
        """Fill in `full`, zeros of the shape of the parameter `name`, from `generator`."""


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int, own: Mapping[str, float] | None = None) -> None:
    """Linear and embedding weights from N(0, std), norms 1, those of an OwnInit as it says, all else 0. `own`: weights,
    by name, of another std.

    Each parameter draws from its own generator, seeded by its name, so that the result depends neither on sharding nor
    on the other parameters: two layouts start with equal weights wherever they share a name.
    """
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        full = torch.zeros(parameter.shape, device="cpu")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if isinstance(module, OwnInit):
            module.draw(kind, full, generator)
        elif kind == "weight" and isinstance(module, nn.Linear | nn.Embedding):
            full.normal_(0.0, (own or {}).get(name, std), generator=generator)
        elif kind == "weight" and isinstance(module, RMSNorm | LayerNorm):
            full.fill_(1.0)
        if isinstance(parameter, DTensor):
            full = full.to(parameter.device)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None))
        else:
            parameter.copy_(full)
