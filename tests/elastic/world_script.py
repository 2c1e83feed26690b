"""What `test_ranks.py` runs on every rank of a world of two: ``python world_script.py FOLDER``, once a rank.

Each function of `CASES` is called on both ranks together. Its outcome on each rank goes into a file of FOLDER.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import ElasticStep, Space
from graphopt.elastic.sampling import Recurring, Sandwich
from graphopt.errors import RankError
from graphopt.schemes.world.sameness import digest, held
from tests.elastic.pairs import adamw

CASES: list[Callable[[], None]] = []


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def rank() -> int:
    return distributed.get_rank()


def mine(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows: the first rank has more."""
    cut = len(rows) // 2 + 1
    return rows[:cut] if rank() == 0 else rows[cut:]


@cache
def supernets() -> dict[str, tuple[Space, Space, torch.Tensor, torch.Tensor]]:
    """By name two spaces of equal small nets in float64, inputs of 7 rows, and targets."""
    torch.manual_seed(0)
    nets = {
        "batch norm": nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        "layer norm": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)),
    }
    inputs = {"batch norm": torch.randn(7, 1, 4, 4).double(), "layer norm": torch.randn(7, 6).double()}
    found = {}
    for name, net in nets.items():
        one, other = (copy.deepcopy(net).double() for _ in range(2))
        spaces = [graphopt.elastic.space(model, inputs[name]) for model in (one, other)]
        found[name] = (spaces[0], spaces[1], inputs[name], torch.arange(7) % 3)
    return found


def assert_trains_as_one_processor(name: str, how: Mapping[str, Any], graphs: int) -> None:
    """Steps of both ranks on rows of unequal number end where steps of one processor on all rows end; ``graphs``: how
    many of them were graphs. Both ranks have the same bits."""
    alone, shared, x, y = supernets()[name]
    shared.model.load_state_dict(alone.model.state_dict())
    plain = {k: v for k, v in how.items() if k != "schemes"}
    one = ElasticStep(alone, F.cross_entropy, adamw(alone.model.parameters()), processors=1, **plain)
    step = ElasticStep(shared, F.cross_entropy, adamw(shared.model.parameters()), **how)
    found = 0
    for i in range(4):
        rows = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        expected = one(rows, y)
        torch.testing.assert_close(step(mine(rows), mine(y)), expected, rtol=1e-10, atol=1e-12)
        assert [c for c, _ in one.last] == [c for c, _ in step.last]
        torch.testing.assert_close(
            torch.stack([loss for _, loss in step.last]), torch.stack([loss for _, loss in one.last]), rtol=1e-10, atol=0
        )
        found += step.plan is not None
    assert found == graphs
    theirs = shared.model.state_dict()
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    assert step._ranks is not None
    digests = step._ranks.world.digests([digest(t) for _, t in held(step._task)])
    assert len(set(map(tuple, digests))) == 1


@case
def subnets_drawn_anew_with_batch_norms() -> None:
    assert_trains_as_one_processor("batch norm", {"strategy": Sandwich(), "clip": 1.0}, 0)


@case
def subnets_drawn_anew_without_batch_norms() -> None:
    assert_trains_as_one_processor("layer norm", {"strategy": Sandwich(), "combine": "sum"}, 0)


@case
def subnets_that_come_again() -> None:
    how = {"strategy": Recurring(sets=1), "subnets": 3, "schemes": "flat"}
    assert_trains_as_one_processor("batch norm", how, 3)


@case
def other_draws_or_other_weights_on_a_rank() -> None:
    _, space, x, y = supernets()["layer norm"]
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()), seed=rank())
    with pytest.raises(RankError, match="ranks differ"):
        step(x, y)
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()))
    with torch.no_grad():
        next(space.model.parameters()).add_(rank())
    with pytest.warns(graphopt.GraphoptWarning, match="ranks differed in 0.weight"):
        step(x, y)
    step(x, y)


@case
def a_rank_with_a_bad_batch() -> None:
    _, space, x, y = supernets()["batch norm"]
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()))
    before = [value.clone() for value in space.model.state_dict().values()]
    if rank():
        with pytest.raises(graphopt.BatchError):
            step([])
    else:
        with pytest.raises(RankError, match="another rank cannot take the step"):
            step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, space.model.state_dict().values(), strict=True))


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {}
    for function in CASES:
        try:
            function()
            outcomes[function.__name__] = ""
        except BaseException:  # also pytest's own, which are no Exception
            outcomes[function.__name__] = traceback.format_exc()
        (folder / f"{rank()}.json").write_text(json.dumps(outcomes))
        if outcomes[function.__name__]:
            break  # the other rank may be anywhere


if __name__ == "__main__":
    main()
