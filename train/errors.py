"""Errors of training. They are apart from the code that raises them, so that nobody imports torch to catch one."""

from data.cli import TaskError

DIVERGENCE_HINT = "lower optim.lr, or warm up longer"  # the end of every error about a loss or weights that diverge


class TrainingError(TaskError):
    """A run that cannot go on; the message says why and what is left of it."""
