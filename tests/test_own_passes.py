"""`optimize(passes=)`: a user's own pass runs on each captured step, and what is none is refused."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import graphopt
from graphopt.errors import GraphoptError
from graphopt.passes import Change, DeadCode, Pass, PassResult, Tier
from graphopt.step import PASSES


@dataclass(frozen=True)
class Witness(Pass):
    """Changes nothing and says so."""

    name: ClassVar[str] = "witness"
    tier: ClassVar[Tier] = Tier.EXACT

    def rewrite(self, graph):
        return PassResult(graph, (Change(self.name, f"saw {len(graph)} operators"),))


def changes_by(passes) -> set[str]:
    """The passes that say they changed a step of a small model."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    step = graphopt.optimize(
        net, (6, 4), loss=torch.nn.functional.cross_entropy, optimizer=torch.optim.SGD(net[2].parameters(), 0.1),
        schemes="flat", **({} if passes is None else {"passes": passes}),
    )  # fmt: skip
    step(torch.randn(6, 4), torch.randint(2, (6,)))
    return {change.pass_name for change in step.plan.passes.changes}


def test_own_passes_run():
    usual = changes_by(None)
    assert changes_by((Witness(), *PASSES)) == usual | {"witness"}
    assert changes_by([]) == usual & {"gradient_liveness"}


def test_what_is_no_pass_is_refused():
    with pytest.raises(GraphoptError, match="passes: expected objects"):
        changes_by([DeadCode])
