"""`OpRule`: what is known of an operator, and `entry`, by which the lists in ``entries`` name operators and facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules import masked_forms as masks
from graphopt.graph.op_rules.axis_rules.pattern import AxisRule, Pattern
from graphopt.graph.op_rules.reductions import Reducer
from graphopt.graph.sizes import expression

Condition = Callable[[SimpleNamespace], Any]


@dataclass(frozen=True)
class OpRule:
    """What is known of an operator.

    ``family``: what kind of operator it is. ``axes``: what it does to axes (`axis_rules`). ``flops``: from shapes,
    None where there are no multiply-adds. ``reduces``: what it sums, averages ... over (`reductions`), None where that
    follows from the family or is not known. ``reads``: operands whose values are needed only under a condition; all
    others are always needed. ``linear``: sets of operands in which the operator is linear together, joined by ``+``;
    alternatives are separated by ``|`` (``mul: "self | other"``, ``add: "self + other"``). ``draws``: when the operator
    draws random numbers; None: iff torch tags it. ``gathers``: operand of which only as many elements are read as the
    result has. ``stays``: results of the output mask that the kernel cannot leave out, under a condition. ``masked``:
    the form with a boolean mask in place of an operand.
    """

    family: str
    axes: AxisRule | None = None
    flops: cost.Formula | None = None
    reduces: Reducer | None = None
    reads: Mapping[str, Condition] = field(default_factory=dict)
    linear: str = ""
    draws: Condition | None = None
    gathers: str = ""
    stays: Mapping[int, Condition] = field(default_factory=dict)
    masked: masks.MaskedForm | None = None


Entry = tuple[str, OpRule]
"""Names of operators, separated by spaces, and the rule that they share."""


def entry(names: str, family: str, *, axes: AxisRule | str | None = None, **facts: Any) -> Entry:
    """One rule for all operators in ``names``: ATen operators, with an overload or without (``div.Tensor_mode``), or
    those of another namespace (``_c10d_functional::all_reduce``).

    Where ``axes`` is a text, it is a pattern (see `axis_rules.pattern`), from which FLOPs and sums follow.
    """
    if isinstance(axes, str):
        axes = Pattern(axes)
    if isinstance(axes, Pattern):
        facts.setdefault("reduces", axes.reductions)
        if axes.is_product:
            facts.setdefault("flops", axes.flops)
    return names, OpRule(family, axes=axes, **facts)


# -- conditions that many entries share ------------------------------------------------------------------------------


def never(a: SimpleNamespace) -> bool:
    """Whatever the arguments are: the operand lends its shape, strides and dtype only; nothing is drawn."""
    return False


def channels_last_on_cpu(a: SimpleNamespace) -> bool:
    """The operand ``input`` is on CPU and may take a kernel for channels-last memory."""
    value = a.input.meta["val"]
    return value.device.type == "cpu" and value.dim() >= 3 and expression(value.stride(1)) == 1


SHAPE_ONLY: dict[str, Condition] = {"self": never}
BETA: dict[str, Condition] = {"self": lambda a: a.beta != 0}  # beta = 0 ignores `self`, even its NaN
DROPOUT = lambda a: a.dropout_p != 0
MASK_0 = lambda a: a.output_mask[0]
MASK_1 = lambda a: a.output_mask[1]
MASK_0_OR_1 = lambda a: a.output_mask[0] or a.output_mask[1]
