"""What is left of a damaged study: rows before the first bad one, backups, and a name for the file as it was.

Nothing is thrown away: a file that is replaced is put aside first.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from graphopt.errors import StoreError
from graphopt.exploration.study_file import INSERT, make_tables, next_hash

__all__ = ["advice", "keep_readable", "put_aside", "restore_backup", "unused"]


def advice(path: Path) -> str:
    """What can be done about a damaged study, as a sentence for its error."""
    found = _backups(path)
    if not found:
        return "There is no backup. resume='accept' goes on with what can be read"
    backup, rows = found[0]
    return (
        f"The latest backup, {backup.name}, has {rows} rows: resume='backup' goes on from it, resume='accept' with "
        "what can be read"
    )


def keep_readable(path: Path, told: int) -> tuple[int, Path]:
    """Put the file aside, and in its place one with the rows before the first bad one. ``told``: how many rows it is
    known to have had. Returns how many are left, and where the file as it was is now.

    Raises StoreError, and leaves it as it is, where nothing says that it ever was a study.
    """
    rows, meta = _readable(path)
    if not rows and not told:
        raise StoreError("nothing in it can be read; it was left as it is. Name another path")
    aside = put_aside(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        make_tables(connection)
        connection.executemany(INSERT, rows)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        connection.execute("COMMIT")
    return len(rows), aside


def restore_backup(path: Path) -> None:
    """Put the file aside and a copy of the latest backup in its place. Raises StoreError where there is none."""
    found = _backups(path)
    if not found:
        raise StoreError(f"{path} is damaged, and there is no backup of it")
    put_aside(path)
    with closing(sqlite3.connect(found[0][0])) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def put_aside(path: Path) -> Path:
    """Give a damaged file, with its log, another name. Returns that."""
    aside = unused(Path(f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
    for suffix in ("-wal", "-shm", ""):  # the log first: left alone it would be taken for that of the new file
        part = Path(f"{path}{suffix}")
        if part.exists():
            part.rename(f"{aside}{suffix}")
    return aside


def unused(path: Path) -> Path:
    """``path``, or the same with a number where there is such a file."""
    number = 0
    while (found := path if not number else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found


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
