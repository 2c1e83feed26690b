"""Races: who is dropped when, who wins, and what it costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.choice.race import MARGIN, ROUNDS, ROW_STEPS, Race, interval, measurement, typical


def race(takes: dict[str, Callable[[int], float] | float], **options: object) -> tuple[Race, list[str]]:
    """A race to its end, and who ran."""
    made = Race(list(takes), **options)  # type: ignore[arg-type]
    ran: list[str] = []
    while not made.over:
        turn = made.turn
        ran.append(turn)
        seconds = takes[turn]
        made.record(seconds(ran.count(turn) - 1) if callable(seconds) else seconds)
    return made, ran


def test_a_much_slower_candidate_is_dropped_after_one_timed_step():
    made, ran = race({"a": 1.0, "b": 2.0})
    assert made.chosen() == "a" and ran == ["a", "b", "a", "b"]
    assert made.lost == {"b": "took 2.00 times as long as a"}


def test_the_first_step_is_not_timed():
    made, _ = race({"a": lambda n: 50.0 if n == 0 else 1.0, "b": 2.0})
    assert made.chosen() == "a" and made.warm_up["a"] == 50.0 and 50.0 not in made.samples["a"]


def test_one_slow_step_is_an_outlier_and_no_reason():
    made, _ = race({"a": 1.0, "b": lambda n: 40.0 if n == 1 else 0.7})
    assert made.chosen() == "b"


def test_equal_candidates_end_as_soon_as_their_times_are_known_and_the_first_wins():
    made, ran = race({"a": 1.0, "b": 1.0})
    assert made.chosen() == "a" and len(ran) == 2 * 7


@pytest.mark.parametrize("share, winner", [(MARGIN - 0.005, "a"), (MARGIN + 0.005, "b")])
def test_ties_go_to_the_first(share, winner):
    assert race({"a": 1.0 + share, "b": 1.0})[0].chosen() == winner


def test_short_steps_run_in_rows_of_which_the_first_is_not_counted():
    """Each row of "b" begins with what another candidate left behind; in a row it is the faster one."""
    previous = [""]

    def after(name: str, cold: float, warm: float) -> Callable[[int], float]:
        def take(_: int) -> float:
            previous[0], before = name, previous[0]
            return warm if before == name else cold

        return take

    made, ran = race({"a": after("a", 2e-3, 2e-3), "b": after("b", 4e-3, 1e-3)})
    assert made.chosen() == "b" and set(made.samples["b"]) == {1e-3} and set(made.samples["a"]) == {2e-3}
    rows = ["".join(group) for _, group in itertools.groupby(ran[2:])]
    assert rows[:2] == ["a" * 5, "b" * 7], "until ten milliseconds have gone"
    assert made.extra_seconds > 5 * 1e-3, "all steps of a row count"
    made, ran = race({"a": 1e-5, "b": 2e-5})
    assert len(ran) == 2 + 2 * ROW_STEPS


def test_a_row_that_fails_in_the_middle_leaves_nothing_behind():
    made = Race(["a", "b", "c"], rounds=1)
    for _ in range(3 + 5):
        made.record(1e-3)
    assert made.turn == "a"
    made.fail("a", "no kernel")
    while not made.over:
        made.record(2e-3)
    assert made.samples == {"a": [], "b": [2e-3], "c": [2e-3]}


def test_rounds_are_rotated():
    noise = itertools.cycle([0.9, 1.1, 1.0]).__next__
    _, ran = race({name: lambda _: noise() for name in "abc"}, rounds=3)
    assert ["".join(ran[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "acb", "bca", "cab"], "then by first steps"


def test_noisy_candidates_stop_after_the_last_round():
    rng = random.Random(0)
    _, ran = race({name: lambda _: rng.uniform(0.8, 1.2) for name in "ab"})
    assert len(ran) <= 2 * (ROUNDS + 1)


def test_it_ends_when_what_it_may_cost_is_spent():
    made, ran = race({"a": 1.0, "b": 1.3, "c": 1.4, "d": 1.45}, allowance=lambda best: 0.5 * best)
    assert made.chosen() == "a" and ran == [*"abcd", *"ab"]
    assert made.lost["d"].startswith("not measured") and made.extra_seconds > 0.5


def test_a_hopeless_first_step_is_enough():
    made, ran = race({"a": 60.0, "b": 0.1}, allowance=lambda best: 100.0)
    assert ran == [*"ab", "b"] and made.lost == {"a": "not measured: its first step alone took 60 s"}
    assert race({"a": lambda n: 60.0 if n == 0 else 0.05, "b": 0.1})[0].chosen() == "a", "a start that was wanted"


def test_a_candidate_that_fails_leaves_the_field_to_the_other():
    made = Race(["a", "b"])
    made.record(1.0)
    made.fail("a", "no kernel")
    assert made.over and made.chosen() == "b" and made.running == ["b"]


def test_one_candidate_alone_runs_its_rounds():
    made, ran = race({"a": 1.0}, rounds=1)
    assert made.chosen() == "a" and ran == ["a", "a"]


def test_intervals_of_few_steps_are_widened():
    assert interval([1.0]) == pytest.approx((1 / 1.5**0.5, 1.5**0.5))
    widths = [interval([1.0] * n) for n in range(1, 8)]
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(widths)) and widths[5] == (1.0, 1.0)
    assert typical([1.0, 1.0, 3.5]) == [1.0, 1.0]
    assert measurement([2.0, 2.0, 7.0]).seconds == 2.0


@given(
    base=st.lists(st.floats(0.5, 3.0), min_size=2, max_size=5),
    noise=st.floats(0.0, 0.08),
    seed=st.integers(0, 10**6),
    slow=st.floats(1.0, 4.0),
)
def test_the_chosen_one_is_near_the_best_and_the_cost_is_bounded(base, noise, seed, slow):
    """Under noise of a few per cent, with a machine that is slower for a while, and rare outliers."""
    rng = random.Random(seed)
    clock = itertools.count()

    def step(seconds: float) -> Callable[[int], float]:
        def take(_: int) -> float:
            now = next(clock)
            outlier = 20.0 if rng.random() < 0.03 else 1.0
            return seconds * (1 + rng.uniform(0, noise)) * (slow if 20 <= now < 24 else 1.0) * outlier

        return take

    takes = {str(i): step(seconds) for i, seconds in enumerate(base)}
    made, ran = race(takes)
    chosen = base[int(made.chosen() or 0)]
    assert len(ran) <= len(base) * (ROUNDS + 1)
    assert chosen <= min(base) * (1 + noise) * 1.25
