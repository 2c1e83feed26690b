"""The SQLite file under the profile store: opened by many, damaged by none, replaced by memory where it cannot be.

What can go wrong with a file in a cache folder, and what happens then:

- Several processes write at once: WAL, a busy timeout, and transactions that only run what is given to them.
- A process is killed: SQLite rolls back what was not committed. What was committed stays.
- The file is torn or is no database: it is moved aside (never deleted), a new one is begun, and one warning says so.
- The folder is read-only, or the disk is full: what can be read is read, the rest is kept in memory, with one warning.
- The file is of an older version: it is brought up to date in one transaction.
- It is of a newer version, or belongs to another program: an error, and the file is left as it is.

A connection lives for one transaction, so that threads and forked processes share nothing. WAL needs all processes on
one host: where several hosts share a home, each needs its own GRAPHOPT_CACHE_DIR.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from threading import RLock
from typing import TypeVar

from graphopt.errors import CostModelError, GraphoptWarning

__all__ = ["StoreFile"]

T = TypeVar("T")

APPLICATION_ID = 0x67726F70  # "grop": tells our files from those of others
TIMEOUT = 30.0
"""Seconds to wait for other processes. Theirs are transactions of milliseconds; only a stopped one takes as long."""

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNUSABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
)


class _DamagedFile(sqlite3.DatabaseError):
    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class StoreFile:
    """A file that transactions run on.

    Args:
        path: where it is or will be made, with its folders.
        versions: SQL statements that bring a file from one version to the next, the first from nothing.
        timeout: seconds to wait for other processes.

    Raises:
        CostModelError: the file is of a newer version, or not a profile store.
    """

    def __init__(self, path: Path, versions: Sequence[Sequence[str]], timeout: float = TIMEOUT) -> None:
        self.path = path
        self._versions = versions
        self._timeout = timeout
        self._lock = RLock()
        self._memory: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._to_memory(error)
        self.run(_check, write=True)

    @property
    def in_memory(self) -> bool:
        """Whether rows are kept in memory only, and go with the process."""
        return self._memory is not None

    def run(self, work: Callable[[sqlite3.Connection], T], *, write: bool = False) -> T:
        """``work(connection)`` in one transaction: all of it is on file when this returns, or none of it if it raises.

        ``work`` may run a second time, on a new file or in memory, when the first one fails. Without ``write`` it
        waits for nobody.
        """
        with self._lock:
            for _ in range(2):  # a damaged file may turn out to lie in a read-only folder
                try:
                    return self._run(work, write)
                except sqlite3.DatabaseError as error:
                    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                    if self.in_memory or code not in (*_DAMAGED, *_UNUSABLE):
                        raise
                    if code in _DAMAGED:
                        self._set_aside(error)
                    else:
                        self._to_memory(error)
            return self._run(work, write)

    def _run(self, work: Callable[[sqlite3.Connection], T], write: bool) -> T:
        if self._memory is not None:
            return _transaction(self._memory, work, write)
        with closing(self._open(self.path)) as connection:
            return _transaction(connection, work, write)

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=self._timeout, isolation_level=None)
        try:
            if self._version(connection) < len(self._versions):
                _begin_wal(connection, self._timeout)
                _transaction(connection, self._bring_up_to_date)
            # A crash of the system may cost the last rows, never the file. A crash of the process costs nothing.
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _version(self, connection: sqlite3.Connection) -> int:
        """The version of a file; 0 when nothing is in it yet. Changes nothing."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if owner != APPLICATION_ID and (owner or version or tables):
            raise CostModelError(
                f"{self.path} is an SQLite file, but not a profile store; it was left as it is. Name another path, or "
                "set GRAPHOPT_CACHE_DIR to another folder."
            )
        if version > len(self._versions):
            raise CostModelError(
                f"{self.path} was written by a newer graphopt (version {version} of the file; this one knows up to "
                f"{len(self._versions)}); it was left as it is. Upgrade graphopt, or set GRAPHOPT_CACHE_DIR to another "
                "folder."
            )
        return version

    def _bring_up_to_date(self, connection: sqlite3.Connection) -> None:
        version = self._version(connection)  # again: another process may have been first
        for statements in self._versions[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(self._versions)}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    # -- when it fails ----------------------------------------------------------------------------------------------

    def _set_aside(self, error: Exception) -> None:
        """Move a damaged file out of the way, unless another process did so first."""
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        try:
            # An exclusive transaction on an empty database is a lock that no killed process leaves behind.
            lock = sqlite3.connect(f"{self.path}.lock", timeout=self._timeout, isolation_level=None)
            with closing(lock):
                lock.execute("BEGIN EXCLUSIVE")
                if not self._is_damaged():
                    return
                # The log before the file: a log left alone would be taken for that of the new file.
                for suffix in ("-wal", "-shm", ""):
                    part = Path(f"{self.path}{suffix}")
                    if part.exists():
                        part.rename(f"{aside}{suffix}")
        except (OSError, sqlite3.DatabaseError) as failure:
            self._to_memory(failure)
            return
        warnings.warn(
            f"the profile store {self.path} is damaged ({error}); it was moved to {aside}, and a new one begun. "
            "Steps will be measured again.",
            GraphoptWarning,
        )

    def _is_damaged(self) -> bool:
        try:
            with closing(self._open(self.path)) as connection:
                _check(connection)
        except sqlite3.DatabaseError as error:
            return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
        return False

    def _to_memory(self, error: Exception) -> None:
        """Go on in memory, with the rows that can still be read."""
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        if os.path.isfile(self.path):  # unlike Path.is_file, no error where one may not look
            memory = self._read_only_copy() or memory
        if self._version(memory) < len(self._versions):
            _transaction(memory, self._bring_up_to_date)
        self._memory = memory
        warnings.warn(
            f"the profile store {self.path} cannot be used ({error}): what is measured is forgotten when this process "
            "ends. Set GRAPHOPT_CACHE_DIR to a folder that can be written to.",
            GraphoptWarning,
        )

    def _read_only_copy(self) -> sqlite3.Connection | None:
        for how in ("mode=ro", "immutable=1"):  # the first sees the log, but may need to write beside the file
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            try:
                with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?{how}", uri=True)) as source:
                    source.backup(copy)
                _check(copy)
                return copy
            except sqlite3.DatabaseError:  # then there is nothing to be read in this way; the caller warns
                copy.close()
        return None


def _transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], write: bool = True) -> T:
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _begin_wal(connection: sqlite3.Connection, timeout: float) -> None:
    """Switch to the write-ahead log. SQLite does not wait by itself when two processes do so at once."""
    until = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.005)


def _check(connection: sqlite3.Connection) -> None:
    """Raise when the file is torn in a place that no query may come by for long."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _DamagedFile(" ".join(found.split()))
