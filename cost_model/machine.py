"""`Machine`: what a processor can do, from a data sheet or measured on it, and how far that may be trusted."""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from graphopt.cost_model.cache import cache_dir
from graphopt.cost_model.communication import Link
from graphopt.cost_model.curves import Curve
from graphopt.cost_model.datasheets import DataSheet, lookup
from graphopt.cost_model.kernels import CONVOLUTIONS, Family
from graphopt.errors import GraphoptWarning

VERSION = 6
"""Of the calibration file; another one is measured anew."""


LAUNCHES = (
    *(f"eager {phase}{kind}" for phase in ("forward", "backward", "update") for kind in ("", " view")),
    *("flat", "view", "compiled", "item"),
)
"""Kinds of launches: of autograd by phase, of straight-line code (``flat``, ``view``), of a compiled kernel, and of
each further tensor in a list that an operator goes through (``item``)."""


@dataclass(frozen=True, eq=False)
class Machine:
    """One processor, as prices see it.

    Attributes:
        name: of the processor, for people.
        device: ``cpu`` or ``cuda``.
        curves: seconds of kernels, by family (`graphopt.cost_model.curves.Curve`).
        relative: seconds of operators (``tanh``) relative to the curve of their family; 1 for one that is not here.
        launch: seconds of the host for each operator, by way of running, phase and kind (`LAUNCHES`).
        asynchronous: launches overlap with kernels (a GPU); on a CPU they add up.
        touch: seconds for each byte of memory that the operating system gives anew in each step.
        largest: bytes from which on a block is not kept by the allocator when it is freed; 0: all are kept.
        cache_bytes: of the caches that an update may stay in from one step to the next; 0 where it makes no difference.
        memory_bytes: how much there is.
        scales: corrections of groups of terms, fitted to whole steps (`graphopt.cost_model.fit`).
        spread: half-width of the 90 % interval of a step's seconds, in log; 0.3 means from 0.74 to 1.35 times.
        compile_seconds: of a compiler: (fixed, for each operator).
        tf32: float32 products run in TF32.
        link: to the next processor of this kind, None if there is none.
        fingerprint: what the figures hold for: hardware, torch, threads. Empty for a data sheet.
        measured: when, ISO 8601; empty for a data sheet.
        source: where the figures come from.
    """

    name: str
    device: str
    curves: Mapping[Family, Curve]
    launch: Mapping[str, float]
    memory_bytes: int
    asynchronous: bool = False
    relative: Mapping[str, float] = field(default_factory=dict)
    touch: float = 0.0
    largest: int = 0
    cache_bytes: int = 0
    scales: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.5
    compile_seconds: tuple[float, float] = (5.0, 0.05)
    tf32: bool = False
    link: Link | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""
    source: str = ""

    @property
    def threads(self) -> int | None:
        """Of torch, on which some kernels of a CPU depend; None for a GPU."""
        return int(self.fingerprint.get("threads", 1)) if self.device == "cpu" else None

    @staticmethod
    def named(name: str, *, tf32: bool = False) -> Machine:
        """A processor that is not here, from its data sheet: ``Machine.named("H100")``.

        Prices of it are blind: an interval of a factor of about 1.6 on each side. Raises CostModelError for a name that
        no data sheet has, with those that are near.
        """
        return _from_sheet(lookup(name), tf32)

    @staticmethod
    def current(*, progress: bool = True) -> Machine:
        """This machine, measured once (about a minute, with a progress bar) and kept in the user's cache folder.

        What is kept counts for the same hardware, torch version and number of threads; else it is measured anew. Where
        the folder cannot be written, it warns and measures again in the next process.
        """
        now = fingerprint()
        if now in _CURRENT:
            return _CURRENT[now]
        machine = kept()
        if machine is None:
            from graphopt.cost_model.calibrate import calibrate

            machine = calibrate(progress=progress)
            machine.save()
        _CURRENT[now] = machine
        return machine

    def stale(self) -> str:
        """Why the figures may no longer hold on this machine: what differs, or age; empty if they do."""
        if not self.fingerprint:
            return ""
        now = dict(fingerprint())
        different = [f"{key} was {self.fingerprint.get(key)}, is {now[key]}" for key in now
                     if self.fingerprint.get(key) != now[key]]  # fmt: skip
        if different:
            return "; ".join(different)
        age = datetime.now(UTC) - datetime.fromisoformat(self.measured)
        return f"measured {age.days} days ago" if age.days > 90 else ""

    def save(self, path: str | os.PathLike[str] | None = None) -> Path | None:
        """Write the figures as JSON, whole or not at all; by default where `current` looks. Returns where, or None
        (with a warning) where the folder cannot be written."""
        target = Path(path) if path is not None else path_of(tuple(self.fingerprint.items()))
        part = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1))
            os.replace(part, target)
        except OSError as error:
            warnings.warn(
                f"the calibration of this machine cannot be kept in {target.parent} ({error}); set GRAPHOPT_CACHE_DIR "
                "to a folder that can be written",
                GraphoptWarning,
            )
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return None
        return target

    def scaled(self, scales: Mapping[str, float], spread: float) -> Machine:
        """The same machine with other corrections and another interval."""
        return replace(self, scales=dict(scales), spread=spread)


