"""The pace of steps: medians of windows, drift both ways, pauses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphopt.choice.pace import DRIFT, WINDOW, Pace


def fed(pace: Pace, seconds: list[float]) -> list[float]:
    """The ratios of the drifts that the pace reports."""
    found = []
    for each in seconds:
        if pace.add(each) and (ratio := pace.drifted()) is not None:
            found.append(ratio)
    return found


def test_a_slower_and_a_faster_machine_are_both_drifts():
    assert fed(Pace(1.0, pause=WINDOW), [2.0] * WINDOW) == [2.0]
    assert fed(Pace(1.0, pause=WINDOW), [0.5] * WINDOW) == [0.5]


def test_the_first_window_replaces_what_was_measured_among_others():
    pace = Pace(1.0, pause=WINDOW)
    assert fed(pace, [0.8] * WINDOW + [1.3] * WINDOW) == [1.3 / 0.8]


def test_no_drift_before_the_pause_is_over():
    assert len(fed(Pace(1.0, pause=4 * WINDOW), [2.0] * 5 * WINDOW)) == 2


def test_without_a_measurement_the_first_window_stands_for_it():
    assert fed(Pace(None, pause=WINDOW), [1.0] * WINDOW + [2.0] * WINDOW) == [2.0]


def test_parts_of_a_step_are_summed():
    pace = Pace(3.0, parts=3, pause=WINDOW)
    assert fed(pace, [1.0] * 3 * WINDOW) == [] and pace.steps == WINDOW and pace.seconds == 3.0


def test_where_clocks_mean_nothing_only_steps_are_counted():
    pace = Pace(1.0, pause=WINDOW, watching=False)
    assert fed(pace, [9.0] * WINDOW) == [] and pace.steps == WINDOW


@given(st.lists(st.floats(0.7, 1.4), min_size=WINDOW, max_size=WINDOW), st.integers(0, WINDOW // 2 - 1), st.data())
def test_fewer_than_half_of_the_steps_never_make_a_drift(seconds, outliers, data):
    where = data.draw(st.permutations(range(WINDOW)))[:outliers]
    disturbed = [50.0 if i in where else s for i, s in enumerate(seconds)]
    assert fed(Pace(1.0, pause=WINDOW), disturbed) == []
    assert DRIFT > 1.4
