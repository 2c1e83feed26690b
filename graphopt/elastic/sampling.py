"""Which subnets a training step trains: strategies of drawing them.

A strategy keeps nothing between steps. What varies comes in: the region to draw from, how many are wanted, the random
numbers and the number of the step (`Turn`). So any strategy may stand inside of any other, and `Sampler` alone has a
state to be saved. One may give fewer than are wanted where there are no more that differ.

Names of the field: `Fixed` is slimmable networks' list of widths, `Random` the uniform sampling of AutoFormer,
`BudgetHistogram` the sampling by FLOPs of AttentiveNAS, `Sandwich` the rule of US-Nets and AlphaNet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from random import Random as Dice
from typing import Any

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Kind
from graphopt.elastic.region import Pattern, Region, matching
from graphopt.errors import ElasticError

_TRIES = 20
"""Draws for each subnet that is wanted, before those that are there count as all that differ."""


@dataclass(frozen=True)
class Turn:
    """One step of training as strategies see it. ``step``: its number, from 0; ``dice``: all that may vary."""

    step: int
    dice: Dice


class Strategy(ABC):
    """A way of drawing subnets."""

    @abstractmethod
    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """At most ``count`` different choices of ``region``. Raises ElasticError for what does not fit the region."""


def distinct(choices: Iterable[Choice], known: Iterable[Choice] = ()) -> list[Choice]:
    """The choices that are different subnets (`Choice.key`) from each other and from those that are known, in order."""
    seen = {choice.key() for choice in known}
    found = []
    for choice in choices:
        if choice.key() not in seen:
            seen.add(choice.key())
            found.append(choice)
    return found


def _different(count: int, known: Sequence[Choice], one: Callable[[], Choice]) -> list[Choice]:
    """Up to ``count`` subnets by ``one`` that differ from each other and from those that are known."""
    found: list[Choice] = []
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        found += distinct([one()], [*known, *found])
    return found


@dataclass(frozen=True)
class Empty(Strategy):
    """Draws nothing: what is trained is the full net (of the region), as without a space."""

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        return []


@dataclass(frozen=True)
class Fixed(Strategy):
    """Always the same choices. Where fewer are wanted than there are, they take turns, step by step."""

    choices: tuple[Choice | Mapping[str, Any], ...]

    def __init__(self, choices: Sequence[Choice | Mapping[str, Any]]):
        """Args: choices: whole ones, or values of some dimensions, the others being full."""
        object.__setattr__(self, "choices", tuple(choices))
        if not self.choices:
            raise ElasticError("Fixed: got no choices; `Empty` is the strategy that draws none")

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        every = distinct(region.space.choice({**region.full, **c}) for c in self.choices)
        first = turn.step * count % len(every) if count < len(every) else 0
        return (every + every)[first : first + min(count, len(every))]


@dataclass(frozen=True)
class Random(Strategy):
    """Each open dimension at random, all its choices equally likely, independently of the others.

    Most of these are of middling size: a sum over many dimensions hardly ever comes near its ends. Without the ends
    (`Sandwich`) the smallest nets learn least.
    """

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        return _different(count, (), lambda: region.choice(region.uniform(turn.dice)))


@dataclass(frozen=True)
class Leaning(Strategy):
    """Each open dimension at random, all leaning to the same side, so that any size of the whole is about as likely:
    small nets are small in every layer, as those that a small budget asks for."""

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        return _different(count, (), lambda: spread(region, turn.dice))


@dataclass(frozen=True)
class Weighted(Strategy):
    """From a given distribution: of whole choices, or of the values of each dimension by itself.

    Args:
        choices: weight of each choice.
        dimensions: by name, pattern or kind of dimensions, the weight of each of their choices, ascending. Dimensions
            that are not named are drawn uniformly. In a region that admits some of the choices only, the weights of
            those count.
    """

    choices: Mapping[Choice, float] | None = None
    dimensions: Mapping[Pattern, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if (self.choices is None) == (self.dimensions is None):
            raise ElasticError("Weighted: expected weights of either choices or dimensions")
        for weights in [list(self.choices.values())] if self.choices is not None else (self.dimensions or {}).values():
            _check_weights("Weighted", weights)

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        if self.choices is not None:
            every, weights = list(self.choices), list(self.choices.values())
            return _different(count, (), lambda: turn.dice.choices(every, weights)[0])
        weights_of = self._by_name(region)

        def one() -> Choice:
            values = region.uniform(turn.dice, [n for n in region.open if n not in weights_of])
            for name, weights in weights_of.items():
                index = turn.dice.choices(range(len(weights)), weights)[0]
                values[name] = region.value(name, index, turn.dice)
            return region.choice(values)

        return _different(count, (), one)

    def _by_name(self, region: Region) -> dict[str, list[float]]:
        every = {d.name: tuple(d.choices) for d in region.space.dimensions}
        found: dict[str, list[float]] = {}
        for pattern, weights in (self.dimensions or {}).items():
            for name in matching(region.space.dimensions, [pattern]):
                if len(weights) != len(every[name]):
                    raise ElasticError(
                        f"Weighted: {name} has the {len(every[name])} choices {every[name]}, got {len(weights)} weights"
                    )
                if name in region.open:
                    kept = [w for value, w in zip(every[name], weights) if value in region.choices[name]]
                    found[name] = kept if sum(kept) > 0 else [1.0] * len(kept)
        return found


@dataclass(frozen=True)
class BudgetHistogram(Strategy):
    """Subnets whose costs follow a histogram: a bin by its weight, then a subnet of that bin.

    Args:
        cost: the costs of choices, such as ``Prices(space).flops``; many are asked for at once.
        edges: ascending borders of the bins, in the unit of ``cost``; one more than there are weights.
        weights: how likely each bin is. Where no subnet of a bin is found, the nearest one found stands for it.

    Source: Wang et al., "AttentiveNAS: Improving Neural Architecture Search via Attentive Sampling", CVPR 2021.
    """

    cost: Callable[[Sequence[Choice]], Any]
    edges: tuple[float, ...]
    weights: tuple[float, ...]

    def __init__(self, cost: Callable[[Sequence[Choice]], Any], edges: Sequence[float], weights: Sequence[float]):
        """See the class. Raises ElasticError for borders that do not ascend, or weights that do not fit them."""
        for name, value in (("cost", cost), ("edges", tuple(edges)), ("weights", tuple(weights))):
            object.__setattr__(self, name, value)
        if list(self.edges) != sorted(set(self.edges)) or len(self.edges) != len(self.weights) + 1:
            raise ElasticError(
                f"BudgetHistogram: expected ascending edges, one more than weights; got {self.edges}, {self.weights}"
            )
        _check_weights("BudgetHistogram", self.weights)

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        found: list[Choice] = []
        for _ in range(count):
            bin_ = turn.dice.choices(range(len(self.weights)), self.weights)[0]
            pool = distinct((spread(region, turn.dice) for _ in range(_POOL)), found)
            if pool:
                low, high = self.edges[bin_], self.edges[bin_ + 1]
                costs = [float(c) for c in self.cost(pool)]
                away = [max(low - c, c - high, 0.0) for c in costs]
                nearest = min(away)
                found.append(turn.dice.choice([c for c, d in zip(pool, away) if d == nearest]))
        return found


_POOL = 64
"""Subnets among which one of a bin is looked for."""


def spread(region: Region, dice: Dice) -> Choice:
    """A choice at random, of any size: all dimensions lean to the same side, by how much is drawn first."""
    lean = dice.random()
    values = {}
    for name in region.open:
        index = sum(dice.random() < lean for _ in range(len(region.choices[name]) - 1))
        values[name] = region.value(name, index, dice)
    return region.choice(values)


@dataclass(frozen=True)
class Mixed(Strategy):
    """Some by one strategy, some by others: ``Mixed((Fixed(sizes), 2), (Random(), None))``.

    Args:
        parts: strategies with how many each draws; None for one of them: what is left.
    """

    parts: tuple[tuple[Strategy, int | None], ...]

    def __init__(self, *parts: tuple[Strategy, int | None]):
        """See the class. Raises ElasticError for counts below 0, or more than one None."""
        object.__setattr__(self, "parts", parts)
        counts = [count for _, count in parts]
        if counts.count(None) > 1 or any(count is not None and count < 0 for count in counts):
            raise ElasticError(f"Mixed: expected counts of at least 0 and None at most once, got {counts}")

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        rest = max(count - sum(c or 0 for _, c in self.parts), 0)
        found: list[Choice] = []
        for strategy, wanted in self.parts:
            found += _further(strategy, region, rest if wanted is None else wanted, turn, found)
        return found[:count]


@dataclass(frozen=True)
class Sandwich(Strategy):
    """The largest, the smallest, some that are fixed, and the rest by another strategy.

    The ends bound the loss of all between them. Where fewer are wanted than stand here, the first ones are taken.

    Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.
    """

    fixed: tuple[Choice | Mapping[str, Any], ...] = ()
    rest: Strategy = Random()

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        found = distinct([region.full, region.smallest])
        if self.fixed:
            found += _further(Fixed(self.fixed), region, count - len(found), turn, found)
        found += _further(self.rest, region, count - len(found), turn, found)
        return found[:count]


SANDWICH = Sandwich()
"""Largest, smallest, and the rest at random: what trains all sizes best in short trainings."""


def _further(strategy: Strategy, region: Region, count: int, turn: Turn, known: Sequence[Choice]) -> list[Choice]:
    """Up to ``count`` subnets that a strategy draws beyond those that are known; it is asked again where it must be."""
    found: list[Choice] = []
    for _ in range(_TRIES):
        if len(found) >= count:
            break
        drawn = strategy.draw(region, count, turn)
        found += distinct(drawn, [*known, *found])
        if not drawn:
            break
    return found[: max(count, 0)]


@dataclass(frozen=True)
class Within(Strategy):
    """Another strategy with some dimensions open and all others full: ``Within(["depth"], Random())``."""

    patterns: tuple[Pattern, ...]
    strategy: Strategy

    def __init__(self, patterns: Sequence[Pattern], strategy: Strategy):
        """Args: patterns: names, patterns on names or kinds of the dimensions that stay open."""
        object.__setattr__(self, "patterns", tuple(patterns))
        object.__setattr__(self, "strategy", strategy)

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        return self.strategy.draw(region.only(self.patterns), count, turn)


@dataclass(frozen=True)
class ByStage(Strategy):
    """One strategy after the other: ``ByStage((1000, Empty()), (500, Within(["width"], Random())), (None, Random()))``.

    Args:
        stages: how many steps, and the strategy of these; the last one goes on.
    """

    stages: tuple[tuple[int | None, Strategy], ...]

    def __init__(self, *stages: tuple[int | None, Strategy]):
        """See the class. Raises ElasticError for no stages, or a number of steps that is not positive."""
        object.__setattr__(self, "stages", stages)
        if not stages or any(steps is None or steps < 1 for steps, _ in stages[:-1]):
            raise ElasticError(f"ByStage: expected stages of at least one step each, got {[s for s, _ in stages]}")

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        ends = accumulate(steps or 0 for steps, _ in self.stages[:-1])
        current = sum(turn.step >= end for end in ends)
        return self.stages[current][1].draw(region, count, turn)


@dataclass(frozen=True)
class Recurring(Strategy):
    """The same sets of subnets again and again, in turn: those that another strategy draws in so many steps.

    A set that comes again can be one graph (``schemes`` of `ElasticStep`), at a price: subnets that are in no set learn
    only what they share with those that are.

    Args:
        rest: draws each set.
        sets: how many there are.
        seed: of what the sets consist of; it does not change with the step or its random numbers.
    """

    rest: Strategy = SANDWICH
    sets: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.sets) is not int or self.sets < 1:
            raise ElasticError(f"Recurring: expected at least one set, got {self.sets!r}")

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        number = turn.step % self.sets
        return self.rest.draw(region, count, Turn(number, Dice(f"{self.seed}, set {number}")))


@dataclass(frozen=True)
class Rotating(Strategy):
    """A sandwich over steps instead of within one: a step of the largest, one of the smallest, two of the rest."""

    rest: Strategy = Random()

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`. One choice in the steps of the ends."""
        ends = (region.full, region.smallest)
        return [ends[turn.step % 4]] if turn.step % 4 < len(ends) else self.rest.draw(region, count, turn)


