"""Spaces to compare searches on: formulas, and a table of really trained nets.

- ``interactions``: knobs matter in products of two and three, so that no knob is good by itself.
- ``elastic``: a net of stages with depth and widths (those of layers that are left out do not count), hyper-parameters
  that depend on its size, noise in the scores, and a budget of seconds a step that a third of all points keep.
- ``digits``: 540 subnets of a supernet on scikit-learn's digits, with two hyper-parameters (`benchmarks.digits_table`).
  A trial gives one of three trainings; the true score is their mean. A trial takes as long as its net's step.
- ``unseen``: categories, conditions, a random network as the response, scores with heavy tails, trials that fail, a
  budget of memory. **Never looked at while proposers are worked on**: it tells what they are worth elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.exploration import choice, linear, log
from graphopt.exploration.search_space import Knob, Point, SearchSpace

TABLE = Path(__file__).parent / "data" / "digits_table.json"

Random = np.random.Generator


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        score: the true score of a point; NaN where its trials fail.
        measured: what a trial of a point gives, by chance.
        needs: what the gate is told, in units of the budget (1 of each); None without a budget.
        seconds: that a trial of a point takes, by chance.
    """

    space: SearchSpace
    score: Callable[[Point], float]
    measured: Callable[[Point, Random], float]
    needs: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None
    seconds: Callable[[Point, Random], float] = lambda point, random: float(random.uniform(0.5, 2.0))


def interactions(seed: int) -> Problem:
    """20 knobs of 4 values. The score is a sum of 40 tables over two or three knobs each, drawn by chance: what a knob
    does depends on others, and averages of one knob tell little."""
    random = np.random.default_rng([seed, 1])
    knobs = [Knob(f"k{i}", "net", choice(0, 1, 2, 3)) for i in range(20)]
    tables = []
    for i in range(40):
        places = random.choice(20, size=2 + i % 2, replace=False)
        table = random.normal(size=(4,) * len(places))
        for axis in range(table.ndim):  # no effect of a single knob
            table -= table.mean(axis=axis, keepdims=True)
        tables.append((places, table))

    def score(point: Point) -> float:
        return sum(float(table[tuple(point[p] for p in places)]) for places, table in tables) / math.sqrt(40)

    return Problem(SearchSpace(knobs), score, lambda point, random: score(point))


def elastic(seed: int) -> Problem:
    """4 stages of up to 4 layers, a width each, and three hyper-parameters: 23 knobs."""
    random = np.random.default_rng([seed, 2])
    knobs = []
    for s in range(4):
        knobs.append(Knob(f"depth{s}", "net", choice(1, 2, 3, 4)))
        for layer in range(4):
            when = {f"depth{s}": list(range(layer + 1, 5))}
            knobs.append(Knob(f"width{s}.{layer}", "net", choice(0.25, 0.5, 0.75, 1.0, when=when)))
    knobs += [
        Knob("lr", "hp", log(1e-4, 1e-1, steps=31)),
        Knob("decay", "hp", linear(0, 0.1, steps=11)),
        Knob("batch", "hp", choice(32, 64, 128, 256)),
    ]
    space = SearchSpace(knobs)
    gain, decay = random.uniform(0.5, 2.0, (4, 4)), float(random.uniform(0.02, 0.08))
    cost = random.uniform(0.5, 1.5, (4, 4)) * np.array([1.0, 1.5, 2.0, 3.0])[:, None]

    def widths(sizes: Mapping[str, Any]) -> np.ndarray:
        return np.array(
            [[sizes[f"width{s}.{i}"] if i < sizes[f"depth{s}"] else 0.0 for i in range(4)] for s in range(4)]
        )

    def score(point: Point) -> float:
        sizes, hp = space.sizes(point), space.hyper_parameters(point)
        w = widths(sizes)
        capacity = float((gain * np.sqrt(w)).sum())
        # A narrow layer between wide ones holds all back; the best rate falls with size and rises with the batch.
        neck = min(float(w[s][: sizes[f"depth{s}"]].min()) for s in range(4))
        best_lr = math.log10(0.03) - 0.05 * capacity + 0.5 * math.log10(hp["batch"] / 64)
        off = (math.log10(hp["lr"]) - best_lr) ** 2
        return 10 * math.log1p(capacity) + 4 * neck - 3 * off - 200 * (hp["decay"] - decay) ** 2 - (2 if off > 1 else 0)

    def seconds(sizes: Mapping[str, Any], hp: Mapping[str, Any]) -> float:
        return float((cost * widths(sizes)).sum()) * (0.5 + hp["batch"] / 128)

    limit = _quantile(space, random, seconds, 0.35)
    return Problem(
        space, score, lambda point, random: score(point) + 0.3 * float(random.normal()),
        lambda sizes, hp: {"step_seconds": seconds(sizes, hp) / limit},
    )  # fmt: skip


def digits(seed: int) -> Problem:
    """The table of `benchmarks.digits_table`, the same for each seed."""
    space, scores, seconds = _table()

    def measured(point: Point, random: Random) -> float:
        repeats = scores[point]
        return float(repeats[int(random.integers(len(repeats)))])

    return Problem(
        space, lambda point: float(scores[point].mean()), measured, None,
        lambda point, random: seconds[point] * float(random.uniform(0.8, 1.2)),
    )  # fmt: skip


