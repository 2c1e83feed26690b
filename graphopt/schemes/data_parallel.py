"""The data-parallel scheme: each processor runs forward and backward on its rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from graphopt.graph.halves import cut_update
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import BucketGradients, GatherAtOwner, ScatterGradients, SendUpTree, ShardAxes
from graphopt.schemes.base import Prepared, Runner
from graphopt.schemes.divided_step import Divided, lowered
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.several_processors import SeveralProcessors, rewritten, threads_of_each

Synchronise = Literal["all-reduce", "owner", "scatter", "tree"]
"""How gradients come together: summed by all in buckets, beside backward; added by the owner of all parameters; summed
by the processors that own some parameters each; or added up a tree of sends."""


@dataclass(frozen=True)
class DataParallel(SeveralProcessors):
    """Rows of the batch over processors of this machine: this process and workers that it starts.

    Each processor runs forward and backward on its rows; their gradients are brought together; this process updates.
    See `SeveralProcessors` for what a step is.

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
        super().__post_init__()
        self._check("synchronise", get_args(Synchronise))

    @property
    def options(self) -> tuple[str, ...]:
        """See `SeveralProcessors.options`."""
        return (self.synchronise,)

    def why_not_divided(self, prepared: Prepared, size: int) -> str | None:
        """See `SeveralProcessors.why_not_divided`."""
        if size < self.processors:
            return f"a batch of {size} has no row for each of {self.processors} processors"
        self.divided(prepared, size)
        return None

    def divided(self, prepared: Prepared, size: int | None = None) -> Divided:
        """See `SeveralProcessors.divided`; it is the same for all sizes."""
        return prepared.variant(replace(self, threads=1), lambda: self._divided(prepared.step.whole.graph))  # type: ignore[no-any-return]

    def _divided(self, whole: TrainingGraph) -> Divided:
        everyone = range(self.processors)
        if self.synchronise == "scatter":
            graph = self._sharded(whole)
            return Divided(whole, tuple(rewritten(ScatterGradients(k), graph) for k in everyone))
        halves = cut_update(whole)
        graph = self._sharded(halves.first)
        if self.synchronise == "tree":
            found = tuple(SendUpTree(k)(graph).graph for k in everyone)
            return Divided(halves.first, found, halves.second)
        synchronised = GatherAtOwner() if self.synchronise == "owner" else BucketGradients()
        return Divided(halves.first, (synchronised(graph).graph,) * self.processors, halves.second)

    def _sharded(self, graph: TrainingGraph) -> TrainingGraph:
        return rewritten(ShardAxes(self.processors, batch_norm=self.batch_norm), graph)

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`. Starts the workers, which are ready at the first step."""
        divided = self.divided(prepared)
        pool = prepared.task.pools.of(self.processors, self.threads)
        return GraphStep(prepared, lambda graph: lowered(divided, pool, graph))


def data_parallel(processors: int, batch_norm: str) -> tuple[DataParallel, DataParallel]:
    """The data-parallel schemes for so many processors, which share the cores of this machine; best guess first."""
    threads = threads_of_each(processors)
    by_owner, reduced = (
        DataParallel(processors, synchronise, batch_norm, threads)  # type: ignore[arg-type]
        for synchronise in ("owner", "all-reduce")
    )
    return by_owner, reduced
