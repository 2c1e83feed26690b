"""Whether a step is captured at all, where the user said how many steps there will be."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from graphopt.choice.first_capture import capture_seconds
from graphopt.cost_model import Machine
from graphopt.schemes import Flat, Task
from graphopt.situation import Settings
from graphopt.step import PASSES
from graphopt.training_step import TrainingStep
from tests.choice.fakes import Forgetful
from tests.cost_model.machines import simple
from tests.training import counted_captures, cross_entropy, mlp


def run(seconds: float, calls: int, machine: Machine | None = None, **settings: Any) -> tuple[TrainingStep, list[int]]:
    """So many steps, of which each takes so many seconds; and the batch sizes at which they were captured."""
    torch.manual_seed(0)
    model = mlp()
    task = Task(model, cross_entropy, (torch.optim.SGD(model.parameters(), lr=0.1),))
    ticks = count()
    step = TrainingStep(
        task, ((1, 1), (1,)), Settings(**settings), PASSES, clock=lambda: seconds * next(ticks),
        machines=lambda _: machine, records=Forgetful(),
    )  # fmt: skip
    with counted_captures() as captures:
        for _ in range(calls):
            step(torch.randn(8, 4), torch.randint(3, (8,)))
    return step, captures


def test_few_short_steps_run_in_eager_and_the_plan_says_why() -> None:
    step, captures = run(0.002, 5, steps=5)
    plan = step.plan
    assert captures == [] and plan.chosen == "eager"
    assert "not tried: " in plan.candidate("flat").lost and "1 are expected" in plan.candidate("flat").lost
    assert plan.candidate("flat").break_even == pytest.approx(capture_seconds(step.task.model) / (0.2 * 0.002))
    assert "note: steps=5: eager runs first, a capture has to pay back" in plan.explain()


def test_what_is_not_captured_has_no_price_yet_on_a_calibrated_machine() -> None:
    step, captures = run(0.002, 5, simple(), steps=5)
    assert captures == [] and step.plan.chosen == "eager" and step.plan.candidate("flat").estimate is None


def test_few_long_steps_pay_for_a_capture_once_eager_was_measured() -> None:
    step, captures = run(1.0, 10, steps=100)
    assert captures != [] and {c.scheme for c in step.plan.candidates} >= {"flat", "eager"}
    assert step.plan.facts is not None and step.plan.facts.operators[0] > 0
    assert step.run_so_far() == 10  # those before the capture are counted


@pytest.mark.parametrize("settings", [{"steps": 100_000}, {}])
def test_many_steps_or_an_unknown_number_are_captured_at_once(settings: dict[str, int]) -> None:
    step, captures = run(0.002, 1, **settings)
    assert captures != [] and not step.situation.waiting


def test_schemes_that_were_named_are_not_weighed() -> None:
    step, captures = run(0.002, 3, steps=3, schemes=(Flat(),))
    assert captures != [] and step.plan.chosen == "flat"


def test_a_capture_that_paid_serves_other_batch_sizes() -> None:
    step, _ = run(1.0, 10, steps=100)
    with counted_captures() as captures:
        step(torch.randn(6, 4), torch.randint(3, (6,)))
    assert captures == []  # the graph holds for it


def test_a_model_that_cannot_be_captured_stays_in_eager() -> None:
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layer(x)
            return h if float(h.sum().detach()) > 0 else 2 * h

    model = Branching()
    task = Task(model, cross_entropy, (torch.optim.SGD(model.parameters(), lr=0.1),))
    ticks = count()
    step = TrainingStep(
        task, ((1, 1), (1,)), Settings(steps=100), PASSES, clock=lambda: 1.0 * next(ticks),
        machines=lambda _: None, records=Forgetful(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="the step runs in eager mode"):
        for _ in range(10):
            step(torch.randn(8, 4), torch.randint(3, (8,)))
    assert step.plan.chosen.startswith("eager")
