"""`Records`: measured steps in the profile store, for the next process; a store that fails never stops training."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable
from threading import Lock, Thread

from graphopt.cost_model.machine import identity
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.store import ProfileStore
from graphopt.errors import GraphoptError, GraphoptWarning

log = logging.getLogger("graphopt")

FRESH_SECONDS = 30 * 24 * 3600.0
"""Age up to which a stored time serves instead of a measurement."""

_FAILURES = (GraphoptError, GraphoptWarning, OSError, sqlite3.Error, RuntimeError)

Row = tuple[str, int, Measurement]
"""Scheme, batch size, seconds of a step."""


class Records:
    """What was measured of a graph on this machine, by scheme and batch size.

    Rows are read when a graph is new and written by a thread of their own, so that no step waits for a disk.

    Args:
        store: where rows are kept; the user's `ProfileStore` by default, opened when it is first needed.
    """

    def __init__(self, store: ProfileStore | None = None):
        self._store = store
        self._usable = True
        self._lock = Lock()
        self._writers: list[Thread] = []

    def read(self, graph: str) -> list[Row]:
        """The fresh rows of a graph, none where the store cannot be read."""
        if not self._usable:
            return []
        try:
            rows = self._opened().steps(machine=identity(), graph=graph, latest=True)
        except _FAILURES as error:
            self._failed(error)
            return []
        oldest = time.time() - FRESH_SECONDS
        return [
            (row.scheme, row.sizes["batch"], row.measurement)
            for row in rows
            if row.sizes.keys() == {"batch"} and row.measured_at >= oldest
        ]

    def keep(self, graph: str, rows: Iterable[Row]) -> None:
        """Add rows, in the background."""
        listed = list(rows)
        if not listed or not self._usable:
            return
        machine = identity()  # here: a scheme sets the number of threads for its step only, and a thread may see that
        writer = Thread(target=self._write, args=(graph, machine, listed), name="graphopt profile store")
        self._writers = [w for w in self._writers if w.is_alive()] + [writer]
        try:
            writer.start()
        except RuntimeError as error:  # the interpreter is going down
            self._failed(error)

    def flush(self) -> None:
        """Wait until all rows are on file."""
        for writer in self._writers:
            if writer.ident is not None:
                writer.join()

    def _write(self, graph: str, machine: str, rows: list[Row]) -> None:
        try:
            with self._lock:
                store = self._opened()
                for scheme, size, measured in rows:
                    store.add_step(graph, scheme, {"batch": size}, machine, measured)
        except _FAILURES as error:
            self._failed(error)

    def _opened(self) -> ProfileStore:
        if self._store is None:
            self._store = ProfileStore()
        return self._store

    def _failed(self, error: BaseException) -> None:
        self._usable = False
        log.warning("measured steps are not kept: %s", error)
