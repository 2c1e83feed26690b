"""Structures of images: blocks of convolutions, and the ways channels and space meet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, values


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Bottleneck(nn.Module):
    """The residual block of ResNet-50."""

    def __init__(self, stream: int, narrow: int, inner: int):
        super().__init__()
        self.conv1, self.bn1 = conv(stream, narrow, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = conv(narrow, inner, 3, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, stream, bias=False), nn.BatchNorm2d(stream)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return F.relu(x + self.bn3(self.conv3(y)))


@example(
    "bottleneck",
    values(5, 6, 4, 4),
    """
    stem         stream inputs 3 3
    bn           stream
    block.conv1  narrow stream 1 1
    block.bn1    narrow
    block.conv2  inner narrow 3 3
    block.bn2    inner
    block.conv3  stream inner 1 1
    block.bn3    stream
    head         outputs stream
    """,
    depth="block",
)
class BottleneckBlock(nn.Module):
    """Running statistics are places of the group of their channels."""

    def __init__(self, inputs=6, stream=10, narrow=7, inner=8, outputs=9):
        super().__init__()
        self.stem, self.bn = conv(inputs, stream, 3, bias=False), nn.BatchNorm2d(stream)
        self.block, self.head = Bottleneck(stream, narrow, inner), nn.Linear(stream, outputs)

    def forward(self, x):
        return self.head(self.block(self.bn(self.stem(x)).relu()).mean((2, 3)))


@example(
    "repeated concat",
    values(5, 6, 4, 4),
    """
    stem   stem_width inputs 3 3
    conv1  growth1 stem_width 3 3
    bn2    stem_width+growth1
    conv2  growth2 stem_width+growth1 3 3
    bn3    stem_width+growth1+growth2
    conv3  outputs stem_width+growth1+growth2 1 1
    """,
)
class RepeatedConcat(nn.Module):
    """DenseNet: every layer reads what all before it have made; the norms are concatenations too."""

    def __init__(self, inputs=6, stem_width=10, growth1=7, growth2=8, outputs=9):
        super().__init__()
        self.stem, self.conv1 = conv(inputs, stem_width, 3), conv(stem_width, growth1, 3)
        self.bn2, self.conv2 = nn.BatchNorm2d(stem_width + growth1), conv(stem_width + growth1, growth2, 3)
        width = stem_width + growth1 + growth2
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, outputs)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(x.relu())], 1)
        x = torch.cat([x, self.conv2(self.bn2(x).relu())], 1)
        return self.conv3(self.bn3(x).relu())


@example(
    "u-net skip",
    values(5, 6, 4, 4),
    """
    encoder    shallow inputs 3 3
    down       deep shallow 2 2
    up.weight  deep raised 2 2
    up.bias    raised
    decoder    outputs raised+shallow 3 3
    """,
)
class UNetSkip(nn.Module):
    """A transposed convolution has its axes the other way round."""

    def __init__(self, inputs=6, shallow=7, deep=10, raised=8, outputs=9):
        super().__init__()
        self.encoder, self.down = conv(inputs, shallow, 3), nn.Conv2d(shallow, deep, 2, stride=2)
        self.up, self.decoder = nn.ConvTranspose2d(deep, raised, 2, stride=2), conv(raised + shallow, outputs, 3)

    def forward(self, x):
        x = self.encoder(x).relu()
        return self.decoder(torch.cat([self.up(self.down(x).relu()).relu(), x], 1))


@example(
    "squeeze-excite",
    values(5, 6, 4, 4),
    """
    stem    hidden inputs 3 3
    reduce  squeezed hidden 1 1
    expand  hidden squeezed 1 1
    head    outputs hidden 1 1
    """,
)
class SqueezeExcite(nn.Module):
    def __init__(self, inputs=6, hidden=10, squeezed=7, outputs=9):
        super().__init__()
        self.stem, self.head = conv(inputs, hidden, 3), conv(hidden, outputs)
        self.reduce, self.expand = conv(hidden, squeezed), conv(squeezed, hidden)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


@example(
    "chunk, append, cat",
    values(5, 6, 4, 4),
    """
    into    first+second inputs 1 1
    block1  second second 3 3
    block2  third second 3 3
    out     outputs first+second+second+third 1 1
    """,
    same_size="first second",
)
class ChunkAppendCat(nn.Module):
    """The C2f block of YOLO. The halves of the first layer are of equal size only because of ``chunk``."""

    def __init__(self, inputs=6, first=7, second=7, third=8, outputs=9):
        super().__init__()
        self.into, self.out = conv(inputs, first + second), conv(first + second + second + third, outputs)
        self.block1, self.block2 = conv(second, second, 3), conv(second, third, 3)

    def forward(self, x):
        parts = list(self.into(x).relu().chunk(2, 1))
        parts.append(parts[-1] + self.block1(parts[-1]).relu())
        parts.append(self.block2(parts[-1]).relu())
        return self.out(torch.cat(parts, 1))


@example(
    "selective kernel",
    values(5, 6, 4, 4),
    """
    small   hidden inputs 1 1
    large   hidden inputs 3 3
    reduce  squeezed hidden
    expand  2*hidden squeezed
    head    outputs hidden 1 1
    """,
)
class SelectiveKernel(nn.Module):
    """Softmax weights choose between two branches for each channel; the two are a fixed factor."""

    def __init__(self, inputs=6, hidden=10, squeezed=7, outputs=9):
        super().__init__()
        self.small, self.large = conv(inputs, hidden), conv(inputs, hidden, 3)
        self.reduce, self.expand = nn.Linear(hidden, squeezed), nn.Linear(squeezed, 2 * hidden)
        self.head = conv(hidden, outputs)

    def forward(self, x):
        branches = torch.stack([self.small(x).relu(), self.large(x).relu()], 1)
        weights = self.expand(self.reduce(branches.sum(1).mean((2, 3))).relu())
        weights = weights.view(x.shape[0], 2, -1).softmax(1)
        return self.head((branches * weights[:, :, :, None, None]).sum(1))


@example(
    "pixel shuffle",
    values(5, 6, 4, 4),
    """
    conv1  hidden*4 inputs 3 3
    conv2  outputs hidden 3 3
    """,
)
class PixelShuffle(nn.Module):
    """Channels become space: the inner factor of the channels is fixed."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, hidden * 4, 3), conv(hidden, outputs, 3)

    def forward(self, x):
        return self.conv2(F.pixel_shuffle(self.conv1(x), 2).relu())


