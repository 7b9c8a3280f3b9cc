"""Training time of a run."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds of training over all starts of a run, counted between `resume` and `pause`.

    seconds      wall-clock time
    cpu_seconds  time of all threads of this process; the better measure on a CPU that does other work too

    Work queued on the device is counted only if the caller waits for it before `pause` or `read`.
    """

    def __init__(self) -> None:
        self.earlier = self.now = (0.0, 0.0)  # wall-clock and CPU seconds: of earlier starts of the run, of this one
        self._since: tuple[float, float] | None = None  # the times up to which they are counted

    @property
    def seconds(self) -> float:
        return self.earlier[0] + self.now[0]

    @property
    def cpu_seconds(self) -> float:
        return self.earlier[1] + self.now[1]

    def resume(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def read(self) -> float:
        """Bring all counts up to date and return the wall-clock seconds of this start."""
        if self._since is not None:
            wall, cpu = self._since
            self.resume()
            self.now = self.now[0] + self._since[0] - wall, self.now[1] + self._since[1] - cpu
        return self.now[0]

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

    def load(self, saved: Any) -> None:
        """Continue from the counts that a checkpoint has under `clock`.

        A count that is not a number stays NaN, for unknown: the checkpoint predates the clock, or was edited.
        """
        saved = saved if isinstance(saved, Mapping) else {}
        wall, cpu = (_count(saved.get(name)) for name in ("seconds", "cpu_seconds"))
        self.earlier = wall, cpu


def _count(value: Any) -> float:
    known = type(value) in (int, float) and 0 <= value < 1e15  # JSON has whole numbers that no float holds
    return float(value) if known else math.nan
