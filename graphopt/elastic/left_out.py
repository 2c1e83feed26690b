"""What a graph of the full model is where layers are left out: which operators go, and what the others read instead.

In a forward graph `graphopt.graph.depth.leave_out` says so. A joint graph is derived from one, operator by operator,
and `with_backward` notes from which. So the operators of layers that are gone, forward and backward, are known by name,
and so is the gradient of what a run of layers reads and of what it gives. Without the run they are one tensor, and with
them their gradients: whoever reads the gradient of the entry reads that of the exit. What other tensors (a mask, a
weight that other layers read too) get from layers that are gone is a term less in a sum of gradients.

The result is the graph that a trace of the shorter model gives, but for its names; where that is not certain (the entry
needs no gradient and the exit does; others read the entry too, so that gradients are summed in another order; memory
orders differ) `Inseparable` says why, and the shorter model has to be traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

import sympy
import torch
from torch import fx

from graphopt.cost_model.memory import Absent
from graphopt.errors import ElasticError
from graphopt.graph.depth import Run, is_size, leave_out_of, size_of_inputs
from graphopt.graph.differentiate import with_backward
from graphopt.graph.draft import Draft
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase, TrainingGraph

_ADD = torch.ops.aten.add.Tensor


class Inseparable(ElasticError):
    """The operators of some layers cannot be told from the others in a joint graph."""


@dataclass(frozen=True)
class LeftOut:
    """What becomes of a graph without some layers.

    ``gone``: the operators that go. ``instead``: for a value that goes, or that others shall not read any more, the one
    that they read; never one that is itself replaced. ``outputs``: of each output whether it remains. ``absent``: the
    same for prices, with the inputs that nothing reads.
    """

    gone: frozenset[fx.Node]
    instead: Mapping[fx.Node, fx.Node]
    outputs: tuple[bool, ...]

    @property
    def absent(self) -> Absent:
        """What prices leave out: the operators, and the parameters and buffers that only they read."""
        some = next(iter(self.gone))
        unread = {n for n in some.graph.find_nodes(op="placeholder") if n.users and self.gone.issuperset(n.users)}
        return Absent(self.gone | unread, tuple(self.instead.items()))

    def take_out(self, draft: Draft) -> None:
        """Take the layers out of a draft of the graph."""
        for value, other in self.instead.items():
            draft.node(value).replace_all_uses_with(draft.node(other))
        draft.keep_outputs(self.outputs)
        sizes: dict[sympy.Symbol, fx.Node] = {}
        for node in reversed(list(draft.origin.graph.nodes)):
            if node not in self.gone:
                continue
            copy = draft.node(node)
            if copy.users and is_size(node):
                copy.replace_all_uses_with(size_of_inputs(draft, expression(node.meta["val"]), copy, sizes))
            if copy.users:
                raise Inseparable(f"{copy} is read by {next(iter(copy.users))}, which remains")
            draft.graph.erase_node(copy)


def without(forward: TrainingGraph, runs: Sequence[Run]) -> LeftOut:
    """What becomes of the forward graph on which the runs were found."""
    names, outputs = _left_in_forward(forward, runs)
    instead: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(forward.graph.nodes)}
    for run in sorted(runs, key=lambda run: order[run.exit]):
        instead[run.exit] = instead.get(run.entry, run.entry)
    gone = frozenset(node for node in forward.graph.nodes if node.name in names)
    return LeftOut(gone, instead, tuple(o in outputs for o in forward.outputs))


def _left_in_forward(forward: TrainingGraph, runs: Sequence[Run]) -> tuple[set[str], set[Output]]:
    """The names of the operators that go with these runs, and the outputs that remain."""
    draft = Draft(forward)
    leave_out_of(draft, runs)
    remaining = set(draft.graph.nodes)
    gone = {node.name for node in forward.graph.nodes if draft.node(node) not in remaining}
    return gone, set(draft.signature.outputs)


class LayeredJoint:
    """The joint graph of a forward graph, out of which runs of layers can be taken.

    Args:
        forward: the forward graph.
        runs: those that may be left out, as they were found on ``forward``, or on a graph that it was made of without
            renaming their ends.
    """

    def __init__(self, forward: TrainingGraph, runs: Iterable[Run]):
        self.forward = forward
        self.graph = with_backward(forward, watched={end.name for run in runs for end in (run.entry, run.exit)})
        self._inputs = {node.name: mine for node, mine in zip(forward.placeholders, self.graph.placeholders)}
        self._computing: dict[str, list[fx.Node]] = {}  # by the forward graph's operator, those of the forward pass
        for node in self.graph.nodes:
            if node.meta["phase"] == Phase.FORWARD:
                self._computing.setdefault(node.meta.get("origin", ""), []).append(node)
        self._gradients = {
            name: node for node in self.graph.graph.nodes for name in node.meta.get("gradient_of", ())
        }  # fmt: skip
        self._differential = _differential(self.graph)

    def without(self, runs: Sequence[Run]) -> LeftOut:
        """What becomes of the joint graph without these runs.

        Raises:
            Inseparable: that is not certain; see the module's docstring.
        """
        theirs = {node.name: node for node in self.forward.graph.nodes}
        order = {name: i for i, name in enumerate(theirs)}
        runs = sorted(runs, key=lambda run: order[run.exit.name])
        own = [
            Run(theirs[r.entry.name], theirs[r.exit.name], tuple(theirs[n.name] for n in r.nodes), r.module, "")
            for r in runs
        ]
        names, outputs = _left_in_forward(self.forward, own)
        instead: dict[fx.Node, fx.Node] = {}
        for run in own:
            self._same_layout(run, self._value(run.exit), self._value(run.entry))
            instead[self._value(run.exit)] = _resolved(instead, self._value(run.entry))
        replaced = dict(filter(None, (self._gradient(run, names) for run in own)))
        gone = {n for n in self.graph.nodes if n.meta.get("origin") in names and n not in replaced}
        for node in self.graph.graph.nodes:
            if node.op != "call_function" or node.meta["phase"] != Phase.BACKWARD:
                continue
            if node in replaced:  # of the run's own backward, or a sum of that and what passes by
                instead[node] = _resolved(instead, replaced[node])
                gone.add(node)
            elif node not in gone:
                self._after(node, gone, instead)
        kept = []
        for output, result in zip(self.graph.outputs, self.graph.results, strict=True):
            lost = result is not None and _resolved(instead, result) in gone
            kept.append(not lost if output.kind is OutputKind.GRADIENT else output in outputs)
        self._unread(gone, instead, kept)
        return LeftOut(frozenset(gone), instead, tuple(kept))

    def _value(self, node: fx.Node) -> fx.Node:
        """What the joint graph computes for a node of the forward graph."""
        if node.name in self._inputs:
            return self._inputs[node.name]
        shape = list(map(expression, node.meta["val"].shape))
        own = self._computing.get(node.name, [])
        read = [
            n for n in own
            if isinstance(n.meta["val"], torch.Tensor) and list(map(expression, n.meta["val"].shape)) == shape
            and any(u.op == "output" or (u not in own and u.meta["phase"] == Phase.FORWARD) for u in n.users)
        ]  # fmt: skip
        if len(read) != 1:
            raise Inseparable(f"{node} is {len(read)} values of the joint graph")
        return read[0]

    def _gradient(self, run: Run, names: set[str]) -> tuple[fx.Node, fx.Node] | None:
        """The gradient of a run's entry, with that of its exit, which stands for it; None where neither has one."""
        entry, exit_ = self._gradients.get(run.entry.name), self._gradients.get(run.exit.name)
        if entry is None or entry is exit_:  # without the entry's, nobody needs that of the exit any more
            return None
        if exit_ is None:
            raise Inseparable(f"{run}: only its entry has a gradient")
        for user in run.entry.users:
            if user.op == "output" or (user.name not in names and not _is_number(user)):
                raise Inseparable(f"{run}: {user} reads its entry too")
        self._same_layout(run, exit_, entry)
        return entry, exit_

    def _same_layout(self, run: Run, a: fx.Node, b: fx.Node) -> None:
        one, other = a.meta["val"], b.meta["val"]
        if list(map(expression, one.stride())) != list(map(expression, other.stride())) or one.dtype != other.dtype:
            raise Inseparable(f"{run}: {a} and {b} lie in memory in different orders")

    def _after(self, node: fx.Node, gone: set[fx.Node], instead: dict[fx.Node, fx.Node]) -> None:
        """An operator of another layer's backward: what becomes of it where gradients that it reads are gone."""
        lost = [s for s in node.all_input_nodes if _resolved(instead, s) in gone and not _is_number(s)]
        if not lost:
            return
        given = [s for s in node.all_input_nodes if s in self._differential]
        rest = [s for s in given if s not in lost]
        if not rest:
            gone.add(node)  # of zeros alone, which autograd does not compute with
        elif node.target is _ADD and "origin" not in node.meta and len(rest) == 1 and len(node.args) == 2:
            instead[node] = _resolved(instead, rest[0])
            gone.add(node)
        else:
            raise Inseparable(f"{node} is the backward of several results, one of which is gone")

    def _unread(self, gone: set[fx.Node], instead: Mapping[fx.Node, fx.Node], kept: Sequence[bool]) -> None:
        """Operators that nothing reads any more (views for the backward alone; gradients that nobody needs) go too."""
        needed = {_resolved(instead, r) for r, k in zip(self.graph.results, kept, strict=True) if k and r is not None}
        readers = {node: set(node.users) for node in self.graph.nodes}
        for value, other in instead.items():
            readers[other] |= readers[value]
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and node not in needed and node.users and gone.issuperset(readers[node]):
                gone.add(node)
        for node in gone:
            if node.target is getitem and node in self._differential and node.args[0] not in gone:
                raise Inseparable(f"{node.args[0]} would be told to make fewer gradients")


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _resolved(instead: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while node in instead:
        node = instead[node]
    return node


def _differential(graph: TrainingGraph) -> set[fx.Node]:
    """Gradients: what is computed from tangents, and from the one that is the gradient of the loss."""
    found = {
        node for given, node in zip(graph.inputs, graph.placeholders, strict=True) if given.kind is InputKind.TANGENT
    }
    for node in graph.nodes:
        if node.op == "call_function" and node.meta["phase"] == Phase.BACKWARD:
            ones = not node.all_input_nodes and "origin" not in node.meta
            if ones or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
    return found
