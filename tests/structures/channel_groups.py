"""Structures of images whose channels come in groups: grouped and depthwise convolutions, shuffles, group norm."""

from __future__ import annotations

from torch import nn

from .convolutions import conv
from .truth import example, values


@example(
    "depthwise conv",
    values(5, 6, 4, 4),
    """
    expand     hidden inputs 1 1
    depthwise  hidden 1 3 3
    bn         hidden
    project    outputs hidden 1 1
    """,
)
class DepthwiseConv(nn.Module):
    def __init__(self, inputs=6, hidden=10, outputs=9):
        super().__init__()
        self.expand, self.project = conv(inputs, hidden), conv(hidden, outputs)
        self.depthwise, self.bn = conv(hidden, hidden, 3, groups=hidden), nn.BatchNorm2d(hidden)

    def forward(self, x):
        return self.project(self.bn(self.depthwise(self.expand(x).relu())).relu())


@example(
    "depth multiplier",
    values(5, 6, 4, 4),
    """
    expand     hidden inputs 1 1
    depthwise  hidden*multiplier 1 3 3
    project    outputs hidden*multiplier 1 1
    """,
)
class DepthMultiplier(nn.Module):
    """A depthwise convolution with two results a channel."""

    def __init__(self, inputs=6, hidden=10, multiplier=2, outputs=9):
        super().__init__()
        self.expand, self.project = conv(inputs, hidden), conv(hidden * multiplier, outputs)
        self.depthwise = conv(hidden, hidden * multiplier, 3, groups=hidden)

    def forward(self, x):
        return self.project(self.depthwise(self.expand(x).relu()).relu())


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self, inputs: int, groups: int, inner: int, outer: int, outputs: int):
        super().__init__()
        self.expand, self.project = conv(inputs, groups * inner), conv(groups * outer, outputs)
        self.grouped = conv(groups * inner, groups * outer, 3, groups=groups)

    def forward(self, x):
        return self.project(self.grouped(self.expand(x).relu()).relu())


GROUPED = """
    expand   groups*inner inputs 1 1
    grouped  groups*outer inner 3 3
    project  outputs groups*outer 1 1
"""


@example("grouped conv, in = out", values(5, 6, 4, 4), GROUPED)
class GroupedConvEqual(Grouped):
    """Equal numbers of channels before and after, yet two groups."""

    def __init__(self, inputs=6, groups=2, inner=5, outer=5, outputs=9):
        super().__init__(inputs, groups, inner, outer, outputs)


@example("grouped conv, in != out", values(5, 6, 4, 4), GROUPED)
class GroupedConv(Grouped):
    def __init__(self, inputs=6, groups=2, inner=5, outer=7, outputs=9):
        super().__init__(inputs, groups, inner, outer, outputs)


def shuffled(x, groups: int):
    """The channel shuffle of ShuffleNet: ``groups x channels`` becomes ``channels x groups``."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@example(
    "channel shuffle",
    values(5, 6, 4, 4),
    """
    conv1  groups*channels inputs 1 1
    conv2  outputs channels*groups 3 3
    """,
)
class ChannelShuffle(nn.Module):
    def __init__(self, inputs=6, groups=2, channels=7, outputs=9):
        super().__init__()
        self.groups = groups
        self.conv1, self.conv2 = conv(inputs, groups * channels), conv(channels * groups, outputs, 3)

    def forward(self, x):
        return self.conv2(shuffled(self.conv1(x), self.groups).relu())


@example(
    "shuffle between grouped convs",
    values(5, 6, 4, 4),
    """
    expand  before*inner inputs 1 1
    conv1   before*after*rest inner 3 3
    conv2   after*outer rest*before 3 3
    head    outputs after*outer 1 1
    """,
)
class ShuffleBetweenGroupedConvs(nn.Module):
    """ShuffleNet: the groups of both convolutions are factors of the same channels."""

    def __init__(self, inputs=6, before=2, inner=5, after=3, rest=4, outer=7, outputs=9):
        super().__init__()
        self.before, width = before, before * after * rest
        self.expand, self.conv1 = conv(inputs, before * inner), conv(before * inner, width, 3, groups=before)
        self.conv2, self.head = conv(width, after * outer, 3, groups=after), conv(after * outer, outputs)

    def forward(self, x):
        x = shuffled(self.conv1(self.expand(x).relu()), self.before)
        return self.head(self.conv2(x.relu()).relu())


@example(
    "group norm",
    values(5, 6, 4, 4),
    """
    conv1  groups*channels inputs 3 3
    norm   groups*channels
    conv2  outputs groups*channels 1 1
    """,
)
class GroupNorm(nn.Module):
    """Whole groups may change places, and channels within all groups alike."""

    def __init__(self, inputs=6, groups=2, channels=7, outputs=9):
        super().__init__()
        self.conv1, self.norm = conv(inputs, groups * channels, 3), nn.GroupNorm(groups, groups * channels)
        self.conv2 = conv(groups * channels, outputs)

    def forward(self, x):
        return self.conv2(self.norm(self.conv1(x)).relu())


@example(
    "instance norm",
    values(5, 6, 4, 4),
    """
    conv1  hidden inputs 3 3
    norm   hidden
    conv2  outputs hidden 1 1
    """,
)
class InstanceNorm(nn.Module):
    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv1, self.norm = conv(inputs, hidden, 3, bias=False), nn.InstanceNorm2d(hidden, affine=True)
        self.conv2 = conv(hidden, outputs)

    def forward(self, x):
        return self.conv2(self.norm(self.conv1(x)).relu())
