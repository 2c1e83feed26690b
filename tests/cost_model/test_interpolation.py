"""Step time over batch size from three points: laws that hold for any points, and accuracy on simulated curves."""

import math
import random
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import CostModelError
from graphopt.cost_model.interpolation import BatchCurve, bracket
from graphopt.cost_model.measured import Measurement


def exactly(seconds):
    return Measurement(seconds, seconds, seconds, runs=9)


def within(seconds, share):
    return Measurement(seconds, seconds / (1 + share), seconds * (1 + share), runs=9)


def curve(points, **options):
    return BatchCurve({batch: exactly(seconds) for batch, seconds in points.items()}, **options)


# -- straight lines -------------------------------------------------------------------------------------------------


def test_linear_in_batch_between_points():
    line = curve({1: 1.0, 11: 2.0, 111: 22.0})
    assert [line.at(n)[0] for n in (1, 6, 11, 61, 111)] == pytest.approx([1.0, 1.5, 2.0, 12.0, 22.0])


def test_the_line_through_the_outer_two_goes_on_above():
    line = curve({1: 1.0, 10: 2.0, 20: 3.0})
    assert line.at(40)[0] == pytest.approx(5.0)
    assert [line.extrapolates(n) for n in (1, 20, 21)] == [False, False, True]


def test_the_line_goes_on_below_but_never_under_proportional():
    assert curve({8: 2.0, 16: 3.0, 32: 5.0}).at(4)[0] == pytest.approx(1.5)
    steep = curve({8: 1.0, 16: 3.0})  # the line would give less than nothing
    assert steep.at(1)[0] == pytest.approx(1 / 8)
    assert steep.extrapolates(1)


def test_at_a_measured_size_the_measured_interval():
    measured = {2: within(1.0, 0.02), 8: within(1.5, 0.1), 32: within(4.0, 0.01)}
    for batch, m in measured.items():
        seconds, (low, high) = BatchCurve(measured).at(batch)
        assert (seconds, low, high) == pytest.approx((m.seconds, m.low, m.high))


def test_one_point_leaves_all_between_flat_and_proportional_open():
    seconds, (low, high) = curve({8: 1.0}).at(32)
    assert low <= 1.0 <= seconds <= 4.0 <= high
    seconds, (low, high) = curve({8: 1.0}).at(2)
    assert low <= 0.25 <= seconds <= 1.0 <= high
    assert curve({8: 1.0}, shape=lambda n: 10 + n).at(32)[0] == pytest.approx(42 / 18)


# -- the interval ---------------------------------------------------------------------------------------------------


def half_width(line, batch):
    seconds, (low, high) = line.at(batch)
    return (high - low) / 2 / seconds


def test_the_interval_widens_with_the_distance():
    line = curve({4: 1.0, 16: 1.3, 64: 3.0})
    above = [half_width(line, n) for n in (64, 72, 96, 128, 256, 1024)]
    below = [half_width(line, n) for n in (4, 3, 2, 1)]
    assert above == sorted(above) and below == sorted(below)
    assert above[0] == below[0] == 0
    assert above[3] > 0.1 and above[5] > 0.25 and below[2] > 0.1


def test_the_interval_holds_the_noise_of_the_points():
    def line(share):
        return BatchCurve({n: within(t, share) for n, t in {4: 1.0, 16: 1.3, 64: 3.0}.items()})

    assert half_width(line(0.2), 32) > half_width(line(0.05), 32) > half_width(line(0.0), 32) > 0
    assert half_width(line(0.2), 32) > 0.18


def test_a_knee_between_two_points_is_in_the_interval():
    """Flat up to 24, then proportional: the line from 12 to 48 is far above it at 24."""
    points = {n: max(1.0, n / 24) for n in (1, 12, 48)}
    seconds, (low, high) = curve(points).at(24)
    assert seconds > 1.3 and low <= 1.1 and high >= seconds


# -- laws, for any points -------------------------------------------------------------------------------------------

POINTS = st.dictionaries(
    st.integers(1, 300), st.tuples(st.floats(1e-4, 10.0), st.floats(0, 0.5), st.integers(1, 50)), min_size=1, max_size=3
).map(lambda d: {n: Measurement(t, t / (1 + w), t * (1 + w), runs) for n, (t, w, runs) in d.items()})


def affine(offset, slope, start):
    return lambda n: offset + slope * max(n, start)


SHAPES = st.none() | st.builds(affine, st.floats(0.01, 10), st.floats(0, 10), st.integers(0, 100))


@given(POINTS, SHAPES, st.integers(1, 1000), st.integers(1, 1000))
def test_a_larger_batch_is_never_cheaper(points, shape, first, second):
    first, second = sorted((first, second))
    line = BatchCurve(points, shape=shape)
    assert line.at(first)[0] <= line.at(second)[0] * (1 + 1e-9)


@given(POINTS, SHAPES, st.integers(1, 1000))
def test_an_interval_is_positive_finite_and_holds_the_estimate(points, shape, batch):
    seconds, (low, high) = BatchCurve(points, shape=shape).at(batch)
    assert 0 < low <= seconds * (1 + 1e-12) and seconds <= high * (1 + 1e-12) and math.isfinite(high)


