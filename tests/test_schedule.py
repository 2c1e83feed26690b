"""The batch size that grows with the accuracy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import BatchSizeSchedule, GraphoptError

ACCURACIES = st.lists(st.floats(-1.0, 2.0), min_size=1, max_size=30)


def schedule(**options: object) -> BatchSizeSchedule:
    settings = {"smallest": 8, "largest": 256, "start_accuracy": 0.5, "target_accuracy": 0.9, **options}
    return BatchSizeSchedule(settings.pop("smallest"), settings.pop("largest"), **settings)


@given(ACCURACIES, st.integers(1, 64), st.integers(0, 500), st.integers(2, 5))
def test_grows_by_powers_and_never_shrinks(accuracies, smallest, more, growth):
    one = schedule(smallest=smallest, largest=smallest + more, growth=growth)
    sizes = [one.update(accuracy) for accuracy in accuracies]
    assert sizes == sorted(sizes)
    assert set(sizes) <= {smallest * growth**k for k in range(20)}
    assert all(smallest <= size <= smallest + more for size in sizes)
    assert one.size == sizes[-1]


@given(ACCURACIES)
def test_only_the_best_accuracy_counts(accuracies):
    one, other = schedule(), schedule()
    for accuracy in accuracies:
        one.update(accuracy)
    assert other.update(max(accuracies)) == one.size


def test_starts_small_and_ends_large():
    one = schedule()
    assert one.size == one.update(0.0) == one.update(0.5) == 8
    assert one.update(0.8999) == 128
    assert one.update(0.9) == 256


def test_the_largest_size_is_a_bound():
    assert schedule(smallest=10, largest=79).sizes == (10, 20, 40)
    assert schedule(smallest=10, largest=10).update(1.0) == 10
    assert schedule(smallest=2, largest=60, growth=3).sizes == (2, 6, 18, 54)


def test_any_measure_in_any_unit():
    assert schedule(start_accuracy=-3.0, target_accuracy=-1.0).update(-2.0) == 32


def test_goes_on_from_a_checkpoint():
    one, other = schedule(), schedule()
    one.update(0.7)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.size == one.size == 32
    assert other.update(0.0) == 32


def test_a_checkpoint_of_another_schedule_is_refused():
    one = schedule()
    with pytest.raises(GraphoptError, match="7 is none of"):
        one.load_state_dict({"size": 7})
    with pytest.raises(GraphoptError, match="None is none of"):
        one.load_state_dict({})
    assert one.size == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"smallest": 0},
        {"largest": 4},
        {"growth": 1},
        {"start_accuracy": 0.9},
        {"target_accuracy": float("inf")},
        {"start_accuracy": float("nan")},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(GraphoptError, match="BatchSizeSchedule: expected"):
        schedule(**wrong)


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf")])
def test_an_accuracy_is_a_number(accuracy):
    one = schedule()
    with pytest.raises(GraphoptError, match="finite accuracy"):
        one.update(accuracy)
    assert one.size == 8
