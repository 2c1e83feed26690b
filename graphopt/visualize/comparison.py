"""Two states of one graph as one: what a rewrite kept, took away, changed and added, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from operator import getitem

import torch
from torch import fx

from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import Change, PassResult


class Status(StrEnum):
    """What became of an operator."""

    KEPT = "kept"
    CHANGED = "changed"  # the same operator reads something else, or gives less
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Reason:
    """Why an operator is gone or gives less: the pass, and its `Change` (an index into `Comparison.changes`) where that
    is known."""

    pass_name: str
    change: int | None = None


@dataclass(eq=False)
class Drawn:
    """One operator, input or constant of the two graphs.

    ``node``: of the graph after, of the one before where it is gone. ``was``: in the graph before. ``names``: its own,
    and those of the ``getitem`` nodes that take its results.
    """

    node: fx.Node
    status: Status
    was: fx.Node | None = None
    names: list[str] = field(default_factory=list)
    reason: Reason | None = None


class Comparison:
    """The operators of ``before`` and ``after`` in one order, and who reads whom on either side.

    A draft keeps the names of the nodes that it copies, so nodes of one name and operator are the same. ``getitem`` is
    not an operator of its own here: who reads one result of several reads the operator.

    Args:
        after: the graph, after passes if there are some.
        before: the graph that passes were given; None: there is nothing to compare.
        changes: what passes say they did.
        removed: operators that are gone, with the name of the pass.

    Attributes:
        drawn: those of ``after`` in order, what is gone where it was.
        edges: (source, reader) -> (in before, in after), indices of ``drawn``.
    """

    def __init__(
        self,
        after: TrainingGraph,
        before: TrainingGraph | None = None,
        changes: Sequence[Change] = (),
        removed: Mapping[str, str] | None = None,
    ):
        self.before, self.after, self.changes = before, after, tuple(changes)
        self.drawn: list[Drawn] = self._matched()
        self._place = {side: i for i, one in enumerate(self.drawn) for side in (one.was, one.node) if side is not None}
        self.edges = self._edges()
        for one in self.drawn:
            if one.status is Status.REMOVED:
                one.reason = self._reason(one, removed or {})
            elif one.status is Status.CHANGED:
                one.reason = self._narrowed(one)

    @classmethod
    def of(cls, result: PassResult) -> Comparison:
        """What passes did."""
        return cls(result.graph, result.before, result.changes, result.removed)

    def index(self, node: fx.Node) -> int | None:
        """The index in ``drawn`` of a node of either graph, ``getitem`` looked through; None for the output."""
        return self._place.get(_looked_through(node))

    # -- building -----------------------------------------------------------------------------------------------------

    def _matched(self) -> list[Drawn]:
        now = _proper(self.after)
        then = _proper(self.before) if self.before is not None else now
        old = {node.name: node for node in then}
        new = {node.name: node for node in now}
        same = {name for name, node in new.items() if name in old and old[name].target == node.target}
        found: list[Drawn] = []
        rest = iter(then)
        for node in now:
            if node.name not in same:
                found.append(Drawn(node, Status.ADDED))
                continue
            for was in rest:  # what is gone stands where it was: before what came behind it
                if was.name == node.name:
                    break
                if was.name not in same:
                    found.append(Drawn(was, Status.REMOVED, was))
            was = old[node.name]
            status = Status.KEPT if was is node or _arguments(was) == _arguments(node) else Status.CHANGED
            found.append(Drawn(node, status, was))
        listed = {one.was for one in found}
        found += [Drawn(was, Status.REMOVED, was) for was in then if was.name not in same and was not in listed]
        for one in found:
            sides = [one.node] if one.was is None or one.was is one.node else [one.node, one.was]
            one.names = list(dict.fromkeys(name for side in sides for name in _names(side)))
        return found

    def _edges(self) -> dict[tuple[int, int], tuple[bool, bool]]:
        place = self._place
        found: dict[tuple[int, int], tuple[bool, bool]] = {}
        for i, one in enumerate(self.drawn):
            for node, side in ((one.was, 0), (one.node if one.status is not Status.REMOVED else None, 1)):
                for source in _sources(node) if node is not None else ():
                    if source in place:
                        flags = list(found.get((place[source], i), (False, False)))
                        flags[side] = True
                        found[place[source], i] = flags[0], flags[1]
        if self.before is None:
            return {pair: (True, True) for pair in found}
        return found

    def _reason(self, one: Drawn, removed: Mapping[str, str]) -> Reason | None:
        """The change that names the operator; else one of the same pass at the same place that names its kind."""
        assert one.was is not None
        name = removed.get(one.was.name)
        at = one.was.meta.get("module", ""), one.was.meta.get("source", "")
        word = operator_text(one.was.target).removeprefix("aten.")
        possible = [(i, c) for i, c in enumerate(self.changes) if name is None or c.pass_name == name]
        for i, change in possible:
            if one.was.name in change.nodes:
                return Reason(change.pass_name, i)
        here = [(i, c) for i, c in possible if (c.module, c.source) == at and not c.nodes]
        for i, change in here:
            if word in change.what.replace(",", " ").replace(":", " ").split():
                return Reason(change.pass_name, i)
        return Reason(name) if name is not None else None

    def _narrowed(self, one: Drawn) -> Reason | None:
        """The change that says which results of an operator are not computed any more, if one does."""
        assert one.was is not None
        at = one.was.meta.get("module", ""), one.was.meta.get("source", "")
        word = operator_text(one.was.target).removeprefix("aten.")
        for i, change in enumerate(self.changes):
            if (change.module, change.source) == at and f"{word}: " in change.what:
                return Reason(change.pass_name, i)
        return None


def _proper(graph: TrainingGraph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op != "output" and n.target is not getitem]


def _names(node: fx.Node) -> list[str]:
    found = [node.name]
    for user in node.users:
        if user.target is getitem:
            found += _names(user)
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node reads, ``getitem`` looked through."""
    return [_looked_through(source) for source in node.all_input_nodes]


def _looked_through(node: fx.Node) -> fx.Node:
    while node.target is getitem:
        node = node.all_input_nodes[0]
    return node


def _arguments(node: fx.Node) -> str:
    return repr((node.args, node.kwargs, _shape(node)))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
