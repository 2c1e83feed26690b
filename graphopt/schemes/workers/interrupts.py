"""Ctrl-C during a step waits until the step is committed."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptsWait:
    """While entered, the first SIGINT is kept back and raised again on leaving; a second one interrupts at once.

    Signals reach Python in the main thread only: in another one this does nothing. Operators that run and collectives
    that wait do not see a signal before they return.
    """

    def __enter__(self) -> InterruptsWait:
        self._came = False
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not None:  # None: set by C code, which cannot be put back
                signal.signal(signal.SIGINT, self._keep)
        return self

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._came and kind is not KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
