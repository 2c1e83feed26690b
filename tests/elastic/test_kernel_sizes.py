"""Kernel sizes: a smaller kernel is the full one with zeros around its centre; what cannot shrink says why."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.elastic.kernel_sizes import small_window
from graphopt.elastic.layers import KernelMatrices
from graphopt.errors import ElasticError
from tests.elastic.subnets import check_extraction


class Net(nn.Module):
    """A convolution between layers, whose width is another dimension."""

    def __init__(self, convolution):
        super().__init__()
        dims = type(convolution).__name__[-2]
        point = getattr(nn, f"Conv{dims}d")
        self.stem, self.conv, self.head = point(3, 4, 1), convolution, point(convolution.out_channels, 5, 1)

    def forward(self, x):
        return self.head(self.conv(self.stem(x)))


def images(dims=2, size=12):
    return torch.randn(2, 3, *[size] * dims)


def framed(weight, size):
    """The weight with zeros around the centre of its kernels."""
    mask = torch.zeros_like(weight)
    small = small_window(weight.shape[2:], size)
    mask[(..., *(slice((k - s) // 2, (k + s) // 2) for k, s in zip(weight.shape[2:], small)))] = 1
    return weight * mask


def check_sizes(net, x):
    """Every size of the kernel is the full kernel with zeros, and its extraction is the slice. Returns the sizes."""
    net = net.eval()
    space = elastic.space(net, x, choices={Kind.KERNEL: [*range(1, 12)]})
    sizes = space.dimension("conv.kernel").choices
    for size in sizes:
        small = space.run({"conv.kernel": size}, x)
        whole = net.conv.weight.detach().clone()
        with torch.no_grad():
            net.conv.weight.copy_(framed(whole, size))
            torch.testing.assert_close(small, net(x), rtol=1e-5, atol=1e-5)
            net.conv.weight.copy_(whole)
        module = check_extraction(space, space.choice({"*": 0.5, "conv.kernel": size}), (x,), training=False)
        assert module.conv.weight.shape[2:] == small_window(net.conv.weight.shape[2:], size)
    return sizes


@pytest.mark.parametrize(
    ("convolution", "sizes"),
    [
        (nn.Conv2d(4, 6, 7, padding=3), (1, 3, 5, 7)),
        (nn.Conv2d(4, 6, 7, padding=2, stride=3), (3, 5, 7)),
        (nn.Conv2d(4, 6, 5, padding=4, dilation=2), (1, 3, 5)),
        (nn.Conv2d(4, 6, 5, padding=2, dilation=2), (3, 5)),
        (nn.Conv2d(4, 6, 5, padding="same", dilation=2), (1, 3, 5)),
        (nn.Conv2d(4, 6, (3, 7), padding=(1, 3)), (1, 3, 5, 7)),
        (nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), (1, 3, 5)),
        (nn.Conv2d(4, 6, 4, padding=1, stride=2), (2, 4)),
        (nn.ConvTranspose2d(4, 6, 4, padding=1, stride=2), (2, 4)),
        (nn.ConvTranspose2d(4, 6, 5, padding=2, stride=2, output_padding=1), (1, 3, 5)),
    ],
    ids=str,
)
def test_sizes(convolution, sizes):
    assert check_sizes(Net(convolution), images()) == sizes


@given(data=st.data())
@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_any_convolution(data):
    dims, kernel = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6))
    how = {n: data.draw(st.integers(*limits)) for n, limits in {"stride": (1, 3), "dilation": (1, 2)}.items()}
    padding = data.draw(st.integers(how["dilation"], 5))
    groups = data.draw(st.sampled_from([1, 4]))
    kind = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    convolution = getattr(nn, f"{kind}{dims}d")(4, 4, kernel, padding=padding, groups=groups, bias=False, **how)
    sizes = check_sizes(Net(convolution), images(dims, 13 if dims < 3 else 11))
    allowed = [s for s in range(1, kernel) if (kernel - s) % 2 == 0 and how["dilation"] * (kernel - s) // 2 <= padding]
    assert sizes == (*allowed, kernel)


def refusals(net, x=None):
    try:
        found = elastic.space(net, images() if x is None else x).refusals
    except ElasticError as error:
        return str(error)
    return "\n".join(f"{r.name}: {r.why}" for r in found)


class Twice(nn.Module):
    """A weight that a convolution reads, and a penalty too."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x):
        return self.conv(self.stem(x)) * self.conv.weight.abs().mean()


