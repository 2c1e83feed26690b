"""Steps divided by regions, run by this process and a worker, against eager ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from graphopt.graph.halves import cut_update
from graphopt.graph.training_graph import Input, InputKind
from graphopt.passes import DivideRegions
from graphopt.passes._strategies import Strategies
from graphopt.passes.divide_regions import along
from graphopt.schemes import DataParallel
from graphopt.schemes.divided_step import Divided
from graphopt.schemes.pieces import place_value, rows_of_parts, whole_of
from tests.schemes.pairs import CASES, advance, assert_equal_state, pair


@dataclass(frozen=True)
class Along(DataParallel):
    """Divides each operator along the first of these axes that it can run along."""

    axes: tuple[str, ...] = ()
    kind: ClassVar[str] = "along"

    def _divided(self, whole: Any) -> Divided:
        halves = cut_update(whole)
        regimes = along(Strategies(halves.first, self.processors), self.axes)
        result = DivideRegions(self.processors, regimes)(halves.first)
        assert not result.refusals, result.refusals
        return Divided(halves.first, (result.graph,) * self.processors, halves.second)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.4), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "axes"), [("images", ("0.channel", "6.hidden", "batch")), ("tokens", ("qkv.heads", "batch"))]
)
def test_steps_equal_eager_ones_with_parts_of_unequal_size(case: str, axes: Any, monkeypatch: Any) -> None:
    batch = lambda n: (torch.randn(n, 3, 6, 6).double(), torch.randint(5, (n,)))
    monkeypatch.setitem(CASES, "images", (images, batch))
    scheme = Along(2, axes=axes)
    eager, shared, a, b, batch = pair(case, optimizer=torch.optim.AdamW, schemes=[scheme])
    for i in range(4):
        advance((eager, shared), batch(7 if i % 3 else 4), i)
    assert shared.plan.chosen == scheme.name, shared.plan.explain()
    assert_equal_state(a, b)
    shared.close()


def test_pieces_are_put_together() -> None:
    whole = torch.arange(2 * 4 * 3 + 4).reshape(1, -1).repeat(2, 1)  # 2 x axis x 3, and the axis behind it
    first, second = whole[:, :24].view(2, 2, 4, 3), whole[:, 24:]
    parts = [
        torch.cat([first[:, :, k : k + 2].flatten(1), second[:, k : k + 2]], 1) for k in (0, 2)
    ]  # fmt: skip
    torch.testing.assert_close(whole_of("sharded 1 as 2x3+1x1", parts), whole)
    torch.testing.assert_close(whole_of("sharded 0", [whole[:1], whole[1:]]), whole)
    torch.testing.assert_close(whole_of("partial sum", [whole, whole, whole]), 3 * whole)


def test_what_inputs_say_where_a_part_lies() -> None:
    parts = rows_of_parts(7, 3)
    told = {
        field: [place_value(Input(InputKind.PLACE, "", field), k, parts) for k in range(3)]
        for field in ("index", "begin", "part", "total", "most")
    }
    assert told == {"index": [0, 1, 2], "begin": [0, 3, 5], "part": [3, 2, 2], "total": [7] * 3, "most": [3] * 3}
