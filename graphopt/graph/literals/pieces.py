"""Parts of a dimension, as dimensions: what lies before a border, the outer factors, the inner ones."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.graph.axes.axis import Dim, Form
from graphopt.graph.sizes import Expr, product

NOTHING = Dim(Form.CONCAT)
"""The dimension without an index."""


def times(parts: Iterable[Dim]) -> Dim:
    """The product of dimensions, flat."""
    flat = [p for part in parts for p in factors(part)]
    if any(p.size == 0 for p in flat):
        return NOTHING
    return flat[0] if len(flat) == 1 else Dim(Form.PRODUCT, tuple(flat))


def plus(parts: Iterable[Dim]) -> Dim:
    """The concatenation of dimensions, flat."""
    flat = [p for part in parts for p in (part.parts if part.form is Form.CONCAT else (part,))]
    return flat[0] if len(flat) == 1 else Dim(Form.CONCAT, tuple(flat))


def factors(dim: Dim) -> list[Dim]:
    """A dimension as a product of dimensions that are none, outermost first; none of size 1."""
    if dim.form is not Form.PRODUCT:
        return [dim]
    return [f for part in dim.parts for f in factors(part)]


def cut(dim: Dim, border: int) -> tuple[Dim, Dim] | None:
    """What lies before and behind a border; None where it lies inside of an axis, or sizes are not known."""
    if border == 0:
        return NOTHING, dim
    if border == dim.size:
        return dim, NOTHING
    if dim.form is Form.AXIS or not isinstance(dim.size, int):
        return None
    if dim.form is Form.CONCAT:
        return _cut_concat(dim, border)
    return _cut_product(factors(dim), border)


def _cut_concat(dim: Dim, border: int) -> tuple[Dim, Dim] | None:
    begin = 0
    for i, part in enumerate(dim.parts):
        end = begin + int(part.size)
        if border <= end:
            halves = cut(part, border - begin)
            return halves and (plus([*dim.parts[:i], halves[0]]), plus([halves[1], *dim.parts[i + 1 :]]))
        begin = end
    return None


def _cut_product(parts: list[Dim], border: int) -> tuple[Dim, Dim] | None:
    """Between two indices of the outer factor, or inside of one index that stands apart."""
    outer, rest = parts[0], parts[1:]
    index, inside = divmod(border, int(product(p.size for p in rest)))
    whole = cut(outer, index)
    if whole is None or not inside:
        return whole and (times([whole[0], *rest]), times([whole[1], *rest]))
    behind, below = cut(outer, index + 1), cut(times(rest), inside)
    if behind is None or below is None:
        return None
    return plus([times([whole[0], *rest]), below[0]]), plus([below[1], times([behind[1], *rest])])


def outer(dim: Dim, size: Expr) -> tuple[Dim, Dim] | None:
    """The outer factors whose sizes give ``size``, and the rest; None where no factors do."""
    parts = factors(dim)
    for i in range(len(parts) + 1):
        if product(p.size for p in parts[:i]) == size:
            return times(parts[:i]), times(parts[i:])
    return None
