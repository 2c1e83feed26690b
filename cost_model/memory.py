"""Peak memory of a training step, by liveness over the schedule that really runs, for any sizes.

A graph is compiled once to blocks of memory, each with the operators between which it lives and one size expression
(`SizeTable`). A price at other sizes is one evaluation of that table and one cumulative sum: no capture, no walk.

Two schedules are known. ``flat``: the function that `graphopt.graph.lowering.lower` writes. ``eager``: what PyTorch
holds for the same captured step. See `graphopt.cost_model.blocks` for when a block comes and goes, and
`graphopt.cost_model.workspace` for what kernels take in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import sympy
from scipy.sparse import csr_array
from torch import fx

from graphopt.cost_model.blocks import BytesOf, Mode, blocks_of, stored_bytes
from graphopt.cost_model.kernel_sizes import ShapesOf, Sizes, shapes
from graphopt.cost_model.size_table import SizeTable
from graphopt.cost_model.workspace import workspace
from graphopt.errors import GraphoptError
from graphopt.graph.storages import storage_root
from graphopt.graph.training_graph import TrainingGraph

__all__ = ["Memory", "Mode", "Peak", "peak"]


@dataclass(frozen=True)
class Peak:
    """The most memory that a step holds at once, in bytes.

    ``total``: everything. ``own``: of it, what the step itself allocates (not parameters, buffers, optimizer state and
    the batch, which are there before). ``parts``: the total by what it is for; it sums to ``total``. ``node``: the
    operator at work at that moment; None where no operator allocates. ``timeline``: int64, the bytes that live after
    each operator of the schedule (workspace is gone by then, so ``timeline.max() <= total``). ``blocks``: int64, what
    the step asks of the allocator, the workspace of an operator as one.
    """

    total: int
    own: int
    parts: Mapping[str, int]
    node: fx.Node | None
    timeline: np.ndarray
    blocks: np.ndarray


@dataclass(frozen=True)
class Absent:
    """Operators of a graph that are not run: ``nodes`` (inputs that only they read among them), and for each value of
    theirs that others read, in order, the value that those read ``instead``."""

    nodes: frozenset[fx.Node]
    instead: tuple[tuple[fx.Node, fx.Node], ...] = ()


class Memory:
    """Peak memory of one graph run in one way, as a function of the graph's free sizes. Compiled once."""

    def __init__(
        self,
        graph: TrainingGraph,
        mode: Mode = "flat",
        bytes_of: BytesOf = stored_bytes,
        *,
        shapes_of: ShapesOf = shapes,
        threads: int = 1,
    ):
        """Compile ``graph``.

        Args:
            graph: for ``flat`` the graph that is lowered, for ``eager`` the graph as captured, before any pass.
            mode: how the step runs.
            bytes_of: bytes of the storages of the tensors in a node's value, in order; by default of ``meta["val"]``.
            shapes_of: shapes of the same tensors, from which the workspace of kernels is priced.
            threads: of the kernels; some take a buffer for each.

        Raises:
            GraphoptError: ``mode`` is neither.
        """
        if mode not in ("flat", "eager"):
            raise GraphoptError(f"mode: expected 'flat' or 'eager', got {mode!r}")
        self.graph, self.mode = graph, mode
        self._order = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
        sizes = Sizes(shapes_of, threads)
        blocks = blocks_of(graph, self._order, mode, bytes_of, sizes)
        fused = mode == "flat"
        moments = [(k, m) for k, node in enumerate(self._order) for m in workspace(node, sizes, fused) if m != 0]
        self._parts = np.array([b.part for b in blocks], dtype=object)
        self._born = np.array([b.born for b in blocks], dtype=np.int64)
        self._dies = np.array([b.dies for b in blocks], dtype=np.int64)
        self._nodes = tuple(b.node for b in blocks)
        self._at = np.array([k for k, _ in moments], dtype=np.int64)
        self._table = SizeTable([*(b.nbytes for b in blocks), *(m for _, m in moments)])

    def at(self, values: Mapping[sympy.Symbol, int]) -> Peak:
        """The peak where the free sizes have these values. Exact integers; well under a millisecond.

        Raises:
            GraphoptError: a size is missing, is no positive integer, or is beyond all bounds.
        """
        for symbol, value in values.items():
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise GraphoptError(f"sizes: expected a positive integer for {symbol}, got {value!r}")
        sizes = self._table.at(values)
        count, steps = len(self._born), len(self._order)
        blocks = sizes[:count]
        change = np.zeros(steps + 2, dtype=np.int64)  # index 0: before the first operator
        np.add.at(change, self._born + 1, blocks)
        held = np.cumsum(change)
        gone = np.zeros(steps + 2, dtype=np.int64)
        np.add.at(gone, np.minimum(self._dies, steps) + 1, blocks)
        freed = np.cumsum(gone)
        after = (held - freed)[1 : steps + 1]
        work = np.zeros(steps, dtype=np.int64)
        np.maximum.at(work, self._at, sizes[count:])
        during = held[1 : steps + 1] - freed[:steps] + work
        before = int(held[0])
        at = int(during.argmax()) if steps else -1
        own = int(during[at]) - before if steps else 0
        alive = (self._born <= at) & (self._dies >= at)
        parts: dict[str, int] = {}
        for part, nbytes in zip(self._parts[alive], blocks[alive], strict=True):
            parts[part] = parts.get(part, 0) + int(nbytes)
        if steps and work[at]:
            parts["workspace"] = int(work[at])
        node = self._order[at] if steps and own else None
        asked = np.concatenate([blocks[self._born >= 0], work[work > 0]])
        return Peak(before + own, own, MappingProxyType(parts), node, after, asked)

    def sizes_at_many(self, values: Mapping[sympy.Symbol, np.ndarray]) -> np.ndarray:
        """What `totals` needs, one column for each of many sizes: for each symbol an int64 array of them."""
        return self._table.at_many(values)

    def totals(self, sizes: np.ndarray, absent: Absent) -> np.ndarray:
        """The total of `at` for each column of `sizes_at_many`, int64, where these operators are left out."""
        count, steps = len(self._born), len(self._order)
        blocks, work, dies = sizes[:count], sizes[count:], self._dies
        if absent.nodes:
            gone = np.array([node in absent.nodes for node in self._nodes], dtype=bool)
            blocks = np.where(gone[:, None], 0, blocks)
            work = np.where(np.array([self._order[k] in absent.nodes for k in self._at], dtype=bool)[:, None], 0, work)
            dies = self._dies_without(absent)
        places = np.arange(count)
        born = csr_array((np.ones(count, np.int64), (self._born + 1, places)), shape=(steps + 2, count))
        died = csr_array((np.ones(count, np.int64), (np.minimum(dies, steps) + 1, places)), shape=(steps + 2, count))
        held, freed = np.cumsum(born @ blocks, axis=0), np.cumsum(died @ blocks, axis=0)
        most = np.zeros((steps, blocks.shape[1]), dtype=np.int64)
        np.maximum.at(most, self._at, work)
        during = held[1 : steps + 1] - freed[:steps] + most
        return np.maximum(during.max(axis=0, initial=0), held[0])

    def _dies_without(self, absent: Absent) -> np.ndarray:
        """When blocks go where operators are left out: what stands for a value lives as long as that did."""
        dies = self._dies.copy()
        of: dict[fx.Node, list[int]] = {}
        for i, node in enumerate(self._nodes):
            of.setdefault(node, []).append(i)
        for value, instead in reversed(absent.instead):  # the last one first: what stands for it may be absent too
            last = max((int(dies[i]) for i in of.get(storage_root(value), [])), default=-1)
            for i in of.get(storage_root(instead), []):
                dies[i] = max(int(dies[i]), last)
        return dies


def peak(graph: TrainingGraph, sizes: Mapping[str, int] | None = None, mode: Mode = "flat") -> Peak:
    """The peak of ``graph`` at ``sizes`` (by public name: ``{"batch": 64}``; those not given as at capture).

    Raises:
        GraphoptError: an unknown name, a size that is fixed in this graph, or no positive integer.
    """
    try:
        values = graph.symbols.substitution(sizes)
    except (KeyError, TypeError, ValueError, sympy.SympifyError) as error:
        raise GraphoptError(str(error.args[0]) if error.args else f"sizes: got {sizes!r}") from error
    return Memory(graph, mode).at({symbol: int(value) for symbol, value in values.items()})
