"""Processes of this machine: no services, nothing to install. Heard of by their connections and their ends."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.exploration.engines.workers import Lost, Message
from graphopt.exploration.processes import Child

__all__ = ["LocalProcesses"]

_PIDFD = hasattr(os, "pidfd_open")
_TICK = 0.25 if _PIDFD else 0.05  # without pidfd, ends of processes are looked for


class LocalProcesses:
    """See `graphopt.exploration.engines.workers.Processes`.

    Args:
        payloads: files with what each kind of process needs (`payload.write`).
        logs: folder for what they write.
        environment: variables for the processes of a slot, by its number: a device of its own, for example.
        owns_payloads: whether the files are removed at the end.
    """

    def __init__(
        self,
        payloads: Mapping[str, Path],
        logs: Path,
        environment: Mapping[int, Mapping[str, str]],
        *,
        owns_payloads: bool = True,
    ):
        self._payloads, self._logs, self._environment = payloads, logs, environment
        self._owns_payloads = owns_payloads
        self._selector = selectors.DefaultSelector()
        self._children: set[Child] = set()

    def fileno(self) -> int:
        """A descriptor that can be read from when something is to be heard. Not on every system."""
        return self._selector.fileno()  # type: ignore[attr-defined,no-any-return]

    def spawn(self, kind: str, slot: int) -> Child:
        child = Child(kind, self._payloads[kind], self._logs / f"{kind}-{slot}.log", self._environment[slot])
        self._children.add(child)
        for file in child.files():
            self._selector.register(file, selectors.EVENT_READ, child)
        return child

    def send(self, process: Child, messages: Sequence[Message]) -> None:
        for message in messages:
            process.send(message)

    def wait(self, seconds: float) -> list[tuple[Child, Message | Lost]]:
        until = time.monotonic() + seconds
        heard: list[tuple[Child, Message | Lost]] = []
        while not heard:
            left = until - time.monotonic()
            signs = self._selector.select(max(0.0, min(left, _TICK)))
            for child in dict.fromkeys(key.data for key, _ in signs):
                heard += self._hear(child)
            if not signs and not _PIDFD:
                for child in [child for child in self._children if child.gone()]:
                    heard += self._hear(child)
            if left <= 0:
                break
        return heard

    def _hear(self, child: Child) -> list[tuple[Child, Message | Lost]]:
        gone = child.gone()  # before its messages are read: one that is gone has said all
        heard: list[tuple[Child, Message | Lost]] = [(child, message) for message in child.received()]
        if gone or child.hung_up:
            self.kill(child)
            heard.append((child, Lost(*child.cause())))
        return heard

    def kill(self, process: Child) -> None:
        if process in self._children:
            self._children.remove(process)
            for file in process.files():
                self._selector.unregister(file)
            process.kill()

    def close(self) -> None:
        for child in list(self._children):
            self.kill(child)
        self._selector.close()
        if self._owns_payloads:
            for path in self._payloads.values():
                path.unlink(missing_ok=True)
