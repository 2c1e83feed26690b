"""What the table says of a node of a training graph, given its actual arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.op_rules.arguments import arguments, operand, operand_names, operand_nodes, set_operand
from graphopt.graph.op_rules.masked_forms import MaskedForm
from graphopt.graph.op_rules.op_rule import OpRule
from graphopt.graph.op_rules.reductions import Reduction, by_name
from graphopt.graph.op_rules.table import NAMED, RULES
from graphopt.graph.sizes import Expr, nbytes
from graphopt.graph.storages import is_view, returns_view, tensors

_VIEW = OpRule("view", linear="self")
_POINTWISE, _REDUCTION, _FACTORY, _FOREACH = map(OpRule, ("pointwise", "reduction", "factory", "update"))
_NUMBER = OpRule("number")  # arithmetic of sizes and hyper-parameters

_MASK_NAMES = {"output_mask", "grad_input_mask", "mask"}


def rule(node: fx.Node) -> OpRule | None:
    """The rule of the node's operator: its entry in `RULES`, or that of its family by torch's tags and schema.

    None for an operator that nothing is known of; then the queries below give the safe answer: every operand is read,
    it is linear in nothing.
    """
    if node.op != "call_function":
        return None
    operator = node.target
    if isinstance(operator, torch._ops.OpOverload):
        found = RULES.get(operator) or RULES.get(operator.overloadpacket) or NAMED.get(operator._schema.name)
        if found is not None:
            return found
    return _family(operator)


@cache
def _family(operator: Any) -> OpRule | None:
    """The rule of an operator without an entry."""
    if operator is getitem:
        return _VIEW
    if not isinstance(operator, torch._ops.OpOverload):
        known = not isinstance(operator, torch._ops.OperatorBase)
        return _NUMBER if known else None
    if returns_view(operator):
        return _VIEW
    if torch.Tag.pointwise in operator.tags:
        return _POINTWISE
    if torch.Tag.reduction in operator.tags:
        return _REDUCTION
    if operator.namespace == "aten":
        if operator._opname.startswith(("_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad")):
            return _FOREACH
        if not any("Tensor" in str(a.type) for a in operator._schema.arguments):
            return _FACTORY
    return None


def flops(node: fx.Node) -> Expr:
    """Floating point operations of the node: 2 for each multiply-add of a contraction, a convolution or attention.

    The same numbers as ``torch.utils.flop_counter``, and like there pointwise operators, reductions and normalisations
    count 0: bytes are their price. Beyond it, CPU flash attention, fused recurrent layers, grouped and matrix-vector
    products are counted (docs/flops.md). An int, or a sympy expression where sizes are symbolic.
    """
    found = rule(node)
    return found.flops(node) if found and found.flops else 0


def bytes_moved(node: fx.Node) -> Expr:
    """Bytes of distinct tensor operands that are read and of results that are written; 0 for views and numbers."""
    found = rule(node)
    if node.op != "call_function" or is_view(node) or (found and found.family == "number"):
        return 0
    written: Expr = sum(nbytes(t) for t in tensors(node.meta.get("val")))
    read: dict[fx.Node, Expr] = {}
    for name in sorted(reads(node)):
        for source in operand_nodes(node, name):
            gathered = found is not None and found.gathers == name
            read[source] = written if gathered else sum(nbytes(t) for t in tensors(source.meta.get("val")))
    return written + sum(read.values())


def reductions(node: fx.Node) -> tuple[Reduction, ...] | None:
    """What the node sums, averages or maximises over: the dimensions of its operands, and how (see `Reduction`).

    Empty for an operator that reduces nothing; None where that is not known. Where the axis of one of the places is
    divided over processors, each makes a partial result, to be joined by the kind of the reduction.

    For ``mm(a, b)``: a sum over ``("self", 1)`` and ``("mat2", 0)``.
    """
    found = rule(node)
    if found is None:
        return None
    if found.reduces is not None:
        value = node.meta["val"]
        off = {i for i, v in enumerate(value) if v is None} if isinstance(value, (list, tuple)) else set()
        return tuple(r for r in found.reduces(node) if r.result not in off)
    if found.family == "reduction":
        return by_name(node)
    return () if found.family in _REDUCE_NOTHING else None


_REDUCE_NOTHING = {"pointwise", "activation", "view", "copy", "factory", "random", "number", "update"}


def reads(node: fx.Node) -> frozenset[str]:
    """Names of the operands whose values the node needs for its live results (see `operand`).

    An operand that holds nodes and is not named here lends its shape, strides and dtype only: any tensor of the same
    size and strides may stand in its place.
    """
    found = rule(node)
    holding = [name for name in operand_names(node) if operand_nodes(node, name)]
    if found is None or not found.reads:
        return frozenset(holding)
    given = arguments(node)
    return frozenset(n for n in holding if n not in found.reads or found.reads[n](given))


def nodes_read(node: fx.Node) -> frozenset[fx.Node]:
    """The nodes whose values ``node`` needs: those in the operands that `reads` names."""
    if node.op != "call_function":
        return frozenset(node.all_input_nodes)
    return frozenset(source for name in reads(node) for source in operand_nodes(node, name))


@dataclass(frozen=True)
class OutputMask:
    """A ``bool[]`` argument that says which results an operator shall make: entry i governs result i."""

    name: str
    value: tuple[bool, ...]


def output_mask(node: fx.Node) -> OutputMask | None:
    """The output mask of the node, found by the schema of its operator, or None if it has none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    for argument in schema.arguments:
        if argument.name in _MASK_NAMES and str(argument.type) == "List[bool]":
            value = tuple(bool(v) for v in operand(node, argument.name))
            return OutputMask(argument.name, value) if len(value) == len(schema.returns) else None
    return None


