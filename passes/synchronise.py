"""Ways to synchronise gradients: rewrites of a divided graph, each with other collectives.

`ShardAxes` all-reduces each gradient as soon as it is computed and waits for it: right, and slow. These passes change
how, and what each processor holds afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.sizes import expression
from graphopt.graph.storages import is_view
from graphopt.graph.training_graph import OutputKind, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Tier

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


def summed_gradients(draft: Draft) -> Iterator[Summed]:
    """The gradients of a divided graph that only its outputs read, in the order in which they are computed."""
    positions: dict[fx.Node, list[int]] = {}
    for i, (output, node) in enumerate(zip(draft.signature.outputs, draft.results, strict=True)):
        if node is not None and output.kind in (OutputKind.GRADIENT, OutputKind.SAVED):
            positions.setdefault(node, []).append(i)
    for node in draft.graph.nodes:
        if node.target is not c10d.all_reduce.default or node.args[1] != "sum" or len(node.users) != 1:
            continue
        (wait,) = node.users
        whole = wait
        while len(whole.users) == 1 and is_view(next(iter(whole.users))):
            whole = next(iter(whole.users))
        read_as = {o.kind for o, r in zip(draft.signature.outputs, draft.results, strict=True) if r is whole}
        if whole.users.keys() == {draft.output} and read_as <= {OutputKind.GRADIENT, OutputKind.SAVED}:
            yield Summed(node.args[0], node, wait, whole, tuple(positions[whole]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class GatherAtOwner(Pass):
    """Leave the sums of gradients to one processor, the owner of parameters and optimizer state.

    Each processor gives its own part of each gradient; who runs the graph brings the parts to the owner, which adds
    them in the order of processors, updates, and sends parameters back (a parameter server: Li et al., OSDI 2014). On
    one machine the parts go through shared memory, without a collective.

    Legal because only outputs read these gradients. ``signature.tree["placements"]["outputs"]`` says ``partial sum``
    for them.

    ::

        %all_reduce = all_reduce(%mm, 'sum')
        %wait_tensor = wait_tensor(%all_reduce)   becomes
        return %wait_tensor                       return %mm
    """

    name: ClassVar[str] = "gather_at_owner"
    tier: ClassVar[Tier] = Tier.REORDERS

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        words = _output_words(graph)
        draft = graph.draft()
        results, changes = list(draft.results), []
        for each in list(summed_gradients(draft)):
            source = _viewed(draft, each.partial, each)
            for position in each.outputs:
                results[position], words[position] = source, "partial sum"
            changes.append(
                _change(self.name, f"{draft.signature.outputs[each.outputs[0]]} stays partial", each.partial)
            )
        if not changes:
            return _nothing(self.name, graph)
        draft.output.args = (tuple(results),)
        _drop_dead(draft)
        _set_words(draft, words)
        return PassResult(draft.finish(), tuple(changes))


@dataclass(frozen=True)
class BucketGradients(Pass):
    """All-reduce gradients in buckets, beside the rest of backward.

    Gradients are joined in the order in which they are ready, up to ``nbytes`` a bucket; the sum of a bucket starts
    when its last gradient is computed, and is waited for at the end of the graph. Fewer messages, and computation hides
    them (Li et al., "PyTorch Distributed", VLDB 2020).

    Legal because only outputs read these gradients, and each element of the sum is the same sum.

    ::

        %r1 = all_reduce(%g1); %w1 = wait_tensor(%r1)            %g2 = mm(...)
        %g2 = mm(...)                                   becomes  %r = all_reduce_coalesced([%g1, %g2])
        %r2 = all_reduce(%g2); %w2 = wait_tensor(%r2)            ... the rest of backward ...
        ... the rest of backward ...                             %w1 = wait_tensor(%r[0]); %w2 = wait_tensor(%r[1])
    """

    nbytes: int = BUCKET_BYTES

    name: ClassVar[str] = "bucket_gradients"
    tier: ClassVar[Tier] = Tier.REORDERS

    def __post_init__(self) -> None:
        """Raises PassError for a size that is none."""
        if isinstance(self.nbytes, bool) or not isinstance(self.nbytes, int) or self.nbytes < 1:
            raise PassError(f"nbytes: expected a positive integer (bytes), got {self.nbytes!r}")

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        draft = graph.draft()
        found = [s for s in summed_gradients(draft) if _static_bytes(s.reduce) is not None]
        results, changes = list(draft.results), []
        for bucket in _buckets(found, self.nbytes):
            for each, whole in zip(bucket, self._summed(draft, bucket), strict=True):
                for position in each.outputs:
                    results[position] = whole
            size = sum(_static_bytes(each.reduce) or 0 for each in bucket)
            what = f"one all-reduce of {len(bucket)} gradients, {size} bytes"
            changes.append(_change(self.name, what, bucket[-1].partial))
        if not changes:
            return _nothing(self.name, graph)
        draft.output.args = (tuple(results),)
        _drop_dead(draft)
        return PassResult(draft.finish(), tuple(changes))

    def _summed(self, draft: Draft, bucket: Sequence[Summed]) -> Iterator[fx.Node]:
        """The sums of a bucket. Its collective starts behind the last gradient."""
        last = bucket[-1].reduce
        with draft.graph.inserting_before(last):
            joined = draft.graph.call_function(
                c10d.all_reduce_coalesced.default, ([each.reduce.args[0] for each in bucket], *last.args[1:])
            )
        joined.meta = {**last.meta, "val": [each.reduce.meta["val"] for each in bucket]}
        for i, each in enumerate(bucket):
            node = joined
            for op, argument in ((getitem, (i,)), (c10d.wait_tensor.default, ())):
                with draft.graph.inserting_before(draft.output):
                    node = draft.graph.call_function(op, (node, *argument))  # type: ignore[arg-type]
                node.meta = {**each.wait.meta}
            yield _viewed(draft, node, each)


def _views(each: Summed) -> list[fx.Node]:
    """The views between the waited value and what outputs give."""
    found: list[fx.Node] = []
    node = each.whole
    while node is not each.wait:
        found.append(node)
        node = node.all_input_nodes[0]
    return found[::-1]


def _viewed(draft: Draft, node: fx.Node, each: Summed) -> fx.Node:
    """``node``, which lies as for the collective, in the form that outputs give."""
    for view in _views(each):
        source = node
        with draft.graph.inserting_after(source):
            node = draft.graph.node_copy(view, lambda _, source=source: source)  # type: ignore[misc]
        node.meta = {**view.meta}
    return node


def _static_bytes(node: fx.Node) -> int | None:
    value = node.meta["val"]
    sizes = [expression(size) for size in value.shape]
    return value.numel() * value.element_size() if all(isinstance(size, int) for size in sizes) else None


def _buckets(found: Sequence[Summed], nbytes: int) -> Iterator[list[Summed]]:
    """Neighbours of one dtype, up to so many bytes together."""
    bucket: list[Summed] = []
    size = 0
    for each in found:
        more = _static_bytes(each.reduce) or 0
        other = bucket and bucket[0].reduce.meta["val"].dtype is not each.reduce.meta["val"].dtype
        if bucket and (other or size + more > nbytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(each)
        size += more
    if bucket:
        yield bucket


def _drop_dead(draft: Draft) -> None:
    """Erase collectives (and what lays out their operands) that nobody waits for any more."""
    for node in reversed(list(draft.graph.nodes)):
        ours = node.target in (c10d.all_reduce.default, c10d.wait_tensor.default) or is_view(node)
        if node.op == "call_function" and ours and not node.users:
            draft.graph.erase_node(node)


def _output_words(graph: TrainingGraph) -> list[str]:
    placements: dict[str, Any] = graph.signature.tree.get("placements", {})
    return list(placements.get("outputs", ["replicated"] * len(graph.outputs)))


def _set_words(draft: Draft, words: list[str]) -> None:
    tree = draft.signature.tree
    record = {**tree.get("placements", {}), "outputs": words}
    draft.signature = replace(draft.signature, tree={**tree, "placements": record})


def _change(name: str, what: str, node: fx.Node) -> Change:
    return Change(name, what, node.meta.get("module", ""), node.meta.get("source", ""))


def _nothing(name: str, graph: TrainingGraph) -> PassResult:
    why = "no gradient is all-reduced for the outputs alone; divide the graph by ShardAxes first"
    return PassResult(graph, refusals=(Refusal(name, "gradients", "", "", why),))
