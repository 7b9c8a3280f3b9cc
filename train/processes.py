"""What the processes of a run tell each other; alone, a process is rank 0 of one."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def gather(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each process has, in the order of ranks."""
    parts = [mine] * world_size()
    if distributed():
        dist.all_gather_object(parts, mine, group=group)
    return parts


def on_rank_0(task: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Run `task` on rank 0 while the others wait. Raises its OSError on all of them."""
    failed: list[OSError | None] = [None]
    if rank() == 0:
        try:
            task()
        except OSError as error:
            failed = [error]
    if distributed():
        dist.broadcast_object_list(failed, group=group)
    if failed[0] is not None:
        raise failed[0]


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
