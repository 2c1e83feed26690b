"""Transformations: what they compute, how subnets draw them, that they are trained, saved and extracted."""

import pytest
import torch
from torch import nn

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.elastic.importance import sort_by_importance
from graphopt.elastic.layers import KernelMatrices
from graphopt.elastic.partial_reads import ReadInput
from graphopt.elastic.region import draws
from graphopt.elastic.sized_code import run
from graphopt.elastic.transformations import Identity, InTurn, Linear, NonLinear, Own, Transformation, draw
from graphopt.errors import ElasticError
from tests.elastic.subnets import check_extraction

X = torch.randn(3, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 5, padding=2)
        self.norm, self.fc, self.head = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(self.stem(x)).relu().mean((2, 3))
        return self.head(self.fc(self.norm(x)).relu())


class Squared(Transformation):
    """A user's own, without parameters."""

    def forward(self, weight):
        return weight * weight.abs()


LAYERS = {
    "conv": [Linear(3), NonLinear(5), InTurn([Linear(5), Linear(3)]), Identity(3), Identity()],
    "norm": [Own],
    "fc": [Linear(), Squared()],
}


def net_space():
    torch.manual_seed(0)
    made = {p: [type(t)(t.kernel) if type(t) in (Linear, NonLinear) else t for t in ts] for p, ts in LAYERS.items()}
    made["conv"][2] = InTurn([Linear(5), Linear(3)])
    space = elastic.space(Net(), X, layers=made)
    with torch.no_grad():
        for parameter in space.layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return space


@pytest.fixture(scope="module")
def space():
    return net_space()


def test_layers_have_choices(space):
    found = {d.name: d.choices for d in space.dimensions if d.kind is Kind.TRANSFORMATION}
    assert found == {
        "conv.transformation": (0, 1, 2, 3, 4), "norm.transformation": (0, 1), "fc.transformation": (0, 1, 2),
    }  # fmt: skip
    assert not [d for d in space.dimensions if d.kind is Kind.KERNEL]  # the transformations choose the kernel
    assert torch.equal(space.run(space.full, X), space.model(X))


def test_a_subnet_computes_with_transformed_weights(space):
    model, layers = space.model, space.layers
    linear, own, scale = layers.lists["conv"][0], layers.lists["norm"][0], layers.lists["fc"][0]
    three = (model.conv.weight[:, :, 1:4, 1:4].flatten(2) @ linear.matrix.T).view(8, 4, 3, 3)
    y = nn.functional.conv2d(model.stem(X), three, model.conv.bias, padding=1).relu().mean((2, 3))
    y = nn.functional.layer_norm(y, (8,), own.weight, model.norm.bias)
    y = nn.functional.linear(y, model.fc.weight * scale.matrix, model.fc.bias).relu()
    choice = space.choice({"conv.transformation": 0, "norm.transformation": 0, "fc.transformation": 0})
    torch.testing.assert_close(space.run(choice, X), model.head(y))


WEIGHTS = {"conv.weight", "norm.weight", "fc.weight"}


@pytest.mark.parametrize("training", [False, True])
def test_every_transformation_is_extracted(space, training):
    widths = {d.name: 0.5 for d in space.dimensions if d.kind is Kind.WIDTH}
    assert widths
    for i in range(5):
        values = {"conv.transformation": i, "norm.transformation": i % 2, "fc.transformation": i % 3}
        choice = space.choice({**widths, **values})
        module = check_extraction(space, choice, (X,), training=training, transformed=WEIGHTS)
        assert set(module.state_dict()) == set(space.model.state_dict())
        assert module.conv.weight.shape[-1] == (3, 5, 3, 3, 5)[i]


def test_only_the_transformations_of_a_subnet_get_gradients(space):
    space.layers.zero_grad()
    choice = space.choice({"conv.transformation": 2, "fc.transformation": 1})
    space.run(choice, X).square().sum().backward()
    with_gradient = {n for n, p in space.layers.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {f"transformations.conv.transformation2.steps.{i}.matrix" for i in (0, 1)}
    assert bool(space.model.conv.weight.grad.any())


def test_parameters_are_saved(space):
    other = net_space()
    choice = {"conv.transformation": 1, "norm.transformation": 0, "fc.transformation": 0}
    with torch.no_grad():
        for parameter in other.layers.parameters():
            parameter.mul_(1.5)
    other.model.load_state_dict(space.model.state_dict())
    assert not torch.equal(space.run(choice, X), other.run(choice, X))
    other.layers.load_state_dict(space.layers.state_dict())
    assert torch.equal(space.run(choice, X), other.run(choice, X))


def test_new_transformations_are_the_weight_itself():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 5, 5)
    for made in (
        Linear(),
        NonLinear(),
        NonLinear(hidden=2, activation=torch.tanh),
        Own(),
        InTurn([Linear(), NonLinear()]),
    ):
        made.fit(weight)
        torch.testing.assert_close(made(weight), weight)
        torch.testing.assert_close(made(weight[:2, :2]), weight[:2, :2])  # at any width
    for made in (Identity(3), Linear(3), NonLinear(3), Own(3)):
        made.fit(weight)
        torch.testing.assert_close(made(weight), weight[:, :, 1:4, 1:4])


