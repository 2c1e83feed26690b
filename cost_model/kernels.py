"""What a node asks of a processor: the kernels that it starts, each with a family, FLOPs, bytes and dimensions.

A family is a group of kernels whose time follows one curve on a processor (`graphopt.cost_model.machine.Curve`). Most
operators are one kernel; the backward of a convolution is two, whose rates differ much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import getitem

import torch
from torch import fx

from graphopt.cost_model.convolution_backends import uses_onednn
from graphopt.cost_model.convolution_workspace import LARGEST_DEPTHWISE, by_products, padded_depthwise_weight
from graphopt.cost_model.kernel_sizes import reaches
from graphopt.graph.op_rules import bytes_moved, flops, nodes_read, rule
from graphopt.graph.op_rules.arguments import operand, operand_names, operand_nodes, shape
from graphopt.graph.sizes import Expr, expression, nbytes, numel, product
from graphopt.graph.storages import is_view, tensors
from graphopt.graph.training_graph import Phase


class Family(StrEnum):
    """Kernels with one cost curve."""

    GEMM = "gemm"
    CONVOLUTION = "convolution"
    CONVOLUTION_INPUT = "convolution input gradient"
    CONVOLUTION_WEIGHT = "convolution weight gradient"
    GROUPED = "grouped convolution"
    GROUPED_INPUT = "grouped input gradient"
    GROUPED_WEIGHT = "grouped weight gradient"
    GROUPED_PRODUCTS = "grouped weight gradient by products"  # image by image and group by group, up to 8 times slower
    IMAGEWISE = "convolution by image"
    IMAGEWISE_INPUT = "input gradient by image"
    IMAGEWISE_WEIGHT = "weight gradient by image"
    ALIASED_INPUT = "input gradient by image, aliased"
    ALIASED_WEIGHT = "weight gradient by image, aliased"
    DEPTHWISE = "depthwise convolution"
    DEPTHWISE_INPUT = "depthwise input gradient"
    DEPTHWISE_WEIGHT = "depthwise weight gradient"
    DEPTHWISE_PLAIN = "depthwise by plain loops"  # oneDNN's reference code, 4 to 30 times slower
    DEPTHWISE_PADDED = "depthwise as blocks of channels"  # a kernel for dense weights, of which all but a diagonal is 0
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention backward"
    RECURRENT = "recurrent layer"
    BATCH_NORM = "batch normalisation"
    BATCH_NORM_BACKWARD = "batch normalisation backward"
    POOLING = "pooling"
    POOLING_BACKWARD = "pooling backward"
    POINTWISE = "pointwise"
    TRANSCENDENTAL = "transcendental"
    NORM = "normalisation"
    NORM_BACKWARD = "normalisation backward"
    SOFTMAX = "softmax"
    REDUCTION = "reduction"
    COPY = "copy"
    FILL = "fill"
    RANDOM = "random numbers"
    GATHER = "gather"
    SCATTER = "scatter"
    UPDATE = "update"
    UPDATE_STREAM = "update out of memory"  # where parameters and state are more than caches hold
    COMMUNICATION = "communication"
    NONE = "none"  # views and numbers: nothing runs on the processor


LOOPS = frozenset(list(Family)[: list(Family).index(Family.POINTWISE)])
"""Families whose time follows the dimensions of their loops; that of the others follows bytes alone."""

CONVOLUTIONS = (Family.CONVOLUTION, Family.CONVOLUTION_INPUT, Family.CONVOLUTION_WEIGHT)
GROUPED = (Family.GROUPED, Family.GROUPED_INPUT, Family.GROUPED_WEIGHT)
IMAGEWISE = (Family.IMAGEWISE, Family.IMAGEWISE_INPUT, Family.IMAGEWISE_WEIGHT)
ALIASED = (Family.IMAGEWISE, Family.ALIASED_INPUT, Family.ALIASED_WEIGHT)
DEPTHWISE = (Family.DEPTHWISE, Family.DEPTHWISE_INPUT, Family.DEPTHWISE_WEIGHT)
"""Forward, gradient of the input, gradient of the weight."""

ALIASING = 512
"""A weight whose rows are multiples of so many numbers (2 KiB) apart: whoever goes along its columns finds them in few
sets of the first cache, and takes up to four times as long."""

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
    mish_backward selu sigmoid silu silu_backward sin sinh softplus softplus_backward tan tanh
    logaddexp logsumexp
    """.split()  # noqa: SIM905
)
"""Pointwise operators that compute a series an element: slower than memory on a CPU."""


