"""Prices of subnets against subnets that were made, and what is selected by them."""

import itertools
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
import graphopt.elastic as elastic
from graphopt.cost_model import Machine, estimate
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.memory import Memory
from graphopt.elastic import pareto
from graphopt.elastic.modes import evaluating
from graphopt.elastic.pareto import front
from graphopt.elastic.prices import METRICS, Prices, Training
from graphopt.elastic.region import Region
from graphopt.elastic.select import Budget, select
from graphopt.errors import ElasticError
from graphopt.graph.training_graph import InputKind
from tests.cost_model.machines import simple
from tests.elastic.supernets import BOTH, attentive, convolutional, untouched

MACHINE = simple()


@pytest.fixture(params=BOTH, ids=[make.__name__ for make in BOTH], scope="module")
def priced(request):
    space, x, y = request.param()
    with untouched(space):
        space.model.train()
        yield space, Prices(space, MACHINE, training=Training((x, y), F.cross_entropy)), x, y


def some(space, count=6):
    """Random choices, any runs of layers among them, and both ends."""
    region = Region.of(space, any_runs=True)
    return [region.choice(region.uniform(Random(i))) for i in range(count)] + [
        space.full,
        space.smallest,
    ]


def test_prices_are_those_of_the_subnets_when_made(priced):
    """FLOPs, parameters, peak and latency from the graph of the full net; the same from each subnet's own graph."""
    space, prices, _, _ = priced
    choices = some(space)
    table = prices.table(choices, METRICS[:4])
    with evaluating(space.model):
        for i, choice in enumerate(choices):
            graph = space.graph(choice)
            batch = {symbol: prices.batch_size for symbol in graph.symbols.symbols.values()}
            inputs = zip(graph.inputs, graph.placeholders, strict=True)
            held = [(g.kind, n.meta["val"].numel(), bool(n.users)) for g, n in inputs if g.kind is not InputKind.BATCH]
            unread = 4 * sum(numbers for _, numbers, read in held if not read)
            price = estimate(graph, MACHINE, {"batch": prices.batch_size})
            assert table["flops"][i] == price.flops
            assert table["parameters"][i] == sum(n for kind, n, read in held if kind is InputKind.PARAMETER and read)
            assert table["latency_seconds"][i] == pytest.approx(price.seconds, rel=0.02)
            assert table["peak_bytes"][i] == pytest.approx(Memory(graph).at(batch).total - unread, rel=0.01)
    assert len(set(table["flops"])) > 4


def test_prices_of_steps_are_those_of_the_subnets_when_made(priced):
    space, prices, x, y = priced
    region = Region.of(space, any_runs=True)
    choices = [region.choice(region.uniform(Random(1))), space.choice({"depth": 1})]
    found = prices.of(choices, "step_seconds")
    for choice, seconds in zip(choices, found, strict=True):
        joint = space.graph(choice, loss=F.cross_entropy, batch=(x, y), backward=True)
        price = estimate(joint, MACHINE, {"batch": prices.batch_size})
        counted = prices._step.prices([choice], {"batch": prices.batch_size}, machine=MACHINE, peak=False)
        assert counted.flops[0] == price.flops
        assert seconds == pytest.approx(price.seconds, rel=0.03)


def test_an_update_adds_to_a_step(priced):
    space, prices, x, y = priced
    adam = torch.optim.Adam(space.model.parameters())
    with_update = Prices(space, MACHINE, training=Training((x, y), F.cross_entropy, adam))
    choices = some(space, 2)
    added = with_update.of(choices, "step_seconds") - prices.of(choices, "step_seconds")
    whole = graphopt.capture(space.model, (x, y), loss=F.cross_entropy, optimizer=adam)
    terms = estimate(whole, MACHINE, {"batch": len(x)}).terms
    assert added[choices.index(space.full)] == pytest.approx(terms["optimizer"], rel=0.01)
    assert (added > 0).all() and added[-1] <= added[-2] * (1 + 1e-9)  # small tensors take as long as a call does


@pytest.mark.parametrize("kind", [{"foreach": False}, {"fused": True}, {}])
def test_an_update_is_that_of_the_parameters_that_a_subnet_has(priced, kind):
    """Its price is that of the extracted module's update: fewer and smaller tensors, some calls as long as ever."""
    space, _, x, y = priced
    step = Training((x, y), F.cross_entropy, torch.optim.AdamW(space.model.parameters(), **kind))
    points = ((1.0, 1e-5), (1e3, 1e-5), (1e9, 10.0))
    slow = simple(curves={family: replace(curve, points=points) for family, curve in MACHINE.curves.items()})
    prices = Prices(space, slow, mode="eager", training=step)
    for choice in some(space, 2):
        small = space.extract(choice).train()
        whole = graphopt.capture(
            small, (x, y), loss=F.cross_entropy, optimizer=torch.optim.AdamW(small.parameters(), **kind)
        )
        seconds = estimate(whole, slow, {"batch": len(x)}, mode="eager").terms["optimizer"]
        found = prices._update_seconds([choice], prices._step_graph())
        assert found[0] == pytest.approx(seconds, rel=0.01)  # fused: numbers beside the tensors


