"""The choice of regions as a problem of options: `RegionProblem`.

Each operator is a node, its strategies are the options. Inputs are no nodes: parameters are whole in the memory of each
processor and the batch comes from this process, so a part of them costs nothing.

Gradients that this process brings together leave as they are made, and cost what that takes. Where every processor
updates for itself, each parameter is a node too, whose options are the forms in which it may be kept: its gradient is
needed in this form, and what reads it otherwise gathers it.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from graphopt.graph.op_rules import flops
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import InputKind, Output, OutputKind
from graphopt.passes._parts import maker
from graphopt.passes._placement import Sharded
from graphopt.passes._strategies import BATCH, Strategies, Strategy, is_sums
from graphopt.schemes.region_prices import WHOLE, Form, RegionPrices, form
from graphopt.schemes.regions_solver import Problem, Value

_GRADIENTS = (OutputKind.GRADIENT, OutputKind.SAVED)
"""Outputs that may leave in parts and summands: the update brings them together."""


class RegionProblem:
    """The problem of one graph at one set of prices.

    ``operators``: the first nodes of ``problem``; ``options``: their strategies. ``made``: the values of ``problem`` as
    nodes of the graph, ``forms`` what their numbers of forms mean. ``handed``: gradients, with the form in which each
    option of their operator gives them; ``leaving``: what is converted for them alone.
    """

    def __init__(self, strategies: Strategies, prices: RegionPrices):
        self.strategies, self.prices, graph = strategies, prices, strategies.graph
        self.operators = [n for n in graph.nodes if n.op == "call_function" and n.target is not getitem]
        self.options: list[tuple[Strategy, ...]] = [strategies.of(node) for node in self.operators]
        self._index = {node: i for i, node in enumerate(self.operators)}
        self._costs = [[prices.seconds(n, s) for s in options] for n, options in zip(self.operators, self.options)]
        self._outputs: dict[fx.Node, list[Output]] = {}
        for output, result in zip(graph.outputs, graph.results, strict=True):
            if result is not None:
                self._outputs.setdefault(result, []).append(output)
        self._kept: dict[str, tuple[int, list[Form]]] = {}  # parameters that are nodes, with their forms
        if prices.synchronise == "all-reduce":
            self._keep_parameters()
        self.made: list[fx.Node] = []
        self.forms: list[list[Form]] = []
        self.handed: dict[fx.Node, list[Form]] = {}
        self.leaving: set[fx.Node] = set()
        values = [self._value(node) for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        self.problem = Problem(self._costs, [value for value in values if value is not None])

    def operator_of(self, node: fx.Node) -> int:
        """The index of the operator that gives a value."""
        return self._index[maker(node)[0]]

    def _keep_parameters(self) -> None:
        """A node for each parameter with a gradient: its options are the forms in which it is read or its gradient is
        made."""
        parameters = self.strategies.graph.input_nodes(InputKind.PARAMETER)
        for gradient, outputs in self._outputs.items():
            if maker(gradient)[0] not in self._index:
                continue
            for output in outputs:
                node = parameters.get(output.name)
                if output.kind is OutputKind.GRADIENT and node is not None:
                    found: list[Form | None] = list(self._given(gradient))
                    found += [f for user in node.users if user in self._index for f in self._needed(node, user)]
                    forms = [f for f in dict.fromkeys(found) if f is not None and isinstance(f[1], Sharded)]
                    self._kept[output.name] = len(self._costs), [WHOLE, *(f for f in forms if f[0] != BATCH)]
                    self._index[node] = len(self._costs)
                    self._costs.append([0.0] * len(self._kept[output.name][1]))

    def _given(self, node: fx.Node) -> list[Form]:
        """The form of a value by option of the node that gives it."""
        source, position = maker(node)
        if source.op == "placeholder":
            return next(forms for index, forms in self._kept.values() if index == self._index[source])
        return [form(s.regime, s.result(position)) for s in self.options[self._index[source]]]

    def _needed(self, node: fx.Node, reader: fx.Node) -> list[Form | None]:
        """The form in which an operator needs a value, by its option."""
        options = self.options[self._index[reader]]
        return [form(s.regime, s.operands[node]) if node in s.operands else None for s in options]

    def _value(self, node: fx.Node) -> Value | None:
        if maker(node)[0] not in self._index:
            return None
        given = self._given(node)
        needed = {self._index[user]: self._needed(node, user) for user in node.users if user in self._index}
        for output in self._outputs.get(node, ()):
            self._end(node, output, given, needed)
        if not needed:
            return None
        forms = list(dict.fromkeys([WHOLE, *given, *(f for each in needed.values() for f in each if f is not None)]))
        convert = self._leaving if self._leaves(node) else self.prices.conversion
        if convert == self._leaving:
            self.leaving.add(node)
        self.made.append(node)
        self.forms.append(forms)
        at = {each: k for k, each in enumerate(forms)}
        read = {i: tuple(None if f is None else at[f] for f in each) for i, each in needed.items()}
        table = tuple(tuple(convert(node, a, b) for b in forms) for a in forms)
        return Value(self.operator_of(node), tuple(at[f] for f in given), read, table)

    def _end(self, node: fx.Node, output: Output, given: list[Form], needed: dict[int, list[Form | None]]) -> None:
        """What an output asks for: a form in which it may leave, a price, or the form that its parameter is kept in."""
        if not all(self.strategies.allowed(output, placement) for _, placement in given):
            needed[len(self._costs)] = [WHOLE]
            self._costs.append([0.0])
        elif output.kind is OutputKind.GRADIENT and output.name in self._kept:
            index, forms = self._kept[output.name]
            needed[index] = list(forms)
            self.handed[node] = given
        elif output.kind is not OutputKind.OUTPUT and node not in self.handed:  # two outputs of one value leave once
            costs = self._costs[self.operator_of(node)]
            for k, each in enumerate(given):
                costs[k] += self.prices.handing_over(node, each)
            self.handed[node] = given

    def _leaves(self, node: fx.Node) -> bool:
        """Whether a value is a gradient, but for views, and nothing else."""
        gradients = all(output.kind in _GRADIENTS for output in self._outputs.get(node, ()))
        readers = [user for user in node.users if user.op != "output"]
        return gradients and node.op != "placeholder" and all(is_view(u) and self._leaves(u) for u in readers)

    def _leaving(self, node: fx.Node, source: Form, target: Form) -> float:
        """Conversions of gradients: views of them follow, and they leave as they are made, or whole. One that were
        scattered for its own sake would need its new values gathered."""
        if source in (target, WHOLE):
            return 0.0
        return self.prices.handing_over(node, source) if target == WHOLE and node in self._outputs else float("inf")

    def rows_alone(self) -> Problem:
        """The problem in which nothing but the batch may be divided, and all products that can be, are."""
        costs = [list(each) for each in self.problem.costs]
        for i, (node, options) in enumerate(zip(self.operators, self.options)):
            rows = flops(node) and any(strategy.regime == BATCH for strategy in options)
            for k, strategy in enumerate(options):
                if strategy.regime != BATCH and (rows or not (strategy.regime is None or is_sums(strategy.regime))):
                    costs[i][k] = float("inf")
        for index, forms in self._kept.values():
            costs[index][1:] = [float("inf")] * (len(forms) - 1)
        return Problem(costs, self.problem.values)
