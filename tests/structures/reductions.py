"""Structures that reduce over the features, norms among them, or depend on their order; and products of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, values


@example(
    "maxout",
    values(5, 6),
    """
    fc1  hidden*pieces inputs
    fc2  outputs hidden
    """,
)
class Maxout(nn.Module):
    """A maximum over the pieces, which are a free group of their own."""

    def __init__(self, inputs=6, hidden=7, pieces=4, outputs=3):
        super().__init__()
        self.hidden, self.pieces = hidden, pieces
        self.fc1, self.fc2 = nn.Linear(inputs, hidden * pieces), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).view(-1, self.hidden, self.pieces).amax(-1))


@example(
    "outer product",
    values(5, 6),
    """
    left   rows inputs
    right  columns inputs
    head   outputs rows*columns
    """,
)
class OuterProduct(nn.Module):
    """Bilinear pooling: the last layer reads a product of two groups."""

    def __init__(self, inputs=6, rows=4, columns=7, outputs=3):
        super().__init__()
        self.left, self.right = nn.Linear(inputs, rows), nn.Linear(inputs, columns)
        self.head = nn.Linear(rows * columns, outputs)

    def forward(self, x):
        return self.head((self.left(x)[:, :, None] * self.right(x)[:, None, :]).flatten(1))


@example(
    "mean over channels",
    values(5, 6),
    """
    fc1  hidden inputs
    fc2  outputs hidden
    """,
)
class MeanOverChannels(nn.Module):
    """A mean over the free axis: permuting keeps it, removing an index gives another mean."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        x = self.fc1(x).relu()
        return self.fc2(x * x.mean(1, keepdim=True).sigmoid())


@example(
    "cosine similarity",
    values(5, 6),
    """
    fc          width inputs
    prototypes  outputs width
    """,
)
class CosineSimilarity(nn.Module):
    """Both sides of the product are divided by a norm over the free axis."""

    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__()
        self.fc, self.prototypes = nn.Linear(inputs, width), nn.Parameter(torch.randn(outputs, width))

    def forward(self, x):
        return F.normalize(self.fc(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).t()


@example(
    "softmax over hidden",
    values(5, 6),
    """
    fc1  hidden inputs
    fc2  outputs hidden
    """,
    frozen={"hidden": "softmax"},
)
class SoftmaxOverHidden(nn.Module):
    """Permuting is exact, but without an index all other values change."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).softmax(-1))


@example(
    "cumsum over hidden",
    values(5, 6),
    """
    fc1  hidden inputs
    fc2  outputs hidden
    """,
    frozen={"hidden": "cumsum"},
)
class CumsumOverHidden(nn.Module):
    """The order of the axis has a meaning."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).cumsum(-1))


@torch.library.custom_op("structures::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody knows. It looks elementwise, but scales each feature by its position."""
    return x * torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


mystery.register_autograd(lambda ctx, grad: mystery(grad))


@example(
    "unknown operator",
    values(5, 6),
    """
    fc1  before inputs
    fc2  hidden before
    fc3  outputs hidden
    """,
    frozen={"hidden": "mystery"},
)
class UnknownOperator(nn.Module):
    """An operator without a rule freezes what it touches, and no more."""

    def __init__(self, inputs=6, before=7, hidden=8, outputs=3):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, before), nn.Linear(before, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc3(mystery(self.fc2(self.fc1(x).relu())).relu())


class RootMeanSquare(nn.Module):
    """RMSNorm as most language models write it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Normed(nn.Module):
    """A norm between two linear layers."""

    def __init__(self, norm: nn.Module, inputs: int, width: int, outputs: int):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(inputs, width), norm, nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu())


NORMED = """
    stem  width inputs
    norm  width
    head  outputs width
"""


@example("layer norm", values(5, 6), NORMED)
class LayerNorm(Normed):
    """The size of the axis is written into the graph (``normalized_shape``)."""

    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__(nn.LayerNorm(width), inputs, width, outputs)


@example("rms norm", values(5, 6), NORMED)
class RmsNorm(Normed):
    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__(nn.RMSNorm(width), inputs, width, outputs)


@example("rms norm by hand", values(5, 6), NORMED)
class RmsNormByHand(Normed):
    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__(RootMeanSquare(width), inputs, width, outputs)


@example("batch norm", values(5, 6), NORMED)
class BatchNorm(Normed):
    """Running statistics are places too."""

    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__(nn.BatchNorm1d(width), inputs, width, outputs)
