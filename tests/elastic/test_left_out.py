"""Joint graphs and prices of subnets that leave layers out: those of a fresh trace of the shorter model."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt.elastic as elastic
from graphopt import with_backward
from graphopt.cost_model import estimate
from graphopt.elastic.prices import Prices, Training
from graphopt.elastic.region import Region
from tests.cost_model.machines import simple
from tests.elastic.supernets import Attention, Block
from tests.elastic.test_joint import assert_same_graph

MACHINE = simple()


class MLP(nn.Module):
    """``end(x + down(act(up(norm(x)))))``."""

    def __init__(self, norm, act, end, bias=True):
        super().__init__()
        self.norm, self.act, self.end = norm, act, end
        self.up, self.down = nn.Linear(8, 12, bias=bias), nn.Linear(12, 8, bias=bias)

    def forward(self, x):
        return self.end(x + self.down(self.act(self.up(self.norm(x)))))


class Scaled(nn.Module):
    """Two sums in one, a scale for each channel, and dropout."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gamma = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        y = self.one(x).tanh()
        return x + self.gamma * self.drop(y + self.two(y) * x)


class Trunk(nn.Module):
    """A stem or none, blocks, a head.

    ``shared``: the last block is the first one again. ``context``: what all blocks read beside their input, computed
    from the batch. ``skip``: the head reads the input of the second block too.
    """

    def __init__(self, stem, blocks, head, shared=False, context=False, skip=False):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head
        self.context = nn.Linear(8, 8) if context else None
        self.order = [*range(len(blocks)), *([0] if shared else [])]
        self.skip = skip

    def forward(self, x):
        x = self.stem(x)
        seen = []
        c = None if self.context is None else self.context(x).tanh()
        for i in self.order:
            seen.append(x)
            y = self.blocks[i](x)
            x = y if c is None else x + (y - x) * c
        return self.head(x + seen[1] if self.skip else x)


@st.composite
def trunks(draw):
    """A `Trunk` with a batch and its target; blocks are of one kind, some of their parameters frozen."""
    torch.manual_seed(draw(st.integers(0, 3)))
    kind = draw(st.sampled_from(["mlp", "mlp", "scaled", "attention", "convolution"]))
    norm = draw(st.sampled_from([nn.Identity, lambda: nn.LayerNorm(8)]))
    act = draw(st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU]))
    end = draw(st.sampled_from([nn.Identity, nn.ReLU, lambda: nn.LayerNorm(8)]))
    bias = draw(st.booleans())
    block = {
        "mlp": lambda: MLP(norm(), act(), end(), bias),
        "scaled": Scaled,
        "attention": lambda: Attention(8, 2, 12),
        "convolution": lambda: Block(8, 6),
    }[kind]
    shape = {"attention": (3, 8), "convolution": (8, 4, 4)}.get(kind, (8,))
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if kind == "convolution" else [nn.Flatten()]
    wide = 24 if kind == "attention" else 8
    layer = nn.Conv2d(8, 8, 1) if kind == "convolution" else nn.Linear(8, 8)
    odd = draw(st.sampled_from(["nothing", "nothing", "no stem", "shared", "context", "skip", "frozen"]))
    if odd == "context" and kind == "convolution":
        odd = "nothing"
    blocks = [block() for _ in range(draw(st.integers(2, 3)))]
    net = Trunk(
        nn.Identity() if odd == "no stem" else layer, blocks, nn.Sequential(*pooled, nn.Linear(wide, 3)),
        **({odd: True} if odd in ("shared", "context", "skip") else {}),
    )  # fmt: skip
    if odd == "frozen":
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith(draw(st.sampled_from(["stem", "blocks.1", "head"]))))
        net.head[-1].bias.requires_grad_(True)
    return net, torch.randn(4, *shape), torch.randint(3, (4,))


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(trunks(), st.integers(0, 1000))
def test_layers_are_left_out_of_joint_graphs_and_prices(drawn, seed):
    net, x, y = drawn
    space = elastic.space(net.train(), x)
    region, loss = Region.of(space, any_runs=True), F.cross_entropy
    prices = Prices(space, MACHINE, training=Training((x, y), loss))
    choices = [region.choice(region.uniform(Random(seed + i))) for i in range(2)] + [space.smallest]
    flops, seconds = prices.step_flops(choices), prices.of(choices, "step_seconds")
    for i, choice in enumerate(choices):
        truth = with_backward(space.subnet(choice, loss=loss, batch=(x, y)).graph)
        assert_same_graph(space.graph(choice, loss=loss, batch=(x, y)), truth)
        price = estimate(truth, MACHINE, {"batch": 4})
        assert flops[i] == price.flops
        assert seconds[i] == pytest.approx(price.seconds, rel=1e-6)
