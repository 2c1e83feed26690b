"""Steps that the tests of pages and figures look at: a small real one with waste in it, and a large made-up one."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.graph.capture import capture
from graphopt.graph.training_graph import InputKind, Phase, TrainingGraph
from graphopt.passes import GradientLiveness, PassResult, Pipeline
from graphopt.step import PASSES
from tests.helpers import traced

aten = torch.ops.aten


class Block(nn.Module):
    """A residual block: the sum is an operator of the block itself, beside its submodules."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(F.relu(self.inner(x)))


def model() -> nn.Module:
    """Two blocks and a head."""
    return nn.Sequential(nn.Linear(6, 16), Block(16), Block(16), nn.Linear(16, 4))


@cache
def head_only() -> PassResult:
    """A step that trains the head of `model` alone, captured with all gradients: what passes make of it."""
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.AdamW(net[3].parameters(), foreach=False)
    batch = torch.randn(8, 6), torch.randint(4, (8,))
    graph = capture(net, batch, loss=F.cross_entropy, optimizer=optimizer, gradients="all")
    return Pipeline((GradientLiveness(), *PASSES))(graph)


@cache
def head_only_of_convolutions() -> PassResult:
    """Two convolutions of which the second is trained: its input gradient is not read, its weight gradient is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Flatten())
    batch = torch.randn(4, 2, 5, 5), torch.randint(4, (4,))
    graph = capture(net, batch, loss=F.cross_entropy, gradients="all")
    return GradientLiveness(trainable=["1.weight", "1.bias"])(graph)


def large(blocks: int = 50, operators: int = 20) -> TrainingGraph:
    """A joint graph of ``blocks`` modules, each with so many operators in forward, backward and update."""

    def step(step, x, w):
        value, made = x, []
        for _ in range(blocks * operators):
            value = aten.mul.Tensor(value, w)
            made.append(value)
        with step.phase(Phase.BACKWARD):
            for kept in reversed(made):
                value = aten.mul.Tensor(value, kept)
        with step.phase(Phase.UPDATE):
            for _ in range(blocks * operators):
                value = aten.sub.Tensor(value, w)
        return value

    graph = traced(step, (4, 8), (8,), kinds=[InputKind.BATCH, InputKind.PARAMETER])
    counts = dict.fromkeys(Phase, 0)
    for node in graph.nodes:
        if node.op == "call_function":
            k = counts[node.meta["phase"]]
            counts[node.meta["phase"]] += 1
            block = k // operators
            if node.meta["phase"] is Phase.BACKWARD:
                block = blocks - 1 - block
            stage = f"stages.{block // 10}.blocks.{block % 10}.{'inner' if k % operators < operators // 2 else 'outer'}"
            node.meta |= {"module": stage, "source": f"model.py:{10 + k % operators}"}
    return graph
