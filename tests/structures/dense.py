"""Structures of linear layers: residual streams, layers used twice, gates."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .truth import example, values


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, *inner: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


@example(
    "plain mlp",
    values(5, 6),
    """
    fc1  hidden inputs
    fc2  outputs hidden
    """,
)
class PlainMlp(nn.Module):
    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


@example(
    "residual add",
    values(5, 6),
    """
    stem           stream inputs
    block.inner.0  hidden stream
    block.inner.2  stream hidden
    head           outputs stream
    """,
    depth="block",
)
class ResidualAdd(nn.Module):
    def __init__(self, inputs=6, stream=8, hidden=7, outputs=3):
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, stream), nn.Linear(stream, outputs)
        self.block = Residual(nn.Linear(stream, hidden), nn.ReLU(), nn.Linear(hidden, stream))

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


@example(
    "three residual blocks",
    values(5, 6),
    """
    stem              stream inputs
    blocks.0.inner.0  hidden0 stream
    blocks.0.inner.2  stream hidden0
    blocks.1.inner.0  hidden1 stream
    blocks.1.inner.2  stream hidden1
    blocks.2.inner.0  hidden2 stream
    blocks.2.inner.2  stream hidden2
    head              outputs stream
    """,
    depth="blocks.0 blocks.1 blocks.2",
)
class ThreeResidualBlocks(nn.Module):
    """The residual stream is one group through all blocks."""

    def __init__(self, inputs=6, stream=11, hidden0=7, hidden1=8, hidden2=9, outputs=3):
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, stream), nn.Linear(stream, outputs)
        self.blocks = nn.ModuleList(
            Residual(nn.Linear(stream, hidden), nn.GELU(), nn.Linear(hidden, stream))
            for hidden in (hidden0, hidden1, hidden2)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@example(
    "residual of the input",
    values(5, 6),
    """
    block.inner.0  hidden inputs
    block.inner.2  inputs hidden
    """,
    frozen={"inputs": ""},
    depth="block",
)
class ResidualOfTheInput(nn.Module):
    """The stream is the input and the output: only the hidden axis is free."""

    def __init__(self, inputs=6, hidden=7):
        super().__init__()
        self.block = Residual(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, inputs))

    def forward(self, x):
        return self.block(x)


@example(
    "hidden returned",
    values(5, 6),
    """
    fc1  shown inputs
    fc2  hidden shown
    fc3  outputs hidden
    """,
    frozen={"shown": "output"},
)
class HiddenReturned(nn.Module):
    """A hidden value that is an output too."""

    def __init__(self, inputs=6, shown=7, hidden=8, outputs=3):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(inputs, shown), nn.Linear(shown, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        shown = self.fc1(x).relu()
        return self.fc3(self.fc2(shown).relu()), shown


@example(
    "module used twice",
    values(5, 6),
    """
    stem  width inputs
    twice width width
    head  outputs width
    """,
)
class ModuleUsedTwice(nn.Module):
    """What leaves the module enters it again, so both sides of its weight are one group."""

    def __init__(self, inputs=6, width=7, outputs=3):
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.twice(self.twice(self.stem(x)).tanh()).tanh())


@example(
    "in-place relu and add",
    values(5, 6),
    """
    left   hidden inputs
    right  hidden inputs
    head   outputs hidden
    """,
)
class InPlace(nn.Module):
    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.left, self.right, self.head = (
            nn.Linear(inputs, hidden),
            nn.Linear(inputs, hidden),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x):
        y, z = self.left(x), self.right(x)
        y.relu_()
        z.add_(y)
        return self.head(z.relu_())


@example(
    "fused swiglu",
    values(5, 6),
    """
    gate_up  2*hidden inputs
    down     outputs hidden
    """,
)
class FusedSwiglu(nn.Module):
    """Gate and value are the halves of one weight (``chunk``)."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.gate_up, self.down = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, outputs, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


@example(
    "gate-up split",
    values(5, 6),
    """
    gate_up  2*hidden inputs
    down     outputs hidden
    """,
)
class GateUpSplit(nn.Module):
    """The same with the size of a half written into the graph (``split``)."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.hidden = hidden
        self.gate_up, self.down = nn.Linear(inputs, 2 * hidden, bias=False), nn.Linear(hidden, outputs)

    def forward(self, x):
        gate, up = self.gate_up(x).split(self.hidden, dim=-1)
        return self.down(F.gelu(gate) * up)


@example(
    "glu",
    values(5, 6),
    """
    fc1  2*hidden inputs
    fc2  outputs hidden
    """,
)
class Glu(nn.Module):
    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(F.glu(self.fc1(x), -1))


@example(
    "interleaved gate",
    values(5, 6),
    """
    gate_up  hidden*2 inputs
    down     outputs hidden
    """,
)
class InterleavedGate(nn.Module):
    """Gate and value alternate: a product whose inner factor is fixed. To freeze it is safe."""

    def __init__(self, inputs=6, hidden=7, outputs=3):
        super().__init__()
        self.gate_up, self.down = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        y = self.gate_up(x)
        return self.down(y[..., ::2].sigmoid() * y[..., 1::2])