def test_other_batch_sizes_and_machines(priced):
    space, prices, _, _ = priced
    half = Prices(space, Machine.named("H100"), batch_size=prices.batch_size // 2)
    assert 2 * half.of([space.full], "flops")[0] == prices.of([space.full], "flops")[0]
    assert half.of([space.full], "latency_seconds")[0] < prices.of([space.full], "latency_seconds")[0]
    assert prices.of([], "flops").shape == (0,)


def test_prices_do_not_depend_on_what_was_asked_first():
    """Of convolutions of 1 x 1 other kernels run with one thread, on small batches."""
    space = elastic.space(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 6, 6))
    two = simple(fingerprint={"threads": 2 * torch.get_num_threads()})
    first, second = Prices(space, two), Prices(space)
    second.of([space.full], "flops")
    second._machine = two  # as the first question for seconds finds the machine
    for metric in ("latency_seconds", "peak_bytes"):
        assert first.of([space.smallest], metric)[0] == second.of([space.smallest], metric)[0]


# -- fronts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25))
def test_front_is_what_nothing_dominates(points):
    load, quality = np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)
    found = [points[i] for i in front(load, quality)]
    better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    assert found == sorted({p for p in points if not any(better(q, p) for q in points)})


def every(space):
    names = [d.name for d in space.dimensions]
    return [space.choice(dict(zip(names, v))) for v in itertools.product(*(d.choices for d in space.dimensions))]


@pytest.mark.parametrize("metric", ["flops", "parameters", "peak_bytes", "latency_seconds", "step_seconds"])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_selection_is_the_best_of_all(priced, metric, share):
    space, prices, _, _ = priced
    budget = share * float(prices.of([space.full], metric)[0])
    found = select(space, {metric: budget}, prices=prices)
    assert found.exact
    choices = every(space)
    costs, (flops, numbers) = prices.of(choices, metric), prices.table(choices, ["flops", "parameters"]).values()
    capacity = np.sqrt(flops / flops.max() * (numbers / numbers.max()))
    assert found.best.prices[metric] <= budget
    assert found.best.quality == pytest.approx(capacity[costs <= budget].max(), rel=1e-9)
    rising = [(one.prices[metric], one.quality) for one in found.front]
    assert rising == sorted(rising) and len({q for _, q in rising}) == len(rising)
    assert str(found.choice) in str(found)


def test_evolution_comes_near_the_best_of_all(priced, monkeypatch):
    space, prices, _, _ = priced
    budget = Budget(latency_seconds=0.5 * float(prices.of([space.full], "latency_seconds")[0]))
    exact = select(space, budget, prices=prices)
    monkeypatch.setattr(pareto, "EXACT", 1)
    few = Region.of(space).size // 2
    for seed in range(3):
        found = select(space, budget, prices=prices, candidates=min(few, 400), seed=seed)
        assert found.best.quality >= 0.97 * exact.best.quality
        assert found.best.prices["latency_seconds"] <= budget.latency_seconds


def test_several_bounds_and_a_quality_of_the_users(priced):
    space, prices, _, _ = priced
    whole = prices.table([space.full], ["flops", "parameters"])
    bounds = {"flops": 0.5 * float(whole["flops"][0]), "parameters": 0.4 * float(whole["parameters"][0])}
    name = space.dimensions[0].name
    found = select(space, bounds, prices=prices, quality=lambda choices: [choice[name] for choice in choices])
    assert all(found.best.prices[metric] <= bound for metric, bound in bounds.items())
    assert found.best.quality == max(
        choice[name]
        for choice, flops, numbers in zip(
            every(space), prices.of(every(space), "flops"), prices.of(every(space), "parameters")
        )
        if flops <= bounds["flops"] and numbers <= bounds["parameters"]
    )


def test_among_some_dimensions_only(priced):
    space, prices, _, _ = priced
    budget = 0.8 * float(prices.of([space.full], "flops")[0])
    found = space.select({"flops": budget}, prices=prices, among=["depth"])
    assert all(found.choice[d.name] == d.full for d in space.dimensions if d.kind != "depth")


