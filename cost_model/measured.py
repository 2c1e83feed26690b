"""Times of candidates on this machine: measured in turn, with an interval, and a word on how quiet the machine was.

Clocks of shared machines are noisy in three ways, and each has its answer here. Single runs are disturbed: the median
stands for all, with a distribution-free interval. The machine slows down for a while: candidates run in turn, so that
all of them see it. It is disturbed all the time: a fixed piece of work runs in each round, and when its time varies,
nothing that was measured beside it is worth keeping.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

import torch

from graphopt.errors import CostModelError
from graphopt.graph.collector import no_garbage_collection

__all__ = ["Measurement", "measure", "median_interval", "spin", "why_busy"]

MOST_DRIFT = 1.15
"""Ratio between the medians of the first and the second half of the runs above which a measurement is noisy."""

MOST_HALF_WIDTH = 0.15
"""Half-width of the interval, relative to the median, above which a measurement is noisy."""

MOST_PROBE_SPREAD = 1.25
"""Ratio between the upper quartile and the minimum of the probe above which the machine is noisy. It is about 1.1 on
an ordinary machine, and 1.3 or more when other processes want its cores."""

BURST, MOST_CALLS = 0.01, 50
"""Seconds that the calls of one candidate in one round take together at least, by at most so many calls."""

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call: the median of ``runs``, and the 95 % interval of that median.

    ``noisy`` says why the numbers should not be kept; None when nothing speaks against it.

    Raises:
        CostModelError: seconds that are not finite and positive, not in order, or no runs.

    >>> Measurement(0.010, 0.009, 0.012, runs=7)
    Measurement(seconds=0.01, low=0.009, high=0.012, runs=7, noisy=None)
    """

    seconds: float
    low: float
    high: float
    runs: int
    noisy: str | None = None

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.seconds <= self.high < math.inf):  # False for NaN too
            raise CostModelError(
                f"Measurement: got seconds={self.seconds!r}, low={self.low!r}, high={self.high!r}; "
                "expected 0 < low <= seconds <= high, all finite, in seconds"
            )
        if self.runs < 1:
            raise CostModelError(f"Measurement: got runs={self.runs!r}; expected at least 1")

    @property
    def half_width(self) -> float:
        """Half the interval, relative to the median."""
        return (self.high - self.low) / 2 / self.seconds

    @classmethod
    def of(cls, samples: Sequence[float], *, probe: Sequence[float] = ()) -> Measurement:
        """The measurement that seconds of single runs amount to, in the order they were taken.

        Args:
            samples: seconds of each run.
            probe: seconds of the fixed work that ran between them, if any (see `measure`).

        Raises:
            CostModelError: no samples, or seconds that are not finite and positive.

        >>> Measurement.of([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
        Measurement(seconds=2.0, low=2.0, high=2.0, runs=9, noisy=None)
        """
        if not samples or not all(0 < s < math.inf for s in samples):
            raise CostModelError(
                f"Measurement.of: got samples {list(samples)!r}; expected seconds of at least one run, each finite and "
                "positive (a run of 0 s is shorter than the clock can see)"
            )
        middle, (low, high) = median(samples), median_interval(samples)
        bare = cls(middle, low, high, len(samples))
        return cls(middle, low, high, len(samples), _why_noisy(bare, samples, probe))


def why_busy(probe: Sequence[float]) -> str | None:
    """Why times that were taken between these of fixed work (`spin`) are not worth keeping; None if they are."""
    if len(probe) < 2 or min(probe) <= 0:
        return None
    spread = quantiles(probe, n=4, method="inclusive")[2] / min(probe)
    if spread <= MOST_PROBE_SPREAD:
        return None
    return f"the machine was busy: fixed work took {spread:.2f} times its shortest time in a quarter of the runs"


