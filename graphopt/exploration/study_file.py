"""The file of a study: its tables, what a row is, and reading it while another process writes.

Every event (a model was generated, started, ended ...) is a row; rows are only ever added. Each holds the hash of all
rows before it and itself, so that a changed or missing row is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import StoreError
from graphopt.exploration.lock import read_witness

__all__ = ["APPLICATION_ID", "INSERT", "VERSION", "Event", "make_tables", "next_hash", "read_study"]

APPLICATION_ID = 0x67726578  # "grex"
VERSION = 1
INSERT = "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)"

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


def make_tables(connection: sqlite3.Connection) -> None:
    """The tables of an empty file; within a transaction of the caller."""
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


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
