"""Structures that cut, join, re-order and re-shape the axis of the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, values


@example(
    "concat of two branches",
    values(5, 6),
    """
    left   first inputs
    right  second inputs
    head   outputs first+second
    """,
)
class ConcatOfTwoBranches(nn.Module):
    def __init__(self, inputs=6, first=4, second=7, outputs=3):
        super().__init__()
        self.left, self.right = nn.Linear(inputs, first), nn.Linear(inputs, second)
        self.head = nn.Linear(first + second, outputs)

    def forward(self, x):
        return self.head(torch.cat([self.left(x).relu(), self.right(x).tanh()], 1))


@example(
    "concat with the input",
    values(5, 6),
    """
    fc    hidden inputs
    head  outputs inputs+hidden
    """,
)
class ConcatWithTheInput(nn.Module):
    """One dimension that is frozen in one part and free in the other."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc, self.head = nn.Linear(inputs, hidden), nn.Linear(inputs + hidden, outputs)

    def forward(self, x):
        return self.head(torch.cat([x, self.fc(x).relu()], 1))


@example(
    "unequal slices",
    values(5, 6),
    """
    fc     first+second inputs
    left   outputs first
    right  outputs second
    """,
)
class UnequalSlices(nn.Module):
    def __init__(self, inputs=6, first=4, second=7, outputs=3):
        super().__init__()
        self.first, self.fc = first, nn.Linear(inputs, first + second)
        self.left, self.right = nn.Linear(first, outputs), nn.Linear(second, outputs)

    def forward(self, x):
        x = self.fc(x).relu()
        return self.left(x[:, : self.first]) + self.right(x[:, self.first :])


@example(
    "overlapping slices",
    values(5, 6),
    """
    fc     first+shared+second inputs
    left   outputs first+shared
    right  outputs shared+second
    """,
)
class OverlappingSlices(nn.Module):
    """The part that both slices contain is a group of its own."""

    def __init__(self, inputs=6, first=4, shared=2, second=7, outputs=3):
        super().__init__()
        self.first, self.shared = first, shared
        self.fc = nn.Linear(inputs, first + shared + second)
        self.left, self.right = nn.Linear(first + shared, outputs), nn.Linear(shared + second, outputs)

    def forward(self, x):
        x = self.fc(x).relu()
        return self.left(x[:, : self.first + self.shared]) * self.right(x[:, self.first :])


@example(
    "strided slice",
    values(5, 6),
    """
    fc    kept*2 inputs
    head  outputs kept
    """,
)
class StridedSlice(nn.Module):
    """Every second channel is kept: pairs are free. To freeze them is safe."""

    def __init__(self, inputs=6, kept=4, outputs=3):
        super().__init__()
        self.fc, self.head = nn.Linear(inputs, 2 * kept), nn.Linear(kept, outputs)

    def forward(self, x):
        return self.head(self.fc(x).relu()[:, ::2])


@example(
    "flip of channels",
    values(5, 6),
    """
    fc    hidden inputs
    head  outputs hidden
    """,
    frozen={"hidden": "flip"},
)
class FlipOfChannels(nn.Module):
    """Each channel meets the one at the mirrored place."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        x = self.fc(x).relu()
        return self.head(x * x.flip(1))


@example(
    "roll of channels",
    values(5, 6),
    """
    fc    hidden inputs
    head  outputs hidden
    """,
    frozen={"hidden": "roll"},
)
class RollOfChannels(nn.Module):
    """Each channel meets its neighbour."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc, self.head = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        x = self.fc(x).relu()
        return self.head(x * x.roll(1, 1))


@example(
    "pad of channels",
    values(5, 6),
    """
    narrow  inner inputs
    wide    1+inner+1 inputs
    head    outputs 1+inner+1
    """,
)
class PadOfChannels(nn.Module):
    """A residual add of a narrow value with zeros around it: the wide one has a part in common with it."""

    def __init__(self, inputs=6, inner=7, outputs=3):
        super().__init__()
        self.narrow, self.wide = nn.Linear(inputs, inner), nn.Linear(inputs, inner + 2)
        self.head = nn.Linear(inner + 2, outputs)

    def forward(self, x):
        return self.head((F.pad(self.narrow(x), (1, 1)) + self.wide(x)).relu())


