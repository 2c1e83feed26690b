"""Which operators of a step run along which axis, chosen by price: `choose_regions`.

`graphopt.passes._strategies` says what each operator can do, `graphopt.schemes.region_prices` what it costs,
`graphopt.schemes.region_problem` makes a problem of it and `graphopt.schemes.regions_solver` solves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

from torch import fx

from graphopt.cost_model import Machine
from graphopt.graph.op_rules import flops
from graphopt.passes._strategies import BATCH, Regime, Strategies, Strategy, is_sums
from graphopt.schemes.region_prices import Form, RegionPrices, Synchronise, collective_between
from graphopt.schemes.region_problem import RegionProblem
from graphopt.schemes.regions_solver import Solution, solve
from graphopt.schemes.regions_text import explained


@dataclass(frozen=True)
class Conversion:
    """A value that is brought from one form into another: ``collective`` is empty where each processor takes its part
    of what is whole. ``nbytes``: of the whole value."""

    value: fx.Node
    source: Form
    target: Form
    collective: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Regions:
    """How each operator of a step runs on several processors, at one batch size.

    ``chosen``: the strategy of each operator, by name. ``conversions``: in the order of the values.
    ``handed_over``: gradients with the form in which they leave backward. ``seconds``: of forward and backward with all
    communication, none of it hidden. Of other choices: ``best``, the cheapest that was found (a simpler one is taken
    where it is nearly as good, `WORTH`); ``bound``, which none is below; ``rows``, each product divided along the
    batch; ``whole``, nothing divided.
    """

    strategies: Strategies
    size: int
    chosen: Mapping[str, Strategy]
    conversions: tuple[Conversion, ...]
    handed_over: tuple[tuple[str, Form, int], ...]
    seconds: float
    best: float
    bound: float
    rows: float
    whole: float

    @property
    def regimes(self) -> dict[str, Regime]:
        """The axis of each operator, by name."""
        return {name: strategy.regime for name, strategy in self.chosen.items()}

    @property
    def kind(self) -> str:
        """``whole`` where every product is computed by every processor, ``data parallel`` where all that can run along
        the batch do and nothing is divided otherwise, else ``hybrid``."""
        nodes = [n for n in self.strategies.graph.nodes if n.name in self.chosen]
        products = [n for n in nodes if flops(n)] or nodes
        axes = {self.chosen[n.name].regime for n in products}
        axes = {None if is_sums(axis) else axis for axis in axes}
        if axes <= {None}:
            return "whole"
        left = (n for n in products if self.chosen[n.name].regime != BATCH)
        if axes <= {None, BATCH} and not any(s.regime == BATCH for n in left for s in self.strategies.of(n)):
            return "data parallel"
        return "hybrid"

    def explain(self) -> str:
        """The choice as text: runs of modules with their axis, and the collectives with their bytes."""
        return "\n".join(explained(self))


def choose_regions(
    strategies: Strategies, machine: Machine, size: int, *, synchronise: Synchronise = "owner", seconds: float = 10.0
) -> Regions:
    """The cheapest strategies for a batch of ``size``.

    Args:
        strategies: what each operator can do along the batch and free axes (`region_prices.axes_that_matter`).
        machine: one of the processors, with a link to the others.
        size: rows of the whole batch.
        synchronise: who updates; see `Synchronise`.
        seconds: for both searches together (of all choices, and of those along the batch alone), where they are hard;
            see `regions_solver.solve`.

    Raises:
        CostModelError: the machine has no link, or no rate for a dtype of the graph, which may not hold for this size.
        AxisError: one of the axes must keep its size.
    """
    table = RegionProblem(strategies, RegionPrices(strategies, machine, size, synchronise))
    start = [0] * len(table.problem.costs)
    begun = perf_counter()
    rows = solve(table.rows_alone(), start=start, seconds=seconds / 2) if BATCH in strategies.axes else None
    left = max(seconds - (perf_counter() - begun), seconds / 2)
    best = solve(table.problem, start=start, seconds=left)
    whole = Solution(tuple(start), table.problem.cost(start), best.bound, 0)
    simple = [each for each in (whole, rows) if each is not None and each.cost <= (1 + WORTH) * best.cost]
    found = min(simple, key=lambda each: each.cost, default=best)
    chosen = {n.name: options[k] for n, options, k in zip(table.operators, table.options, found.options)}
    handed = (
        (node.name, given[found.options[table.operator_of(node)]], table.prices.nbytes(node))
        for node, given in table.handed.items()
    )
    alone = float("inf") if rows is None else rows.cost
    conversions = tuple(_conversions(table, found))
    return Regions(
        strategies, size, chosen, conversions, tuple(handed), found.cost, best.cost, best.bound, alone, whole.cost
    )


WORTH = 0.05
"""What regions must save to be chosen before one way for the whole step, relative to what they take: prices are no more
exact than that."""


def _conversions(table: RegionProblem, found: Solution) -> Iterator[Conversion]:
    for node, value, forms in zip(table.made, table.problem.values, table.forms, strict=True):
        for a, b in table.problem.converted(value, found.options):
            name = collective_between(forms[a], forms[b]) or ""
            if node not in table.leaving:
                yield Conversion(node, forms[a], forms[b], name, table.prices.nbytes(node), value.conversions[a][b])
