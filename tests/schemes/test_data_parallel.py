"""Data-parallel steps against eager ones: what they compute, and what happens when a worker is gone."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost_model import Link
from graphopt.errors import GraphoptError, GraphoptWarning, WorkerError
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase
from graphopt.passes import DeadCode
from graphopt.schemes import DataParallel
from graphopt.schemes.divided_step import rows_of_parts
from graphopt.schemes.workers import Pool
from graphopt.schemes.workers.link import SIZES, measure_link
from tests.cost_model.machines import simple


class Tokens(nn.Module):
    """Embedding, attention, layer norm: a loss over the vocabulary at each place."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(11, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.head(x).transpose(1, 2)


def perceptron():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 5))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def tokens(n):
    targets = torch.randint(11, (n, 7))
    targets[0] = -100  # ignored, all of them
    return torch.randint(11, (n, 7)), targets


CASES = {
    "perceptron": (perceptron, lambda n: (torch.randn(n, 6).double(), torch.randint(5, (n,)))),
    "convolutions": (convolutions, lambda n: (torch.randn(n, 3, 6, 6).double(), torch.randint(5, (n,)))),
    "tokens": (Tokens, tokens),
}


def pair(case, *, optimizer=torch.optim.SGD, schemes, **options):
    """The same model twice, one stepped by eager, one by ``schemes``; both steps and both models."""
    make, batch = CASES[case]
    torch.manual_seed(0)
    models = [make().double()]
    models.append(copy.deepcopy(models[0]))
    steps = []
    for model, which, more in zip(models, ("eager", schemes), ({}, options), strict=True):
        one = optimizer(model.parameters(), lr=1e-2)
        steps.append(graphopt.optimize(model, batch(4), loss=F.cross_entropy, optimizer=one, schemes=which, **more))
    return *steps, *models, batch


def advance(steps, data, seed):
    losses = []
    for step in steps:
        torch.manual_seed(seed)
        losses.append((step(*data), torch.rand(1)))
    (a, after), (b, again) = losses
    assert torch.equal(after, again), "the random state after the step"
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def assert_equal_state(one, other):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-7, atol=1e-10, msg=name)


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


def test_processors_add_candidates_and_small_batches_drop_them():
    _, step, *_, batch = pair("perceptron", schemes="auto", processors=2)
    step(*batch(4))
    names = {c.scheme: c.why_not for c in step.plan.candidates}
    assert names["data parallel on 2, owner"] is None and names["data parallel on 2, all-reduce"] is None
    _, step, *_, batch = pair("tokens", schemes=["flat", DataParallel(3)])
    step(*batch(2))
    assert "no row for each of 3" in step.plan.candidate("data parallel on 3, owner").why_not


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.02)
    return False


def workers(step):
    return [pid for pool in step.task.pools._pools.values() for pid in pool.processes]


@pytest.mark.parametrize("synchronise", ["owner", "scatter", "tree"])
def test_training_goes_on_without_a_worker_that_was_killed(synchronise):
    eager, shared, a, b, batch = pair("perceptron", schemes=[DataParallel(2, synchronise)])
    advance((eager, shared), batch(6), 0)
    pids = workers(shared)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    data = batch(6)
    with pytest.warns(GraphoptWarning):
        advance((eager, shared), data, 1)
    for i in range(2, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphoptWarning)
            advance((eager, shared), batch(6), i)
    assert_equal_state(a, b)
    later = workers(shared)
    shared.close()
    assert gone(pids + later)


def snapshot(model, optimizer):
    state = [value for slots in optimizer.state_dict()["state"].values() for value in slots.values()]
    return copy.deepcopy([*model.state_dict().values(), *state])


@pytest.mark.parametrize("synchronise", ["owner", "scatter", "tree"])
def test_a_required_scheme_stops_training_and_leaves_model_and_state_as_they_were(synchronise):
    make, _ = CASES["tokens"]
    torch.manual_seed(0)
    model = make().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = tokens(4)
    scheme = DataParallel(2, synchronise, required=True)
    step = graphopt.optimize(model, (x, y), loss=F.cross_entropy, optimizer=sgd, schemes=[scheme])
    step(x, y)
    before = snapshot(model, sgd)
    wrong = x.clone()
    wrong[-1, 0] = 99  # no such token: only the worker's part fails
    pids = workers(step)
    with pytest.raises(WorkerError, match="processor 1"):
        step(wrong, y)
    assert all(map(torch.equal, snapshot(model, sgd), before)) and gone(pids)
    step(x, y)  # a new pool
    after = snapshot(model, sgd)
    assert not all(map(torch.equal, after, before))
    pids = workers(step)
    threading.Timer(0.05, os.kill, (pids[0], signal.SIGKILL)).start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        for _ in range(10_000):  # the worker dies amid one of them
            after = snapshot(model, sgd)
            step(x, y)
    assert all(map(torch.equal, snapshot(model, sgd), after)) and gone(pids)
    step.close()


