"""Signals of a run: SIGTERM, SIGUSR1 and Ctrl-C."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from types import FrameType

from data.cli import word

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds after a signal in which processes that wait for each other may still begin to train, or clean up.
PATIENCE = 5.0


class RunStopped(SystemExit):
    """A run that stopped on request. It has saved its state, unless it had not begun or was interrupted twice."""

    def __init__(self, reason: str, code: int):
        super().__init__(code)
        self.reason = reason


class Signals:
    """Replace the handlers of SIGNALS until `restore`.

    While a run trains, a signal is kept in `received`, for the loop to look at. A second Ctrl-C, or one while nothing
    trains, raises RunStopped at once. Code that waits for `peers` is interrupted by no handler: there the process ends
    a second after such a Ctrl-C, and PATIENCE after any signal if training has not begun.

    training  set by the loop
    children  returns the processes that this one has started; they end with it if that is before training
    """

    def __init__(self, folder: Path, peers: bool, rank: int):
        self.received = self.handled = 0  # the last signal; how many there were
        self.training = self.begun = False
        self.folder, self.rank = folder, rank
        self.children: Callable[[], list[Popen[bytes]]] = list
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self._pipe: Sequence[int] = ()
        if peers:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)  # written to even where no handler can run
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()

    def start_training(self) -> None:
        """Note that training begins: from now on the loop looks at `received`."""
        self.training = self.begun = True

    def restore(self) -> None:
        """Put the previous handlers back. A process that ends before training takes its children with it."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pipe:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # ends the watch
            self._pipe = ()
        if not self.begun:
            self._end_children()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received == number, number
        self.handled += 1
        if number == signal.SIGINT and (again or not self.training):
            raise RunStopped("interrupted", 130 if self.rank == 0 else 0)

    def _watch(self, reader: int) -> None:
        signals = interrupts = 0
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                signals += 1
                interrupts += number[0] == signal.SIGINT
                time.sleep(1)
                if number[0] != signal.SIGINT or self.handled >= signals or self.rank:
                    # No other rank may end with an error before the first has ended: Lightning would kill that one.
                    time.sleep(PATIENCE if self.rank == 0 else 2 * PATIENCE)
                if self._pipe and (interrupts > 1 or not self.begun):
                    self._end_process(number[0])

    def _end_process(self, number: int) -> None:
        if self.rank == 0:
            when = "without a checkpoint of its last steps" if self.begun else "before training began"
            name = signal.Signals(number).name
            print(f"stopped {when} ({name}); {word('resume', self.folder)} continues", file=sys.stderr, flush=True)
        self._end_children()
        code = 130 if number == signal.SIGINT else 0
        os._exit(code if self.rank == 0 else 128 + number)

    def _end_children(self) -> None:
        processes = self.children()
        for process in processes:
            process.kill()
        processes.clear()  # Lightning watches this list, and would take the end of one for a failure
