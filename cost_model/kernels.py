"""What a node asks of a processor: the kernels that it starts, each with a family, FLOPs, bytes and dimensions.

A family is a group of kernels whose time follows one curve on a processor (`graphopt.cost_model.machine.Curve`). Most
operators are one kernel; the backward of a convolution is two, whose rates differ much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from operator import getitem

import torch
from torch import fx

from graphopt.graph.op_rules import bytes_moved, flops, rule
from graphopt.graph.op_rules.arguments import operand, operand_names, operand_nodes, shape
from graphopt.graph.sizes import Expr, expression, numel, product
from graphopt.graph.storages import is_view, tensors


class Family(StrEnum):
    """Kernels with one cost curve."""

    GEMM = "gemm"
    CONVOLUTION = "convolution"
    CONVOLUTION_INPUT = "convolution input gradient"
    CONVOLUTION_WEIGHT = "convolution weight gradient"
    DEPTHWISE = "depthwise convolution"
    DEPTHWISE_INPUT = "depthwise input gradient"
    DEPTHWISE_WEIGHT = "depthwise weight gradient"
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention backward"
    RECURRENT = "recurrent layer"
    POINTWISE = "pointwise"
    TRANSCENDENTAL = "transcendental"
    BATCH_NORM = "batch normalisation"
    BATCH_NORM_BACKWARD = "batch normalisation backward"
    NORM = "normalisation"
    NORM_BACKWARD = "normalisation backward"
    SOFTMAX = "softmax"
    REDUCTION = "reduction"
    COPY = "copy"
    FILL = "fill"
    RANDOM = "random numbers"
    GATHER = "gather"
    SCATTER = "scatter"
    POOLING = "pooling"
    UPDATE = "update"
    COMMUNICATION = "communication"
    NONE = "none"  # views and numbers: nothing runs on the processor


PRODUCTS = frozenset(list(Family)[: list(Family).index(Family.POINTWISE)])
"""Families whose time follows FLOPs where they are large; that of the others follows bytes."""

_BY_RULE = {
    "contraction": Family.GEMM, "transform": Family.GEMM, "attention": Family.ATTENTION, "recurrent": Family.RECURRENT,
    "normalisation": Family.NORM, "softmax": Family.SOFTMAX, "reduction": Family.REDUCTION, "loss": Family.REDUCTION,
    "scan": Family.REDUCTION, "order": Family.REDUCTION, "copy": Family.COPY, "padding": Family.COPY,
    "factory": Family.FILL, "random": Family.RANDOM, "gather": Family.GATHER, "scatter": Family.SCATTER,
    "pooling": Family.POOLING, "resampling": Family.POOLING, "update": Family.UPDATE,
    "communication": Family.COMMUNICATION, "number": Family.NONE,
}  # fmt: skip

_TRANSCENDENTAL = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh celu cos cosh elu elu_backward erf erfc erfinv exp exp2 expm1 gelu
    gelu_backward glu glu_backward hardswish log log10 log1p log2 log_sigmoid_backward log_sigmoid_forward logit mish
    mish_backward selu sigmoid sigmoid_backward silu silu_backward sin sinh softplus softplus_backward tan tanh
    tanh_backward logaddexp logsumexp
    """.split()  # noqa: SIM905
)
"""Pointwise operators that compute a series an element: slower than memory on a CPU."""


@dataclass(frozen=True)
class Kernel:
    """One kernel that a node starts.

    ``flops``: multiply-adds count two. ``bytes``: least bytes read and written. ``rows``, ``columns``, ``depth``: the
    dimensions m, n, k of the product it is, ``batch`` of them (1 each for other kernels). ``elements``: of its results.
    ``items``: tensors that it goes through one by one (``_foreach`` lists).
    """

    node: fx.Node
    family: Family
    flops: Expr = 0
    bytes: Expr = 0
    rows: Expr = 1
    columns: Expr = 1
    depth: Expr = 1
    batch: Expr = 1
    items: int = 1


def kernels(node: fx.Node) -> Iterator[Kernel]:
    """The kernels of a node; a view or a number is one of family ``NONE``, ``getitem`` and inputs are none."""
    if node.op != "call_function" or node.target is getitem:
        return
    found = family(node)
    if found is Family.NONE:
        yield Kernel(node, found)
    elif _name(node) in ("convolution_backward", "mkldnn_convolution_backward"):
        yield from _convolution_backward(node)
    else:
        dims = _dimensions(node, found)
        items = max((len(operand_nodes(node, name)) for name in operand_names(node)), default=1)
        is_list = found is Family.UPDATE
        yield Kernel(node, found, flops(node), bytes_moved(node), *dims, items=max(items, 1) if is_list else 1)


