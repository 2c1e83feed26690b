"""A team: the workers of a pool from their start to their end."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from graphopt.errors import WorkerError
from graphopt.graph.torch_internals import join_processes, keep_for_ever, leave_processes
from graphopt.schemes.workers.mirror import Mirror
from graphopt.schemes.workers.watch import GRACE, Watch
from graphopt.schemes.workers.worker import Worker, of_a_collective

START_SECONDS = 300.0
"""How long workers may take to start: importing torch on a busy machine."""

_MEETING_SECONDS = 60.0  # to connect, when all have started


class Team:
    """Workers, the watch over them, and what lives as long as they do: the group, the `Mirror`, the jobs they know.

    A team fails as a whole: whatever happens to one worker, `fail` ends all and names the cause.
    """

    def __init__(self, processors: int, threads: int, timeout: float, name: str):
        """Start the workers; `ready` waits for them. ``name``: that of the group in collectives."""
        self.mirror = Mirror()
        self.loaded: set[int] = set()
        self.settings: list[Any] | None = None  # those the workers were told last
        self.workers: list[Worker] = []
        self._processors, self._timeout, self._name = processors, timeout, name
        self._owner = os.getpid()
        self._lock = threading.RLock()  # a collection of garbage may end the team amid anything
        self._ended = self._joined = False
        self._group: Any = None
        self.directory = Path(tempfile.mkdtemp(prefix="graphopt-workers-"))
        self.watch = Watch(self.workers)
        try:
            for processor in range(1, processors):
                self.workers.append(Worker(processor, threads, self.directory))
        except BaseException:
            self.end()
            raise

    @property
    def broken(self) -> bool:
        """Whether it can do no more steps."""
        return self._ended or self.watch.broken.is_set()

    @property
    def ended(self) -> bool:
        """Whether everything was given back."""
        return self._ended

    def ready(self) -> None:
        """Wait until all workers have started and are connected. Raises WorkerError where they are not."""
        if self._joined:
            return
        # The watch ends a step that takes too long; a collective by itself has to wait longer than that.
        patience = 2 * self._timeout + 60
        meeting = str(self.directory / "meeting")
        self.watch.start()
        try:
            with self.watch.deadline(START_SECONDS):
                for worker in self.workers:
                    release = worker.answer()["hello"]["torch"]
                    if release != str(torch.__version__):
                        raise WorkerError(f"{worker} runs torch {release}, this process torch {torch.__version__}")
                where = [self._processors, self._name, _MEETING_SECONDS, patience]
                for worker in self.workers:
                    worker.tell({"do": "join", "join": [meeting, worker.processor, *where]})
                self._group = join_processes(meeting, 0, *where)  # type: ignore[arg-type]
                if refusals := self.answers():
                    raise WorkerError("\n".join(refusals))
            self._joined = True
        except BaseException as error:
            self.fail(error, "the workers could not be started")

    def answers(self) -> list[str]:
        """Wait until every worker has done what it was told last. The refusals; raises EOFError where one is gone."""
        answered = [(worker, worker.answer()) for worker in self.workers]
        return [f"{worker} refuses: {answer['refused']}" for worker, answer in answered if "refused" in answer]

    def tell(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        """Send a message to all. Raises EOFError where one is gone."""
        for worker in self.workers:
            worker.tell(message, files)

    def fail(self, error: BaseException, what: str) -> NoReturn:
        """End the team after ``error``, and raise a WorkerError that says ``what`` and why; an interrupt as it is."""
        if isinstance(error, EOFError) or of_a_collective(str(error)):
            self.watch.broken.wait(2 * GRACE + 1)  # the watch finds out who was the first
        self.end()
        if not isinstance(error, Exception):
            raise error
        raise WorkerError(f"{what}: {self._cause() or _own(error)}") from error

    def why_broken(self) -> str:
        """What ended a team that nobody used. Ends it."""
        self.end()
        return self._cause() or "its workers are gone"

    def _cause(self) -> str | None:
        """What happened to the workers, what it began with; None where it was not them."""
        found = [cause for worker in self.workers if (cause := worker.cause()) is not None]
        if found:
            return min(found)[1]
        if not self.watch.late:
            return None
        still = [w for w in self.workers if w.stopped] or self.workers
        why = " (stopped by a signal)" if still[0].stopped else ""
        return f"{', '.join(map(str, still))} did not answer within {self.watch.seconds:g} s{why}"

    def end(self, *, politely: bool = False) -> None:
        """Stop the workers, wait for their ends, give everything back. Twice is once. In a forked child of main nothing
        is stopped: the workers are not the child's."""
        if os.getpid() != self._owner:
            # The destructor of a group joins its threads, which a fork does not copy: it would wait for ever.
            keep_for_ever(self._group)
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self.watch.stop()
        if politely and not self.watch.broken.is_set():
            self._part()
        self.watch.kill()
        for worker in self.workers:
            worker.close()
        if self._group is not None:
            leave_processes(self._name)
            self._group = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def _part(self) -> None:
        """Let the workers end by themselves."""
        try:
            self.tell({"do": "close"})
        except EOFError:
            return  # they are killed next
        for worker in self.workers:
            worker.wait(2.0)


def _own(error: Exception) -> str:
    return f"processor 0 (this process) failed: {type(error).__name__}: {error}"