@dataclass(frozen=True)
class Kernel:
    """One kernel that a node starts.

    ``flops``: of the work it does, multiply-adds count two. ``bytes``: least bytes read and written. ``rows``,
    ``columns``, ``depth``: of the loops that it runs ``batch`` times; for a product its m, n and k. ``items``: tensors
    that it goes through one by one (``_foreach`` lists); 0 for one that starts with another kernel of the node.
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


def kernels(node: fx.Node, threads: int | None) -> Iterator[Kernel]:
    """The kernels of a node on a CPU with so many threads of torch, or on a GPU (None). A view or a number is one of
    family ``NONE``, ``getitem`` and inputs are none."""
    if node.op != "call_function" or node.target is getitem:
        return
    found = family(node)
    if found is Family.NONE:
        yield Kernel(node, found)
    elif found is Family.COMMUNICATION:
        yield Kernel(node, found, 0, _message_bytes(node))
    elif found in (Family.CONVOLUTION, Family.DEPTHWISE):
        yield from _convolution(node, found, threads)
    else:
        items = max((len(operand_nodes(node, name)) for name in operand_names(node)), default=1)
        listed = operator_name(node).startswith(("_foreach", "_fused_"))
        yield Kernel(
            node, found, flops(node), bytes_moved(node), *_dimensions(node, found), items=max(items, 1) if listed else 1
        )
        if found in _NEED_ROWS:
            yield from _copies(node, {source for source in nodes_read(node) if not _in_rows(source)})


_NEED_ROWS = frozenset([Family.NORM, Family.NORM_BACKWARD, Family.SOFTMAX])
"""Kernels that copy operands whose last dimension does not lie together."""


def _copies(node: fx.Node, operands: Iterable[fx.Node]) -> Iterator[Kernel]:
    """Those of operands that a kernel cannot read as they lie."""
    for source in operands:
        moved = 2 * sum(nbytes(t) for t in tensors(source.meta["val"]))
        yield Kernel(node, Family.COPY, 0, moved, items=0)


def _in_rows(node: fx.Node) -> bool:
    """Whether the last dimension lies together. Other strides say nothing here: where widths were changed after the
    capture, they are those of the capture."""
    return all(t.dim() < 2 or expression(t.stride(-1)) == 1 for t in tensors(node.meta["val"]))


def _in_channels(node: fx.Node) -> bool:
    """The same of the channels of an image or volume."""
    return all(t.dim() in (4, 5) and expression(t.stride(1)) == 1 for t in tensors(node.meta["val"]))


def family(node: fx.Node) -> Family:
    """The family of an operator's (first) kernel."""
    if is_view(node) or operator_name(node) == "wait_tensor":
        return Family.NONE
    found = rule(node)
    if found is None:
        return Family.POINTWISE
    name = operator_name(node)
    if found.family == "convolution":
        return Family.DEPTHWISE if _is_depthwise(node) else Family.CONVOLUTION
    kind = Family.COPY if name == "clone" else _BY_RULE.get(found.family)
    if kind is None:  # pointwise, activation
        if node.meta.get("phase") == Phase.UPDATE:
            return Family.UPDATE  # mostly in place
        return Family.TRANSCENDENTAL if name in _TRANSCENDENTAL else Family.POINTWISE
    if kind is Family.NORM and "batch_norm" in name:
        return Family.BATCH_NORM_BACKWARD if "backward" in name else Family.BATCH_NORM
    if kind is Family.NORM and "backward" in name:
        return Family.NORM_BACKWARD
    if kind is Family.POOLING and "backward" in name:
        return Family.POOLING_BACKWARD
    if kind is Family.ATTENTION and "backward" in name:
        return Family.ATTENTION_BACKWARD
    return kind