@example(
    "pixel unshuffle",
    values(5, 6, 4, 4),
    """
    conv1  hidden inputs 3 3
    conv2  outputs hidden*4 3 3
    """,
)
class PixelUnshuffle(nn.Module):
    """Space becomes channels."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, hidden, 3), conv(hidden * 4, outputs, 3)

    def forward(self, x):
        return self.conv2(F.pixel_unshuffle(self.conv1(x).relu(), 2))


@example(
    "shared pyramid head",
    values(5, 6, 4, 4),
    """
    bottom   shallow inputs 3 3
    top      deep shallow 3 3
    lateral  pyramid shallow 1 1
    summit   pyramid deep 1 1
    head     outputs pyramid 3 3
    """,
)
class SharedPyramidHead(nn.Module):
    """A feature pyramid: one head on maps of two sizes."""

    def __init__(self, inputs=6, shallow=7, deep=10, pyramid=8, outputs=9):
        super().__init__()
        self.bottom, self.top = conv(inputs, shallow, 3), nn.Conv2d(shallow, deep, 3, stride=2, padding=1)
        self.lateral, self.summit, self.head = conv(shallow, pyramid), conv(deep, pyramid), conv(pyramid, outputs, 3)

    def forward(self, x):
        fine = self.bottom(x).relu()
        coarse = self.summit(self.top(fine).relu())
        fine = self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return self.head(fine.relu()), self.head(coarse.relu())


@example(
    "one-channel gate",
    values(5, 6, 4, 4),
    """
    stem  hidden inputs 3 3
    gate  1 hidden 1 1
    head  outputs hidden 1 1
    """,
)
class OneChannelGate(nn.Module):
    """An axis of size 1 is broadcast: it is not the axis that it meets."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.stem, self.gate, self.head = conv(inputs, hidden, 3), conv(hidden, 1), conv(hidden, outputs)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x * self.gate(x).sigmoid())


@example(
    "flatten to linear",
    values(5, 6, 3, 4),
    """
    conv  hidden inputs 3 3
    fc    outputs hidden*12
    """,
)
class FlattenToLinear(nn.Module):
    """Channels and the 3 x 4 pixels are factors of what the linear layer reads."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv, self.fc = conv(inputs, hidden, 3), nn.Linear(hidden * 12, outputs)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


@example(
    "global pooling",
    values(5, 6, 4, 4),
    """
    conv  hidden inputs 3 3
    fc    outputs hidden
    """,
)
class GlobalPooling(nn.Module):
    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv, self.fc = conv(inputs, hidden, 3), nn.Linear(hidden, outputs)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@example(
    "unfold",
    values(5, 6, 4, 4),
    """
    conv  hidden inputs 3 3
    fc    outputs hidden*4
    """,
)
class Unfold(nn.Module):
    """A convolution by hand: patches of 2 x 2, and a linear layer on what they hold."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.conv, self.fc = conv(inputs, hidden, 3), nn.Linear(hidden * 4, outputs)

    def forward(self, x):
        return self.fc(F.unfold(self.conv(x).relu(), 2).transpose(1, 2))
