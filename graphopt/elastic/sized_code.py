"""`run`: a subnet without making its graph: one code for all sizes of a pattern of layers and kernels.

Subnets that differ in sizes of axes only have the same operators; what differs are slices of parameters and numbers in
arguments (sizes of views, borders of splits). So the forward graph of each pattern is lowered once, at full sizes, with
those numbers as inputs. A training step that draws subnets nobody has seen before then costs no rewriting of graphs.
The same kernels run on the same slices as in `Space.run`: results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.elastic.axis_sizes import correspond
from graphopt.elastic.choice import Choice
from graphopt.elastic.kept import Kept
from graphopt.elastic.slices import Slice
from graphopt.elastic.space import Space
from graphopt.elastic.subnet import BatchNorm, Subnet, batch_norm, for_autograd
from graphopt.elastic.supergraph import Supergraph
from graphopt.elastic.transformations import is_transformed
from graphopt.graph.axes import Axis, Dim
from graphopt.graph.batch import flatten, one_batch
from graphopt.graph.draft import Draft
from graphopt.graph.literals import Literal, literals
from graphopt.graph.lowering import lower
from graphopt.graph.op_rules.arguments import set_operand
from graphopt.graph.resize import EVEN_PIECES
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.training_graph import Input, InputKind, TrainingGraph

Sizes = Mapping[Axis, int]


def run(space: Space, choice: Choice, *args: Any, **kwargs: Any) -> Any:
    """As `Space.run`, for a choice of the space."""
    return Runs(space)(choice, *args, **kwargs)


class Runs:
    """Runs of several subnets on batches of one form, while the model stays in one state: what a step makes.

    Args:
        space: the space.
        leaves: collects gradients; see `Leaves`. None: autograd carries them into the model's parameters.
        norm: see `for_autograd`.
    """

    def __init__(self, space: Space, leaves: Leaves | None = None, norm: BatchNorm = batch_norm):
        self.space, self.leaves, self.norm = space, leaves, norm
        self._supergraph: Supergraph | None = None

    def __call__(self, choice: Choice, *args: Any, **kwargs: Any) -> Any:
        """As `Space.run`."""
        batch = one_batch(args, kwargs)
        if self._supergraph is None:
            self._supergraph = self.space.subnet(self.space.full, batch=batch).origin
        supergraph, tensors = self._supergraph, flatten(batch)[0]
        pattern, sizes = _parted(supergraph, choice)
        codes: Kept[SizedCode | None] = supergraph.derived.setdefault("sized codes", Kept())
        key = pattern.key(), self.norm
        if key not in codes:
            codes[key] = SizedCode.of(supergraph.subnet(pattern), self.norm)
        code = codes[key]
        if code is None:
            return supergraph.subnet(choice)(tensors, norm=self.norm)
        return code(sizes, tensors, self.leaves)


class Leaves:
    """Parts of parameters as leaves of autograd of their own.

    Autograd's gradient of a slice is as large as the whole parameter, zero beside the part, for each subnet anew. Here
    the gradient stays as small as the part, and `add_gradients` adds it to that of the parameter. Parameters with
    hooks, which must see whole gradients, are left to autograd.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[torch.Tensor, Slice, torch.Tensor]] = []

    def take(self, tensor: torch.Tensor, part: Slice) -> torch.Tensor:
        """The part of a tensor, as `Slice.take` gives it."""
        hooked = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
        if not tensor.requires_grad or not tensor.is_leaf or hooked:
            return part.take(tensor)
        leaf = part.dense(tensor.detach()).requires_grad_()
        self._taken.append((tensor, part, leaf))
        return leaf

    def add_gradients(self) -> None:
        """Add the gradients of all parts taken so far to those of the parameters, and forget the parts."""
        for tensor, part, leaf in self._taken:
            if leaf.grad is not None:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
                part.add(tensor.grad, leaf.grad)
        self._taken.clear()


def _parted(supergraph: Supergraph, choice: Choice) -> tuple[Choice, dict[Axis, int]]:
    """A choice as the pattern that its code depends on, and the sizes of axes that are not full."""
    supergraph.changed(choice)  # raises for what this graph does not have
    sizes: dict[Axis, int] = {}
    values = dict(choice)
    for name, value in choice.items():
        handle = supergraph.handles[name]
        if value == handle.full or name in choice.inactive:
            continue
        if axes := handle.axes(value):
            values[name] = handle.full
            sizes.update((axis, len(indices)) for axis, indices in axes.items())
    return Choice(values, choice.inactive), sizes


