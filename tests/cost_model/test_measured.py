"""Measuring under a clock that steps as the test says."""

import gc
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import CostModelError
from graphopt.cost_model.measured import Measurement, measure, median_interval


class Clock:
    """Time that passes only in what is called."""

    def __init__(self):
        self.now = 1000.0
        self.called = []

    def __call__(self):
        return self.now

    def work(self, name, *seconds):
        """A candidate that takes these seconds in turn, over and over."""
        each = itertools.cycle(seconds)

        def call():
            self.called.append(name)
            self.now += next(each)

        return call


@pytest.fixture(autouse=True, scope="module")
def _little_garbage():
    """What other tests imported is not looked through in each collection: it would take most of the time here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(clock, candidates, **options):
    options = {"warmup": 0, "seconds": 1e9, "probe": clock.work("probe", 0.001), "synchronize": lambda: None, **options}
    return measure(
        {name: clock.work(name, *seconds) for name, seconds in candidates.items()},
        clock=clock,
        **options,
    )


# -- the order of things --------------------------------------------------------------------------------------------


def test_candidates_run_once_a_round_in_rotated_order():
    clock = Clock()
    run(clock, {"a": [1, 2], "b": [2, 1], "c": [1, 2]}, rounds=(3, 3), warmup=2, probe=None)
    assert "".join(clock.called) == "aabbcc" + "abc" + "bca" + "cab"


def test_short_candidates_run_several_times_in_a_row_after_a_call_that_pays_for_the_change():
    clock = Clock()
    last = [""]

    def candidate(name, seconds):
        def call():
            clock.called.append(name)
            clock.now += seconds * (1 if last[0] == name else 3)  # caches hold what another one left
            last[0] = name

        return call

    steps = {"a": candidate("a", 2**-10), "b": candidate("b", 2**-8), "c": candidate("c", 0.125)}
    found = measure(steps, clock=clock, warmup=2, rounds=(2, 2), probe=None, precision=0)
    assert [found[name].seconds for name in "abc"] == [2**-10, 2**-8, 0.375]
    rounds = "".join(clock.called)[6:]
    assert rounds == "a" * 12 + "b" * 4 + "c" + "b" * 4 + "c" + "a" * 12


def test_the_probe_runs_in_each_round():
    clock = Clock()
    run(clock, {"a": [1.0]}, rounds=(2, 2))
    assert clock.called == ["probe", "a", "probe", "a"]


def test_a_synchronization_belongs_to_the_call_before_it():
    clock, pending = Clock(), []

    def synchronize():
        while pending:
            clock.now += pending.pop()

    launch = {"a": lambda: pending.append(0.5), "b": lambda: pending.append(0.25)}
    result = measure(launch, clock=clock, synchronize=synchronize, warmup=1, probe=None)
    assert (result["a"].seconds, result["b"].seconds) == (0.5, 0.25)


def test_warming_up_is_not_timed():
    clock = Clock()
    first = iter([9.0, 9.0, 9.0])

    def step():
        clock.now += next(first, 0.1)

    result = measure({"a": step}, clock=clock, warmup=3, probe=None)
    assert result["a"].seconds == pytest.approx(0.1) and result["a"].high == pytest.approx(0.1)


def test_garbage_collection_is_off_while_timing_and_as_it_was_after():
    seen = []

    def step():
        seen.append(gc.isenabled())
        clock.now += 1

    clock = Clock()
    assert gc.isenabled()
    measure({"a": step}, clock=clock, warmup=0, probe=None)
    assert seen and not any(seen) and gc.isenabled()

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure({"a": fails}, clock=clock, warmup=0)
    assert gc.isenabled()
    gc.disable()
    try:
        measure({"a": step}, clock=clock, warmup=0, probe=None)
        assert not gc.isenabled()
    finally:
        gc.enable()


# -- when it stops --------------------------------------------------------------------------------------------------


def test_stops_at_the_least_rounds_when_intervals_separate():
    result = run(Clock(), {"fast": [1.0, 1.2], "slow": [1.5, 1.8]})
    assert {m.runs for m in result.values()} == {7}
    assert result["fast"].high < result["slow"].low


def test_goes_on_while_intervals_meet():
    result = run(Clock(), {"a": [1.0, 1.2], "b": [1.05, 1.25]})
    assert {m.runs for m in result.values()} == {50}


def test_stops_when_the_fastest_is_clear_though_others_are_not():
    result = run(Clock(), {"slow": [2.0, 2.4], "slow too": [2.1, 2.3], "fast": [1.0, 1.2]})
    assert {m.runs for m in result.values()} == {7}


def test_stops_when_times_are_known():
    result = run(Clock(), {"a": [1.0, 1.001], "b": [1.0, 1.001]})
    assert {m.runs for m in result.values()} == {7}


def test_one_candidate_is_measured_until_it_is_known():
    rng = random.Random(0)
    samples = [rng.gauss(1.0, 0.02) for _ in range(200)]
    (result,) = run(Clock(), {"a": samples}, rounds=(7, 200)).values()
    assert 10 < result.runs < 200 and result.half_width <= 0.01


def test_the_bound_on_seconds():
    clock = Clock()
    result = run(clock, {"a": [1.0, 1.2], "b": [1.1, 1.3]}, seconds=10, warmup=1, probe=None)
    assert clock.now - 1000 <= 10 + 2.5
    assert result["a"].runs == result["b"].runs == 4
    assert "only 4 runs" in result["a"].noisy


def test_one_round_is_run_whatever_the_bound():
    result = run(Clock(), {"a": [100.0]}, seconds=1, warmup=1)
    assert result["a"].seconds == 100.0 and result["a"].runs == 1 and result["a"].noisy


def test_equal_candidates_are_seldom_told_apart():
    rng = random.Random(0)
    wrong = 0
    for _ in range(100):
        clock = Clock()
        noise = {name: [rng.lognormvariate(0, 0.1) for _ in range(51)] for name in "ab"}
        a, b = run(clock, noise).values()
        wrong += a.high < b.low or b.high < a.low
    assert wrong <= 6


# -- noise ----------------------------------------------------------------------------------------------------------


def test_a_quiet_machine():
    result = run(Clock(), {"a": [1.0, 1.01, 1.02]})
    assert result["a"].noisy is None


def test_a_busy_machine_shows_in_the_probe():
    clock = Clock()
    result = run(clock, {"a": [1.0], "b": [2.0]}, probe=clock.work("probe", 0.001, 0.002))
    assert all("busy" in m.noisy for m in result.values())
    assert result["a"].seconds == 1.0  # returned all the same


def test_one_disturbed_probe_is_forgiven():
    clock = Clock()
    probe = clock.work("probe", 0.001, 0.001, 0.001, 0.009, 0.001, 0.001, 0.001)
    assert run(clock, {"a": [1.0]}, probe=probe)["a"].noisy is None


@pytest.mark.parametrize(("second", "noisy"), [(1.1, False), (1.2, True), (0.8, True), (0.9, False)])
def test_drift(second, noisy):
    measured = Measurement.of([1.0] * 10 + [second] * 10)
    assert bool(measured.noisy) == noisy
    if noisy:
        assert "second half" in measured.noisy


def test_a_wide_interval():
    measured = Measurement.of([1.0, 1.5, 1.0, 1.5, 1.2, 1.5, 1.0, 1.5, 1.0, 1.2])
    assert "known to" in measured.noisy


def test_a_probe_that_the_clock_cannot_see_says_nothing():
    clock = Clock()
    assert run(clock, {"a": [1.0]}, probe=clock.work("probe", 0.0))["a"].noisy is None


# -- the interval ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_an_interval_holds_the_median_and_knows_no_order(values, rng):
    measured = Measurement.of(values)
    assert min(values) <= measured.low <= measured.seconds <= measured.high <= max(values)
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert median_interval(shuffled) == median_interval(values)


@pytest.mark.parametrize("count", [6, 7, 9, 15, 30])
def test_the_interval_covers_the_median_as_often_as_it_says(count):
    rng = random.Random(count)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([rng.lognormvariate(0, 0.5) for _ in range(count)])
        hits += low <= 1.0 <= high
    assert hits >= 0.94 * 2000


def test_more_runs_narrow_it():
    rng = random.Random(1)
    values = [rng.gauss(1, 0.1) for _ in range(100)]
    low, high = median_interval(values)
    assert high - low < 0.06


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"candidates": {}},
        {"rounds": (0, 3)},
        {"rounds": (5, 3)},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"precision": -0.1},
        {"warmup": -1},
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(CostModelError, match="measure: got candidates"):
        measure(**{"candidates": {"a": int}, **wrong})


@pytest.mark.parametrize(
    "numbers",
    [(0.0, 0.0, 0.0, 7), (-1.0, -1.0, 1.0, 7), (float("nan"), 1.0, 2.0, 7), (1.0, 1.0, float("inf"), 7)]
    + [(1.0, 1.1, 1.2, 7), (1.0, 0.8, 0.9, 7), (1.0, 1.0, 1.0, 0)],
)
def test_impossible_measurements(numbers):
    with pytest.raises(CostModelError, match="Measurement"):
        Measurement(*numbers)


@pytest.mark.parametrize("samples", [[], [1.0, -1.0], [float("nan")], [0.0]])
def test_impossible_samples(samples):
    with pytest.raises(CostModelError, match=r"Measurement\.of"):
        Measurement.of(samples)
