"""Gradients added along a binary tree of sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._collectives import collective
from graphopt.passes._gradient_sums import (
    BUCKET_BYTES,
    Summed,
    at_processor,
    buckets,
    change,
    check_nbytes,
    drop_dead,
    flat,
    nothing,
    output_words,
    piece,
    processors_and_group,
    set_words,
    static_bytes,
    summed_gradients,
    viewed,
)

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class SendUpTree(Pass):
    """Add gradients along a binary tree of sends, up to processor 0: the graph of one processor.

    In round ``r`` processor ``k * 2^(r+1) + 2^r`` sends what it has summed to ``k * 2^(r+1)``, which adds it: after
    ``ceil(log2(processors))`` rounds processor 0 has the sums, and the others have nothing more to do (the reduction of
    Thakur, Rabenseifner, Gropp, 2005, for short messages). Gradients go in buckets of up to ``nbytes``, one message a
    bucket; the first round of a bucket starts when its last gradient is computed, beside the rest of backward.

    A send is an all-to-all in which each processor has one partner at most: every processor runs the same collectives
    in the same order, and gets an empty tensor where it has no partner. (``_c10d_functional.isend`` of torch 2.13 keeps
    the message for ever: it registers its work for two tensors, of which only one can be waited for.)

    Legal because only outputs read these gradients. Outputs that processor 0 alone gives are ``at processor 0`` in
    ``signature.tree["placements"]["outputs"]``; elsewhere they are None. ``processor``: whose graph it is.

    ::

        processor 0 of 2                                      processor 1
        %empty = aten.slice(%flat, 0, 0, 0)                   %message = aten.cat([%flat, ...])
        %sent = all_to_all_single(%empty, [0, n], [0, 0])     %sent = all_to_all_single(%message, [0, 0], [n, 0])
        ... the rest of backward ...                          ... the rest of backward ...
        %got = wait_tensor(%sent)                             %got = wait_tensor(%sent)
        return aten.add(%mm, aten.view(%got[:k]))             return None
    """

    processor: int
    nbytes: int = BUCKET_BYTES

    name: ClassVar[str] = "send_up_tree"
    tier: ClassVar[Tier] = Tier.REORDERS
    drops_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises PassError for a size that is none."""
        check_nbytes(self.nbytes)

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class. Raises PassError where there is no such processor."""
        draft = graph.draft()
        found = [s for s in summed_gradients(draft) if static_bytes(s.reduce) is not None]
        if not found:
            return nothing(self.name, graph)
        processors, _ = processors_and_group(graph, self.processor)
        words, results, changes = output_words(graph), list(draft.results), []
        climbs = [_Climb(draft, bucket, self.processor, processors) for bucket in buckets(found, self.nbytes)]
        for step in rounds(processors):
            for climb in climbs:
                climb.meet(step)
        for climb in climbs:
            for each, total in zip(climb.bucket, climb.totals, strict=True):
                whole = viewed(draft, _contiguous(draft, total), each) if self.processor == 0 else None
                for position in each.outputs:
                    results[position], words[position] = whole, at_processor(0)
            size = sum(static_bytes(each.reduce) or 0 for each in climb.bucket)
            what = f"{len(climb.bucket)} gradients, {size} bytes, go up the tree of {processors} processors"
            changes.append(change(self.name, what, climb.bucket[-1].partial))
        draft.output.args = (tuple(results),)
        drop_dead(draft)
        set_words(draft, words)
        return PassResult(draft.finish(), tuple(changes))


def rounds(processors: int) -> list[int]:
    """How far apart partners are in each round.

    >>> rounds(2), rounds(5)
    ([1], [1, 2, 4])
    """
    return [1 << r for r in range((processors - 1).bit_length())]


class _Climb:
    """One bucket on its way up, as one processor sees it. ``totals``: its sums so far, one a gradient."""

    def __init__(self, draft: Draft, bucket: Sequence[Summed], processor: int, processors: int):
        self.bucket = bucket
        self.totals: list[fx.Node] = [each.reduce.args[0] for each in bucket]  # type: ignore[misc]
        self._draft, self._processor, self._processors = draft, processor, processors
        self._group = bucket[-1].reduce.args[2]
        self._sizes = [each.reduce.meta["val"].numel() for each in bucket]
        self._pending = self._exchange(1, bucket[-1].reduce)

    def meet(self, step: int) -> None:
        """The round in which partners are ``step`` apart: wait for it, at the end of the graph, and add."""
        draft, like = self._draft, self.bucket[-1].reduce
        sent = self._pending if step == 1 else self._exchange(step, draft.output)
        got = collective(draft, c10d.wait_tensor.default, (sent,), sent.meta["val"], like, draft.output)
        if not self._receives(step):
            return
        begin = 0
        for i, (total, size) in enumerate(zip(self.totals, self._sizes, strict=True)):
            part = piece(draft, got, begin, total.meta["val"].shape, like, draft.output)
            self.totals[i] = draft.add(aten.add.Tensor, total, part, like=like, before=draft.output)
            begin += size

    def _exchange(self, step: int, before: fx.Node) -> fx.Node:
        like = self.bucket[-1].reduce
        size, empty = sum(self._sizes), [0] * self._processors
        sends, receives = list(empty), list(empty)
        if self._processor % (2 * step) == step:
            sends[self._processor - step] = size
            message = flat(self._draft, self.totals, like, before)
        else:
            first = flat(self._draft, self.totals[:1], like, before)
            message = self._draft.add(aten.slice.Tensor, first, 0, 0, 0, like=like, before=before)
        if self._receives(step):
            receives[self._processor + step] = size
        value = like.meta["val"].new_empty([sum(receives)])
        arguments = (message, receives, sends, self._group)
        return collective(self._draft, c10d.all_to_all_single.default, arguments, value, like, before)

    def _receives(self, step: int) -> bool:
        return self._processor % (2 * step) == 0 and self._processor + step < self._processors


def _contiguous(draft: Draft, node: fx.Node) -> fx.Node:
    """``node`` as the collective would have given it."""
    if node.meta["val"].is_contiguous():
        return node
    kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
    return draft.add(aten.clone.default, node, like=node, before=draft.output, **kept)
