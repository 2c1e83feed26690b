"""A layer reads a part of its input and passes on a part of its output; the axis behind follows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.elastic.partial_reads import PassOutput, ReadInput
from graphopt.errors import ElasticError
from tests.elastic.subnets import check_extraction

X = torch.randn(3, 6)


class Net(nn.Module):
    """``one`` is read by two layers; ``deep`` alone makes what ``last`` reads."""

    def __init__(self):
        super().__init__()
        self.one, self.deep, self.side = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(8, 5)
        self.norm, self.last = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        y = F.relu(self.one(x))
        return self.last(self.norm(self.deep(y))) + self.side(y)


def net_space(**layers):
    torch.manual_seed(0)
    return elastic.space(Net(), X, layers={name: option for name, option in layers.items()})


def test_the_example_of_the_document():
    """A layer reads 50 % of what its producer gives and passes on 75 % of its output."""
    space = net_space(deep=[ReadInput(0.5), PassOutput(0.75)])
    assert space.dimension("deep.read").choices == (4, 8)
    assert space.dimension("deep.hidden").choices == (9, 12)
    choice = space.choice({"deep.read": 4, "deep.hidden": 9})
    net = space.model
    y = F.relu(net.one(X))  # the producer is as wide as before, for its other reader
    z = F.layer_norm(
        F.linear(y[:, :4], net.deep.weight[:9, :4], net.deep.bias[:9]), (9,), net.norm.weight[:9], net.norm.bias[:9]
    )
    right = F.linear(z, net.last.weight[:, :9], net.last.bias) + net.side(y)
    torch.testing.assert_close(space.run(choice, X), right)
    module = check_extraction(space, choice, (X,), training=True)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert (shapes["one.weight"], shapes["deep.weight"], shapes["last.weight"]) == ((8, 6), (9, 4), (5, 9))


def test_the_part_is_of_what_the_subnet_has():
    space = net_space(deep=ReadInput(0.5))
    for width in (2, 4, 6, 8):
        choice = space.choice({"one.hidden": width, "deep.read": 4})
        module = check_extraction(space, choice, (X,), training=False)
        assert module.deep.weight.shape[1] == width // 2


class Images(nn.Module):
    """A convolution, a transposed one, and a linear layer behind a flattened image of 3 x 3."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.up = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ConvTranspose2d(6, 4, 3, 2),
        )
        self.fc = nn.Linear(4 * 7 * 7, 5)

    def forward(self, x):
        return self.fc(self.up(self.conv(self.stem(x))).flatten(1))


def test_convolutions_and_flattened_images():
    x = torch.randn(2, 3, 5, 5)
    space = elastic.space(Images(), x, layers={"conv": ReadInput(0.5), "up": ReadInput(0.5), "fc": ReadInput(0.5)})
    assert {d.name: d.choices for d in space.dimensions if d.kind is Kind.READ} == {
        "conv.read": (4, 8), "up.read": (3, 6), "fc.read": (98, 196),
    }  # fmt: skip
    choice = space.choice({Kind.READ: 0.5, "stem.channel": 4})
    module = check_extraction(space, choice, (x,), training=True)
    assert (module.conv.weight.shape[1], module.up.weight.shape[0], module.fc.weight.shape[1]) == (2, 3, 98)


def test_sizes_that_the_user_gives():
    x = torch.randn(2, 3, 5, 5)
    made = lambda *sizes: elastic.space(Images(), x, layers={"fc": ReadInput(0.5)}, choices={"fc.read": sizes})
    assert made(49, 0.5).dimension("fc.read").choices == (49, 98, 196)
    for wrong in (50, 0, 245, True, 1.5):
        with pytest.raises(ElasticError, match=r"fc\.read can have multiples of 49 up to 196"):
            made(wrong)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.depthwise = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, 1, 1, groups=4),
        )
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.depthwise(x + self.body(x)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"stem": PassOutput(0.5)}, "is made by body.weight too"),
        ({"head": PassOutput(0.5)}, "the output of head.weight cannot be cut"),
        ({"depthwise": ReadInput(0.5)}, "reads its own group"),
    ],
)
def test_what_cannot_be_cut_says_why(layers, message):
    with pytest.raises(ElasticError, match=message):
        elastic.space(Residual(), torch.randn(2, 3, 4, 4), layers=layers)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, True, "half"])
def test_bad_ratios(ratio):
    for part in (ReadInput, PassOutput):
        with pytest.raises(ElasticError, match="expected a ratio above 0 and up to 1"):
            part(ratio)
