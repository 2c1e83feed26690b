"""Everything in this process, one trial after the other: for debugging, and for trials of microseconds.

A trial that crashes the process takes the study with it (it can be resumed), and one that hangs is not stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from graphopt.exploration.engines import Answered, Ended, Happening, Ready
from graphopt.exploration.generator import Generator, GeneratorSetup, Row
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task, Trainer, TrainerSetup

__all__ = ["InlineEngine"]


class InlineEngine:
    """See `graphopt.exploration.engines.Engine`. ``on_report`` is asked at once, as the trial runs in this thread."""

    slots = 1
    alike = True

    def __init__(self, generator: GeneratorSetup, trainer: TrainerSetup):
        self._generator = Generator(generator)
        self._trainer = Trainer(trainer)
        self._happened: deque[Happening] = deque([Ready(0)])
        self._task: Task | None = None
        self.on_report = lambda number, step, value, rung: True

    def now(self) -> float:
        return time.monotonic()

    def feed(self, rows: Sequence[Row]) -> None:
        self._generator.feed(rows)

    def ask(self, request: Request) -> None:
        self._happened.append(Answered(self._generator.answer(request)))

    def start(self, slot: int, task: Task) -> None:
        self._task = task

    def decide(self, slot: int, goes_on: bool) -> None:
        raise AssertionError("reports are answered at once")

    def stop(self, slot: int) -> None:
        self._task = None
        self._happened.append(Ready(slot))

    def wait(self, seconds: float) -> list[Happening]:
        if not self._happened and self._task is not None:
            task, self._task = self._task, None
            outcome = self._trainer.run(task, lambda *report: self.on_report(task.number, *report))
            self._happened.append(Ended(0, task.number, outcome))
        found = list(self._happened)
        self._happened.clear()
        if not found:
            time.sleep(min(seconds, 0.01))
        return found

    def close(self) -> None:
        self._task = None