def family(node: fx.Node) -> Family:
    """The family of an operator's (first) kernel."""
    if is_view(node):
        return Family.NONE
    found = rule(node)
    if found is None:
        return Family.POINTWISE
    name = _name(node)
    if found.family == "convolution":
        return Family.DEPTHWISE if _is_depthwise(node) else Family.CONVOLUTION
    kind = Family.COPY if name == "clone" else _BY_RULE.get(found.family)
    if kind is None:  # pointwise, activation
        return Family.TRANSCENDENTAL if name in _TRANSCENDENTAL else Family.POINTWISE
    if kind is Family.NORM and "batch_norm" in name:
        return Family.BATCH_NORM_BACKWARD if "backward" in name else Family.BATCH_NORM
    if kind is Family.NORM and "backward" in name:
        return Family.NORM_BACKWARD
    if kind is Family.ATTENTION and "backward" in name:
        return Family.ATTENTION_BACKWARD
    return kind


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _is_depthwise(node: fx.Node) -> bool:
    """One input channel a group, and more groups than one."""
    if "groups" not in operand_names(node) or not isinstance(operand(node, "groups"), int):
        return False
    return operand(node, "groups") > 1 and shape(node, "weight")[1] == 1


def _dimensions(node: fx.Node, kind: Family) -> tuple[Expr, Expr, Expr, Expr]:
    """m, n, k and the number of products."""
    if kind in (Family.CONVOLUTION, Family.DEPTHWISE):
        transposed = "transposed" in operand_names(node) and operand(node, "transposed")
        places = shape(node, "input" if "input" in operand_names(node) else "self") if transposed else _result(node)
        return _convolution(product([places[0], *places[2:]]), shape(node, "weight"), _groups(node))
    if kind in (Family.ATTENTION, Family.ATTENTION_BACKWARD, Family.RECURRENT):
        return flops(node) // 2 if isinstance(flops(node), int) else flops(node) / 2, 1, 1, 1
    if kind is not Family.GEMM:
        return 1, 1, 1, 1
    for left, right in (("self", "mat2"), ("mat1", "mat2"), ("batch1", "batch2"), ("self", "other")):
        if {left, right} <= set(operand_names(node)):
            a, b = shape(node, left), shape(node, right)
            if len(a) == len(b) >= 2:
                return a[-2], b[-1], a[-1], product(a[:-2])
    if "weight" in operand_names(node):
        weight = shape(node, "weight")
        rows = product(shape(node, "input" if "input" in operand_names(node) else "self")[:-1])
        return rows, weight[0], weight[-1], 1
    return sum(numel(t) for t in tensors(node.meta["val"])), 1, 1, 1


def _result(node: fx.Node) -> tuple[Expr, ...]:
    return tuple(map(expression, tensors(node.meta["val"])[0].shape))


def _convolution(rows: Expr, weight: tuple[Expr, ...], groups: int) -> tuple[Expr, Expr, Expr, Expr]:
    """As a product of positions x (input channels x kernel) x output channels, one a group."""
    columns = weight[0] // groups if isinstance(weight[0], int) else weight[0] / groups
    return rows, columns, product(weight[1:]), groups


def _groups(node: fx.Node) -> int:
    return operand(node, "groups") if "groups" in operand_names(node) else 1


def _convolution_backward(node: fx.Node) -> Iterator[Kernel]:
    depthwise, mask = _is_depthwise(node), operand(node, "output_mask")
    gradient, inputs, weight = (shape(node, name) for name in ("grad_output", "input", "weight"))
    positions = inputs if operand(node, "transposed") else gradient
    dims = _convolution(product([gradient[0], *positions[2:]]), weight, _groups(node))
    each = 2 * product(dims)
    element = tensors(node.args[0].meta["val"])[0].element_size()  # type: ignore[union-attr]
    sizes = [product(s) * element for s in (gradient, inputs, weight)]
    families = (
        (Family.DEPTHWISE_INPUT, Family.DEPTHWISE_WEIGHT)
        if depthwise
        else (Family.CONVOLUTION_INPUT, Family.CONVOLUTION_WEIGHT)
    )
    for wanted, kind in zip(mask, families):
        if wanted:
            yield Kernel(node, kind, each, sum(sizes), *dims)
    if mask[2] and not (mask[0] or mask[1]):
        yield Kernel(node, Family.REDUCTION, 0, sizes[0])