@dataclass(frozen=True)
class DepthSamples(Strategy):
    """Several depths at the same sizes: all other dimensions are drawn once a step and shared.

    The shallowest is always among them, and one fixed depth (the deepest, if none is given).

    Args:
        others: draws what is shared; by default the ends take their turns, for random sizes hardly ever reach them.
        fixed: values of depth dimensions of the fixed one.
        depths: the dimensions that differ, by names, patterns or kinds.
    """

    others: Strategy = Rotating()
    fixed: Mapping[str, Any] | None = None
    depths: tuple[Pattern, ...] = ("depth",)

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`."""
        depths = set(matching(region.space.dimensions, self.depths))
        rest = [d.name for d in region.space.dimensions if d.name not in depths and d.name in region.open]
        shared = self.others.draw(region.only(rest), 1, turn) if rest else []
        sizes = {n: v for n, v in (shared or [region.full])[0].items() if n not in depths}
        open_ = [name for name in region.open if name in depths]
        shallow = region.choice({**sizes, **{name: region.choices[name][0] for name in open_}})
        fixed = region.choice({**sizes, **(self.fixed or {})})
        found = distinct([fixed, shallow])
        more = max(count - len(found), 0)
        found += _different(more, found, lambda: region.choice({**sizes, **region.uniform(turn.dice, open_)}))
        return found[: max(count, 1)]


@dataclass(frozen=True)
class PerLayer(Strategy):
    """Transformations drawn layer by layer: of each layer as many as there are subnets, none again before all were
    there; the i-th draws of all layers are subnet i. All other dimensions are drawn by another strategy."""

    others: Strategy = Empty()

    def draw(self, region: Region, count: int, turn: Turn) -> list[Choice]:
        """See `Strategy.draw`. Raises ElasticError where no layer of the space has transformations."""
        rest = [d.name for d in region.space.dimensions if d.kind is not Kind.TRANSFORMATION and d.name in region.open]
        bases = self.others.draw(region.only(rest), count, turn) if rest else []
        bases = bases or [region.full]
        drawn = enumerate(region.per_layer(count, turn.dice))
        made = ({**bases[i % len(bases)], **values} for i, values in drawn)
        return distinct(region.choice(values) for values in made)


def _check_weights(where: str, weights: Sequence[float]) -> None:
    if not weights or not all(isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise ElasticError(f"{where}: expected weights of at least 0 that are not all 0, got {list(weights)}")