def test_m_are_drawn_for_each_layer():
    generator = torch.Generator().manual_seed(0)
    drawn = draw({"a": 5, "b": 2}, 4, generator)
    assert len(drawn) == 4 and len({one["a"] for one in drawn}) == 4  # none twice while there are others
    assert sorted(one["b"] for one in drawn) == [0, 0, 1, 1]
    counts = [sum(draw({"a": 3}, 1, generator)[0]["a"] == i for _ in range(300)) for i in range(3)]
    assert all(60 < count < 140 for count in counts)


def test_draws_of_a_space(space):
    choices = draws(space, 3, seed=1, base={"stem.channel": 0.5})
    assert len(choices) == 3 and choices == draws(space, 3, seed=1, base={"stem.channel": 0.5})
    assert len({c["conv.transformation"] for c in choices}) == 3
    assert {c["stem.channel"] for c in choices} == {2}
    plain = elastic.space(Net(), X)
    with pytest.raises(ElasticError, match="no layer of this space has transformations"):
        draws(plain, 2)


class Fused(nn.Module):
    """A fused layer, and a layer behind a concatenation: their narrow weights are no first rows and columns."""

    def __init__(self):
        super().__init__()
        self.qkv, self.left, self.right = nn.Linear(6, 24), nn.Linear(8, 4), nn.Linear(8, 8)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        y = q * k.sigmoid() + v
        return self.last(torch.cat([self.left(y).relu(), self.right(y).relu()], -1))


def fused_space():
    torch.manual_seed(0)
    return elastic.space(Fused(), torch.randn(5, 6), layers={"qkv": Own, "last": Own})


def test_a_weight_of_its_own_has_the_part_that_the_shared_one_has():
    """It starts as the shared weight: a subnet with it is the subnet without."""
    space, x = fused_space(), torch.randn(5, 6)
    for share in (0.25, 0.5, 1.0):
        widths = {d.name: share for d in space.dimensions if d.kind is Kind.WIDTH}
        without = space.choice(widths)
        with_own = space.choice({**widths, "qkv.transformation": 0, "last.transformation": 0})
        assert torch.equal(space.run(with_own, x), space.run(without, x))
        check_extraction(space, with_own, (x,), training=True, transformed={"qkv.weight", "last.weight"})


def test_a_weight_of_its_own_is_sorted_too():
    space, x = fused_space(), torch.randn(5, 6)
    own = space.choice({"qkv.transformation": 0, "last.transformation": 0})
    with torch.no_grad():
        for parameter in space.layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = space.run(own, x)
    weight = space.model.qkv.weight.clone()
    sort_by_importance(space)
    assert not torch.equal(space.model.qkv.weight, weight)
    torch.testing.assert_close(space.run(own, x), before)


def test_a_part_is_read_of_a_transformed_weight():
    torch.manual_seed(0)
    for made in (Own, Linear, Squared):
        space = elastic.space(Net(), X, layers={"head": [made, ReadInput(0.5)]})
        net, transformation = space.model, space.layers.lists["head"][0]
        choice = space.choice({"head.read": 3, "head.transformation": 0})
        y = net.fc(net.norm(net.conv(net.stem(X)).relu().mean((2, 3)))).relu()
        right = nn.functional.linear(y[:, :3], transformation(net.head.weight)[:, :3], net.head.bias)
        torch.testing.assert_close(space.run(choice, X), right)
        small = check_extraction(space, choice, (X,), training=True, transformed={"head.weight"})
        assert small.head.weight.shape == (2, 3)


class Normed(Transformation):
    """A user's own, without parameters, that uses how wide the weight is."""

    def forward(self, weight):
        return weight * weight.shape[0] / weight.norm()


def test_a_step_computes_what_the_space_runs():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    space = elastic.space(net, x, layers={"0": Normed()})
    for width in (2, 4, 6):
        choice = space.choice({"0.hidden": width, "0.transformation": 0})
        assert torch.equal(run(space, choice, x), space.run(choice, x))


class Wider(Transformation):
    def forward(self, weight):
        return torch.cat([weight, weight])


class Branching(Transformation):
    def forward(self, weight):
        return weight if weight.sum() > 0 else -weight


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"nothing": [Linear()]}, "no module with a weight matches 'nothing'"),
        ({"conv": ["linear"]}, "expected Transformations, ReadInput"),
        ({"conv": [Linear(4)]}, r"conv.weight can have kernels of \[1, 3, 5\], got 4"),
        ({"fc": [Linear(3)]}, "fc.weight is no weight of a convolution"),
        ({"*": [Linear()]}, "is given to several layers; give a function"),
        ({"fc": [Wider()]}, r"gives fc.weight the shape \[12, 8\]"),
        ({"fc": [Branching()]}, "cannot be traced on fc.weight"),
        ({"conv": [Linear(3), KernelMatrices]}, "conv has KernelMatrices and transformations"),
    ],
)
def test_errors(layers, message):
    with pytest.raises(ElasticError, match=message):
        space = elastic.space(Net(), X, layers=layers)
        space.run({"fc.transformation": 0}, X)
