"""How long a run has trained."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds of training, over all starts of a run: what passed between `go_on` and `pause`.

    seconds      of the wall
    cpu_seconds  of all threads of this process; on a CPU that does other work too they tell more

    Work that is queued on the device counts where the caller has waited for it before `pause` or `read`.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def go_on(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def read(self) -> float:
        """`seconds`, up to now as `cpu_seconds` is too."""
        if self._since is not None:
            before, worked = self._since
            self.go_on()
            self.seconds += self._since[0] - before
            self.cpu_seconds += self._since[1] - worked
        return self.seconds

    def pause(self) -> None:
        self.read()
        self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done inside; a clock that stood before stands after it."""
        ran = self._since is not None
        self.pause()
        yield
        if ran:
            self.go_on()

    def to_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; `load` goes on from it."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load(self, saved: Mapping[str, float] | None) -> None:
        """Where nothing was saved, by a version before this clock, the time is not known: NaN from here on."""
        saved = saved or {"seconds": math.nan, "cpu_seconds": math.nan}
        self.seconds, self.cpu_seconds = saved["seconds"], saved["cpu_seconds"]