_CURRENT: dict[tuple[tuple[str, Any], ...], Machine] = {}


def fingerprint() -> tuple[tuple[str, Any], ...]:
    """What measured times hold for: processor, cores, memory, torch, threads, GPU, and how threads are bound."""
    return (
        ("processor", processor_name()),
        ("cores", available_cores()),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        ("torch", str(torch.__version__)),
        ("threads", torch.get_num_threads()),
        ("launcher", os.environ.get("KMP_AFFINITY") or os.environ.get("OMP_PROC_BIND") or ""),
    )


def identity() -> str:
    """The fingerprint of this machine as one line of text."""
    return "; ".join(f"{name} {value}" for name, value in fingerprint() if value not in (None, ""))


def kept(threads: int | None = None) -> Machine | None:
    """The calibration of this machine that is at hand, None if there is none; nothing is measured.

    Args:
        threads: of torch, for which it holds; by default those that torch has now.
    """
    now = fingerprint()
    if threads is not None:
        now = tuple((name, threads if name == "threads" else value) for name, value in now)
    if now not in _CURRENT:
        found = load(path_of(now))
        if found is None:
            return None
        _CURRENT[now] = found
    return _CURRENT[now]


def available_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def path_of(of: tuple[tuple[str, Any], ...]) -> Path:
    """Where the calibration for a fingerprint is kept."""
    text = "-".join(str(value) for _, value in of if value not in (None, ""))
    return cache_dir() / f"machine-{''.join(c if c.isalnum() else '_' for c in text)}.json"


def load(path: str | os.PathLike[str]) -> Machine | None:
    """A machine that `Machine.save` wrote; None if there is none of this version.

    A file that is damaged is reported and measured anew.
    """
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"the calibration in {path} cannot be read ({error}); measuring anew", GraphoptWarning)
        return None
    try:
        if data.pop("version") != VERSION:
            return None
        curves = {
            Family(name): Curve(
                curve["rates"],
                tuple(curve["halves"]),
                tuple(map(tuple, curve["points"])),
                curve["fixed"],
                curve["passes"],
                tuple(map(tuple, curve["steps"])),
                curve["along"],
            )
            for name, curve in data.pop("curves").items()
        }  # fmt: skip
        link = data.pop("link")
        data["compile_seconds"] = tuple(data["compile_seconds"])
        return Machine(curves=curves, link=_link(link) if link else None, **data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"the calibration in {path} is damaged ({error!r}); measuring anew", GraphoptWarning)
        return None


def _link(data: dict[str, Any]) -> Link:
    points = {name: tuple(map(tuple, each)) for name, each in data.pop("points").items()}
    return Link(points=points, **data)


# -- from a data sheet ------------------------------------------------------------------------------------------------

_EFFICIENCY = 0.76
"""Of the dense rate, what large products reach on an A100 (a fit to public measurements of GPT steps)."""

_OF_BANDWIDTH = 0.8
"""Of the memory's bandwidth, what streaming kernels reach."""

_KERNEL = 2e-6
"""Seconds that a kernel takes at least on a GPU."""


def _from_sheet(sheet: DataSheet, tf32: bool) -> Machine:
    """Roofline curves: rates and bandwidth of the sheet, with the efficiencies of public measurements."""
    half = math.sqrt(sheet.multiprocessors) * 8  # a tile of 128 x 128 on each multiprocessor, half of them idle
    rates: dict[str, float] = {precision: _EFFICIENCY * rate for precision, rate in sheet.flops.items()}
    bandwidth = _OF_BANDWIDTH * sheet.bandwidth
    points = ((bandwidth * _KERNEL, _KERNEL), (1e9, max(1e9 / bandwidth, _KERNEL)))
    curves: dict[Family, Curve] = {
        family: Curve(points=points) for family in Family if family not in (Family.NONE, Family.COMMUNICATION)
    }
    curves |= dict.fromkeys((Family.GEMM, *CONVOLUTIONS), Curve(rates, (half, half, 32.0), points))
    curves[Family.RECURRENT] = Curve(rates, (half, 0.0, 0.0), points)
    curves |= dict.fromkeys((Family.ATTENTION, Family.ATTENTION_BACKWARD), Curve(rates, points=points))
    return Machine(
        name=sheet.name,
        device="cuda",
        curves=curves,
        launch={
            "eager forward": 9e-6, "eager backward": 12e-6, "eager update": 9e-6, "eager forward view": 3e-6,
            "eager backward view": 3e-6, "eager update view": 3e-6, "flat": 5e-6, "compiled": 4e-6, "view": 2e-6,
            "item": 0.0,
        },
        memory_bytes=sheet.memory_bytes,
        asynchronous=True,
        spread=0.5,
        compile_seconds=(8.0, 0.08),
        tf32=tf32,
        link=Link(10e-6, sheet.link_bandwidth),
        source=sheet.source,
    )  # fmt: skip
