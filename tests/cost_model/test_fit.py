"""Fits to synthetic steps whose parameters are known."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import CostModelError
from graphopt.cost_model import fit as fit_module
from graphopt.cost_model.fit import MOST_PARAMETERS, fit

TRUE = {"rate": 5e10, "bandwidth": 1e10, "launch": 8e-6, "fixed": 3e-4, "update": 4e-9}
NAMES = list(TRUE)


def predict(p, row):
    flops, nbytes, nodes, parameters = row
    kernel = max(flops / nodes / p["rate"], nbytes / nodes / p["bandwidth"], p["launch"])
    return p["fixed"] + nodes * kernel + parameters * p["update"]


def steps(count, rng):
    def between(low, high):
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    for _ in range(count):
        flops = between(1e6, 1e11)
        yield flops, flops / between(2, 60), round(between(20, 600)), between(1e4, 3e7)


def measured(count, seed=0, noise=0.0, true=TRUE):
    rng = random.Random(seed)
    return [(row, predict(true, row) * math.exp(rng.gauss(0, noise))) for row in steps(count, rng)]


def off(factor, seed=0):
    """Priors that are wrong by up to a factor."""
    rng = random.Random(seed)
    return {name: value * math.exp(rng.uniform(-1, 1) * math.log(factor)) for name, value in TRUE.items()}


def mean_error(parameters, rows):
    return sum(abs(predict(parameters, row) / seconds - 1) for row, seconds in rows) / len(rows)


# -- what is recovered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_exact_rows_give_back_the_parameters(seed):
    fitted = fit(measured(40, seed), NAMES, predict, off(3, seed), prior_weight=0.01)
    assert fitted.parameters == pytest.approx(TRUE, rel=0.02)
    assert fitted.rows == 40 and fitted.unmoved == () and fitted.half_width < 0.02


@pytest.mark.parametrize(("count", "most"), [(12, 0.12), (40, 0.08)])
def test_noisy_rows_predict_others(count, most):
    errors = []
    for seed in range(10):
        fitted = fit(measured(count, seed, noise=0.08), NAMES, predict, off(2, seed))
        errors.append(mean_error(fitted.parameters, measured(100, seed + 100)))
        assert errors[-1] < mean_error(off(2, seed), measured(100, seed + 100))
    assert sum(errors) / len(errors) < most


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_outliers_do_not_move_it_much(factor):
    rows = measured(30, noise=0.03)
    clean = fit(rows, NAMES, predict, off(2))
    for index in (3, 17):
        rows[index] = (rows[index][0], rows[index][1] * factor)
    moved = fit(rows, NAMES, predict, off(2))
    others = measured(100, seed=100)
    assert mean_error(moved.parameters, others) < mean_error(clean.parameters, others) + 0.05


def test_parameters_that_are_not_fitted_stay():
    priors = {**off(2), "fixed": TRUE["fixed"]}
    fitted = fit(measured(30), ["rate", "bandwidth", "launch", "update"], predict, priors)
    assert fitted.parameters["fixed"] == TRUE["fixed"] and "fixed" not in fitted.data_share
    assert list(fitted.parameters) == list(priors)


@given(st.integers(0, 1000), st.sampled_from([1e-3, 1e3]))
def test_units_do_not_matter(seed, unit):
    """The same fit in milliseconds, with the parameters in the units that go with them."""
    rows, priors = measured(12, seed, noise=0.1), off(2, seed)
    scaled = {name: value / unit if name in ("rate", "bandwidth") else value * unit for name, value in priors.items()}
    one = fit(rows, NAMES, predict, priors)
    other = fit([(row, seconds * unit) for row, seconds in rows], NAMES, predict, scaled)
    assert other.half_width == pytest.approx(one.half_width, rel=1e-3)
    for row, _ in rows[:3]:
        assert predict(other.parameters, row) == pytest.approx(predict(one.parameters, row) * unit, rel=1e-3)


# -- how far it may be trusted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "least"), [(6, 0.8), (12, 0.85), (40, 0.85)])
def test_the_interval_holds_rows_to_come(count, least):
    held = []
    for seed in range(30):
        fitted = fit(measured(count, seed, noise=0.08), NAMES, predict, off(2, seed))
        for row, seconds in measured(50, seed + 100, noise=0.08):
            low, high = fitted.interval(predict(fitted.parameters, row))
            held.append(low <= seconds <= high)
    assert least <= sum(held) / len(held) <= 0.97


def test_leaving_out_by_leverage_is_close_to_leaving_out():
    """The half-width comes from one fit; here each row is left out in truth."""
    rows, priors = measured(20, seed=3, noise=0.08), off(2)
    fitted = fit(rows, NAMES, predict, priors)
    errors = []
    for index, (row, seconds) in enumerate(rows):
        without = fit(rows[:index] + rows[index + 1 :], NAMES, predict, priors)
        errors.append(math.log(predict(without.parameters, row) / seconds))
    assert fitted.half_width == pytest.approx(fit_module._half_width(errors), rel=0.25)


def test_parameters_that_no_row_speaks_of_stay_at_their_priors_and_are_named():
    rows = [((1e6, 1e5, nodes, 1e3), seconds) for (_, _, nodes, _), seconds in measured(12)]
    rows = [(row, predict(TRUE, row)) for row, _ in rows]  # launches only
    priors = off(2)
    fitted = fit(rows, NAMES, predict, priors)
    assert set(fitted.unmoved) >= {"rate", "bandwidth", "update"} and "launch" not in fitted.unmoved
    assert fitted.parameters["rate"] == pytest.approx(priors["rate"], rel=1e-3)
    assert fitted.data_share["rate"] == pytest.approx(0, abs=1e-6) and fitted.data_share["launch"] > 0.9


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_rows_keep_the_priors_and_say_so(count):
    priors = off(2)
    fitted = fit(measured(count), NAMES, predict, priors)
    assert fitted.parameters == priors and fitted.rows == 0 and set(fitted.unmoved) == set(NAMES)
    assert fitted.notes[0].startswith(f"priors kept: {count} rows") and fitted.half_width == pytest.approx(math.log(2))


def test_a_wrong_unit_ends_at_the_end_of_the_range_and_is_said():
    priors = {"launch": 1e-9}
    rows = [(nodes, nodes * 1e-3) for nodes in (10, 100, 1000, 2000, 5000)]
    fitted = fit(rows, ["launch"], lambda p, nodes: nodes * p["launch"], priors)
    assert fitted.parameters["launch"] <= 1.001e-7
    assert "launch is at the end of its range" in fitted.notes[0] and "units" in fitted.notes[0]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_more_parameters_than_rows_can_carry():
    priors = {f"p{i}": 1.0 for i in range(MOST_PARAMETERS + 1)}
    with pytest.raises(CostModelError, match="got 13 parameters; expected at most 12"):
        fit(measured(40), list(priors), predict, priors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parameters": ["speed"]}, r"parameters=\['speed'\]"),
        ({"parameters": ["rate", "rate"]}, "each once"),
        ({"priors": {**TRUE, "rate": float("nan")}}, "prior of 'rate' is nan"),
        ({"priors": {**TRUE, "launch": 0.0}}, "prior of 'launch' is 0.0"),
        ({"rows": [*measured(5), ((1, 1, 1, 1), float("nan"))]}, "row 5 took nan s"),
        ({"rows": [*measured(5), ((1, 1, 1, 1), -1.0)]}, "row 5 took -1.0 s"),
        ({"predict": lambda p, row: float("nan")}, "prediction of row 0 is nan"),
        ({"predict": lambda p, row: 0.0, "rows": measured(1)}, "prediction of row 0 is 0.0"),
        ({"prior_weight": 0.0}, "prior_weight=0.0"),
    ],
)
def test_bad_input(wrong, message):
    given_ = {"rows": measured(12), "parameters": NAMES, "predict": predict, "priors": TRUE}
    with pytest.raises(CostModelError, match=f"fit: .*{message}"):
        fit(**{**given_, **wrong})
