"""Training time of a run."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds of training over all starts of a run, counted between `resume` and `pause`.

    seconds      wall-clock time
    cpu_seconds  time of all threads of this process; the better measure on a CPU that does other work too

    Work queued on the device is counted only if the caller waits for it before `pause` or `read`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None  # wall-clock and CPU time up to which both are counted

    def resume(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def read(self) -> float:
        """Bring both counts up to date and return `seconds`."""
        if self._since is not None:
            wall, cpu = self._since
            self.resume()
            self.seconds += self._since[0] - wall
            self.cpu_seconds += self._since[1] - cpu
        return self.seconds

    def pause(self) -> None:
        self.read()
        self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block; a clock that was paused before stays paused."""
        running = self._since is not None
        self.pause()
        yield
        if running:
            self.resume()

    def to_dict(self) -> dict[str, float]:
        """The counts for a checkpoint; `load` reads them."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load(self, saved: Mapping[str, float] | None) -> None:
        """Continue from the counts of a checkpoint.

        If the checkpoint predates the clock (None), training time is unknown and stays NaN.
        """
        saved = saved or {"seconds": math.nan, "cpu_seconds": math.nan}
        self.seconds, self.cpu_seconds = saved["seconds"], saved["cpu_seconds"]
