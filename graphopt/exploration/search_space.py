"""What is searched: knobs of the architecture and of the training, as vectors of small integers.

A point is a tuple with one index a knob. Points that mean the same trial (they differ only in knobs that do not count)
have one canonical form, and one key: the search never proposes a key twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Protocol, runtime_checkable

import numpy as np

from graphopt.errors import ExplorationError
from graphopt.exploration.hyper_parameters import HyperParameter

__all__ = ["Elastic", "Knob", "ModelFunction", "Point", "SearchSpace", "search_space"]

_KNOWN = 10_000  # cases of which it is kept which knobs count
_LEVELS = 33  # values of an ordered knob that surrogates tell apart

Point = tuple[int, ...]
"""An index into the values of each knob."""


@runtime_checkable
class Elastic(Protocol):
    """What the search asks of a space of subnets: `graphopt.elastic.Space`, or anything alike.

    It may also have ``counts_where()``: of dimensions that do not count in every subnet (the width inside of a layer
    that may be left out) the ways in which they do, see `Knob`. Subnets that differ elsewhere are one.
    """

    @property
    def dimensions(self) -> Sequence[Any]:
        """Each with a ``name`` and ``choices`` (ascending; the last is the full size)."""

    def choice(self, sizes: Mapping[str, Any]) -> Any:
        """A choice from one size for each dimension."""

    def extract(self, choice: Any) -> Any:
        """The subnet with its own weights, cut from the supernet's."""


class ModelFunction:
    """A space made by the user: ``build(**sizes)`` gives a module.

    Args:
        build: called in the trainer with one size for each dimension, by name. It must be importable there: a function
            of a module or of the script, no lambda.
        dimensions: by name, the sizes that each may have (`choice`, `integer` ..., or a sequence in ascending order).
    """

    def __init__(self, build: Callable[..., Any], **dimensions: HyperParameter | Sequence[Any]):
        if not callable(build):
            raise ExplorationError(f"ModelFunction: expected a function that builds a module, got {build!r}")
        if not dimensions:
            raise ExplorationError("ModelFunction: expected at least one dimension, as depth=(2, 4, 6)")
        self.build = build
        self.ranges = {
            name: given if isinstance(given, HyperParameter) else HyperParameter(tuple(given))
            for name, given in dimensions.items()
        }

    def extract(self, choice: Mapping[str, Any]) -> Any:
        """The module of a choice."""
        return self.build(**choice)


@dataclass(frozen=True)
class Knob:
    """One axis of the search.

    Attributes:
        kind: ``net`` (of the architecture) or ``hp`` (of the training).
        ways: it counts only where, of one of these, all other knobs that are named have one of their values there;
            beside the condition of the range. Without any it counts.
    """

    name: str
    kind: str
    range: HyperParameter
    ways: tuple[Mapping[str, tuple[Any, ...]], ...] = ()

    @property
    def size(self) -> int:
        """How many values it has."""
        return len(self.range.values)


