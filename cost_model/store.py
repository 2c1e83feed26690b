"""`ProfileStore`: what operators and whole steps took on this machine, kept between processes."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.cost_model.cache import cache_dir
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.store_file import StoreFile
from graphopt.errors import CostModelError, GraphoptWarning

__all__ = ["LARGEST_SIZE", "OperatorRow", "ProfileStore", "StepRow"]

log = logging.getLogger("graphopt")

LARGEST_SIZE = 2**40
"""A free size above this is a mistake: no tensor of a training step has as many rows."""

_TIMES = """
    seconds REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, runs INTEGER NOT NULL,
    measured_at REAL NOT NULL, torch TEXT NOT NULL,
    CHECK (0 < low AND low <= seconds AND seconds <= high AND runs >= 1)
"""

VERSIONS: tuple[tuple[str, ...], ...] = (
    (
        f"""CREATE TABLE steps (id INTEGER PRIMARY KEY, graph TEXT NOT NULL, scheme TEXT NOT NULL, sizes TEXT NOT NULL,
            machine TEXT NOT NULL, facts TEXT NOT NULL, {_TIMES})""",
        f"""CREATE TABLE operators (id INTEGER PRIMARY KEY, signature TEXT NOT NULL,
            machine TEXT NOT NULL, {_TIMES})""",
        "CREATE INDEX steps_by_key ON steps (machine, graph, scheme, sizes)",
        "CREATE INDEX operators_by_key ON operators (machine, signature)",
    ),
)
"""What brings a file from one version to the next. Entries are only ever added: files of each version are out there."""


@dataclass(frozen=True)
class StepRow:
    """A whole step as it was measured.

    ``graph`` is the hash of the graph as captured, ``scheme`` the name of what ran it, ``sizes`` its free sizes,
    ``machine`` a fingerprint. ``facts`` are numbers that a price is computed from (FLOPs, bytes ...): with them, a row
    serves a fit without its graph. ``measured_at`` is in seconds since 1970 (UTC).
    """

    graph: str
    scheme: str
    sizes: Mapping[str, int]
    machine: str
    measurement: Measurement
    facts: Mapping[str, float] = field(default_factory=dict)
    measured_at: float = 0.0
    torch: str = ""


@dataclass(frozen=True)
class OperatorRow:
    """An operator as it was measured. ``signature`` names it with all that its time depends on (shapes, dtypes ...)."""

    signature: str
    machine: str
    measurement: Measurement
    measured_at: float = 0.0
    torch: str = ""


class ProfileStore:
    """Measured times in one SQLite file. Any number of processes on one host may use it at once.

    A file that cannot be written to is replaced by memory, a damaged one is moved aside; both with a `GraphoptWarning`.

    Args:
        path: the file; ``profiles.sqlite`` in `cache_dir` by default. It and its folders are made when they are not
            there.

    Raises:
        CostModelError: the file was written by a newer graphopt or by another program. It is left as it is.

    >>> import tempfile
    >>> store = ProfileStore(Path(tempfile.mkdtemp()) / "profiles.sqlite")
    >>> store.add_step("a1b2", "flat", {"batch": 32}, "this machine", Measurement(0.010, 0.009, 0.011, runs=9))
    True
    >>> store.latest_step("a1b2", "flat", {"batch": 32}, "this machine").measurement.seconds
    0.01
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else cache_dir() / "profiles.sqlite"
        if os.path.isdir(self.path):  # unlike Path.is_dir, no error where one may not look
            raise CostModelError(f"ProfileStore: path={str(self.path)!r} is a folder; expected the name of a file")
        self._file = StoreFile(self.path, VERSIONS)
        self._warned_of_noise = False

    def __repr__(self) -> str:
        return f"ProfileStore({str(self.path)!r}{', in memory' if self.in_memory else ''})"

    @property
    def in_memory(self) -> bool:
        """Whether the file cannot be used, so that rows are forgotten when the process ends."""
        return self._file.in_memory

    # -- adding -----------------------------------------------------------------------------------------------------

    def add_step(
        self,
        graph: str,
        scheme: str,
        sizes: Mapping[str, int],
        machine: str,
        measurement: Measurement,
        facts: Mapping[str, float] | None = None,
    ) -> bool:
        """Keep the time of a step; see `StepRow`. It is on file when this returns.

        Returns:
            Whether it was kept: a noisy measurement is not, and the first one of a store is warned of.

        Raises:
            CostModelError: empty names, or sizes or facts that are no sensible numbers. Nothing is kept.
        """
        _require_names("add_step", graph=graph, scheme=scheme, machine=machine)
        values = (graph, scheme, _sizes(sizes), machine, _facts(facts or {}))
        if self._too_noisy(f"scheme {scheme!r} at {dict(sizes)}", measurement):
            return False
        columns, rows = "graph, scheme, sizes, machine, facts", [(*values, *_times(measurement))]
        self._file.run(lambda connection: _insert(connection, "steps", columns, rows), write=True)
        return True

    def add_operators(self, machine: str, measurements: Mapping[str, Measurement]) -> int:
        """Keep times of operators by signature, all or none; see `OperatorRow`.

        Returns:
            How many were kept: noisy ones are not.

        Raises:
            CostModelError: an empty name. Nothing is kept.
        """
        for signature in measurements:
            _require_names("add_operators", machine=machine, signature=signature)
        rows = [
            (signature, machine, *_times(measurement))
            for signature, measurement in measurements.items()
            if not self._too_noisy(f"operator {signature!r}", measurement)
        ]
        self._file.run(lambda connection: _insert(connection, "operators", "signature, machine", rows), write=True)
        return len(rows)

    def _too_noisy(self, what: str, measurement: Measurement) -> bool:
        if measurement.noisy is None:
            return False
        message = f"the time of {what} was not kept: {measurement.noisy}"
        log.info(message)
        if not self._warned_of_noise:
            self._warned_of_noise = True
            warnings.warn(f"{message}. It will be measured again; a quiet machine would help.", GraphoptWarning)
        return True

    # -- asking -----------------------------------------------------------------------------------------------------

    def latest_step(self, graph: str, scheme: str, sizes: Mapping[str, int], machine: str) -> StepRow | None:
        """The row of a step that was added last, None when there is none."""
        rows = self._steps(graph=graph, scheme=scheme, sizes=_sizes(sizes), machine=machine)
        return rows[-1] if rows else None

    def steps(
        self, *, machine: str, graph: str | None = None, scheme: str | None = None, latest: bool = False
    ) -> list[StepRow]:
        """Rows of a machine, in the order they were added: for a graph and scheme over all sizes, or all for a fit.

        Args:
            machine: a fingerprint.
            graph: only rows of this graph.
            scheme: only rows of this scheme.
            latest: only the last row of each graph, scheme and sizes.
        """
        found = self._steps(machine=machine, graph=graph, scheme=scheme)
        if latest:
            found = list({(row.graph, row.scheme, _sizes(row.sizes)): row for row in found}.values())
        return found

    def operators(self, machine: str, *, signature: str | None = None) -> dict[str, OperatorRow]:
        """The row added last of each operator of a machine, by signature; of one if ``signature`` is given."""
        names = "signature, machine"
        found = self._file.run(lambda connection: _select(connection, "operators", names, machine, signature=signature))
        rows = {}
        for signature_, machine_, *times in found:
            measured = _measured("operators", times)
            if measured is not None:
                rows[signature_] = OperatorRow(signature_, machine_, *measured)
        return rows

    def _steps(self, *, machine: str, **where: str | None) -> list[StepRow]:
        columns = "graph, scheme, sizes, machine, facts"
        rows = []
        for graph, scheme, sizes, machine_, facts, *times in self._file.run(
            lambda connection: _select(connection, "steps", columns, machine, **where)
        ):
            measured = _measured("steps", times)
            if measured is not None:
                measurement, at, version = measured
                known = json.loads(sizes), machine_, measurement, json.loads(facts)
                rows.append(StepRow(graph, scheme, *known, measured_at=at, torch=version))
        return rows


