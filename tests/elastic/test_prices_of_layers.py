"""Prices where the choices of a layer are kernels, transformations or parts of its input."""

import pytest
import torch
from torch import nn

import graphopt.elastic as elastic
from graphopt import capture_forward
from graphopt.cost_model import estimate
from graphopt.elastic.layers import KernelMatrices
from graphopt.elastic.modes import evaluating
from graphopt.elastic.partial_reads import ReadInput
from graphopt.elastic.prices import METRICS, Prices, Training
from graphopt.elastic.transformations import Linear, NonLinear
from graphopt.errors import ElasticError
from tests.cost_model.machines import simple

MACHINE = simple()


class Depthwise(nn.Module):
    """A dense and a depthwise convolution of 5 x 5 and one of 7 x 7, on images of any size."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.wide, self.head = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.depthwise(self.stem(x).relu()).relu()
        return self.head(self.wide(x).relu().mean((2, 3)))


def assert_priced_as(prices, choice, graph):
    """FLOPs, parameters and latency of a choice are those of a graph of its own."""
    found = prices.table([choice], METRICS[:4])
    price = estimate(graph, MACHINE, {"batch": prices.batch_size} if graph.symbols.symbols else {})
    assert found["flops"][0] == price.flops
    assert found["latency_seconds"][0] == pytest.approx(price.seconds, rel=0.02)


@pytest.mark.parametrize("width", [2, 3, 6, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_elastic_kernels_of_depthwise_convolutions(width, batch):
    """Images narrower than some of the kernels among them: other kernels of the processor run there."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 8, width)
    space = elastic.space(Depthwise(), x)
    prices = Prices(space, MACHINE)
    with evaluating(space.model):
        for kernel in (3, 5, 7):
            choice = space.choice({d.name: min(kernel, d.full) for d in space.dimensions if d.kind == "kernel"})
            assert_priced_as(prices, choice, space.graph(choice))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("choice", [{}, {"kernel": 3}, {"width": 0.5}, {"width": 0.5, "kernel": 3}])
def test_steps_with_elastic_kernels_are_priced(choice, layout):
    """Depthwise convolutions run other kernels where channels come last, whatever the width."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 3).to(memory_format=layout), torch.randint(4, (4,))
    space = elastic.space(Depthwise().to(memory_format=layout), x)
    loss = nn.functional.cross_entropy
    prices = Prices(space, MACHINE, training=Training((x, y), loss))
    chosen = space.choice(choice)
    joint = space.graph(chosen, loss=loss, batch=(x, y), backward=True)
    found = prices.of([chosen], "step_seconds")[0]
    assert found == pytest.approx(estimate(joint, MACHINE, {"batch": 4}).seconds, rel=0.03)


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        (KernelMatrices, [{"depthwise.kernel": 3}, {"depthwise.kernel": 5}]),
        (lambda: Linear(3), [{"depthwise.transformation": 0}, {"depthwise.transformation": 1}]),
        (lambda: NonLinear(), [{"depthwise.transformation": 0}, {"depthwise.transformation": 1}]),
    ],
)
def test_transformed_weights_are_priced_as_they_are_extracted(options, choices):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    space = elastic.space(Depthwise(), x, layers={"depthwise": options})
    prices = Prices(space, MACHINE)
    for choice in map(space.choice, choices):
        small = space.extract(choice).eval()
        assert_priced_as(prices, choice, capture_forward(small, x))
        assert prices.of([choice], "parameters")[0] == sum(p.numel() for p in small.parameters())


def test_a_part_of_an_input_is_not_priced():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    space = elastic.space(net, torch.randn(3, 4), layers={"2": ReadInput(0.5)})
    prices = Prices(space, MACHINE)
    budget = float(prices.of([space.full], "flops")[0])
    with pytest.raises(ElasticError, match=r"2\.read at 4 is not priced"):
        prices.of([space.smallest], "flops")
    assert space.select({"flops": budget}, prices=prices, among=["width"]).choice == space.full