def reader(model, data):
    """A graph that gives the parameters it reads."""
    draft = graphopt.capture(model, data, loss=F.cross_entropy).draft()
    names = {name: node for name, node in draft.origin.input_nodes(InputKind.PARAMETER).items()}
    results = [
        draft.add(torch.ops.aten.clone.default, node, like=node, before=draft.output, phase=Phase.FORWARD)
        for node in map(draft.node, names.values())
    ]
    draft.output.args = (tuple(results),)
    draft.signature = replace(draft.signature, outputs=tuple(Output(OutputKind.SAVED, name) for name in names))
    return DeadCode()(draft.finish()).graph


@pytest.mark.parametrize("synchronise", ["scatter", "tree"])
@pytest.mark.filterwarnings("ignore:.*take turns on")
def test_all_processors_read_the_same_bits_after_fifty_steps(synchronise):
    _, step, _, model, batch = pair("tokens", schemes=[DataParallel(3, synchronise)])
    for _ in range(50):
        step(*batch(5))
    assert step.plan.chosen.endswith(synchronise)
    graph = reader(model, batch(4))
    job = step.task.pools.of(3, 1).load(graph, gathered=graph.outputs)
    job([model.get_parameter(i.name) for i in job.common], [batch(2)] * 3)
    for k, output in enumerate(job.outputs):
        held = job.gathered(k)
        assert len(held) == 2 and all(torch.equal(one, model.get_parameter(output.name)) for one in held)
    step.close()


def test_gradients_of_other_owners_are_kept_too():
    eager, shared, a, b, batch = pair("perceptron", schemes=[DataParallel(2, "scatter")], keep_grads=True)
    for i in range(3):
        data = batch(5)
        torch.manual_seed(i)
        expected = torch.autograd.grad(F.cross_entropy(a.train()(data[0]), data[1]), list(a.parameters()))
        a.load_state_dict(b.state_dict())
        torch.manual_seed(i)
        shared(*data)
        for parameter, gradient in zip(b.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        a.load_state_dict(b.state_dict())
    assert shared.plan.chosen == "data parallel on 2, scatter"
    shared.close()


def test_an_update_that_reads_all_gradients_cannot_be_scattered():
    _, step, *_, batch = pair("tokens", schemes=["flat", DataParallel(2, "scatter")], clip=1.0)
    step(*batch(4))
    assert "reads gradients of several" in step.plan.candidate("data parallel on 2, scatter").why_not
    step.close()


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


@pytest.mark.parametrize("processors", [2, 3, 5])
def test_prices_of_trees_and_of_scattered_updates(processors):
    _, step, _, model, batch = pair("tokens", optimizer=torch.optim.AdamW, schemes=["flat"])
    step(*batch(8))
    prepared = step.situation._prepare(0)
    names, latency, bandwidth = ("owner", "tree", "scatter"), 1e-9, 1e5
    owner, tree, scatter = (DataParallel(processors, name).estimate(
        prepared, 8, lambda n: simple(link=Link(latency, bandwidth, busy=1.0))) for name in names)  # fmt: skip
    gradients = 8 * sum(p.numel() for p in model.parameters()) / bandwidth
    rounds = (processors - 1).bit_length()
    assert tree.terms["communication"] == pytest.approx(rounds * gradients, rel=0.2)
    assert scatter.terms["communication"] >= (processors - 1) / processors * gradients
    assert scatter.terms["optimizer"] < owner.terms["optimizer"] == pytest.approx(tree.terms["optimizer"])
    for price in (tree, scatter):
        assert price.seconds == pytest.approx(sum(price.terms.values()))
    step.close()


def test_links_are_measured():
    with Pool(2) as pool:
        link = measure_link(pool)
    points = link.points["all_reduce 2"]
    assert [size for size, _ in points] == list(SIZES) and all(b >= a > 0 for (_, a), (_, b) in pairwise(points))
    assert link.seconds("all_reduce", 1 << 20, 2) == pytest.approx(2 * link.seconds("all_gather", 1 << 20, 2))
