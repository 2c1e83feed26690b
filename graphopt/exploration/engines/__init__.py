"""Engines: where generators and trainers run.

An engine has slots, each for one trainer. The master starts tasks in idle slots and asks for models; what happens comes
back as `Happening`s from `wait`. Everything that is decided is decided by the master: an engine starts, stops, replaces
processes and hands messages on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graphopt.exploration.generator import Row
from graphopt.exploration.outcome import Outcome
from graphopt.exploration.proposers import Answer
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task

__all__ = ["Answered", "Died", "Ended", "Engine", "Happening", "Ready", "Reported"]


@dataclass(frozen=True)
class Ready:
    """The trainer of a slot has started and is idle."""

    slot: int


@dataclass(frozen=True)
class Ended:
    """A trial ended by itself. The slot is idle again, unless memory ran out: then its trainer is being replaced."""

    slot: int
    number: int
    outcome: Outcome


@dataclass(frozen=True)
class Reported:
    """A trial reported a value. With a rung it waits for `Engine.decide`."""

    slot: int
    number: int
    step: int
    value: float
    rung: int | None


@dataclass(frozen=True)
class Died:
    """The trainer of a slot is gone, with the trial that it ran, if any; it is being replaced. ``killed``: by a signal
    from outside, which need not be the trial's fault."""

    slot: int
    number: int | None
    cause: str
    killed: bool


@dataclass(frozen=True)
class Answered:
    """A request was answered."""

    answer: Answer


Happening = Ready | Ended | Reported | Died | Answered


class Engine(Protocol):
    """What the master uses. Adapters for other systems have these members."""

    @property
    def slots(self) -> int:
        """How many trials run at a time."""

    @property
    def alike(self) -> bool:
        """Whether all slots are about as fast, so that what a trial took in one says what it takes in another."""

    def now(self) -> float:
        """Seconds on the clock by which `wait` waits."""

    def feed(self, rows: Sequence[Row]) -> None:
        """The next rows of the pool, for all replicas."""

    def ask(self, request: Request) -> None:
        """Have a generator answer; all rows that the request names have been fed."""

    def start(self, slot: int, task: Task) -> None:
        """Run a task in an idle slot."""

    def decide(self, slot: int, goes_on: bool) -> None:
        """Answer a report that waits."""

    def stop(self, slot: int) -> None:
        """End the trial of a slot at once. It is not told of again; `Ready` follows."""

    def wait(self, seconds: float) -> list[Happening]:
        """What happened, waiting so long at most for the first.

        Raises ExplorationError where processes cannot be started or a proposer fails.
        """

    def close(self) -> None:
        """End everything at once; nothing is left behind. Twice is once."""
