"""The watch over workers: a thread of main that kills them all when one is gone or when their time is over.

A collective waits in C++ for its peers, and gloo has no call that aborts it. What ends the waiting of every process is
that connections close: so any failure has one answer, and main never waits for what will not come.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from select import POLLHUP, POLLIN, poll

from graphopt.schemes.workers.worker import Worker

GRACE = 0.25
"""Seconds from the first death to the end of all: who died of the same cause is then known."""

_TICK = 1.0


class Watch:
    """Watches workers from `start` to `stop`. ``late``: they were killed because their time was over."""

    def __init__(self, workers: Sequence[Worker]):
        self.late = False
        self.seconds = 0.0
        self.broken = threading.Event()
        self._workers = workers
        self._deadline: float | None = None
        self._lost = 0.0  # seconds in which this process was stopped: they are nobody's fault
        self._wake = os.pipe()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch over workers")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Twice is once."""
        if self._stopped:
            return
        self._stopped = True
        os.write(self._wake[1], b"x")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for end in self._wake:
            os.close(end)

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """The workers have this long for what they are asked inside. Time in which this process is stopped (Ctrl-Z, a
        sleeping machine) does not count."""
        self.seconds = seconds
        self._deadline = time.monotonic() - self._lost + seconds
        try:
            yield
        finally:
            self._deadline = None

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.kill()
        self.broken.set()

    def _run(self) -> None:
        signs = poll()
        signs.register(self._wake[0], POLLIN)
        for worker in self._workers:
            signs.register(worker.channel.socket.fileno(), POLLHUP)
        last = time.monotonic()
        while True:
            # A step that may take long is looked at once a second, one that must not more often.
            tick = _TICK if self._deadline is None else min(_TICK, self.seconds / 4)
            happened = [file for file, _ in signs.poll(tick * 1000)]
            if self._wake[0] in happened:
                return
            now = time.monotonic()
            if now - last > 2 * _TICK + tick:
                self._lost += now - last - tick
            last = now
            deadline = self._deadline
            self.late = not happened and deadline is not None and now - self._lost > deadline
            if happened:
                time.sleep(GRACE)
            if happened or self.late:
                self.kill()
                return
