"""What operators reduce: over which dimensions of which operands, and how.

A `Reducer` reads it off a node's arguments; the table of operator rules names one under ``reduces``. Where dimensions
of an operand are divided over processors, a reduction over them is a partial one: of each processor's own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, operand_names


@dataclass(frozen=True)
class Reduction:
    """One reduction that an operator does.

    ``kind``: ``sum``, ``mean``, ``variance``, ``max``, ``min``, ``product``, ``norm``, ``logsumexp``, ``any``, ``all``,
    ``argmax``, ``argmin`` or ``other``. ``places``: the dimensions it runs over, as operand and dimension; operands
    that are multiplied with each other have one each. ``result``: of which result. ``kept``: the result still has
    them, and each index depends on all (softmax, norms): parts have to be joined inside of the operator; else the
    result itself is a part. ``count``: what it is divided by: nothing, ``indices`` (the number of indices of all
    places, over all processors), or ``data`` (what values say: ``ignore_index``, class weights). ``groups``: the first
    place is this many groups of indices, and the reduction runs inside of each.
    """

    kind: str
    places: tuple[tuple[str, int], ...]
    result: int = 0
    kept: bool = False
    count: str = ""
    groups: int = 1


Reducer = Callable[[fx.Node], tuple[Reduction, ...]]


def nothing(node: fx.Node) -> tuple[Reduction, ...]:
    """No reduction."""
    return ()


def rank(node: fx.Node, name: str) -> int:
    """The number of dimensions of an operand."""
    return len(operand(node, name).meta["val"].shape)


def dims_of(node: fx.Node, name: str, but: Iterable[int] = ()) -> tuple[tuple[str, int], ...]:
    """The places of all dimensions of an operand but some."""
    size = rank(node, name)
    left_out = {d % size for d in but} if size else set()
    return tuple((name, d) for d in range(size) if d not in left_out)


def named_dims(node: fx.Node, size: int, name: str = "dim") -> tuple[int, ...]:
    """The dimensions that the argument ``name`` (int, list or None for all) means in a tensor of this rank."""
    given = operand(node, name) if name in operand_names(node) else None
    if given is None or given == []:
        return tuple(range(size))
    return tuple(d % size if size else 0 for d in (given if isinstance(given, (list, tuple)) else [given]))


def along(*kinds: str, kept: bool = False, count: str = "", name: str = "", result: int = 0) -> Reducer:
    """Over the dimensions in the argument ``dim`` of the operand ``name`` (the first one)."""

    def reducer(node: fx.Node) -> tuple[Reduction, ...]:
        source = name or operand_names(node)[0]
        places = tuple((source, d) for d in named_dims(node, rank(node, source)))
        return tuple(Reduction(kind, places, result, kept, count) for kind in kinds) if places else ()

    return reducer


SOFTMAX = along("max", "sum", kept=True)

_KINDS = {
    "sum": "sum", "nansum": "sum", "count_nonzero": "sum", "mean": "mean", "nanmean": "mean", "amax": "max",
    "max": "max", "amin": "min", "min": "min", "prod": "product", "any": "any", "all": "all", "argmax": "argmax",
    "argmin": "argmin",
    "logsumexp": "logsumexp", "norm": "norm", "linalg_vector_norm": "norm",
    "var": "variance", "std": "variance", "var_mean": "variance",
    "std_mean": "variance",
}  # fmt: skip


def by_name(node: fx.Node) -> tuple[Reduction, ...]:
    """The reduction that the operator is called after, over ``dim``, for each result."""
    packet = node.target._opname  # type: ignore[union-attr]
    kind = _KINDS.get(packet, "other")
    count = {"mean": "data" if packet == "nanmean" else "indices", "variance": "indices"}.get(kind, "")
    found = along(kind, count=count)(node)
    value = node.meta["val"]
    if not isinstance(value, (list, tuple)):
        return found
    second = {"max": "argmax", "min": "argmin", "variance": "mean"}.get(kind, kind)
    return (*found, *(replace(r, kind=second, result=1) for r in found))


def loss(node: fx.Node) -> tuple[Reduction, ...]:
    """A pointwise loss: the mean or the sum over everything, as the argument ``reduction`` says."""
    return _reduced(node, dims_of(node, operand_names(node)[0]), "indices")


def _reduced(node: fx.Node, places: tuple[tuple[str, int], ...], count: str) -> tuple[Reduction, ...]:
    how = operand(node, "reduction")
    if how == 0 or not places:
        return ()
    return (Reduction("mean" if how == 1 else "sum", places, count=count if how == 1 else ""),)


def nll_loss(node: fx.Node) -> tuple[Reduction, ...]:
    """Over all targets. The mean divides by the weights of the targets that are not ignored, which it also returns."""
    source = operand_names(node)[0]
    classes = 1 if rank(node, source) > 1 else 0
    target = () if rank(node, "target") == rank(node, source) else dims_of(node, "target")
    places = (*dims_of(node, source, [classes]), *target)
    several = isinstance(node.meta["val"], (list, tuple)) and operand(node, "reduction")
    weights = (Reduction("sum", target, result=1),) if several and target else ()
    return (*_reduced(node, places, "data"), *weights)


def cross_entropy(node: fx.Node) -> tuple[Reduction, ...]:
    """A softmax over classes, and `nll_loss`."""
    classes = (("self", 1 if rank(node, "self") > 1 else 0),)
    return (Reduction("logsumexp", classes), *nll_loss(node))


def batch_norm(node: fx.Node) -> tuple[Reduction, ...]:
    """In training the statistics of each channel (dimension 1) over all other dimensions; results too."""
    if not _training(node):
        return ()
    return _statistics(node, dims_of(node, operand_names(node)[0], [1]), ("mean", "variance"))


def _training(node: fx.Node) -> bool:
    name = str(node.target)
    given = next((n for n in ("training", "train", "update", "use_input_stats") if n in operand_names(node)), None)
    return bool(operand(node, given)) if given else not ("no_training" in name or "no_update" in name)


def _statistics(
    node: fx.Node, places: tuple[tuple[str, int], ...], kinds: tuple[str, ...], groups: int = 1
) -> tuple[Reduction, ...]:
    """Means over ``places`` that the first result is divided by, and that the results behind it are."""
    value = node.meta["val"]
    behind = range(1, min(len(value), 1 + len(kinds))) if isinstance(value, (list, tuple)) else ()
    return (
        *(Reduction(kind, places, 0, True, "indices", groups) for kind in kinds),
        *(Reduction(kinds[i - 1], places, i, False, "indices", groups) for i in behind if value[i].numel()),
    )


def batch_norm_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """Gradients of weight and bias: sums. In training the gradient of the input has means of the gradient in it."""
    gradient, source = operand_names(node)[:2]
    places = (*dims_of(node, gradient, [1]), *dims_of(node, source, [1]))
    sums = tuple(Reduction("sum", places, i) for i in (1, 2))
    return (Reduction("mean", places, 0, True, "indices"), *sums) if _training(node) else sums


def instance_norm(node: fx.Node) -> tuple[Reduction, ...]:
    """Statistics of each sample and channel over positions."""
    return _statistics(node, dims_of(node, "input", [0, 1]), ("mean", "variance")) if _training(node) else ()


def layer_norm(*kinds: str) -> Reducer:
    """Statistics over the last dimensions, those of ``normalized_shape``."""

    def reducer(node: fx.Node) -> tuple[Reduction, ...]:
        lead = rank(node, "input") - len(operand(node, "normalized_shape"))
        return _statistics(node, dims_of(node, "input", range(lead)), kinds)

    return reducer


def layer_norm_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """Means over the last dimensions for the gradient of the input, sums over all others for weight and bias."""
    gradient = operand_names(node)[0]
    lead = rank(node, "input") - len(operand(node, "normalized_shape"))
    last = tuple(p for name in (gradient, "input") for p in dims_of(node, name, range(lead)))
    first = tuple((name, d) for name in (gradient, "input") for d in range(lead))
    sums = (Reduction("sum", first, i) for i in range(1, len(node.meta["val"]))) if first else ()
    return (Reduction("mean", last, 0, True, "indices"), *sums)


def group_norm(node: fx.Node) -> tuple[Reduction, ...]:
    """Statistics of each sample and group over the channels of the group and all positions."""
    name = "num_groups" if "num_groups" in operand_names(node) else "group"
    return _statistics(node, dims_of(node, "input", [0]), ("mean", "variance"), operand(node, name))


def group_norm_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """The same for the gradient of the input; sums over samples and positions for weight and bias."""
    names = ("input", "grad_out")
    inside, sums = (tuple(p for n in names for p in dims_of(node, n, [d])) for d in (0, 1))
    first = Reduction("mean", inside, 0, True, "indices", operand(node, "group"))
    return (first, *(Reduction("sum", sums, i) for i in (1, 2)))


def weight_norm(node: fx.Node) -> tuple[Reduction, ...]:
    """The norm over all dimensions but ``dim``."""
    places = dims_of(node, operand_names(node)[0], [operand(node, "dim")])
    found = (Reduction("norm", places, kept=True),)
    return (*found, Reduction("norm", places, 1)) if isinstance(node.meta["val"], (list, tuple)) else found


def _transposed(node: fx.Node) -> bool:
    names = operand_names(node)
    return bool(operand(node, "transposed")) if "transposed" in names else "transpose" in str(node.target)


def convolution(node: fx.Node) -> tuple[Reduction, ...]:
    """Over input channels, of each group."""
    names = operand_names(node)
    source, groups = names[0], operand(node, "groups") if "groups" in names else 1
    channels = rank(node, source) - rank(node, "weight") + 1
    inputs = 0 if _transposed(node) else 1
    if groups == 1 or not _transposed(node):
        return (Reduction("sum", ((source, channels), ("weight", inputs)), groups=groups),)
    return (Reduction("sum", ((source, channels),), groups=groups),)


def convolution_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """Gradient of the input: over output channels. Of weight and bias: over samples and positions."""
    outputs = 1 if _transposed(node) else 0
    places = dims_of(node, "grad_output", [1])
    return (
        Reduction("sum", (("grad_output", 1), ("weight", outputs)), 0, groups=operand(node, "groups")),
        Reduction("sum", (*places, *dims_of(node, "input", [1])), 1),
        Reduction("sum", places, 2),
    )


def global_pooling(kind: str) -> Reducer:
    """Positions of which one is left: a mean or maximum over all of them."""

    def reducer(node: fx.Node) -> tuple[Reduction, ...]:
        size = operand(node, "output_size")
        first = rank(node, "self") - len(size)
        places = tuple(("self", first + i) for i, s in enumerate(size) if s == 1)
        count = "indices" if kind == "mean" else ""
        results = len(node.meta["val"]) if isinstance(node.meta["val"], (list, tuple)) else 1
        kinds = (kind, f"arg{kind}")[:results]
        return tuple(Reduction(k, places, i, count=count) for i, k in enumerate(kinds)) if places else ()

    return reducer


def attention(node: fx.Node) -> tuple[Reduction, ...]:
    """Scores: a sum over head sizes. Softmax and values: over keys."""
    keys = ("key", rank(node, "key") - 2)
    return (
        Reduction("sum", (("query", rank(node, "query") - 1), ("key", rank(node, "key") - 1)), kept=True),
        Reduction("max", (keys,)),
        Reduction("sum", (keys, ("value", rank(node, "value") - 2))),
    )


def attention_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """Scores are made again. The gradient of queries: over keys. Those of keys and values: over queries."""
    last = rank(node, "query") - 1
    keys = tuple((name, last - 1) for name in ("key", "value"))
    queries = tuple((name, last - 1) for name in (operand_names(node)[0], "query"))
    scores = tuple(Reduction("sum", (("query", last), ("key", last)), i, kept=True) for i in range(3))
    return (*scores, Reduction("sum", keys, 0), *(Reduction("sum", queries, i) for i in (1, 2)))


def recurrent_layer(node: fx.Node) -> tuple[Reduction, ...]:
    """Each step of time depends on those before it, on all features and on the whole hidden state; rows are apart."""
    hidden = rank(node, "hx_") - 1
    return (Reduction("other", (("input", 0), ("input", 2), ("hx_", hidden)), kept=True),)


def recurrent_layer_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """The same for the gradient of the input; sums over time and rows for the weights and biases."""
    places = tuple((name, d) for name in ("input", "output") for d in (0, 1))
    return (*recurrent_layer(node), *(Reduction("sum", places, i) for i in (1, 2, 3, 4)))


def embedding_backward(node: fx.Node) -> tuple[Reduction, ...]:
    """Over all positions."""
    gradient = operand_names(node)[0]
    return (Reduction("sum", (*dims_of(node, gradient, [-1]), *dims_of(node, "indices"))),)


def einsum(node: fx.Node) -> tuple[Reduction, ...]:
    """Over the letters that the result does not have. Operands are ``tensors.0``, ``tensors.1`` ..."""
    left, right, sources = parse_einsum(node)
    places: list[Any] = []
    for i, (term, source) in enumerate(zip(left, sources, strict=True)):
        behind = len(term) - term.find(".") - 1 if "." in term else 0
        size = len(source.meta["val"].shape)
        for at, letter in enumerate(term):
            if letter != "." and letter not in right:
                before_dots = "." not in term or at < term.find(".")
                places.append((f"tensors.{i}", at if before_dots else size - behind + (at - term.find(".") - 1)))
    return (Reduction("sum", tuple(places)),) if places else ()


def parse_einsum(node: fx.Node) -> tuple[list[str], str, Any]:
    """The letters of each operand and of the result (``.`` for an ellipsis), and the operands."""
    equation = str(operand(node, "equation")).replace(" ", "").replace("...", ".")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("." if "." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    return left.split(","), right, operand(node, "tensors")
