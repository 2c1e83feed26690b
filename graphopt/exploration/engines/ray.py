"""Processes of the machines of a Ray cluster (Ray core alone; ``pip install graphopt[ray]``).

Each worker is one actor, its `Host`, placed by Ray where there is room for what the worker takes. The host runs the
worker's trainer and generator as the local engine does, as child processes in sessions of their own. So a trial that
crashes costs a child and not a place in the cluster; what ended it is known (a signal, an exit code, its last words);
and what it started ends with it, which `ray.kill` does not see to. The master hears of a host by one call that waits
there until there is something to tell.

Ray repeats nothing (``max_restarts=0``, ``max_task_retries=0``): attempts are counted in the store. A host that is
gone, with its machine or alone, is made anew, and waits until Ray has room for it: so do workers beyond what the
cluster can hold, for machines that join later.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError

from graphopt.errors import ExplorationError, GraphoptWarning
from graphopt.exploration.engines.joining import TOKENS, held
from graphopt.exploration.engines.local import LocalProcesses
from graphopt.exploration.engines.workers import Lost, Message
from graphopt.exploration.payload import of_afar
from graphopt.exploration.processes import Child

__all__ = ["RayProcesses"]

_SAY_AFTER = 30.0
_GOODBYE = 3.0


class Host:
    """The actor of a worker. Its methods run in one thread, in turn (they are coroutines).

    Args:
        slot: of the worker. environment: variables for its processes.
        folder: of the search on the master's machine: where there is such a folder, logs are written to it.
        payloads: what each kind of process needs.
    """

    def __init__(self, slot: int, environment: Mapping[str, str], folder: str, *payloads: bytes):
        self._slot = slot
        self._heard: list[tuple[int, Message | Lost]] = []
        self._news = asyncio.Event()
        self._numbers: dict[Child, int] = {}
        self._children: dict[int, Child] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="graphopt-host-")
        logs = Path(folder) / "logs" if os.path.isdir(folder) else Path(self._temporary.name)
        # Files without a name: they are gone with this process, however it ends. Its children find them by its number.
        self._files = {kind: tempfile.TemporaryFile() for kind, _ in zip(("trainer", "generator"), payloads)}  # noqa: SIM115
        for file, payload in zip(self._files.values(), payloads):
            file.write(payload)
            file.flush()
        paths = {kind: Path(f"/proc/{os.getpid()}/fd/{file.fileno()}") for kind, file in self._files.items()}
        # Its children import what it can import itself: what Ray brought here, and what is installed here.
        environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._processes = LocalProcesses(paths, logs, {slot: environment}, owns_payloads=False)
        self._watched = False

    async def spawn(self, number: int, kind: str) -> None:
        """Start a process, which is called ``number`` from now on."""
        if not self._watched:
            asyncio.get_running_loop().add_reader(self._processes.fileno(), self._hear)
            self._watched = True
        try:
            child = self._processes.spawn(kind, self._slot)
        except ExplorationError as error:
            self._tell([(number, Lost(str(error), False))])
            return
        self._children[number], self._numbers[child] = child, number

    async def send(self, number: int, messages: Sequence[Message]) -> None:
        """Hand messages on."""
        if (child := self._children.get(number)) is not None:
            self._processes.send(child, messages)

    async def kill(self, number: int) -> None:
        """End a process and all that it started."""
        if (child := self._children.pop(number, None)) is not None:
            del self._numbers[child]
            self._processes.kill(child)

    async def listen(self) -> list[tuple[int, Message | Lost]]:
        """What happened since the last call; waits until there is something."""
        await self._news.wait()
        self._news.clear()
        heard, self._heard = self._heard, []
        return heard

    async def close(self) -> None:
        """End all processes."""
        self._processes.close()
        self._temporary.cleanup()

    def _hear(self) -> None:
        found = [(self._numbers[child], said) for child, said in self._processes.wait(0.0)]
        for number, said in found:
            if isinstance(said, Lost):
                del self._numbers[self._children.pop(number)]
        self._tell(found)

    def _tell(self, found: list[tuple[int, Message | Lost]]) -> None:
        if found:
            self._heard += found
            self._news.set()


@dataclass(eq=False)
class _Placed:
    """A host, as the master sees it. ``numbers``: of its processes that may be heard of."""

    slot: int
    actor: Any
    numbers: set[int] = field(default_factory=set)
    reached: bool = False


class RayProcesses:
    """See `graphopt.exploration.engines.workers.Processes`; a process is a number.

    Args:
        setups: what each kind of process needs, the trainer first.
        folder: for logs, where it is on the worker's machine too.
        environment: variables for the processes of a worker.
        resources: what a worker takes of the cluster: ``CPU``, ``GPU`` and tags of machines.
        begun_here: whether the cluster is this process's own, to be ended with the search.
    """

    def __init__(
        self,
        setups: Mapping[str, Any],
        *,
        folder: Path,
        environment: Mapping[str, str],
        resources: Mapping[str, float],
        begun_here: bool,
    ):
        self._begun_here = begun_here
        self._closed = False
        self._placed: dict[int, _Placed] = {}
        self._of: dict[int, _Placed] = {}
        self._listening: dict[Any, _Placed] = {}
        self._count = 0
        self._resources = dict(resources)
        self._told, self._begun = False, time.monotonic()
        self._payloads = [ray.put(of_afar(setup, cloudpickle.dumps)) for setup in setups.values()]
        others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        self._actor = ray.remote(Host).options(
            num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), resources=others,
            max_restarts=0, max_task_retries=0,
        )  # fmt: skip
        self._arguments = (dict(environment), str(folder.absolute()))

    def spawn(self, kind: str, slot: int) -> int:
        self._count += 1
        placed = self._placed.get(slot)
        if placed is None:
            actor = self._actor.remote(slot, *self._arguments, *self._payloads)
            placed = self._placed[slot] = _Placed(slot, actor)
            self._listen(placed)
        placed.numbers.add(self._count)
        self._of[self._count] = placed
        placed.actor.spawn.remote(self._count, kind)
        return self._count

    def send(self, process: int, messages: Sequence[Message]) -> None:
        if (placed := self._of.get(process)) is not None:
            placed.actor.send.remote(process, list(messages))

    def wait(self, seconds: float) -> list[tuple[int, Message | Lost]]:
        waited = list(self._listening)
        ready, rest = ray.wait(waited, num_returns=1, timeout=seconds)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        heard: list[tuple[int, Message | Lost]] = []
        for call in ready:
            placed = self._listening.pop(call)
            try:
                told = ray.get(call)
            except RayError as error:
                heard += self._host_lost(placed, error)
                continue
            placed.reached = True
            self._listen(placed)
            for number, said in told:
                if number in placed.numbers:
                    heard.append((number, said))
                    if isinstance(said, Lost):
                        self._forget(number)
        self._say_who_waits()
        return heard

    def kill(self, process: int) -> None:
        if (placed := self._of.get(process)) is not None:
            self._forget(process)
            placed.actor.kill.remote(process)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        hosts = list(self._placed.values())
        goodbyes = [placed.actor.close.remote() for placed in hosts if placed.reached]
        try:
            if goodbyes:
                ray.wait(goodbyes, num_returns=len(goodbyes), timeout=_GOODBYE)
        finally:
            for placed in hosts:  # also those that still wait for a place
                _end(placed.actor)
            self._placed.clear()
            self._of.clear()
            self._listening.clear()
            self._payloads.clear()
            if self._begun_here:
                ray.shutdown()

    # -- hosts ------------------------------------------------------------------------------------------------------

    def _listen(self, placed: _Placed) -> None:
        self._listening[placed.actor.listen.remote()] = placed

    def _forget(self, number: int) -> None:
        self._of.pop(number).numbers.discard(number)

    def _host_lost(self, placed: _Placed, error: RayError) -> list[tuple[int, Message | Lost]]:
        """Its processes are gone too, or will be at once: they end with their connection to it."""
        _end(placed.actor)  # it may be out of reach only: it must not go on with a trial that is begun elsewhere
        del self._placed[placed.slot]
        # An actor that could not be made at all will not be made elsewhere either.
        killed = isinstance(error, RayActorError) and placed.reached
        cause = f"its host is gone: {error}"
        if "all references to the actor were removed" in cause:  # they were not: the cluster cannot ask this process
            cause += f"\nThe cluster cannot reach this process, or does not trust it{TOKENS}"
        heard = [(number, Lost(cause, killed)) for number in sorted(placed.numbers)]
        for number in list(placed.numbers):
            self._forget(number)
        return list(heard)

    def _say_who_waits(self) -> None:
        if self._told or time.monotonic() - self._begun < _SAY_AFTER:
            return
        self._told = True
        waiting = sum(not placed.reached for placed in self._placed.values())
        if waiting:
            warnings.warn(
                f"{waiting} of {len(self._placed)} workers wait for a place in the Ray cluster: each takes "
                f"{self._resources}, and the cluster has {held()}. They begin when machines join, or "
                "others end; resources= says what a worker takes",
                GraphoptWarning,
            )


def _end(actor: Any) -> None:
    """End an actor, wherever it is and whether it has begun."""
    try:
        ray.kill(actor)
    except RayError:
        pass  # it never began, and will not
