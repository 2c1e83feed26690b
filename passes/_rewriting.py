"""How a pass edits a graph: `Rewriting` makes the draft when it is first needed and keeps the record of changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import bytes_moved, flops, is_pure
from graphopt.graph.sizes import nbytes
from graphopt.graph.storages import Storage, kept_for_backward
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Change, PassResult, Refusal, Saving, place

CONSTANT_PREFIX = "folded_"
"""Names of the constants that passes make start with this; others may be tensors of the model."""


@dataclass
class _Step:
    """One change: nodes of the original graph that it removes and nodes of the draft that it adds or reads."""

    what: str
    at: fx.Node
    removed: list[fx.Node] = field(default_factory=list)
    added: list[fx.Node] = field(default_factory=list)
    reads: fx.Node | None = None


class Rewriting:
    """The edits of one pass on one graph.

    Nodes are named by those of the original graph; `at` gives the node of the draft that stands for one now. A
    graph that is not edited is not copied either: `finish` then returns the graph itself. Operators that an edit
    leaves without readers go with it.
    """

    def __init__(self, pass_name: str, graph: TrainingGraph):
        self.graph = graph
        self._name = pass_name
        self._draft: Draft | None = None
        self._steps: list[_Step] = []
        self._refusals: list[Refusal] = []
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._added: list[fx.Node] = []

    @property
    def draft(self) -> Draft:
        """The draft, made at the first use."""
        if self._draft is None:
            self._draft = self.graph.draft()
        return self._draft

    def at(self, node: fx.Node) -> fx.Node:
        """The node of the draft that stands for ``node`` of the original graph."""
        while node in self._replaced:
            node = self._replaced[node]
        return self.draft.node(node) if node.graph is self.graph.graph else node

    def add(self, op: Callable[..., Any], *args: Any, like: fx.Node, before: fx.Node) -> fx.Node:
        """A new operator on nodes of the draft, counted to the change that is recorded next.

        It stands before ``before`` and has the place in the model and the phase of ``like``, nodes of the original.
        """
        node = self.draft.add(op, *args, like=self.draft.node(like), before=self.draft.node(before))
        self._added.append(node)
        return node

    def add_constant(self, value: torch.Tensor, *, like: fx.Node) -> fx.Node:
        """A new constant before ``like``, whose type it must have."""
        constants = self.draft.constants
        number = next(i for i in count() if f"{CONSTANT_PREFIX}{i}" not in constants)
        name = f"{CONSTANT_PREFIX}{number}"
        constants[name] = value
        with self.draft.graph.inserting_before(self.draft.node(like)):
            node = self.draft.graph.create_node("get_attr", name, name=name)
        node.meta = dict(like.meta)
        return node

    def replace(self, old: fx.Node, new: fx.Node, what: str, *, also: Sequence[fx.Node] = ()) -> None:
        """Let readers of ``old`` read ``new`` (of the original graph or of the draft), and remove ``old``.

        ``also``: operators without readers that go with it.
        """
        target = self.at(new)
        self.at(old).replace_all_uses_with(target)
        self._replaced[old] = new
        self._record(_Step(what, old, removed=[old, *also], reads=target))

    def read_through(self, node: fx.Node, new: fx.Node, what: str) -> None:
        """Let ``node`` read ``new`` as its first argument."""
        self.at(node).update_arg(0, self.at(new))
        self._record(_Step(what, node, reads=self.at(new)))

    def remove(self, node: fx.Node, what: str) -> None:
        """Remove an operator that nothing reads once all removals are done."""
        self._record(_Step(what, node, removed=[node]))

    def refuse(self, node: fx.Node, what: str, why: str) -> None:
        """Record that ``node`` was looked at and left alone."""
        self._refusals.append(Refusal(self._name, what, *place(node), why=why))

    def finish(self) -> PassResult:
        """The graph as it is now, with the changes and what each saves."""
        if not self._steps:
            return PassResult(self.graph, (), tuple(self._refusals))
        draft = self.draft
        removed = {n for step in self._steps for n in step.removed}
        for node in reversed(self.graph.nodes):
            if node in removed:
                draft.graph.erase_node(draft.node(node))
        self._remove_orphans()
        used = {n.target for n in draft.graph.nodes if n.op == "get_attr"}
        draft.constants = {name: value for name, value in draft.constants.items() if name in used}
        after = draft.finish()
        kept = self._kept_savings(after)
        changes = (Change(self._name, s.what, *place(s.at), self._saving(s, kept)) for s in self._steps)
        return PassResult(after, tuple(changes), tuple(self._refusals))

    def _record(self, step: _Step) -> None:
        step.added, self._added = self._added, []
        self._steps.append(step)

    def _remove_orphans(self) -> None:
        """Remove what only removed operators read, and count it to their change."""
        owners = {n: step for step in reversed(self._steps) for n in (step.removed or [step.at])}
        for node in reversed(self.graph.nodes):
            if (node in owners and node in owners[node].removed) or not node.users or not is_pure(node):
                continue
            copy = self.draft.node(node)
            if not copy.users:
                self.draft.graph.erase_node(copy)
                step = next((owners[user] for user in node.users if user in owners), self._steps[0])
                step.removed.append(node)
                owners[node] = step

    def _saving(self, step: _Step, kept: dict[int, int]) -> Saving:
        evaluate = self.graph.symbols.evaluate

        def total(of: Callable[[fx.Node], Any]) -> int:
            return sum(evaluate(of(n)) for n in step.removed) - sum(evaluate(of(n)) for n in step.added)

        return Saving(total(flops), total(bytes_moved), kept.get(id(step), 0))

    def _kept_savings(self, after: TrainingGraph) -> dict[int, int]:
        """Bytes kept for backward that each step saves; together exactly the difference between the graphs.

        A storage that is no longer kept is counted to the step that removed a value or a reader of it, one that is
        kept anew to the step that made its readers read it.
        """
        before = {self.draft.node(s.root): s for s in kept_for_backward(self.graph)}
        now = {s.root: s for s in kept_for_backward(after)}
        removed = {n: step for step in reversed(self._steps) for n in step.removed}
        readers = {step.reads: step for step in reversed(self._steps) if step.reads is not None}
        makers = {n: step for step in reversed(self._steps) for n in step.added}
        savings: dict[int, int] = {}

        def credit(step: _Step, storage: Storage, sign: int) -> None:
            size = self.graph.symbols.evaluate(nbytes(storage.root.meta["val"]))
            savings[id(step)] = savings.get(id(step), 0) + sign * size

        for root, storage in before.items():
            if root not in now:
                touched = [storage.root, *storage.values, *(u for v in storage.values for u in v.users)]
                credit(next((removed[n] for n in touched if n in removed), self._steps[0]), storage, 1)
        for root, storage in now.items():
            if root not in before:
                touched = [root, *storage.values]
                found = (owner[n] for owner in (makers, readers) for n in touched if n in owner)
                credit(next(found, self._steps[0]), storage, -1)
        return savings


def remove_dead(draft: Draft) -> None:
    """Erase what a rewrite left without readers."""
    for node in reversed(list(draft.graph.nodes)):
        if node.op == "call_function" and not node.users and is_pure(node):
            draft.graph.erase_node(node)
