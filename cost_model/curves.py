"""How long one kernel takes on one processor, as a function of its FLOPs, bytes and dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Seconds of the kernels of one family, without their launch: the larger of product time and memory time, and
    ``passes`` times the memory time besides.

    The product time is ``2 batch (m + m0)(n + n0)(k + k0) / (rate * factor)``: the rate is reached where all three
    dimensions of the product are large, half of it where one of them is at its half size. The memory time is linear
    between measured points. Both never fall when a dimension or a number of bytes grows, so neither does the price.

    Attributes:
        rates: flop/s by precision (``fp32``, ``tf32``, ``bf16``, ``fp16``, ``fp64``); empty without products.
        halves: m0, n0, k0, the half sizes.
        points: (bytes, seconds), both increasing; from the last one on at its own bytes per second.
        fixed: seconds of each call beyond its launch.
        passes: over the operands that no product hides, such as reordering them into blocks.
        steps: (size, factor of the rate), sizes increasing; between them linear in logs. For kernels that are written
            for some sizes only.
        along: the dimension that ``steps`` are of: 0 for m, 2 for k.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    halves: tuple[float, float, float] = (0.0, 0.0, 0.0)
    points: tuple[tuple[float, float], ...] = ()
    fixed: float = 0.0
    passes: float = 0.0
    steps: tuple[tuple[float, float], ...] = ()
    along: int = 2

    def product_seconds(self, dims: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Args: dims: m, n, k, batch by row, of shape (4, kernels); rates: flop/s of each."""
        rows, columns, depth, batch = dims
        m0, n0, k0 = self.halves
        seconds = 2.0 * batch * (rows + m0) * (columns + n0) * (depth + k0) / rates
        if self.steps:
            at, factors = np.log(np.array(self.steps)).T
            seconds = seconds / np.exp(np.interp(np.log(dims[self.along]), at, factors))
        seconds = seconds + self.fixed * (batch > 0)
        return seconds

    def memory_seconds(self, moved: np.ndarray) -> np.ndarray:
        """Args: moved: bytes read and written by each kernel."""
        if not self.points:
            return np.zeros(moved.shape)
        at, seconds = np.array(self.points, dtype=np.float64).T
        inside = np.interp(moved, at, seconds)
        return np.where(moved > at[-1], seconds[-1] / at[-1] * moved, np.where(moved < at[0], seconds[0], inside))


def increasing(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Measured (bytes, seconds) as points of a curve: sorted, and no time shorter than one before it.

    The last point's bytes per second continue the curve, so it must be no faster there than just before: its time is
    at least that of the others in proportion to bytes, less what the fixed costs explain.
    """
    found: list[tuple[float, float]] = []
    for moved, seconds in sorted(points):
        found.append((moved, max(seconds, found[-1][1] if found else 0.0)))
    return tuple(found)