def with_output_mask(node: fx.Node, new_mask: Sequence[bool]) -> tuple[bool, ...]:
    """Set the output mask of a draft's node in place, and its metadata: a result that is off is None.

    Returns the mask that was set: a result that the kernel cannot leave out (`OpRule.stays`) stays on. Raises
    ValueError if the operator has no output mask, another length, or if a result that was off is turned on.
    """
    mask, found = output_mask(node), rule(node)
    if mask is None or len(mask.value) != len(new_mask):
        raise ValueError(f"{node.format_node()} has no output mask of {len(new_mask)} results")
    if any(new and not old for new, old in zip(new_mask, mask.value)):
        raise ValueError(f"{node.format_node()}: {list(new_mask)} turns on what is off in {list(mask.value)}")
    given = arguments(node)
    stays = [bool(i in found.stays and found.stays[i](given)) if found else False for i in range(len(new_mask))]
    chosen = tuple(old and bool(new or stay) for old, new, stay in zip(mask.value, new_mask, stays))
    set_operand(node, mask.name, list(chosen))
    node.meta["val"] = tuple(v if m else None for v, m in zip(node.meta["val"], chosen, strict=True))
    return chosen


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random number generator with its actual arguments.

    Attention with ``dropout_p == 0`` does not, nor does dropout with ``train=False``; dropout with ``p == 0`` draws.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    found = rule(node)
    if found is not None and found.draws is not None:
        return bool(found.draws(arguments(node)))
    return _draws(node.target)


@cache
def _draws(operator: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


def is_pure(node: fx.Node) -> bool:
    """Whether the node's result is a function of its operands and nothing else happens.

    Not pure: operators that write to an operand, draw random numbers, return nothing (assertions), communicate, or are
    higher-order. `_local_scalar_dense` (``.item()``) is pure here: in a functional graph nothing changes under it.
    """
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    operator = node.target
    if isinstance(operator, torch._ops.OpOverload):
        schema = operator._schema
        if schema.is_mutable or not schema.returns or "c10d" in operator.namespace:
            return False
        return not is_random(node)
    return not isinstance(operator, torch._ops.OperatorBase)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the operands' elements at the same (broadcast) place only."""
    found = rule(node)
    return found is not None and found.family == "pointwise"


def linear_sets(node: fx.Node) -> tuple[frozenset[str], ...]:
    """Alternatives of operand names such that the operator is linear in the operands of each together.

    ``mul(a, b)``: ``{self}``, ``{other}``. ``add(a, b)``: ``{self, other}``. Operands that are absent or the number 0
    are left out: a convolution without bias is linear in its input alone. If all operands of one alternative are
    zero, so is the result, as long as the others are finite.
    """
    found = rule(node)
    if found is None or not found.linear:
        return ()
    if any(not (t.is_floating_point() or t.is_complex()) for t in tensors(node.meta.get("val"))):
        return ()
    names = operand_names(node)
    if found is _VIEW:
        return (frozenset(names[:1]),)
    alternatives = (frozenset(n.strip() for n in term.split("+")) for term in found.linear.split("|"))
    present = (frozenset(n for n in a if n in names and not _is_zero(operand(node, n))) for a in alternatives)
    return tuple(alternative for alternative in present if alternative)


def linear_in(node: fx.Node) -> frozenset[str]:
    """Operands in each of which the operator is linear while the others stay fixed."""
    return frozenset(name for alternative in linear_sets(node) if len(alternative) == 1 for name in alternative)


def zero_if(node: fx.Node, zero: frozenset[fx.Node] | set[fx.Node]) -> bool:
    """Whether the node's result is zero when the nodes in ``zero`` are (and all others are finite)."""

    def vanishes(name: str) -> bool:
        nodes = operand_nodes(node, name)
        return bool(nodes) and zero.issuperset(nodes)

    return any(all(map(vanishes, alternative)) for alternative in linear_sets(node))


def masked_form(node: fx.Node) -> MaskedForm | None:
    """The form of the node with a boolean mask in place of a float operand, or None if there is no exact one."""
    found = rule(node)
    return found.masked if found and found.masked and found.masked.holds(node) else None


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0)
