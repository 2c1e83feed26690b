"""`Store`: a study on file. Every event (a model was generated, started, ended ...) is a row; rows are only ever added.

One SQLite file in WAL mode, written by one process. Each row holds the hash of all rows before it and itself, so that a
changed or missing row is noticed when the file is opened. What is read there and not elsewhere:

- **One writer.** The lock is the kernel's (`Lock`). The number of openings, the epoch, is kept in the file and looked
  at in each transaction: a master that another one took over from (its lock file was removed, say) cannot write.
- **Nothing is lost in silence.** The lock file tells what the last write was. A file whose tail is torn opens and says
  which rows are gone, if these are of the last transaction; if more are gone, or rows in the middle, it is refused.
- **Backups** are made in turn beside it (``.backup-0``, ``.backup-1``), every ten minutes and at the end, and named
  when the file is refused.
- A file that is deleted while it is used is saved under another name before the error.

`synchronous=NORMAL` survives the end of the process by any signal; ``durable=True`` survives a power failure too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptWarning, StoreError
from graphopt.exploration.lock import Lock, read_witness

__all__ = ["Event", "Store", "read_study"]

APPLICATION_ID = 0x67726578  # "grex"
VERSION = 1
BACKUP_SECONDS = 600.0

_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE event (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, number INTEGER, key TEXT, body TEXT NOT NULL,
        hash BLOB NOT NULL)""",
    # A model is generated once, whatever a proposer does.
    "CREATE UNIQUE INDEX event_by_key ON event (key) WHERE kind = 'model'",
)


@dataclass(frozen=True)
class Event:
    """A row. ``kind`` says what happened, ``number`` to which model, ``key`` names a model, ``body`` is plain data."""

    kind: str
    number: int | None
    body: Mapping[str, Any]
    key: str | None = None


def next_hash(before: bytes, kind: str, number: int | None, key: str | None, body: str) -> bytes:
    """The hash of a row and of all before it."""
    text = "\x1f".join((kind, "" if number is None else str(number), key or "", body))
    return hashlib.blake2b(before + text.encode(), digest_size=12).digest()


