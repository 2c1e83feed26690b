"""Which values of a graph share memory, and whether one value may stand for another: the aliasing rules of passes.

A graph in this IR writes nothing in place, so a value may be shared freely *inside* it. What a rewrite must not do:

- let two outputs, or an output and an input or a constant, share memory that they did not share before (whoever
  holds the one would see writes to the other);
- touch a storage that an operator does write (there should be none);
- keep more bytes for backward than before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import fx

from graphopt.graph.sizes import Expr, expression, nbytes
from graphopt.graph.storages import is_view, storage_root, tensors, viewed
from graphopt.graph.training_graph import Phase, TrainingGraph

aten = torch.ops.aten

UNDEFINED = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
"""Operators whose elements are whatever the memory held: two of them are never the same."""

_ORDER = {Phase.INPUT: 0, Phase.FORWARD: 1, Phase.BACKWARD: 2, Phase.UPDATE: 3, Phase.OUTPUT: 4}


def geometry(node: fx.Node) -> Hashable:
    """Where the elements of a node's tensor lie in its storage: equal geometry in one storage is the same tensor.

    None for a node without a single dense tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    shape, stride = value.shape, value.stride()
    numbers = (*map(expression, shape), *map(expression, stride), expression(value.storage_offset()))
    return value.dtype, value.device, value.is_conj(), value.is_neg(), numbers


def is_contiguous(node: fx.Node) -> bool:
    """Whether a node's tensor is contiguous for every value of its symbolic sizes (asks without a new guard)."""
    value = node.meta["val"]
    expected: Expr = 1
    for size, stride in zip(map(expression, reversed(value.shape)), map(expression, reversed(value.stride()))):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def comes_before(first: fx.Node, second: fx.Node) -> bool:
    """Whether the phase of ``first`` is not a later one than that of ``second`` (inputs come first)."""
    return _ORDER[first.meta.get("phase", Phase.INPUT)] <= _ORDER[second.meta.get("phase", Phase.INPUT)]


@cache
def _may_copy(target: Any) -> bool:
    """Whether a view operator may also copy, as ``aten.reshape`` does: all that do are composites."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


class Storages:
    """The storages of one graph, followed through the merges that a pass makes.

    All nodes are those of the graph given; `merge` records that readers of one value now read another.
    """

    def __init__(self, graph: TrainingGraph):
        self._graph = graph
        self._root: dict[fx.Node, fx.Node] = {}
        self._memory: dict[fx.Node, fx.Node] = {}
        self._joined: dict[fx.Node, fx.Node] = {}
        self._results: dict[fx.Node, list[str]] = defaultdict(list)  # names of the outputs that are this node
        self._outputs: dict[fx.Node, list[str]] = defaultdict(list)  # names of the outputs in this storage
        self._written: set[fx.Node] = set()
        self._kept: set[fx.Node] = set()
        for node in graph.graph.nodes:
            view = is_view(node)
            self._root[node] = root = storage_root(node) if view else node
            shares = view and root is not node and not _may_copy(node.target)
            self._memory[node] = self._memory[viewed(node)] if shares else node
            if _writes(node):
                self._written.update(self._root[n] for n in node.all_input_nodes)
            if node.meta.get("phase") == Phase.BACKWARD:
                self._kept.update(self._root[n] for n in node.all_input_nodes)
        for output, result in zip(graph.outputs, graph.results):
            if result is not None:
                self._results[result].append(str(output))
                self._outputs[self._root[result]].append(str(output))

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the storage ``node`` lives in, after the merges so far."""
        root = self._root[node]
        while root in self._joined:
            root = self._joined[root]
        return root

    def memory(self, node: fx.Node) -> fx.Node:
        """As `root`, but ends at operators that may copy: values of equal memory surely share it."""
        memory = self._memory[node]
        while memory in self._joined:
            memory = self._joined[memory]
        return memory

    def has_output(self, node: fx.Node) -> bool:
        """Whether an output lives in the storage of ``node``."""
        return bool(self._outputs[self.root(node)])

    def why_not(self, old: fx.Node, new: fx.Node) -> str:
        """Why readers of ``old`` must not read the equal value ``new`` instead; empty if they may."""
        if not comes_before(new, old):
            return f"%{new.name} belongs to a later phase"
        old_root, new_root = self.root(old), self.root(new)
        if old_root in self._written or new_root in self._written:
            return "an operator writes to its storage"
        if self._results[old] and (self._results[new] or new.op != "call_function"):
            return f"{self._results[old][0]} would become the same tensor as {self._named(new)}"
        if old_root is new_root:
            return ""
        if self._outputs[old_root] and (self._outputs[new_root] or new_root.op != "call_function"):
            return f"{self._outputs[old_root][0]} would share memory with {self._named(new_root)}"
        if self._keeps_more(old_root, new_root):
            return f"%{new_root.name} would have to be kept for backward"
        return ""

    def merge(self, old: fx.Node, new: fx.Node) -> None:
        """Record that readers of ``old`` read ``new`` from now on."""
        old_root, new_root = self.root(old), self.root(new)
        self._results[new] += self._results.pop(old, [])
        if old_root is not new_root:
            self._joined[old_root] = new_root
            self._outputs[new_root] += self._outputs.pop(old_root, [])
            if old_root in self._kept:
                self._kept.add(new_root)

    def _named(self, node: fx.Node) -> str:
        names = self._results[node] or self._outputs[node]
        return names[0] if names else f"the {'constant' if node.op == 'get_attr' else 'input'} %{node.name}"

    def _keeps_more(self, old_root: fx.Node, new_root: fx.Node) -> bool:
        """Whether the merge would keep more bytes of forward for backward."""
        forward = new_root.op == "call_function" and new_root.meta.get("phase") == Phase.FORWARD
        value = new_root.meta.get("val")
        if not forward or new_root in self._kept or not tensors(value):  # numbers take no memory
            return False
        if old_root.meta.get("phase") == Phase.BACKWARD:
            return True
        if old_root not in self._kept or not isinstance(value, torch.Tensor):
            return False
        evaluate = self._graph.symbols.evaluate
        return evaluate(nbytes(value)) > evaluate(nbytes(old_root.meta["val"]))


def _writes(node: fx.Node) -> bool:
    """Whether an operator writes to an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