def test_what_cannot_shrink_says_why():
    assert "padding of [0, 0] is less than the [1, 1]" in refusals(Net(nn.Conv2d(4, 6, 7)))
    assert "padding of [0, 0] is less" in refusals(Net(nn.Conv2d(4, 6, 5, padding="valid")))
    assert "a kernel of 2 has no smaller centre" in refusals(Net(nn.Conv2d(4, 6, 2, padding=1)))
    assert "aten.abs.default reads its weight too" in refusals(Twice())
    assert "one choice only" in refusals(Net(nn.Conv2d(4, 6, 3, padding=1)))  # a centre of 1 must be asked for
    with pytest.raises(ElasticError, match=r"conv\.kernel can be 1, 3, 5, got -1"):
        elastic.space(Net(nn.Conv2d(4, 6, 5, padding=2)), images(), choices={"conv.kernel": [-1]})


class Both(nn.Module):
    """One weight in two convolutions of different padding."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 7, padding=3)

    def forward(self, x):
        x = self.stem(x)
        y = nn.functional.conv2d(x, self.conv.weight, padding=1)
        return self.conv(x).mean((2, 3)) + y.mean((2, 3))


def test_a_shared_weight_allows_what_all_its_convolutions_allow():
    space = elastic.space(Both(), images(), choices={Kind.KERNEL: range(1, 8)})
    assert space.dimension("conv.kernel").choices == (5, 7)
    check_extraction(space, space.choice({"conv.kernel": 5}), (images(),), training=True)


# -- matrices ---------------------------------------------------------------------------------------------------------


def matrix_space(training=True):
    torch.manual_seed(0)
    net = Net(nn.Conv2d(4, 4, 7, padding=3, groups=4)).train(training)
    return elastic.space(net, images(), layers={"conv": KernelMatrices()}, choices={Kind.KERNEL: range(1, 8)})


def test_matrices_are_the_identity_at_first():
    space, x = matrix_space(), images()
    plain = elastic.space(space.model, x, choices={Kind.KERNEL: range(1, 8)})
    for size in (1, 3, 5, 7):
        torch.testing.assert_close(space.run({"conv.kernel": size}, x), plain.run({"conv.kernel": size}, x))


def test_matrices_are_those_of_once_for_all():
    """The filter of 3 x 3 goes through the matrix of 5 x 5 first, as in ``DynamicSeparableConv2d`` there."""
    space, x = matrix_space(), images()
    matrices = {tuple(p.shape): p for _, p in space.layers.named_parameters()}
    assert set(matrices) == {(25, 25), (9, 9), (1, 1)}
    with torch.no_grad():
        for p in matrices.values():
            p.add_(0.3 * torch.randn_like(p))
        weight = space.model.conv.weight
        five = (weight[:, :, 1:6, 1:6].flatten(2) @ matrices[25, 25].T).view(4, 1, 5, 5)
        three = (five[:, :, 1:4, 1:4].flatten(2) @ matrices[9, 9].T).view(4, 1, 3, 3)
        net = space.model
        right = net.head(nn.functional.conv2d(net.stem(x), three, net.conv.bias, padding=1, groups=4))
    torch.testing.assert_close(space.run({"conv.kernel": 3}, x), right)
    module = space.extract(space.choice({"conv.kernel": 3, "stem.channel": 0.5})).train()
    assert module.conv.weight.shape[2:] == (3, 3) and not [n for n, _ in module.named_parameters() if "matrix" in n]


def test_matrices_are_trained():
    space, x = matrix_space(), images()
    space.run({"conv.kernel": 3}, x).square().sum().backward()
    found = {tuple(p.shape): p.grad is not None and bool(p.grad.any()) for p in space.layers.parameters()}
    assert found == {(25, 25): True, (9, 9): True, (1, 1): False}
    assert bool(space.model.conv.weight.grad.any())
    saved = space.layers.state_dict()
    other = matrix_space()
    with torch.no_grad():
        for p in space.layers.parameters():
            p.add_(0.1)
    other.layers.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(other.layers.parameters(), space.layers.parameters()))


def test_slices_with_matrices_are_extracted():
    space = matrix_space(training=False)
    with torch.no_grad():
        for p in space.layers.parameters():
            p.add_(0.3 * torch.randn_like(p))
    for size in (1, 3, 5, 7):
        choice = space.choice({"*": 0.5, "conv.kernel": size})
        check_extraction(space, choice, (images(),), training=False, transformed={"conv.weight"})
