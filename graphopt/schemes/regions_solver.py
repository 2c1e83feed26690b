"""Which option each node of a graph takes, where a value that lies otherwise than a reader needs it is converted.

The abstract problem of dividing a graph over processors by regions. A node has options, each with its cost, with a
form in which it needs each value that it reads, and one in which it gives its own. A value is brought into each form
that somebody needs once, by the cheapest conversions: also through a third form, from which several others may follow.

The choice of forms of a value with several readers is a variable of its own: the set of forms that it is brought into.
So every cost is a table over two variables, and `MinSum` finds the smallest sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from graphopt.schemes.min_sum import NARROW, WIDEST, MinSum

Form = int
"""A way in which a value may lie: an index, of one value's own numbering."""

Conversions = tuple[tuple[float, ...], ...]
"""Cost of each conversion of a value, ``[from][to]``; 0 on the diagonal, ``inf`` where there is none."""


@dataclass(frozen=True)
class Value:
    """What one node gives and others read.

    ``maker``: a node; ``made``: the form by its option. ``read``: the form that each reader needs by its option, None
    where it needs none. ``conversions``: see `Conversions`.
    """

    maker: int
    made: tuple[Form, ...]
    read: Mapping[int, tuple[Form | None, ...]]
    conversions: Conversions


@dataclass(frozen=True)
class Problem:
    """``costs``: of each option of each node. ``values``: what nodes give each other."""

    costs: Sequence[Sequence[float]]
    values: Sequence[Value]

    def needed(self, value: Value, options: Sequence[int]) -> frozenset[Form]:
        """The forms that the readers of ``value`` need."""
        return frozenset(form for node, forms in value.read.items() if (form := forms[options[node]]) is not None)

    def converted(self, value: Value, options: Sequence[int]) -> tuple[tuple[Form, Form], ...]:
        """The conversions of ``value``, in order."""
        made = value.made[options[value.maker]]
        return ways(value.conversions).steps(made, self.needed(value, options))

    def cost(self, options: Sequence[int]) -> float:
        """What these options cost, with all conversions."""
        nodes = sum(costs[option] for costs, option in zip(self.costs, options, strict=True))
        return nodes + sum(
            ways(v.conversions).cost(v.made[options[v.maker]], self.needed(v, options)) for v in self.values
        )


@dataclass(frozen=True)
class Solution:
    """Options of all nodes. ``cost``: of them; ``bound``: nothing is cheaper; ``searched``: variables that were left
    to the integer programme."""

    options: tuple[int, ...]
    cost: float
    bound: float
    searched: int

    @property
    def gap(self) -> float:
        """How much cheaper the best may be, relative to this cost; 0 where this is the best."""
        return max(0.0, 1 - self.bound / self.cost) if self.cost else 0.0


def solve(
    problem: Problem,
    *,
    start: Sequence[int] | None = None,
    seconds: float = 10.0,
    widest: int = WIDEST,
    narrow: int = NARROW,
) -> Solution:
    """The cheapest options.

    Args:
        problem: what is to be chosen.
        start: options that are taken if no better ones are found in time.
        seconds: for the integer programme, where one is needed (`Solution.gap` says how good its answer is).
        widest, narrow: see `MinSum.solve`.

    Raises:
        ValueError: nothing was found in time, and there is no start.

    Example, a node in the middle that is cheaper divided, between two that are not:
        >>> there_and_back = ((0.0, 1.0), (2.0, 0.0))
        >>> first = Value(0, (0,), {1: (0, 1)}, there_and_back)
        >>> second = Value(1, (0, 1), {2: (0,)}, there_and_back)
        >>> solve(Problem([[0.0], [9.0, 5.0], [0.0]], [first, second])).options
        (0, 1, 0)
    """
    whole, sets = _sum_of(problem)
    begun = None if start is None else [*start, *(_set(problem, value, offered, start) for value, offered in sets)]
    found = whole.solve(seconds=seconds, start=begun, widest=widest, narrow=narrow)
    options = found.states[: len(problem.costs)]
    return Solution(options, problem.cost(options), found.bound, found.searched)


Sets = tuple[frozenset[Form], ...]
"""The sets of forms that a value may be brought into."""


