"""`Landscape`: what is known of each candidate's seconds over batch sizes: measured, between measurements, priced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from graphopt.cost_model.interpolation import BatchCurve
from graphopt.cost_model.measured import Measurement
from graphopt.errors import CostModelError
from graphopt.plan import Crossover

FARTHEST = 4
"""How many times as far as the smallest and the largest known batch size crossovers are looked for, with prices."""


@dataclass(frozen=True)
class Belief:
    """What a step of a candidate should take: seconds, the interval, and where that is from.

    ``source``: ``measured`` (in this process), ``stored`` (in an earlier one), ``interpolated`` (from measurements at
    other batch sizes) or ``priced``.
    """

    seconds: float
    low: float
    high: float
    source: str


class Landscape:
    """Seconds of candidates by batch size.

    Args:
        price: (scheme, size) -> seconds and interval by the cost model, None where it has no price.
    """

    def __init__(self, price: Callable[[str, int], tuple[float, float, float] | None]):
        self._price = price
        self._points: dict[str, dict[int, tuple[Measurement, str]]] = {}
        self._curves: dict[str, BatchCurve] = {}

    def add(self, scheme: str, size: int, measured: Measurement, source: str = "measured") -> None:
        """A step of ``scheme`` was measured; what was known at this size is replaced."""
        self._points.setdefault(scheme, {})[size] = measured, source
        self._curves.pop(scheme, None)

    def forget(self, scheme: str, size: int) -> None:
        """What was measured there does not hold any more."""
        self._points.get(scheme, {}).pop(size, None)
        self._curves.pop(scheme, None)

    def measured_at(self, scheme: str) -> Mapping[int, Measurement]:
        """What was measured of a scheme, by batch size."""
        return {size: measured for size, (measured, _) in self._points.get(scheme, {}).items()}

    def belief(self, scheme: str, size: int) -> Belief | None:
        """What a step of ``scheme`` should take; None where nothing is known of it."""
        points = self._points.get(scheme)
        if points and size in points:
            measured, source = points[size]
            return Belief(measured.seconds, measured.low, measured.high, source)
        if points:
            try:
                seconds, (low, high) = self._curve(scheme).at(size)
            except CostModelError:  # no price at this size, for which the graph does not hold: straight lines
                seconds, (low, high) = BatchCurve(self._of_one_graph(scheme)).at(size)
            return Belief(seconds, low, high, "interpolated")
        priced = self._price(scheme, size)
        return None if priced is None else Belief(*priced, "priced")

    def likely(self, scheme: str, size: int, others: Iterable[str]) -> float | None:
        """Seconds to compare with those of ``others``: a bare price is corrected by how far theirs are off."""
        found = self.belief(scheme, size)
        if found is None or found.source != "priced":
            return None if found is None else found.seconds
        ratios = []
        for other in others:
            known, priced = self.belief(other, size), self._price(other, size)
            if known is not None and priced is not None and known.source != "priced":
                ratios.append(known.seconds / priced[0])
        return found.seconds * (median(ratios) if ratios else 1.0)

    def _curve(self, scheme: str) -> BatchCurve:
        if scheme not in self._curves:
            points = self._of_one_graph(scheme)
            try:
                shape = None if self._price(scheme, max(points)) is None else self._shape(scheme)
                self._curves[scheme] = BatchCurve(points, shape=shape)
            except CostModelError:  # no price at one of the sizes: straight lines
                self._curves[scheme] = BatchCurve(points)
        return self._curves[scheme]

    def _of_one_graph(self, scheme: str) -> Mapping[int, Measurement]:
        """What was measured; a batch of 1 runs another graph, of which larger ones say as little as it does of them."""
        points = self.measured_at(scheme)
        return {size: measured for size, measured in points.items() if size > 1} or points

    def _shape(self, scheme: str) -> Callable[[int], float]:
        def seconds(size: int) -> float:
            priced = self._price(scheme, size)
            if priced is None:
                raise CostModelError(f"no price of {scheme} at batch size {size}")
            return priced[0]

        return seconds

    # -- over batch sizes -------------------------------------------------------------------------------------------

    def crossovers(self, chosen: Mapping[int, str], schemes: Iterable[str]) -> list[Crossover]:
        """Batch sizes from which on another scheme is best, in order.

        Args:
            chosen: the scheme that was decided on, by batch size; between and beyond them the least seconds count.
            schemes: the candidates.
        """
        names = list(schemes)
        sizes = sorted({*chosen, *(size for name in names for size in self.measured_at(name))})
        if not sizes:
            return []
        smallest, largest = sizes[0], sizes[-1]
        if all(self._price(name, largest) is not None for name in names):
            smallest, largest = max(2, smallest // FARTHEST), largest * FARTHEST

        def best(size: int) -> str | None:
            if size in chosen:
                return chosen[size]
            seconds = {name: self.likely(name, size, names) for name in names}
            known = {name: s for name, s in seconds.items() if s is not None}
            return min(known, key=known.__getitem__) if known else None

        grid = sorted({*sizes, *_grid(smallest, largest)})
        found = []
        for left, right in pairwise(grid):
            before, after = best(left), best(right)
            if before is None or after is None or before == after:
                continue
            while right - left > 1:
                middle = (left + right) // 2
                left, right = (middle, right) if best(middle) == before else (left, middle)
            found.append(Crossover(right, before, after))
        return found


def _grid(smallest: int, largest: int) -> Iterable[int]:
    """Powers of two, and one and a half of each, within a range."""
    unit = 1
    while unit <= largest:
        for size in (unit, unit + unit // 2):
            if smallest <= size <= largest:
                yield size
        unit *= 2
