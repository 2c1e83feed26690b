"""Threads: as many as asked within a step, as many as before behind it, the same training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import GraphoptError
from graphopt.schemes import Eager, Flat, Scheme
from tests.schemes.trials import OPTIMIZERS, Images, assert_trains_like_eager, images, rows

by_name = lambda scheme: scheme.name


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Noting(nn.Module):
    """Notes the number of threads in forward and in backward, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.seen: list[int] = []
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_num_threads())
        if self.fails:
            raise ArithmeticError
        return self.linear(x)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_holds_in_the_step_only(threads: int) -> None:
    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[Eager(threads=threads)])
    for _ in range(2):
        step(*rows())
        assert torch.get_num_threads() == 2
    assert model.seen == [threads, threads]


def test_the_number_is_put_back_after_an_exception() -> None:
    model = Noting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[Eager(threads=1)])
    model.fails = True
    with pytest.raises(ArithmeticError):
        step(*rows())
    assert torch.get_num_threads() == 2


def test_flat_runs_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (seen.append(n), original(n)))
    model = nn.Linear(7, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[Flat(threads=1)])
    step(*rows())
    assert seen == [1, 2]


@pytest.mark.parametrize("scheme", [Flat(threads=1), Eager(threads=1), Flat(threads=1, fused=True)], ids=by_name)
def test_fifty_steps_end_where_eager_with_two_threads_ends(scheme: Scheme) -> None:
    assert_trains_like_eager(scheme, Images(), OPTIMIZERS["adamw"], [images() for _ in range(50)])


def test_candidates_of_two_numbers_train_one_model() -> None:
    model = nn.Linear(7, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schemes = [Flat(), Flat(threads=1), Eager(threads=1)]
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=schemes)
    for _ in range(300):  # so short steps run in rows
        step(*rows())
    assert [c.scheme for c in step.plan.candidates] == ["flat", "flat, 1 thread", "eager, 1 thread"]
    assert all(c.seconds for c in step.plan.candidates)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2"])
def test_what_is_no_number_of_threads(threads: object) -> None:
    with pytest.raises(GraphoptError, match="threads: expected a positive integer"):
        Flat(threads=threads)  # type: ignore[arg-type]
