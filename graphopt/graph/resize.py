"""`resize`: a forward graph with some of its axes smaller, in all places at once.

Placeholders get their new shapes, literals their new values (`graphopt.graph.literals`), constants are indexed, and
metadata are inferred anew, node by node, and compared with what the axes say. Numbers that the user computed from a
size in Python and wrote into the model as floats (``1 / math.sqrt(64)``) stay as they are: a graph does not show what
they are. The default scale of ``scaled_dot_product_attention`` follows the size by that operator's definition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes import Axes, Axis, Dim
from graphopt.graph.draft import Draft
from graphopt.graph.inferred import Inferred
from graphopt.graph.literals import Literal, Role, literals
from graphopt.graph.op_rules.arguments import operand, set_operand
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.text import node_text
from graphopt.graph.torch_internals import fake_like, fake_mode_of, symbolic, without_guards
from graphopt.graph.training_graph import TrainingGraph

if TYPE_CHECKING:
    from graphopt.graph.scalar_literals import Scalar

Sizes = Mapping[Axis | str, int]
Keep = Mapping[Axis | str, torch.Tensor]
_Order = tuple[tuple[int, ...], tuple[bool, ...]]
"""How a dense tensor lies in memory: its dimensions, those that run fastest first, and which are broadcast."""


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
    chosen = chosen_indices(axes, sizes, keep)
    if not chosen:
        return graph
    draft = Draft(graph)
    Resizer(axes).resize(draft, chosen, stay=stay)
    return draft.finish()


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
    carriers = axes.carriers()
    return {
        name: tuple(dims.get(d) for d in range(len(axes.of(carriers[name]))))
        for name, dims in cuts_of(axes, chosen).items()
    }


def cuts_of(axes: Axes, chosen: Mapping[Axis, torch.Tensor]) -> dict[str, dict[int, torch.Tensor]]:
    """Which indices remain of the dimensions of parameters, buffers and constants that change, int64."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, node in axes.carriers().items():
        for d, dim in enumerate(axes.of(node)):
            if _changes(dim, chosen):
                found.setdefault(name, {})[d] = dim.indices(chosen)
    return found


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
    strides = dense_strides(tensor.shape, like.stride())
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


def dense_strides(shape: Any, like: Any) -> list[Any]:
    """Dense strides for ``shape`` in the memory order of ``like``; what was broadcast (stride 0) stays so."""
    return _packed(shape, sorted(range(len(shape)), key=lambda d: (like[d], -d)), [s == 0 for s in like])


def _packed(shape: Any, order: Sequence[int], broadcast: Sequence[bool]) -> list[Any]:
    """Dense strides; ``order``: the dimensions, those that run fastest first."""
    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    outermost = next((d for d in reversed(order) if not broadcast[d]), None)
    for d in order:
        if not broadcast[d]:
            strides[d] = step
            if d != outermost:
                step = step * (shape[d] or 1) if isinstance(shape[d], int) else step * shape[d]
    return strides


class Resizer:
    """Changes the sizes of axes in drafts of one graph. What is asked of the graph is asked once: made for many sizes.

    Args:
        axes: of the graph.
        scalars: numbers of a joint graph that are sizes in disguise, see `graphopt.graph.scalar_literals`.
    """

    def __init__(self, axes: Axes, scalars: Sequence[Scalar] = ()):
        self.axes, self.graph = axes, axes.graph
        self._literals: dict[fx.Node, list[Literal]] = {}
        self._refused: dict[Axis, Literal] = {}
        self.computed: set[Literal] = set()  # by arithmetic on sizes, some of which may change where it does not
        explained = {(scalar.node, scalar.argument) for scalar in scalars}
        for literal in literals(self.graph, axes):
            if (literal.node, literal.argument) in explained or not literal.axes:
                continue
            self._literals.setdefault(literal.node, []).append(literal)
            if literal.refusal:
                for axis in literal.axes:
                    self._refused.setdefault(axis, literal)
            elif _is_computed(literal):
                self.computed.add(literal)
        self._scalars: dict[fx.Node, list[Scalar]] = {}
        for scalar in scalars:
            self._scalars.setdefault(scalar.node, []).append(scalar)
        self._forms: dict[fx.Node, _Form] = {}
        self._fakes: dict[Any, torch.Tensor] = {}
        self.inferred = Inferred()
        self._mode = fake_mode_of([node.meta.get("val") for node in self.graph.placeholders])

    def refusal(self, axis: Axis) -> str:
        """Why the graph cannot be rewritten for another size of an axis: a number of which it is not known what it
        means. Empty if it can."""
        literal = self._refused.get(axis)
        return "" if literal is None else f"{node_text(literal.node, self.graph.symbols)}: its argument {literal}"

    def resize(
        self, draft: Draft, chosen: Mapping[Axis, torch.Tensor], *, stay: Collection[str] = (), checked: bool = True
    ) -> None:
        """Change axes in a draft of the graph, in which operators may be erased already.

        Args:
            draft: is rewritten.
            chosen: the indices of axes that remain; the axes are free.
            stay: as for `resize`.
            checked: whether new metadata come from running each operator without data, and are compared with what the
                axes say. Otherwise they are made from the sizes of axes, in the memory order that the value has in the
                graph; operators of which that is not known are run.

        Raises:
            AxisError: as `resize`.
        """
        if chosen:
            _Resizing(self, draft, chosen, stay, checked).run()

    def fake(self, like: torch.Tensor, shape: tuple[Expr, ...], how: _Order) -> torch.Tensor:
        """A fake tensor of this shape, dense in this order; one for all values that look alike."""
        key = (shape, how, like.dtype, like.device)
        found = self._fakes.get(key)
        if found is None:
            sizes = [s if isinstance(s, int) else symbolic(like, s) for s in shape]
            found = self._fakes[key] = fake_like(like, sizes, _packed(sizes, *how))
        return found

    def form(self, node: fx.Node) -> _Form:
        """What is known of a node's values."""
        found = self._forms.get(node)
        if found is None:
            found = self._forms[node] = _Form.of(node, self.axes.of(node), self.graph.symbols.evaluate)
        return found


