"""Workers: a trainer each and, unless models are generated in the master, a generator beside it, in processes.

What happens to a search when one of them is ready, answers, or is gone is decided here, once; who runs the processes,
on this machine or on others, is a `Processes`. A request is placed with one generator after the other: since answers do
not depend on where they are made, one that is lost with its generator is placed with another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphopt.errors import ExplorationError
from graphopt.exploration.engines import Answered, Died, Ended, Happening, Ready, Reported
from graphopt.exploration.generator import Generator, Row
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task

__all__ = ["Lost", "Message", "Processes", "WorkersEngine"]

_STARTS = 3
_KILLED_STARTS = 8
"""Times that a process in a slot may end by itself, or be killed from outside, without having done anything, one after
the other."""

Message = tuple[Any, ...]
"""What `graphopt.exploration.worker` says and understands."""


@dataclass(frozen=True)
class Lost:
    """A process is gone. ``killed``: by a signal from outside, or with its machine."""

    cause: str
    killed: bool


class Processes(Protocol):
    """Runs processes that serve as `graphopt.exploration.worker` does. A process is a handle that only it can read."""

    def spawn(self, kind: str, slot: int) -> Any:
        """Start a ``trainer`` or a ``generator``. It need not run yet when this returns, and may never: then nothing is
        heard of it. Raises ExplorationError where none can be started."""

    def send(self, process: Any, messages: Sequence[Message]) -> None:
        """Hand messages on, in this order. Those to a process that is gone are lost."""

    def wait(self, seconds: float) -> list[tuple[Any, Message | Lost]]:
        """What processes said, and which are gone, waiting so long at most for the first. All that a process said comes
        before that it is gone, and nothing after."""

    def kill(self, process: Any) -> None:
        """End a process and all that it started, at once. Nothing more is heard of it."""

    def close(self) -> None:
        """End all of them, and give back what belongs to them. Twice is once."""


@dataclass
class _Seat:
    """The process of one kind in one slot. ``fed``: rows of the pool that were sent to it."""

    kind: str
    slot: int
    process: Any
    ready: bool = False
    fed: int = 0


class WorkersEngine:
    """See `graphopt.exploration.engines.Engine`.

    Args:
        processes: where they run.
        workers: how many trainers.
        here: the generator of this process, where models are generated in the master; else each worker has its own.
        alike: whether all workers are about as fast.
    """

    def __init__(self, processes: Processes, *, workers: int, here: Generator | None = None, alike: bool = True):
        self.slots = workers
        self.alike = alike
        self._processes = processes
        self._here = here
        self._seats: dict[tuple[str, int], _Seat] = {}
        self._of: dict[Any, _Seat] = {}
        self._happened: deque[Happening] = deque()
        self._tasks: list[int | None] = [None] * workers
        self._failed_starts: dict[tuple[str, int], tuple[int, int]] = {}  # ended by themselves, killed
        self._rows: list[Row] = []
        self._asked: Request | None = None
        self._asked_of: int | None = None
        try:
            for slot in range(workers):
                if here is None:
                    self._spawn("generator", slot)
                self._spawn("trainer", slot)
        except BaseException:
            self.close()
            raise

    # -- what the master asks for -----------------------------------------------------------------------------------

    def now(self) -> float:
        return time.monotonic()

    def feed(self, rows: Sequence[Row]) -> None:
        if self._here is not None:
            self._here.feed(rows)
        else:
            self._rows += rows  # sent with the next request: a busy generator would not read them before

    def ask(self, request: Request) -> None:
        if self._here is not None:
            self._happened.append(Answered(self._here.answer(request)))
            return
        self._asked = request
        self._place()

    def start(self, slot: int, task: Task) -> None:
        self._tasks[slot] = task.number
        self._processes.send(self._seats["trainer", slot].process, [("task", task)])

    def decide(self, slot: int, goes_on: bool) -> None:
        self._processes.send(self._seats["trainer", slot].process, [("decide", goes_on)])

    def stop(self, slot: int) -> None:
        self._tasks[slot] = None
        self._replace(self._seats["trainer", slot])

    def wait(self, seconds: float) -> list[Happening]:
        until = time.monotonic() + seconds
        left = seconds
        while not self._happened:
            for process, said in self._processes.wait(max(0.0, left)):
                if (seat := self._of.get(process)) is None:
                    continue  # it was replaced by what came before
                if isinstance(said, Lost):
                    self._lost(seat, said)
                else:
                    self._understand(seat, said)
            if (left := until - time.monotonic()) <= 0:
                break
        found = list(self._happened)
        self._happened.clear()
        return found

    def close(self) -> None:
        self._seats.clear()
        self._of.clear()
        self._processes.close()

    # -- requests ---------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Hand the request to a generator, in turn; if none is ready, to the first that is."""
        request = self._asked
        able = [slot for slot in range(self.slots) if self._seats["generator", slot].ready]
        if request is None or not able:
            return
        turn = request.number % self.slots
        slot = self._asked_of = turn if turn in able else able[request.number % len(able)]
        seat = self._seats["generator", slot]
        messages: list[Message] = [("ask", request)]
        if seat.fed < len(self._rows):
            messages.insert(0, ("rows", self._rows[seat.fed :]))
            seat.fed = len(self._rows)
        self._processes.send(seat.process, messages)

    # -- what the processes say -------------------------------------------------------------------------------------

    def _understand(self, seat: _Seat, message: Message) -> None:
        what, slot = message[0], seat.slot
        if what == "ready":
            seat.ready = True
            if seat.kind == "trainer":
                self._failed_starts.pop(("trainer", slot), None)  # it can start: what ends it later is a trial
                self._happened.append(Ready(slot))
            elif self._asked_of is None:
                self._place()
        elif what == "report":
            _, number, step, value, rung = message
            self._happened.append(Reported(slot, number, step, value, rung))
        elif what == "ended":
            _, number, outcome = message
            self._tasks[slot] = None
            self._happened.append(Ended(slot, number, outcome))
            if outcome.out_of_memory:  # what it still holds would make the next trial fail too
                self._replace(seat)
        elif what == "answer":
            self._failed_starts.pop(("generator", slot), None)
            self._asked = self._asked_of = None
            self._happened.append(Answered(message[1]))
        else:
            raise ExplorationError(f"a {seat.kind} cannot go on:\n{message[1]}")

    def _lost(self, seat: _Seat, lost: Lost) -> None:
        kind, slot = seat.kind, seat.slot
        ended, kills = self._failed_starts.get((kind, slot), (0, 0))
        ended, kills = self._failed_starts[kind, slot] = ended + (not lost.killed), kills + lost.killed
        number = self._tasks[slot] if kind == "trainer" else None
        if (ended > _STARTS or kills > _KILLED_STARTS) and number is None:
            times = ended + kills
            raise ExplorationError(
                f"the {kind} of worker {slot} ended {times} times without doing anything: {lost.cause}"
            )
        if kind == "trainer":
            self._tasks[slot] = None
            self._happened.append(Died(slot, number, lost.cause, lost.killed))
        self._spawn(kind, slot)
        if kind == "generator" and self._asked_of == slot:
            self._asked_of = None
            self._place()

    def _replace(self, seat: _Seat) -> None:
        self._processes.kill(seat.process)
        self._spawn(seat.kind, seat.slot)

    def _spawn(self, kind: str, slot: int) -> None:
        if (before := self._seats.get((kind, slot))) is not None:
            del self._of[before.process]
        seat = _Seat(kind, slot, self._processes.spawn(kind, slot))
        self._seats[kind, slot] = self._of[seat.process] = seat
