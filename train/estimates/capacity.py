"""The largest micro-batch that the memory of a GPU holds by estimate, and what to change where it holds none."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arch import ModelConfig, Plan, resolve
from data.cli import UsageError
from data.files import write_json
from eval.runs import Run, RunError
from eval.units import bytes_text, times
from train.estimates.activations import Execution
from train.estimates.memory import step_memory
from train.schema import PretrainConfig, num_replicas

RESERVE = 4 * 2**30


def reserve_of(free: float) -> float:
    """Bytes of `free` left for NCCL, workspaces of kernels and gaps of the allocator: 4 GiB, of a small GPU a tenth."""
    return min(RESERVE, free / 10)


def execution(config: PretrainConfig) -> Execution:
    """Execution of a step of the run on CUDA."""
    trainer = config.trainer
    return Execution(
        strategy="fsdp" if trainer.strategy == "hsdp" else trainer.strategy,
        world=trainer.devices * trainer.num_nodes,
        replicas=num_replicas(trainer) if trainer.strategy == "hsdp" else 1,
        itemsize=4 if trainer.precision == "fp32" else 2,
        compiled=trainer.compile is not False,
        checkpointing=trainer.activation_checkpointing,
        documents=config.data.document_mask,
        pads=bool(config.data.block_padding),
        trained=trained_share(config),
    )


def trained_share(config: PretrainConfig) -> float:
    """Share of the parameters that `train_only` leaves trained."""
    if config.train_only is None:
        return 1.0
    from arch.convert import parameter_shapes  # brings torch

    elements = {name: shape.numel() for name, shape in parameter_shapes(config.model).items()}
    return sum(n for name, n in elements.items() if re.search(config.train_only, name)) / sum(elements.values())


def largest_micro_batch(
    model: ModelConfig, plan: Plan, how: Execution, per_rank_batch: int, available: float
) -> int | None:
    """The largest divisor of `per_rank_batch` that fits into `available` bytes; None if 1 does not."""
    for candidate in sorted((n for n in range(1, per_rank_batch + 1) if per_rank_batch % n == 0), reverse=True):
        if needed_bytes(model, plan, how, per_rank_batch, candidate) <= available:
            return candidate
    return None


def needed_bytes(model: ModelConfig, plan: Plan, how: Execution, per_rank_batch: int, micro_batch: int) -> int:
    """Peak of a step that accumulates `per_rank_batch` sequences; a validation in such micro-batches needs less."""
    return step_memory(model, plan, replace(how, accumulate=per_rank_batch // micro_batch), micro_batch).total


def remedies(config: PretrainConfig, plan: Plan, available: float) -> list[str]:
    """Changes, each of which alone makes the run fit; general advice if none does."""
    model, how = config.model, execution(config)
    per_rank_batch = config.batch_size // how.world
    found = []
    if config.trainer.micro_batch and (fits := largest_micro_batch(model, plan, how, per_rank_batch, available)):
        found.append(f"trainer.micro_batch={fits}")
    changes = {
        "trainer.activation_checkpointing=true": replace(how, checkpointing=True),
        "trainer.strategy=fsdp": replace(how, strategy="fsdp" if how.world > 1 else how.strategy, replicas=1),
    }
    for name, other in changes.items():
        if other != how and (fits := largest_micro_batch(model, plan, other, per_rank_batch, available)):
            found.append(f"{name} (trainer.micro_batch={fits})")
    worlds = [n for n in range(how.world + 1, config.batch_size + 1) if config.batch_size % n == 0]
    for world in worlds:
        more = replace(how, strategy="fsdp", world=world, replicas=1)
        if fits := largest_micro_batch(model, plan, more, config.batch_size // world, available):
            found.append(f"{world} GPUs with trainer.strategy=fsdp (trainer.micro_batch={fits})")
            break
    return found or ["trainer.activation_checkpointing=true on more GPUs, GPUs with more memory, or shorter sequences"]


def does_not_fit(needed: float, has: float, changes: list[str]) -> str:
    return f"does not fit, {bytes_text(needed)} of {bytes_text(has)}. What would: {'; '.join(changes)}"


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch of each process, chosen by memory.

    size      sequences per forward pass
    needed    estimated bytes, without the reserve
    free      free bytes
    before    micro-batch of the last start of the run; None: there was none
    explicit  set by trainer.micro_batch, whatever the estimate says
    """

    size: int
    per_rank_batch: int
    needed: float
    free: float
    before: int | None = None
    explicit: bool = False

    @property
    def accumulate(self) -> int:
        return self.per_rank_batch // self.size

    def __str__(self) -> str:
        gib, reserve, remarks = 2**30, reserve_of(self.free), ""
        if self.explicit and self.needed + reserve > self.free:
            remarks = "; it is set to more than fits: leave trainer.micro_batch out if memory does not last"
        elif self.before not in (None, self.size):
            remarks = f"; before, it was {self.before}: losses go on up to rounding"
        memory = f"{self.needed / gib:.3g} of {self.free / gib:.3g} GiB by estimate, {reserve / gib:.2g} in reserve"
        accumulated = f"accumulated {times(self.accumulate)}"
        return f"micro-batch {self.size} of {self.per_rank_batch} ({memory}), {accumulated}{remarks}"


def choose_micro_batch(config: PretrainConfig, free: float, before: int | None = None) -> MicroBatch:
    """The largest micro-batch for a GPU with `free` bytes; `before`, that of the run's last start, where it fits still,
    so that losses are those of the uninterrupted run bit for bit. One that was set is kept, whatever the estimate says.

    Raises UsageError, with what would fit, if not even a single sequence does.
    """
    model, how, available = config.model, execution(config), free - reserve_of(free)
    plan, per_rank_batch = resolve(model), config.batch_size // how.world

    def needed(size: int) -> int:
        return needed_bytes(model, plan, how, per_rank_batch, size)

    if config.trainer.micro_batch:
        return MicroBatch(
            config.trainer.micro_batch, per_rank_batch, needed(config.trainer.micro_batch), free, explicit=True
        )
    if before and per_rank_batch % before == 0 and needed(before) <= available:
        return MicroBatch(before, per_rank_batch, needed(before), free, before)
    size = largest_micro_batch(model, plan, how, per_rank_batch, available)
    if size is None:
        found = does_not_fit(needed(1) + reserve_of(free), free, remedies(config, plan, available))
        raise UsageError(f"the run {found}; or, against the estimate, trainer.micro_batch=1")
    return MicroBatch(size, per_rank_batch, needed(size), free, before)


def recorded_micro_batch(run: Path) -> int | None:
    """The micro-batch that the last start of a run chose; None if none did, or run.json cannot be read."""
    starts = _starts(run)
    return next(
        (size for start in reversed(starts) if type(size := start.get("micro_batch")) is int and size > 0), None
    )


def record_micro_batch(run: Path, size: int) -> None:
    """Enter the micro-batch of this start, the last one, into the run.json that it has written."""
    starts = _starts(run)
    if starts:
        write_json(run / "run.json", [*starts[:-1], {**starts[-1], "micro_batch": size}])


def _starts(run: Path) -> list[dict[str, Any]]:
    try:
        return [start for start in Run(run).starts if isinstance(start, dict)]
    except RunError:
        return []
