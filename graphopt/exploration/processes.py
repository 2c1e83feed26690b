"""A child process of the search, as the master sees it: ``python -m graphopt.exploration.worker``.

As in `graphopt.schemes.workers`: children are started anew (never forked: devices and locks do not survive that),
ignore Ctrl-C, write to a file, and end when the master is gone. Unlike there, they run the user's code, which travels
as pickle; each is the leader of a session of its own, so that what a trial started ends with it.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError

__all__ = ["Child"]

_LINES = 12


class Child:
    """A process and the connection to it.

    Args:
        kind: ``trainer`` or ``generator``.
        payload: what `payload.write` wrote.
        log: a file that its output is appended to.
        environment: variables beside those of this process.
    """

    def __init__(self, kind: str, payload: Path, log: Path, environment: Mapping[str, str]):
        self.hung_up = False
        self._log = log
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-P", "-m", "graphopt.exploration.worker", "--kind", kind,
            "--connection", str(theirs.fileno()), "--payload", str(payload),
        ]  # fmt: skip
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child ignores it
        try:
            with open(log, "ab") as output:
                self._log_begin = output.tell()
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs.fileno()],
                    env=os.environ | _imports_as_here() | dict(environment), start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise ExplorationError(f"cannot start a {kind} with {sys.executable!r}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.connection = Connection(ours.detach())
        # The end of the connection tells of the end of the process, unless a child of the child still holds it.
        self.end = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message. One to a process that is gone is lost: that it is gone is told by `Child.gone`."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def received(self) -> list[tuple[Any, ...]]:
        """All messages that are there. ``hung_up`` is set where the other end is closed: nothing will follow."""
        found = []
        try:
            while self.connection.poll(0):
                found.append(self.connection.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            self.hung_up = True  # what was sent whole is found
        return found

    def files(self) -> list[int]:
        """Descriptors that can be read from when it said something, or is gone."""
        return [self.connection.fileno(), *([] if self.end is None else [self.end])]

    def gone(self) -> bool:
        """Whether the process has ended. It is not reaped yet: until `kill`, its number is that of its session."""
        if self.process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else has reaped it
            return True

    def kill(self) -> None:
        """End the process and all that it started, at once, and give back what belongs to it."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # nobody is left in it
        self.process.wait()
        self.connection.close()
        if self.end is not None:
            os.close(self.end)
            self.end = None

    def cause(self) -> tuple[str, bool]:
        """What ended the process, and whether it was a signal that others send."""
        code = self.process.returncode
        if code is None or code >= 0:
            text, killed = f"its process ended with exit code {code}", False
        else:
            name = signal.Signals(-code).name
            killed = -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
            hint = " (so does the system when memory runs out)" if -code == signal.SIGKILL else ""
            text = f"its process was killed by {name}{hint}"
        return (f"{text}; it wrote last:\n{tail}" if (tail := self._tail()) else text), killed

    def _tail(self) -> str:
        try:
            with open(self._log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_begin, size - 4096))
                lines = file.read().decode(errors="replace").rstrip().splitlines()[-_LINES:]
        except OSError:
            return ""
        return "\n".join("    " + line for line in lines)


def _imports_as_here() -> dict[str, str]:
    """Variables by which a child finds this graphopt; ``sys.path`` follows with the payload."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONFAULTHANDLER": "1",
    }
