"""`resize`: a forward graph with some of its axes smaller, in all places at once.

Placeholders get their new shapes, literals their new values (`graphopt.graph.literals`), constants are indexed, and
metadata are inferred anew, node by node, and compared with what the axes say. Numbers that the user computed from a
size in Python and wrote into the model as floats (``1 / math.sqrt(64)``) stay as they are: a graph does not show what
they are. The default scale of ``scaled_dot_product_attention`` follows the size by that operator's definition.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes import Axes, Axis, Dim
from graphopt.graph.draft import Draft, infer_or_copy
from graphopt.graph.literals import Literal, Role, literals
from graphopt.graph.op_rules.arguments import set_operand
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.text import node_text
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.graph.training_graph import TrainingGraph

Sizes = Mapping[Axis | str, int]
Keep = Mapping[Axis | str, torch.Tensor]


def resize(
    graph: TrainingGraph,
    axes: Axes,
    sizes: Sizes | None = None,
    *,
    keep: Keep | None = None,
    stay: Collection[str] = (),
) -> TrainingGraph:
    """The graph at other sizes of some axes. Its inputs are those of ``graph``, sliced as `take` slices tensors.

    Args:
        graph: a forward graph (`capture_forward`); a free batch size stays free.
        axes: its axes (`analyse`).
        sizes: the new size of each axis, given by itself or by name: the first so many indices remain.
        keep: instead, which indices of an axis remain, int64, in their new order. One may come several times, which
            makes the axis larger.
        stay: names of nodes whose numbers (``x / 96``) are known to be no sizes.

    Raises:
        AxisError: an axis that the graph does not have or that is not free (with the reason), a size out of range, an
            integer of which it is not known what it means, or shapes that no longer fit (with the node). Nothing was
            changed.

    Example:
        >>> import torch
        >>> from graphopt.graph.axes import analyse
        >>> from graphopt.graph.forward import capture_forward
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        >>> graph = capture_forward(net, torch.randn(5, 4))
        >>> small = resize(graph, analyse(graph), {"0.hidden": 6})
        >>> [tuple(p.meta["val"].shape) for p in small.placeholders[:-1]]
        [(6, 4), (6,), (6,), (6,), (3, 6), (3,)]
    """
    if axes.graph is not graph:
        raise AxisError("axes: they are those of another graph; use analyse(graph)")
    return _Resizing(graph, axes, chosen_indices(axes, sizes, keep), stay).run()


def chosen_indices(axes: Axes, sizes: Sizes | None, keep: Keep | None) -> dict[Axis, torch.Tensor]:
    """Which indices of each axis remain, for all axes that change. Raises AxisError as `resize` does."""
    chosen: dict[Axis, torch.Tensor] = {}
    for which, size in (sizes or {}).items():
        axis = _free(axes, which)
        if type(size) is not int or not 1 <= size <= axis.size:
            raise AxisError(f"sizes: {axis!r} can have from 1 to {axis.size} indices, got {size!r}")
        if size != axis.size:
            chosen[axis] = torch.arange(size)
    for which, indices in (keep or {}).items():
        axis = _free(axes, which)
        fits = isinstance(indices, torch.Tensor) and indices.dtype == torch.int64 and indices.dim() == 1
        if not fits or not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= axis.size:
            raise AxisError(f"keep: expected int64 indices from 0 to {axis.size} of {axis!r}, got {indices!r}")
        if axis in chosen:
            raise AxisError(f"keep: {axis!r} has a size already; give one of both")
        chosen[axis] = indices
    return chosen


def indices(axes: Axes, sizes: Sizes | None = None, *, keep: Keep | None = None) -> dict[str, tuple[Any, ...]]:
    """What remains of each parameter, buffer and constant that changes: per dimension the indices, or None for all.

    Raises AxisError as `resize` does.
    """
    chosen = chosen_indices(axes, sizes, keep)
    return {
        name: tuple(_indices(dim, chosen) for dim in axes.of(node))
        for name, node in axes.carriers().items()
        if any(_changes(dim, chosen) for dim in axes.of(node))
    }


def take(tensors: Mapping[str, torch.Tensor], remaining: Mapping[str, tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """The tensors by name with what remains of them (`indices`), detached copies; others are handed on as they are.

    Memory order (channels-last) is kept. Raises AxisError for a tensor of another number of dimensions.
    """
    return {n: _taken(n, tensor, remaining[n]) if n in remaining else tensor for n, tensor in tensors.items()}


def _taken(name: str, tensor: torch.Tensor, rows: tuple[Any, ...]) -> torch.Tensor:
    if tensor.dim() != len(rows):
        raise AxisError(f"tensors: {name} has {tensor.dim()} dimensions, expected {len(rows)}")
    like = tensor = tensor.detach()
    for dim, chosen in enumerate(rows):
        if chosen is not None:
            tensor = tensor.index_select(dim, chosen.to(tensor.device))
    strides = _strides(tensor.shape, like.stride())
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _free(axes: Axes, which: Axis | str) -> Axis:
    axis = axes.group(which) if isinstance(which, str) else which
    if axis not in axes.groups():
        raise AxisError(f"axis: {axis!r} is none of the groups of this graph")
    if not axis.free:
        raise AxisError(f"axis: {axis!r} of size {axis.size} is not free: {axis.reason}")
    return axis


def _changes(dim: Dim, chosen: Mapping[Axis, Any]) -> bool:
    return any(axis in chosen for axis in dim.axes())


def _indices(dim: Dim, chosen: Mapping[Axis, torch.Tensor]) -> torch.Tensor | None:
    return dim.indices(chosen) if _changes(dim, chosen) else None


def _strides(shape: Any, like: Any) -> list[Any]:
    """Dense strides for ``shape`` in the memory order of ``like``; what was broadcast (stride 0) stays so."""
    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    for d in sorted(range(len(shape)), key=lambda d: (like[d], -d)):
        if like[d] != 0:
            strides[d] = step
            step = step * max(shape[d], 1)
    return strides


@dataclass
class _Resizing:
    graph: TrainingGraph
    axes: Axes
    chosen: Mapping[Axis, torch.Tensor]
    stay: Collection[str]

    def run(self) -> TrainingGraph:
        if not self.chosen:
            return self.graph
        self.sizes = {axis: len(indices) for axis, indices in self.chosen.items()}
        found: dict[fx.Node, list[Literal]] = {}
        for literal in literals(self.graph, self.axes):
            if not literal.axes.isdisjoint(self.sizes):
                if literal.refusal and not (literal.role is Role.VALUE and literal.node.name in self.stay):
                    self._refuse(literal.node, f"its argument {literal}")
                found.setdefault(literal.node, []).append(literal)
        self.draft = Draft(self.graph)
        self.changed: set[fx.Node] = set()
        mode = fake_mode_of([node.meta.get("val") for node in self.graph.placeholders])
        self.inference = partial(without_guards, mode) if mode is not None else nullcontext
        for node in self.graph.nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                self._input(node)
            elif node.op == "call_function":
                self._operator(node, found.get(node, []))
        for node in reversed(self.draft.graph.nodes):  # arithmetic of sizes that nobody reads any more
            if node.op == "call_function" and not node.users and isinstance(node.meta["val"], torch.SymInt):
                self.draft.graph.erase_node(node)
        return self.draft.finish()

    def _shape(self, node: fx.Node) -> list[Any]:
        """The new sizes of a node's tensor: those that do not change as they are, free sizes as they are."""
        dims, value = self.axes.of(node), node.meta["val"]
        return [d.size_at(self.sizes) if _changes(d, self.chosen) else s for d, s in zip(dims, value.shape)]

    def _input(self, node: fx.Node) -> None:
        dims, value, copy = self.axes.of(node), node.meta.get("val"), self.draft.node(node)
        if not isinstance(value, torch.Tensor) or not any(_changes(d, self.chosen) for d in dims):
            return
        shape = self._shape(node)
        if any(not isinstance(expression(s), int) for s in shape):
            self._refuse(node, "it has a free size too")
        mode = fake_mode_of(value)
        assert mode is not None
        with mode:
            strides = _strides(shape, value.stride())
            copy.meta["val"] = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        self.changed.add(copy)
        if node.op == "get_attr":
            name = str(node.target)
            rows = tuple(_indices(d, self.chosen) for d in dims)
            self.draft.constants[name] = _taken(name, self.graph.constants[name], rows)

    def _operator(self, node: fx.Node, found: list[Literal]) -> None:
        copy = self.draft.node(node)
        for literal in found:
            if not literal.refusal:
                self._rewrite(copy, literal)
        if node.target in _EVEN_PIECES:
            copy.target, copy.args, copy.kwargs = self._pieces(node, copy)
        if not found and self.changed.isdisjoint(copy.all_input_nodes):
            return
        try:
            self._infer(copy)
        except Exception as error:
            self._refuse(node, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        self.changed.add(copy)
        self._compare(node, copy)

    def _infer(self, copy: fx.Node) -> None:
        with self.inference():
            infer_or_copy(self.draft, copy)

    def _rewrite(self, copy: fx.Node, literal: Literal) -> None:
        new = literal.at(self.sizes)
        if new == literal.value:
            return
        made = self.draft.size(new, like=copy) if not isinstance(new, int) else new
        if literal.index is None:
            set_operand(copy, literal.argument, made)
            return
        position = [a.name for a in copy.target._schema.arguments].index(literal.argument)
        given: Any = copy.kwargs[literal.argument] if literal.argument in copy.kwargs else copy.args[position]
        set_operand(copy, literal.argument, [made if i == literal.index else g for i, g in enumerate(given)])

    def _pieces(self, node: fx.Node, copy: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """``split`` and ``chunk`` give equal pieces: where pieces are no longer equal, their sizes are written out."""
        source, *rest = copy.args
        how: Any = rest.pop(0)
        along: Any = rest[0] if rest else copy.kwargs.get("dim", 0)
        pieces = [dims[along] for dims in self.axes.of(node)]
        if not any(_changes(p, self.chosen) for p in pieces):
            return copy.target, copy.args, copy.kwargs
        sizes = [p.size_at(self.sizes) for p in pieces]
        total = sum(sizes)
        even = how if "split" in str(node.target) else -(-total // how)
        if sizes == [min(even, total - i * even) for i in range(len(sizes))]:
            return copy.target, copy.args, copy.kwargs
        return torch.ops.aten.split_with_sizes.default, (source, sizes, along), {}

    def _compare(self, node: fx.Node, copy: fx.Node) -> None:
        """The shapes that operators give are those that the axes say."""
        several = isinstance(node.meta["val"], (list, tuple))
        values = copy.meta["val"] if several else [copy.meta["val"]]
        expected = self.axes.of(node) if several else [self.axes.of(node)]
        if len(values) != len(node.meta["val"] if several else [0]):
            self._refuse(node, f"it gives {len(values)} results")
        for value, dims in zip(values, expected):
            if isinstance(value, torch.Tensor):
                got: list[Expr] = [expression(s) for s in value.shape]
                want = [d.size_at(self.sizes) for d in dims]
                if got != want:
                    self._refuse(node, f"it gives the shape {got}, expected {want}")

    def _refuse(self, node: fx.Node, why: str) -> None:
        sizes = ", ".join(f"{axis!r} from {axis.size} to {new}" for axis, new in self.sizes.items())
        raise AxisError(f"cannot change {sizes}: {node_text(node, self.graph.symbols)}: {why}")


_EVEN_PIECES = {
    torch.ops.aten.split.Tensor,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.chunk.default,
    torch.ops.aten.unsafe_chunk.default,
}
