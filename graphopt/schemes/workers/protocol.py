"""How main and a worker talk: frames of JSON over a socket pair, with file descriptors beside them. No pickle.

A frame is the number of the protocol (one byte), the length of the text (four bytes, big-endian) and the text: one JSON
object. Main asks, the worker answers; a worker speaks unasked only to say that it is there, and that it has failed.

===========  ==============================================================  ==================
main says    with                                                            the worker answers
===========  ==============================================================  ==================
(nothing)                                                                    ``hello``: versions
``join``     store, name, processors, timeouts                               ``done``
``load``     job, path of a saved graph                                      ``done`` or ``refused``
``step``     job, number, settings; segments, homes; values (see `shared_memory`)   ``done`` or ``failed``
``forget``   jobs                                                            (nothing)
``close``                                                                    (it ends)
===========  ==============================================================  ==================
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.errors import WorkerError

VERSION = 1
"""The number of the protocol: main and workers of one pool must have the same."""

_HEADER = struct.Struct("!BI")
_MAX_FILES = 64


class Channel:
    """One end of a connection. Sockets stay blocking; who must not wait longer says so to `receive`."""

    def __init__(self, end: socket.socket):
        self.socket = end
        self._arrived = select.poll()
        self._arrived.register(end.fileno(), select.POLLIN)

    def send(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        """Send one message and open files. Raises OSError where the other end is gone."""
        text = json.dumps(message, separators=(",", ":")).encode()
        frame = _HEADER.pack(VERSION, len(text)) + text
        if not files:
            self.socket.sendall(frame)
            return
        # Files travel with the first byte; the rest may need further calls.
        sent = socket.send_fds(self.socket, [frame], list(files))
        self.socket.sendall(frame[sent:])

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], list[int]]:
        """The next message and its files.

        Raises:
            TimeoutError: nothing came within ``seconds``.
            EOFError: the other end is gone.
            WorkerError: the other end speaks another version of the protocol.
        """
        if seconds is not None and not self._arrived.poll(max(0, int(seconds * 1000))):
            raise TimeoutError(f"no message within {seconds:g} s")
        try:
            header, files, _, _ = socket.recv_fds(self.socket, _HEADER.size, _MAX_FILES)
            header += self._read(_HEADER.size - len(header)) if header else b""
            if not header:
                raise EOFError("the other end is gone")
            version, length = _HEADER.unpack(header)
            if version != VERSION:
                raise WorkerError(
                    f"a worker speaks version {version} of the protocol, this process {VERSION}; "
                    "let both run the same release of graphopt"
                )
            return json.loads(self._read(length)), files
        except ConnectionError as error:
            raise EOFError("the other end is gone") from error

    def _read(self, length: int) -> bytes:
        parts = bytearray(length)
        rest = memoryview(parts)
        while rest:
            count = self.socket.recv_into(rest)
            if not count:
                raise EOFError("the other end is gone")
            rest = rest[count:]
        return bytes(parts)

    def close(self) -> None:
        """Close this end."""
        self.socket.close()
