"""Another batch size: known ones switch at once, unknown ones are predicted where that is enough."""

from __future__ import annotations

from time import perf_counter

import pytest

from graphopt.choice import Landscape
from graphopt.choice.pace import WINDOW
from graphopt.cost_model.measured import Measurement
from graphopt.plan import Crossover
from tests.choice.fakes import Training
from tests.training import counted_captures


def crossing(**settings: object) -> Training:
    """``host`` is best at small batches, ``many`` from a batch of 24 on."""
    training = Training(**settings)
    training.add("host", lambda size, _: 1e-3 * size)
    training.add("many", lambda size, _: 16e-3 + 1e-3 * size / 3)
    return training


def test_a_known_size_switches_at_once():
    training = crossing()
    for size in (8, 64):
        training.run(20, size)
    with counted_captures() as captures:
        ran = [training.run(1, size)[0] for size in (8, 64, 8, 64)]
    assert ran == ["host", "many", "host", "many"] and not captures


def test_sizes_between_measured_ones_are_predicted_where_the_intervals_do_not_meet():
    training = crossing()
    for size in (2, 6, 128, 256):
        training.run(20, size)
    assert set(training.run(20, 4)) == {"host"}
    assert training.plan.reason == "predicted from other batch sizes"
    assert training.plan.candidate("many").lost.startswith("not measured: interpolated at")
    assert set(training.run(20, 192)) == {"many"}
    assert set(training.run(4, 24)) == {"host", "many"}, "too near to tell"


def test_a_wrong_prediction_is_found_out():
    training = Training()
    training.add("a", lambda size, _: 1.0 if size != 8 else 5.0)
    training.add("b", 2.0)
    for size in (4, 16):
        training.run(20, size)
    ran = training.run(60, 8)
    assert ran[:WINDOW] == ["a"] * WINDOW and ran[-1] == "b"


def test_ties_at_a_new_size_go_to_who_runs_at_the_nearest_one():
    training = Training()
    training.add("a", lambda size, _: 1.0 if size < 32 else 2.0)
    training.add("b", lambda size, _: 1.5 if size < 32 else 2.0)
    training.add("c", lambda size, _: 1.01 if size < 32 else 1.0)
    for size in (4, 64):
        training.run(40, size)
    assert training.run(60, 48)[-1] == "c" and training.run(60, 6)[-1] == "a"


def test_an_unseen_size_is_decided_in_ten_milliseconds_without_a_capture():
    training = Training()
    for i in range(10):
        training.add(str(i), 1.0 + i, price=lambda size, i=i: (1 + i) * size)
    for size in (8, 64):
        training.run(30, size)
    situation = next(iter(training.step._situations.values()))
    with counted_captures() as captures:
        start = perf_counter()
        situation.choose(32)
        seconds = perf_counter() - start
    assert not captures and seconds < 0.1, "a hundred times what it takes; the benchmark measures it"


def test_prices_are_made_once_a_size():
    training = Training()
    fake = training.add("a", 1.0, price=lambda size: 1.0)
    training.add("b", 1.0, price=lambda size: 1.0)
    training.run(30)
    training.run(30, 16)
    assert len(fake.priced) == len(set(fake.priced))


def test_crossovers_are_where_the_best_changes():
    training = crossing()
    for size in (2, 8, 64, 256):
        training.run(20, size)
    (found,) = training.plan.crossovers()
    assert found.before == "host" and found.after == "many" and 20 <= found.size <= 30
    assert f"many instead of host from {found.size} on" in training.plan.explain()


def test_crossovers_by_price_reach_beyond_what_was_run():
    training = Training()
    training.add("host", lambda size, _: 1e-3 * size, price=lambda size: 1e-3 * size)
    training.add("many", lambda size, _: 17e-3 + 1e-3 * size / 3, price=lambda size: 17e-3 + 1e-3 * size / 3)
    training.run(20, 8)
    assert training.plan.chosen == "host"
    assert training.plan.crossovers() == [Crossover(26, "host", "many")]


def measured(seconds: float) -> Measurement:
    return Measurement(seconds, 0.98 * seconds, 1.02 * seconds, runs=8)


def test_a_bare_price_is_corrected_by_how_far_others_are_off():
    landscape = Landscape(lambda name, size: (float(size), 0.8 * size, 1.25 * size))
    landscape.add("a", 8, measured(16.0))
    assert landscape.belief("b", 8).source == "priced"  # type: ignore[union-attr]
    assert landscape.likely("b", 8, ["a"]) == pytest.approx(16.0)
    assert landscape.likely("a", 8, ["b"]) == 16.0


def test_what_is_forgotten_is_not_believed():
    landscape = Landscape(lambda name, size: None)
    landscape.add("a", 8, measured(1.0))
    landscape.forget("a", 8)
    assert landscape.belief("a", 8) is None and landscape.crossovers({}, ["a"]) == []


def test_the_plan_of_a_short_last_batch_says_where_the_others_are():
    training = crossing()
    training.run(1, 64)
    assert training._step.plans == [training._step.plan] and "step.plans" not in training._step.plan.explain()
    training.run(39, 64)
    training.run(2, 8)
    most, last = training._step.plans
    assert last is training._step.plan and (most.batch_size, last.batch_size) == (64, 8)
    assert last.explain().splitlines()[1] == "  most steps so far had batch size 64: many; see step.plans[0]"
    assert most.explain().splitlines()[1] == "  most steps so far had such batches; step.plans[1:]: 1 plan for others"
    training.run(200, 8)
    assert training._step.plans[0] is last