def collective(node: fx.Node) -> str:
    """Which of `graphopt.cost_model.communication.COLLECTIVES` an operator of the family ``COMMUNICATION`` is: an
    all-to-all in which a processor gives to one partner at most, or gets from one, is a send."""
    name = operator_name(node).removesuffix("_coalesced")
    if name == "all_to_all_single" and all(sum(part != 0 for part in parts) <= 1 for parts in node.args[1:3]):  # type: ignore[union-attr, misc]
        return "send"
    return _COLLECTIVES[name]


_COLLECTIVES = {
    "all_reduce": "all_reduce", "reduce_scatter_tensor": "reduce_scatter", "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all", "broadcast": "broadcast", "isend": "send", "irecv": "send",
}  # fmt: skip


def _message_bytes(node: fx.Node) -> Expr:
    """Bytes of the whole tensor that a collective is about."""
    given = sum(nbytes(t) for source in nodes_read(node) for t in tensors(source.meta["val"]))
    got = sum(nbytes(t) for t in tensors(node.meta["val"]))
    if operator_name(node) == "all_to_all_single" and collective(node) == "send":
        return given + got  # one of them is empty
    return got if collective(node) == "all_gather" else given


def operator_name(node: fx.Node) -> str:
    """The operator without namespace and overload; empty for what is none."""
    target = node.target
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _is_depthwise(node: fx.Node) -> bool:
    """One input channel a group, and more groups than one."""
    if "groups" not in operand_names(node) or not isinstance(operand(node, "groups"), int):
        return False
    return operand(node, "groups") > 1 and shape(node, "weight")[1] == 1


def _dimensions(node: fx.Node, kind: Family) -> tuple[Expr, Expr, Expr, Expr]:
    """m, n, k and how often."""
    if kind in (Family.BATCH_NORM, Family.BATCH_NORM_BACKWARD):
        images = shape(node, "input" if "input" in operand_names(node) else "self")
        return product(images[2:]), 1, 1, product(images[:2])  # channel by channel, image by image
    if kind in (Family.POOLING, Family.POOLING_BACKWARD):
        pooled = shape(node, "grad_output") if kind is Family.POOLING_BACKWARD else _result(node)
        window = operand(node, "kernel_size") if "kernel_size" in operand_names(node) else ()
        return product(pooled), 1, product(window), 1
    if kind is Family.RECURRENT and "input" in operand_names(node) and len(shape(node, "input")) == 3:
        steps, rows, _ = shape(node, "input")  # one product after the other
        return rows, _quotient(flops(node), 2 * steps * rows), 1, steps
    if kind in (Family.ATTENTION, Family.ATTENTION_BACKWARD, Family.RECURRENT):
        return _quotient(flops(node), 2), 1, 1, 1
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


def _quotient(whole: Expr, part: Expr) -> Expr:
    """``whole / part`` where it is a whole number."""
    return whole // part if isinstance(whole, int) and isinstance(part, int) else whole / part


def _result(node: fx.Node) -> tuple[Expr, ...]:
    return tuple(map(expression, tensors(node.meta["val"])[0].shape))


def _beyond_depthwise(kind: Family, image: Sequence[Expr], window: Expr, last: bool) -> Expr:
    """1 where oneDNN has no kernel of its own for a depthwise convolution, else 0; an expression where the size of the
    kernel is free. It has none for weight gradients of windows beyond `LARGEST_DEPTHWISE`, nor, channels first, for
    images narrower than the window (forward: than half of it)."""
    width = image[-1] if isinstance(image[-1], int) and not last else math.inf
    beyond = {Family.DEPTHWISE: 2 * (width + 1), Family.DEPTHWISE_WEIGHT: min(width + 1, LARGEST_DEPTHWISE + 1)}
    least = beyond.get(kind, math.inf)
    if least == math.inf:
        return 0
    return reaches(window, int(least))