def _is_computed(literal: Literal) -> bool:
    """Whether an argument is computed from sizes (``x.size(0) // 4``), rather than a number or a size as it is."""
    given: Any = operand(literal.node, literal.argument)
    given = given if literal.index is None else given[literal.index]
    return isinstance(given, fx.Node) and given.target is not torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class _Form:
    """The values of a node: their dimensions, the axes in them, and how they lie in memory.

    ``orders``: of each tensor the dimensions, those that run fastest first, and which are broadcast; None where it is
    not dense (a part of another one).
    """

    dims: tuple[tuple[Dim, ...], ...]
    axes: frozenset[Axis]
    orders: tuple[_Order | None, ...]

    @staticmethod
    def of(node: fx.Node, dims: tuple[Any, ...], number: Callable[[Any], int]) -> _Form:
        value = node.meta["val"]
        several = isinstance(value, (list, tuple))
        pairs = list(zip(value, dims)) if several else [(value, dims)]
        pairs = [(v, d) for v, d in pairs if isinstance(v, torch.Tensor)]
        axes = frozenset(axis for _, dims in pairs for dim in dims for axis in dim.axes())
        orders = tuple(_order([number(s) for s in v.shape], [number(s) for s in v.stride()]) for v, _ in pairs)
        return _Form(tuple(tuple(d) for _, d in pairs), axes, orders)


def _order(shape: list[int], strides: list[int]) -> _Order | None:
    order = sorted(range(len(shape)), key=lambda d: (strides[d], -d))
    broadcast = [stride == 0 for stride in strides]
    dense = _packed(shape, order, broadcast)
    return (tuple(order), tuple(broadcast)) if all(a == b or s == 1 for a, b, s in zip(dense, strides, shape)) else None