class SearchSpace:
    """All points, their keys, and moves between them. Plain data: it can be sent to any process.

    Args:
        knobs: their names are unique within a kind.
    """

    def __init__(self, knobs: Sequence[Knob]):
        self.knobs = tuple(knobs)
        seen = set()
        for knob in self.knobs:
            if (knob.kind, knob.name) in seen:
                raise ExplorationError(f"{knob.name}: two dimensions or hyper-parameters have this name")
            seen.add((knob.kind, knob.name))
        self._place = {(knob.kind, knob.name): i for i, knob in enumerate(self.knobs)}
        # Of each knob the ways in which it counts: all conditions of one of them must hold.
        self._conditions = [
            [self._condition(knob, {**way, **knob.range.when}) for way in knob.ways or ({},)] for knob in self.knobs
        ]
        # Few knobs have conditions, and few decide over others: chains of moves come by the same cases again and again.
        self._order = [i for i in self._dependencies_first() if any(self._conditions[i])]
        self._deciding = sorted({place for ways in self._conditions for way in ways for place, _ in way})
        self._known: dict[Point, tuple[bool, ...]] = {}
        self._movable: dict[tuple[tuple[bool, ...], str | None], list[int]] = {}
        self.free = tuple(i for i, knob in enumerate(self.knobs) if knob.size > 1)
        self.conditional = any(map(any, self._conditions))

    def _condition(self, knob: Knob, when: Mapping[str, tuple[Any, ...]]) -> list[tuple[int, frozenset[int]]]:
        """Places and the indices that they must have for ``knob`` to count."""
        found = []
        for name, values in when.items():
            place = self._place.get((knob.kind, name), self._place.get(("net", name)))
            if place is None:
                raise ExplorationError(f"{knob.name}: its condition names {name!r}, which is no knob of this space")
            known = self.knobs[place].range.values
            if unknown := [value for value in values if value not in known]:
                raise ExplorationError(f"{knob.name}: {name!r} is never {unknown[0]!r}; its values are {list(known)}")
            found.append((place, frozenset(i for i, value in enumerate(known) if value in values)))
        return found

    def _dependencies_first(self) -> list[int]:
        order: list[int] = []
        state: dict[int, int] = {}

        def visit(i: int) -> None:
            if state.get(i) == 2:
                return
            if state.get(i) == 1:
                raise ExplorationError(f"{self.knobs[i].name}: it counts only where it counts; break the circle")
            state[i] = 1
            for place in (place for way in self._conditions[i] for place, _ in way):
                visit(place)
            state[i] = 2
            order.append(i)

        for i in range(len(self.knobs)):
            visit(i)
        return order

    @cached_property
    def size(self) -> int:
        """How many points there are, before those that mean the same are counted once."""
        return math.prod(knob.size for knob in self.knobs)

    # -- meaning ----------------------------------------------------------------------------------------------------

    def active(self, point: Point) -> tuple[bool, ...]:
        """Which knobs count at ``point``."""
        case = tuple([point[place] for place in self._deciding])
        known = self._known.get(case)
        if known is None:
            counts = [True] * len(self.knobs)
            for i in self._order:
                counts[i] = any(
                    all(counts[place] and point[place] in admitted for place, admitted in way)
                    for way in self._conditions[i]
                )
            if len(self._known) >= _KNOWN:
                self._known.clear()
            known = self._known[case] = tuple(counts)
        return known

    def canonical(self, point: Point) -> Point:
        """The same trial with every knob that does not count at its last value (the full one, for nets)."""
        if not self.conditional:
            return point
        counts = self.active(point)
        if all(counts):
            return point
        return tuple([index if c else knob.size - 1 for index, c, knob in zip(point, counts, self.knobs)])

    def key(self, point: Point) -> str:
        """What names the trial of ``point`` within this space: 32 hexadecimal digits, the same in every process and
        run."""
        return hashlib.blake2b(f"{self.digest}{self.canonical(point)}".encode(), digest_size=16).hexdigest()

    def sizes(self, point: Point) -> dict[str, Any]:
        """The size of each dimension of the architecture."""
        return {k.name: k.range.values[i] for k, i in zip(self.knobs, point) if k.kind == "net"}

    def hyper_parameters(self, point: Point) -> dict[str, Any]:
        """The hyper-parameters that count at ``point``."""
        counts = self.active(point)
        return {k.name: k.range.values[i] for k, i, c in zip(self.knobs, point, counts) if k.kind == "hp" and c}

    def point(self, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> Point:
        """The canonical point with these values; knobs not named have their last value.

        Raises ExplorationError for a name or value that the space does not have.
        """
        found = [knob.size - 1 for knob in self.knobs]
        for kind, given in (("net", sizes), ("hp", hyper_parameters)):
            for name, value in given.items():
                place = self._place.get((kind, name))
                if place is None or value not in self.knobs[place].range.values:
                    raise ExplorationError(f"{name}={value!r}: the search space has no such dimension or value")
                found[place] = self.knobs[place].range.values.index(value)
        return self.canonical(tuple(found))

    def describe(self, point: Point) -> str:
        """``point`` as a person reads it: what differs from the full net, and the hyper-parameters."""
        parts = [
            f"{k.name}={k.range.values[i]}"
            for k, i, c in zip(self.knobs, point, self.active(point))
            if c and (k.kind == "hp" or i < k.size - 1)
        ]
        return ", ".join(parts) or "the full net"

    # -- points and moves -------------------------------------------------------------------------------------------

    def sample(self, random: np.random.Generator) -> Point:
        """A point drawn evenly from all."""
        return self.canonical(tuple(int(random.integers(knob.size)) for knob in self.knobs))

    def landmarks(self) -> list[Point]:
        """The largest, the smallest and the middle net, each with hyper-parameters in the middle of their ranges."""
        found = []
        for where in (1.0, 0.0, 0.5):
            point = tuple(round((where if k.kind == "net" else 0.5) * (k.size - 1)) for k in self.knobs)
            found.append(self.canonical(point))
        return list(dict.fromkeys(found))

    def move(self, point: Point, random: np.random.Generator, kind: str | None = None) -> Point:
        """``point`` with one knob that counts (of ``kind``, if any such is free) changed.

        An ordered knob goes one place up or down in half of the cases, else up to a third of its range; the others go
        anywhere.
        """
        able = self._able(self.active(point), kind)
        if not able:
            return point
        place = able[int(random.integers(len(able)))]
        knob, now = self.knobs[place], point[place]
        if knob.range.ordered:
            reach = 1 if random.random() < 0.5 else max(1, knob.size // 3)
            low, high = max(0, now - reach), min(knob.size - 1, now + reach)
            new = low + int(random.integers(high - low))
        else:
            new = int(random.integers(knob.size - 1))
        new += new >= now  # never the one it has
        return self.canonical((*point[:place], new, *point[place + 1 :]))

    def _able(self, counts: tuple[bool, ...], kind: str | None) -> list[int]:
        """Places of the knobs that can be moved."""
        known = self._movable.get((counts, kind))
        if known is None:
            known = [i for i in self.free if counts[i] and (kind is None or self.knobs[i].kind == kind)]
            known = known or [i for i in self.free if counts[i]]
            if len(self._movable) >= _KNOWN:
                self._movable.clear()
            self._movable[counts, kind] = known
        return known

    def all_points(self) -> Iterator[Point]:
        """Every canonical point once, in the order of their indices."""
        for point in product(*(range(knob.size) for knob in self.knobs)):
            if self.canonical(point) == point:
                yield point

    def neighbours(self, point: Point, random: np.random.Generator, most: int = 8) -> list[Point]:
        """All points that differ from ``point``, a canonical one, in one knob that counts; of a knob with more than
        ``most`` other values the next ones to both sides, and some by chance."""
        found: list[Point] = []
        for place in self._able(self.active(point), None):
            now, size = point[place], self.knobs[place].size
            values = [value for value in range(size) if value != now]
            if len(values) > most:
                near = [v for v in (now - 2, now - 1, now + 1, now + 2) if 0 <= v < size]
                near = near if self.knobs[place].range.ordered else []
                values = list(dict.fromkeys(near + random.integers(size, size=most - len(near)).tolist()))
            around = [(*point[:place], v, *point[place + 1 :]) for v in values if v != now]
            found += map(self.canonical, around) if place in self._deciding else around
        return found

    # -- for surrogates -----------------------------------------------------------------------------------------------

    @cached_property
    def distances(self) -> list[np.ndarray]:
        """How far the levels of each free knob are apart, from 0 to 1, float64 of shape (levels, levels).

        Levels of an ordered knob lie in a row; neighbouring values share one where there are more than 33 values.
        Levels of another are 1 apart. A knob that need not count has one level more, for where it does not: in the
        middle of an ordered one, 1 apart from all of another.
        """
        found = []
        for i in self.free:
            size, ordered = self.knobs[i].size, self.knobs[i].range.ordered
            levels = min(size, _LEVELS) if ordered else size
            places = np.linspace(0, 1, levels) if ordered else np.arange(levels, dtype=np.float64)
            if any(self._conditions[i]):
                places = np.append(places, 0.5 if ordered else levels)
            apart = np.abs(places[:, None] - places[None, :])
            found.append(apart if ordered else np.minimum(apart, 1.0))
        return found

    @cached_property
    def _level(self) -> list[np.ndarray]:
        """The level of each value of each free knob."""
        found = []
        for i in self.free:
            places = np.arange(self.knobs[i].size)
            if self.knobs[i].range.ordered and len(places) > _LEVELS:
                places = np.round(places * ((_LEVELS - 1) / (len(places) - 1))).astype(np.intp)
            found.append(places)
        return found

    def levels(self, points: Sequence[Point]) -> np.ndarray:
        """Points as levels of the free knobs (see `distances`), integers of shape (points, free knobs)."""
        places = np.asarray(points, dtype=np.intp).reshape(len(points), len(self.knobs))
        found = np.stack([level[places[:, i]] for i, level in zip(self.free, self._level)], axis=1)
        if self.conditional and len(points):
            counts = np.array([self.active(point) for point in points])[:, list(self.free)]
            none = np.array([len(distance) - 1 for distance in self.distances])
            found = np.where(counts, found, none)
        return found

    @cached_property
    def digest(self) -> str:
        """A hash of all knobs: studies of different spaces are not mixed."""
        told = [[k.kind, k.name, list(k.range.values), k.range.ordered, sorted(map(str, k.range.when.items()))]
                + [[sorted(map(str, way.items())) for way in k.ways]] * bool(k.ways)
                for k in self.knobs]  # fmt: skip
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def search_space(space: Any, hyper_parameters: Mapping[str, HyperParameter] | None) -> SearchSpace:
    """The knobs of ``space`` (an elastic space, a `ModelFunction`, a module or None) and of the training.

    Raises ExplorationError where there is nothing to be searched, or an argument is none of these.
    """
    known = getattr(space, "counts_where", None) if isinstance(space, Elastic) else None
    counts_where = known() if known is not None else {}
    knobs = [Knob(name, "net", given, counts_where.get(name, ())) for name, given in _dimensions(space).items()]
    for name, given in (hyper_parameters or {}).items():
        if not isinstance(given, HyperParameter):
            raise ExplorationError(
                f"hyper_parameters: expected log, linear, integer or choice for {name!r}, got {given!r}"
            )
        knobs.append(Knob(name, "hp", given))
    found = SearchSpace(knobs)
    if not found.free:
        raise ExplorationError("nothing to explore: no dimension of the space and no hyper-parameter has two values")
    return found


def _dimensions(space: Any) -> dict[str, HyperParameter]:
    if space is None:
        return {}
    if isinstance(space, ModelFunction):
        return space.ranges
    if isinstance(space, Elastic):
        return {d.name: HyperParameter(tuple(d.choices)) for d in space.dimensions}
    if hasattr(space, "state_dict") and callable(space):  # a module: one architecture
        return {}
    if callable(space):
        raise ExplorationError(
            "space: got a function; say which choices it takes: ModelFunction(function, depth=(2, 4), width=(32, 64))"
        )
    raise ExplorationError(
        f"space: expected a graphopt.elastic.Space, a ModelFunction, a module or None, got {type(space).__name__}"
    )


def net_of(space: Any, found: SearchSpace, point: Point) -> Any:
    """The module of ``point``, made new: with the supernet's weights where there is a supernet. None without a space.

    Raises whatever building it raises.
    """
    return net_with(space, found.sizes(point))


def net_with(space: Any, sizes: Mapping[str, Any]) -> Any:
    """The same of ``sizes``; a module that is searched by hyper-parameters alone is copied."""
    if space is None:
        return None
    if isinstance(space, ModelFunction):
        return space.extract(sizes)
    if isinstance(space, Elastic):
        return space.extract(space.choice(sizes))
    from copy import deepcopy

    return deepcopy(space)
