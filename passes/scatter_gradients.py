"""Gradients reduce-scattered to the processors that own their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import is_pure
from graphopt.graph.storages import is_view, storage_root
from graphopt.graph.training_graph import OutputKind, Phase, TrainingGraph
from graphopt.passes._base import Pass, PassResult, Refusal, Tier
from graphopt.passes._collectives import collective
from graphopt.passes._gradient_sums import (
    BUCKET_BYTES,
    Summed,
    at_processor,
    buckets,
    change,
    check_nbytes,
    flat,
    output_words,
    piece,
    processors_and_group,
    set_words,
    static_bytes,
    sums_over_processors,
)
from graphopt.passes._owners import OWNED, owners
from graphopt.passes._prune_lists import prune_lists

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class ScatterGradients(Pass):
    """Divide the update: each processor gets the sums of its parameters' gradients, and updates these only.

    ZeRO, stage 1 (Rajbhandari et al., SC 2020). Parameters are divided whole, balanced by the bytes of parameter and
    state. Gradients go in buckets of up to ``nbytes`` as they are ready; those of a bucket are joined in the order of
    their owners, each owner's part padded to the longest, and reduce-scattered beside the rest of backward.

    Runs on a whole step divided by `ShardAxes`; gives the graph of one ``processor``: the collectives of all, the
    update of its parameters. ``signature.tree["placements"]["outputs"]`` says ``at processor 1`` of the outputs that
    belong to a parameter; they are None in the graphs of the other processors. Inputs stay; those of others' parameters
    and state may have no reader.

    Legal because only the update (or an output) reads these gradients, each element of the sum is the same sum, and the
    update of each parameter reads no gradient of another owner's (else it is refused: clipping by norm).

    ::

        %r1 = all_reduce(%g1); %w1 = wait_tensor(%r1)            %flat = aten.cat([%g1, %g2])
        %r2 = all_reduce(%g2); %w2 = wait_tensor(%r2)   becomes  %r = reduce_scatter_tensor(%flat, 'sum', 2)
        %p1 = aten.add(%a, %w1, alpha=%lr)              at 1     %w2 = wait_tensor(%r)
        %p2 = aten.add(%b, %w2, alpha=%lr)                       %p2 = aten.add(%b, %w2, alpha=%lr)
        return %p1, %p2                                          return None, %p2
    """

    processor: int
    nbytes: int = BUCKET_BYTES

    name: ClassVar[str] = "scatter_gradients"
    tier: ClassVar[Tier] = Tier.REORDERS
    drops_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises PassError for a size that is none."""
        check_nbytes(self.nbytes)

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class. Raises PassError where there is no such processor."""
        processors, _ = processors_and_group(graph, self.processor)
        if all(o.kind is not OutputKind.PARAMETER for o in graph.outputs):
            return self._refused(graph, "the update is outside of the graph, so there is nothing to divide")
        found = _read_by_update(graph)
        if not found:
            return self._refused(graph, "no gradient is all-reduced for the update alone")
        try:
            owner = owners(graph, [each.wait for each in found], processors)
        except PassError as error:
            return self._refused(graph, str(error))
        draft, changes = graph.draft(), []
        of = {draft.node(node): processor for node, processor in owner.gradients.items()}
        sums = [_in_draft(draft, each) for each in found if each.wait in owner.gradients]
        for bucket in buckets(sums, self.nbytes):
            parts = [[each for each in bucket if of[each.wait] == k] for k in range(processors)]
            size = self._scatter(draft, bucket, parts)
            what = f"one reduce-scatter of {len(bucket)} gradients, {size} bytes"
            changes.append(change(self.name, what, bucket[-1].partial))
        self._keep_own(draft, output_words(graph), owner.parameters)
        _drop_unread(draft, {node for each in sums for node in (each.reduce, each.wait)})
        return PassResult(draft.finish(), tuple(changes))

    def _scatter(self, draft: Draft, bucket: Sequence[Summed], parts: Sequence[Sequence[Summed]]) -> int:
        """Sum a bucket and let the readers of own gradients read the sums. Gives the bytes of the message."""
        last, group = bucket[-1].reduce, bucket[-1].reduce.args[2]
        counts = [sum(each.reduce.meta["val"].numel() for each in part) for part in parts]
        longest = max(counts)
        rows: list[fx.Node] = []
        for part, count in zip(parts, counts, strict=True):
            rows += [each.partial for each in part]
            if count < longest:
                value = last.meta["val"]
                given = {"dtype": value.dtype, "device": value.device}
                rows.append(draft.add(aten.full.default, [longest - count], 0, like=last, before=last, **given))
        message = flat(draft, rows, last, last)
        mine = last.meta["val"].new_empty([longest])
        arguments = (message, "sum", len(parts), group)
        scattered = collective(draft, c10d.reduce_scatter_tensor.default, arguments, mine, last, last)
        first = _first_reader(draft, [each.wait for each in bucket])
        got = collective(draft, c10d.wait_tensor.default, (scattered,), mine, last, first)
        begin = 0
        for each in parts[self.processor]:
            shape = each.wait.meta["val"].shape
            whole = piece(draft, got, begin, shape, each.wait, first)
            begin += each.wait.meta["val"].numel()
            _move_views(each.wait, first)
            each.wait.replace_all_uses_with(whole)
        return longest * len(parts) * last.meta["val"].element_size()

    def _keep_own(self, draft: Draft, words: list[str], owner: Mapping[str, int]) -> None:
        """Give the outputs of own parameters, each in memory of its own; those of others are None."""
        results = draft.results
        for position, (output, result) in enumerate(zip(draft.signature.outputs, results, strict=True)):
            if output.kind not in OWNED or output.name not in owner or result is None:
                continue
            words[position] = at_processor(owner[output.name])
            if owner[output.name] != self.processor:
                results[position] = None
            elif storage_root(result).target is c10d.wait_tensor.default:
                results[position] = draft.add(aten.clone.default, result, like=result, before=draft.output)
        draft.output.args = (tuple(results),)
        set_words(draft, words)

    def _refused(self, graph: TrainingGraph, why: str) -> PassResult:
        return PassResult(graph, refusals=(Refusal(self.name, "the update", "", "", why),))


def _read_by_update(graph: TrainingGraph) -> list[Summed]:
    """The gradients of fixed size that only the update and the outputs of parameters read, as they are ready."""
    others = {r for o, r in zip(graph.outputs, graph.results, strict=True) if o.kind not in OWNED}
    found = []
    for node, wait in sums_over_processors(graph.graph):
        values = [wait, *_views(wait)]
        readers = {user for value in values for user in value.users if user not in values}
        late = all(user.meta.get("phase") == Phase.UPDATE or user.op == "output" for user in readers)
        if late and others.isdisjoint(values) and static_bytes(node) is not None:
            found.append(Summed(node.args[0], node, wait, wait, ()))  # type: ignore[arg-type]
    return found


def _in_draft(draft: Draft, each: Summed) -> Summed:
    partial, reduce, wait = map(draft.node, (each.partial, each.reduce, each.wait))
    return Summed(partial, reduce, wait, wait, ())


def _views(node: fx.Node) -> list[fx.Node]:
    """All views of a value outside of the update, each behind what it looks at."""
    found = []
    for user in node.users:
        if is_view(user) and user.meta.get("phase") != Phase.UPDATE:
            found += [user, *_views(user)]
    return found


def _first_reader(draft: Draft, waits: Sequence[fx.Node]) -> fx.Node:
    """The first operator that reads one of these values, not only looks at it in another form."""
    readers: set[fx.Node] = set()
    for wait in waits:
        values = [wait, *_views(wait)]
        readers.update(user for value in values for user in value.users if user not in values)
    return next(node for node in draft.graph.nodes if node in readers)


def _move_views(wait: fx.Node, before: fx.Node) -> None:
    for view in _views(wait):
        before.prepend(view)


def _drop_unread(draft: Draft, replaced: AbstractSet[fx.Node]) -> None:
    """Erase what no output depends on any more, shortening lists, and the collectives that were replaced."""
    while True:
        for node in reversed(list(draft.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and (is_pure(node) or node in replaced):
                draft.graph.erase_node(node)
        if not prune_lists(draft):
            return