@cache
def _table() -> tuple[SearchSpace, dict[Point, np.ndarray], dict[Point, float]]:
    made = json.loads(TABLE.read_text())
    names, rows = made["columns"], made["rows"]
    columns = dict(zip(names, zip(*rows)))
    knobs = [Knob(name, "hp" if name in ("optimizer", "lr") else "net", choice(*dict.fromkeys(columns[name])))
             for name in names[: names.index("parameters")]]  # fmt: skip
    space = SearchSpace(knobs)
    scores, seconds = {}, {}
    for row in rows:
        point = tuple(knob.range.values.index(value) for knob, value in zip(knobs, row))
        of = dict(zip(names, row))
        scores[point] = np.array([of[name] for name in names if name.startswith("score")])
        seconds[point] = 1000.0 * of["step_seconds"]
    assert len(scores) == len(rows) == space.size
    return space, scores, seconds


def unseen(seed: int) -> Problem:
    """23 knobs, of which six are categories and five count only under conditions. The response is a random network of
    one hidden layer over four knobs a unit; scores are percentages that saturate, with noise that is larger for worse
    models and has heavy tails; in a corner of the space trials fail."""
    random = np.random.default_rng([seed, 5])
    knobs = [
        Knob("optimizer", "hp", choice("sgd", "nesterov", "adam", "lion")),
        Knob("momentum", "hp", linear(0.5, 0.99, steps=8, when={"optimizer": ("sgd", "nesterov")})),
        Knob("beta2", "hp", choice(0.9, 0.95, 0.99, 0.999, when={"optimizer": ("adam", "lion")})),
        Knob("lr", "hp", log(1e-5, 1.0, steps=51)),
        Knob("decay", "hp", log(1e-6, 1e-1, steps=21)),
        Knob("schedule", "hp", choice("constant", "cosine", "linear")),
        Knob("warmup", "hp", linear(0, 0.3, steps=7, when={"schedule": ("cosine", "linear")})),
        Knob("augment", "hp", choice("none", "flip", "crop", "mix")),
        Knob("strength", "hp", linear(0.1, 1.0, steps=10, when={"augment": ("crop", "mix")})),
        Knob("smoothing", "hp", linear(0, 0.2, steps=5)),
        Knob("activation", "net", choice("relu", "gelu", "silu", "tanh", "elu")),
        Knob("norm", "net", choice("batch", "layer", "group", "none")),
        Knob("groups", "net", choice(2, 4, 8, 16, when={"norm": "group"})),
        Knob("blocks", "net", choice(2, 3, 4, 5, 6, 7, 8)),
        Knob("width", "net", choice(32, 48, 64, 96, 128, 192)),
        Knob("dropout", "net", linear(0, 0.5, steps=11)),
    ]
    for stage in range(3):
        knobs.append(Knob(f"kernel{stage}", "net", choice(3, 5, 7)))
        knobs.append(Knob(f"attention{stage}", "net", choice(False, True)))
    knobs.append(Knob("ratio", "net", choice(1, 2, 4, 6)))
    space = SearchSpace(knobs)
    units, count = 40, len(knobs)
    embedded = [  # a category is a random place; an ordered value its place, bent
        np.linspace(-1, 1, knob.size) if knob.range.ordered else random.normal(size=knob.size) for knob in knobs
    ]
    weights = np.zeros((units, count))
    for unit in weights:
        unit[random.choice(count, size=4, replace=False)] = 1.5 * random.normal(size=4)
    offsets, outer = random.normal(size=units), random.normal(size=units) / math.sqrt(units)

    def inputs(point: Point) -> np.ndarray:
        counts = space.active(point)
        return np.array([float(embedded[i][v]) if c else 0.0 for i, (v, c) in enumerate(zip(point, counts))])

    def score(point: Point) -> float:
        x = inputs(point)
        if x[0] * outer[0] * x[3] + x[13] * 0.3 > 0.45 * abs(outer[0]) + 0.3:
            return math.nan
        return 100.0 / (1.0 + math.exp(-1.0 - 1.5 * float(outer @ np.tanh(weights @ x + offsets))))

    def measured(point: Point, random: Random) -> float:
        value = score(point)
        return value + (0.2 + 0.02 * (100.0 - value)) * float(random.standard_t(3)) if math.isfinite(value) else value

    def memory(sizes: Mapping[str, Any], hp: Mapping[str, Any]) -> float:
        attention = sum(bool(sizes[f"attention{s}"]) for s in range(3))
        state = 3 if hp["optimizer"] in ("adam",) else 2
        return sizes["blocks"] * sizes["width"] * (1 + sizes["ratio"]) * (1 + 0.5 * attention) * state

    limit = _quantile(space, random, memory, 0.5)
    return Problem(space, score, measured, lambda sizes, hp: {"peak_bytes": memory(sizes, hp) / limit})


def _quantile(space: SearchSpace, random: Random, of: Callable[..., float], share: float) -> float:
    """What so large a share of points needs at most."""
    points = [space.sample(random) for _ in range(500)]
    return float(np.quantile([of(space.sizes(point), space.hyper_parameters(point)) for point in points], share))


SPACES: dict[str, Callable[[int], Problem]] = {
    "interactions": interactions, "elastic": elastic, "digits": digits, "unseen": unseen,
}  # fmt: skip
