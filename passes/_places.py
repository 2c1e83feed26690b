"""Where a part of the batch lies in the whole: the inputs that say so, and numbers computed from them.

In a graph that is divided along the batch the free size ``batch`` is that of a processor's own part. More numbers
are inputs (`InputKind.PLACE`), so that one graph serves every processor and parts may be of unequal size:
``batch.total``, the rows of the whole batch, and as they are needed ``batch.begin``, the index of the part's first row
in it, ``batch.part``, the rows of the part (where no input has them) and ``batch.most``, those of the largest part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from operator import add, mul
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft, infer
from graphopt.graph.literals.roles import Role, role_of
from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.sizes import Expr, Symbols, expression
from graphopt.graph.torch_internals import new_size
from graphopt.graph.training_graph import Input, InputKind, Phase

TOTAL, BEGIN, PART, MOST = "total", "begin", "part", "most"


class Numbers:
    """Numbers of sizes in one draft of a graph that is whole; `Places` are those where an axis is divided."""

    def __init__(self, draft: Draft):
        self.draft = draft
        self._numbers: dict[Any, fx.Node] = {}
        self._made: set[fx.Node] = set()

    def whole(self, value: Any) -> Expr:
        """The expression of a size for the whole of each axis."""
        return expression(value)

    def number(self, expr: Expr) -> int | fx.Node:
        """A node that computes this expression of sizes of the graph; an int where it is one.

        Raises PassError for what is no sum or product of sizes and integers.
        """
        expr = expression(expr)
        if isinstance(expr, int):
            return expr
        if expr not in self._numbers:
            if isinstance(expr, sympy.Symbol):
                node = self._size(expr)
            elif isinstance(expr, (sympy.Add, sympy.Mul)):
                operator = add if isinstance(expr, sympy.Add) else mul
                parts = [self.number(part) for part in expr.args]
                node = reduce(lambda a, b: self.call(operator, a, b), parts)  # type: ignore[arg-type, assignment]
            else:
                raise PassError(f"cannot write the size {self.draft.signature.symbols.rename(expr)} as operators")
            self._numbers[expr] = node  # type: ignore[assignment]
        return self._numbers[expr]

    def _size(self, symbol: sympy.Symbol) -> fx.Node:
        """A free size of the graph, read off an input."""
        for node in self.draft.placeholders:
            shape = getattr(node.meta.get("val"), "shape", ())
            if dims := [i for i, size in enumerate(shape) if expression(size) == symbol]:
                return self.call(torch.ops.aten.sym_size.int, node, dims[0])
        raise PassError(f"no input has the size {symbol}")

    def call(self, operator: Callable[..., Any], *args: Any) -> fx.Node:
        """Arithmetic on numbers, before all operators on tensors; made once."""
        if (operator, args) in self._numbers:
            return self._numbers[operator, args]
        first = next(n for n in self.draft.graph.nodes if n.op != "placeholder" and n not in self._made)
        with self.draft.graph.inserting_before(first):
            node = self.draft.graph.call_function(operator, args)
        value = infer(node) if isinstance(operator, torch._ops.OpOverload) else operator(*map(_value, args))
        node.meta.update(val=value, phase=Phase.FORWARD, module="", source="")
        self._made.add(node)
        self._numbers[operator, args] = node
        return node

    def twin(self, node: fx.Node) -> int | fx.Node:
        """The number that ``node`` (one of the draft that computes numbers of sizes) would be for the whole."""
        return node


class Places(Numbers):
    """The inputs of one draft that say where a part lies, and the numbers that are made of them.

    ``symbol`` is that of the part's size, ``total`` that of the whole. Makes the input ``batch.total`` at once and
    ``batch.begin`` when it is first asked for.
    """

    def __init__(self, draft: Draft, axis: str, processors: int):
        super().__init__(draft)
        self.axis = axis
        symbols = draft.signature.symbols
        self.symbol = symbols.symbols[axis]
        several = symbols.hints[axis] * processors
        hint = several if symbols.admits({axis: several}) else symbols.hints[axis]  # guards hold for the whole
        made = new_size([n.meta.get("val") for n in draft.graph.nodes], f"{axis}.{TOTAL}", hint)
        self.total = made.node.expr
        self._numbers[self.total] = draft.add_input(Input(InputKind.PLACE, axis, TOTAL), made)
        self._given: dict[str, fx.Node] = {}
        self._size_of_part = next(
            size
            for n in draft.placeholders
            for size in getattr(n.meta.get("val"), "shape", ())
            if expression(size) == self.symbol
        )
        name = f"{axis}.{TOTAL}"
        draft.signature = replace(
            draft.signature,
            symbols=Symbols(
                {**symbols.symbols, name: self.total},
                {**symbols.hints, name: hint},
                tuple(guard.xreplace({self.symbol: self.total}) for guard in symbols.guards),
            ),
        )

    def whole(self, value: Any) -> Expr:
        """The expression of a size for the whole batch, from that of a part."""
        found = expression(value)
        return found if isinstance(found, int) else expression(found.xreplace({self.symbol: self.total}))

    def begin(self, times: Expr = 1) -> fx.Node:
        """The index of the part's first row in the whole, times a size."""
        begin = self._input(BEGIN, 0)
        return begin if times == 1 else self.call(mul, begin, self.number(times))

    def most(self) -> fx.Node:
        """The rows of the largest part. In metadata it is the part's own size: they are those of the largest part."""
        return self._input(MOST, self._size_of_part)

    def _size(self, symbol: sympy.Symbol) -> fx.Node:
        """As `Numbers._size`; where every input is whole, the size of the part is an input of its own."""
        read_off = any(
            expression(size) == symbol
            for node in self.draft.placeholders
            for size in getattr(node.meta.get("val"), "shape", ())
        )
        return super()._size(symbol) if read_off or symbol != self.symbol else self._input(PART, self._size_of_part)

    def _input(self, field: str, value: Any) -> fx.Node:
        if field not in self._given:
            self._given[field] = self.draft.add_input(Input(InputKind.PLACE, self.axis, field), value)
        return self._given[field]

    def twin(self, node: fx.Node) -> int | fx.Node:
        """The number that ``node`` (one of the draft that computes numbers of sizes) would be for the whole batch."""
        value = node.meta["val"]
        found = value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
        if not isinstance(found, sympy.Basic) or self.symbol not in found.free_symbols:
            return node
        if isinstance(value, torch.SymInt):
            wanted = self.whole(value)
            if _plain(wanted):
                return self.number(wanted)
        if isinstance(node.target, torch._ops.OpOverload):
            raise PassError(f"cannot tell what {node.name} ({node.target}) is for the whole batch")
        key = ("twin", node)
        if key not in self._numbers:
            args = [self.twin(a) if isinstance(a, fx.Node) else a for a in node.args]
            self._numbers[key] = self.call(node.target, *args)  # type: ignore[arg-type]
        return self._numbers[key]


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _plain(expr: sympy.Basic) -> bool:
    """Whether an expression is made of sums and products of symbols and integers."""
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        return all(map(_plain, expr.args))
    return isinstance(expr, (sympy.Symbol, sympy.Integer))


def computed_numbers(node: fx.Node) -> Iterator[tuple[str, int | None, Role, fx.Node]]:
    """The operands of an operator on tensors that are numbers computed in the graph: argument, position in it where
    that is a list, what each says, and the node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    types = {a.name: str(a.real_type).lower() for a in node.target._schema.arguments}
    for name in operand_names(node):
        given = operand(node, name)
        several = isinstance(given, (list, tuple))
        for index, value in enumerate(given if several else [given]):
            if isinstance(value, fx.Node) and isinstance(value.meta["val"], (torch.SymInt, torch.SymFloat)):
                computed_with = "int" not in types[name]
                role = Role.VALUE if computed_with else role_of(node, name, False)
                yield name, index if several else None, role, value
