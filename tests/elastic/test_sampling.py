"""Strategies of sampling: what they draw, that a seed and a saved state decide it, and what they refuse."""

from collections import Counter
from random import Random as Dice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt import elastic
from graphopt.elastic.region import Region
from graphopt.elastic.sampler import Sampler, subnets_for
from graphopt.elastic.sampling import (
    BudgetHistogram,
    ByStage,
    DepthSamples,
    Empty,
    Fixed,
    Leaning,
    Mixed,
    PerLayer,
    Random,
    Recurring,
    Rotating,
    Sandwich,
    Strategy,
    Turn,
    Weighted,
    Within,
    distinct,
)
from graphopt.errors import ElasticError
from tests.elastic.supernets import convolutional


@pytest.fixture(scope="module")
def space():
    return convolutional()[0]


@pytest.fixture(scope="module")
def region(space):
    return Region.of(space)


def depth_of(space):
    return next(d for d in space.dimensions if d.kind == "depth")


def widths_of(space):
    return [d for d in space.dimensions if d.kind == "width"]


def total(choices):
    """A cost without a model: the sum of all sizes."""
    return [sum(len(v) if isinstance(v, tuple) else v for v in choice.values()) for choice in choices]


def strategies(space) -> dict[str, Strategy]:
    width = widths_of(space)[0]
    weights = [0.0, 1.0] + [2.0] * (len(width.choices) - 2)
    return {
        "empty": Empty(),
        "fixed": Fixed([{}, {"width": 0.5}, space.smallest]),
        "random": Random(),
        "leaning": Leaning(),
        "weights of choices": Weighted(choices={space.full: 1.0, space.smallest: 3.0}),
        "weights of sizes": Weighted(dimensions={width.name: weights}),
        "histogram": BudgetHistogram(total, [0, 15, 25, 60], [1, 2, 1]),
        "mixed": Mixed((Fixed([{}]), 1), (Random(), None)),
        "sandwich": Sandwich(fixed=({"width": 0.5},)),
        "sandwich of a histogram": Sandwich(rest=BudgetHistogram(total, [0, 20, 60], [1, 1])),
        "within": Within(["depth"], Random()),
        "by stage": ByStage((2, Empty()), (2, Within(["width"], Sandwich())), (None, Random())),
        "depths": DepthSamples(),
        "rotating": Rotating(),
        "recurring": Recurring(Random(), sets=2),
        "nested": Mixed((DepthSamples(others=Weighted(dimensions={width.name: weights})), 2), (Sandwich(), None)),
    }


NAMES = sorted(strategies(convolutional()[0]))


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NAMES), count=st.integers(1, 8), seed=st.integers(0, 99), runs=st.booleans())
def test_draws_are_different_subnets_of_the_region_and_follow_the_seed(name, count, seed, runs):
    space = convolutional()[0]
    region = Region.of(space, any_runs=runs)
    one, other = (Sampler(region, strategies(space)[name], count, seed=seed) for _ in range(2))
    for _ in range(5):
        drawn = one.draw()
        assert drawn == other.draw()
        assert 1 <= len(drawn) <= count
        assert len(distinct(drawn)) == len(drawn)
        assert space.full not in drawn[1:]  # the teacher of a distillation comes first
        for choice in drawn:
            assert all(d.admits(choice[d.name]) for d in space.dimensions)
    state = one.state_dict()
    resumed = Sampler(region, strategies(space)[name], count, seed=seed + 1)
    resumed.load_state_dict(state)
    assert [resumed.draw() for _ in range(3)] == [one.draw() for _ in range(3)]


def draw(strategy, region, count, seed=0, step=0):
    return strategy.draw(region, count, Turn(step, Dice(seed)))


def test_sandwich_holds_both_ends_and_what_is_fixed(space, region):
    for seed in range(5):
        drawn = draw(Sandwich(fixed=({"width": 0.5},)), region, 6, seed)
        assert drawn[:3] == [space.full, space.smallest, space.choice({"width": 0.5})]
        assert len(drawn) == 6
    assert draw(Sandwich(), region, 1) == [space.full]


