"""An engine with a fake clock: proposals are real, trials take the seconds they are said to take, nothing runs.

For searches of thousands of trials in seconds, and for questions about time: how busy workers are, what depends on who
is faster. Beside what `graphopt.exploration.engines.Engine` asks for: ``busy``, ``proposing`` (real seconds).
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from graphopt.exploration.engines import Answered, Died, Ended, Happening, Ready
from graphopt.exploration.generator import Generator, GeneratorSetup, Row
from graphopt.exploration.outcome import Outcome
from graphopt.exploration.search_space import Point
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task

__all__ = ["SimulatedEngine"]


class SimulatedEngine:
    """Runs ``trial(number, point) -> (outcome, seconds)`` on workers that are ``speeds`` times as fast.

    Args:
        dies: asked as ``dies(slot, number, attempt)``: whether the trainer is killed halfway through.
        answers_after: seconds (of the fake clock) that a request takes.
    """

    def __init__(
        self,
        generator: GeneratorSetup,
        trial: Callable[[int, Point], tuple[Outcome, float]],
        *,
        speeds: Sequence[float],
        dies: Callable[[int, int, int], bool] = lambda slot, number, attempt: False,
        answers_after: float = 0.01,
    ):
        self.slots = len(speeds)
        self.alike = len(set(speeds)) == 1
        self.busy = [0.0] * self.slots
        self.proposing = 0.0
        self.requests: list[Request] = []
        self._generator = Generator(generator)
        self._trial, self._speeds, self._dies, self._answers_after = trial, speeds, dies, answers_after
        self._clock = 0.0
        self._coming: list[tuple[float, int, Happening]] = []
        self._count = 0
        self._happened: deque[Happening] = deque(Ready(slot) for slot in range(self.slots))

    def now(self) -> float:
        return self._clock

    def feed(self, rows: Sequence[Row]) -> None:
        self._generator.feed(rows)

    def ask(self, request: Request) -> None:
        start = time.perf_counter()
        answer = self._generator.answer(request)
        self.proposing += time.perf_counter() - start
        self.requests.append(request)
        self._later(self._answers_after, Answered(answer))

    def start(self, slot: int, task: Task) -> None:
        outcome, seconds = self._trial(task.number, task.point)
        seconds /= self._speeds[slot]
        outcome = replace(outcome, seconds=seconds)
        if self._dies(slot, task.number, task.attempt):
            self.busy[slot] += seconds / 2
            self._later(seconds / 2, Died(slot, task.number, "killed", True))
            self._later(seconds / 2 + 0.5, Ready(slot))
            return
        self.busy[slot] += seconds
        self._later(seconds, Ended(slot, task.number, outcome))

    def decide(self, slot: int, goes_on: bool) -> None:
        raise AssertionError("simulated trials report nothing")

    def stop(self, slot: int) -> None:
        self._coming = [row for row in self._coming if getattr(row[2], "slot", None) != slot]
        heapq.heapify(self._coming)
        self._happened.append(Ready(slot))

    def wait(self, seconds: float) -> list[Happening]:
        if not self._happened:
            until = self._clock + seconds
            if self._coming and self._coming[0][0] <= until:
                self._clock = self._coming[0][0]
                while self._coming and self._coming[0][0] <= self._clock:
                    self._happened.append(heapq.heappop(self._coming)[2])
            else:
                self._clock = until
        found = list(self._happened)
        self._happened.clear()
        return found

    def close(self) -> None:
        self._coming.clear()

    def _later(self, seconds: float, happening: Happening) -> None:
        self._count += 1
        heapq.heappush(self._coming, (self._clock + seconds, self._count, happening))
