"""A table of 540 really trained subnets, for searches that can be repeated: `benchmarks/data/digits_table.json`.

    python -m benchmarks.digits_table [--output PATH]     # some minutes on one core

A supernet of convolutions (residual blocks with batch norm) is trained for a short while on 320 of scikit-learn's
digits. Each of its 54 subnets (depth, width of the residual stream, width inside of the blocks, kernel size) inherits
its weights and is trained on with each of ten ways (optimizer, learning rate), twice with different orders of the
batches, and validated on the other 1,477 images. What a way is good for depends on the net: that is what a search over
both at once meets. The seconds of a training step are those that the cost model predicts for one thread.

The table is a list of rows under the names of their columns, with how it was made. Trainings are seeded, but sums of
floating-point numbers differ between machines: another machine's table is another table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt.elastic
from benchmarks.measure import machine_description
from demo.train_digits import accuracy, digits
from graphopt.cost_model import Machine
from graphopt.elastic import Kind, Space
from graphopt.elastic.prices import Prices, Training

TABLE = Path(__file__).parent / "data" / "digits_table.json"

BATCH, EPOCHS, REPEATS, SUPERNET_STEPS = 32, 2, 2, 120
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OPTIMIZERS = ("sgd", "adamw")
NET = ("depth", "embed", "hidden", "kernel")
"""Dimensions of the supernet; the knobs of the table are these and ``optimizer`` and ``lr``."""


class Block(nn.Module):
    """``relu(x + f(x))`` of two convolutions with batch norm, of 5 x 5."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, hidden, 5, padding=2, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.norm2 = nn.Conv2d(hidden, channels, 5, padding=2, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def supernet(channels: int = 16, blocks: int = 3) -> Space:
    """The space of subnets, with weights that follow torch's seed."""
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Sequential(*(Block(channels, channels) for _ in range(blocks))),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10),
    )  # fmt: skip
    shares = (0.25, 0.5, 1.0)
    sizes = {Kind.EMBEDDING: shares, Kind.WIDTH: shares}
    return graphopt.elastic.space(
        model, torch.randn(BATCH, 1, 8, 8),
        choices={**sizes, Kind.DEPTH: tuple(range(1, blocks + 1)), "kernel": (3, 5)},
        tied={"hidden": Kind.WIDTH, "kernel": "3.*.kernel"}, names={Kind.DEPTH: "depth"},
    )  # fmt: skip


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels: 320 to train on, 1,477 to validate on."""
    images, labels, more, their_labels = digits()
    images, labels = torch.cat([images, more]), torch.cat([labels, their_labels])
    return images[:320], labels[:320], images[320:], labels[320:]


class Batches:
    """Shuffled batches of the training images."""

    def __init__(self, seed: int):
        self._random = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Any:
        images, labels, *_ = data()
        for places in torch.randperm(len(labels), generator=self._random).split(BATCH):
            yield images[places], labels[places]


def optimizer(name: str, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS`."""
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)


def score(net: nn.Module, way: Mapping[str, Any], seed: int) -> float:
    """Percent of the validation images that a net, trained on, names rightly."""
    chosen = optimizer(way["optimizer"], net, way["lr"])
    batches = Batches(seed)
    net.train()
    for _ in range(EPOCHS):
        for images, labels in batches:
            chosen.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            chosen.step()
    _, _, images, labels = data()
    return 100 * accuracy(net, images, labels)


def table(seed: int = 0) -> dict[str, Any]:
    """All rows, and how they were made."""
    begun = perf_counter()
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    space = supernet()
    assert sorted(d.name for d in space.dimensions) == sorted(NET), space
    graphopt.elastic.train(
        space, Batches(seed), F.cross_entropy, torch.optim.AdamW(space.model.parameters(), lr=3e-3), SUPERNET_STEPS,
        seed=seed, progress=False,
    )  # fmt: skip
    seconds = {name: _step_seconds(space, name) for name in OPTIMIZERS}
    choices = [dict(zip(NET, sizes)) for sizes in product(*(space.dimension(name).choices for name in NET))]
    rows = []
    for sizes in track(choices, description="subnets"):
        choice = space.choice(sizes)
        inherited = space.extract(choice)
        numbers = sum(p.numel() for p in inherited.parameters())
        for name, lr in product(OPTIMIZERS, RATES):
            scores = [round(score(deepcopy(inherited), {"optimizer": name, "lr": lr}, repeat), 4)
                      for repeat in range(REPEATS)]  # fmt: skip
            predicted = float(f"{seconds[name].of([choice], 'step_seconds')[0]:.5g}")
            rows.append([*sizes.values(), name, lr, numbers, predicted, *scores])
    return {
        "made": {
            "by": "python -m benchmarks.digits_table", "machine": machine_description(), "seed": seed,
            "seconds": round(perf_counter() - begun), "batch": BATCH, "epochs": EPOCHS,
            "supernet_steps": SUPERNET_STEPS,
        },
        "columns": [*NET, "optimizer", "lr", "parameters", "step_seconds", *(f"score{i}" for i in range(REPEATS))],
        "rows": rows,
    }  # fmt: skip


def _step_seconds(space: Space, name: str) -> Prices:
    images, labels, *_ = data()
    batch = (images[:BATCH], labels[:BATCH])
    step = Training(batch, F.cross_entropy, optimizer(name, space.model, 1e-3))
    return Prices(space, Machine.current(), mode="eager", training=step)


def written(made: Mapping[str, Any]) -> str:
    """As JSON with one row a line."""
    head = {name: value for name, value in made.items() if name != "rows"}
    rows = ",\n".join(json.dumps(row) for row in made["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]\n}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits_table")
    parser.add_argument("--output", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(written(table()))


if __name__ == "__main__":
    main()
