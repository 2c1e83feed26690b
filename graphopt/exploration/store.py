"""`Store`: a study on file, opened for writing.

One SQLite file in WAL mode, written by one process (`study_file` says what its rows are). What is read there and not
elsewhere:

- **One writer.** The lock is the kernel's (`Lock`). The number of openings, the epoch, is kept in the file and looked
  at in each transaction: a master that another one took over from (its lock file was removed, say) cannot write.
- **Nothing is lost in silence.** The lock file tells what the last write was. A file whose tail is torn opens and says
  which rows are gone, if these are of the last transaction; if more are gone, or rows in the middle, it is refused.
- **Backups** are made in turn beside it (``.backup-0``, ``.backup-1``), every ten minutes and at the end, and named
  when the file is refused (`salvage`).
- A file that is deleted while it is used is saved under another name before the error.

`synchronous=NORMAL` survives the end of the process by any signal; ``durable=True`` survives a power failure too.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptWarning, StoreError
from graphopt.exploration.lock import Lock
from graphopt.exploration.salvage import advice, keep_readable, restore_backup, unused
from graphopt.exploration.study_file import APPLICATION_ID, INSERT, VERSION, Event, make_tables, next_hash

__all__ = ["Store"]

BACKUP_SECONDS = 600.0


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
                raise StoreError(f"{self.path} is gone: it held {witness['rows']} rows. {advice(self.path)}")
            restore_backup(self.path)
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
                raise StoreError(f"{error}. {advice(self.path)}") from error
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
            make_tables(self._connection)
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
                self._connection.executemany(INSERT, rows)
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
            rescued = unused(Path(f"{self.path}.rescued"))
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
            what = f"it is damaged ({error}). {advice(self.path)}"
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            what = "another program holds a lock on it; close that one"
        elif code == sqlite3.SQLITE_CONSTRAINT:
            what = f"a row was refused ({error}): a model was about to be tried twice"
        else:
            what = f"it cannot be used: {error}"
        return StoreError(f"{self.path}: {what}")

    def _mend(self, what: str, durable: bool, damaged: str) -> None:
        """Open what is left of a damaged file, or its backup."""
        if damaged == "backup":
            warnings.warn(f"{what}; going on from a backup", GraphoptWarning, stacklevel=5)
            restore_backup(self.path)
        else:
            told = int(self._lock.before.get("rows", 0))
            try:
                kept, aside = keep_readable(self.path, told)
            except StoreError as error:
                raise StoreError(f"{what}, and {error}") from error
            of = f" of {told}" if told else ""
            warnings.warn(
                f"{what}; going on with {kept}{of} rows, those before the first bad one. The file as it was is {aside}",
                GraphoptWarning,
                stacklevel=5,
            )
        self._lock.before = {}
        self._open(durable, "refuse")


class _Damaged(Exception):
    """Rows are missing or changed."""


_STARTED = time.time()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _code(error: sqlite3.DatabaseError) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