def _why_noisy(measured: Measurement, samples: Sequence[float], probe: Sequence[float]) -> str | None:
    if busy := why_busy(probe):
        return busy
    if measured.runs < 6:  # extremes of five runs miss the median more often than once in twenty
        return f"only {measured.runs} runs, too few for a 95 % interval"
    half = measured.runs // 2
    drift = median(samples[-half:]) / median(samples[:half])
    if not 1 / MOST_DRIFT <= drift <= MOST_DRIFT:
        return f"the second half of the runs took {drift:.2f} times as long as the first"
    if measured.half_width > MOST_HALF_WIDTH:
        return f"the median is known to {measured.half_width:.0%} only after {measured.runs} runs"
    return None


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the median by order statistics, whatever the distribution of ``values``.

    The median lies outside of the k-th smallest and k-th largest of n values with probability ``2 P(Binomial(n, 1/2)
    < k)``; the largest such k is taken. Fewer than six values cannot give 95 %: their extremes are returned.

    >>> median_interval([5, 1, 2, 3, 4, 9, 6, 7, 8])
    (2, 8)
    """
    ordered = sorted(values)
    count = len(ordered)
    outside, rank = 2.0**-count, 1
    while rank < (count + 1) // 2:
        outside += math.comb(count, rank) * 2.0**-count
        if 2 * outside > 1 - confidence:
            break
        rank += 1
    return ordered[rank - 1], ordered[count - rank]


def spin() -> int:
    """Fixed work of about a millisecond that touches no memory: what it takes tells of the machine only."""
    total = 0
    for number in range(20_000):
        total += number
    return total


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure(
    candidates: Mapping[Name, Callable[[], Any]],
    *,
    rounds: tuple[int, int] = (7, 50),
    seconds: float = 60.0,
    precision: float = 0.01,
    warmup: int = 3,
    probe: Callable[[], Any] | None = spin,
    synchronize: Callable[[], None] = _synchronize,
    clock: Callable[[], float] = perf_counter,
) -> dict[Name, Measurement]:
    """Time candidates in turn: once a round each, in rotated order, until their times are told apart or known.

    A candidate may change state (a training step updates the model): it is called ``warmup`` times, then once a round.
    One that is shorter than `BURST` is called several times in a row, after a call that is not timed: so it runs in
    training, and alone it would pay for the caches that the others left. After the least rounds, measuring stops when
    the interval of the fastest lies below those of all others, or when each is narrower than ``precision``. Asked after
    each round up to the fiftieth, that two 95 % intervals do not meet takes one of two equal candidates for the faster
    in about one case of fifty.

    Args:
        candidates: by name, what to call.
        rounds: least and most rounds. Fewer than 6 give no 95 % interval, and a measurement that says so.
        seconds: no round is begun when warming up and measuring have taken this long, whatever ``rounds`` says; at
            least one is run.
        precision: half-width of an interval, relative to its median, at which a time counts as known.
        warmup: untimed calls of each candidate before the first round (compilation, caches).
        probe: fixed work, timed in each round, whose spread shows how busy the machine is; None for none.
        synchronize: called before each reading of the clock; waits for the current CUDA device by default.
        clock: gives seconds.

    Returns:
        A measurement a candidate, in the order given. Where the machine was too noisy it says so in
        ``Measurement.noisy``, and `ProfileStore` does not keep it.

    Raises:
        CostModelError: no candidates, or bounds that make no sense. What a candidate raises is passed on.

    >>> measured = measure({"short": lambda: sum(range(1_000)), "long": lambda: sum(range(100_000))})
    >>> measured["short"].seconds < measured["long"].seconds
    True
    """
    least, most = rounds
    if not candidates or not 1 <= least <= most or warmup < 0 or not seconds > 0 or not 0 <= precision < 1:
        raise CostModelError(
            f"measure: got candidates {list(candidates)}, rounds={rounds}, seconds={seconds}, precision={precision}, "
            f"warmup={warmup}; expected at least one candidate, 1 <= least <= most rounds, seconds > 0, "
            "0 <= precision < 1 and warmup >= 0"
        )
    names = list(candidates)
    begun = clock()
    calls = dict.fromkeys(names, 1)
    for name in names:
        for _ in range(warmup):
            start = clock()
            candidates[name]()
            synchronize()
            calls[name] = min(math.ceil(BURST / max(clock() - start, BURST / MOST_CALLS)), MOST_CALLS)
    taken: dict[Name, list[float]] = {name: [] for name in names}
    probed: list[float] = []

    def sample(call: Callable[[], Any], calls: int = 1) -> float:
        if calls > 1:
            call()
        synchronize()
        start = clock()
        for _ in range(calls):
            call()
        synchronize()
        return (clock() - start) / calls

    gc.collect()
    with no_garbage_collection():
        for turn in range(most):
            if turn and clock() - begun >= seconds:
                break
            first = turn % len(names)
            if probe is not None:
                probed.append(sample(probe))
            for name in names[first:] + names[:first]:
                taken[name].append(sample(candidates[name], calls[name]))
            gc.collect(1)  # the young only: what the round left must not pile up
            if turn + 1 >= least and _settled(list(taken.values()), precision):
                break
    return {name: Measurement.of(samples, probe=probed) for name, samples in taken.items()}


def _settled(taken: Sequence[Sequence[float]], precision: float) -> bool:
    """Whether one is faster than all others, or all are known."""
    if len(taken[0]) < 6:
        return False
    intervals = [median_interval(samples) for samples in taken]
    fastest = min(range(len(taken)), key=lambda i: median(taken[i]))
    if len(taken) > 1 and all(intervals[fastest][1] < low for i, (low, _) in enumerate(intervals) if i != fastest):
        return True
    return all(
        high - low <= 2 * precision * median(samples) for samples, (low, high) in zip(taken, intervals, strict=True)
    )
