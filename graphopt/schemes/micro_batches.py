"""Micro-batches: a batch in parts, one after the other; their gradients are added, and one update is made.

It saves memory: what forward keeps for backward is that of one part. The gradient of the loss enters each part's
backward with the part's share in the whole, so that what is added up is the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch

from graphopt.cost_model import Estimate
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.assemble import with_update
from graphopt.graph.lowering import lower
from graphopt.graph.sizes import nbytes
from graphopt.graph.training_graph import Input, InputKind, OutputKind, Phase, TrainingGraph
from graphopt.schemes.base import Machines, Prepared, Runner, fitting
from graphopt.schemes.captured_step import CapturedStep, optimised, part_of
from graphopt.schemes.flat import Flat
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.loss_parts import LossParts, loss_parts
from graphopt.schemes.variants import Form

_FULL = torch.ops.aten.full.default


@dataclass(frozen=True)
class MicroBatches(Flat):
    """The flat scheme on ``count`` parts of the batch in turn, as equal as they can be; one update behind them.

    Where it is exact it differs from the whole batch by rounding: sums over the batch are taken part by part. It is
    exact where the loss is a mean or a sum over samples that do not meet before (no batch statistics), and nothing is
    drawn at random; `why_not` tells otherwise.
    """

    kind: ClassVar[str] = "micro-batches"
    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.count) is not int or self.count < 2:
            raise GraphoptError(f"count: expected an integer of at least 2, got {self.count!r}")
        if self.channels_last or self.precision:
            raise GraphoptError("channels_last and precision: micro-batches have no such form")

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        return ", ".join((f"{self.count} {self.kind}", *self.options))

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`."""
        if found := super().why_not(prepared, size):
            return found
        task, layout, step = prepared.task, prepared.layout, cast(CapturedStep, prepared.step)
        if task.accumulate > 1:
            return "gradients are accumulated over batches already; give smaller ones"
        if step.whole.outside:
            return f"the update is not in the graph: {step.whole.outside}"
        if any(layout.requires_grad):
            return "a tensor of the batch requires a gradient"
        parts = part_sizes(size, self.count)
        if parts[-1] < 2 or not all(step.admits(part) for part in set(parts)):
            return f"the captured step does not hold for parts of {' and '.join(map(str, sorted(set(parts))))}"
        shares = self.shares(prepared)
        return shares if isinstance(shares, str) else None

    def shares(self, prepared: Prepared) -> LossParts | str:
        """How the loss of the whole is made of those of the parts, or why it is not."""
        return cast(
            "LossParts | str",
            prepared.variant("loss in parts", lambda: loss_parts(prepared.step.joint, prepared.layout)),
        )

    def runner(self, prepared: Prepared) -> Runner:
        """See `OneProcessor.runner`."""
        return PartsInTurn(prepared, self)

    def accumulating(self, prepared: Prepared) -> CapturedStep:
        """The step of the last part, with an update of the gradients of all (``part``: that of the others)."""
        return cast(CapturedStep, prepared.variant(("parts", self.fused), lambda: self._accumulating(prepared)))

    def _accumulating(self, prepared: Prepared) -> CapturedStep:
        task, step = prepared.task, cast(CapturedStep, prepared.step)
        joint = with_tangent(step.joint)
        whole = with_update(joint, task.model, task.optimizers, clip=task.clip, accumulated=True, fused=self.fused)
        result = optimised(task, whole, step.passes)
        part = part_of(task, joint, step.passes)
        done = replace(whole, graph=result.graph)
        return replace(
            step, whole=done, part=part, before=whole.graph, result=result, joint=joint, fused=self.fused, variants={}
        )

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`. Memory is that of the largest part, and of all gradients, which wait meanwhile."""
        machine, form = self.machine(prepared, machines), Form(fused=self.fused)
        if machine is None or form.why_not(prepared, size):
            return None
        try:
            graph = form.of(prepared).graph
        except CaptureError:  # which the runner will raise too, where it counts
            return None
        sizes = part_sizes(size, self.count)
        prices = {part: self.priced(graph, part, machine, self.mode) for part in set(sizes)}
        found = [price for part in sizes if (price := prices[part]) is not None]
        if len(found) < len(sizes):
            return None
        gradients = graph.input_nodes(InputKind.PARAMETER).values()
        waiting = sum(int(nbytes(n.meta["val"])) for n in gradients if n.meta["val"].is_floating_point())
        return _in_turn(found, size, waiting)


def _in_turn(parts: Sequence[Estimate], size: int, waiting: int) -> Estimate:
    """The price of a whole batch from those of its parts, each with an update, of which only one is made. ``waiting``:
    bytes of gradients so far."""
    first = parts[0]  # the largest
    seconds = sum(p.seconds for p in parts) - sum(p.terms["optimizer"] for p in parts[1:])
    terms = {term: sum(p.terms[term] for p in parts) for term in first.terms} | {"optimizer": first.terms["optimizer"]}
    updates = np.array([node.meta.get("phase") == Phase.UPDATE for node in first.work.nodes])
    peak = first.peak
    return replace(
        first,
        seconds=seconds,
        interval=(seconds * first.interval[0] / first.seconds, seconds * first.interval[1] / first.seconds),
        terms=terms,
        flops=sum(p.flops for p in parts),
        bytes_moved=sum(p.bytes_moved for p in parts) - int(first.counts.bytes[updates].sum()) * (len(parts) - 1),
        sizes={**first.sizes, "batch": size},
        peak=replace(
            peak, total=peak.total + waiting, own=peak.own + waiting, timeline=peak.timeline + waiting,
            parts={**peak.parts, "gradients so far": waiting},
        ),
        node_seconds=np.where(updates, first.node_seconds, sum(p.node_seconds for p in parts)),
    )  # fmt: skip


def part_sizes(size: int, count: int) -> list[int]:
    """A batch of ``size`` in ``count`` parts, larger ones first.

    >>> part_sizes(11, 4)
    [3, 3, 3, 2]
    """
    return [size // count + (k < size % count) for k in range(count)]


def with_tangent(joint: TrainingGraph) -> TrainingGraph:
    """The joint graph with the gradient of its loss, a constant one, as an input (``tangent loss``).

    Raises CaptureError if backward does not begin with it.
    """
    draft = joint.draft()
    (loss,) = (r for o, r in zip(joint.outputs, joint.results, strict=True) if o.kind is OutputKind.LOSS)
    assert loss is not None
    shape = list(loss.meta["val"].shape)
    ones = [n for n in draft.graph.nodes if n.meta.get("phase") == Phase.BACKWARD and n.target is _FULL]
    ones = [n for n in ones if n.args == (shape, 1.0)]
    if len(ones) != 1:
        raise CaptureError("the gradient of the loss is not the one constant that backward begins with")
    (first,) = ones
    with draft.graph.inserting_after(draft.placeholders[-1]):
        tangent = draft.graph.placeholder("tangent_loss")
    tangent.meta = {**first.meta, "phase": Phase.INPUT}
    draft.replace(first, tangent)
    inputs = (*draft.signature.inputs, Input(InputKind.TANGENT, "loss"))
    draft.signature = replace(draft.signature, inputs=inputs)
    return draft.finish()


class PartsInTurn:
    """Runs the parts of a batch, and the update with the last."""

    def __init__(self, prepared: Prepared, scheme: MicroBatches):
        self._prepared, self._scheme = prepared, scheme
        self._batched = prepared.layout.batched
        self._shares: LossParts | None = None
        self._step: GraphStep | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch. Raises at the first one CaptureError where the step has no such form, Stale where it was made
        before an optimizer changed."""
        if self._step is None or self._shares is None:
            shares = self._scheme.shares(self._prepared)
            if isinstance(shares, str):
                raise CaptureError(shares)
            step = self._scheme.accumulating(self._prepared)
            self._step = GraphStep(replace(self._prepared, step=step), lower)
            fitting(self._step)
            self._shares = shares
        size = int(tensors[self._batched.index(True)].shape[0])
        sizes = part_sizes(size, self._scheme.count)
        split = [t.split(sizes) if one else [t] * len(sizes) for t, one in zip(tensors, self._batched, strict=True)]
        parts = list(zip(*split, strict=True))
        return self._step.in_parts(parts, self._shares.of(parts, sizes))

    def fresh(self) -> bool:
        """See `Runner`."""
        return self._step is None or self._step.fresh()

    def close(self) -> None:
        """See `Runner`."""
        if self._step is not None:
            self._step.close()
