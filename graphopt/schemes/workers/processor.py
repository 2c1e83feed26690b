"""What a worker does: joins the other processors, loads graphs, runs its part of each step.

It runs nothing but the operators of the graphs it is sent. It never commits anything: what it gives goes to main by
the collectives in the graph, or is put into memory that main reads; the rest is dropped.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from select import POLLHUP, poll
from typing import Any

import torch

from graphopt.errors import GraphoptError
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.torch_internals import join_processes
from graphopt.graph.training_graph import TrainingGraph
from graphopt.schemes.workers.protocol import Channel
from graphopt.schemes.workers.settings import apply
from graphopt.schemes.workers.shared_memory import Segment

MAX_REPORT = 1 << 14
"""Characters of a traceback that are sent."""


@dataclass
class Loaded:
    """A graph and what it was last given: ``common``, values that are the same on all processors, by position."""

    lowered: Lowered
    arguments: list[Any]
    common: list[int]
    own: list[int]
    random: bool
    gathered: list[tuple[int, Any]]
    outbox: Segment | None = None
    homes: list[int] = field(default_factory=list)


class Processor:
    """A worker: answers messages until main says ``close`` or is gone."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._jobs: dict[int, Loaded] = {}
        self._segments: list[Segment] = []
        self._homes: dict[int, torch.Tensor] = {}
        self._parcel: Segment | None = None
        self._group: Any = None  # collectives find it by name as long as it is kept

    def run(self) -> int:
        """Answer until main says ``close`` (0), or until a step fails (1): then the process must end, so that nobody
        waits for its part of a collective. Raises EOFError or OSError when main is gone."""
        while True:
            message, files = self._channel.receive()
            do = message["do"]
            if do == "step":
                try:
                    self._step(message, files)
                except BaseException:
                    self._channel.send({"failed": traceback.format_exc()[-MAX_REPORT:]})
                    return 1
                self._channel.send({"done": message["number"]})
            elif do == "close":
                return 0
            elif do == "forget":
                for job in message["jobs"]:
                    self._jobs.pop(job, None)
            else:
                self._channel.send(self._prepare(do, message))

    def _prepare(self, do: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Join or load. What goes wrong is told; the worker goes on."""
        try:
            if do == "join":
                self._group = join_processes(*message["join"])
            elif do == "load":
                self._load(message)
            else:
                return {"refused": f"unknown message {do!r}"}
        except GraphoptError as error:
            return {"refused": str(error)}
        except Exception:
            return {"refused": traceback.format_exc()[-MAX_REPORT:]}
        return {"done": do}

    def _load(self, message: Mapping[str, Any]) -> None:
        graph = TrainingGraph.load(message["path"])
        lowered = lower(graph, in_place=False)
        arguments = [None] * len(graph.inputs)
        self._jobs[message["job"]] = Loaded(
            lowered, arguments, message["common"], message["own"], message["random"], message["gathered"]
        )

    def _step(self, message: Mapping[str, Any], files: list[int]) -> None:
        if "settings" in message:
            apply(message["settings"])
        received = [Segment.received(file) for file in files]
        if message.get("outbox"):
            self._jobs[message["job"]].outbox = received.pop()
        if message.get("parcel"):
            self._parcel = received.pop()
        self._segments += received
        for number, segment, place in message.get("homes", ()):
            self._homes[number] = self._segments[segment].view(place)
        job = self._jobs[message["job"]]
        if "common" in message:
            for position, value in zip(job.common, message["common"], strict=True):
                job.arguments[position] = self._value(value)
        for position, value in zip(job.own, message["own"], strict=True):
            job.arguments[position] = self._value(value)
        if job.random:
            assert self._parcel is not None
            torch.set_rng_state(self._parcel.view(message["random"]).clone())
        with torch.no_grad():
            results = job.lowered.run(*job.arguments)
            for position, place in job.gathered:
                assert job.outbox is not None
                job.outbox.view(place).copy_(results[position])

    def _value(self, value: Any) -> Any:
        """A number as it is; ``{"home": number}`` and ``{"place": place}`` are tensors."""
        if not isinstance(value, dict):
            return value
        if "home" in value:
            return self._homes[value["home"]]
        assert self._parcel is not None
        return self._parcel.view(value["place"])


def follow_main(channel: Channel, directory: str) -> None:
    """End this process when main is gone, whatever it is doing: a thread that looks at the connection.

    A child that main forked may hold main's end open beyond its death, so the parent is looked at too.
    """
    parent = os.getppid()

    def look() -> None:
        gone = poll()
        gone.register(channel.socket.fileno(), POLLHUP)
        while not gone.poll(1000) and os.getppid() == parent:
            pass
        main_is_gone(directory)
        os._exit(0)

    threading.Thread(target=look, daemon=True, name="follow main").start()


def main_is_gone(directory: str) -> None:
    """Remove the files that main made for its workers and cannot remove any more."""
    shutil.rmtree(directory, ignore_errors=True)


def ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; main decides what it means. Main started this one with the signal
    blocked, so that none could come before this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
