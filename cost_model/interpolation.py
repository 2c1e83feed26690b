"""Seconds of a step at batch sizes that were not measured, from at most three that were.

A step of n samples takes ``a + max(b, c n)`` at its simplest: host time, then launches or arithmetic, whichever lasts
longer. Sums of such terms and the teeth of tiles and waves make the curves that are met in practice. Two laws hold for
nearly all of them, and everything here rests on these:

- a larger batch is never cheaper: ``T(n)`` does not fall;
- a larger batch is never dearer than its parts in turn: ``T(n) / n`` does not rise.

So a measured point bounds all others: from above and below by flat and proportional lines through it. Between two
measured batches both lines of both points enclose the *room* where the time can be. The estimate is a straight line
in batch through that room: never a power law, and never a fit of the smallest batches, both of which are wrong by
tens of per cent on measured curves.

The laws hold for one choice of kernels. Where a library takes other ones from a batch size on, a larger batch can be
cheaper (on one thread a ResNet-50's step of 16 images takes 0.6 of the time of one of 8). Prices know where: they
*fall* there, and what was measured on one side of a fall says nothing of the other.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import groupby, pairwise

import numpy as np

from graphopt.cost_model.measured import Measurement
from graphopt.errors import CostModelError

__all__ = ["BatchCurve", "bracket"]

TOWARDS_CONVEX, TOWARDS_CONCAVE = 0.7, 0.2
"""Shares of the room between two measured batches that the interval takes below and above the line. A curve that is
flat first and steep later lies below the line, and most do; only teeth lie above."""

AGAINST_BEND, ALONG_BEND = 0.2, 0.7
"""The same outside of the measured batches, where a curve that bends upwards leaves the line upwards at both ends:
towards proportional above the largest, towards flat below the smallest."""

ROUGHNESS = 0.04
"""What the interval is wider by, relative to the time, for each doubling between a batch and the nearest measured one:
teeth, and caches that no longer hold what they held. With the shares above, intervals held 92 % of the times inside
of the measured range and 92 to 97 % of those up to four times as far, on simulated curves of four families (one
roofline; twelve; eight with teeth of 2 to 32; affine with drifting efficiency). Teeth are the hardest: 84 %. Half of
the intervals inside are narrower than 5 % on either side."""

ACROSS = 1.3
"""A time that only measurements beyond a fall tell of is within this factor: prices of other kernels have other
errors."""

FALL = 1e-3
"""What a prediction must fall by, relative, from one power of two to the next: less is rounding."""

NEAR_BEST = 0.01
"""Middle batches whose mean predicted error is within this of the best are equal: a prediction knows no better."""


class BatchCurve:
    """Seconds of a step over its batch size, through measured points.

    Args:
        points: what was measured, by batch size. Three of them, spread over the range (see `bracket`), do; with a
            single one everything between flat and proportional is possible, and the intervals say so.
        shape: what an analytical model expects at a batch size, in any unit. Between two measured batches it is
            stretched and shifted to go through both, so that only its form counts; where it is flat, the line is
            straight. Where it falls from one power of two to the next, the curve breaks at the latter, and each side
            follows its own points. Without a shape every line is straight.

    Attributes:
        points: seconds by batch size as the curve goes through them, with the intervals that were measured.
        notes: what was done to the points: those of which the larger batch was measured faster are pooled.

    Raises:
        CostModelError: no points, batch sizes that are no positive ints, or a shape that gives no positive number.

    >>> points = {1: 0.011, 16: 0.012, 128: 0.068}
    >>> curve = BatchCurve({n: Measurement(t, 0.99 * t, 1.01 * t, runs=9) for n, t in points.items()})
    >>> seconds, (low, high) = curve.at(64)
    >>> print(f"{seconds:.3f} s, {low:.3f} to {high:.3f}")
    0.036 s, 0.033 to 0.040
    >>> curve.extrapolates(256)
    True
    """

    def __init__(self, points: Mapping[int, Measurement], *, shape: Callable[[int], float] | None = None) -> None:
        if not points:
            raise CostModelError("BatchCurve: got no points; expected at least one measured batch size")
        for batch in points:
            _require_batch("BatchCurve", batch)
        self._shape = None if shape is None else cache(partial(_positive, shape))
        self._batches = sorted(points)
        self.points: dict[int, Measurement] = {}
        self.notes: tuple[str, ...] = ()
        for side in self._sides(self._batches):
            kept, notes = _never_cheaper({batch: points[batch] for batch in side})
            self.points.update(kept)
            self.notes += notes

    def extrapolates(self, batch: int) -> bool:
        """Whether a batch size is smaller or larger than all that were measured."""
        return not self._batches[0] <= batch <= self._batches[-1]

    def at(self, batch: int) -> tuple[float, tuple[float, float]]:
        """Seconds at a batch size, and the interval that holds them in nine of ten cases.

        At a measured batch size these are the measured ones. Between two, the interval takes its share of the room
        (see above), and grows with the distance from both. Outside, the line through the outer two is continued; the
        room grows in proportion to the distance, as what is not known does: twice as far, the time may be the same or
        twice as long.

        Raises:
            CostModelError: ``batch`` is no positive int, or the shape gives no positive number there.
        """
        _require_batch("BatchCurve.at", batch)
        near = self._measured_beside(batch)
        seconds, floor, ceiling = self._line({n: m.seconds for n, m in self.points.items()}, near, batch)
        # How far the ends of the measured intervals are from there.
        lowest = min(seconds, self._line({n: m.low for n, m in self.points.items()}, near, batch)[0])
        highest = max(seconds, self._line({n: m.high for n, m in self.points.items()}, near, batch)[0])
        below, above = self._shares(near, batch)
        rough = 1 + ROUGHNESS * min(abs(math.log2(batch / n)) for n in self._batches)
        low = (seconds - below * (seconds - floor)) / rough
        high = (seconds + above * (ceiling - seconds)) * rough
        # Errors of measuring and of interpolating know nothing of each other.
        down = math.hypot(math.log(seconds / low), math.log(seconds / lowest))
        up = math.hypot(math.log(high / seconds), math.log(highest / seconds))
        return seconds, (seconds * math.exp(-down), seconds * math.exp(up))

    def _shares(self, near: Sequence[int], batch: int) -> tuple[float, float]:
        """Shares of the room below and above the line that the interval takes."""
        if len(near) < 2:
            return 1.0, 1.0
        return (AGAINST_BEND, ALONG_BEND) if self.extrapolates(batch) else (TOWARDS_CONVEX, TOWARDS_CONCAVE)

    def _line(self, seconds: Mapping[int, float], near: Sequence[int], batch: int) -> tuple[float, float, float]:
        """The line through the points at ``near``, and the floor and ceiling of the room it runs in."""
        known = [(n, seconds[n]) for n in near]
        if not known:
            return self._across(seconds, batch)
        if len(known) == 1:
            return self._through_one(*known[0], batch)
        left = min(max(bisect_right(known, (batch, math.inf)) - 1, 0), len(known) - 2)
        (n0, t0), (n1, t1) = known[left : left + 2]
        straight = t0 + (t1 - t0) * (batch - n0) / (n1 - n0)
        if batch > n1:
            floor, ceiling = t1, max(t1 * batch / n1, straight)  # the line where it is steeper: that was measured
        elif batch < n0:
            floor, ceiling = t0 * batch / n0, t0
        else:
            bounds = max(t0, t1 * batch / n1), min(t1, t0 * batch / n0)
            floor, ceiling = min(bounds), max(bounds)  # in this order only if the points keep the second law
        return min(max(t0 + (t1 - t0) * self._weight(batch, n0, n1), floor), ceiling), floor, ceiling

    def _weight(self, batch: int, n0: int, n1: int) -> float:
        """How far a batch is on the way from a point (0) to the next one (1), in the shape if there is one."""
        s0, s1 = self._predicted(n0), self._predicted(n1)
        if s1 - s0 <= 1e-3 * s0:  # a flat shape says nothing of a rise that was measured
            return (batch - n0) / (n1 - n0)
        return (self._predicted(batch) - s0) / (s1 - s0)

    def _through_one(self, n0: int, seconds: float, batch: int) -> tuple[float, float, float]:
        flat, proportional = seconds, seconds * batch / n0
        floor, ceiling = min(flat, proportional), max(flat, proportional)
        by_shape = self._predicted(batch) / self._predicted(n0)
        middle = math.sqrt(floor * ceiling) if self._shape is None else seconds * by_shape
        return min(max(middle, floor), ceiling), floor, ceiling

    def _across(self, seconds: Mapping[int, float], batch: int) -> tuple[float, float, float]:
        """From the nearest point, which other kernels run at: what is expected relative to there, and no law."""
        n0, t0 = min(seconds.items(), key=lambda point: abs(math.log(point[0] / batch)))
        middle = t0 * self._predicted(batch) / self._predicted(n0)
        return middle, middle / ACROSS, middle * ACROSS

    def _measured_beside(self, batch: int) -> list[int]:
        """The measured batch sizes at which the same kernels run as at this one."""
        sides = self._sides({*self._batches, batch})
        return [n for side in sides if batch in side for n in side if n in self.points]

    def _sides(self, batches: Iterable[int]) -> list[list[int]]:
        """Batch sizes in order, parted where other kernels are expected to run from a power of two on."""
        ordered = sorted(batches)
        if self._shape is None:
            return [ordered]
        powers = [2**k for k in range(ordered[0].bit_length(), ordered[-1].bit_length())]
        doublings = [ordered[0], *powers]
        falls = [b for a, b in pairwise(doublings) if self._predicted(b) < (1 - FALL) * self._predicted(a)]
        sides = groupby(ordered, key=lambda batch: bisect_right(falls, batch))
        return [list(side) for _, side in sides]

    def _predicted(self, batch: int) -> float:
        return float(batch) if self._shape is None else self._shape(batch)


def _never_cheaper(points: dict[int, Measurement]) -> tuple[dict[int, Measurement], tuple[str, ...]]:
    """Points by batch size with seconds that do not fall: those that do are pooled, weighted by their runs."""
    pools: list[dict[int, Measurement]] = []
    for batch, measured in points.items():
        pools.append({batch: measured})
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1].update(last)
    fixed, notes = {}, []
    for pool in pools:
        if len(pool) == 1:
            fixed.update(pool)
            continue
        mean = _mean(pool)
        low, high = min(m.low for m in pool.values()), max(m.high for m in pool.values())
        fixed.update({batch: Measurement(mean, low, high, m.runs, m.noisy) for batch, m in pool.items()})
        listed = ", ".join(f"{batch}: {m.seconds:.3g} s" for batch, m in pool.items())
        notes.append(f"measured to fall as the batch grows, and pooled to {mean:.3g} s: {listed}")
    return fixed, tuple(notes)


def _mean(pool: Mapping[int, Measurement]) -> float:
    return sum(m.seconds * m.runs for m in pool.values()) / sum(m.runs for m in pool.values())


# -- where to measure -----------------------------------------------------------------------------------------------


def bracket(smallest: int, largest: int, predicted: Callable[[int], float] | None = None) -> tuple[int, ...]:
    """The batch sizes to measure for a curve over a range: both ends, and one between them.

    In the middle stands the geometric mean, rounded to a power of two or one and a half of it. On simulated curves
    (see `ROUGHNESS`) it gave the least error of straight lines, 2.6 % on average: a middle at a tenth, a quarter and
    half of the way gave 2.9, 3.6 and 4.9 %.

    Args:
        smallest: the smallest batch size of the range.
        largest: the largest.
        predicted: what an analytical model expects at a batch size, in any unit. The middle then is where straight
            lines through three points of the prediction miss it least (2.3 % on those curves, with predictions whose
            terms are wrong by 35 %); between nearly equal ones, that nearest to the geometric mean.

    Returns:
        Three sizes in order; fewer when the range has no more.

    Raises:
        CostModelError: sizes that are no positive ints or in the wrong order, or predictions that are not positive.

    >>> bracket(1, 128)
    (1, 12, 128)
    >>> bracket(1, 128, predicted=lambda batch: max(0.05, 0.001 * batch))
    (1, 48, 128)
    """
    _require_batch("bracket", smallest)
    _require_batch("bracket", largest)
    if smallest > largest:
        raise CostModelError(f"bracket: got smallest={smallest} above largest={largest}")
    if largest - smallest < 2:
        return tuple(sorted({smallest, largest}))
    middle = min(max(_round(math.sqrt(smallest * largest)), smallest + 1), largest - 1)
    if predicted is not None:
        grid = _spread(smallest, largest)
        expected = np.array([_positive(predicted, batch) for batch in grid])
        inside = {n for n in (middle, *map(_round, grid)) if smallest < n < largest}
        errors = {batch: _miss(grid, expected, batch) for batch in sorted(inside)}
        near = [batch for batch, error in errors.items() if error <= min(errors.values()) + NEAR_BEST]
        middle = min(near, key=lambda batch: abs(math.log(batch / middle)))
    return smallest, middle, largest


def _miss(grid: Sequence[int], expected: np.ndarray, middle: int) -> float:
    """Mean relative error of straight lines through the prediction at both ends and in the middle."""
    ends = [grid[0], middle, grid[-1]]
    return float(np.mean(np.abs(np.interp(grid, ends, np.interp(ends, grid, expected)) / expected - 1)))


def _spread(smallest: int, largest: int) -> list[int]:
    """Batch sizes spread evenly over the doublings of a range, with both ends."""
    return sorted({round(n) for n in np.geomspace(smallest, largest, 33)})


def _round(batch: float) -> int:
    """The nearest power of two or one and a half of one."""
    unit = 2.0 ** math.floor(math.log2(batch) - 1)
    return max(1, round(unit * round(batch / unit)))


def _require_batch(where: str, batch: int) -> None:
    if type(batch) is not int or batch < 1:
        raise CostModelError(f"{where}: got batch size {batch!r}; expected an int of at least 1")


def _positive(predicted: Callable[[int], float], batch: int) -> float:
    value = float(predicted(batch))
    if not 0 < value < math.inf:
        raise CostModelError(f"the prediction at batch size {batch} is {value!r}; expected a positive number")
    return value