@example(
    "constant permutation",
    values(5, 6),
    """
    fc1          indexed inputs
    permutation  hidden
    fc2          outputs hidden
    """,
    frozen={"indexed": ""},
)
class ConstantPermutation(nn.Module):
    """Channels are picked by a buffer of indices. The axis of the buffer is free (picking fewer, or in another order,
    is a network of this form); the axis that is picked from is not, since the buffer holds positions in it.
    """

    def __init__(self, inputs=6, indexed=8, hidden=8, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, indexed), nn.Linear(hidden, outputs)
        self.register_buffer("permutation", torch.randperm(indexed)[:hidden])

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()[:, self.permutation])


@example(
    "two groupings of six",
    values(5, 8),
    """
    fc     six inputs
    twos   outputs two
    threes outputs three
    """,
    frozen={"six": "", "two": "", "three": ""},
)
class TwoGroupingsOfSix(nn.Module):
    """Views as 2 x 3 and as 3 x 2, with a maximum over the inner factor: no common factors, so nothing is free."""

    def __init__(self, inputs=8, six=6, two=2, three=3, outputs=7):
        super().__init__()
        self.fc = nn.Linear(inputs, six)
        self.twos, self.threes = nn.Linear(two, outputs), nn.Linear(three, outputs)

    def forward(self, x):
        x = self.fc(x)
        return self.twos(x.view(-1, 2, 3).amax(2)) + self.threes(x.view(-1, 3, 2).amax(2))


@example(
    "transposed view",
    values(5, 6),
    """
    fc    rows*columns inputs
    head  outputs columns*rows
    """,
)
class TransposedView(nn.Module):
    """A product of two groups, read in the other order."""

    def __init__(self, inputs=6, rows=4, columns=7, outputs=3):
        super().__init__()
        self.rows, self.columns = rows, columns
        self.fc, self.head = nn.Linear(inputs, rows * columns), nn.Linear(columns * rows, outputs)

    def forward(self, x):
        return self.head(self.fc(x).relu().view(-1, self.rows, self.columns).transpose(1, 2).flatten(1))


@example(
    "regrouped view",
    values(5, 6),
    """
    fc     outer*middle*inner inputs
    left   outputs outer*middle
    right  outputs middle*inner
    """,
)
class RegroupedView(nn.Module):
    """Two views with a common refinement: 2 x 12 and 8 x 3 of 24 are 2 x 4 x 3."""

    def __init__(self, inputs=6, outer=2, middle=4, inner=3, outputs=7):
        super().__init__()
        self.outer, self.inner = outer, inner
        self.fc = nn.Linear(inputs, outer * middle * inner)
        self.left, self.right = nn.Linear(outer * middle, outputs), nn.Linear(middle * inner, outputs)

    def forward(self, x):
        x = self.fc(x)
        left = x.view(x.shape[0], -1, self.inner).amax(2)
        return self.left(left) + self.right(x.view(x.shape[0], self.outer, -1).amax(1))


@example(
    "repeated channels",
    values(5, 6),
    """
    fc    hidden inputs
    head  outputs copies*hidden
    """,
)
class RepeatedChannels(nn.Module):
    """The copies are equal, so that the last layer may have them in any order, or fewer of them."""

    def __init__(self, inputs=6, copies=2, hidden=7, outputs=3):
        super().__init__()
        self.copies = copies
        self.fc, self.head = nn.Linear(inputs, hidden), nn.Linear(copies * hidden, outputs)

    def forward(self, x):
        return self.head(self.fc(x).relu().repeat(1, self.copies))


@example(
    "stacked branches",
    values(5, 6),
    """
    left   hidden inputs
    right  hidden inputs
    head   outputs hidden
    """,
)
class StackedBranches(nn.Module):
    """Values side by side on a new axis are values of one axis."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.left, self.right = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.head(torch.stack([self.left(x), self.right(x)], 1).amax(1))
