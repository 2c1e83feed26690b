"""What `test_ranks.py` runs on every rank of a world of two: ``python world_script.py FOLDER``, once a rank.

Each function of `CASES` is called on both ranks together. Its outcome on each rank goes into a file of FOLDER.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import ElasticStep
from graphopt.elastic.sampling import Recurring, Sandwich
from graphopt.errors import RankError
from graphopt.schemes.world.sameness import digest, held
from tests.elastic.pairs import adamw, assert_same_training, pair, spaces
from tests.worlds import run_cases

CASES: list[Callable[[], None]] = []


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def rank() -> int:
    return distributed.get_rank()


def mine(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """This rank's rows of a batch: the first rank has more."""
    return tuple(rows[:4] if rank() == 0 else rows[4:] for rows in batch)


def assert_trains_as_one_processor(how: Mapping[str, Any], graphs: int, **other: Any) -> None:
    """Steps of both ranks on rows of unequal number end where steps of one processor on all rows end; ``graphs``: how
    many of them were graphs. Both ranks have the same bits. (Without dropout, whose masks are each rank's own.)"""
    alone, shared = pair(adamw, {"processors": 1, **how}, {"processors": 2, **other}, dropout=0.0)
    found = 0
    for i in range(4):
        assert_same_training(alone, shared, i, mine)
        found += shared.step.plan is not None
    assert found == graphs
    step = shared.step
    assert step._ranks is not None
    digests = step._ranks.world.digests([digest(t) for _, t in held(step._task)])
    assert len(set(map(tuple, digests))) == 1


@case
def subnets_drawn_anew() -> None:
    assert_trains_as_one_processor({"strategy": Sandwich(), "clip": 1.0}, 0)


@case
def sums_of_losses() -> None:
    assert_trains_as_one_processor({"strategy": Sandwich(), "combine": "sum"}, 0)


@case
def subnets_that_come_again() -> None:
    assert_trains_as_one_processor({"strategy": Recurring(sets=1), "subnets": 3}, 3, schemes="flat")


@case
def other_draws_or_other_weights_on_a_rank() -> None:
    _, space, x, y = spaces(0.0)
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()), seed=rank())
    with pytest.raises(RankError, match="ranks differ"):
        step(x, y)
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()))
    with torch.no_grad():
        next(space.model.parameters()).add_(rank())
    with pytest.warns(graphopt.GraphoptWarning, match="ranks differed in conv.weight"):
        step(x, y)
    step(x, y)


@case
def a_rank_with_a_bad_batch() -> None:
    _, space, x, y = spaces(0.0)
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()))
    before = [value.clone() for value in space.model.state_dict().values()]
    if rank():
        with pytest.raises(graphopt.BatchError):
            step([])
    else:
        with pytest.raises(RankError, match="another rank cannot take the step"):
            step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, space.model.state_dict().values(), strict=True))


if __name__ == "__main__":
    run_cases(CASES)
