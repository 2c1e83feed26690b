"""What operators do to axes: the functions and patterns that the table of operator rules names under ``axes``.

A rule is called with the analysis (`graphopt.graph.axes.propagation.Propagation`) and the node. It unifies what must
be the same, and returns the dimensions of the result: a tuple of factors, or a list of such tuples where the operator
has several results. Vocabulary: ATen before autograd (``linear``, ``scaled_dot_product_attention``) and ATen as joint
graphs hold it (``addmm``, backward operators).
"""

from __future__ import annotations

from graphopt.graph.op_rules.axis_rules import pointwise
from graphopt.graph.op_rules.axis_rules.pattern import AxisRule

_OF_FAMILIES: dict[str, AxisRule] = {
    "pointwise": pointwise.pointwise,
    "reduction": pointwise.reduction,
    "factory": pointwise.factory,
    "update": pointwise.lists,
    "number": pointwise.number,
}


def default_rule(family: str) -> AxisRule | None:
    """The axis rule of an operator whose entry names none: that of its family, None if it has none."""
    return _OF_FAMILIES.get(family)
