"""Sharding: one graph that every processor runs on its part of an axis, with collectives where parts must be joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx

from graphopt.errors import PassError
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes._axis_flow import AxisFlow
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Tier, place
from graphopt.passes._batch_norm_sums import BatchNormSums, trains_batch_norm
from graphopt.passes._collectives import join
from graphopt.passes._placement import Misplaced, Own, Placement, Sharded
from graphopt.passes._placements import Placements
from graphopt.passes._places import Places
from graphopt.passes._rewriting import remove_dead
from graphopt.passes._shared_draws import SharedDraws
from graphopt.passes._whole_sums import WholeSums


@dataclass(frozen=True)
class ShardAxes(Pass):
    """Divide an axis over processors: the same graph for all of them, each runs it on its part.

    ``processors``: how many there are. ``axis``: the one to divide, the batch. ``batch_norm``: ``"synchronized"``
    normalises by the statistics of the whole batch, as one processor would; ``"local"`` each part by its own, as
    `torch.nn.parallel.DistributedDataParallel` does, another function that costs no collective. ``group``: the name of
    the process group that collectives run in.

    Legal because parts are taken of what is the same for every row, and joined where it is not:

    1. Means over the batch become sums divided by the size of the whole batch, train-mode batch normalisation too.
       Random numbers are drawn for the whole batch. Numbers that are computed with are those of the whole batch.
    2. Placements flow through forward, backward and update (`passes/_placements.py`): what carries the batch is
       sharded, a sum over it is partial, and partial values are all-reduced as soon as they are ready where somebody
       needs the whole: losses, statistics, gradients of parameters.
    3. What cannot be divided exactly is refused, and the graph stays as it is.

    The result has the inputs ``batch.total`` (rows of the whole batch) and perhaps ``batch.begin`` (first row of the
    part); its free size ``batch`` is that of the part, so parts may be of unequal size, and sizes of 1 are allowed. Its
    guards are those of the graph before, on the whole batch. ``signature.tree["placements"]`` says how inputs and
    outputs lie. With ``"local"``, new running statistics are each processor's own: keep those of processor 0.

    ::

        %mm = aten.mm(%grad, %x)              %mm = aten.mm(%grad, %x)
        return %mm                  becomes   %all_reduce = _c10d_functional.all_reduce(%mm, 'sum', 'graphopt')
                                              %wait_tensor = _c10d_functional.wait_tensor(%all_reduce)
                                              return %wait_tensor

    >>> import torch
    >>> from graphopt.graph.capture import capture
    >>> net, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))
    >>> graph = capture(net, batch, loss=torch.nn.functional.mse_loss)
    >>> for change in ShardAxes(processors=2)(graph).changes:
    ...     print(change.what)
    aten.mse_loss takes the sum, divided by the size of the whole batch
    aten.mse_loss_backward takes the sum, divided by the size of the whole batch
    all-reduce of 4 bytes
    all-reduce of 24 bytes
    all-reduce of 8 bytes
    divided the axis 'batch' over 2 processors
    """

    processors: int
    axis: str = "batch"
    batch_norm: Literal["synchronized", "local"] = "synchronized"
    group: str = "graphopt"

    name: ClassVar[str] = "shard_axes"
    tier: ClassVar[Tier] = Tier.REORDERS
    adds_inputs: ClassVar[frozenset[InputKind]] = frozenset({InputKind.PLACE})

    def __post_init__(self) -> None:
        """Raises PassError for options that mean nothing."""
        if not isinstance(self.processors, int) or self.processors < 2:
            raise PassError(f"processors: expected an int of at least 2, got {self.processors!r}")
        if self.axis != "batch":
            raise PassError(f"axis: only 'batch' can be divided, got {self.axis!r}")
        if self.batch_norm not in ("synchronized", "local"):
            raise PassError(f"batch_norm: expected 'synchronized' or 'local', got {self.batch_norm!r}")

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        if self.axis not in graph.symbols.symbols:
            size = graph.symbols.hints.get(self.axis)
            return self._refused(graph, f"its size is fixed at {size}" if size else "the graph has none")
        if graph.input_nodes(InputKind.PLACE):
            return self._refused(graph, "the graph is divided already")
        try:
            return self._sharded(graph)
        except Misplaced as error:
            return self._refused(graph, error.why, error.node)
        except PassError as error:
            return self._refused(graph, str(error))

    def _refused(self, graph: TrainingGraph, why: str, node: fx.Node | None = None) -> PassResult:
        what = f"the axis {self.axis!r} over {self.processors} processors"
        module, source = place(node) if node is not None else ("", "")
        why = f"{node.name} ({node.target}): {why}" if node is not None else why
        return PassResult(graph, refusals=(Refusal(self.name, what, module, source, why),))

    def _sharded(self, graph: TrainingGraph) -> PassResult:
        found = AxisFlow.of_batch(graph)
        self._check_axis(found)
        draft = graph.draft()
        places = Places(draft, self.axis, self.processors)
        draws = SharedDraws(draft, found, places)
        rewrites: list[Any] = [draws, WholeSums(draft, found, places)]
        if self.batch_norm == "synchronized":
            rewrites.append(BatchNormSums(draft, found, places))
        for rewrite in rewrites:
            rewrite.rewrite()
        remove_dead(draft)
        summed = draft.finish()
        placed = Placements(AxisFlow.of_batch(summed, draws.parts, draws.rows), self._own)
        result, joined = self._joined(summed, placed)
        changes = [self._change(what, node) for each in rewrites for node, what in each.done.items()]
        changes += [self._change(what, node) for what, node in joined]
        changes.append(Change(self.name, f"divided the axis {self.axis!r} over {self.processors} processors"))
        return PassResult(result, tuple(changes))

    def _own(self, node: fx.Node) -> bool:
        return self.batch_norm == "local" and trains_batch_norm(node)

    def _check_axis(self, found: AxisFlow) -> None:
        if not found.where_inputs():
            raise PassError("no input carries it")
        if found.axis.parts:
            raise PassError(f"it is split at {found.axis.place}")

    def _change(self, what: str, node: fx.Node) -> Change:
        return Change(self.name, what, *place(node))

    def _joined(self, graph: TrainingGraph, placed: Placements) -> tuple[TrainingGraph, list[tuple[str, fx.Node]]]:
        """The graph with collectives, and a word and a place for each."""
        draft = graph.draft()
        joined = []
        for node, how in placed.reduced.items():
            size = join(draft, draft.node(node), how, self.group)
            joined.append((f"all-reduce of {graph.symbols.rename(size)} bytes", node))
        inputs = {
            f"{i.name}.{i.field}" if i.field else i.name: placed.of[n]
            for i, n in zip(graph.inputs, graph.placeholders)
            if isinstance(placed.of[n], Sharded)
        }
        record = {
            "axis": self.axis,
            "processors": self.processors,
            "group": self.group,
            "inputs": {name: str(placement) for name, placement in inputs.items()},
            "outputs": [_word(placed, n) for n in graph.results],
        }
        tree = {**draft.signature.tree, "placements": record}
        draft.signature = replace(draft.signature, tree=tree)
        return draft.finish(), joined


def _word(placed: Placements, node: fx.Node | None) -> str:
    """How an output lies, as text."""
    if node is None:
        return "replicated"
    placement: Placement = placed.of[node]
    return str(placement) if isinstance(placement, (Sharded, Own)) else "replicated"
