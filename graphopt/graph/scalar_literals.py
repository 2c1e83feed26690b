"""`scalar_literals`: the numbers of a joint graph that are sizes in disguise, found by comparing it at other sizes.

The backward of a mean divides by how many it was a mean of (``div.Scalar(x, 96)``), that of a standard deviation
multiplies by ``2 / (96 - 1)``. No operator says what such a number is. But the backward derived from a resized forward
graph has the right ones: a number that is the same there is constant, and one that differs is explained by a size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import gcd, isclose
from typing import Any

import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes import Axes, Axis, Dim
from graphopt.graph.differentiate import with_backward
from graphopt.graph.literals.pieces import times
from graphopt.graph.literals.roles import Role, role_of
from graphopt.graph.op_rules.arguments import operand_names
from graphopt.graph.resize import resize
from graphopt.graph.training_graph import TrainingGraph

Number = int | float


@dataclass(frozen=True, eq=False)
class Scalar:
    """A number of a joint graph that follows a size: ``factor * (size of dim + offset) ** exponent``.

    ``dim`` is None, and ``refusal`` says so, where no size explains it.
    """

    node: fx.Node
    argument: str
    value: Number
    dim: Dim | None = None
    factor: float = 1.0
    offset: int = 0
    exponent: float = 1.0
    refusal: str = ""

    def at(self, sizes: Mapping[Axis, int]) -> Number:
        """Its value when some axes have other sizes. Raises AxisError where no size explains it."""
        if self.dim is None:
            raise AxisError(f"{self}: its value at other sizes is not known")
        size = self.dim.size_at(sizes)
        found = self.factor * (size + self.offset) ** self.exponent
        return round(found) if isinstance(self.value, int) else found

    def __str__(self) -> str:
        text = str(self.dim) if not self.offset else f"({self.dim} - {-self.offset})"
        text += f"**{self.exponent:g}" if self.exponent != 1 else ""
        text = f"{self.factor:g} * {text}" if not isclose(self.factor, 1) else text
        return f"{self.node.name}.{self.argument} = {self.value}: {self.refusal or text}"


def scalar_literals(
    forward: TrainingGraph, joint: TrainingGraph, axes: Axes, *, only: Collection[Axis] | None = None
) -> tuple[Scalar, ...]:
    """The numbers of ``joint`` that follow sizes of free axes; all others that are computed with are constant.

    Args:
        forward: of `capture_forward`.
        joint: `with_backward(forward)`.
        axes: of ``forward``.
        only: the axes whose sizes count; all free ones by default. Others keep theirs.

    Derives the backward twice more, from two graphs in which all free axes have other, distinct sizes: the first tells
    which size explains a number, the second must agree.

    Raises:
        AxisError: the backward at other sizes consists of other operators, or the forward graph cannot be resized.
    """
    free = [axis for axis in axes.groups() if axis.free and isinstance(axis.size, int) and axis.size > 1]
    free = [axis for axis in free if only is None or axis in only]
    for classes in ([[axis] for axis in free], _attended_alike(axes, free), _by_size(free)):
        chosen = [_sizes(classes, 0), _sizes(classes, len(classes))]
        others = [with_backward(_grown(forward, axes, sizes)) for sizes in chosen]
        if all(_alike(joint, other) for other in others):
            break
    else:
        raise AxisError("scalar_literals: at other sizes of its axes the backward of this graph has other operators")
    candidates = _candidates(axes, chosen)
    found = []
    for node, *twins in zip(_values(joint), *map(_values, others), strict=True):
        for (argument, value), *rest in zip(_numbers(node), *map(_numbers, twins), strict=True):
            values = [value, *(v for _, v in rest)]
            if any(v != value for v in values):
                found.append(_explained(node, argument, values, candidates))
    return tuple(found)


def _by_size(free: Sequence[Axis]) -> list[list[Axis]]:
    """Axes of equal sizes together: an operator may choose its kernel by whether two sizes are equal."""
    classes: dict[Any, list[Axis]] = {}
    for axis in free:
        classes.setdefault(axis.size, []).append(axis)
    return list(classes.values())


def _attended_alike(axes: Axes, free: Sequence[Axis]) -> list[list[Axis]]:
    """The axes of queries and values of one attention together: it takes another kernel where their sizes differ."""
    classes = {axis: [axis] for axis in free}
    for node in axes.graph.graph.find_nodes(op="call_function", target=_ATTENTION):
        ends = [axis for source in (node.args[0], node.args[2]) for axis in axes.of(source)[-1].axes()]
        tied = list(dict.fromkeys(a for end in ends if end in classes for a in classes[end]))
        classes.update(dict.fromkeys(tied, tied))
    return list({id(tied): tied for tied in classes.values()}.values())


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _sizes(classes: Sequence[Sequence[Axis]], skip: int) -> dict[Axis, int]:
    """A prime for each class, larger than all sizes there are, and none twice; the first ``skip`` primes are left. Axes
    of different sizes in a class keep their ratio."""
    limit = max((int(axis.size) for axes in classes for axis in axes), default=1)
    primes = _primes_after(limit)
    for _ in range(skip):
        next(primes)
    found = {}
    for axes, prime in zip(classes, primes):
        unit = gcd(*(int(axis.size) for axis in axes))
        found.update({axis: int(axis.size) // unit * prime for axis in axes})
    return found


def _primes_after(limit: int) -> Iterator[int]:
    number = limit
    while True:
        number += 1
        if all(number % d for d in range(2, int(number**0.5) + 1)):
            yield number


def _grown(forward: TrainingGraph, axes: Axes, sizes: Mapping[Axis, int]) -> TrainingGraph:
    """The graph with larger axes: indices come several times."""
    return resize(forward, axes, keep={axis: torch.arange(size) % int(axis.size) for axis, size in sizes.items()})


def _values(graph: TrainingGraph) -> list[fx.Node]:
    """The nodes but arithmetic of sizes that only sizes are made of: whoever reads a size is asked for its dimension
    (`literals`), and how sizes are computed depends on which of them are equal."""
    computed_with: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _is_size(node) and any(user in computed_with or _computes_with(user, node) for user in node.users):
            computed_with.add(node)
    return [n for n in graph.nodes if not _is_size(n) or n in computed_with]


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta["val"], torch.SymInt)


def _computes_with(node: fx.Node, number: fx.Node) -> bool:
    """Whether an operator on tensors, or a number that is no size, is computed of this number."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and not _is_size(node)
    return any(value is number and _role(node, name) is Role.VALUE for name, value in _given(node))


