"""The default engine: processes of this machine, no services, nothing to install.

Each worker is a trainer and, unless generation is placed in the master, a generator beside it. The master waits for
their connections and for the ends of the processes, and replaces what is gone. A request is placed with one generator
after the other; since answers do not depend on where they are made, a generator that dies is replaced, fed the pool and
asked again.
"""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError
from graphopt.exploration.engines import Answered, Died, Ended, Happening, Ready, Reported
from graphopt.exploration.generator import Generator, GeneratorSetup, Row
from graphopt.exploration.processes import Child, write_payload
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task, TrainerSetup

__all__ = ["LocalEngine"]

_STARTS = 3
_KILLED_STARTS = 8
"""Times that a process in a slot may end by itself, or be killed from outside, without having done anything, one after
the other."""

_TICK = 0.25 if hasattr(os, "pidfd_open") else 0.05  # without pidfd, ends of processes are looked for


class LocalEngine:
    """See `graphopt.exploration.engines.Engine`.

    Args:
        workers: how many trainers.
        folder: for payloads and what the processes write; removed by nobody but its owner.
        generation: ``"workers"``: a generator process beside each trainer; ``"master"``: in this process, which saves
            processes where proposals take milliseconds.
        environment: variables for each worker, by number: a device of its own, for example.
    """

    alike = True

    def __init__(
        self,
        generator: GeneratorSetup,
        trainer: TrainerSetup,
        *,
        workers: int,
        folder: Path,
        generation: str = "workers",
        environment: Sequence[Mapping[str, str]] | None = None,
    ):
        self.slots = workers
        self._folder = folder
        self._environment = list(environment or [{}] * workers)
        self._selector = selectors.DefaultSelector()
        self._happened: deque[Happening] = deque()
        self._tasks: list[int | None] = [None] * workers
        self._failed_starts: dict[tuple[str, int], tuple[int, int]] = {}  # ended by themselves, killed
        self._rows: list[Row] = []
        self._fed = [0] * workers
        self._asked: tuple[int, Request] | None = None
        self._children: dict[tuple[str, int], Child] = {}
        self._here = Generator(generator) if generation == "master" else None
        self._payloads = {"trainer": folder / "trainer.payload", "generator": folder / "generator.payload"}
        write_payload(self._payloads["trainer"], trainer)
        if self._here is None:
            write_payload(self._payloads["generator"], generator)
        try:
            for slot in range(workers):
                if self._here is None:
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
        able = [slot for slot in range(self.slots) if self._children["generator", slot].ready]
        turn = request.number % self.slots
        slot = turn if turn in able or not able else able[request.number % len(able)]
        self._asked = (slot, request)
        self._pass_on(slot, request)

    def _pass_on(self, slot: int, request: Request) -> None:
        child = self._children["generator", slot]
        if self._fed[slot] < len(self._rows):
            child.send("rows", self._rows[self._fed[slot] :])
            self._fed[slot] = len(self._rows)
        child.send("ask", request)

    def start(self, slot: int, task: Task) -> None:
        self._tasks[slot] = task.number
        self._children["trainer", slot].send("task", task)

    def decide(self, slot: int, goes_on: bool) -> None:
        self._children["trainer", slot].send("decide", goes_on)

    def stop(self, slot: int) -> None:
        self._tasks[slot] = None
        self._replace("trainer", slot)

    def wait(self, seconds: float) -> list[Happening]:
        until = time.monotonic() + seconds
        while not self._happened:
            left = until - time.monotonic()
            signs = self._selector.select(max(0.0, min(left, _TICK)))
            for key, _ in signs:
                child: Child
                kind, slot, child = key.data
                if self._children.get((kind, slot)) is child:  # not replaced by what came before it
                    self._hear(kind, slot, child)
            if not signs and not hasattr(os, "pidfd_open"):
                for (kind, slot), running in list(self._children.items()):
                    if running.gone():
                        self._hear(kind, slot, running)
            if left <= 0:
                break
        found = list(self._happened)
        self._happened.clear()
        return found

    def close(self) -> None:
        for child in self._children.values():
            self._forget(child)
            child.kill()
        self._children.clear()
        self._selector.close()
        for path in self._payloads.values():
            path.unlink(missing_ok=True)

    @property
    def processes(self) -> dict[tuple[str, int], int]:
        """Numbers of the processes that run now, by kind and slot."""
        return {where: child.process.pid for where, child in self._children.items()}

    # -- what the processes say -------------------------------------------------------------------------------------

    def _hear(self, kind: str, slot: int, child: Child) -> None:
        for message in child.received():
            self._understand(kind, slot, child, message)
            if self._children.get((kind, slot)) is not child:
                return
        if child.hung_up or child.gone():
            self._lost(kind, slot, child)

    def _understand(self, kind: str, slot: int, child: Child, message: tuple[Any, ...]) -> None:
        what = message[0]
        if what == "ready":
            child.ready = True
            if kind == "trainer":
                self._failed_starts.pop((kind, slot), None)  # it can start: what ends it later is a trial
                self._happened.append(Ready(slot))
        elif what == "report":
            _, number, step, value, rung = message
            self._happened.append(Reported(slot, number, step, value, rung))
        elif what == "ended":
            _, number, outcome = message
            self._tasks[slot] = None
            self._happened.append(Ended(slot, number, outcome))
            if outcome.out_of_memory:  # what it still holds would make the next trial fail too
                self._replace("trainer", slot)
        elif what == "answer":
            self._failed_starts.pop((kind, slot), None)
            self._asked = None
            self._happened.append(Answered(message[1]))
        else:
            raise ExplorationError(f"a {kind} cannot go on:\n{message[1]}")

    def _lost(self, kind: str, slot: int, child: Child) -> None:
        self._forget(child)
        child.kill()
        cause, killed = child.cause()
        ended, kills = self._failed_starts.get((kind, slot), (0, 0))
        ended, kills = self._failed_starts[kind, slot] = ended + (not killed), kills + killed
        number = self._tasks[slot] if kind == "trainer" else None
        if (ended > _STARTS or kills > _KILLED_STARTS) and number is None:
            times = ended + kills
            raise ExplorationError(f"the {kind} of worker {slot} ended {times} times without doing anything: {cause}")
        if kind == "trainer":
            self._tasks[slot] = None
            self._happened.append(Died(slot, number, cause, killed))
        self._spawn(kind, slot)
        if kind == "generator" and self._asked is not None and self._asked[0] == slot:
            self._pass_on(slot, self._asked[1])

    def _replace(self, kind: str, slot: int) -> None:
        child = self._children[kind, slot]
        self._forget(child)
        child.kill()
        self._spawn(kind, slot)

    def _spawn(self, kind: str, slot: int) -> None:
        log = self._folder / "logs" / f"{kind}-{slot}.log"
        child = Child(kind, self._payloads[kind], log, self._environment[slot])
        self._children[kind, slot] = child
        if kind == "generator":
            self._fed[slot] = 0
        self._selector.register(child.connection.fileno(), selectors.EVENT_READ, (kind, slot, child))
        if child.end is not None:
            self._selector.register(child.end, selectors.EVENT_READ, (kind, slot, child))

    def _forget(self, child: Child) -> None:
        for file in (child.connection.fileno() if not child.connection.closed else None, child.end):
            if file is not None:
                try:
                    self._selector.unregister(file)
                except KeyError:
                    pass  # it was never registered
