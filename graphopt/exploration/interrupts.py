"""Ctrl-C in a search: once lets the trials that run end, twice ends at once. Both leave a study that can be resumed."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from graphopt.exploration.master import Master

__all__ = ["Interrupts"]


class Interrupts:
    """While entered, the first SIGINT asks ``master`` to stop; the second one raises KeyboardInterrupt. Signals reach
    Python in the main thread only: in another one this does nothing."""

    def __init__(self, master: Master):
        self._master = master
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not None:  # None: set by C code, which cannot be put back
                signal.signal(signal.SIGINT, self._came)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._master.stop_asked:
            raise KeyboardInterrupt
        self._master.stop_asked = True
        running = len(self._master.running)
        sys.stderr.write(f"\ngraphopt explore: stopping when {running} trials have ended; Ctrl-C again stops at once\n")

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