def _alike(a: TrainingGraph, b: TrainingGraph) -> bool:
    """Whether two graphs have the same operators, joined in the same way, with as many numbers each."""
    left, right = _values(a), _values(b)
    if len(left) != len(right):
        return False
    place = {node: i for nodes in (left, right) for i, node in enumerate(nodes)}
    return all(
        x.target == y.target
        and [place[n] for n in x.all_input_nodes if n in place] == [place[n] for n in y.all_input_nodes if n in place]
        and [n for n, _ in _numbers(x)] == [n for n, _ in _numbers(y)]
        for x, y in zip(left, right, strict=True)
        if x.op == "call_function"
    )


def _numbers(node: fx.Node) -> list[tuple[str, Number]]:
    """The numbers that a node computes with, by argument."""
    if node.op != "call_function":
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        given = [*node.args, *node.kwargs.values()]
        return [(str(i), v) for i, v in enumerate(given) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return [
        (name, value)
        for name, value in _given(node)
        if type(value) is float or (type(value) is int and _role(node, name) is Role.VALUE)
    ]


def _given(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The arguments of an operator, by name."""
    names = [*operand_names(node)[: len(node.args)], *node.kwargs]
    return zip(names, [*node.args, *node.kwargs.values()], strict=True)


def _role(node: fx.Node, argument: str) -> Role:
    assert isinstance(node.target, torch._ops.OpOverload)
    kinds = {a.name: str(a.real_type).lower() for a in node.target._schema.arguments}
    return role_of(node, argument, "int" not in kinds[argument])


@dataclass(frozen=True)
class _Candidate:
    """A dimension that changes, and its sizes: at capture and in each graph compared."""

    dim: Dim
    sizes: tuple[int, ...]


def _candidates(axes: Axes, chosen: Sequence[Mapping[Axis, int]]) -> list[_Candidate]:
    """Dimensions of the forward graph that change, and products of those of one tensor, the simplest first. Of those
    that grow alike one is enough: a fixed factor is found with the number."""
    found: dict[tuple[float, ...], _Candidate] = {}
    for node in axes.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        changing = [d for d in axes.of(node) if any(axis in chosen[0] for axis in d.axes())]
        for many in range(1, len(changing) + 1):
            for several in combinations(changing, many):
                dim = times(several)
                sizes = [dim.size_at(at) for at in ({}, *chosen)]
                if all(isinstance(s, int) for s in sizes):
                    numbers = tuple(int(s) for s in sizes)
                    found.setdefault(tuple(s / numbers[0] for s in numbers), _Candidate(dim, numbers))
    return sorted(found.values(), key=lambda c: len(list(c.dim.axes())))


def _explained(node: fx.Node, argument: str, values: Sequence[Number], candidates: Sequence[_Candidate]) -> Scalar:
    """The size that gives these values, one a graph."""
    for offset in (0, -1):
        for exponent in _EXPONENTS:
            for candidate in candidates:
                bases = [size + offset for size in candidate.sizes]
                factor = values[0] / bases[0] ** exponent
                if all(isclose(factor * b**exponent, v, rel_tol=1e-9) for b, v in zip(bases, values, strict=True)):
                    factor = round(factor) if isclose(factor, round(factor), rel_tol=1e-12) else factor
                    return Scalar(node, argument, values[0], candidate.dim, factor, offset, exponent)
    text = ", ".join(map(str, values))
    return Scalar(node, argument, values[0], refusal=f"no size explains its values {text} at other sizes")


_EXPONENTS = (1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 2.0, -2.0)
"""Counts, means, scales of attention (half of it on queries, half on keys), and what their backward makes of them."""
