"""`Region`: the part of a space that subnets are drawn from: which dimensions are open, and to which choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from random import Random
from typing import Any

import torch

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Value
from graphopt.elastic.options import meant
from graphopt.elastic.space import Space
from graphopt.elastic.transformations import draw
from graphopt.errors import ElasticError

Pattern = str
"""The name of a dimension, a kind (``width``, ``depth``), or a shell pattern on names or on the paths of modules."""


@dataclass(frozen=True)
class Region:
    """Choices of each dimension of a space; one that has a single choice is closed.

    ``any_runs``: where a depth of k runs is drawn, any k of them may remain, not the first k alone.
    """

    space: Space
    choices: Mapping[str, tuple[Value, ...]]
    any_runs: bool = False

    @classmethod
    def of(cls, space: Space, *, any_runs: bool = False) -> Region:
        """All of ``space``."""
        return cls(space, {d.name: d.choices for d in space.dimensions}, any_runs)

    @cached_property
    def open(self) -> tuple[str, ...]:
        """Names of the dimensions that have more than one choice, in the space's order."""
        return tuple(name for name, choices in self.choices.items() if len(choices) > 1)

    @cached_property
    def full(self) -> Choice:
        """The last choice of each dimension."""
        return self.choice({})

    @cached_property
    def smallest(self) -> Choice:
        """The first choice of each dimension."""
        return self.choice({name: self.choices[name][0] for name in self.open})

    @property
    def size(self) -> int:
        """How many choices there are."""
        return prod(len(choices) for choices in self.choices.values())

    def only(self, patterns: Iterable[Pattern]) -> Region:
        """The same with all other dimensions at their last choice. Raises ElasticError as `matching` does."""
        kept = set(matching(self.space.dimensions, patterns))
        return replace(self, choices={n: c if n in kept else c[-1:] for n, c in self.choices.items()})

    def choice(self, values: Mapping[str, Value]) -> Choice:
        """The choice with these values, and the last one of each other dimension."""
        return self.space.choice({n: values.get(n, c[-1]) for n, c in self.choices.items()})

    def uniform(self, random: Random, names: Iterable[str] | None = None) -> dict[str, Value]:
        """A value of each open dimension (of ``names``, if given), all equally likely."""
        names = self.open if names is None else names
        return {name: self.value(name, random.randrange(len(self.choices[name])), random) for name in names}

    def value(self, name: str, index: int, random: Random) -> Value:
        """The choice of a dimension at an index; with ``any_runs`` some runs of that number, drawn at random."""
        value = self.choices[name][index]
        if self.any_runs and name in self._depths and isinstance(value, int):
            return tuple(sorted(random.sample(range(self._depths[name]), value)))
        return value

    def per_layer(self, count: int, random: Random) -> list[dict[str, Value]]:
        """Which transformation each layer goes through in so many subnets: of each layer as many are drawn, none again
        before all were there, and the i-th draws of all layers are subnet i.

        Raises ElasticError where no layer has transformations.
        """
        layers = [d.name for d in self.space.dimensions if d.kind is Kind.TRANSFORMATION]
        if not layers:
            raise ElasticError("no layer of this space has transformations; give space(..., layers={...})")
        generator = torch.Generator().manual_seed(random.getrandbits(60))
        drawn = draw({name: len(self.choices[name]) for name in layers}, count, generator)
        return [{name: self.choices[name][index] for name, index in one.items()} for one in drawn]

    @cached_property
    def _depths(self) -> dict[str, int]:
        """How many runs each dimension of depth has."""
        return {d.name: d.size for d in self.space.dimensions if d.kind is Kind.DEPTH}


def matching(dimensions: Sequence[Dimension], patterns: Iterable[Pattern]) -> tuple[str, ...]:
    """Names of the dimensions that any pattern means, in the space's order.

    Raises ElasticError for a pattern that means none.
    """
    found: set[str] = set()
    for pattern in patterns:
        mine = {d.name for d in meant(pattern, dimensions)}
        if not mine:
            names = ", ".join(f"{d.name} ({d.kind})" for d in dimensions)
            raise ElasticError(f"dimensions: {pattern!r} is the name, a pattern or the kind of none; there are {names}")
        found |= mine
    return tuple(d.name for d in dimensions if d.name in found)


def draws(space: Space, m: int, *, seed: int | None = None, base: Mapping[str, Any] | None = None) -> list[Choice]:
    """m subnets that differ in their transformations: m are drawn per layer, the i-th of all layers form subnet i.

    ``base``: values of the other dimensions, full by default. Raises ElasticError where no layer has transformations.
    """
    drawn = Region.of(space).per_layer(m, Random(seed))
    return [space.choice({**(base or {}), **values}) for values in drawn]
