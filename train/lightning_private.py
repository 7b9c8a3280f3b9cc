"""Everything that relies on parts of Lightning which no promise covers. pyproject.toml bounds its version.

Each was read in Lightning 2.6.6; with another version, read it again.
"""

from subprocess import Popen

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


def disable_signal_handling(trainer: L.Trainer) -> None:
    """Leave signals to this project's handlers.

    Lightning's broadcast inside the handler, which hangs where a process other than the first is hit, and its loop
    waits for the device in every micro-batch to agree on SIGTERM. Read in trainer/connectors/signal_connector.py and
    loops/training_epoch_loop.py.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def launched_processes(trainer: L.Trainer) -> list[Popen[bytes]]:
    """The processes that Lightning has started beside this one: the list that it watches.

    Read in fabric/strategies/launchers/subprocess_script.py and its namesake under pytorch.
    """
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def set_loop_step(trainer: L.Trainer, step: int) -> None:
    """Set the counters of the training loop as they are after `step` optimizer steps of today's micro-batches.

    A validation that is due after this step comes first: the run may have been stopped before its end. Lightning
    restores its loops only from its own checkpoints; their layout was read in loops/fit_loop.py,
    loops/training_epoch_loop.py and loops/progress.py.
    """
    loop = trainer.fit_loop
    state = loop.state_dict()
    batches = state["epoch_loop.batch_progress"]
    for counts in (batches["current"], batches["total"]):
        counts |= dict.fromkeys(counts, step * trainer.accumulate_grad_batches)
    steps = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for counts in (steps["current"], steps["total"]):
        counts |= dict.fromkeys(counts, step)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    state["epoch_loop.val_loop.batch_progress"]["total"] |= started
    state["epoch_progress"]["current"] |= started
    loop.load_state_dict(state)


class TrainingProgressBar(RichProgressBar):
    """Lightning's bar without the number of the epoch: there is one. Read in callbacks/progress/rich_progress.py."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
