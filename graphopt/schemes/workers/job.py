"""A job: what all processors of a pool run together, each on its part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphoptError
from graphopt.graph.lowering import lower
from graphopt.graph.op_rules import is_random
from graphopt.graph.sizes import expression
from graphopt.graph.step_module import active_autocast, autocast
from graphopt.graph.training_graph import Input, InputKind, Output, TrainingGraph
from graphopt.schemes.workers.interrupts import InterruptsWait
from graphopt.schemes.workers.mirror import Shelf
from graphopt.schemes.workers.settings import settings
from graphopt.schemes.workers.shared_memory import Place, Segment, place_end, place_of
from graphopt.schemes.workers.team import Team

if TYPE_CHECKING:
    from graphopt.schemes.workers.pool import Pool

_OWN_KINDS = ("batch", "tangent", "place")


class Job:
    """A graph loaded by `Pool.load`, or one for each processor. Call it to run one step on all processors.

    ``common``: the inputs that are the same on all processors; ``own``: those of which each has its own value (its rows
    of the batch, its place in it); ``outputs``: what a step gives in this process, None where a worker gives it. All in
    the order of the graph. ``code``: the Python source of this process's part.
    """

    def __init__(
        self, pool: Pool, number: int, graphs: Sequence[TrainingGraph], own: Collection[Input] | None,
        gathered: Collection[Output] = (),
    ):  # fmt: skip
        """Made by `Pool.load`, from a graph for each processor."""
        graph = graphs[0]
        self.graph, self.graphs = graph, graphs
        self.number = number
        self._pool = pool
        lowered = lower(graph, in_place=False)
        self.outputs: tuple[Output, ...] = lowered.outputs
        self._run, self.code = lowered.run, lowered.code
        wanted = [k for k, output in enumerate(self.outputs) if output in gathered]
        self._outboxes: list[Segment | None] = []
        self._places = [_outbox(each, wanted) for each in graphs[1:]]
        mine = [i.kind in _OWN_KINDS if own is None else i in own for i in graph.inputs]
        self._common = [k for k, m in enumerate(mine) if not m]
        self._own = [k for k, m in enumerate(mine) if m]
        self.common: tuple[Input, ...] = tuple(graph.inputs[k] for k in self._common)
        self.own: tuple[Input, ...] = tuple(graph.inputs[k] for k in self._own)
        self._read = [[bool(each.placeholders[k].users) for k in self._common] for each in graphs[1:]]
        needed = [any(reads) for reads in zip(*self._read, strict=True)]
        self._random = any(is_random(n) for n in graph.nodes if n.op == "call_function")
        written = {o.name for o in graph.outputs}
        self._sent = [(k, i.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or i.name in written)
                      for k, (i, yes) in enumerate(zip(self.common, needed, strict=True)) if yes]  # fmt: skip
        self._team: Team | None = None

    def __call__(
        self,
        common: Sequence[Any],
        parts: Sequence[Sequence[Any]],
        commit: Callable[[tuple[Any, ...]], None] | None = None,
    ) -> tuple[Any, ...]:
        """Run one step: the results of this process, in the order of ``outputs``, when all processors have finished.

        Args:
            common: values of the inputs `common`, tensors or numbers.
            parts: for each processor the values of the inputs `own`; the first are those of this process.
            commit: called with the results when all have finished; Ctrl-C waits for it. Whatever it writes is written
                for a whole step; nothing was written before.

        Raises:
            WorkerError: the step was not made: a worker died, hung or failed, or this process's part failed. The random
                state is that of before.
        """
        if len(common) != len(self.common) or any(len(part) != len(self.own) for part in parts):
            raise GraphoptError(
                f"common, parts: got {len(common)} and {[len(p) for p in parts]} values; "
                f"expected {len(self.common)} (Job.common) and {len(self.own)} for each processor (Job.own)"
            )
        if len(parts) != self._pool.processors:
            raise GraphoptError(f"parts: got {len(parts)}, expected one for each of {self._pool.processors} processors")
        with InterruptsWait():
            results = self._pool.step(self, common, parts)
            if commit is not None:
                commit(results)
        return results

    def gathered(self, position: int) -> list[torch.Tensor]:
        """What the workers that have the output at ``position`` gave for it in the last step, in their order. The
        memory is theirs: the next step overwrites it."""
        return [
            outbox.view(places[position])
            for outbox, places in zip(self._outboxes, self._places, strict=True)
            if outbox is not None and position in places
        ]

    # -- called by the pool ---------------------------------------------------------------------------------------

    def description(self, worker: int, path: str) -> dict[str, Any]:
        """The message that lets a worker (the first is number 0) load its graph, saved at ``path``."""
        read = self._read[worker]
        return {
            "do": "load", "job": self.number, "path": path,
            "common": [k for k, yes in zip(self._common, read, strict=True) if yes],
            "own": self._own, "random": self._random,
            "gathered": [[k, place] for k, place in self._places[worker].items()],
        }  # fmt: skip

    def send(self, team: Team, number: int, common: Sequence[Any], parts: Sequence[Sequence[Any]]) -> None:
        """Tell every worker of ``team`` to do its part of step ``number``."""
        tensors = [common[k] for k, _ in self._sent if isinstance(common[k], torch.Tensor)]
        if team is not self._team:
            changing = [changes for k, changes in self._sent if isinstance(common[k], torch.Tensor)]
            self._team, self._shelf = team, Shelf(team.mirror, changing)
            self._told: Any = None
            sizes = [max(map(place_end, places.values()), default=0) for places in self._places]
            self._outboxes = [Segment.new(nbytes) if nbytes else None for nbytes in sizes]
            self._posted = False
        homes = self._shelf.refresh(tensors)
        shared: dict[str, Any] = {"do": "step", "job": self.number, "number": number}
        if (now := settings()) != team.settings:
            shared["settings"] = team.settings = now
        numbers = [value for value in common if not isinstance(value, torch.Tensor)]
        given: dict[int, Any] | None = None
        if homes or numbers != self._told:
            self._told = numbers
            names = iter(self._shelf.homes)
            given = {k: {"home": next(names)} if isinstance(common[k], torch.Tensor) else common[k]
                     for k, _ in self._sent}  # fmt: skip
        described, segments = team.mirror.news()
        if described:
            shared["homes"] = described
        state = [torch.get_rng_state()] if self._random else []
        for i, (worker, part) in enumerate(zip(team.workers, parts[1:], strict=True)):
            own = [value for value in part if isinstance(value, torch.Tensor)]
            places, fresh = worker.parcel.pack([*own, *state])
            message = {**shared, "parcel": fresh is not None}
            if given is not None:
                message["common"] = [given[k] for k, yes in enumerate(self._read[i]) if yes]
            if state:
                message["random"] = places.pop()
            rest = iter(places)
            message["own"] = [{"place": next(rest)} if isinstance(value, torch.Tensor) else value for value in part]
            new = [*segments, *([fresh] if fresh is not None else [])]
            outbox = self._outboxes[i]
            if outbox is not None and not self._posted:
                new.append(outbox)
                message["outbox"] = True
            worker.tell(message, [segment.file for segment in new])
            if fresh is not None:
                fresh.release()
        for segment in [*segments, *(() if self._posted else filter(None, self._outboxes))]:
            segment.release()
        self._posted = True

    def run(self, common: Sequence[Any], part: Sequence[Any]) -> tuple[Any, ...]:
        """Do the part of this process."""
        arguments: list[Any] = [None] * len(self.graph.inputs)
        for position, value in zip(self._common, common, strict=True):
            arguments[position] = value
        for position, value in zip(self._own, part, strict=True):
            arguments[position] = value
        with torch.no_grad(), autocast(active_autocast(("cpu",)), enabled=False):
            return self._run(*arguments)

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""
        return self._random


def _outbox(graph: TrainingGraph, positions: Sequence[int]) -> dict[int, Place]:
    """Where a worker puts those of the outputs at these positions that its graph gives."""
    places: dict[int, Place] = {}
    end = 0
    for position in positions:
        result = graph.results[position]
        if result is None:
            continue
        value = result.meta["val"]
        if not all(isinstance(expression(size), int) for size in value.shape):
            raise GraphoptError(f"gathered: {graph.outputs[position]} has no fixed size")
        like = torch.empty(tuple(map(int, value.shape)), dtype=value.dtype, device="meta")
        places[position] = place_of(like, end)
        end = place_end(places[position])
    return places
