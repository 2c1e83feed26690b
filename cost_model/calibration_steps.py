"""Whole steps of small networks, eager and flat: what corrects the global factors of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.cost_model.analytical import factor_seconds
from graphopt.cost_model.machine import Machine
from graphopt.cost_model.measured import measure
from graphopt.cost_model.work import Mode
from graphopt.graph.capture import capture
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import TrainingGraph


@dataclass(frozen=True)
class Case:
    """A network and the batch sizes to step it at; ``batch(n)`` makes a random batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A step that was measured. ``by_factor``: its predicted seconds by factor, all factors 1 (`FACTORS`)."""

    name: str
    mode: Mode
    batch: int
    seconds: float
    by_factor: Mapping[str, float]


@dataclass(frozen=True)
class Ready:
    """A network at one batch size: its graph, and the ways to step it."""

    name: str
    batch: int
    graph: TrainingGraph
    steps: Mapping[Mode, Callable[[], Any]]


def rows(machine: Machine, seconds: float, progress: Callable[[float], None] = lambda share: None) -> list[Row]:
    """Step the networks, for about ``seconds``."""
    end = perf_counter() + seconds
    ready: list[Ready] = []
    for case in CASES:
        ready += prepared(case)
        progress(len(ready) / (6 * len(CASES)))
    found: dict[tuple[str, int, Mode], float] = {}
    budget = max(end - perf_counter(), 1.0) / (_SWEEPS * len(ready))
    for sweep in range(_SWEEPS):  # apart in time: a machine that others share is slower for some seconds now and then
        for i, one in enumerate(ready):
            for mode, taken in measure(one.steps, seconds=budget, rounds=(5, 30), warmup=2, probe=None).items():
                key = (one.name, one.batch, mode)
                found[key] = min(taken.seconds, found.get(key, taken.seconds))
            progress((1 + (sweep + i / len(ready)) / _SWEEPS * 2) / 3)
    return [
        Row(one.name, mode, one.batch, found[one.name, one.batch, mode],
            factor_seconds(one.graph, machine, {"batch": one.batch}, mode=mode))
        for one in ready for mode in one.steps
    ]  # fmt: skip


_SWEEPS = 2


def prepared(case: Case) -> Iterator[Ready]:
    """A network at each of its batch sizes, ready to be stepped."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = case.optimizer(model.parameters())
    _eager_step(model, optimizer, *case.batch(2))
    _fill_state(optimizer)
    for size in case.sizes:
        batch = case.batch(size)
        graph = capture(model, batch, loss=F.cross_entropy, optimizer=optimizer)  # another size may be another graph
        yield Ready(
            case.name,
            size,
            graph,
            {
                "eager": partial(_eager_step, model, optimizer, *batch),
                "flat": partial(flat_step, lower(graph), synthetic_inputs(graph, size)),
            },
        )


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """State as after many batches. Rows that few batches look up and units that are off have second moments of 0, and
    some processors take five times as long for their root, thirty times for that of a denormal number."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                value.add_(1e-6)


def _eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def flat_step(flat: Lowered, inputs: list[Any]) -> None:
    with torch.no_grad():
        flat.run(*inputs)


def synthetic_inputs(graph: TrainingGraph, batch: int) -> list[Any]:
    """Inputs of a graph's shapes and dtypes: only their time matters. Indices are 0, numbers and state are small."""

    def value(of: Any) -> Any:
        if not isinstance(of, Tensor):
            return 1e-3
        shape = [graph.symbols.evaluate(expression(size), {"batch": batch}) for size in of.shape]
        if not of.is_floating_point():
            return torch.zeros(shape, dtype=of.dtype)
        return torch.rand(shape, dtype=of.dtype).mul_(0.1)

    return [value(node.meta["val"]) for node in graph.placeholders]


# -- networks ---------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """A block of a ResNet, or with ``groups`` of a mobile network."""

    def __init__(self, inputs: int, outputs: int, stride: int, hidden: int, groups: int = 1, kernel: int = 3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1 if groups > 1 else 3, padding=0 if groups > 1 else 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.SiLU() if groups > 1 else nn.ReLU(),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class _Patches(nn.Module):
    """A block of a ConvNeXt: depthwise convolution, layer norm over channels, MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


class _Transformer(nn.Module):
    """Tokens through an encoder; the loss is over the vocabulary at each place."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places
        for layer in self.layers:
            y = layer(y)
        return self.head(y).flatten(0, 1)


class _Last(nn.Module):
    """The last output of a recurrent layer."""

    def forward(self, result: tuple[Tensor, Any]) -> Tensor:
        return result[0][:, -1]


def _mlp() -> nn.Module:
    wide = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), *wide, nn.Linear(512, 10))


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        _Residual(32, 64, 1, 32), _Residual(64, 128, 2, 64), _Residual(128, 256, 2, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def _mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(),
        _Residual(16, 24, 2, 64, 64), _Residual(24, 24, 1, 96, 96), _Residual(24, 48, 2, 96, 96, 5),
        _Residual(48, 48, 1, 192, 192, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def _patches() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 4), _Patches(64), _Patches(64), nn.Conv2d(64, 128, 2, 2), _Patches(128), _Patches(128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _recurrent() -> nn.Module:
    return nn.Sequential(nn.Embedding(1000, 64), nn.LSTM(64, 128, 2, batch_first=True), _Last(), nn.Linear(128, 10))


_adamw = lambda parameters: torch.optim.AdamW(parameters, 1e-3)
_sgd = lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9)


def _images(size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, 3, size, size), torch.randint(10, (n,)))


def _tokens(length: int, each: bool, vocabulary: int = 1000) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randint(vocabulary, (n, length)), torch.randint(10, (n * length if each else n,)))


TINY = (
    Case("tiny mlp", lambda: nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(12)]),
         lambda n: (torch.randn(n, 8), torch.randint(8, (n,))), _adamw, (2,)),
    Case("tiny transformer", lambda: _Transformer(10, 8, 2, 2, 4), _tokens(4, True, 10), _adamw, (2,)),
    Case("tiny convolutions", lambda: nn.Sequential(
        *[nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(6)],
        nn.Flatten(), nn.Linear(48, 10)), _images(4), _sgd, (2,)),
)  # fmt: skip
"""Networks whose steps are nearly all launches."""

CASES = (
    Case("mlp", _mlp, lambda n: (torch.randn(n, 64), torch.randint(10, (n,))), _adamw, (4, 128)),
    Case("residual", _residual, _images(64), _sgd, (2, 16)),
    Case("mobile", _mobile, _images(64), _sgd, (2, 16)),
    Case("patches", _patches, _images(64), _adamw, (2, 8)),
    Case("transformer", lambda: _Transformer(1000, 128, 4, 3, 64), _tokens(64, True), _adamw, (2, 8)),
    Case("recurrent", _recurrent, _tokens(32, False), _adamw, (2, 32)),
)
"""Networks of the common kinds of layers. Small ones: what a calibration must not take is time."""
