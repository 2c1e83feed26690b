"""Batches of many shapes: each would be captured for itself, so that from the fourth on a capture has to pay back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

import graphopt
from graphopt.schemes import Task
from graphopt.settings import Settings, as_schemes
from graphopt.step import PASSES
from graphopt.training_step import TrainingStep
from tests.choice.fakes import Forgetful
from tests.training import Branching, Net, counted_captures, cross_entropy


def step_of(model: torch.nn.Module, seconds: float, **settings: Any) -> TrainingStep:
    """A training step of which each call takes so many seconds."""
    ticks: Iterator[int] = count()
    task = Task(model, cross_entropy, (torch.optim.SGD(model.parameters(), lr=0.1),))
    return TrainingStep(
        task, ((1,) * 4, (1,)), Settings(**settings), PASSES, clock=lambda: seconds * next(ticks),
        machines=lambda _: None, records=Forgetful(),
    )  # fmt: skip


def trained(step: TrainingStep, widths: Iterable[int], then: Callable[[], None] = lambda: None) -> list[str]:
    """A step on images of each width, and ``then`` after it. Returns what was warned of."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for width in widths:
            step(torch.randn(4, 2, 6, width), torch.randint(3, (4,)))
            then()
    return [str(w.message) for w in given if issubclass(w.category, graphopt.GraphoptWarning)]


def test_three_shapes_are_captured_as_they_come_and_a_fourth_has_to_pay() -> None:
    step = step_of(Net(), seconds=1e-4)
    with counted_captures() as captures:
        assert trained(step, [6, 7, 8, 7, 6]) == [] and len(captures) == 3
        (warning,) = trained(step, [9] * 8 + [10])
    assert len(captures) == 3
    assert "dimension 3 of 0 was 6, 7, 8, 9" in warning and "pad_to_multiple_of" in warning and "eager runs" in warning
    assert step.plan.chosen == "eager" and "batches come in many shapes" in step.plan.explain()
    trained(step, [6])
    assert step.plan.facts is not None  # the first shapes keep their graphs


def test_what_pays_back_is_captured() -> None:
    step = step_of(Net(), seconds=100.0)
    with counted_captures() as captures:
        trained(step, [6, 7, 8, *[9] * 12, 10])
    assert len(captures) == 4  # that of 9, of which there were enough; 10 came once


def test_steps_that_were_announced_are_of_all_shapes() -> None:
    step = step_of(Net(), seconds=0.01, steps=10**6)
    with counted_captures() as captures:
        trained(step, [6, 7, 8, *[9] * 8])
    assert len(captures) == 3


def test_a_change_of_mode_does_not_begin_the_count_anew() -> None:
    model = Net()
    step = step_of(model, seconds=1e-4)

    def evaluate() -> None:
        model.eval()
        model.train()

    with counted_captures() as captures:
        trained(step, [6, 7, 8, 9, 10, 11], then=evaluate)
    assert len(captures) == 3


@pytest.mark.parametrize("settings", [{"schemes": as_schemes("exact", None, "synchronized")}, {"memory": 10**9}])
def test_who_asked_for_a_graph_gets_one_and_is_told(settings: dict[str, Any]) -> None:
    step = step_of(Net(), seconds=1e-4, **settings)
    with counted_captures() as captures:
        (warning,) = trained(step, [6, 7, 8, 9, 10])
    assert len(captures) == 5 and "eager runs" not in warning


def test_attempts_that_failed_count_too() -> None:
    class Widths(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mean((1, 2), keepdim=True).flatten(1)[:, :1].expand(-1, 4))

    step = step_of(Widths(), seconds=1e-4)
    said = trained(step, [6, 7, 8, 9, 9, 10])
    assert any("batches come in many shapes" in one for one in said)
    assert step.plan.chosen == "eager" and not step.situation.failed  # it was not even tried


def test_batches_that_differ_in_more_than_sizes_are_no_shapes_of_one() -> None:
    step = step_of(Net(), seconds=1e-4)
    with counted_captures() as captures:
        said = trained(step, [6, 7, 8])
        step.task.model.double()
        for _ in range(2):
            step(torch.randn(4, 2, 6, 9, dtype=torch.float64), torch.randint(3, (4,)))
    assert len(captures) == 4 and said == []
