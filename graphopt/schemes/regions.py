"""Which operators of a step run along which axis, chosen by price: `choose_regions`.

Each operator is a node of the abstract problem of `graphopt.schemes.regions_solver`, its strategies are the options.
Inputs are no nodes: parameters are whole in the memory of each processor and the batch comes from this process, so a
part of them costs nothing. Gradients leave as they are made, and cost what it takes to bring them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from graphopt.cost_model import Machine
from graphopt.graph.op_rules import flops
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import Output, OutputKind, Phase
from graphopt.passes._placement import Own, Partial, Replicated, Sharded
from graphopt.passes._strategies import BATCH, Regime, Strategies, Strategy, is_sums
from graphopt.schemes.region_prices import WHOLE, Form, RegionPrices, Synchronise, collective_between, form
from graphopt.schemes.regions_solver import Problem, Solution, Value, solve


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
    communication, none of it hidden; ``bound``: no choice takes less; ``rows``: the seconds where each product is
    divided along the batch, ``whole`` where nothing is.
    """

    strategies: Strategies
    size: int
    chosen: Mapping[str, Strategy]
    conversions: tuple[Conversion, ...]
    handed_over: tuple[tuple[str, Form, int], ...]
    seconds: float
    bound: float
    rows: float
    whole: float

    @property
    def regimes(self) -> dict[str, Regime]:
        """The axis of each operator, by name."""
        return {name: strategy.regime for name, strategy in self.chosen.items()}

    @property
    def kind(self) -> str:
        """``whole`` where every product is computed by every processor, ``data parallel`` where all of them run along
        the batch, else ``hybrid``."""
        graph = self.strategies.graph
        found = [self.chosen[n.name].regime for n in graph.nodes if n.name in self.chosen and flops(n)]
        axes = {None if is_sums(regime) else regime for regime in found}
        return {frozenset([None]): "whole", frozenset([BATCH]): "data parallel"}.get(frozenset(axes), "hybrid")

    def explain(self) -> str:
        """The choice as text: runs of modules with their axis, and the collectives with their bytes."""
        return "\n".join(_explained(self))


def choose_regions(
    strategies: Strategies, machine: Machine, size: int, *, synchronise: Synchronise = "owner", seconds: float = 10.0
) -> Regions:
    """The cheapest strategies for a batch of ``size``.

    Args:
        strategies: what each operator can do.
        machine: one of the processors, with a link to the others.
        size: rows of the whole batch.
        synchronise: who gets the sums of gradients.
        seconds: for the search where it is hard; see `regions_solver.solve`.

    Raises:
        CostModelError: the machine has no link, or no rate for a dtype of the graph.
    """
    table = _Table(strategies, RegionPrices(strategies, machine, size, synchronise))
    whole = [0] * len(table.problem.costs)
    best = solve(table.problem, start=whole, seconds=seconds)
    nothing = Solution(tuple(whole), table.problem.cost(whole), best.bound, 0)
    rows = solve(table.rows_alone(), start=whole, seconds=seconds) if BATCH in strategies.axes else nothing
    simple = (each for each in (nothing, rows) if each.cost <= (1 + WORTH) * best.cost)
    return table.regions(size, min(simple, key=lambda each: each.cost, default=best), best, rows, nothing)


WORTH = 0.02
"""What regions must save to be chosen before one way for the whole step, relative to what that takes. Prices are not
more exact."""


