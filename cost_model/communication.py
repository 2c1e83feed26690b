"""What processors cost each other: seconds of a collective, and how much of it computation does not hide.

Formulas of collectives: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH"
(2005); NCCL and gloo use the same ring. Where a machine's collectives were measured, the measured points count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.errors import CostModelError


@dataclass(frozen=True)
class Link:
    """A connection between processors.

    Attributes:
        latency: seconds of a hop.
        bandwidth: bytes/s of a hop.
        points: measured (bytes, seconds) by collective and number of processors (``"all_reduce 2"``), both increasing:
            linear between them, at the last one's bytes per second behind it.
        busy: which share of the time of a collective that runs beside computation is lost to computation, because it
            takes processor time or memory bandwidth: 0 where it costs none, 1 where nothing is gained.
    """

    latency: float
    bandwidth: float
    points: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    busy: float = 0.0

    def seconds(self, collective: str, nbytes: float, processors: int) -> float:
        """Seconds of one collective.

        Args:
            collective: ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``all_to_all``, ``broadcast`` or ``send``.
            nbytes: of the whole tensor: what is reduced, what comes together, what one processor sends.
            processors: that take part; 1 costs nothing.
        """
        if processors <= 1:
            return 0.0
        if collective not in _HOPS:
            raise CostModelError(f"collective: got {collective!r}; expected one of {', '.join(_HOPS)}")
        if points := self.points.get(f"{collective} {processors}"):
            at, seconds = np.array(points, dtype=np.float64).T
            if nbytes > at[-1]:
                return float(seconds[-1] * nbytes / at[-1])
            return float(np.interp(nbytes, at, seconds))
        hops, share = _HOPS[collective](processors)
        return hops * self.latency + share * nbytes / self.bandwidth


_HOPS = {
    "all_reduce": lambda n: (2 * (n - 1), 2 * (n - 1) / n),  # a ring: reduce-scatter, then all-gather
    "reduce_scatter": lambda n: (n - 1, (n - 1) / n),
    "all_gather": lambda n: (n - 1, (n - 1) / n),
    "all_to_all": lambda n: (n - 1, (n - 1) / n),
    "broadcast": lambda n: (math.ceil(math.log2(n)), math.ceil(math.log2(n))),  # a tree
    "send": lambda n: (1, 1.0),
}
"""Hops one behind the other, and how often the tensor's bytes pass a link, for n processors."""

COLLECTIVES = tuple(_HOPS)


@dataclass(frozen=True)
class Transfer:
    """A collective in a schedule: of which kind, started and waited for at which positions among the kernels."""

    collective: str
    start: int
    wait: int


def exposed_seconds(
    transfers: Sequence[Transfer], seconds: Sequence[float], kernels: np.ndarray, busy: float = 0.0
) -> float:
    """What the collectives of a step make it longer.

    One computation and one communication run side by side: a collective starts when it is reached and the one before
    it has ended; computation goes on until it needs a result. What is hidden costs ``busy`` of its time.

    Args:
        transfers: in the order of their starts.
        seconds: of each transfer.
        kernels: seconds of each kernel, in order; collectives and waits themselves take none.
        busy: `Link.busy`.
    """
    schedule = scheduled(transfers, seconds, kernels)
    return schedule.stalled + busy * max(0.0, sum(seconds) - schedule.stalled)


@dataclass(frozen=True)
class Schedule:
    """When collectives run beside computation: seconds from the beginning of the step.

    ``begins``, ``ends``: of each transfer. ``stalls``: (position among the kernels, seconds) that computation waits.
    ``stalled``: their sum.
    """

    begins: tuple[float, ...]
    ends: tuple[float, ...]
    stalls: tuple[tuple[int, float], ...]
    stalled: float


def scheduled(transfers: Sequence[Transfer], seconds: Sequence[float], kernels: np.ndarray) -> Schedule:
    """The schedule that `exposed_seconds` counts by; arguments as there."""
    elapsed = np.concatenate([[0.0], np.cumsum(kernels)])
    events = sorted(
        [(t.start, 0, i) for i, t in enumerate(transfers)] + [(t.wait, 1, i) for i, t in enumerate(transfers)]
    )
    stalled, free = 0.0, 0.0
    begins, ends = [0.0] * len(transfers), [0.0] * len(transfers)
    stalls: list[tuple[int, float]] = []
    for position, is_wait, i in events:
        now = float(elapsed[position]) + stalled
        if is_wait:
            if ends[i] > now:
                stalls.append((position, ends[i] - now))
            stalled += max(0.0, ends[i] - now)
        else:
            begins[i] = max(now, free)
            free = ends[i] = begins[i] + seconds[i]
    return Schedule(tuple(begins), tuple(ends), tuple(stalls), stalled)
