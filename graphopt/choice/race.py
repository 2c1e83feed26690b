"""`Race`: which of several candidates is fastest, told by as few real steps as tell them apart.

Successive elimination in interleaved rounds (the idea of racing: Maron and Moore, "Hoeffding races", 1994): all
candidates run in turn, so that a machine that slows down for a while slows all of them; who is clearly slower than the
best one so far does not run again. Every step trains the model, so that a candidate costs only what it is slower by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median, median_low

from graphopt.cost_model.measured import Measurement, median_interval

ROUNDS = 8
"""Timed steps of a candidate at most."""

MARGIN = 0.02
"""Candidates whose medians differ by less than this share are equal; then the first one runs."""

ROW_SECONDS, ROW_STEPS = 0.01, 8
"""Steps shorter than half of this run in rows of so many seconds, or so many steps, and the median of all but the first
is one sample: alone, a short step pays for the caches and the threads that the candidate before it left."""

PRECISION = 0.01
"""Half-width of an interval, relative to its median, at which a candidate's time is known."""

OUTLIER = 3.0
"""A step that took this many times as long as its neighbours says something of the machine, not of the candidate."""

HOPELESS, START_SECONDS = 20.0, 2.0
"""A candidate whose first step took so many times the best one's step, and so many seconds besides, is not timed: two
threads on a core that others want can be a hundred times slower than one."""

WIDENED = {1: 1.5, 2: 1.2, 3: 1.1, 4: 1.05, 5: 1.05}
"""By number of steps, below six: the ratio between two candidates' extremes from which one of them is slower. So few
steps give no 95 % interval of their median; what they differ by in bad luck is what this leaves room for."""


def typical(samples: Sequence[float]) -> list[float]:
    """Seconds of steps without outliers (see `OUTLIER`), in order.

    >>> typical([1.0, 3.5, 1.1])
    [1.0, 1.1]
    """
    most = OUTLIER * median_low(samples)
    return [s for s in samples if s <= most]


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Seconds between which the median of a candidate's steps lies.

    Order statistics from six steps on; extremes, widened by what two candidates share of `WIDENED`, below.
    """
    kept = typical(samples)
    low, high = median_interval(kept)
    room = math.sqrt(WIDENED.get(len(kept), 1.0))
    return low / room, high * room


def measurement(samples: Sequence[float]) -> Measurement:
    """What a candidate's steps amount to: their median and `interval`."""
    kept = typical(samples)
    return Measurement(median(kept), *interval(samples), runs=len(kept))


