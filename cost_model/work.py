"""`Work`: all that a graph asks of a processor, compiled once to arrays over its free sizes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import sympy
import torch
from torch import fx

from graphopt.cost_model.communication import Transfer
from graphopt.cost_model.fusion import fused
from graphopt.cost_model.kernels import Family, Kernel, collective, kernels, operator_name
from graphopt.cost_model.memory import Memory
from graphopt.cost_model.size_table import SizeTable
from graphopt.errors import CostModelError
from graphopt.graph.op_rules import bytes_moved, flops
from graphopt.graph.sizes import Expr, Symbols, expression, nbytes
from graphopt.graph.storages import kept_for_backward, tensors
from graphopt.graph.training_graph import Phase, TrainingGraph
from graphopt.graph.widths import CountingGraph, counting_graph

Mode: TypeAlias = Literal["eager", "flat", "compiled"]
"""How a graph is run: by autograd, as straight-line calls, or by a compiler that fuses kernels."""

_PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Counts:
    """What a graph asks for at certain sizes; arrays by kernel (`Work.kernels`) or by node (`Work.nodes`), int64."""

    flops: np.ndarray  # of each node, in the conventions of torch.utils.flop_counter
    bytes: np.ndarray  # read and written by each node
    kernel_flops: np.ndarray
    kernel_bytes: np.ndarray
    dims: np.ndarray  # m, n, k and batch of each kernel: (4, kernels)
    bytes_kept: Any  # int64, or an array of them


class Work:
    """The kernels of a graph run in one way, and their counts at any sizes.

    Attributes:
        nodes: the operators of the graph in order, those that only look at numbers or views too.
        kernels: what they start; where a compiler fuses, one for each fused group.
        node_of: index of the node of each kernel.
        transfers: the collectives among the kernels.
        memory: live bytes (`graphopt.cost_model.memory`).
        widths: the symbols of axes that are free besides the sizes of the graph, by name.
    """

    def __init__(self, graph: TrainingGraph, mode: Mode, widths: Iterable[str] | CountingGraph, threads: int | None):
        self.graph = graph
        self.mode = mode
        counting = widths if isinstance(widths, CountingGraph) else counting_graph(graph, widths)
        self.widths = counting.symbols
        self._figures: WeakKeyDictionary[Hashable, dict[Hashable, np.ndarray]] = WeakKeyDictionary()
        copies = {original: counting.node[original] for original in graph.nodes if original.op != "output"}
        originals = {copy: original for original, copy in copies.items()}
        self.nodes = tuple(node for node in graph.nodes if node.op == "call_function")
        found = [kernel for node in self.nodes for kernel in kernels(copies[node], threads)]
        if mode == "compiled":
            found = fused(found)
        position = {node: i for i, node in enumerate(self.nodes)}
        self.kernels: tuple[Kernel, ...] = tuple(found)
        self.node_of = np.array([position[originals[k.node]] for k in found], dtype=np.int64)
        self.families = np.array([_FAMILY_INDEX[k.family] for k in found], dtype=np.int64)
        self.items = np.array([k.items for k in found], dtype=np.int64)
        self.precisions = tuple(_precision(k.node) for k in found)
        self.transfers = _transfers(found)
        phases = [k.node.meta.get("phase", Phase.FORWARD) for k in found]
        self.phases = np.array([_PHASES.index(p) if p in _PHASES else 0 for p in phases], dtype=np.int64)
        kept = [sum(nbytes(t) for t in tensors(copies[s.root].meta["val"])) for s in kept_for_backward(graph)]
        per_node: list[Expr] = [flops(copies[n]) for n in self.nodes] + [bytes_moved(copies[n]) for n in self.nodes]
        per_kernel: list[Expr] = [getattr(kernel, figure) for figure in _FIGURES for kernel in found]
        self._table = SizeTable([sum(kept), *per_node, *per_kernel])
        found_tensors = {node: tensors(copies[node].meta.get("val")) for node in copies}
        self.memory = Memory(
            graph,
            "eager" if mode == "eager" else "flat",
            lambda node: [nbytes(t) for t in found_tensors[node]],
            shapes_of=lambda node: [list(map(expression, t.shape)) for t in found_tensors[node]],
            threads=threads or 1,
        )

    def values(self, sizes: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """A number for each symbol. Raises CostModelError for a name, a number or a size that does not fit."""
        symbols = self.graph.symbols
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise CostModelError(f"sizes: expected a positive integer for {name!r}, got {size!r}")
        batch = {name: size for name, size in sizes.items() if name in symbols.hints}
        _check(symbols, batch)
        values = {symbol: int(number) for symbol, number in symbols.substitution(batch).items()}
        return values | {symbol: sizes[name] for name, symbol in self.widths.items()}

    def at(self, values: Mapping[sympy.Symbol, int]) -> Counts:
        """The counts for numbers that `values` gave."""
        return self._counts(self._table.at(values))

    def at_many(self, values: Mapping[sympy.Symbol, np.ndarray]) -> Counts:
        """As `at`, for many sizes at once: the arrays have a last dimension more."""
        return self._counts(self._table.at_many(values))

    def _counts(self, found: np.ndarray) -> Counts:
        n, k = len(self.nodes), len(self.kernels)
        kept, per_node, per_kernel = np.split(found, np.cumsum([1, 2 * n]))
        flops, moved = per_node.reshape(2, n, *found.shape[1:])
        kernel_flops, kernel_bytes, *dims = per_kernel.reshape(6, k, *found.shape[1:])
        return Counts(flops, moved, kernel_flops, kernel_bytes, np.stack(dims), kept[0])

    @cached_property
    def of_family(self) -> dict[Family, np.ndarray]:
        """Indices of the kernels of each family that occurs."""
        return {family: np.flatnonzero(self.families == i) for family, i in _FAMILY_INDEX.items()
                if np.any(self.families == i)}  # fmt: skip

    def phase(self, kernel: int) -> Phase:
        """The phase of a kernel."""
        return _PHASES[self.phases[kernel]]

    def per_kernel(self, machine: Hashable, key: Hashable, find: Callable[[int], float]) -> np.ndarray:
        """A figure of each kernel on a machine that does not depend on sizes, found once."""
        figures = self._figures.setdefault(machine, {})
        if key not in figures:
            figures[key] = np.array([find(i) for i in range(len(self.kernels))], dtype=np.float64)
        return figures[key]

    @cached_property
    def updating(self) -> np.ndarray:
        """Which kernels belong to the optimizer's update."""
        return self.phases == _PHASES.index(Phase.UPDATE)