class _Resizing:
    """One change of sizes in one draft."""

    def __init__(
        self, resizer: Resizer, draft: Draft, chosen: Mapping[Axis, torch.Tensor], stay: Collection[str], checked: bool
    ):
        self.resizer, self.draft, self.chosen, self.stay, self.checked = resizer, draft, chosen, stay, checked
        self.axes, self.graph = resizer.axes, resizer.graph
        self.sizes = {axis: len(indices) for axis, indices in chosen.items()}
        self.mode = resizer._mode

    def run(self) -> None:
        alive = set(self.draft.graph.nodes)
        self.found: dict[fx.Node, list[Literal]] = {}
        for node, several in self.resizer._literals.items():
            computed = self.resizer.computed
            touched = [x for x in several if x in computed or not x.axes.isdisjoint(self.sizes)]
            if touched and self.draft.node(node) in alive:
                for literal in touched:
                    if literal.refusal and not (literal.role is Role.VALUE and node.name in self.stay):
                        self._refuse(node, f"its argument {literal}")
                self.found[node] = touched
        self.numbers: dict[Any, Any] = {}
        self.changed: set[fx.Node] = set()
        self.other: set[fx.Node] = set()  # whose memory order is not that of the graph
        with without_guards(self.mode) if self.mode is not None else nullcontext():
            for node in self.graph.graph.nodes:
                if self.draft.node(node) not in alive:
                    continue
                if node.op == "placeholder" or node.op == "get_attr":
                    self._input(node)
                elif node.op == "call_function":
                    self._operator(node)
        for node in reversed(self.draft.graph.nodes):  # arithmetic of sizes that nobody reads any more
            if node.op == "call_function" and not node.users and isinstance(node.meta["val"], torch.SymInt):
                self.draft.graph.erase_node(node)

    def _input(self, node: fx.Node) -> None:
        value, copy = node.meta.get("val"), self.draft.node(node)
        if not isinstance(value, torch.Tensor) or self.resizer.form(node).axes.isdisjoint(self.sizes):
            return
        dims = self.axes.of(node)
        shape = [d.size_at(self.sizes) if _changes(d, self.chosen) else s for d, s in zip(dims, value.shape)]
        if any(not isinstance(expression(s), int) for s in shape):
            self._refuse(node, "it has a free size too")
        copy.meta["val"] = fake_like(value, shape, dense_strides(shape, value.stride()))
        self.changed.add(copy)
        if node.op == "get_attr":
            name = str(node.target)
            rows = tuple(_indices(d, self.chosen) for d in dims)
            self.draft.constants[name] = _taken(name, self.graph.constants[name], rows)

    def _operator(self, node: fx.Node) -> None:
        copy, found = self.draft.node(node), self.found.get(node, [])
        for literal in found:
            if not literal.refusal:
                self._rewrite(copy, literal)
        for scalar in self.resizer._scalars.get(node, ()):
            if scalar.dim is None or _changes(scalar.dim, self.chosen):
                set_operand(copy, scalar.argument, scalar.at(self.sizes))
        if node.target in EVEN_PIECES:
            copy.target, copy.args, copy.kwargs = self._pieces(node, copy)
        if not self.checked and self._known(node, copy):
            return
        if not found and self.changed.isdisjoint(copy.all_input_nodes):
            return
        try:
            self.resizer.inferred.infer(self.draft, copy)
        except Exception as error:
            self._refuse(node, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        self.changed.add(copy)
        self._compare(node, copy)

    def _known(self, node: fx.Node, copy: fx.Node) -> bool:
        """Give the node its metadata without running its operator. False where it has to run."""
        if node.target is getitem:
            source, index = copy.args
            if source in self.changed or source in self.other:
                copy.meta["val"] = source.meta["val"][index]  # type: ignore[union-attr]
                (self.other if source in self.other else self.changed).add(copy)
            return True
        form = self.resizer.form(node)
        if not self.other.isdisjoint(copy.all_input_nodes):
            return False
        if form.axes.isdisjoint(self.sizes):
            dense = bool(form.dims) and None not in form.orders
            return dense or self.changed.isdisjoint(copy.all_input_nodes)
        orders = [how for how in form.orders if how is not None]
        if len(orders) < len(form.orders) or (node.target is _ATTENTION and not self._same_kernel(node)):
            return False
        value = node.meta["val"]
        several = isinstance(value, (list, tuple))
        rest = iter(zip(form.dims, orders))
        made = [
            self._made(v, *next(rest)) if isinstance(v, torch.Tensor) else v for v in (value if several else [value])
        ]
        copy.meta["val"] = type(value)(made) if several else made[0]
        self.changed.add(copy)
        return True

    def _made(self, value: torch.Tensor, dims: tuple[Dim, ...], how: _Order) -> torch.Tensor:
        if not any(_changes(d, self.chosen) for d in dims):
            return value
        shape = tuple(
            d.size_at(self.sizes) if _changes(d, self.chosen) else expression(s) for d, s in zip(dims, value.shape)
        )
        return self.resizer.fake(value, shape, how)

    def _same_kernel(self, node: fx.Node) -> bool:
        """Whether an attention runs by the same kernel: where no head size changes."""
        ends = [self.axes.of(source)[-1] for source in node.args[:3]]  # type: ignore[arg-type]
        return not any(_changes(end, self.chosen) for end in ends)

    def _rewrite(self, copy: fx.Node, literal: Literal) -> None:
        new = literal.at(self.sizes)
        given: Any = operand(copy, literal.argument)
        now = given if literal.index is None else given[literal.index]
        if new == (expression(now.meta["val"]) if isinstance(now, fx.Node) else literal.value):
            return
        if literal.index is None:
            set_operand(copy, literal.argument, self._number(new, given, copy))
            return
        changed = [self._number(new, g, copy) if i == literal.index else g for i, g in enumerate(given)]
        set_operand(copy, literal.argument, changed)

    def _number(self, new: Expr, old: Any, like: fx.Node) -> Any:
        """A size as an argument in the place of ``old``; readers of one computed size share the new one too."""
        if isinstance(new, int):
            return new
        key = (old, new)
        if key not in self.numbers:
            self.numbers[key] = self.draft.size(new, like=like)
        return self.numbers[key]

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
        orders = self.resizer.form(node).orders
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if any(how is not None and not _lies(v, *how) for v, how in zip(tensors, orders)):
            self.other.add(copy)

    def _refuse(self, node: fx.Node, why: str) -> None:
        sizes = ", ".join(f"{axis!r} from {axis.size} to {new}" for axis, new in self.sizes.items())
        raise AxisError(f"cannot change {sizes}: {node_text(node, self.graph.symbols)}: {why}")


def _lies(value: torch.Tensor, order: Sequence[int], broadcast: Sequence[bool]) -> bool:
    """Whether a fake tensor is dense in this order."""
    wanted = _packed(value.shape, order, broadcast)
    return all(
        expression(a) == expression(b) or expression(s) == 1 for a, b, s in zip(value.stride(), wanted, value.shape)
    )


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
EVEN_PIECES = {
    torch.ops.aten.split.Tensor,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.chunk.default,
    torch.ops.aten.unsafe_chunk.default,
}
