"""Supernets of a small ViT and a small ResNet on real digits: models, spaces, batches, and nets trained alone.

The data are the 1,797 digits of 8 x 8 pixels that come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt.elastic
from benchmarks.measure import eager_step
from demo.train_digits import digits
from graphopt.elastic import Choice, Space
from graphopt.elastic.batch_norm_statistics import evaluate

BATCH = 64


class Layer(nn.Module):
    """A transformer layer with fused queries, keys and values."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """16 tokens of 2 x 2 pixels, width 32, 4 heads, 64 hidden features, 4 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, 32, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.layers = nn.Sequential(*(Layer(32, 4, 64) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


class Block(nn.Module):
    """``relu(x + f(x))`` of two convolutions with batch norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet() -> nn.Module:
    """Two stages of two blocks, 16 and 32 channels."""

    def entry(before: int, after: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *entry(1, 16, 1), nn.Sequential(Block(16), Block(16)), *entry(16, 32, 2), nn.Sequential(Block(32), Block(32)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": ViT, "resnet": resnet}

CHOICES: dict[str, dict[str, Sequence[Any]]] = {
    "vit": {"embedding": (0.5, 0.75, 1.0), "width": (0.25, 0.5, 1.0), "depth": (2, 3, 4)},
    "resnet": {"embedding": (0.5, 0.75, 1.0), "width": (0.5, 0.75, 1.0), "depth": (1, 2)},
}
"""By kind of dimension; others as by default. The smallest ViT has a 14th of the FLOPs of the full one."""


def space_of(name: str, seed: int, tied: Any = ()) -> Space:
    """A supernet with weights by the seed."""
    torch.manual_seed(seed)
    model = MODELS[name]().train()
    kinds = {str(d.kind) for d in graphopt.elastic.space(model, torch.randn(BATCH, 1, 8, 8)).dimensions}
    wanted = {kind: sizes for kind, sizes in CHOICES[name].items() if kind in kinds}
    return graphopt.elastic.space(model, torch.randn(BATCH, 1, 8, 8), choices=wanted, tied=tied)


class Batches:
    """Shuffled batches of the training images, over and over, the same ones for the same seed."""

    def __init__(self, seed: int):
        self.images, self.labels, *_ = digits()
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.labels), generator=numbers)
            for at in order.split(BATCH)[:-1]:
                yield self.images[at], self.labels[at]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all nets here."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning rate of all trainings here."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def right(output: Tensor, target: Tensor) -> Tensor:
    """The share of right answers, in percent."""
    return 100 * (output.argmax(1) == target).float().mean()


def accuracy_of(space: Space, choice: Choice) -> float:
    """Of a subnet on images that were not trained on, with statistics of batch norms of its own."""
    images, labels, test_images, test_labels = digits()
    calibration = [(images[at], labels[at]) for at in torch.arange(1024).split(128)]
    return evaluate(space, choice, [(test_images, test_labels)], right, calibration=calibration)


def sizes_of(space: Space, random: int) -> dict[str, Choice]:
    """Largest, middle, smallest and some random subnets, by name."""
    middle = space.choice({d.name: d.choices[(len(d.choices) - 1) // 2] for d in space.dimensions})
    named = {"largest": space.full, "middle": middle, "smallest": space.smallest}
    return named | {f"random {i}": space.sample(seed=1000 + i) for i in range(random)}


def alone(name: str, choice: Mapping[str, Any], seed: int, steps: int) -> float:
    """The accuracy of one subnet trained by itself: the same code, weights at the start, batches and steps."""
    space = space_of(name, seed)
    # the plain module of that size starts from the weights that a net of its size would be given: drawn anew
    net = space.extract(choice).train()
    torch.manual_seed(seed)
    _draw_anew(net)
    optimizer = adamw(net.parameters())
    scheduler = cosine(optimizer, steps)
    step = eager_step(net, optimizer, F.cross_entropy)
    for (x, y), _ in zip(Batches(seed), range(steps)):
        step(x, y)
        scheduler.step()
    *_, images, labels = digits()
    net.eval()
    with torch.no_grad():
        return float(right(net(images), labels))


def _draw_anew(net: nn.Module) -> None:
    """Weights as torch's own layers draw them, for the shapes at hand: uniform in ``1 / sqrt(fan in)``."""
    for name, parameter in net.named_parameters():
        with torch.no_grad():
            if parameter.dim() >= 2 and "positions" not in name:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound)


def tied_space_of(name: str, seed: int) -> Space:
    """The supernet of `space_of` with one value for all dimensions of a kind and size, as hand-written ones have."""
    plain = space_of(name, seed)
    alike: dict[tuple[str, Any], list[str]] = {}
    for dimension in plain.dimensions:
        alike.setdefault((str(dimension.kind), dimension.full), []).append(dimension.name)
    groups = [names for names in alike.values() if len(names) > 1]
    return space_of(name, seed, tied=groups)
