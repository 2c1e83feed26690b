"""One worker as main sees it: its process, its connection, and what can be said of its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import POLLHUP, poll
from typing import IO, Any

from graphopt.errors import WorkerError
from graphopt.schemes.workers.protocol import Channel
from graphopt.schemes.workers.shared_memory import Parcel

_OF_A_COLLECTIVE = re.compile(r"gloo/(transport|rendezvous)|Connection (closed|reset) by peer")
_LINES = 12  # of a traceback or of what a worker wrote, in an error


class Worker:
    """A worker process of main. ``failed``: the traceback it sent before it ended; ``killed``: main has ended it.
    ``parcel``: what it gets for a step alone."""

    def __init__(self, processor: int, threads: int, directory: Path):
        """Start the process, which says hello when it has imported torch. Raises WorkerError where that cannot be."""
        self.processor = processor
        self.killed = self.stopped = False
        self.failed: str | None = None
        self.parcel = Parcel()
        self._written = ""
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        command = [
            sys.executable, "-P", "-m", "graphopt.schemes.workers", "--connection", str(theirs.fileno()),
            "--directory", str(directory), "--threads", str(threads), "--processor", str(processor),
        ]  # fmt: skip
        try:
            with _interrupts_blocked():  # which the process inherits: no Ctrl-C can end it while it starts
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
                    pass_fds=[theirs.fileno()], env=_environment(threads),
                )  # fmt: skip
        except OSError as error:
            self.channel.close()
            self._output.close()
            raise WorkerError(f"cannot start a worker with {sys.executable!r}: {error}") from error
        finally:
            theirs.close()

    def __str__(self) -> str:
        return f"processor {self.processor} (process {self.process.pid})"

    def tell(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        """Send a message. Raises EOFError where the worker is gone."""
        try:
            self.channel.send(message, files)
        except OSError as error:
            raise EOFError(f"{self} is gone") from error

    def answer(self) -> dict[str, Any]:
        """Wait for what it says. Raises EOFError where it is gone or has failed."""
        message, _ = self.channel.receive()
        if "failed" in message:
            self.failed = message["failed"]
            raise EOFError(f"{self} has failed")
        return message

    def kill(self) -> None:
        """End the process at once, also a stopped one."""
        if not self.killed and self.process.poll() is None:
            # One whose end of the connection is closed already is about to be gone by itself.
            self.killed = not self._hung_up()
            self.stopped = _is_stopped(self.process.pid)
            self.process.kill()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process, so long at most."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return  # the caller kills it

    def close(self) -> None:
        """Wait for the end of the process and keep what it left behind."""
        self.process.wait()
        try:
            while self.failed is None:
                self.answer()  # what it said before
        except (EOFError, WorkerError):
            pass  # that was all
        self._written = _tail(self._output)
        self.channel.close()
        self._output.close()

    def cause(self) -> tuple[int, str] | None:
        """What ended a closed worker, with a rank: the lower, the likelier it is the cause of other failures too. None
        where main ended it."""
        if self.failed is not None:
            rank = 2 if of_a_collective(self.failed) else 0
            return rank, f"{self} failed:\n{_last_lines(self.failed)}"
        if self.killed:
            return None
        code = self.process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (so does the system when memory runs out)" if name == "SIGKILL" else ""
            text = f"{self} was killed by {name}{hint}"
        else:
            text = f"{self} ended with exit code {code}"
        return 1, text + (f"; it wrote last:\n{self._written}" if self._written else "")

    def _hung_up(self) -> bool:
        signs = poll()
        signs.register(self.channel.socket.fileno(), POLLHUP)
        return bool(signs.poll(0))


def of_a_collective(text: str) -> bool:
    """Whether an error is that of a collective whose peer is gone: a consequence, not a cause."""
    return _OF_A_COLLECTIVE.search(text) is not None


def _last_lines(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-_LINES:])


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 14)))
    text = file.read().decode(errors="replace")
    _, crash, after = text.rpartition("Fatal Python error")
    if crash:  # faulthandler says first what it was and where
        return _last_lines(crash + "\n".join(after.splitlines()[:_LINES]))
    return _last_lines(text)


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, Ctrl-Z), where the system tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _environment(threads: int) -> dict[str, str]:
    """The environment of a worker: imports as here, few threads from the start, no device, no part in another job."""
    outside = re.compile(r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_.*|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PYTHONINSPECT")
    kept = {name: value for name, value in os.environ.items() if not outside.fullmatch(name)}
    root = str(Path(__file__).resolve().parents[3])  # where graphopt was imported from
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    count = str(threads)
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "CUDA_VISIBLE_DEVICES": "",
    }


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