def _convolution(node: fx.Node, kind: Family, threads: int | None) -> Iterator[Kernel]:
    """Forward: one kernel. Backward: one for each gradient that is wanted."""
    backward = "backward" in operator_name(node)
    names = operand_names(node)
    x = operand(node, "input" if "input" in names else "self")
    image, weight = tuple(map(expression, x.meta["val"].shape)), shape(node, "weight")
    outer = shape(node, "grad_output") if backward else _result(node)
    small = image if "transposed" in names and operand(node, "transposed") else outer  # the places of the products
    groups = operand(node, "groups") if "groups" in names else 1
    columns = _quotient(weight[0], groups)
    depth, element = product(weight[1:]), tensors(x.meta["val"])[0].element_size()
    each = 2 * product([small[0], *small[2:]]) * product(weight)
    moved = sum(product(s) for s in (image, weight, outer)) * element
    wanted = [False, False, False] if not backward else list(operand(node, "output_mask"))
    kinds = DEPTHWISE if kind is Family.DEPTHWISE else CONVOLUTIONS
    chosen = [k for k, on in zip(kinds[1:], wanted) if on] if backward else kinds[:1]
    if kind is Family.DEPTHWISE:  # bound by what it reads as much as by what it computes
        channels = weight[0]
        rows, often = (
            image[-1] + outer[-1],
            image[0] * channels * product(a + b for a, b in zip(image[2:-1], outer[2:-1])),
        )
        last = _in_channels(x) and not _in_rows(x)
        for found in chosen:
            plain = _beyond_depthwise(found, image, weight[-1], last) if threads is not None else 0
            if plain != 1:
                off = 1 - plain
                yield Kernel(node, found, each * off, moved * off, rows, 1, depth, often * off)
            if plain != 0:
                other = Family.DEPTHWISE_PADDED if last else Family.DEPTHWISE_PLAIN
                blocks = 2 * padded_depthwise_weight(weight, element) if last else 0  # written, read to put in order
                yield Kernel(
                    node, other, each * plain, (moved + blocks) * plain, product(outer[2:]), 1, depth,
                    image[0] * channels * plain, items=int(plain == 1),
                )  # fmt: skip
    elif threads is None:
        places = product([small[0], *small[2:]])
        for found in chosen:
            yield Kernel(node, found, each, moved, places, columns, depth, groups)
    else:
        onednn = uses_onednn(node, x.meta["val"], image, weight, threads) if "stride" in names else 1
        often = product(small[2:-1]) * small[0] * groups
        for found in chosen:
            if found is Family.CONVOLUTION_WEIGHT and onednn == 1 and by_products(weight, groups, image):
                other = Family.GROUPED_PRODUCTS
                yield Kernel(node, other, each, moved, product(small[2:]), columns, depth, small[0] * groups)
                continue
            if onednn != 0:
                blocked = found if groups == 1 else GROUPED[CONVOLUTIONS.index(found)]
                yield Kernel(node, blocked, each * onednn, moved * onednn, small[-1], columns, depth, often * onednn)
            if onednn != 1:
                aliased = isinstance(depth, int) and depth % ALIASING == 0
                other, off = (ALIASED if aliased else IMAGEWISE)[CONVOLUTIONS.index(found)], 1 - onednn
                yield Kernel(
                    node, other, each * off, moved * off, product(small[2:]), columns, depth, small[0] * groups * off,
                    items=int(onednn == 0),
                )  # fmt: skip
    if threads is not None:  # what lies neither row by row nor channels last is copied first
        operands = [x, operand(node, "weight"), *([operand(node, "grad_output")] if backward else [])]
        yield from _copies(node, [o for o in operands if not (_in_rows(o) or _in_channels(o))])
    if backward and wanted == [False, False, True]:
        yield Kernel(node, Family.REDUCTION, 0, product(outer) * element)
