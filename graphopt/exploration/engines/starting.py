"""Which engine runs a search, and how many workers it has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError
from graphopt.exploration.engines import Engine
from graphopt.exploration.engines.inline import InlineEngine
from graphopt.exploration.engines.local import LocalProcesses
from graphopt.exploration.engines.workers import WorkersEngine
from graphopt.exploration.generator import Generator, GeneratorSetup
from graphopt.exploration.payload import of_here, write
from graphopt.exploration.pool import finite_number
from graphopt.exploration.trainer import TrainerSetup

__all__ = ["Where", "start_engine"]

_ENGINES = ("local", "ray", "inline")


@dataclass(frozen=True)
class Where:
    """Where a search runs; see `graphopt.explore` for the arguments. ``threads`` None: the cores are divided.

    Raises ExplorationError for what is no engine, or not an argument of this one.
    """

    on: str = "local"
    workers: int | None = None
    generation: str = "workers"
    devices: Sequence[Any] | None = None
    threads: int | None = None
    resources: Mapping[str, float] | None = None

    @property
    def local_workers(self) -> int:
        """How many this machine runs, asked for or by its devices or cores."""
        return self.workers or (len(self.devices) if self.devices else max(1, _cores() // 2))

    @property
    def threads_of_each(self) -> int | None:
        """Threads of torch in a trainer; None: those of this process."""
        if self.on == "inline":
            return None
        if self.on == "ray":
            return self.threads or max(1, int((self.resources or {}).get("CPU", 1)))
        return self.threads or max(1, _cores() // self.local_workers)

    @property
    def least_seconds(self) -> float:
        """No trial is taken as hanging before: so long it may take until a machine that is gone is known to be."""
        return 30.0 if self.on == "ray" else 2.0

    def __post_init__(self) -> None:
        if self.on not in _ENGINES:
            raise ExplorationError(f"on: expected one of {', '.join(_ENGINES)}, got {self.on!r}")
        if self.generation not in ("workers", "master"):
            raise ExplorationError(f"generation: expected 'workers' or 'master', got {self.generation!r}")
        for name, value in (("workers", self.workers), ("threads", self.threads)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ExplorationError(f"{name}: expected a positive integer, got {value!r}")
        if self.resources is not None:
            if self.on != "ray":
                raise ExplorationError("resources: what a worker takes of a Ray cluster; give on='ray' with it")
            if not all(finite_number(amount) and amount >= 0 for amount in self.resources.values()):
                raise ExplorationError(f"resources: expected amounts by name, as {{'GPU': 1}}, got {self.resources!r}")
        if self.on == "ray" and self.devices:
            raise ExplorationError("devices: on='ray', Ray hands them out; ask for resources={'GPU': 1} instead")


def start_engine(where: Where, generator: GeneratorSetup, trainer: TrainerSetup, folder: Path) -> Engine:
    """Start the processes of a search. ``folder``: for what they need and write; removed by nobody but its owner.

    Raises ExplorationError where they cannot be started, or the search cannot be sent to them.
    """
    if where.on == "inline":
        return InlineEngine(generator, trainer)
    here = Generator(generator) if where.generation == "master" else None
    setups: dict[str, Any] = {"trainer": trainer} | ({"generator": generator} if here is None else {})
    start = _ray if where.on == "ray" else _local
    return start(where, setups, here, folder)


def _local(where: Where, setups: Mapping[str, Any], here: Generator | None, folder: Path) -> Engine:
    devices, workers = where.devices, where.local_workers
    environment = [_threads(where) for _ in range(workers)]
    for slot, variables in enumerate(environment):
        if devices:
            variables["CUDA_VISIBLE_DEVICES"] = str(devices[slot % len(devices)])
    payloads = {kind: folder / f"{kind}.payload" for kind in setups}
    for kind, setup in setups.items():
        write(payloads[kind], of_here(setup))
    processes = LocalProcesses(payloads, folder / "logs", dict(enumerate(environment)))
    return WorkersEngine(processes, workers=workers, here=here)


def _ray(where: Where, setups: Mapping[str, Any], here: Generator | None, folder: Path) -> Engine:
    try:
        import ray

        from graphopt.exploration.engines.joining import join, room_for
        from graphopt.exploration.engines.ray import RayProcesses
    except ImportError as error:
        raise ExplorationError(f"on='ray' needs Ray: pip install 'graphopt[ray]' ({error})") from error
    folder.mkdir(parents=True, exist_ok=True)  # hosts that find it write their logs there
    resources = dict(where.resources or {})
    cpus = float(resources.setdefault("CPU", where.threads or 1))
    begun_here = join(where.workers, cpus)
    try:
        processes = RayProcesses(
            setups, folder=folder, environment=_threads(where), resources=resources,
            begun_here=begun_here,
        )  # fmt: skip
    except BaseException:
        if begun_here:
            ray.shutdown()
        raise
    return WorkersEngine(processes, workers=where.workers or room_for(resources), here=here, alike=False)


def _threads(where: Where) -> dict[str, str]:
    count = where.threads_of_each
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