class SizedCode:
    """The code of one pattern. Call it with the sizes of axes and the tensors of a batch.

    Args:
        base: the subnet of the pattern, all axes full.
        twins: for each axis of its graph that parameters carry the one of the supergraph.
        norm: see `for_autograd`.
    """

    def __init__(self, base: Subnet, twins: Mapping[Axis, Axis], norm: BatchNorm = batch_norm):
        self.base, self.origin = base, base.origin
        self.twins = dict(twins)
        elastic = set(self.origin.elastic_axes())
        self._varying = {axis for axis, twin in self.twins.items() if twin in elastic}
        self._added: list[tuple[Dim, bool] | str] = []  # what each further input is
        self._lowered = lower(for_autograd(self._sized(), norm), in_place=False)
        self._carriers = self._elastic_carriers()
        self._slices: dict[tuple[str, tuple[int, ...]], Slice] = {}
        self._values: dict[Hashable, list[int]] = {}
        self._free = _places(base.graph)

    @staticmethod
    def of(base: Subnet, norm: BatchNorm = batch_norm) -> SizedCode | None:
        """The code of a pattern; None where axes of its graph cannot be told, or a weight is transformed: what a
        transformation computes may depend on the shape of the weight, which is the full one here."""
        if is_transformed(base):
            return None
        axes = base.graph.axes
        twins = correspond(axes, base.origin.axes)
        carried = {
            axis
            for node in base.graph.input_nodes(InputKind.PARAMETER).values()
            if node.users
            for dim in axes.of(node)
            for axis in dim.axes()
        }
        return SizedCode(base, twins, norm) if carried <= twins.keys() else None

    # -- making it --------------------------------------------------------------------------------------------------

    def _sized(self) -> Any:
        """The graph of the pattern with numbers that depend on sizes, and constants, as inputs."""
        graph, axes = self.base.graph, self.base.graph.axes
        draft = Draft(graph)
        inputs: dict[tuple[Dim, bool], fx.Node] = {}

        def number(dim: Dim, negative: bool = False) -> fx.Node:
            key = (dim, negative)
            if key not in inputs:
                inputs[key] = draft.add_input(Input(InputKind.HYPER, f"size_{len(inputs)}"), 0)
                self._added.append(key)
            return inputs[key]

        for literal in literals(graph, axes):
            if literal.dim is not None and not self._varying.isdisjoint(literal.axes):
                _write(draft.node(literal.node), literal, number(literal.dim, literal.negative))
        for node in graph.nodes:
            if node.target in EVEN_PIECES:
                self._write_pieces(draft.node(node), node, number)
            elif node.op == "get_attr" and any(not self._varying.isdisjoint(d.axes()) for d in axes.of(node)):
                made = draft.add_input(Input(InputKind.BUFFER, f"constant_{node.name}"), node.meta["val"])
                self._added.append(str(node.target))
                draft.replace(draft.node(node), made)
        return draft.finish()

    def _write_pieces(self, copy: fx.Node, node: fx.Node, number: Any) -> None:
        """``split`` and ``chunk`` with the sizes of the pieces written out."""
        source, _, *rest = copy.args
        along: Any = rest[0] if rest else copy.kwargs.get("dim", 0)
        pieces = [dims[along] for dims in self.base.graph.axes.of(node)]
        if all(self._varying.isdisjoint(piece.axes()) for piece in pieces):
            return
        copy.target, copy.kwargs = torch.ops.aten.split_with_sizes.default, {}
        copy.args = (source, [number(piece) for piece in pieces], along)

    def _elastic_carriers(self) -> dict[str, tuple[tuple[Dim, ...], tuple[Axis, ...]]]:
        """Parameters, buffers and constants that axes of choices change: dimensions and those axes."""
        elastic = dict.fromkeys(self.origin.elastic_axes())
        found = {}
        for name, node in self.origin.axes.carriers().items():
            dims = self.origin.axes.of(node)
            mine = tuple(dict.fromkeys(axis for dim in dims for axis in dim.axes() if axis in elastic))
            if mine:
                found[name] = (dims, mine)
        return found

    # -- running it -------------------------------------------------------------------------------------------------

    def __call__(self, sizes: Sizes, batch: Sequence[torch.Tensor], leaves: Leaves | None = None) -> Any:
        """The output at these sizes of axes of the supergraph; see `Subnet.__call__`."""
        rest = iter(batch)
        given: list[Any] = []
        for input_, node in zip(self.base.graph.inputs, self.base.graph.placeholders, strict=True):
            if input_.kind is InputKind.BATCH:
                given.append(next(rest))
            elif node.users:
                given.append(self._part(input_.name, self.origin.tensors[input_.name], sizes, leaves))
            else:
                given.append(None)
        numbers = iter(self._numbers_at(sizes, batch))
        for what in self._added:
            if isinstance(what, str):
                given.append(self._part(what, self.origin.graph.constants[what], sizes, None))
            else:
                given.append(next(numbers))
        return self.base.nested(self._lowered, self._lowered.run(*given), lambda name: self._slice(name, sizes))

    def _part(self, name: str, tensor: torch.Tensor, sizes: Sizes, leaves: Leaves | None) -> torch.Tensor:
        found = self._slice(name, sizes)
        if found is None or found.whole:
            return tensor
        return leaves.take(tensor, found) if leaves is not None else found.take(tensor)

    def _slice(self, name: str, sizes: Sizes) -> Slice | None:
        """The part of a tensor at these sizes; None for all of it."""
        fixed = self.base.slices.get(name)
        if name not in self._carriers:
            return fixed
        dims, axes = self._carriers[name]
        key = (name, tuple(int(sizes.get(axis, axis.size)) for axis in axes))
        if key not in self._slices:
            chosen = {axis: torch.arange(sizes[axis]) for axis in axes if axis in sizes}
            cuts: dict[int, Any] = {d: row for d, row in enumerate(fixed.rows) if row is not None} if fixed else {}
            cuts |= {d: dim.indices(chosen) for d, dim in enumerate(dims) if any(a in chosen for a in dim.axes())}
            self._slices[key] = Slice.of(len(dims), cuts)
        return self._slices[key]

    def _numbers_at(self, sizes: Sizes, batch: Sequence[torch.Tensor]) -> list[int]:
        free = self._free_sizes(batch)
        key = (tuple(sizes.items()), tuple(free.items()))
        if key not in self._values:
            if len(self._values) >= _KEPT:
                self._values.clear()
            inside = {axis: sizes[twin] for axis, twin in self.twins.items() if twin in sizes}
            symbols = self.base.graph.symbols.substitution(free)
            self._values[key] = [
                _number(dim.size_at(inside), symbols) * (-1 if negative else 1)
                for dim, negative in (what for what in self._added if not isinstance(what, str))
            ]
        return self._values[key]

    def _free_sizes(self, batch: Sequence[torch.Tensor]) -> dict[str, int]:
        """The free sizes of the graph, read off the tensors of the batch."""
        return {name: int(batch[tensor].shape[dim]) for name, (tensor, dim) in self._free.items()}


def _places(graph: TrainingGraph) -> dict[str, tuple[int, int]]:
    """For each free size a tensor of the batch, and the dimension of it that has that size."""
    found: dict[str, tuple[int, int]] = {}
    for name, symbol in graph.symbols.symbols.items():
        for i, node in enumerate(graph.input_nodes(InputKind.BATCH).values()):
            for dim, size in enumerate(node.meta["val"].shape):
                if expression(size) == symbol:
                    found.setdefault(name, (i, dim))
    return found


_KEPT = 4096
"""Sets of numbers that a code keeps."""


def _number(size: Expr, symbols: Mapping[Any, Any]) -> int:
    return size if isinstance(size, int) else int(size.xreplace(symbols))


def _write(copy: fx.Node, literal: Literal, number: fx.Node) -> None:
    """Put a number in the place of a literal."""
    if literal.index is None:
        set_operand(copy, literal.argument, number)
        return
    position = [a.name for a in copy.target._schema.arguments].index(literal.argument)
    given: Any = copy.kwargs[literal.argument] if literal.argument in copy.kwargs else copy.args[position]
    set_operand(copy, literal.argument, [number if i == literal.index else g for i, g in enumerate(given)])