def _sum_of(problem: Problem) -> tuple[MinSum, list[tuple[Value, Sets]]]:
    """The problem as a sum of tables: a variable for each node, then one for each value of several readers, given with
    its states."""
    sets = [(value, _offered(value)) for value in problem.values if len(value.read) > 1]
    whole = MinSum([*problem.costs, *([0.0] * len(offered) for _, offered in sets)])

    def add(a: int, b: int, costs: list[list[float]]) -> None:
        if (table := np.array(costs)).any():
            whole.add((a, b), table)

    for value in problem.values:
        if len(value.read) == 1:
            ((reader, forms),) = value.read.items()
            known = ways(value.conversions)
            add(value.maker, reader, [[known.cost(made, _one(form)) for form in forms] for made in value.made])
    for variable, (value, offered) in enumerate(sets, len(problem.costs)):
        known = ways(value.conversions)
        add(value.maker, variable, [[known.cost(made, there) for there in offered] for made in value.made])
        for reader, forms in value.read.items():
            add(reader, variable, [[0.0 if _one(f) <= there else np.inf for there in offered] for f in forms])
    return whole, sets


def _offered(value: Value) -> Sets:
    needed = frozenset(form for forms in value.read.values() for form in forms if form is not None)
    return ways(value.conversions).worthwhile(frozenset(value.made), needed)


def _set(problem: Problem, value: Value, offered: Sets, options: Sequence[int]) -> int:
    """Which of the offered sets of forms is the cheapest that has all that these options need of a value."""
    needed, made = problem.needed(value, options), value.made[options[value.maker]]
    enough = [i for i, there in enumerate(offered) if needed <= there]
    return min(enough, key=lambda i: ways(value.conversions).cost(made, offered[i]))


def _one(form: Form | None) -> frozenset[Form]:
    return frozenset() if form is None else frozenset((form,))


class Ways:
    """The cheapest ways to bring a value from one form into several."""

    def __init__(self, conversions: Conversions):
        self._conversions = conversions
        self._reached: dict[Form, dict[frozenset[Form], tuple[float, tuple[tuple[Form, Form], ...]]]] = {}
        self._best: dict[tuple[Form, frozenset[Form]], tuple[float, tuple[tuple[Form, Form], ...]]] = {}

    def cost(self, made: Form, needed: frozenset[Form]) -> float:
        """Of the cheapest conversions of what is made in one form, so that all that are needed are there."""
        return self._cheapest(made, needed)[0]

    def steps(self, made: Form, needed: frozenset[Form]) -> tuple[tuple[Form, Form], ...]:
        """These conversions, in an order in which they can be made."""
        return self._cheapest(made, needed)[1]

    def worthwhile(self, made: frozenset[Form], needed: frozenset[Form]) -> Sets:
        """The sets of ``needed`` forms of which no larger one costs as little, whichever form is made."""
        found: list[tuple[frozenset[Form], tuple[float, ...]]] = []
        for count in range(len(needed), -1, -1):
            for chosen in map(frozenset, combinations(sorted(needed), count)):
                costs = tuple(self.cost(form, chosen) for form in sorted(made))
                if not any(chosen < more and all(a <= b for a, b in zip(other, costs)) for more, other in found):
                    found.append((chosen, costs))
        return tuple(chosen for chosen, _ in found)

    def _cheapest(self, made: Form, needed: frozenset[Form]) -> tuple[float, tuple[tuple[Form, Form], ...]]:
        if needed <= {made}:
            return 0.0, ()
        if (made, needed) not in self._best:
            reached = self._all(made)
            over = [reached[there] for there in reached if needed <= there]
            self._best[made, needed] = min(over, key=lambda each: (each[0], len(each[1])))
        return self._best[made, needed]

    def _all(self, made: Form) -> dict[frozenset[Form], tuple[float, tuple[tuple[Form, Form], ...]]]:
        """Every set of forms that has ``made`` in it, with cost and conversions: smaller sets first."""
        if made not in self._reached:
            others = [form for form in range(len(self._conversions)) if form != made]
            found: dict[frozenset[Form], tuple[float, tuple[tuple[Form, Form], ...]]] = {frozenset((made,)): (0.0, ())}
            for count in range(1, len(others) + 1):
                for chosen in combinations(others, count):
                    there = frozenset((made, *chosen))
                    ends = []
                    for last in chosen:
                        before, steps = found[there - {last}]
                        more, source = min((self._conversions[form][last], form) for form in there - {last})
                        ends.append((before + more, (*steps, (source, last))))
                    found[there] = min(ends)
            self._reached[made] = found
        return self._reached[made]


@lru_cache(maxsize=4096)
def ways(conversions: Conversions) -> Ways:
    """`Ways` of a table, made once."""
    return Ways(conversions)