_TIME_COLUMNS = "seconds, low, high, runs, measured_at, torch"


def _insert(connection: sqlite3.Connection, table: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
    names = f"{columns}, {_TIME_COLUMNS}"
    marks = ", ".join("?" * len(names.split(",")))
    connection.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)


def _select(connection: sqlite3.Connection, table: str, columns: str, machine: str, **where: str | None) -> list[Any]:
    given = {"machine": machine, **{name: value for name, value in where.items() if value is not None}}
    condition = " AND ".join(f"{name} = ?" for name in given)
    query = f"SELECT {columns}, {_TIME_COLUMNS} FROM {table} WHERE {condition} ORDER BY id"
    return connection.execute(query, tuple(given.values())).fetchall()


def _times(measurement: Measurement) -> tuple[Any, ...]:
    m = measurement
    return m.seconds, m.low, m.high, m.runs, time.time(), str(torch.__version__)


def _measured(table: str, times: list[Any]) -> tuple[Measurement, float, str] | None:
    seconds, low, high, runs, measured_at, version = times
    try:
        return Measurement(seconds, low, high, runs), measured_at, version
    except CostModelError as error:  # flipped bits that left the file readable
        warnings.warn(f"a row of {table} in the profile store is left out: {error}", GraphoptWarning)
        return None


# -- what a row may hold --------------------------------------------------------------------------------------------


def _require_names(method: str, **names: str) -> None:
    for argument, value in names.items():
        if not isinstance(value, str) or not value:
            raise CostModelError(f"{method}: {argument}={value!r}; expected a non-empty string")


def _sizes(sizes: Mapping[str, int]) -> str:
    """Sizes as text, equal for equal sizes."""
    for name, size in sizes.items():
        if not isinstance(name, str) or type(size) is not int or not 1 <= size <= LARGEST_SIZE:
            raise CostModelError(
                f"sizes={dict(sizes)}: {name!r} is {size!r}; expected names with ints from 1 to {LARGEST_SIZE}"
            )
    return json.dumps(dict(sizes), sort_keys=True)


def _facts(facts: Mapping[str, float]) -> str:
    for name, value in facts.items():
        if not isinstance(name, str) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CostModelError(f"facts: {name!r} is {value!r}; expected names with finite numbers")
    return json.dumps(dict(facts), sort_keys=True)
