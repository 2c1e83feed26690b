"""What the ranks of a world decide by is the same on all of them: parts of it, without other processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.schemes import Prepared, Task
from graphopt.schemes.world.divided import InWorld
from graphopt.schemes.world.sameness import Touched
from graphopt.world_step import _plain


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_the_seconds_of_a_ranks_own_capture_decide_nothing(options: Any) -> None:
    ranks = [Prepared(None, None, SimpleNamespace(seconds=s, variants={})) for s in (0.1, 5.0)]  # type: ignore[arg-type]
    fast, slow = (InWorld(2, **options).start_seconds(prepared) for prepared in ranks)
    assert fast == slow


class Ranks:
    """The model of one rank, and whether it asks for a comparison before each step."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)
        self.touched = Touched(Task(self.model, F.cross_entropy, (torch.optim.SGD(self.model.parameters(), lr=0.1),)))

    def write(self) -> None:
        with torch.no_grad():
            self.model.weight.add_(1.0)

    def step(self, *, write: bool = False, fails: bool = False) -> bool:
        if write:
            self.write()
        found = self.touched.now()
        if found and not fails:
            self.touched.compared()
        if not fails:
            self.write()
            self.touched.settle()
        return found


def test_who_writes_before_every_step_is_looked_at_ever_more_rarely() -> None:
    ranks = Ranks()
    assert [ranks.step(write=True) for _ in range(9)] == [k in (0, 1, 3, 7) for k in range(9)]


def test_a_write_that_was_not_looked_at_is_owed() -> None:
    ranks = Ranks()
    assert [ranks.step(write=True) for _ in range(3)] == [True, True, False]
    assert [ranks.step() for _ in range(2)] == [True, False]


def test_steps_that_fail_neither_count_nor_pay() -> None:
    ranks = Ranks()
    assert all(ranks.step(write=True, fails=True) for _ in range(5))
    assert [ranks.step(), ranks.step()] == [True, False]
    assert ranks.step(write=True) and not ranks.step()


class Callback:
    """An option of a group that says nothing of itself but its address."""


def test_options_have_the_same_text_in_every_process() -> None:
    first, second = ({"of": Callback(), "names": {"b", "a"}, 3: [Callback, torch.tensor(0.5)]} for _ in range(2))
    assert repr(_plain(first)) == repr(_plain(second)) and "0x" not in repr(_plain(first))
    assert _plain({"lr": torch.tensor(0.5)}) != _plain({"lr": 0.25})
