"""Steps that are built after an optimizer changed: what no longer fits is not run, and the step is planned anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost_model import Link
from graphopt.graph.batch import flatten
from graphopt.schemes import Flat, Hybrid, MicroBatches, Prepared, Scheme, Task
from graphopt.schemes.base import Stale
from graphopt.schemes.captured_step import capture_task
from graphopt.schemes.variants import Form
from graphopt.step import PASSES
from tests.cost_model.machines import simple
from tests.schemes.trials import mlp, rows

NEAR = simple(link=Link(1e-6, 1e8))


def wide() -> nn.Module:
    """Large layers, which are best divided along their features."""
    return nn.Sequential(nn.Linear(7, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))


@pytest.mark.parametrize("scheme", [Flat(fused=True), MicroBatches(2), Hybrid(2, machine=NEAR)], ids=lambda s: s.name)
def test_a_step_from_before_a_change_is_not_run(scheme: Scheme) -> None:
    torch.manual_seed(0)
    batch, model = rows(6), wide()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    task = Task(model, F.cross_entropy, (sgd,))
    prepared = Prepared(task, flatten(batch)[1], capture_task(task, batch, PASSES))
    Form(fused=True).of(prepared)
    assert scheme.why_not(prepared, 6) is None
    runner = scheme.build(prepared)
    before = copy.deepcopy(model.state_dict())
    sgd.param_groups[0]["nesterov"] = True
    for _ in range(2):
        with pytest.raises(Stale):
            runner(batch)
    assert not runner.fresh()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    runner.close()
    task.pools.close()


@pytest.mark.parametrize("schemes", [["eager", "flat"], ["eager", MicroBatches(2)]], ids=["flat", "micro-batches"])
@pytest.mark.parametrize("change", [{"nesterov": True}, {"weight_decay": 0.1}])
def test_an_optimizer_that_changes_between_candidates(schemes: Any, change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models = [mlp().double()]
    models.append(copy.deepcopy(models[0]))
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models)
    step = graphopt.optimize(models[0], (8, 7), loss=F.cross_entropy, optimizer=ours, schemes=schemes)
    used = set()
    for i in range(8):
        x, y = rows()
        if i == 1:
            assert step.plan.chosen == "eager", "the graph is built after the change"
            for optimizer in (ours, theirs):
                optimizer.param_groups[0].update(change)
        used.add(step.situation.choices[8].turn if i else "")
        step(x.double(), y)
        F.cross_entropy(models[1](x.double()), y).backward()
        theirs.step()
        theirs.zero_grad()
    assert used > {"eager"}, used
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)
    step.close()