class Race:
    """Candidates that run in turn until one is told from the others.

    Args:
        names: of the candidates. Ties go to the one that stands first.
        rounds: timed steps of each at most.
        allowance: of the best candidate's seconds, those that measuring may take longer than it alone would have; then
            it ends. None: no bound.

    Attributes:
        samples: seconds of each candidate's timed steps, of short ones a median for each row (`ROW_SECONDS`).
        warm_up: seconds of its first step, which builds and compiles and is not timed.
        lost: why a candidate runs no more.
    """

    def __init__(
        self, names: Sequence[str], *, rounds: int = ROUNDS, allowance: Callable[[float], float] | None = None
    ):
        self.names = tuple(names)
        self.samples: dict[str, list[float]] = {name: [] for name in names}
        self.warm_up: dict[str, float] = {}
        self.lost: dict[str, str] = {}
        self._steps: dict[str, list[float]] = {name: [] for name in names}
        self._row: list[float] = []
        self._rounds, self._allowance = rounds, allowance
        self._round = 0
        self._warming = deque(names)
        self._queue: deque[str] = deque()
        self._ended = False

    @property
    def running(self) -> list[str]:
        """The candidates that are still in."""
        return [name for name in self.names if name not in self.lost]

    @property
    def over(self) -> bool:
        """Whether nothing more is to be run."""
        return self._ended

    @property
    def turn(self) -> str:
        """The candidate that runs next."""
        return self._warming[0] if self._warming else self._queue[0]

    @property
    def warming(self) -> bool:
        """Whether the next step is a first one, which is not timed."""
        return bool(self._warming)

    @property
    def extra_seconds(self) -> float:
        """What all steps took longer than the best candidate would have taken for them.

        A first step counts as at most a few ordinary ones: building is a start, which is weighed before.
        """
        if self.best is None:
            return 0.0
        least, extra = self.seconds(self.best), 0.0
        for name, steps in self._steps.items():
            extra += sum(max(0.0, s - least) for s in steps)
            if self.samples[name]:
                extra += max(0.0, min(self.warm_up[name], OUTLIER * self.seconds(name)) - least)
        return extra

    @property
    def best(self) -> str | None:
        """The candidate with the least median, None before the first timed step."""
        timed = [name for name in self.running if self.samples[name]]
        return min(timed, key=self.seconds) if timed else None

    def seconds(self, name: str) -> float:
        """Median seconds of a candidate's steps, outliers left out."""
        return median(typical(self.samples[name]))

    def record(self, seconds: float) -> None:
        """The candidate whose turn it was took so long for one step."""
        name = self.turn
        if self._warming:
            self.warm_up[self._warming.popleft()] = seconds
        else:
            self._steps[name].append(seconds)
            self._row.append(max(seconds, 1e-9))  # a step shorter than the clock can see
            if self._row_is_full():
                self.samples[name].append(median(self._row[1:] or self._row))
                self._row.clear()
                self._queue.popleft()
                self._compare()
        self._go_on()

    def _row_is_full(self) -> bool:
        row = self._row
        return len(self.running) == 1 or row[0] >= ROW_SECONDS / 2 or sum(row) >= ROW_SECONDS or len(row) >= ROW_STEPS

    def fail(self, name: str, why: str) -> None:
        """A candidate cannot run."""
        self.lost[name] = why
        self.samples[name], self._steps[name] = [], []
        if self._row and self.turn == name:
            self._row.clear()
        self._leave(name)
        if len(self.running) < 2:
            self._ended = True
        self._go_on()

    def chosen(self) -> str | None:
        """Who runs from now on: the fastest, or the first candidate where that is as fast; None if all failed."""
        best = self.best
        if best is None:
            return next(iter(self.running), None)
        first = next(iter(self.names))
        if first in self.running and self.samples[first]:
            if self.seconds(first) <= (1 + MARGIN) * self.seconds(best):
                return first
        return best

    # -- elimination ------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Leave out who is clearly slower than the best one."""
        best = self.best
        if best is None:
            return
        _, high = interval(self.samples[best])
        for name in self.running:
            if name == best:
                continue
            if not self.samples[name]:
                if self._allowance is not None and self.warm_up[name] > HOPELESS * self.seconds(best) + START_SECONDS:
                    self.lost[name] = f"not measured: its first step alone took {self.warm_up[name]:.2g} s"
                    self._leave(name)
                continue
            ratio = self.seconds(name) / self.seconds(best)
            if ratio > 1 + MARGIN and self._lowest(name) > high:
                self.lost[name] = f"took {ratio:.2f} times as long as {best}"
                self._leave(name)

    def _leave(self, name: str) -> None:
        for queue in (self._warming, self._queue):
            if name in queue:
                queue.remove(name)

    def _lowest(self, name: str) -> float:
        samples = self.samples[name]
        if len(samples) > 1:
            return interval(samples)[0]
        # One step may be an outlier. The first one took at least as long as any would, so both must be slow.
        return min(samples[0], self.warm_up[name]) / math.sqrt(WIDENED[1])

    def _go_on(self) -> None:
        if not self._ended and self._spent():
            for name in self.running:
                if not self.samples[name]:
                    self.lost[name] = "not measured: what measuring may cost was spent"
            self._ended = True
        if not self._ended and not self._warming and not self._queue:
            if any(self.samples.values()):
                self._round += 1
                self._ended = self._round >= self._rounds or self._known()
            self._fill()
        if self._ended:
            self._warming.clear()
            self._queue.clear()

    def _spent(self) -> bool:
        if self._allowance is None or self.best is None:
            return False
        return self.extra_seconds > self._allowance(self.seconds(self.best))

    def _known(self) -> bool:
        """Whether one is left of several, or the times of all that are left are known."""
        running = self.running
        if len(running) == 1:
            return len(self.names) > 1
        return all(len(self.samples[n]) >= 6 and measurement(self.samples[n]).half_width <= PRECISION for n in running)

    def _fill(self) -> None:
        """The next round, in rotated order; the first one by what first steps took, so that it may end early."""
        running = self.running
        if not self._round:
            self._queue.extend(sorted(running, key=self.warm_up.__getitem__))
            return
        first = self._round % max(len(running), 1)
        self._queue.extend(running[first:] + running[:first])