def test_fixed_takes_turns_where_fewer_are_wanted(space, region):
    sizes = [{}, {"width": 0.5}, space.smallest]
    seen = [draw(Fixed(sizes), region, 1, step=step)[0] for step in range(6)]
    assert seen == [space.choice({**space.full, **size}) for size in sizes] * 2


def test_weights_decide_how_often(space, region):
    width = widths_of(space)[0]
    weights = [0.0, 3.0, 1.0, 0.0]
    assert len(width.choices) == len(weights)
    dice = Dice(0)
    strategy = Weighted(dimensions={width.name: weights})
    count = Counter(strategy.draw(region, 1, Turn(0, dice))[0][width.name] for _ in range(800))
    assert set(count) == set(width.choices[1:3])
    assert count[width.choices[1]] / 800 == pytest.approx(0.75, abs=0.06)  # four standard deviations
    whole = Weighted(choices={space.full: 1.0, space.smallest: 3.0})
    many = Counter(whole.draw(region, 1, Turn(0, dice))[0] for _ in range(800))
    assert many[space.smallest] / 800 == pytest.approx(0.75, abs=0.06)


def test_leaning_draws_come_near_the_ends(space, region):
    ends = total([space.smallest, space.full])
    spreads = []
    for strategy in (Random(), Leaning()):
        dice = Dice(0)
        costs = [total(strategy.draw(region, 1, Turn(0, dice)))[0] for _ in range(400)]
        assert all(ends[0] <= cost <= ends[1] for cost in costs)
        spreads.append(float(torch.tensor(costs, dtype=torch.float64).std()))
    assert spreads[1] > 1.2 * spreads[0]


def test_histogram_follows_its_bins(region):
    strategy, dice = BudgetHistogram(total, [0, 18, 24, 60], [2, 0, 1]), Dice(1)
    costs = [total(strategy.draw(region, 1, Turn(0, dice)))[0] for _ in range(300)]
    assert not [cost for cost in costs if 18 < cost < 24]
    assert sum(cost <= 18 for cost in costs) / 300 == pytest.approx(2 / 3, abs=0.11)


def test_mixed_counts_its_parts(space, region):
    drawn = draw(Mixed((Fixed([space.smallest]), 1), (Random(), 2), (Empty(), 3)), region, 8)
    assert len(drawn) == 3 and drawn[0] == space.smallest


def test_stages_follow_the_step(space, region):
    strategy = ByStage((2, Empty()), (3, Fixed([space.smallest])), (None, Within(["depth"], Random())))
    assert [len(draw(strategy, region, 1, step=step)) for step in range(6)] == [0, 0, 1, 1, 1, 1]
    depth = depth_of(space).name
    for seed in range(10):
        last = draw(strategy, region, 1, seed, step=9)[0]
        assert all(last[name] == space.full[name] for name in last if name != depth)


def test_depths_share_their_sizes_and_hold_the_shallowest_and_a_fixed_one(space):
    depth = depth_of(space)
    region = Region.of(space, any_runs=True)
    for seed in range(20):
        drawn = draw(DepthSamples(fixed={depth.name: 2}), region, 4, seed)
        assert len({tuple(v for n, v in choice.items() if n != depth.name) for choice in drawn}) == 1
        assert [choice[depth.name] for choice in drawn[:2]] == [2, depth.choices[0]]
        assert len(drawn) == 4
    width = widths_of(space)[0]
    shared = [draw(DepthSamples(), region, 2, seed, step=seed)[0][width.name] for seed in range(40)]
    assert shared[::4] == [width.full] * 10 and shared[1::4] == [width.smallest] * 10
    assert len(set(shared[2::4])) > 1


def test_sets_recur_whatever_the_seed_of_the_draws_is(region):
    strategy = Recurring(sets=3)
    sets = [draw(strategy, region, 4, seed=step, step=step) for step in range(9)]
    assert sets == sets[:3] * 3
    assert len({frozenset(one) for one in sets}) == 3
    assert sets[0] != draw(Recurring(sets=3, seed=1), region, 4)


