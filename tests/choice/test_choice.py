"""The choice at one batch size, by schemes that train for real and take as long as the test says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import graphopt
from graphopt.choice.pace import FIRST_PAUSE, WINDOW
from graphopt.choice.prices import UNCALIBRATED
from graphopt.cost_model import calibrate, estimate
from graphopt.cost_model.machine import fingerprint, kept, path_of
from graphopt.errors import CaptureError
from graphopt.schemes import Flat
from tests.choice.fakes import Fake, FakeRunner, Training
from tests.cost_model.machines import simple
from tests.training import cross_entropy


def test_the_fastest_is_chosen_and_the_slow_ones_run_twice():
    training = Training()
    training.add("a", 0.1)
    training.add("b", 0.04)
    training.add("c", 0.3)
    ran = training.run(40)
    assert ran.count("a") == ran.count("c") == 2 and training.plan.chosen == "b"
    assert training.plan.reason == "measured: a takes 2.50 times as long, c takes 7.50 times as long"
    assert training.plan.candidate("c").lost == "took 7.50 times as long as b"


def test_all_candidates_train_the_same_model():
    one, several = Training(), Training()
    one.add("a", 1.0)
    for label, seconds in (("a", 1.0), ("b", 1.1), ("c", 0.9)):
        several.add(label, seconds)
    for training in (one, several):
        _ = training.step
        torch.manual_seed(1)
        training.run(30)
    ours, theirs = (list(t.step.task.model.parameters()) for t in (several, one))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_feasible_candidate_is_said_in_the_plan():
    training = Training(memory=1500)
    training.add("a", 1.0, price=lambda size: 1.0)
    training.add("b", 1.0, price=lambda size: 1.0, peak=2000)
    training.run(2)
    assert training.plan.reason == "the only feasible candidate"
    assert "note: fewer than two candidates are feasible" in training.plan.explain()


@pytest.mark.parametrize("steps", [100, 1000])
def test_what_measuring_costs_is_bounded(steps):
    training = Training(steps=steps)
    for i in range(5):
        training.add(str(i), 1.0 + 0.1 * i)
    training.run(steps)
    assert training.clock.now <= 1.03 * steps * 1.0 + 2.0


def test_a_whole_step_is_one_sample_while_gradients_are_accumulated():
    training = Training(accumulate=3)
    training.add("a", 1.0)
    training.add("b", 2.0)
    assert training.run(15) == [*"aaabbb" * 2, *"aaa"]
    assert training.plan.candidate("a").seconds == [3.0]


# -- prices ---------------------------------------------------------------------------------------------------------


def test_only_the_best_by_price_are_measured():
    training = Training()
    for i in range(8):
        training.add(str(i), 1.0 + i, price=lambda size, i=i: 1.0 + i)
    assert set(training.run(40)) == {"0", "1", "2"}
    assert training.plan.candidate("7").lost == "not measured: priced at 8.00 times 0"


def test_at_most_five_are_measured_without_prices():
    training = Training()
    for i in range(8):
        training.add(str(i), 1.0 + 0.01 * i)
    assert set(training.run(60)) == set("01234")
    assert "not among the 5" in training.plan.candidate("7").lost


def test_a_candidate_that_needs_too_much_memory_is_left_out():
    training = Training(memory=1500)
    training.add("a", 1.0, price=lambda size: 1.0, peak=1000)
    training.add("b", 0.1, price=lambda size: 0.1, peak=2000)
    assert set(training.run(5)) == {"a"}
    assert training.plan.candidate("b").why_not == "it needs 2,000 bytes at its peak, memory=1,500 allows less"


def test_where_nothing_fits_the_smallest_runs_and_the_plan_says_so():
    training = Training(memory=10)
    training.add("a", 1.0, price=lambda size: 1.0, peak=1000)
    training.add("b", 1.0, price=lambda size: 1.0, peak=900)
    assert set(training.run(5)) == {"b"}
    assert "no candidate fits memory=10; b needs the least, 900" in training.plan.notes


class Counted(Flat):
    """The flat scheme with its price."""

    def estimate(self, prepared: Any, size: int, machines: Any) -> Any:
        machine = machines(1)
        return None if machine is None else estimate(prepared.step.graph, machine, {"batch": size})


@pytest.fixture
def _never_calibrated(monkeypatch):
    def fail(**_: Any) -> None:
        raise AssertionError("nobody asked for a calibration")

    monkeypatch.setattr(calibrate, "calibrate", fail)


@pytest.mark.usefixtures("_never_calibrated")
@pytest.mark.parametrize("memory, fits", [(10**6, False), (10**8, True)])
def test_memory_is_counted_without_a_calibrated_machine(memory, fits):
    model = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(
        model, (4, 64), loss=cross_entropy, optimizer=optimizer, memory=memory, schemes=[Counted(), "eager"]
    )
    step(torch.randn(4, 64), torch.randint(8, (4,)))
    assert (step.plan.candidate("flat").why_not is None) is fits
    assert (UNCALIBRATED in step.plan.notes) is fits


def test_a_kept_calibration_gives_prices_and_terms(monkeypatch):
    monkeypatch.setattr("graphopt.cost_model.machine._CURRENT", {})
    assert kept() is None and kept(7) is None
    machine = simple(fingerprint=dict(fingerprint()))
    machine.save(path_of(fingerprint()))
    assert kept().name == "simple" and kept(7) is None
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, (8, 4), loss=cross_entropy, optimizer=optimizer, schemes=[Counted(), "eager"])
    step(torch.randn(8, 4), torch.randint(3, (8,)))
    assert step.plan.candidate("flat").predicted[3] == "priced"
    assert "prices by term:" in step.plan.explain() and "launch" in step.plan.explain()


# -- dear starts ----------------------------------------------------------------------------------------------------


def dear(**settings: object) -> Training:
    """A plain candidate of 1 s and one that gains half of that after a start of 100 s: it pays back after 200 steps."""
    training = Training(**settings)
    training.add("plain", 1.0, price=lambda size: 1.0)
    training.add("dear", 0.5, price=lambda size: 0.5, start=100.0)
    return training


def test_a_start_that_pays_back_in_the_steps_to_come_is_made_at_once():
    training = dear(steps=1000)
    assert "dear" in training.run(10) and training.run(1) == ["dear"]


def test_a_start_that_does_not_pay_back_is_never_made():
    training = dear(steps=150)
    assert set(training.run(150)) == {"plain"}
    dropped = training.plan.candidate("dear")
    assert dropped.break_even == pytest.approx(200)
    assert dropped.lost.startswith("not tried: 100 s to start and 500 ms a step less pay back after 200 steps")


def test_without_steps_as_many_are_expected_as_were_run():
    training = dear()
    ran = training.run(400)
    assert 200 <= ran.index("dear") <= 280 and training.plan.chosen == "dear"


def test_a_gain_that_was_only_promised_is_not_believed():
    training = Training(steps=1000)
    training.add("plain", 1.0, price=lambda size: 1.0)
    training.add("dear", 2.0, price=lambda size: 0.5, start=100.0)
    ran = training.run(300)
    assert ran.count("dear") == 2 and training.plan.chosen == "plain"


def test_a_start_without_a_price_is_weighed_by_a_guess():
    training = Training(steps=400)
    training.add("plain", 1.0)
    training.add("slow", 1.5)
    training.add("captured", 0.5, building=100.0)
    ran = training.run(30)
    assert "captured" not in ran
    assert "100 s to start and at a guess 200 ms a step less" in training.plan.candidate("captured").lost
    training = Training(steps=600)
    training.add("plain", 1.0)
    training.add("captured", 0.5, building=100.0)
    assert training.run(30)[-1] == "captured"


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_candidate_that_cannot_run_is_left_out_and_no_batch_is_lost():
    training = Training()
    training.add("a", 1.0, fails=CaptureError("no kernel"), graph=True)
    training.add("b", 1.0)
    training.add("c", 2.0)
    with pytest.warns(graphopt.GraphoptWarning, match="'a' is left out: no kernel"):
        ran = training.run(20)
    assert len(ran) == 20 and training.plan.chosen == "b"
    assert training.plan.candidate("a").why_not == "no kernel"


def test_eager_stands_in_for_the_last_one():
    training = Training()
    training.add("a", 1.0, fails=CaptureError("no kernel"), graph=True)
    with pytest.warns(graphopt.GraphoptWarning, match="no kernel"):
        training.run(3)
    assert training.plan.chosen == "eager"


def test_the_chosen_one_may_fail_later():
    training = Training()
    failing = training.add("a", 1.0)
    training.add("b", 2.0)
    training.run(20)
    object.__setattr__(failing, "fails", CaptureError("gone"))
    with pytest.warns(graphopt.GraphoptWarning, match="gone"):
        assert training.run(3) == ["b"] * 3


class Hungry(FakeRunner):
    """Draws random numbers, changes a buffer of the model if it is told to, and then has no memory left."""

    def __call__(self, tensors: Any) -> torch.Tensor:
        torch.rand(1)
        task = self.runner.task  # type: ignore[attr-defined]
        task.parameters[0].grad = torch.ones_like(task.parameters[0])
        if self.scheme.label == "changes":
            with torch.no_grad():
                task.parameters[0].add_(1.0)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


class HungryFake(Fake):
    def build(self, prepared: Any) -> Any:
        return Hungry(self, super().build(prepared).runner)  # type: ignore[attr-defined]


def test_a_probe_that_runs_out_of_memory_costs_nothing():
    training, alone = Training(), Training()
    training.fakes["hungry"] = HungryFake("hungry", training.clock, lambda *_: 1.0)
    for each in (training, alone):
        each.add("a", 1.0)
        _ = each.step
    torch.manual_seed(1)
    with pytest.warns(graphopt.GraphoptWarning, match="'hungry' is left out: it ran out of memory"):
        training.run(3)
    random = torch.get_rng_state()
    torch.manual_seed(1)
    alone.run(3)
    assert torch.equal(random, torch.get_rng_state())
    for ours, theirs in zip(training.step.task.parameters, alone.step.task.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_probe_that_had_changed_something_raises():
    training = Training()
    training.fakes["changes"] = HungryFake("changes", training.clock, lambda *_: 1.0)
    training.add("a", 1.0)
    with pytest.raises(RuntimeError, match="can't allocate"):
        training.run(1)


# -- the machine changes --------------------------------------------------------------------------------------------


def test_drift_is_measured_again_and_another_scheme_taken():
    """A second process takes a core: two threads become slow, one does not."""
    training = Training()
    busy = [False]
    training.add("two", lambda *_: 50.0 if busy[0] else 1.0)
    training.add("one", 1.6)
    training.run(100)
    busy[0] = True
    ran = training.run(200)
    assert ran.index("one") <= 2 * WINDOW and ran[-50:] == ["one"] * 50
    assert any("the machine changed" in note for note in training.plan.notes)
    busy[0] = False
    assert training.run(1000)[-100:] == ["two"] * 100, "the former scheme is tried again"


def test_single_slow_steps_are_no_drift():
    training = Training()
    training.add("a", lambda _, n: 30.0 if n % 7 == 6 else 1.0)
    training.add("b", 1.6)
    training.run(30)
    assert set(training.run(300)) == {"a"}


def test_drift_is_not_measured_again_all_the_time():
    training = Training()
    training.add("a", lambda *_: 1.01 ** len(training.clock.log))  # slower for ever
    training.add("b", lambda *_: 10.0 * 1.01 ** len(training.clock.log))
    ran = training.run(1000)
    assert 2 < ran.count("b") <= 16
    first = next(i for i in range(20, 1000) if ran[i] == "b")
    assert first >= FIRST_PAUSE


# -- what the plan says ---------------------------------------------------------------------------------------------


def test_the_plan_is_plain_data_and_a_table():
    training = Training()
    training.add("a", 1.0, price=lambda size: 0.9)
    training.add("b", 2.0, price=lambda size: 1.1)
    training.run(10)
    plan = json.loads(json.dumps(training.plan.to_dict()))
    assert [c["scheme"] for c in plan["candidates"]] == ["a", "b"]
    assert plan["candidates"][0]["predicted"] == [0.9, pytest.approx(0.72), 1.125, "priced"]
    text = training.plan.explain()
    assert "->  a  1 s" in text and "took 2.00 times as long as a" in text
    assert "a: 900 ms = compute 900 ms" in text


def test_a_step_can_be_closed_and_called_again():
    training = Training()
    training.add("a", 1.0)
    training.add("b", 2.0)
    training.run(10)
    runners = [r for s in training.step._situations.values() for r in s._runners.values()]
    training.step.close()
    assert len(runners) == 2 and all(runner.closed for runner in runners)
    assert training.run(10)[-1] == "a"
