"""`InWorld`: each rank of a world runs forward and backward on its rows; gradients are summed in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.cost_model import Estimate
from graphopt.errors import CaptureError
from graphopt.graph.halves import cut_update
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.op_rules import is_random
from graphopt.graph.training_graph import Input, TrainingGraph
from graphopt.passes import BucketGradients, ShardAxes
from graphopt.schemes.base import Machines, Prepared, Runner
from graphopt.schemes.captured_step import CapturedStep
from graphopt.schemes.channels_last import ChannelsLastImages
from graphopt.schemes.commit import Commit
from graphopt.schemes.divided_step import Divided
from graphopt.schemes.flat import Flat
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.several_processors import rewritten
from graphopt.schemes.workers.interrupts import InterruptsWait
from graphopt.schemes.world.ranks import World

_WAIT = torch.ops._c10d_functional.wait_tensor.default

OWN = "own"
"""How outputs lie that each rank has of its rows alone: statistics of local batch normalisation."""


@dataclass(frozen=True)
class InWorld(Flat):
    """Flat code on every rank of a world, each with its rows of the batch and its own whole model and optimizers.

    Forward and backward run on the rank's rows; gradients, the loss and batch statistics are all-reduced in the graph;
    then every rank makes the same update. What a step computes is what one processor would on the rows of all ranks,
    in the order of ranks: means are those of the whole batch, random numbers are those of rank 0, drawn for all rows.
    Sums are taken in another order, so results differ in their last bits.

    Args:
        ranks: how many there are.
        group: the name of their process group.
        batch_norm: ``"synchronized"``: statistics of the whole batch; ``"local"``: of each rank's rows, as DDP; running
            statistics are then those of rank 0.
    """

    ranks: int
    group: str = "0"
    batch_norm: str = "synchronized"

    kind: ClassVar[str] = "flat in a world"

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        local = ["local batch norm"] * (self.batch_norm == "local")
        return ", ".join((f"flat on {self.ranks} ranks", *local, *self.options))

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`. Divides the graph, which is kept with the step."""
        found = super().why_not(prepared, size)
        if found is not None:
            return found
        try:
            for graph in filter(None, (prepared.step.whole.graph, prepared.step.part)):
                self.divided(prepared, graph)
        except CaptureError as error:
            return str(error)
        return None

    def start_seconds(self, prepared: Prepared) -> float:
        """0: the seconds of this rank's capture are its own, and others would decide differently by theirs. What a
        start takes is seen when the scheme first runs."""
        return 0.0

    def divided(self, prepared: Prepared, graph: TrainingGraph) -> Divided:
        """A graph of the step, cut and divided, made once. Raises CaptureError where it cannot be divided."""
        key = "divided over ranks", self.ranks, self.group, self.batch_norm, id(graph)
        made, _ = prepared.variant(key, lambda: (self._divided(graph), graph))  # with the graph, whose id it is
        return made  # type: ignore[no-any-return]

    def _divided(self, whole: TrainingGraph) -> Divided:
        halves = cut_update(whole)
        shard = ShardAxes(self.ranks, batch_norm=self.batch_norm, group=self.group)  # type: ignore[arg-type]
        graph = waiting_late(BucketGradients()(rewritten(shard, halves.first)).graph)
        return Divided(halves.first, (graph,) * self.ranks, halves.second)

    def runner(self, prepared: Prepared) -> Runner:
        """See `OneProcessor.runner`. Everything is made here: what fails later fails on some ranks only."""
        world = prepared.task.world
        assert world is not None
        step: CapturedStep = self.form.of(prepared)
        here = replace(prepared, step=step)
        runner = GraphStep(here, lambda graph: lowered(self.divided(here, graph), graph, world))
        return ChannelsLastImages(runner, prepared.layout) if self.channels_last else runner

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """None: what collectives cost between ranks is not calibrated."""
        return None


def waiting_late(graph: TrainingGraph) -> TrainingGraph:
    """``graph`` with the sums that only outputs read (the loss, running statistics), and what is computed of them,
    behind all the rest: their collectives run beside it, and ranks need not keep step meanwhile."""
    draft = graph.draft()
    joined: set[fx.Node] = set()  # waits, and what depends on them
    for node in draft.graph.nodes:
        if node.target is _WAIT or (node.op == "call_function" and not joined.isdisjoint(node.all_input_nodes)):
            joined.add(node)
    late: set[fx.Node] = {draft.output}
    for node in reversed(draft.graph.nodes):
        if node in joined and not is_random(node) and late.issuperset(node.users):
            late.add(node)
    for node in list(draft.graph.nodes):
        if node in late and node is not draft.output:
            draft.output.prepend(node)
    return draft.finish()


def lowered(divided: Divided, whole: TrainingGraph, world: World) -> Lowered:
    """A divided graph as a function of the inputs of ``whole``, on this rank's rows."""
    step = _RankStep(divided, whole.inputs, world)
    return Lowered(step, step.outputs, step.code)


class _RankStep:
    """The part of one rank. Nothing of the user's is written before all collectives are over; then new buffers are
    copied into the user's tensors and the update runs in place."""

    def __init__(self, divided: Divided, inputs: Sequence[Input], world: World):
        first, update = divided.graphs[0], divided.update
        assert update is not None
        self._world, self._symbols = world, first.symbols
        self._first = lower(first, in_place=False)
        position = {given: i for i, given in enumerate(inputs)}
        self._inputs = [(i, position.get(i)) for i in first.inputs]
        self._random = any(n.op == "call_function" and is_random(n) for n in first.nodes)
        given = (n.meta["val"] for n in first.placeholders)
        self._devices = list({value.device for value in given if isinstance(value, torch.Tensor)})
        self._own = [k for k, word in enumerate(divided.words) if word == OWN]
        self._commit = Commit(first, self._first.outputs, update, position)
        self.outputs = self._commit.outputs
        self.code = self._first.code + self._commit.code
        self._admitted: set[int] = set()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Raises CaptureError on all ranks, before anything is run, where the graph does not hold for the whole batch;
        RankError where another rank is gone."""
        meeting = self._world.meeting
        if meeting.total not in self._admitted:
            if not self._symbols.admits({"batch": meeting.rows[0], "batch.total": meeting.total}):
                raise CaptureError(f"in this form the captured step does not hold for a batch of {meeting.total}")
            self._admitted.add(meeting.total)
        place = {"total": meeting.total, "begin": meeting.begin}
        given = [inputs[at] if at is not None else place[i.field] for i, at in self._inputs]
        drawing = self._world.random_of_first(self._devices) if self._random else nullcontext()
        with drawing, self._world.reaching():
            results = list(self._first.run(*given))
        if self._own:
            for k, value in zip(self._own, self._world.of_first([results[k] for k in self._own]), strict=True):
                results[k] = value
        with InterruptsWait():
            return self._commit(results, inputs)