class _Table:
    """The abstract problem of a graph, and what its solution means."""

    def __init__(self, strategies: Strategies, prices: RegionPrices):
        self.strategies, self.prices, graph = strategies, prices, strategies.graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not getitem]
        self.options: list[tuple[Strategy, ...]] = [strategies.of(node) for node in self.nodes]
        self.costs = [[prices.seconds(n, s) for s in options] for n, options in zip(self.nodes, self.options)]
        self._index = {node: i for i, node in enumerate(self.nodes)}
        self._handed: dict[fx.Node, list[Form]] = {}  # outputs that this process brings together, by option
        self.made: list[fx.Node] = []  # the values, aligned with `problem.values`
        self.forms: list[list[Form]] = []
        self._outputs: dict[fx.Node, list[Output]] = {}
        for output, result in zip(graph.outputs, graph.results, strict=True):
            if result is not None:
                self._outputs.setdefault(result, []).append(output)
        values = [self._value(node) for node in graph.nodes if self._is_value(node)]
        self.problem = Problem(self.costs, [value for value in values if value is not None])

    def _is_value(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor) and _maker(node)[0] in self._index

    def _value(self, node: fx.Node) -> Value | None:
        maker, position = _maker(node)
        given = [form(s.regime, s.result(position)) for s in self.options[self._index[maker]]]
        forms = dict.fromkeys([WHOLE, *given])
        needed: dict[int, list[Form | None]] = {}
        for reader in node.users:
            if reader not in self._index:
                continue
            i = self._index[reader]
            needed[i] = [form(s.regime, s.operands[node]) if node in s.operands else None for s in self.options[i]]
            forms |= dict.fromkeys(f for f in needed[i] if f is not None)
        for output in self._outputs.get(node, ()):
            if not all(self.strategies.allowed(output, placement) for _, placement in given):
                needed.setdefault(len(self.costs), [WHOLE])
            elif output.kind is not OutputKind.OUTPUT:
                costs = self.costs[self._index[maker]]
                for k, each in enumerate(given):
                    costs[k] += self.prices.handing_over(node, each)
                self._handed.setdefault(node, given)
        if len(self.costs) in needed:
            self.costs.append([0.0])
        if not needed:
            return None
        at = {each: k for k, each in enumerate(forms)}
        table = tuple(
            tuple(self.prices.conversion(node, a, b) if b == WHOLE or not self._ends(node) else _free(a, b) for b in forms)
            for a in forms
        )
        self.made.append(node)
        self.forms.append(list(forms))
        read = {i: tuple(None if f is None else at[f] for f in each) for i, each in needed.items()}
        return Value(self._index[maker], tuple(at[f] for f in given), read, table)

    def _ends(self, node: fx.Node) -> bool:
        """Whether views alone stand between a value and its output: it leaves as it is made. (A gradient scattered for
        its own sake would need its new values gathered.)"""
        return all(user.op == "output" or (is_view(user) and self._ends(user)) for user in node.users)

    def rows_alone(self) -> Problem:
        """The problem in which nothing but the batch may be divided, and all products that can be divided along it are."""
        costs = [list(each) for each in self.problem.costs]
        for i, (node, options) in enumerate(zip(self.nodes, self.options)):
            rows = flops(node) and any(strategy.regime == BATCH for strategy in options)
            for k, strategy in enumerate(options):
                if strategy.regime != BATCH and (rows or not (strategy.regime is None or is_sums(strategy.regime))):
                    costs[i][k] = float("inf")
        return Problem(costs, self.problem.values)

    def regions(self, size: int, found: Solution, best: Solution, rows: Solution, nothing: Solution) -> Regions:
        """What a solution means. ``rows``, ``nothing``: those in which the batch or nothing is divided."""
        chosen = {n.name: options[k] for n, options, k in zip(self.nodes, self.options, found.options)}
        conversions = []
        for node, value, forms in zip(self.made, self.problem.values, self.forms, strict=True):
            for a, b in self.problem.converted(value, found.options):
                name = collective_between(forms[a], forms[b]) or ""
                conversions.append(
                    Conversion(node, forms[a], forms[b], name, self.prices.nbytes(node), value.conversions[a][b])
                )
        handed = tuple(
            (node.name, given[found.options[self._index[_maker(node)[0]]]], self.prices.nbytes(node))
            for node, given in self._handed.items()
        )
        return Regions(
            self.strategies, size, chosen, tuple(conversions), handed, found.cost, best.bound, rows.cost, nothing.cost
        )


def _free(source: Form, target: Form) -> float:
    return 0.0 if target == source or source == WHOLE else float("inf")


def _maker(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The operator that gives a value, and which of its results it is."""
    if node.target is getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, None


# -- for people -------------------------------------------------------------------------------------------------------

_NAMES = {"all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
          "all_to_all": "all-to-all"}  # fmt: skip


def _explained(regions: Regions) -> Iterator[str]:
    processors = regions.strategies.processors
    ms = lambda seconds: f"{1e3 * seconds:.3g} ms"
    yield (
        f"batch {regions.size} on {processors} processors: {regions.kind}, {ms(regions.seconds)} "
        f"(all along the batch {ms(regions.rows)}, nothing divided {ms(regions.whole)})"
    )
    if regions.bound < regions.seconds / (1 + WORTH):
        yield f"  the search was ended early: the best may take {ms(regions.bound)}"
    yield "forward, module by module:"
    runs = list(_runs(regions))
    width = max((len(where) for where, _ in runs), default=0)
    yield from (f"  {where:{width}}  {axis}" for where, axis in runs)
    communicating = [c for c in regions.conversions if c.collective]
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        of_phase = [c for c in communicating if c.value.meta.get("phase") == phase]
        yield f"{phase}: {len(of_phase)} collectives" + (":" if of_phase else "")
        for c in of_phase:
            where = c.value.meta.get("module") or "outside of modules"
            change = " -> ".join(_lying(each) for each in (c.source, c.target))
            yield f"  {_NAMES[c.collective]} of {_bytes(c.nbytes)}, {ms(c.seconds)}: {c.value.name} at {where}, {change}"
    for word, kind in (("summed", Partial), ("put together of parts", Sharded), ("whole on each", Replicated)):
        sizes = [size for _, (_, placement), size in regions.handed_over if isinstance(placement, kind)]
        if sizes:
            yield f"gradients {word}: {len(sizes)}, {_bytes(sum(sizes))}"


def _runs(regions: Regions) -> Iterator[tuple[str, str]]:
    """Neighbouring modules that run along the same axis in forward, with its name."""
    axes: dict[str, dict[Regime, int]] = {}
    for node in regions.strategies.graph.nodes:
        if node.name in regions.chosen and node.meta.get("phase") == Phase.FORWARD:
            if isinstance(node.meta.get("val"), torch.Tensor):
                weights = axes.setdefault(str(node.meta.get("module") or "(outside)"), {})
                regime = regions.chosen[node.name].regime
                weight = regions.strategies.graph.symbols.evaluate(flops(node)) + 1
                weights[regime] = weights.get(regime, 0) + weight
    main = [(module, max(weights, key=lambda r: weights[r])) for module, weights in axes.items()]
    begin = 0
    for i, (module, regime) in enumerate(main):
        if i + 1 == len(main) or main[i + 1][1] != regime:
            first = main[begin][0]
            where = module if begin == i else f"{first} ... {module}"
            yield where, "whole" if regime is None else f"along {regime}"
            begin = i + 1


def _lying(of: Form) -> str:
    axis, placement = of
    if isinstance(placement, Sharded):
        return f"parts of {axis}"
    return "whole" if isinstance(placement, Replicated) else "sum of parts" if not isinstance(placement, Own) else "own"


def _bytes(number: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
