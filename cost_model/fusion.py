"""What a compiler makes of a graph's kernels: chains of memory-bound ones become one.

An upper bound of fusion that is close to what Inductor does: pointwise operators fuse with what they read and with
each other, a reduction fuses with what it reads, products stay alone. Nodes get a level, one more than that of any
operand they cannot fuse with; connected nodes of one level are one kernel. Such groups can always be run in the order
of their levels, so no fusion makes a cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import getitem

from torch import fx

from graphopt.cost_model.kernels import Family, Kernel
from graphopt.graph.op_rules import nodes_read
from graphopt.graph.sizes import Expr, nbytes
from graphopt.graph.storages import is_view, storage_root, tensors, viewed

_JOINS = frozenset([Family.POINTWISE, Family.TRANSCENDENTAL, Family.FILL, Family.RANDOM, Family.COPY, Family.GATHER])
"""May fuse with the kernels that read them."""

_ENDS = frozenset(
    [
        *(Family.REDUCTION, Family.SOFTMAX, Family.NORM, Family.NORM_BACKWARD),
        *(Family.BATCH_NORM, Family.BATCH_NORM_BACKWARD),
    ]
)
"""May fuse with what they read; what reads them starts a new kernel."""


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels of a compiled graph: groups of the given ones, each with the bytes that cross its border."""
    of = {kernel.node: kernel for kernel in kernels if kernel.family in _JOINS | _ENDS}
    level: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for kernel in kernels:
        node = kernel.node
        sources = {_maker(source) for source in nodes_read(node)}
        joins = {s for s in sources if node in of and s in of and of[s].family in _JOINS}
        level[node] = max([level.get(s, 0) + (s not in joins) for s in sources], default=0)
        leader.setdefault(node, node)
        for source in joins:
            if level[source] == level[node]:
                leader[find(node)] = find(source)
    groups: dict[fx.Node, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(find(kernel.node), []).append(kernel)
    result = []
    for members in groups.values():
        result += [_joined(members)] if len({k.node for k in members}) > 1 else members
    return [k for k in result if k.family is not Family.NONE]  # a compiler makes no calls for views


def _maker(node: fx.Node) -> fx.Node:
    """The operator that made the memory a node looks at."""
    root = storage_root(node)
    return viewed(root) if root.target is getitem else root


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views of it."""
    for user in node.users:
        if is_view(user):
            yield from _readers(user)
        else:
            yield user


def _joined(members: Sequence[Kernel]) -> Kernel:
    """One kernel: reads each value from outside once, writes what is read outside."""
    inside = {k.node for k in members}
    outside: dict[fx.Node, Expr] = {}
    for kernel in members:
        for source in nodes_read(kernel.node):
            if _maker(source) not in inside:
                outside[storage_root(source)] = sum(nbytes(t) for t in tensors(source.meta.get("val")))
    written: Expr = 0
    for kernel in members:
        if any(reader not in inside for reader in _readers(kernel.node)):
            written += sum(nbytes(t) for t in tensors(kernel.node.meta.get("val")))
    last = members[-1]
    families = [k.family for k in members]
    kind = next((f for f in families if f in _ENDS), Family.POINTWISE)
    return replace(last, family=kind, bytes=written + sum(outside.values()), flops=0)