def _transfers(found: Sequence[Kernel]) -> tuple[Transfer, ...]:
    """The collectives, each with the place where its result is waited for: at its wait, or, where a compiler left that
    out, at what reads it."""
    place: dict[fx.Node, int] = {}
    for i, kernel in enumerate(found):
        place.setdefault(kernel.node, i)

    def waited(node: fx.Node) -> int:
        if node in place and operator_name(node) == "wait_tensor":
            return place[node]
        places = [place[user] if user in place and user.target is not getitem else waited(user) for user in node.users]
        return min(places, default=len(found))

    return tuple(
        Transfer(collective(kernel.node), i, max(i, min((waited(u) for u in kernel.node.users), default=len(found))))
        for i, kernel in enumerate(found)
        if kernel.family is Family.COMMUNICATION
    )


def compiled(graph: TrainingGraph, mode: Mode, sizes: Iterable[str], threads: int | None = 1) -> Work:
    """The work of a graph with the named sizes free; compiled at the first call for these names. ``threads``: see
    `kernels`."""
    widths = frozenset(set(sizes) - graph.symbols.hints.keys())
    key = (Work, mode, widths, threads)
    if key not in graph.derived:
        if not any(node.op == "call_function" for node in graph.nodes):
            raise CostModelError("graph: it has no operators; there is nothing to price")
        graph.derived[key] = Work(graph, mode, widths, threads)
    return graph.derived[key]


_PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)
_FAMILY_INDEX = {family: i for i, family in enumerate(Family)}

_FIGURES = ("flops", "bytes", "rows", "columns", "depth", "batch")


def _precision(node: fx.Node) -> str:
    found = tensors(node.meta.get("val"))
    return _PRECISIONS.get(found[0].dtype, "fp32") if found else "fp32"


def _check(symbols: Symbols, sizes: Mapping[str, int]) -> None:
    """The sizes must be those that the graph holds for."""
    try:
        admitted = symbols.admits(sizes)
    except KeyError as error:
        raise CostModelError(str(error.args[0])) from None
    if not admitted:
        guards = " and ".join(map(symbols.rename, symbols.guards)) or "sizes of at least 2"
        raise CostModelError(f"sizes: the graph does not hold at {dict(sizes)}; it was captured for {guards}")
