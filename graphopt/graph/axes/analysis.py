"""`analyse`: an identity for every tensor dimension of a training graph, and the groups of coupled dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes.axis import Axis, Dim, Form, Kind, Place
from graphopt.graph.axes.factors import ONE, Factor, find
from graphopt.graph.axes.kinds import kind_of, residual_factors
from graphopt.graph.axes.names import names_of
from graphopt.graph.axes.propagation import Propagation, Tag
from graphopt.graph.training_graph import InputKind, TrainingGraph


@dataclass(frozen=True)
class Unknown:
    """An operator without an axis rule: the axes it touches are frozen. ``nodes`` are the names of its nodes."""

    operator: str
    nodes: tuple[str, ...]


def analyse(graph: TrainingGraph, *, strict: bool = False) -> Axes:
    """Find which tensor dimensions of ``graph`` are the same axis.

    One walk over the graph unifies and refines *factors* of dimensions by the axis rule of each operator (see
    `graphopt.graph.axes.factors`); linear in the number of nodes. Forward graphs (`capture_forward`) and joint graphs
    (`capture`) both.

    Args:
        graph: a captured graph; it is not changed.
        strict: raise where two structures contradict each other or an operator has no rule, instead of freezing the
            axes concerned.

    Raises:
        AxisError: ``graph`` is no `TrainingGraph`, a node has no metadata, or, with ``strict``, see there.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = graphopt.capture(net, (torch.randn(5, 4),))
        >>> [(g.name, g.size, g.free) for g in analyse(graph).groups() if g.free]
        [('0.hidden', 8, True)]
    """
    if not isinstance(graph, TrainingGraph):
        raise AxisError(f"graph: expected a TrainingGraph (see graphopt.capture), got {type(graph).__name__}")
    for node in graph.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise AxisError(f"graph: node {node.name} has no metadata (meta['val']); capture it with graphopt.capture")
    found = Propagation(graph)
    found.run()
    axes = Axes(graph, found)
    if strict and axes.contradictions:
        raise AxisError(axes.contradictions[0])
    if strict and axes.unknown:
        raise AxisError(f"no axis rule for {', '.join(u.operator for u in axes.unknown)}")
    return axes


class Axes:
    """The axes of a graph; see `analyse`."""

    def __init__(self, graph: TrainingGraph, found: Propagation):
        self.graph = graph
        self._found = found
        self._axes: dict[Factor, Axis] = {}
        self._dims: dict[Factor, Dim] = {}
        self._groups: tuple[Axis, ...] | None = None

    # -- questions ------------------------------------------------------------------------------------------------

    def of(self, node: fx.Node) -> tuple[Any, ...]:
        """The dimensions of the node's tensor, each a `Dim`; one such tuple for each result where it has several.

        Raises AxisError for a node of another graph.
        """
        self.groups()
        if node not in self._found.dims:
            raise AxisError(f"node: {node} is no operator or input of this graph")
        return self._dims_of(self._found.dims[node])

    def groups(self) -> tuple[Axis, ...]:
        """The axes that parameters, buffers, batch tensors or constants carry: what is coupled to be changed together.

        In the order of their first carriers.
        """
        if self._groups is None:
            self._groups = self._grouped()
        return self._groups

    def group(self, name: str) -> Axis:
        """The group of this name. Raises AxisError if there is none."""
        found = next((g for g in self.groups() if g.name == name), None)
        if found is None:
            raise AxisError(f"name: no axis {name!r}; there are {', '.join(g.name for g in self.groups())}")
        return found

    def free_group(self, name: str) -> Axis:
        """The group of this name, which may have another size. Raises AxisError if there is none or it may not."""
        found = self.group(name)
        if not found.free:
            raise AxisError(f"name: the axis {name!r} must keep its size {found.size}: {found.reason}")
        return found

    def factor(self, name: str) -> Factor:
        """The factor that is the group of this name. Raises AxisError if there is none."""
        axis = self.group(name)
        return next(leaf for leaf, found in self._axes.items() if found is axis)

    def carriers(self) -> dict[str, fx.Node]:
        """The nodes of parameters, buffers, batch tensors and constants by name: those that `Axis.places` speak of."""
        found = {}
        for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            if given.kind in _CARRIERS:
                found[given.name] = node
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                found[str(node.target)] = node
        return found

    def sums(self) -> tuple[tuple[fx.Node, fx.Node, fx.Node], ...]:
        """The sums of two activations in forward: ``(sum, left, right)``."""
        return tuple(self._found.adds)

    @property
    def hidden_states(self) -> dict[str, fx.Node]:
        """Outputs that the model itself works on further, by name: their dimensions are not frozen, see
        `graphopt.graph.axes.hidden_states`."""
        return self._found.hidden

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """Operators without an axis rule. The axes they touch are frozen."""
        nodes: dict[str, list[str]] = {}
        for node in self._found.unknown_nodes:
            nodes.setdefault(str(node.target), []).append(node.name)
        return tuple(Unknown(operator, tuple(names)) for operator, names in nodes.items())

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Meetings of structures that do not fit: a sentence each, with the nodes. The axes concerned are frozen."""
        return tuple(reason for *_, reason in self._found.contradictions)

    def explain(self) -> str:
        """The groups as a table, and for each parameter how much of it is frozen, and by what."""
        from graphopt.graph.axes.report import explain

        return explain(self)

    # -- from factors to axes -------------------------------------------------------------------------------------

    def _grouped(self) -> tuple[Axis, ...]:
        places: dict[Factor, dict[Place, None]] = {}
        for name, node in self.carriers().items():
            for d, factor in enumerate(self._found.of(node)):
                for leaf in _leaves(factor):
                    places.setdefault(leaf, {})[Place(name, d)] = None
        residual = residual_factors(self._found)
        kinds = {leaf: kind_of(leaf, leaf in residual) for leaf in places}
        names = names_of({leaf: (kinds[leaf], tuple(where)) for leaf, where in places.items()})
        statistics: dict[Factor, dict[str, None]] = {}
        for factor, what in self._found.statistics_of:
            for leaf in _leaves(factor):
                statistics.setdefault(leaf, {})[what] = None
        for leaf, where in places.items():
            kind, reason = kinds[leaf], _why_fixed(leaf, kinds[leaf])
            self._axes[leaf] = Axis(
                name=names[leaf], kind=kind, size=self._found.expression_of(leaf.size), places=tuple(where),
                free=not reason, reason=reason,
                shardable=kind in _SHARDABLE and not leaf.frozen.startswith(("no rule", "contradiction")),
                statistics=tuple(statistics.get(leaf, ())), frozen=leaf.frozen,
            )  # fmt: skip
        return tuple(self._axes[leaf] for leaf in places)

    def _dims_of(self, found: Any) -> tuple[Any, ...]:
        """The dimensions of a value; of each element of a list (fused updates give lists of lists)."""
        return tuple(map(self._dims_of if isinstance(found, list) else self._dim, found))

    def _dim(self, factor: Factor) -> Dim:
        factor = find(factor)
        found = self._dims.get(factor)
        if found is None:
            if factor is ONE:
                found = Dim(Form.PRODUCT)
            elif factor.parts:
                found = Dim(Form.CONCAT if factor.is_sum else Form.PRODUCT, tuple(map(self._dim, factor.parts)))
            else:
                found = Dim(Form.AXIS, axis=self._axis(factor))
            self._dims[factor] = found
        return found

    def _axis(self, leaf: Factor) -> Axis:
        if leaf not in self._axes:
            self._axes[leaf] = Axis(
                "", kind_of(leaf, False), self._found.expression_of(leaf.size), reason=leaf.frozen, frozen=leaf.frozen
            )
        return self._axes[leaf]


def _leaves(factor: Factor) -> Iterable[Factor]:
    factor = find(factor)
    if factor is ONE:
        return
    if not factor.parts:
        yield factor
    for part in factor.parts:
        yield from _leaves(part)


def _why_fixed(leaf: Factor, kind: Kind) -> str:
    if kind is Kind.BATCH:
        return "the batch: its size is the user's"
    if leaf.frozen:
        return leaf.frozen
    if leaf.tags & Tag.SOFTMAX:
        return "a softmax runs over it: leaving indices out changes all others"
    return ""


_CARRIERS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH)
_SHARDABLE = {
    Kind.BATCH, Kind.CHANNEL, Kind.HIDDEN, Kind.EMBEDDING, Kind.HEADS, Kind.HEAD_SIZE, Kind.VOCABULARY, Kind.CLASSES,
}  # fmt: skip
