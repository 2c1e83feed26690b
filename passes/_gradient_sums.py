"""Gradients that a divided graph sums over processors: where they are, and what ways to synchronise them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.sizes import expression
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import OutputKind, TrainingGraph
from graphopt.passes._base import Change, PassResult, Refusal, place

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

BUCKET_BYTES = 25 * 2**20
"""What `torch.nn.parallel.DistributedDataParallel` takes: large enough for bandwidth, small enough for overlap."""


@dataclass(frozen=True)
class Summed:
    """A gradient that is all-reduced for nobody but the outputs of a graph.

    ``partial``: each processor's own sum; ``reduce``, ``wait``: the collective; ``whole``: what the outputs (at these
    positions) give, views of the waited value.
    """

    partial: fx.Node
    reduce: fx.Node
    wait: fx.Node
    whole: fx.Node
    outputs: tuple[int, ...]


def sums_over_processors(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The all-reduces that give sums, each with the wait that alone reads it, in order."""
    for node in graph.nodes:
        if node.target is c10d.all_reduce.default and node.args[1] == "sum" and len(node.users) == 1:
            (wait,) = node.users
            yield node, wait


def summed_gradients(draft: Draft) -> Iterator[Summed]:
    """The gradients of a divided graph that only its outputs read, in the order in which they are computed."""
    positions: dict[fx.Node, list[int]] = {}
    for i, (output, node) in enumerate(zip(draft.signature.outputs, draft.results, strict=True)):
        if node is not None and output.kind in (OutputKind.GRADIENT, OutputKind.SAVED):
            positions.setdefault(node, []).append(i)
    for node, wait in sums_over_processors(draft.graph):
        whole = wait
        while len(whole.users) == 1 and is_view(next(iter(whole.users))):
            whole = next(iter(whole.users))
        read_as = {o.kind for o, r in zip(draft.signature.outputs, draft.results, strict=True) if r is whole}
        if whole.users.keys() == {draft.output} and read_as <= {OutputKind.GRADIENT, OutputKind.SAVED}:
            yield Summed(node.args[0], node, wait, whole, tuple(positions[whole]))  # type: ignore[arg-type]


def views_of(each: Summed) -> list[fx.Node]:
    """The views between the waited value and what outputs give."""
    found: list[fx.Node] = []
    node = each.whole
    while node is not each.wait:
        found.append(node)
        node = node.all_input_nodes[0]
    return found[::-1]


def viewed(draft: Draft, node: fx.Node, each: Summed) -> fx.Node:
    """``node``, which lies as for the collective, in the form that outputs give."""
    for view in views_of(each):
        source = node
        with draft.graph.inserting_after(source):
            node = draft.graph.node_copy(view, lambda _, source=source: source)  # type: ignore[misc]
        node.meta = {**view.meta}
    return node


def static_bytes(node: fx.Node) -> int | None:
    """Bytes of a value of fixed size; None for one that depends on a free size."""
    value = node.meta["val"]
    sizes = [expression(size) for size in value.shape]
    return value.numel() * value.element_size() if all(isinstance(size, int) for size in sizes) else None


def check_nbytes(nbytes: int) -> None:
    """Raise PassError for the size of a bucket that is none."""
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
        raise PassError(f"nbytes: expected a positive integer (bytes), got {nbytes!r}")


def buckets(found: Sequence[Summed], nbytes: int) -> Iterator[list[Summed]]:
    """Neighbours of one dtype, up to so many bytes together."""
    bucket: list[Summed] = []
    size = 0
    for each in found:
        more = static_bytes(each.reduce) or 0
        other = bucket and bucket[0].reduce.meta["val"].dtype is not each.reduce.meta["val"].dtype
        if bucket and (other or size + more > nbytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(each)
        size += more
    if bucket:
        yield bucket


def drop_dead(draft: Draft) -> None:
    """Erase collectives (and what lays out their operands) that nobody waits for any more."""
    for node in reversed(list(draft.graph.nodes)):
        reduces = node.target is c10d.all_reduce.default
        waits = node.target is c10d.wait_tensor.default and node.args[0].target is c10d.all_reduce.default  # type: ignore[union-attr]
        ours = reduces or waits or is_view(node)
        if node.op == "call_function" and ours and not node.users:
            draft.graph.erase_node(node)


def at_processor(processor: int) -> str:
    """How an output lies that one processor alone gives."""
    return f"at processor {processor}"


def output_words(graph: TrainingGraph) -> list[str]:
    """How each output lies: ``replicated``, ``partial sum``, ``at processor 1`` ..."""
    placements: dict[str, Any] = graph.signature.tree.get("placements", {})
    return list(placements.get("outputs", ["replicated"] * len(graph.outputs)))


def set_words(draft: Draft, words: list[str]) -> None:
    """Record how each output lies now."""
    tree = draft.signature.tree
    record = {**tree.get("placements", {}), "outputs": words}
    draft.signature = replace(draft.signature, tree={**tree, "placements": record})


def change(name: str, what: str, node: fx.Node) -> Change:
    """What a pass did, at the place of ``node``."""
    return Change(name, what, *place(node))


def nothing(name: str, graph: TrainingGraph) -> PassResult:
    """The result where there is no gradient to synchronise."""
    why = "no gradient is all-reduced for the outputs alone; divide the graph by ShardAxes first"
    return PassResult(graph, refusals=(Refusal(name, "gradients", "", "", why),))


def processors_and_group(graph: TrainingGraph, processor: int) -> tuple[int, str]:
    """How many processors a graph is divided over, and the name of their group. Raises PassError where ``processor`` is
    none of them, or the graph is not divided."""
    record: dict[str, Any] = graph.signature.tree.get("placements", {})
    if "processors" not in record:
        raise PassError("the graph is not divided; run ShardAxes first")
    count = int(record["processors"])
    if isinstance(processor, bool) or not isinstance(processor, int) or not 0 <= processor < count:
        raise PassError(f"processor: expected an integer from 0 to {count - 1}, got {processor!r}")
    return count, str(record["group"])


def flat(draft: Draft, values: Sequence[fx.Node], like: fx.Node, before: fx.Node) -> fx.Node:
    """Tensors of fixed size behind each other in one dimension."""
    rows = [
        value
        if value.meta["val"].dim() == 1
        else draft.add(aten.reshape.default, value, [-1], like=like, before=before)
        for value in values
    ]
    return rows[0] if len(rows) == 1 else draft.add(aten.cat.default, rows, like=like, before=before)


def piece(draft: Draft, message: fx.Node, begin: int, shape: Sequence[Any], like: fx.Node, before: fx.Node) -> fx.Node:
    """The tensor of a fixed ``shape`` that starts at element ``begin`` of a flat message: a view of it."""
    sizes = [int(size) for size in shape]
    part = draft.add(aten.slice.Tensor, message, 0, begin, begin + prod(sizes), like=like, before=before)
    return draft.add(aten.view.default, part, sizes, like=like, before=before)
