"""`UpdatePrices`: the seconds of an optimizer's update for any sizes of the parameters that it owns.

An update is elementwise: each of its operators works on one parameter, or on one of the tensors beside it, and moves as
many bytes as that has elements. So the update of a subnet is that of the full net with the operators of parameters that
it does not have left out, and the bytes of the others in proportion. Small parameters cost what a call costs, however
small they are: the update of a net of half the width and all layers is about as long as that of the full net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array
from torch import fx

from graphopt.cost_model.analytical import kernel_seconds_at, launch_seconds
from graphopt.cost_model.machine import Machine
from graphopt.cost_model.work import Mode, compiled
from graphopt.graph.halves import cut_update
from graphopt.graph.sizes import expression
from graphopt.graph.storages import tensors
from graphopt.graph.training_graph import InputKind, TrainingGraph

_AT_ONCE = 256
"""Subnets of one evaluation."""


class UpdatePrices:
    """See the module's docstring.

    Args:
        whole: a step of the full net with its update, as `graphopt.capture` gives it.
        mode, threads: how it is run.
    """

    def __init__(self, whole: TrainingGraph, mode: Mode, threads: int | None):
        graph = cut_update(whole).second
        self._work = compiled(graph, mode, (), threads)
        self._counts = self._work.at(self._work.values({}))
        self._names = list(graph.input_nodes(InputKind.PARAMETER))
        sizes = [_numel(node) for node in graph.input_nodes(InputKind.PARAMETER).values()]
        place = {name: i for i, name in enumerate(self._names)}
        owners = _owners(graph)
        rows, columns, follows = [], [], []
        for k, at in enumerate(self._work.node_of):
            node = self._work.nodes[at]
            mine = [place[name] for name in owners[node] if name in place]
            rows += [k] * len(mine)
            columns += mine
            follows.append(len(mine) > 1 or any(sizes[i] in _numels(node) for i in mine))
        shape = (len(self._work.kernels), len(self._names))
        self._of = csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=shape)
        self._full = self._of @ np.array(sizes, dtype=np.int64)
        self._many = self._of.sum(axis=1)
        self._follows = np.array(follows, dtype=bool)  # whose bytes follow the sizes of parameters

    def seconds(self, machine: Machine, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Seconds of an update, ``(count,)``.

        Args:
            machine: whose kernels and launches count.
            numbers: of each parameter how many elements it has in each subnet, int64 ``(count,)``, 0 where it is gone;
                one that is missing is in none.
        """
        count = len(next(iter(numbers.values())))
        nothing = np.zeros(count, np.int64)
        held = np.stack([numbers.get(name, nothing) for name in self._names])
        parts = [self._seconds(machine, held[:, at : at + _AT_ONCE]) for at in range(0, count, _AT_ONCE)]
        return np.concatenate(parts)

    def _seconds(self, machine: Machine, held: np.ndarray) -> np.ndarray:
        count = held.shape[1]
        there = np.where(self._many[:, None] > 0, (self._of @ (held > 0)) / np.maximum(self._many, 1)[:, None], 1.0)
        share = (self._of @ held) / np.maximum(self._full, 1)[:, None]
        base = self._counts.kernel_bytes[:, None]
        moved = np.where(self._follows[:, None], base * share, base * there)
        wide = lambda a: np.repeat(a[..., None], count, axis=-1)
        counts = replace(
            self._counts,
            kernel_bytes=moved, kernel_flops=wide(self._counts.kernel_flops), dims=wide(self._counts.dims),
        )  # fmt: skip
        kernel, _ = kernel_seconds_at(self._work, counts, machine)
        calls = launch_seconds(self._work, replace(machine, launch={**machine.launch, "item": 0.0}))[:, None]
        more = np.maximum(self._work.items - 1, 1)[:, None]  # tensors of one call beside its first
        item = (launch_seconds(self._work, machine)[:, None] - calls) / more
        host = calls + item * np.maximum(self._work.items[:, None] * there - 1, 0)
        seconds: np.ndarray = np.where(there > 0, kernel + host, 0.0).sum(axis=0)
        return seconds


def _owners(graph: TrainingGraph) -> dict[fx.Node, set[str]]:
    """The parameters that each operator of an update is for: of which it reads the value or the state; of numbers that
    are made of settings alone, those of their readers."""
    owners: dict[fx.Node, set[str]] = {}
    for given, node in zip(graph.inputs, graph.placeholders, strict=True):
        if given.kind in (InputKind.PARAMETER, InputKind.STATE):
            owners[node] = {given.name}
    for node in graph.nodes:
        if node.op == "call_function":
            owners[node] = set().union(*(owners.get(source, set()) for source in node.all_input_nodes))
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not owners[node]:
            owners[node] = set().union(*(owners.get(user, set()) for user in node.users))
    return owners


def _numels(node: fx.Node) -> set[int]:
    """How many elements the tensors have that an operator reads and gives."""
    values = [t for n in (node, *node.all_input_nodes) for t in tensors(n.meta.get("val"))]
    return {int(np.prod([int(expression(s)) for s in value.shape])) for value in values}


def _numel(node: fx.Node) -> int:
    return next(iter(_numels(node)))