@given(
    st.floats(0, 1), st.lists(st.tuples(st.floats(0.01, 1), st.floats(1e-4, 0.1)), min_size=1, max_size=5),
    st.sets(st.integers(1, 300), min_size=2, max_size=3), st.integers(1, 600),
)  # fmt: skip
def test_a_sum_of_rooflines_is_met_where_it_is_straight_and_never_above_the_line_inside(fixed, terms, sizes, batch):
    def true(n):
        return fixed + sum(max(b, c * n) for b, c in terms)

    line = curve({n: true(n) for n in sizes})
    estimate, _ = line.at(batch)
    if not line.extrapolates(batch):
        assert true(batch) <= estimate * (1 + 1e-9)
    knees = [b / c for b, c in terms]
    if all(knee <= min(*sizes, batch) or knee >= max(*sizes, batch) for knee in knees):
        assert true(batch) == pytest.approx(estimate)


@given(POINTS)
def test_points_that_do_not_fall_are_left_alone(points):
    ordered = sorted(m.seconds for m in points.values())
    rising = {n: exactly(t) for n, t in zip(sorted(points), ordered)}
    line = BatchCurve(rising)
    assert line.points == rising and line.notes == ()


# -- points that fall -----------------------------------------------------------------------------------------------


def test_points_that_fall_are_pooled_and_it_is_said():
    line = BatchCurve({1: within(1.2, 0.1), 8: within(1.0, 0.1), 64: within(3.0, 0.1)})
    assert line.at(1)[0] == line.at(8)[0] == pytest.approx(1.1)
    assert line.points[1].high == pytest.approx(1.32) and line.points[8].low == pytest.approx(1 / 1.1)
    (note,) = line.notes
    assert "1: 1.2 s, 8: 1 s" in note and "pooled to 1.1 s" in note


def kernels_change_at_16(batch):
    """A step of images that from 16 on runs kernels of a quarter of the time."""
    return 5.0 + batch if batch >= 16 else 5.0 + 4 * batch


def test_a_curve_breaks_where_its_shape_falls():
    true = {n: exactly(2 * kernels_change_at_16(n)) for n in (2, 16, 128)}
    line = BatchCurve(true, shape=kernels_change_at_16)
    assert line.notes == () and dict(line.points) == true
    for batch in (2, 3, 8, 15, 16, 17, 64, 128, 256):
        seconds, (low, high) = line.at(batch)
        assert seconds == pytest.approx(2 * kernels_change_at_16(batch))
        assert low <= seconds <= high
    assert BatchCurve(true).at(8)[0] < 0.5 * 2 * kernels_change_at_16(8)  # a line between 2 and 16 knows no better


def test_points_beyond_a_fall_give_what_is_expected_there_and_a_wide_interval():
    line = BatchCurve({4: exactly(42.0), 8: exactly(74.0)}, shape=kernels_change_at_16)
    seconds, (low, high) = line.at(32)
    assert seconds == pytest.approx(2 * kernels_change_at_16(32))
    assert low < seconds / 1.29 and seconds * 1.29 < high


def test_points_on_both_sides_of_a_fall_are_not_pooled_though_those_of_one_side_are():
    points = {4: within(42.0, 0.01), 8: within(40.0, 0.01), 16: within(30.0, 0.01)}
    line = BatchCurve(points, shape=kernels_change_at_16)
    assert line.points[4].seconds == line.points[8].seconds == pytest.approx(41.0)
    assert line.points[16].seconds == 30.0
    assert len(line.notes) == 1


def test_more_runs_weigh_more():
    points = {1: Measurement(1.2, 1.2, 1.2, runs=30), 8: Measurement(1.0, 1.0, 1.0, runs=10)}
    assert BatchCurve(points).at(4)[0] == pytest.approx(1.15)


def test_pooling_goes_on_until_nothing_falls():
    line = curve({1: 1.0, 8: 1.5, 64: 0.5})  # 8 and 64 give 1.0, no less than 1
    assert [line.at(n)[0] for n in (1, 8, 64)] == pytest.approx([1.0, 1.0, 1.0])
    assert "8: 1.5 s, 64: 0.5 s" in line.notes[0]


# -- accuracy on simulated curves -----------------------------------------------------------------------------------


def roofline(rng):
    knee, fixed = math.exp(rng.uniform(-1.4, 4.8)), math.exp(rng.uniform(-4, 0))
    return [fixed], [1.0], [1 / knee], [1]


def layers(rng, count=12, teeth=(1,)):
    launch = [math.exp(rng.gauss(0, 0.5)) for _ in range(count)]
    center = rng.uniform(-0.7, 4.1)
    slope = [b / math.exp(rng.gauss(center, 1.0)) for b in launch]
    return [sum(launch) * math.exp(rng.uniform(-4, -0.7))], launch, slope, [rng.choice(teeth) for _ in launch]


