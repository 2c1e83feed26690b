"""Data-parallel steps against eager ones: what they compute, and what they cost."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost_model import Link
from graphopt.errors import GraphoptError
from graphopt.schemes import DataParallel
from graphopt.schemes.pieces import rows_of_parts
from graphopt.schemes.workers import Pool
from graphopt.schemes.workers.link import SIZES, measure_link
from tests.cost_model.machines import simple
from tests.schemes.pairs import CASES, advance, assert_equal_state, pair


@pytest.mark.filterwarnings("ignore:.*take turns on")
@pytest.mark.parametrize(
    ("case", "synchronise", "processors"),
    [(case, how, 2) for case in CASES for how in ("owner", "all-reduce", "scatter", "tree")]
    + [("tokens", "scatter", 3), ("perceptron", "tree", 3)],
)
def test_fifty_steps_equal_eager_ones_with_parts_of_unequal_size(case, synchronise, processors):
    eager, shared, a, b, batch = pair(case, schemes=[DataParallel(processors, synchronise)])
    for i in range(50):
        advance((eager, shared), batch(7 if i % 3 else 4), i)
    assert shared.plan.chosen == f"data parallel on {processors}, {synchronise}", shared.plan.explain()
    assert_equal_state(a, b)
    shared.close()


UPDATES = {
    "adamw": torch.optim.AdamW,
    "momentum in lists": lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, dampening=0.1, foreach=True),
    "fused adam": lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=True),
}


@pytest.mark.parametrize(
    ("update", "synchronise"), [("adamw", "owner"), ("adamw", "tree"), *((update, "scatter") for update in UPDATES)]
)
def test_state_of_the_optimizer_stays_with_the_user(update, synchronise):
    scheme = DataParallel(2, synchronise)
    eager, shared, a, b, batch = pair("perceptron", optimizer=UPDATES[update], schemes=[scheme])
    for i in range(5):
        advance((eager, shared), batch(5), i)
    assert shared.plan.chosen == scheme.name, shared.plan.explain()
    (one,), (other,) = eager.task.optimizers, shared.task.optimizers
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for name, value in one.state[p].items():
            torch.testing.assert_close(other.state[q][name], value, rtol=1e-7, atol=1e-10)
    shared.close()


def test_local_batch_norm_is_what_ddp_computes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    other, (x, y) = copy.deepcopy(model), (torch.randn(8, 4).double(), torch.randint(2, (8,)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    scheme = DataParallel(2, batch_norm="local")
    step = graphopt.optimize(model, (x, y), loss=F.cross_entropy, optimizer=sgd, schemes=[scheme])
    loss = step(x, y)
    expected = sum(F.cross_entropy(other(part), target) for part, target in zip(x.chunk(2), y.chunk(2))) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
    step.close()


class Weighted(nn.Module):
    """A loss whose rows have weights, which are called as the model's own parameter is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x, weight, y):
        return (weight * (F.linear(x, self.weight) - y).square().sum(1)).mean()


@pytest.mark.parametrize("synchronise", ["owner", "scatter"])
def test_a_parameter_with_the_name_of_a_batch_input_has_no_rows(synchronise):
    torch.manual_seed(0)
    model = Weighted().double()
    other = copy.deepcopy(model)
    batch = {"x": torch.randn(8, 4), "weight": torch.rand(8), "y": torch.randn(8, 3)}
    batch = {name: value.double() for name, value in batch.items()}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    step = graphopt.optimize(model, batch, optimizer=optimizers[0], schemes=[DataParallel(2, synchronise)])
    for _ in range(3):
        loss = step(**batch)
        expected = other(**batch)
        expected.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(loss, expected.detach())
    assert step.plan.chosen == f"data parallel on 2, {synchronise}", step.plan.explain()
    torch.testing.assert_close(model.weight, other.weight)
    step.close()


def test_processors_add_candidates_and_small_batches_drop_them():
    _, step, *_, batch = pair("perceptron", schemes="auto", processors=2)
    step(*batch(4))
    names = {c.scheme: c.why_not for c in step.plan.candidates}
    assert names["data parallel on 2, owner"] is None and names["data parallel on 2, all-reduce"] is None
    _, step, *_, batch = pair("tokens", schemes=["flat", DataParallel(3)])
    step(*batch(2))
    assert "no row for each of 3" in step.plan.candidate("data parallel on 3, owner").why_not


def test_rows_are_divided_as_equally_as_can_be():
    for rows in range(3, 20):
        for processors in range(1, 4):
            parts = rows_of_parts(rows, processors)
            assert sum(n for _, n in parts) == rows and max(n for _, n in parts) - min(n for _, n in parts) <= 1
            assert [b for b, _ in parts] == [sum(n for _, n in parts[:i]) for i in range(processors)]


@pytest.mark.parametrize("options", [{"processors": 1}, {"processors": True}, {"synchronise": "gossip"}])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(GraphoptError, match=next(iter(options))):
        DataParallel(**options)


def test_the_price_has_communication_and_falls_with_faster_links():
    _, step, *_, batch = pair("perceptron", schemes=[DataParallel(2)])
    step(*batch(8))
    prepared = step.situation._prepare(0)
    machines = [simple(link=Link(1e-6, bandwidth)) for bandwidth in (1e5, 1e12)]
    slow, fast = (DataParallel(2, "all-reduce").estimate(prepared, 8, lambda n, m=m: m) for m in machines)
    owner = DataParallel(2).estimate(prepared, 8, lambda n: machines[0])
    assert slow.terms["communication"] > fast.terms["communication"] > 0
    assert owner.terms["communication"] < slow.terms["communication"]  # gradients take no collective
    assert slow.seconds == pytest.approx(sum(slow.terms.values())) and slow.terms["optimizer"] > 0
    assert DataParallel(2).estimate(prepared, 8, lambda n: simple()) is None
    step.close()


def test_links_are_measured():
    with Pool(2) as pool:
        link = measure_link(pool)
    points = link.points["all_reduce 2"]
    assert [size for size, _ in points] == list(SIZES) and all(b >= a > 0 for (_, a), (_, b) in pairwise(points))
    assert link.seconds("all_reduce", 1 << 20, 2) == pytest.approx(2 * link.seconds("all_gather", 1 << 20, 2))
