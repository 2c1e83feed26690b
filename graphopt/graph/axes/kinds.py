"""What an axis is: from what the rules saw of it, and from where sums join a branch to what it started from."""

from __future__ import annotations

from torch import fx

from graphopt.graph.axes.axis import Kind
from graphopt.graph.axes.factors import Factor, find
from graphopt.graph.axes.propagation import Propagation, Tag
from graphopt.graph.op_rules.queries import rule

_SEARCHED = 2000
"""How many operators are searched for the start of a branch."""


def kind_of(leaf: Factor, residual: bool) -> Kind:
    """The kind of an axis; ``residual``: whether sums of a branch with its own start carry it."""
    tags = leaf.tags
    feature, weighted = bool(tags & Tag.FEATURE), bool(tags & (Tag.FEATURE | Tag.CHANNEL))
    if tags & Tag.INPUT and tags & (Tag.CONTRACTED | Tag.KEPT) and not feature:  # of a product of two activations
        return Kind.SEQUENCE
    for tag, kind in _FIRST:
        if tags & tag:
            return kind
    if tags & Tag.HEAD_SIZE or (weighted and tags & (Tag.CONTRACTED | Tag.KEPT) and not tags & Tag.IN_BATCHES):
        return Kind.HEAD_SIZE
    if weighted and tags & (Tag.HEADS | Tag.IN_BATCHES):
        return Kind.HEADS
    if feature and residual:
        return Kind.EMBEDDING
    if tags & Tag.CHANNEL:
        return Kind.CHANNEL
    if feature:
        return Kind.HIDDEN
    if tags & (Tag.SEQUENCE | Tag.CONTRACTED | Tag.KEPT):
        return Kind.SEQUENCE
    return Kind.OTHER


_FIRST = (
    (Tag.BATCH, Kind.BATCH),
    (Tag.VOCABULARY, Kind.VOCABULARY),
    (Tag.KERNEL_HEIGHT, Kind.KERNEL_HEIGHT),
    (Tag.KERNEL_WIDTH, Kind.KERNEL_WIDTH),
    (Tag.KERNEL_DEPTH, Kind.KERNEL_DEPTH),
    (Tag.CLASSES, Kind.CLASSES),
    (Tag.SPATIAL, Kind.SPATIAL),
    (Tag.SEQUENCE, Kind.SEQUENCE),
    (Tag.INPUT, Kind.INPUT),
    (Tag.OUTPUT, Kind.OUTPUT),
)


def residual_factors(found: Propagation) -> set[Factor]:
    """The leaves of the dimensions of sums ``x + f(x)`` in forward, where f works on activations."""
    order: dict[fx.Node, int] = {}
    residual: set[Factor] = set()
    for node, a, b in found.adds:
        leaves = {find(part) for f in found.of(node) for part in found.factors(f)}
        leaves = {leaf for leaf in leaves if leaf.tags & Tag.FEATURE}
        if not leaves - residual:
            continue
        order = order or {n: i for i, n in enumerate(found.graph.graph.nodes)}
        early, late = sorted((a, b), key=order.__getitem__)
        if _starts_from(late, early, order):
            residual |= leaves
    return residual


def _starts_from(late: fx.Node, early: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether ``late`` is computed from ``early``, with a layer (a product or a convolution) between them."""
    seen, waiting, limit, starts = {late}, [late], order[early], False
    while waiting and len(seen) < _SEARCHED:
        for source in waiting.pop().all_input_nodes:
            if source is early:
                starts = True
            elif source not in seen and order[source] > limit:
                seen.add(source)
                waiting.append(source)
    return starts and any((known := rule(node)) is not None and known.family in _LAYERS for node in seen)


_LAYERS = {"contraction", "convolution", "attention", "recurrent"}
