"""One master a study: a lock that the kernel frees when its holder ends, however it ends.

Beside the lock, its file says who holds it, and what the last write to the store was: a witness outside of the
database, by which a store that lost rows is told from one that never had them.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from graphopt.errors import StoreError

__all__ = ["Lock", "read_witness"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_LENGTH = 512  # of the text: written in one piece, over the last one


class Lock:
    """Held from the constructor to `release`.

    Raises:
        StoreError: another process holds it (named with its host), the folder cannot be written to, or its file system
            has no locks.
    """

    def __init__(self, path: Path):
        self.path = path
        if fcntl is None:
            raise StoreError(f"{path}: this system has no fcntl locks, which a study on file needs; use store=None")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"the study cannot be opened for writing: {path}: {error.strerror}; name a folder that can be written "
                "to, or copy the study there"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if error.errno in _NO_LOCKS:
                raise StoreError(
                    f"{path}: this file system has no locks ({error.strerror}); keep the study on a local disk"
                ) from error
            raise StoreError(_held(path)) from error
        self.before = read_witness(path)

    def tell(self, **facts: Any) -> None:
        """Write who holds the lock and what it did last. Survives the end of this process, however it ends.

        Raises StoreError where that cannot be written: the disk is full, for example.
        """
        told = {"pid": os.getpid(), "host": socket.gethostname(), **facts}
        try:
            os.pwrite(self._file, json.dumps(told).encode().ljust(_LENGTH), 0)
        except OSError as error:  # the first time only, mostly: later it takes no room
            raise StoreError(f"{self.path} cannot be written to: {error.strerror}") from error

    def release(self) -> None:
        """Free the lock. The file stays: removing it would let two processes hold two locks of one name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_witness(path: Path) -> dict[str, Any]:
    """What the last holder told; empty where nothing legible is there."""
    try:
        found = json.loads(path.read_bytes()[:_LENGTH].decode())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(path: Path) -> str:
    holder = read_witness(path)
    since = f", since {time.strftime('%H:%M:%S', time.localtime(holder['started']))}" if "started" in holder else ""
    who = f"process {holder['pid']} on {holder['host']}{since}" if "pid" in holder else "another process"
    return f"{path.with_suffix('')} is in use by {who}: a study has one master. Wait for it, or end it"
