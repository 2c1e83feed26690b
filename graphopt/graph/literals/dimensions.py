"""Which dimension an argument is the size of: one rule a role (`graphopt.graph.literals.roles`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphopt.graph.axes import Axes, Axis, Dim
from graphopt.graph.literals.pieces import cut, outer, times
from graphopt.graph.literals.roles import Role
from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.sizes import Expr


class Reader:
    """The dimensions around a node, for the rules below."""

    def __init__(self, axes: Axes, node: fx.Node):
        self.axes, self.node = axes, node

    # -- dimensions at hand ---------------------------------------------------------------------------------------

    def of(self, name: str | int) -> tuple[Dim, ...]:
        """Dimensions of an operand, by name or position."""
        given = operand(self.node, name) if isinstance(name, str) else self.node.args[name]
        if not isinstance(given, fx.Node):
            return ()
        found = self.axes.of(given)
        return () if found and isinstance(found[0], tuple) else found

    def result(self, index: int = 0) -> tuple[Dim, ...]:
        """Dimensions of the result, or of one of several."""
        found = self.axes.of(self.node)
        return found[index] if isinstance(self.node.meta["val"], (list, tuple)) else found

    def along(self, dims: tuple[Dim, ...]) -> Dim:
        """The dimension that the node works along."""
        names = operand_names(self.node)
        return dims[operand(self.node, "dim" if "dim" in names else "dimension")]

    def whole(self) -> Dim:
        """The dimension that places lie in: of the operand, or of the result that is made around it."""
        backward = str(self.node.target._opname).endswith("_backward")
        return self.along(self.result() if backward else self.of(0))

    def touched(self) -> frozenset[Axis]:
        """All axes of operands and results."""
        found: set[Axis] = set()
        for node in (self.node, *self.node.all_input_nodes):
            for dims in self.axes.of(node):
                for dim in dims if isinstance(dims, tuple) else (dims,):
                    found.update(dim.axes())
        return frozenset(found)


def _result(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    dims = see.result()
    return dims[index] if index < len(dims) else None


def _result_last(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    dims = see.result()
    return dims[index - count] if count <= len(dims) else None


def _operand_last(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    names = operand_names(see.node)
    return see.of("input" if "input" in names else 0)[index - count]


def _copies(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    """Copies stand outside (``repeat``) or inside (``repeat_interleave``) of what is copied."""
    dims, result = see.of(0), see.result()
    if "dim" in operand_names(see.node):
        at = operand(see.node, "dim")
        whole, size = result[at or 0], see.along(dims).size if at is not None else None
        parts = (
            outer(whole, int(whole.size) // int(value)) if size is not None and isinstance(whole.size, int) else None
        )
        return parts[1] if parts else None
    parts = outer(result[index - count], value)
    return parts[0] if parts else None


def _groups(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    names = operand_names(see.node)
    source = see.of("input" if "input" in names else 0)
    rank = len(see.of("weight")) - 2 if "weight" in names and "conv" in str(see.node.target) else len(source) - 2
    channels = source[-rank - 1] if len(source) > rank else source[0]
    parts = outer(channels, value) if isinstance(value, int) else None
    return parts[0] if parts else None


def _piece(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    """The size of one piece: that of the first, or of the whole where there is only one."""
    return see.along(see.result(index))


def _length(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    return see.along(see.result())


def _edge(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    """What is added has no axis outside of the result; what is cut off is a piece of the operand."""
    if not isinstance(value, int) or value >= 0:
        return None
    whole = see.of(0)[-1 - index // 2]
    size = whole.size
    halves = cut(whole, -value if index % 2 == 0 else size + value) if isinstance(size, int) else None
    return halves[index % 2] if halves else None


def _window(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    return see.result()[-1]


_TOLD: dict[str, Callable[[Reader, int], Dim]] = {
    "N": lambda see, index: see.of("input")[0],
    "C": lambda see, index: see.of("input")[1],
    "HxW": lambda see, index: times(see.of("input")[2:]),
    "hidden_size": lambda see, index: (
        see.result(0)[-1] if "backward" not in str(see.node.target) else see.of("hx_")[-1]
    ),
    "bias_sizes": lambda see, index: see.of("grad_output")[1],
    "sizes": lambda see, index: see.result()[operand(see.node, "dim") % len(see.of(0)) + index],
}


def _told(see: Reader, argument: str, index: int, value: Expr, count: int) -> Dim | None:
    return _TOLD[argument](see, index)


DIMENSIONS: dict[Role, Callable[[Reader, str, int, Expr, int], Dim | None]] = {
    Role.RESULT: _result,
    Role.RESULT_LAST: _result_last,
    Role.OPERAND_LAST: _operand_last,
    Role.COPIES: _copies,
    Role.GROUPS: _groups,
    Role.PIECE: _piece,
    Role.PIECES: _piece,
    Role.LENGTH: _length,
    Role.EDGE: _edge,
    Role.WINDOW: _window,
    Role.TOLD: _told,
}
