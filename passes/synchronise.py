"""Ways to synchronise gradients: rewrites of a divided graph, each with other collectives.

`ShardAxes` all-reduces each gradient as soon as it is computed and waits for it: right, and slow. These passes change
how, and what each processor holds afterwards. Those here give one graph for all; `SendUpTree` and `ScatterGradients`
give a graph for each processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._gradient_sums import (
    BUCKET_BYTES,
    Summed,
    buckets,
    change,
    check_nbytes,
    drop_dead,
    nothing,
    output_words,
    set_words,
    static_bytes,
    summed_gradients,
    viewed,
)

c10d = torch.ops._c10d_functional


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
        words = output_words(graph)
        draft = graph.draft()
        results, changes = list(draft.results), []
        for each in list(summed_gradients(draft)):
            source = viewed(draft, each.partial, each)
            for position in each.outputs:
                results[position], words[position] = source, "partial sum"
            changes.append(change(self.name, f"{draft.signature.outputs[each.outputs[0]]} stays partial", each.partial))
        if not changes:
            return nothing(self.name, graph)
        draft.output.args = (tuple(results),)
        drop_dead(draft)
        set_words(draft, words)
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
        check_nbytes(self.nbytes)

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        draft = graph.draft()
        found = [s for s in summed_gradients(draft) if static_bytes(s.reduce) is not None]
        results, changes = list(draft.results), []
        for bucket in buckets(found, self.nbytes):
            for each, whole in zip(bucket, self._summed(draft, bucket), strict=True):
                for position in each.outputs:
                    results[position] = whole
            size = sum(static_bytes(each.reduce) or 0 for each in bucket)
            what = f"one all-reduce of {len(bucket)} gradients, {size} bytes"
            changes.append(change(self.name, what, bucket[-1].partial))
        if not changes:
            return nothing(self.name, graph)
        draft.output.args = (tuple(results),)
        drop_dead(draft)
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
            yield viewed(draft, node, each)