def test_the_best_are_measured():
    space, _, _ = attentive()
    prices = Prices(space, MACHINE)
    budget = 0.5 * float(prices.of([space.full], "flops")[0])
    found = select(space, {"flops": budget}, prices=prices, measured=2)
    assert found.best.measured is not None and found.best.measured.seconds > 0
    assert sum(one.measured is not None for one in found.front) == 2


def test_predictions_pass_through_measured_times():
    space, _, _ = attentive()
    prices = Prices(space, MACHINE)
    choices = some(space)
    before = prices.of(choices, "latency_seconds")
    ends = {space.full: 3 * before[-2], space.smallest: 2 * before[-1]}
    found = prices.corrected("latency_seconds", ends)
    after = found.of(choices, "latency_seconds")
    assert after[-2:] == pytest.approx(list(ends.values()))
    assert np.all(after >= 1.999 * before) and np.all(after <= 3.001 * before)
    assert np.all(np.argsort(after) == np.argsort(before))
    assert np.all(prices.of(choices, "latency_seconds") == before)
    assert np.all(found.of(choices, "flops") == prices.of(choices, "flops"))
    one = found.corrected("latency_seconds", {choices[0]: 5 * before[0]})
    assert one.of(choices, "latency_seconds") == pytest.approx(5 * before)
    for metric, seconds in (("flops", ends), ("latency_seconds", {}), ("latency_seconds", {space.full: 0.0})):
        with pytest.raises(ElasticError, match="corrected: expected one of"):
            prices.corrected(metric, seconds)


def test_a_bound_of_time_is_one_of_measured_time(monkeypatch):
    """On a machine that takes ten times as long as predicted, but for some subnets that take twenty times as long."""
    space, _, _ = attentive()
    prices = Prices(space, MACHINE)
    slow = set()

    def latencies(space, choices):
        seconds = prices.of(choices, "latency_seconds")
        factors = [20.0 if choice in slow else 10.0 for choice in choices]
        return {c: Measurement(s * f, s * f, s * f, 7) for c, s, f in zip(choices, seconds, factors, strict=True)}

    monkeypatch.setattr("graphopt.elastic.select._latencies", latencies)
    whole, least = (10 * float(prices.of([end], "latency_seconds")[0]) for end in (space.full, space.smallest))
    bound = (whole * least) ** 0.5
    found = select(space, {"latency_seconds": bound}, prices=prices, measured=3)
    assert 0.9 * bound < found.best.measured.seconds <= bound
    assert found.best.prices["latency_seconds"] == pytest.approx(found.best.measured.seconds)
    slow.update(one.choice for one in found.front if one.measured)
    with pytest.raises(ElasticError, match="none of the 3 that were measured keeps latency_seconds"):
        select(space, {"latency_seconds": bound}, prices=prices, measured=3)
    with pytest.raises(ElasticError, match="no subnet meets it"):
        select(space, {"latency_seconds": least / 2}, prices=prices, measured=3)


class WithFlags(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, gate=None, scale=1.0):
        y = self.down(self.up(x).relu()) * scale
        return y if gate is None else y * gate


@pytest.mark.parametrize("batch", [(torch.randn(3, 4), None, 2.0), {"x": torch.randn(3, 4), "scale": 2.0}])
def test_arguments_that_are_no_tensors_are_in_what_is_measured(batch):
    space = elastic.space(WithFlags(), batch)
    prices = Prices(space, MACHINE)
    budget = float(prices.of([space.full], "flops")[0])
    assert select(space, {"flops": budget}, prices=prices, measured=1).best.measured.seconds > 0


def test_a_budget_that_nothing_meets_names_the_nearest():
    space, _, _ = convolutional()
    with pytest.raises(ElasticError) as caught:
        select(space, {"parameters": 3, "flops": 1e12})
    numbers = Prices(space).of([space.smallest], "parameters")[0]
    assert f"parameters of {numbers:,} (budget 3)" in str(caught.value)
    assert str(space.smallest) in str(caught.value) and "flops" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: select(s, {"speed": 1}), "budget"),
        (lambda s: select(s, {}), "positive numbers"),
        (lambda s: Budget(flops=-1), "positive numbers"),
        (lambda s: Budget(flops=float("nan")), "positive numbers"),
        (lambda s: Prices(s, mode="fast"), "mode"),
        (lambda s: Prices(s, batch_size=0), "batch_size"),
        (lambda s: Prices(s).of([s.full], "beauty"), "beauty"),
        (lambda s: Prices(s, MACHINE).of([s.full], "step_seconds"), "training"),
        (lambda s: select(s, {"flops": 1e9}, prices=Prices(s, MACHINE), machine=simple()), "another one"),
    ],
)
def test_bad_input(make, words):
    space, _, _ = convolutional()
    with pytest.raises(ElasticError, match=words):
        make(space)
