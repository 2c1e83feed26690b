"""The smallest sum of cost tables over variables of a few states each: `MinSum`.

Exact, in three steps that each leave one of the best assignments reachable:

1. A state is dropped where another state of its variable is at least as cheap whatever the others do (dead-end
   elimination: Goldstein, "Efficient rotamer elimination", Biophysical Journal 66, 1994).
2. A variable with few neighbours is eliminated: the tables that it stands in become one, of its best state for each
   assignment of the neighbours (bucket elimination: Dechter, Artificial Intelligence 113, 1999). Chains, trees and
   ladders vanish in this way.
3. What is left is an integer programme over the local polytope of its tables, for HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

WIDEST = 1 << 16
"""Entries of the largest table that elimination may make, where it can eliminate every variable."""

NARROW = 16
"""The same, where an integer programme follows, in which every entry is a variable."""

_SCALE = 1e4  # costs are scaled to this sum before HiGHS sees them, whose tolerances are absolute
_GAP = 1e-7

Scope = tuple[int, ...]
"""Variables of a table, ascending: its dimensions."""


@dataclass(frozen=True)
class Assignment:
    """A state for each variable. ``cost``: their sum; ``bound``: no assignment is cheaper; ``searched``: how many
    variables the integer programme had."""

    states: tuple[int, ...]
    cost: float
    bound: float
    searched: int


class MinSum:
    """A sum of cost tables to be minimised. Costs are non-negative; ``inf`` marks what is impossible.

    >>> sum_ = MinSum([[0.0, 1.0], [2.0, 0.0]])
    >>> sum_.add((0, 1), np.array([[0.0, 5.0], [5.0, 0.0]]))
    >>> sum_.solve().states, sum_.solve().cost
    ((1, 1), 1.0)
    """

    def __init__(self, costs: Sequence[Sequence[float]]):
        """``costs``: of each state of each variable."""
        self.costs = [np.asarray(each, dtype=np.float64) for each in costs]
        self.tables: dict[Scope, np.ndarray] = {}

    def add(self, variables: Sequence[int], table: np.ndarray) -> None:
        """Add a table over distinct ``variables``, whose dimensions are theirs, in this order."""
        order = sorted(range(len(variables)), key=lambda i: variables[i])
        scope = tuple(variables[i] for i in order)
        table = table.transpose(order)
        known = self.tables.get(scope)
        self.tables[scope] = table if known is None else known + table

    def cost(self, states: Sequence[int]) -> float:
        """The sum for a state of each variable."""
        alone = sum(float(costs[state]) for costs, state in zip(self.costs, states, strict=True))
        return alone + sum(float(table[tuple(states[v] for v in scope)]) for scope, table in self.tables.items())

    def solve(
        self, *, seconds: float = 10.0, start: Sequence[int] | None = None, widest: int = WIDEST, narrow: int = NARROW
    ) -> Assignment:
        """One of the cheapest assignments.

        Args:
            seconds: for the integer programme; then the best assignment so far is taken, and ``bound`` says how far it
                may be from the best.
            start: an assignment that is taken if none better is found in time.
            widest: see `WIDEST`; 0 lets the integer programme do all that ``narrow`` leaves.
            narrow: see `NARROW`; 0 eliminates no variable that has a neighbour.
        """
        work = _Elimination(self)
        work.drop_dominated()
        work.eliminate(widest if work.widest_table() <= widest else narrow)
        left = [v for v, near in enumerate(work.near) if near is not None]
        chosen: dict[int, int] | None = {}
        bound = work.constant
        if left:
            chosen, least = _programme(work, left, seconds)
            bound += least
        found = work.states(chosen) if chosen is not None else None
        given = [states for states in (found, start) if states is not None]
        if not given:
            raise ValueError(f"no assignment was found in {seconds:g} seconds; give a start, or more time")
        best = min(given, key=self.cost)
        cost = self.cost(best)
        return Assignment(tuple(best), cost, cost if not left else min(bound, cost), len(left))


class _Elimination:
    """A sum whose states and variables are taken away one after the other, and how to get them back."""

    def __init__(self, whole: MinSum):
        self.costs = [costs.copy() for costs in whole.costs]
        self.kept = [np.arange(len(costs)) for costs in whole.costs]  # states by their numbers in `whole`
        self.of: list[dict[Scope, None]] = [{} for _ in whole.costs]
        self.near: list[set[int] | None] = [set() for _ in whole.costs]  # None: eliminated
        self.tables: dict[Scope, np.ndarray] = {}
        self.constant = 0.0
        self._done: list[tuple[int, Scope, np.ndarray]] = []
        for scope, table in whole.tables.items():
            self._add(scope, table)

    def _add(self, scope: Scope, table: np.ndarray) -> None:
        if len(scope) < 2:
            if scope:
                self.costs[scope[0]] = self.costs[scope[0]] + table
            else:
                self.constant += float(table)
            return
        known = self.tables.get(scope)
        self.tables[scope] = table if known is None else known + table
        for v in scope:
            self.of[v][scope] = None
            self._neighbours(v).update(scope)
            self._neighbours(v).discard(v)

    def _neighbours(self, variable: int) -> set[int]:
        near = self.near[variable]
        assert near is not None, "it is eliminated"
        return near

    # -- states -------------------------------------------------------------------------------------------------------

    def drop_dominated(self) -> None:
        """Drop states that another state can stand in for, until there is none, and variables of one state."""
        todo = dict.fromkeys(range(len(self.costs)))
        while todo:
            variable = next(iter(todo))
            del todo[variable]
            if self.near[variable] is not None and self._drop(variable):
                todo.update(dict.fromkeys(self._neighbours(variable)))
            if self.near[variable] is not None and len(self.costs[variable]) == 1:
                self._fix(variable)

    def _drop(self, variable: int) -> bool:
        costs = self.costs[variable]
        n = len(costs)
        if n == 1:
            return False
        more = _difference(costs[:, None], costs[None, :])  # [k, l]: what k costs more than l, at least
        for scope in self.of[variable]:
            rows = np.moveaxis(self.tables[scope], scope.index(variable), 0).reshape(n, -1)
            with np.errstate(invalid="ignore"):  # a state that is impossible by costs, of which another table has less
                more = more + _difference(rows[:, None], rows[None, :]).min(axis=-1)
        impossible = ~np.isfinite(costs)
        alive = list(range(n))
        for k in reversed(range(n)):
            if any(l != k and (more[k, l] >= 0 or impossible[k]) for l in alive) and len(alive) > 1:
                alive.remove(k)
        if len(alive) == n:
            return False
        self.costs[variable], self.kept[variable] = costs[alive], self.kept[variable][alive]
        for scope in self.of[variable]:
            self.tables[scope] = np.take(self.tables[scope], alive, axis=scope.index(variable))
        return True

    def _fix(self, variable: int) -> None:
        """Take a variable of one state out of its tables."""
        self._done.append((variable, (), np.zeros((), dtype=np.int64)))
        self.constant += float(self.costs[variable][0])
        for scope in list(self.of[variable]):
            table = self._remove(scope).take(0, axis=scope.index(variable))
            self._add(tuple(v for v in scope if v != variable), table)
        for v in self._neighbours(variable):
            self._neighbours(v).discard(variable)
        self.near[variable], self.of[variable] = None, {}

    def _remove(self, scope: Scope) -> np.ndarray:
        for v in scope:
            self.of[v].pop(scope, None)
        return self.tables.pop(scope)

    # -- variables ----------------------------------------------------------------------------------------------------

    def widest_table(self) -> int:
        """Entries of the largest table that elimination of all variables makes, in the order that it takes."""
        return max((size for _, size in self._order(limit=1 << 62)), default=0)

    def eliminate(self, limit: int) -> None:
        """Eliminate variables as long as the table of their neighbours and themselves has at most ``limit`` entries."""
        for variable, _ in self._order(limit):
            self._eliminate(variable)

    def _order(self, limit: int) -> Iterator[tuple[int, int]]:
        """Variables in the order of elimination, the one with the smallest table first, with its entries."""
        near = [set(around or ()) for around in self.near]
        states = [len(costs) for costs in self.costs]
        entries = lambda v: states[v] * math.prod(states[u] for u in near[v]) if near[v] else 0
        done = [around is None for around in self.near]
        queue = [(entries(v), v) for v in range(len(states)) if not done[v]]
        heapq.heapify(queue)
        while queue:
            size, v = heapq.heappop(queue)
            if done[v]:
                continue
            if size != (now := entries(v)):
                heapq.heappush(queue, (now, v))
                continue
            if size > limit:
                return
            done[v] = True
            around = near[v]
            for u in around:
                near[u] |= around
                near[u] -= {u, v}
            yield v, size
            for u in around:
                heapq.heappush(queue, (entries(u), u))

    def _eliminate(self, variable: int) -> None:
        around = tuple(sorted(self._neighbours(variable)))
        joint = (*around, variable)
        total = self.costs[variable].reshape((1,) * len(around) + (-1,))
        for scope in list(self.of[variable]):
            table = np.moveaxis(self._remove(scope), scope.index(variable), -1)
            present = {*scope}
            total = total + table.reshape([len(self.costs[v]) if v in present else 1 for v in joint])
        total = np.broadcast_to(total, [len(self.costs[v]) for v in joint])
        self._done.append((variable, around, total.argmin(axis=-1)))
        for v in around:
            self._neighbours(v).discard(variable)
        self.near[variable], self.of[variable] = None, {}
        self._add(around, total.min(axis=-1))

    def states(self, chosen: dict[int, int]) -> list[int]:
        """The states of all variables in the numbers of the whole, given those (as they are here) of what is left."""
        found = dict(chosen)
        for variable, around, best in reversed(self._done):
            found[variable] = int(best[tuple(found[v] for v in around)])
        return [int(self.kept[v][found[v]]) for v in range(len(self.kept))]


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a - b``, infinite where both are: such a case cannot occur with either."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a), np.inf, a - b)


def _programme(work: _Elimination, left: Sequence[int], seconds: float) -> tuple[dict[int, int] | None, float]:
    """The best states of the variables that are left, None if none were found in time, and a bound of their cost.

    One binary variable for each state, and one from 0 to 1 for each entry of a table, whose sums along the table's
    dimensions are those of the states.
    """
    first = dict(zip(left, itertools.accumulate((len(work.costs[v]) for v in left), initial=0)))
    costs = [work.costs[v] for v in left]
    states = sum(map(len, costs))
    rows, columns, values = [], [], []
    count, column, right = len(left), states, [np.ones(len(left))]

    def require(row: np.ndarray, at: np.ndarray, value: float) -> None:
        rows.append(row)
        columns.append(at)
        values.append(np.full(len(row), value))

    for i, v in enumerate(left):  # one state of each
        require(np.full(len(work.costs[v]), i), first[v] + np.arange(len(work.costs[v])), 1.0)
    for scope, table in work.tables.items():
        entries = np.flatnonzero(np.isfinite(table))
        at = column + np.arange(len(entries))
        for v, index in zip(scope, np.unravel_index(entries, table.shape), strict=True):
            require(count + index, at, 1.0)
            n = len(work.costs[v])
            require(count + np.arange(n), first[v] + np.arange(n), -1.0)
            right.append(np.zeros(n))
            count += n
        costs.append(table.reshape(-1)[entries])
        column += len(entries)
    objective = np.concatenate(costs)
    possible = np.isfinite(objective)
    scale = _SCALE / max(float(objective[possible].mean()) * len(left), 1e-30)
    matrix = csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(count, column))
    equal = np.concatenate(right)
    result = milp(
        np.where(possible, objective, 0.0) * scale,
        integrality=np.arange(column) < states,
        bounds=Bounds(0.0, possible.astype(np.float64)),
        constraints=LinearConstraint(matrix, equal, equal),
        options={"time_limit": seconds, "mip_rel_gap": _GAP},
    )
    bound = getattr(result, "mip_dual_bound", None)
    bound = float(bound) / scale if bound is not None and np.isfinite(bound) else 0.0
    if result.x is None:
        return None, bound
    return {v: int(result.x[first[v] : first[v] + len(work.costs[v])].argmax()) for v in left}, bound
