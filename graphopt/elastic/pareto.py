"""Pareto fronts over the choices of a space: all of them where they are few, else by evolution.

Two numbers count: a *load*, which shall be small, and a *quality*, which shall be large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from random import Random

import numpy as np

from graphopt.elastic.choice import Choice
from graphopt.elastic.region import Region
from graphopt.elastic.sampling import distinct, spread

EXACT = 20_000
"""Choices up to which all of them are looked at."""

Evaluate = Callable[[Sequence[Choice]], tuple[np.ndarray, np.ndarray]]
"""Load and quality of choices, each ``(count,)``."""


def front(load: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Indices of those that none is better than (less load and as much quality, or the other way), by rising load.

    >>> front(np.array([3.0, 1.0, 2.0, 2.0]), np.array([3.0, 1.0, 0.5, 2.0])).tolist()
    [1, 3, 0]
    """
    order = np.lexsort((-quality, load))
    best = np.maximum.accumulate(quality[order])
    first = np.concatenate([[True], best[1:] > best[:-1]]) if len(order) else np.zeros(0, dtype=bool)
    return order[first]


def search(
    region: Region, evaluate: Evaluate, *, candidates: int = 8_000, population: int = 400, seed: int = 0
) -> tuple[list[Choice], np.ndarray, np.ndarray]:
    """The front of a region: choices by rising load, with their loads and qualities.

    Exact where the region has at most `EXACT` choices. Otherwise evolution: from choices of all sizes on, the front and
    what lies close below it are crossed and changed in a few places, until ``candidates`` have been looked at. What is
    kept at the end is the front of all that were seen.
    """
    if region.size <= EXACT:
        names = region.open
        every = (region.choice(dict(zip(names, values))) for values in product(*(region.choices[n] for n in names)))
        seen = distinct(every)
        load, quality = evaluate(seen)
        best = front(load, quality)
        return [seen[i] for i in best], load[best], quality[best]
    dice = Random(seed)
    seen = distinct([region.full, region.smallest, *(spread(region, dice) for _ in range(population))])
    load, quality = evaluate(seen)
    known = {choice.key() for choice in seen}
    pool = np.arange(len(seen))
    while len(seen) < candidates:
        pool = pool[_parents(load[pool], quality[pool], population)]
        parents = [seen[i] for i in pool]
        made: list[Choice] = []
        for child in islice(_children(region, parents, dice), 20 * population):
            if child.key() not in known:
                known.add(child.key())
                made.append(child)
                if len(made) == population:
                    break
        if not made:
            break
        pool = np.concatenate([pool, np.arange(len(seen), len(seen) + len(made))])
        more_load, more_quality = evaluate(made)
        seen += made
        load, quality = np.concatenate([load, more_load]), np.concatenate([quality, more_quality])
    best = front(load, quality)
    return [seen[i] for i in best], load[best], quality[best]


def _parents(load: np.ndarray, quality: np.ndarray, count: int) -> list[int]:
    """Front by front until there are as many as wanted."""
    rest, found = np.arange(len(load)), list[int]()
    while len(rest) and len(found) < count:
        best = front(load[rest], quality[rest])
        found += rest[best].tolist()
        rest = np.delete(rest, best)
    return found[:count]


def _children(region: Region, parents: Sequence[Choice], dice: Random) -> Iterator[Choice]:
    """Each from two parents, value by value, with some values moved to a neighbour or anywhere."""
    names = region.open
    rate = 1.5 / len(names)
    while True:
        one, other = dice.choice(parents), dice.choice(parents)
        values = {}
        for name in names:
            choices = region.choices[name]
            value = (one if dice.random() < 0.5 else other)[name]
            if dice.random() < rate:
                at = choices.index(value) if value in choices else len(choices) - 1
                step = dice.choice((-1, 1)) if dice.random() < 0.7 else dice.randrange(len(choices)) - at
                value = choices[min(max(at + step, 0), len(choices) - 1)]
            values[name] = value
        yield region.choice(values)
