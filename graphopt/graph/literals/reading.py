"""`literals`: every integer among the arguments of a graph as an expression over axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.graph.axes import Axes, Axis, Dim
from graphopt.graph.literals.dimensions import DIMENSIONS, Reader
from graphopt.graph.literals.pieces import cut, outer
from graphopt.graph.literals.roles import Role, role_of
from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.training_graph import TrainingGraph

_CALCULATED = (int, torch.SymInt)


@dataclass(frozen=True, eq=False)
class Literal:
    """An integer argument of a node, or a size that nodes before it compute from a free size.

    ``index`` is its position where the argument is a list. ``dim``: the dimension whose size it is (of a negative
    place: counted from the end, `negative`); None where it is proved to be no size (``constant``), and where it is not
    known what it means (``refusal`` says why). What a refused literal touches must not change: ``touches``.
    """

    node: fx.Node
    argument: str
    index: int | None
    value: Expr
    role: Role
    dim: Dim | None = None
    negative: bool = False
    refusal: str = ""
    touches: frozenset[Axis] = frozenset()

    @property
    def constant(self) -> bool:
        """Whether no axis decides it."""
        return self.dim is None and not self.refusal

    @property
    def axes(self) -> frozenset[Axis]:
        """The axes that decide it, or that must stay because it is refused."""
        return frozenset(self.dim.axes()) if self.dim is not None else self.touches

    def at(self, sizes: Mapping[Axis, int]) -> Expr:
        """Its value when some axes have other sizes; what no axis decides stays."""
        if self.dim is None or self.axes.isdisjoint(sizes):
            return self.value
        size = self.dim.size_at(sizes)
        return -size if self.negative else size

    def __str__(self) -> str:
        place = f"{self.argument}[{self.index}]" if self.index is not None else self.argument
        meaning = self.refusal or ("constant" if self.dim is None else f"{'-' * self.negative}{self.dim}")
        return f"{self.node.name}.{place} = {self.value}: {meaning}"


def literals(graph: TrainingGraph, axes: Axes) -> tuple[Literal, ...]:
    """Every integer among the arguments of the operators of ``graph``, in order.

    Sizes and places are expressions over axes, read off the dimensions of operands and results; see
    `graphopt.graph.literals.roles` for what each argument means. Dimension numbers, strides, modes and the like are
    constant. Numbers that are computed with (``x / 96``) cannot be told from their operator: they are constant unless
    they equal the size of a dimension at hand; then they are refused.

    Example:
        >>> import torch
        >>> from graphopt.graph.axes import analyse
        >>> from graphopt.graph.forward import capture_forward
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        >>> graph = capture_forward(net, torch.randn(5, 4))
        >>> print(*literals(graph, analyse(graph)), sep="\\n")
        layer_norm.normalized_shape[0] = 8: 0.hidden
    """
    axes.groups()
    return tuple(found for node in graph.nodes if node.op == "call_function" for found in of_node(axes, node))


def of_node(axes: Axes, node: fx.Node) -> Iterator[Literal]:
    """The literals of one node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return  # getitem; arithmetic of sizes: whoever reads the result is asked for its dimension
    types = {a.name: str(a.real_type) for a in node.target._schema.arguments}
    read = _Literals(axes, node)
    for position, argument in enumerate(operand_names(node)):
        given: Any = node.kwargs.get(argument, node.args[position] if position < len(node.args) else None)
        role = role_of(node, argument, "int" not in types[argument].lower())
        several = isinstance(given, (list, tuple))
        for index, item in enumerate(given if several else [given]):
            value = _value(item)
            if value is not None:
                yield read.literal(argument, index if several else None, value, role, len(given) if several else 1)


def _value(item: Any) -> Expr | None:
    """An integer, or the size that a node computes; None for anything else."""
    if isinstance(item, fx.Node):
        item = item.meta["val"]
    if isinstance(item, bool) or not isinstance(item, _CALCULATED):
        return None
    return expression(item)


class _Literals(Reader):
    """Makes the literals of a node."""

    def literal(self, argument: str, index: int | None, value: Expr, role: Role, count: int) -> Literal:
        def made(dim: Dim | None = None, negative: bool = False, refusal: str = "", touches: Any = ()) -> Literal:
            if dim is not None and not any(True for _ in dim.axes()):
                dim = None
            return Literal(
                self.node, argument, index, value, role, dim, negative, refusal, frozenset(touches or self.touched())
                if refusal else frozenset(),
            )  # fmt: skip

        if role is Role.CONSTANT or (value == -1 and role in _INFERRED):
            return made()
        if role is Role.VALUE:
            suspects = self._same_size(value)
            return made(refusal="a number that may be a size", touches=suspects) if suspects else made()
        if role is Role.UNKNOWN:
            return made(refusal=f"no role is known for the argument {argument} of {self.node.target}")
        if role in (Role.POSITION, Role.STEP):
            dim, negative, free = self._place(argument, value)
            if free:
                return made()
        else:
            dim = DIMENSIONS[role](self, argument, index or 0, value, count)
            negative = role is Role.EDGE
        if dim is not None and (-dim.size if negative else dim.size) == value:
            return made(dim, negative)
        if dim is None and role is Role.EDGE:
            return made()
        return made(refusal=f"{value} is not the {role}" + (f" ({dim}: {dim.size})" if dim is not None else ""))

    def _place(self, argument: str, value: Expr) -> tuple[Dim | None, bool, bool]:
        """What lies before a place (behind it, for a negative one), and whether the place is that of no index."""
        if argument == "step" and value == 1:
            return None, False, True
        whole = self.whole()
        size = whole.size
        if not isinstance(size, int) or not isinstance(value, int):
            return (whole if size == value else None), False, value == 0 or (isinstance(value, int) and value >= _LAST)
        step = operand(self.node, "step") if "step" in operand_names(self.node) else 1
        if argument == "step":
            parts = outer(whole, size // step) if step > 1 and size % step == 0 else None
            return (parts[1] if parts else None), False, False
        if value == 0 or (argument == "end" and value >= size):
            # an end that is exactly the size is written as it was: eager's own slices say it so
            return (whole if value == size else None), False, value != size
        if step != 1:
            parts = outer(whole, size // step) if size % step == 0 else None
            halves = cut(parts[1], value) if parts and 0 < value < step else None
            return (halves[0] if halves else None), False, False
        halves = cut(whole, value + size if value < 0 else value)
        if halves is None:
            return None, False, False
        return (halves[1], True, False) if value < 0 else (halves[0], False, False)

    def _same_size(self, value: Expr) -> frozenset[Axis]:
        """Axes of dimensions at hand that are as large as a number: of the operands, and of what those reduced."""
        number = abs(value) if isinstance(value, int) else value
        if isinstance(number, int) and number < 2:
            return frozenset()
        found: set[Axis] = set()
        waiting, seen = [(n, 0) for n in self.node.all_input_nodes], set()
        while waiting:
            node, depth = waiting.pop()
            if node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            seen.add(node)
            dims = self.axes.of(node)
            for dim in dims:
                if dim.size == number:
                    found.update(dim.axes())
            if depth < _NEAR:
                waiting += [(n, depth + 1) for n in node.all_input_nodes]
        return frozenset(found)


_LAST = 2**62
_NEAR = 3
"""How many operators back a number is compared with the sizes of dimensions."""

_INFERRED = {Role.RESULT, Role.TOLD}
