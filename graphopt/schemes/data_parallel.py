"""The data-parallel scheme: each processor runs forward and backward on its rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from graphopt.cost_model import Estimate
from graphopt.cost_model.machine import available_cores
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.halves import cut_update
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import BucketGradients, GatherAtOwner, Pass, ScatterGradients, SendUpTree, ShardAxes
from graphopt.schemes.base import Machines, Prepared, Runner, Scheme
from graphopt.schemes.divided_price import price
from graphopt.schemes.divided_step import Divided, lowered
from graphopt.schemes.graph_step import GraphStep

Synchronise = Literal["all-reduce", "owner", "scatter", "tree"]
"""How gradients come together: summed by all in buckets, beside backward; added by the owner of all parameters; summed
by the processors that own some parameters each; or added up a tree of sends."""


@dataclass(frozen=True)
class DataParallel(Scheme):
    """Rows of the batch over processors of this machine: this process and workers that it starts.

    Each processor runs forward and backward on its rows; their gradients are brought together; this process, which
    owns parameters and optimizer state, updates when all have finished. A step happens whole or not at all. What a step
    computes is what one processor would: means are those of the whole batch, masks are drawn for all of it. Sums are
    taken in another order, so results differ in their last bits.

    Args:
        processors: how many take part, at least 2.
        synchronise: ``"all-reduce"``: every processor gets the sums, in buckets that overlap with backward.
            ``"owner"``: each hands its part to this process, through shared memory, which adds them up.
            ``"tree"``: they are added along a binary tree of sends, whose root is this process. ``"scatter"``: each
            processor gets the sums for its share of the parameters, updates these and hands them to this process with
            their state (ZeRO, stage 1), through shared memory. gloo reduce-scatters at the price of an all-reduce, and
            this process holds all state anyway: it divides the work of the update, no memory.
        batch_norm: ``"synchronized"``: statistics of the whole batch; ``"local"``: of each processor's rows, as DDP.
        threads: of torch on each processor.

    Raises:
        GraphoptError: an option has no such value.
    """

    processors: int = 2
    synchronise: Synchronise = "owner"
    batch_norm: Literal["synchronized", "local"] = "synchronized"
    threads: int = 1

    kind: ClassVar[str] = "data parallel"

    def __post_init__(self) -> None:
        if isinstance(self.processors, bool) or not isinstance(self.processors, int) or self.processors < 2:
            raise GraphoptError(f"processors: expected an integer of at least 2, got {self.processors!r}")
        for name, value, known in (
            ("synchronise", self.synchronise, get_args(Synchronise)),
            ("batch_norm", self.batch_norm, ("synchronized", "local")),
        ):
            if value not in known:
                raise GraphoptError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        parts = [f"{self.kind} on {self.processors}", self.synchronise]
        parts += ["local batch norm"] * (self.batch_norm == "local")
        parts += [f"{self.threads} threads each"] * (self.threads > 1)
        return ", ".join(parts)

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`. Divides the graph, which is kept with the step."""
        found = super().why_not(prepared, size)
        if found is None and prepared.task.accumulate > 1:
            found = "gradients are accumulated over several batches"
        if found is None and any(device.type != "cpu" for device in prepared.layout.devices):
            found = "the batch is not on the CPU, where local workers run"
        if found is None and size < self.processors:
            found = f"a batch of {size} has no row for each of {self.processors} processors"
        if found is not None:
            return found
        try:
            self.divided(prepared)
        except CaptureError as error:
            return str(error)
        return None

    def divided(self, prepared: Prepared) -> Divided:
        """The step cut and divided, made once. Raises CaptureError with the reason where it cannot be divided."""
        return prepared.variant(replace(self, threads=1), lambda: self._divided(prepared.step.whole.graph))  # type: ignore[no-any-return]

    def _divided(self, whole: TrainingGraph) -> Divided:
        everyone = range(self.processors)
        if self.synchronise == "scatter":
            graph = self._sharded(whole)
            return Divided(whole, tuple(_rewritten(ScatterGradients(k), graph) for k in everyone))
        halves = cut_update(whole)
        graph = self._sharded(halves.first)
        if self.synchronise == "tree":
            found = tuple(SendUpTree(k)(graph).graph for k in everyone)
            return Divided(halves.first, found, halves.second)
        synchronised = GatherAtOwner() if self.synchronise == "owner" else BucketGradients()
        return Divided(halves.first, (synchronised(graph).graph,) * self.processors, halves.second)

    def _sharded(self, graph: TrainingGraph) -> TrainingGraph:
        return _rewritten(ShardAxes(self.processors, batch_norm=self.batch_norm), graph)

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`. Starts the workers, which are ready at the first step."""
        divided = self.divided(prepared)
        pool = prepared.task.pools.of(self.processors, self.threads)
        return GraphStep(prepared, lambda graph: lowered(divided, pool, graph))

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`: the largest part and its communication, then the update. None without a link."""
        machine = machines(self.threads)
        if machine is None or machine.link is None:
            return None
        return price(self.divided(prepared), size, machine)


def _rewritten(rewrite: Pass, graph: TrainingGraph) -> TrainingGraph:
    """What a pass that must not refuse makes of ``graph``. Raises CaptureError with its reasons."""
    result = rewrite(graph)
    if result.graph is graph:
        raise CaptureError(f"the step cannot be divided: {'; '.join(r.why for r in result.refusals)}")
    return result.graph


def data_parallel(processors: int, batch_norm: str) -> tuple[DataParallel, DataParallel]:
    """The data-parallel schemes for so many processors, which share the cores of this machine; best guess first."""
    threads = threads_of_each(processors)
    by_owner, reduced = (
        DataParallel(processors, synchronise, batch_norm, threads)  # type: ignore[arg-type]
        for synchronise in ("owner", "all-reduce")
    )
    return by_owner, reduced


def threads_of_each(processors: int) -> int:
    """How many threads each of so many processors gets where they share the cores of this machine."""
    return max(available_cores() // processors, 1)