def test_transformations_are_drawn_layer_by_layer():
    """Two layers with two and three ways each: four subnets hold each way of each layer once before one comes again."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3, padding=1), torch.nn.Flatten(),
        torch.nn.Linear(4 * 25, 3),
    )  # fmt: skip
    x, y = torch.randn(8, 1, 5, 5), torch.randint(3, (8,))
    layers = {
        "0": [elastic.Identity(), elastic.Linear()],
        "2": [elastic.Identity(), elastic.Linear(), elastic.NonLinear()],
    }
    space = elastic.space(net, x, layers=layers)
    ways = {d.name: d.choices for d in space.dimensions if d.kind == "transformation"}
    assert sorted(map(len, ways.values())) == [2, 3]
    for seed in range(5):
        drawn = draw(PerLayer(Random()), Region.of(space), 3, seed)
        assert len(drawn) == 3
        for name, choices in ways.items():
            assert {choice[name] for choice in drawn} == set(choices)
    parameters = [*net.parameters(), *space.layers.parameters()]
    before = [p.detach().clone() for p in parameters]
    step = elastic.ElasticStep(space, F.cross_entropy, torch.optim.SGD(parameters, 0.1), strategy=PerLayer(), subnets=6)
    losses = [float(step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_any_runs_draws_subsets(space):
    depth = depth_of(space)
    region = Region.of(space, any_runs=True).only(["depth"])
    kept = Counter(draw(Random(), region, 1, seed)[0][depth.name] for seed in range(200))
    assert {1, 2, 3, (0, 2), (1, 2), (1,), (2,)} == set(kept)
    first = Counter(draw(Random(), Region.of(space).only(["depth"]), 1, seed)[0][depth.name] for seed in range(50))
    assert set(first) == set(depth.choices)


def test_a_closed_dimension_stays_full(space):
    closed = Region.of(space).only([])
    assert closed.size == 1 and closed.full == closed.smallest == space.full
    for name, strategy in strategies(space).items():
        if name not in ("fixed", "weights of choices", "by stage", "nested", "sandwich"):
            assert Sampler(closed, strategy, 4).draw() == (space.full,), name


@pytest.mark.parametrize(
    ("targets", "count"), [([1e9], 4), ([6e8, 1e8], 5), ([1e9, 1e3], 8), ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6], 7)]
)
def test_how_many_subnets_targets_need(targets, count):
    assert subnets_for(targets) == count


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: Fixed([]), "Empty"),
        (lambda s: Weighted(), "either choices or dimensions"),
        (lambda s: Weighted(choices={s.full: -1.0}), "at least 0"),
        (lambda s: Weighted(choices={s.full: float("nan")}), "at least 0"),
        (lambda s: BudgetHistogram(total, [3, 2], [1]), "ascending"),
        (lambda s: BudgetHistogram(total, [1, 2], [1, 1]), "one more than weights"),
        (lambda s: Mixed((Random(), None), (Random(), None)), "at most once"),
        (lambda s: ByStage((None, Random()), (1, Random())), "at least one step"),
        (lambda s: Recurring(sets=0), "at least one set"),
        (lambda s: Sampler(Region.of(s), Random(), 0), "positive number"),
        (lambda s: Region.of(s).only(["nothing like it"]), "nothing like it"),
        (lambda s: subnets_for([]), "positive budgets"),
        (lambda s: Sampler(Region.of(s), Random()).load_state_dict({"step": 1}), "no state of a sampler"),
        (lambda s: draw(Weighted(dimensions={"width": [1.0]}), Region.of(s), 1), "got 1 weights"),
        (lambda s: draw(Fixed([{"width": 3}]), Region.of(s), 1), "3"),
    ],
)
def test_bad_input(space, make, words):
    with pytest.raises(ElasticError, match=words):
        make(space)