class Store:
    """The file of a study, opened for writing. Read `events` first; then `add`.

    Args:
        path: of the file; it and its folder are made where they are not there.
        durable: survive a power failure too, for a millisecond a write.
        damaged: what to do with a file that lost rows: ``"refuse"``; ``"backup"``: put it aside and go on from the
            latest backup; ``"accept"``: put it aside and go on with the rows before the first bad one. Both are told
            in a `GraphoptWarning`. (`graphopt.explore` calls it ``resume``.)

    Raises:
        StoreError: see its docstring.
    """

    def __init__(self, path: str | os.PathLike[str], *, durable: bool = False, damaged: str = "refuse"):
        self.path = Path(path)
        if self.path.is_dir():
            raise StoreError(f"store: {self.path} is a folder; expected the name of a file")
        if damaged not in ("refuse", "backup", "accept"):
            raise StoreError(f"store: damaged must be 'refuse', 'backup' or 'accept', got {damaged!r}")
        self.events: list[Event] = []
        self.meta: dict[str, Any] = {}
        self._closed = False
        self._lock = Lock(Path(f"{self.path}.lock"))
        try:
            self._open(durable, damaged)
        except BaseException:
            self._lock.release()
            raise

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self, durable: bool, damaged: str) -> None:
        witness = self._lock.before
        if not self.path.exists() and witness.get("rows") and damaged != "accept":
            if damaged != "backup":
                raise StoreError(f"{self.path} is gone: it held {witness['rows']} rows. {self._advice()}")
            self._restore()
        try:
            self._connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
            try:
                self._begin(durable)
                self._read(witness, damaged)
                self._take_over()
            except BaseException:
                self._connection.close()
                raise
        except _Damaged as error:
            if damaged == "refuse":
                raise StoreError(f"{error}. {self._advice()}") from error
            return self._mend(str(error), durable, damaged)
        except sqlite3.DatabaseError as error:
            if damaged != "refuse" and _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                return self._mend(f"{self.path} is damaged ({error})", durable, damaged)
            raise self._error(error) from error
        self._identity = _identity(self.path)
        self._last_backup, self._backed_up = time.monotonic(), self._seq
        return None

    def _begin(self, durable: bool) -> None:
        do = self._connection.execute
        version = do("PRAGMA user_version").fetchone()[0]
        owner = do("PRAGMA application_id").fetchone()[0]
        empty = not do("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and owner != APPLICATION_ID:
            raise StoreError(f"{self.path} is an SQLite file, but no study; it was left as it is. Name another path")
        if version > VERSION:
            raise StoreError(
                f"{self.path} was written by a newer graphopt (version {version} of the file; this one knows {VERSION})"
            )
        if empty and self._lock.before.get("rows"):
            raise _Damaged(f"{self.path} is empty, but held {self._lock.before['rows']} rows")
        do("PRAGMA journal_mode = WAL")
        do(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        if empty:
            do("BEGIN IMMEDIATE")
            _make_tables(self._connection)
            do("COMMIT")

    def _read(self, witness: Mapping[str, Any], damaged: str) -> None:
        """All rows, with their hashes checked."""
        (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _Damaged(f"{self.path} is damaged ({' '.join(found.split())})")
        self._hash, self._seq, self.events = b"", 0, []
        for seq, kind, number, key, body, digest in self._connection.execute("SELECT * FROM event ORDER BY seq"):
            self._hash = next_hash(self._hash, kind, number, key, body)
            if seq != self._seq + 1 or digest != self._hash:
                raise _Damaged(
                    f"{self.path} is damaged: its rows from {self._seq + 1} on are not those that were written"
                )
            self._seq = seq
            self.events.append(Event(kind, number, json.loads(body), key))
        told = int(witness.get("rows", 0))
        if self._seq < told:
            lost = told - self._seq
            text = f"{self.path} lost {lost} of {told} rows, the last {'one' if lost == 1 else 'ones'}"
            if self._seq < int(witness.get("rows_before", told)) and damaged != "accept":
                raise _Damaged(f"{text}, more than a torn last write explains")
            warnings.warn(f"{text}; what they told of is done again", GraphoptWarning, stacklevel=5)

    def _take_over(self) -> None:
        """From here on, whoever opened the file before cannot write to it."""
        do = self._connection.execute
        do("BEGIN IMMEDIATE")
        self.meta = {name: json.loads(value) for name, value in do("SELECT name, value FROM meta")}
        self.epoch = int(self.meta.get("epoch", 0)) + 1
        do("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(self.epoch),))
        do("COMMIT")
        self._tell(self._seq)

    def _tell(self, before: int) -> None:
        self._lock.tell(rows=self._seq, rows_before=before, epoch=self.epoch, started=_STARTED)

    # -- writing ----------------------------------------------------------------------------------------------------

    def add(self, events: Iterable[Event], meta: Mapping[str, Any] | None = None) -> None:
        """Add rows and set values of ``meta``: all of them are on file when this returns, or none if it raises.

        Raises:
            StoreError: the disk is full, the file was deleted or is damaged, or another master took over.
        """
        events = list(events)
        self._require_file()
        digest, seq = self._hash, self._seq
        rows = []
        for event in events:
            body = json.dumps(event.body, separators=(",", ":"))
            digest, seq = next_hash(digest, event.kind, event.number, event.key, body), seq + 1
            rows.append((seq, event.kind, event.number, event.key, body, digest))
        do = self._connection.execute
        try:
            do("BEGIN IMMEDIATE")
            try:
                (epoch,) = do("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
                if int(epoch) != self.epoch:
                    raise StoreError(
                        f"{self.path}: another master has taken over this study (opening {epoch}, this one is "
                        f"{self.epoch}); nothing was written"
                    )
                self._connection.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)", rows)
                for name, value in (meta or {}).items():
                    do("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))
                do("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    do("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error
        before, self._seq, self._hash = self._seq, seq, digest
        self.meta |= dict(meta or {})
        self._tell(before)
        if time.monotonic() - self._last_backup > BACKUP_SECONDS:
            self.back_up()

    def _require_file(self) -> None:
        """The file under this name must be the one that is written to: SQLite would go on writing to a deleted one."""
        if _identity(self.path) != self._identity:
            rescued = _unused(Path(f"{self.path}.rescued"))
            try:
                self._connection.execute("VACUUM INTO ?", (str(rescued),))
                saved = f"its {self._seq} rows were saved to {rescued}; move it back to go on"
            except sqlite3.DatabaseError as error:
                saved = f"its rows could not be saved elsewhere ({error})"
            raise StoreError(f"{self.path} was deleted or replaced while it was in use; {saved}")

    def back_up(self) -> Path:
        """Copy the study to the older of its two backups, whole or not at all. Returns where."""
        targets = [Path(f"{self.path}.backup-{i}") for i in range(2)]
        target = min(targets, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)
        part = Path(f"{target}.part")
        part.unlink(missing_ok=True)
        try:
            self._connection.execute("VACUUM INTO ?", (str(part),))
            os.replace(part, target)
        except (sqlite3.DatabaseError, OSError) as error:
            part.unlink(missing_ok=True)
            warnings.warn(f"no backup of {self.path} could be made: {error}", GraphoptWarning, stacklevel=3)
        self._last_backup, self._backed_up = time.monotonic(), self._seq
        return target

    def close(self) -> None:
        """Back up what was added, close the file and free the lock. Twice is once."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._seq > self._backed_up and _identity(self.path) == self._identity:
                self.back_up()
        finally:
            self._connection.close()
            self._lock.release()

    # -- when it fails ----------------------------------------------------------------------------------------------

    def _error(self, error: sqlite3.DatabaseError) -> StoreError:
        code = _code(error)
        if code == sqlite3.SQLITE_FULL:
            what = "the disk is full: what came last was not written; make room, then resume"
        elif code == sqlite3.SQLITE_READONLY:
            what = "it cannot be written to (read-only); copy the study to a folder where it can"
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            what = f"it is damaged ({error}). {self._advice()}"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = "another program holds a lock on it; close that one"
        elif code == sqlite3.SQLITE_CONSTRAINT:
            what = f"a row was refused ({error}): a model was about to be tried twice"
        else:
            what = f"it cannot be used: {error}"
        return StoreError(f"{self.path}: {what}")

    def _advice(self) -> str:
        found = _backups(self.path)
        if not found:
            return "There is no backup. resume='accept' goes on with what can be read"
        path, rows = found[0]
        return (
            f"The latest backup, {path.name}, has {rows} rows: resume='backup' goes on from it, resume='accept' with "
            "what can be read"
        )

    def _mend(self, what: str, durable: bool, damaged: str) -> None:
        """Open what is left of a damaged file, or its backup."""
        if damaged == "backup":
            warnings.warn(f"{what}; going on from a backup", GraphoptWarning, stacklevel=5)
            self._restore()
        else:
            rows, meta = _readable(self.path)
            told = int(self._lock.before.get("rows", 0))
            if not rows and not told:
                raise StoreError(f"{what}, and nothing in it can be read; it was left as it is. Name another path")
            aside = self._put_aside()
            with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                _make_tables(connection)
                connection.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)", rows)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
                connection.execute("COMMIT")
            of = f" of {told}" if told else ""
            warnings.warn(
                f"{what}; going on with {len(rows)}{of} rows, those before the first bad one. The file as it was is "
                f"{aside}",
                GraphoptWarning,
                stacklevel=5,
            )
        self._lock.before = {}
        self._open(durable, "refuse")

    def _restore(self) -> None:
        """Put the file aside and a copy of the latest backup in its place."""
        found = _backups(self.path)
        if not found:
            raise StoreError(f"{self.path} is damaged, and there is no backup of it")
        self._put_aside()
        with closing(sqlite3.connect(found[0][0])) as source, closing(sqlite3.connect(self.path)) as target:
            source.backup(target)

    def _put_aside(self) -> Path:
        """Give the damaged file, with its log, another name. Returns that."""
        aside = _unused(Path(f"{self.path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
        for suffix in ("-wal", "-shm", ""):  # the log first: left alone it would be taken for that of the new file
            part = Path(f"{self.path}{suffix}")
            if part.exists():
                part.rename(f"{aside}{suffix}")
        return aside


class _Damaged(Exception):
    """Rows are missing or changed."""


_STARTED = time.time()


def read_study(path: str | os.PathLike[str]) -> tuple[list[Event], dict[str, Any], dict[str, Any]]:
    """Events and meta of a study that another process may be writing, and what its lock file tells of that process.

    Raises StoreError where there is no study, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path}: there is no study of this name")
    last: Exception | None = None
    for how in ("mode=ro", "immutable=1"):  # the second for folders where SQLite cannot make its index of the log
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=5.0)) as connection:
                if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                    raise StoreError(f"{path} is no study of graphopt")
                connection.execute("BEGIN")
                rows = connection.execute("SELECT kind, number, body, key FROM event ORDER BY seq")
                events = [Event(kind, number, json.loads(body), key) for kind, number, body, key in rows]
                meta = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM meta")}
                return events, meta, read_witness(Path(f"{path}.lock"))
        except sqlite3.DatabaseError as error:
            last = error
    raise StoreError(f"{path} cannot be read: {last}")


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _readable(path: Path) -> tuple[list[tuple[Any, ...]], list[tuple[str, str]]]:
    """The rows of a damaged file before the first that is missing, changed or cannot be read, and what can be read of
    ``meta``."""
    rows: list[tuple[Any, ...]] = []
    meta: list[tuple[str, str]] = []
    digest = b""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            for row in connection.execute("SELECT seq, kind, number, key, body, hash FROM event ORDER BY seq"):
                digest = next_hash(digest, *row[1:5])
                if row[0] != len(rows) + 1 or row[5] != digest:
                    break
                rows.append(row)
        except (sqlite3.DatabaseError, TypeError, ValueError):
            pass  # the first bad row
        try:
            for name, value in connection.execute("SELECT name, value FROM meta"):
                json.loads(value)
                meta.append((name, value))
        except (sqlite3.DatabaseError, TypeError, ValueError):
            pass  # what came before it is kept
    return rows, meta


def _backups(path: Path) -> list[tuple[Path, int]]:
    """Backups that can be read, with their rows, the fullest first."""
    found = []
    for i in range(2):
        backup = Path(f"{path}.backup-{i}")
        if backup.exists():
            try:
                with closing(sqlite3.connect(f"{backup.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                    found.append((backup, int(connection.execute("SELECT count(*) FROM event").fetchone()[0])))
            except sqlite3.DatabaseError:
                continue  # a damaged backup is none
    return sorted(found, key=lambda pair: -pair[1])


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _unused(path: Path) -> Path:
    number = 0
    while (found := path if not number else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found


def _code(error: sqlite3.DatabaseError) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
