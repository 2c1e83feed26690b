"""FLOP formulas of contractions, from the shapes of a node's operands. A multiply-add counts two.

The numbers are those of ``torch.utils.flop_counter`` wherever that counts an operator, including its conventions:
causal masks, padding and biases are not accounted for, and the weight gradient of a grouped convolution is counted
as if it had one group.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names, operand_nodes, shape
from graphopt.graph.op_rules.reductions import parse_einsum
from graphopt.graph.sizes import Expr, expression, product

Formula = Callable[[fx.Node], Expr]


def contraction(spec: str) -> Formula:
    """A product of two operands: ``"self: bmk, mat2: bkn"`` costs 2 x the product of all sizes that are named.

    One letter a dimension, ``*`` for any number of leading dimensions.
    """
    operands = [tuple(part.strip() for part in term.split(":")) for term in spec.split(",")]

    def formula(node: fx.Node) -> Expr:
        sizes: dict[str, Expr] = {}
        for name, letters in operands:
            dims = shape(node, name)
            if letters.startswith("*"):
                letters = letters[1:]
                sizes["*"] = product(dims[: len(dims) - len(letters)])
                dims = dims[len(dims) - len(letters) :]
            sizes.update(zip(letters, dims, strict=True))
        return 2 * product(sizes.values())

    return formula


def convolution(input_name: str) -> Formula:
    """2 x batch x weight elements x positions: of the result, or of the input where it is transposed."""

    def formula(node: fx.Node) -> Expr:
        x, w = shape(node, input_name), shape(node, "weight")
        named = "transposed" in operand_names(node)
        transposed = operand(node, "transposed") if named else "transpose" in str(node.target)
        rank = len(w) - 2
        positions = x[-rank:] if transposed else node.meta["val"].shape[-rank:]
        return 2 * product(x[: -rank - 1]) * product(w) * product(positions)

    return formula


def convolution_backward(node: fx.Node) -> Expr:
    """Input gradient: as the forward. Weight gradient: the same with all input and output channels (no groups)."""
    gradient, x, w = shape(node, "grad_output"), shape(node, "input"), shape(node, "weight")
    positions = product(x[2:] if operand(node, "transposed") else gradient[2:])
    wants_input, wants_weight, _ = operand(node, "output_mask")
    count: Expr = 0
    if wants_input:
        count += 2 * x[0] * product(w) * positions
    if wants_weight:
        count += 2 * x[0] * x[1] * gradient[1] * product(w[2:]) * positions
    return count


def attention(node: fx.Node) -> Expr:
    """scores = q k^T, out = scores v. Key and value heads may be fewer (grouped queries)."""
    b, h, s, d, k, v = _attention_sizes(node)
    return 2 * b * h * s * k * (d + v)


def attention_backward(node: fx.Node) -> Expr:
    """scores again, gradients of scores and of v, gradients of q and of k."""
    b, h, s, d, k, v = _attention_sizes(node)
    return 2 * b * h * s * k * (3 * d + 2 * v)


def _attention_sizes(node: fx.Node) -> tuple[Expr, ...]:
    """batch, query heads, queries, query features, keys, value features."""
    q, k, v = (shape(node, name) for name in ("query", "key", "value"))
    offsets = next((n for n in ("cum_seq_q", "cu_seqlens_q", "cu_seq_q") if n in operand_names(node)), None)
    if (offsets and len(q) == 3) or (offsets == "cu_seqlens_q" and operand(node, offsets) is not None):
        # jagged rows are counted as if all were of the greatest length, like flop_counter on fake tensors
        longest = ("max_seqlen_q", "max_seqlen_k") if offsets == "cu_seqlens_q" else ("max_q", "max_k")
        queries, keys = (_size(operand(node, name)) for name in longest)
        return shape(node, offsets)[0] - 1, q[-2], queries, q[-1], keys, v[-1]
    return product(q[:-3]), product(q[-3:-2]), q[-2], q[-1], k[-2], v[-1]


def _size(value: object) -> Expr:
    return expression(value.meta["val"] if isinstance(value, fx.Node) else value)


def matmul_backward(node: fx.Node) -> Expr:
    """One product of the forward's cost for each gradient wanted; ``grad`` holds the free dimensions of both."""
    contracted = shape(node, "self")[-1]
    return 2 * sum(operand(node, "mask")) * product(shape(node, "grad")) * contracted


def linear_backward(node: fx.Node) -> Expr:
    """Input and weight gradient, one product each."""
    wanted = sum(operand(node, "output_mask")[:2])
    return 2 * wanted * product(shape(node, "grad_output")) * shape(node, "weight")[-1]


def einsum(node: fx.Node) -> Expr:
    """The products that torch makes of it: the first two operands, their result and the third, and so on.

    Letters that neither the other operands nor the result have are summed over: before the product where one of the two
    has them, else by it. A product that sums nothing is pointwise and counts 0. Source: `einsum` in
    aten/src/ATen/native/Linear.cpp, without the ``path`` of opt_einsum.
    """
    terms, result, sources = parse_einsum(node)
    sizes: dict[str, Expr] = {}
    labelled: list[set[str]] = []  # a set of labels for each operand; dimensions of size 1 have none
    for term, source in zip([*terms, result], [*sources, node], strict=True):
        dims = [expression(size) for size in source.meta["val"].shape]
        dots = [f".{i}" for i in reversed(range(len(dims) - len(term.replace(".", ""))))]
        labels = [label for letter in term for label in (dots if letter == "." else [letter])]
        labelled.append({label for label, size in zip(labels, dims, strict=True) if size != 1})
        sizes.update((label, size) for label, size in zip(labels, dims, strict=True) if size != 1)
    *labelled, wanted = labelled
    count: Expr = 0
    while len(labelled) > 1:
        one, other, *rest = labelled
        kept = (one | other) & wanted.union(*rest)
        if summed := (one & other) - kept:
            count += 2 * product(sizes[label] for label in kept | summed)
        labelled = [kept, *rest]
    return count


def trilinear(node: fx.Node) -> Expr:
    """The larger of its two products: all sizes of three operands, each with dimensions of size 1 put in."""
    sizes: list[Expr] = []
    for i in (1, 2, 3):
        dims = list(shape(node, f"i{i}"))
        for d in operand(node, f"expand{i}"):
            dims.insert(d, 1)
        sizes = [b if a == 1 else a for a, b in zip(sizes or dims, dims, strict=True)]
    return 2 * product(sizes)


def grouped(products: int) -> Formula:
    """Rows times the matrix of their group, ``products`` times. All rows count: which group has them, data decides."""

    def formula(node: fx.Node) -> Expr:
        a, b = (shape(node, name) for name in operand_names(node)[:2])
        groups = a[0] if len(a) == len(b) == 3 else 1
        return 2 * products * groups * product(a[-2:]) * b[-1]

    return formula


def recurrent(products: int, *weights: str) -> Formula:
    """A fused recurrent layer: each step multiplies every row with the weight matrices, ``products`` times."""

    def formula(node: fx.Node) -> Expr:
        rows = product(shape(node, "input")[:-1])
        matrices = [w.meta["val"].shape for name in weights for w in operand_nodes(node, name)]
        return 2 * products * rows * sum(product(m) for m in matrices if len(m) == 2)

    return formula