def teeth(rng):
    return layers(rng, 8, (2, 4, 8, 16))


def step_time(terms):
    """Seconds over batch: host time, and layers of ``max(launch, slope * batch)``, half of it in steps of a tile."""
    fixed, launch, slope, tiles = (np.array(part, dtype=float) for part in terms)

    def at(batch):
        worked = (np.ceil(batch / tiles) * tiles + batch) / 2
        return float(fixed.sum() + np.maximum(launch, slope * worked).sum())

    return at


def mistaken(terms, rng):
    """The same step as a model sees it that is wrong by 35 % in each kind of cost and knows no tiles."""
    fixed, launch, slope, _ = terms
    wrong = [math.exp(rng.gauss(0, 0.35)) for _ in range(3)]
    return step_time(
        ([f * wrong[0] for f in fixed], [b * wrong[1] for b in launch], [c * wrong[2] for c in slope], [1] * len(slope))
    )


def simulated(family, middle=None, shape=False, predict=False, count=120):
    """Relative errors at unseen batches and whether the interval held, over many curves of a family."""
    errors, held = [], []
    for seed in range(count):
        rng = random.Random(seed)
        terms = family(rng)
        true, model = step_time(terms), mistaken(terms, rng)
        smallest, largest = rng.choice([1, 2, 4]), rng.choice([32, 64, 128, 256])
        sizes = bracket(smallest, largest, model if predict else None)
        if middle is not None:
            sizes = (smallest, round(smallest + middle * (largest - smallest)), largest)
        line = curve({n: true(n) for n in sizes}, shape=model if shape else None)
        for batch in sorted({round(n) for n in np.geomspace(smallest, largest, 20)} - set(sizes)):
            seconds, (low, high) = line.at(batch)
            errors.append(abs(seconds / true(batch) - 1))
            held.append(low <= true(batch) <= high)
    return mean(errors), mean(held)


@pytest.mark.parametrize(
    ("family", "most", "least_held"), [(roofline, 0.045, 0.85), (layers, 0.03, 0.85), (teeth, 0.05, 0.75)]
)
def test_error_and_interval(family, most, least_held):
    error, held = simulated(family)
    assert error <= most and held >= least_held


@pytest.mark.parametrize("family", [roofline, layers, teeth])
@pytest.mark.parametrize("middle", [0.25, 0.5])
def test_the_middle_of_the_bracket_is_better_placed_than_halfway(family, middle):
    assert simulated(family)[0] < simulated(family, middle)[0]


@pytest.mark.parametrize("family", [roofline, layers])
def test_a_prediction_places_the_middle_better(family):
    assert simulated(family, predict=True)[0] < simulated(family)[0]


@pytest.mark.parametrize("family", [roofline, layers])
def test_a_shape_is_better_than_straight_lines(family):
    straight, _ = simulated(family)
    shaped, held = simulated(family, shape=True)
    assert shaped < 0.75 * straight and held >= 0.85


def test_a_right_shape_gives_the_curve_itself():
    def true(n):
        return 0.2 + max(1.0, n / 24)

    line = curve({n: true(n) for n in (1, 12, 48)}, shape=lambda n: 7 * true(n) + 3)
    for n in (2, 16, 24, 25, 40, 48, 96):
        assert line.at(n)[0] == pytest.approx(true(n))


def test_a_flat_shape_is_not_believed_where_a_rise_was_measured():
    line = curve({1: 1.0, 11: 2.0}, shape=lambda n: 1.0)
    assert line.at(6)[0] == pytest.approx(1.5) and line.at(21)[0] == pytest.approx(3.0)


# -- where to measure -----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(0, 2000))
def test_a_bracket_has_both_ends_and_one_between(smallest, width):
    sizes = bracket(smallest, smallest + width)
    assert (sizes[0], sizes[-1]) == (smallest, smallest + width)
    assert list(sizes) == sorted(set(sizes)) and len(sizes) == min(3, width + 1)
    assert bracket(smallest, smallest + width, lambda n: 3.0 + n)[1:-1] == sizes[1:-1]  # a line says nothing


def test_a_knee_in_the_prediction_is_measured():
    _, middle, _ = bracket(1, 256, lambda n: max(1.0, n / 60))
    assert 48 <= middle <= 64


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {-1: 1.0}, {1.5: 1.0}, {True: 1.0}])
def test_bad_points(points):
    with pytest.raises(CostModelError, match="BatchCurve"):
        curve(points)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_predictions(value):
    with pytest.raises(CostModelError, match="the prediction at batch size"):
        curve({1: 1.0, 8: 2.0}, shape=lambda n: value)
    with pytest.raises(CostModelError, match="the prediction at batch size"):
        bracket(1, 64, lambda n: value)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 4), (1, 2.5)])
def test_bad_ranges(sizes):
    with pytest.raises(CostModelError, match="bracket: got"):
        bracket(*sizes)


def test_a_bad_batch():
    with pytest.raises(CostModelError, match=r"BatchCurve\.at: got batch size 0"):
        curve({1: 1.0}).at(0)
