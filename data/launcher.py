"""What a launcher has told this process, in variables of its environment, which are read here alone.

torchrun and Lightning, srun of SLURM, jsrun of LSF: the first that is set counts, in the order in which Lightning reads
them. NODE_RANK is the machine's number where each machine was started by hand; Lightning starts the others there.
"""

import os

RANK = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
RANK_ON_MACHINE = ("LOCAL_RANK", "SLURM_LOCALID", "JSM_NAMESPACE_LOCAL_RANK")
PROCESSES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "JSM_NAMESPACE_SIZE")
MACHINE = "NODE_RANK"


def launched_rank() -> int:
    """Rank of this process; 0 without a launcher.

    Where each machine was started by hand, it is the rank within the machine, or if that is the first, the machine's.
    """
    return _first(RANK, 0) or (_first((MACHINE,), 0) if "RANK" not in os.environ else 0)


def first_on_machine() -> bool:
    """Tell whether this is the first process of the run on its machine."""
    return _first(RANK_ON_MACHINE, 0) == 0


def launched() -> bool:
    """Tell whether others than this process start the other processes of the run; if not, Lightning does here."""
    return any(name in os.environ for name in (*RANK, MACHINE))


def num_launched() -> int:
    """Number of processes that a launcher has started; 1 without one."""
    return _first(PROCESSES, 1)


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _first(names: tuple[str, ...], default: int) -> int:
    return int(next((os.environ[name] for name in names if name in os.environ), default))
