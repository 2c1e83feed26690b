"""Depth as a dimension: what it is of, that any runs can be left out, together with widths, in both modes."""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.errors import ElasticError
from tests.elastic.subnets import call, check_extraction


class Block(nn.Module):
    """An inverted bottleneck, with stochastic depth in train mode."""

    def __init__(self, width=8, hidden=12, drop=0.0):
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden), nn.Conv2d(hidden, width, 1)
        self.drop = drop

    def forward(self, x):
        y = self.down(F.relu(self.norm(self.up(x))))
        if self.drop and self.training:
            y = y * (torch.rand(len(y), 1, 1, 1) < 1 - self.drop).to(y.dtype) / (1 - self.drop)
        return x + y


class Stages(nn.Module):
    """Two stages with a change of width between them; the first block of a stage never drops."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, width + 4, 0.2 * i) for i in range(3))) for width in (8, 12)
        )
        self.between, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stages[1](self.between(self.stages[0](self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return elastic.space(Stages(), IMAGES)


IMAGES = torch.randn(4, 3, 6, 6)
FIRST, SECOND = "stages.0.depth", "stages.1.depth"


def test_stages_are_dimensions(stages):
    found = {d.name: d for d in stages.dimensions if d.kind is Kind.DEPTH}
    assert {n: d.choices for n, d in found.items()} == {FIRST: (1, 2, 3), SECOND: (1, 2, 3)}
    assert found[FIRST].where == ("stages.0.0", "stages.0.1", "stages.0.2")


def shorter(model, kept):
    """The model with other modules left out."""
    result = copy.deepcopy(model)
    for stage, indices in enumerate(kept):
        for i in set(range(3)) - set(indices):
            result.stages[stage][i] = nn.Identity()
    return result


@pytest.mark.parametrize("training", [False, True])
def test_any_runs_may_be_left_out(stages, training):
    model = stages.model.train(training)
    for kept in [(0, 1, 2), (0,), (2,), (0, 2), ()]:
        choice = stages.choice({FIRST: kept, SECOND: (1,)})
        right = call(shorter(model, [kept, (1,)]), (IMAGES,))
        assert torch.equal(call(stages.run, (IMAGES,), choice)[0], right[0])
        left = {n for n, m in shorter(model, [kept, (1,)]).named_modules() if isinstance(m, nn.Identity)}
        module = check_extraction(stages, choice, (IMAGES,), training=training)
        for path in ("stages.0.0", "stages.0.1", "stages.0.2", "stages.1.0"):
            assert (path in left) is not any(n.startswith(path + ".") for n in module.state_dict()), path


def test_what_is_left_out_draws_nothing_and_counts_nothing(stages):
    model = stages.model.train()
    counts = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    graph = stages.graph({FIRST: 1, SECOND: 1})
    assert not [n for n in graph.nodes if "rand" in str(n.target)]
    stages.run({FIRST: 1, SECOND: 2}, IMAGES)
    more = {n for n, b in model.named_buffers() if n in counts and int(b) > counts[n]}
    assert more == {f"stages.{s}.{i}.norm.num_batches_tracked" for s, i in [(0, 0), (1, 0), (1, 1)]}


def test_depth_with_widths(stages):
    inside = [d.name for d in stages.dimensions if d.kind is not Kind.DEPTH]
    for training in (False, True):
        for one, two in combinations([1, (0, 2), 3], 2):
            choice = stages.choice({**{n: 0.5 for n in inside}, FIRST: one, SECOND: two})
            check_extraction(stages, choice, (IMAGES,), training=training)


def test_widths_inside_of_a_layer_that_is_left_out_are_inactive(stages):
    small, large = (stages.choice({FIRST: 2, "stages.0.2.up.channel": size}) for size in (0.25, 1.0))
    assert small != large and small.key() == large.key()
    assert small.inactive == {"stages.0.2.up.channel"}


class Shared(nn.Module):
    """One block that is used twice, with batch norm in it."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 8, 1), Block(), Block()

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        return self.last(x).mean((2, 3))


def test_one_of_two_uses_of_a_block_is_left_out():
    space = elastic.space(Shared(), IMAGES)
    name = next(d.name for d in space.dimensions if d.kind is Kind.DEPTH)
    for kept in [(0,), (1,), (0, 1)]:
        for training in (False, True):
            check_extraction(space, space.choice({name: kept}), (IMAGES,), training=training)


def test_bad_values(stages):
    for value in ((3,), (0, 0), 4, -1, 1.5):
        with pytest.raises(ElasticError, match=r"stages\.0\.depth cannot be"):
            stages.choice({FIRST: value})
    with pytest.raises(ElasticError, match="from 0 to 3 runs"):
        elastic.space(Stages(), IMAGES, choices={FIRST: [5]})
    chosen = elastic.space(Stages(), IMAGES, choices={Kind.DEPTH: [0, 0.5]})
    assert chosen.dimension(FIRST).choices == (0, 2, 3)
