"""Structures of weights: bare, cut, computed from others or from the input, stacked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, values


@example(
    "bare parameter",
    values(5, 6),
    """
    weight  hidden inputs
    bias    hidden
    head    outputs hidden
    """,
)
class BareParameter(nn.Module):
    """``F.linear`` on parameters that no layer owns; the second one lies the other way round."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(hidden, inputs)), nn.Parameter(torch.randn(hidden))
        self.head = nn.Parameter(torch.randn(outputs, hidden))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias).relu() @ self.head.t()


@example(
    "sliced parameter",
    values(5, 6),
    """
    weight  first+second inputs
    left    outputs first
    right   outputs second
    """,
)
class SlicedParameter(nn.Module):
    """Two layers whose weights are the parts of one parameter."""

    def __init__(self, inputs=6, first=4, second=7, outputs=3):
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.randn(first + second, inputs))
        self.left, self.right = nn.Linear(first, outputs), nn.Linear(second, outputs)

    def forward(self, x):
        left, right = F.linear(x, self.weight[: self.first]), F.linear(x, self.weight[self.first :])
        return self.left(left.relu()) + self.right(right.tanh())


@example(
    "low-rank update",
    values(5, 6),
    """
    base  hidden inputs
    up    hidden rank
    down  rank inputs
    head  outputs hidden
    """,
)
class LowRankUpdate(nn.Module):
    """LoRA: a product of two parameters is added to a weight; the rank is an axis of its own."""

    def __init__(self, inputs=6, hidden=7, rank=2, outputs=3):
        super().__init__()
        self.base, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.up, self.down = nn.Parameter(torch.randn(hidden, rank)), nn.Parameter(torch.randn(rank, inputs))

    def forward(self, x):
        return self.head(F.linear(x, self.base.weight + self.up @ self.down, self.base.bias).relu())


@example(
    "weight norm",
    values(5, 6),
    """
    v1     hidden inputs
    g1     hidden 1
    bias1  hidden
    v2     outputs hidden
    g2     outputs 1
    """,
)
class WeightNorm(nn.Module):
    """Weight norm by hand. The norm of the second weight runs over the hidden axis."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.v1, self.g1 = nn.Parameter(torch.randn(hidden, inputs)), nn.Parameter(torch.rand(hidden, 1) + 0.5)
        self.bias1 = nn.Parameter(torch.randn(hidden))
        self.v2, self.g2 = nn.Parameter(torch.randn(outputs, hidden)), nn.Parameter(torch.rand(outputs, 1) + 0.5)

    def forward(self, x):
        x = F.linear(x, self.g1 * self.v1 / self.v1.norm(dim=1, keepdim=True), self.bias1).relu()
        return F.linear(x, self.g2 * self.v2 / self.v2.norm(dim=1, keepdim=True))


@example(
    "prelu",
    values(5, 6),
    """
    fc1   hidden inputs
    act   hidden
    fc2   outputs hidden
    """,
)
class Prelu(nn.Module):
    """A learned slope per channel."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(inputs, hidden), nn.PReLU(hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@example(
    "hypernetwork",
    (values(5, 6), values(5, 9)),
    """
    generator  hidden*inner condition
    fc         inner inputs
    head       outputs hidden
    """,
    frozen={"condition": "input"},
)
class Hypernetwork(nn.Module):
    """The weight of the second layer is computed, one for each sample."""

    def __init__(self, inputs=6, condition=9, inner=4, hidden=7, outputs=3):
        super().__init__()
        self.hidden, self.inner = hidden, inner
        self.generator = nn.Linear(condition, hidden * inner)
        self.fc, self.head = nn.Linear(inputs, inner), nn.Linear(hidden, outputs)

    def forward(self, x, condition):
        weight = self.generator(condition).view(-1, self.hidden, self.inner)
        return self.head(torch.bmm(weight, self.fc(x).unsqueeze(2)).squeeze(2).relu())


@example(
    "adaptive norm",
    (values(5, 6), values(5, 9)),
    """
    fc         width inputs
    modulation 2*width condition
    head       outputs width
    """,
    frozen={"condition": "input"},
)
class AdaptiveNorm(nn.Module):
    """Scale and shift of a norm come from a second input, halves of one weight (FiLM, DiT)."""

    def __init__(self, inputs=6, condition=9, width=7, outputs=3):
        super().__init__()
        self.fc, self.modulation = nn.Linear(inputs, width), nn.Linear(condition, 2 * width)
        self.norm, self.head = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, outputs)

    def forward(self, x, condition):
        scale, shift = self.modulation(condition).chunk(2, -1)
        return self.head((self.norm(self.fc(x)) * (1 + scale) + shift).relu())


@example(
    "scalar mix",
    values(5, 6),
    """
    fc0   width inputs
    fc1   width width
    fc2   width width
    mix   layers
    head  outputs width
    """,
    frozen={"layers": ""},
)
class ScalarMix(nn.Module):
    """A learned mean of the values of all layers, which makes their axes one."""

    def __init__(self, inputs=6, width=7, layers=3, outputs=2):
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, width)
        self.mix, self.head = nn.Parameter(torch.randn(layers)), nn.Linear(width, outputs)

    def forward(self, x):
        a = self.fc0(x).relu()
        b = self.fc1(a).relu()
        c = self.fc2(b).relu()
        weights = self.mix.softmax(0)
        return self.head(weights[0] * a + weights[1] * b + weights[2] * c)


@example(
    "mixture of experts",
    values(5, 6),
    """
    embed   stream inputs
    router  experts stream
    up      experts stream hidden
    down    experts hidden stream
    head    outputs stream
    """,
    frozen={"experts": "softmax"},
)
class MixtureOfExperts(nn.Module):
    """Stacked experts, all of them used, with softmax weights over the experts."""

    def __init__(self, inputs=6, stream=8, experts=4, hidden=7, outputs=3):
        super().__init__()
        self.embed, self.router = nn.Linear(inputs, stream), nn.Linear(stream, experts)
        self.up = nn.Parameter(torch.randn(experts, stream, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, stream))
        self.head = nn.Linear(stream, outputs)

    def forward(self, x):
        x = self.embed(x)
        hidden = torch.einsum("bd,edf->bef", x, self.up).relu()
        y = torch.einsum("bef,efd->bed", hidden, self.down)
        return self.head(x + torch.einsum("be,bed->bd", self.router(x).softmax(-1), y))
