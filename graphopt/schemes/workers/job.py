"""A job: one graph that all processors of a pool run, each on its part."""

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
    """A graph loaded by `Pool.load`. Call it to run one step on all processors.

    ``common``: the inputs that are the same on all processors; ``own``: those of which each has its own value (its rows
    of the batch, its place in it); ``outputs``: what a step gives in this process. All in the order of the graph.
    """

    def __init__(
        self, pool: Pool, number: int, graph: TrainingGraph, own: Collection[Input] | None,
        gathered: Collection[Output] = (),
    ):  # fmt: skip
        """Made by `Pool.load`."""
        self.graph = graph
        self.number = number
        self._pool = pool
        lowered = lower(graph, in_place=False)
        self.outputs: tuple[Output, ...] = lowered.outputs
        self._run = lowered.run
        self._gathered = [k for k, output in enumerate(self.outputs) if output in gathered]
        self._outboxes: list[Segment] = []
        self._places = _outbox(graph, self._gathered)
        mine = [i.kind in _OWN_KINDS if own is None else i in own for i in graph.inputs]
        self._common = [k for k, m in enumerate(mine) if not m]
        self._own = [k for k, m in enumerate(mine) if m]
        self.common: tuple[Input, ...] = tuple(graph.inputs[k] for k in self._common)
        self.own: tuple[Input, ...] = tuple(graph.inputs[k] for k in self._own)
        self._random = any(is_random(n) for n in graph.nodes if n.op == "call_function")
        written = {o.name for o in graph.outputs}
        self._changing = [
            i.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or i.name in written for i in self.common
        ]
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
        """What the workers gave for the output at ``position`` in the last step, in their order. The memory is theirs:
        the next step overwrites it."""
        place = self._places[self._gathered.index(position)]
        return [outbox.view(place) for outbox in self._outboxes]

    # -- called by the pool ---------------------------------------------------------------------------------------

    def description(self, path: str) -> dict[str, Any]:
        """The message that lets a worker load the graph saved at ``path``."""
        return {
            "do": "load", "job": self.number, "path": path,
            "common": self._common, "own": self._own, "random": self._random,
            "gathered": [[k, place] for k, place in zip(self._gathered, self._places, strict=True)],
        }  # fmt: skip

    def send(self, team: Team, number: int, common: Sequence[Any], parts: Sequence[Sequence[Any]]) -> None:
        """Tell every worker of ``team`` to do its part of step ``number``."""
        tensors = [value for value in common if isinstance(value, torch.Tensor)]
        if team is not self._team:
            changing = [c for c, value in zip(self._changing, common, strict=True) if isinstance(value, torch.Tensor)]
            self._team, self._shelf = team, Shelf(team.mirror, changing)
            self._told: Any = None
            nbytes = place_end(self._places[-1]) if self._places else 0
            self._outboxes = [Segment.new(nbytes) for _ in team.workers] if nbytes else []
            self._posted = False
        homes = self._shelf.refresh(tensors)
        shared: dict[str, Any] = {"do": "step", "job": self.number, "number": number}
        if (now := settings()) != team.settings:
            shared["settings"] = team.settings = now
        numbers = [value for value in common if not isinstance(value, torch.Tensor)]
        if homes or numbers != self._told:
            self._told = numbers
            names = iter(self._shelf.homes)
            shared["common"] = [{"home": next(names)} if isinstance(value, torch.Tensor) else value for value in common]
        described, segments = team.mirror.news()
        if described:
            shared["homes"] = described
        state = [torch.get_rng_state()] if self._random else []
        for i, (worker, part) in enumerate(zip(team.workers, parts[1:], strict=True)):
            own = [value for value in part if isinstance(value, torch.Tensor)]
            places, fresh = worker.parcel.pack([*own, *state])
            message = {**shared, "parcel": fresh is not None}
            if state:
                message["random"] = places.pop()
            rest = iter(places)
            message["own"] = [{"place": next(rest)} if isinstance(value, torch.Tensor) else value for value in part]
            new = [*segments, *([fresh] if fresh is not None else [])]
            if self._outboxes and not self._posted:
                new.append(self._outboxes[i])
                message["outbox"] = True
            worker.tell(message, [segment.file for segment in new])
            if fresh is not None:
                fresh.release()
        for segment in [*segments, *(() if self._posted else self._outboxes)]:
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


def _outbox(graph: TrainingGraph, positions: Sequence[int]) -> list[Place]:
    """Where a worker puts the outputs at these positions."""
    places: list[Place] = []
    for position in positions:
        value = graph.results[position].meta["val"]  # type: ignore[union-attr]
        if not all(isinstance(expression(size), int) for size in value.shape):
            raise GraphoptError(f"gathered: {graph.outputs[position]} has no fixed size")
        like = torch.empty(tuple(map(int, value.shape)), dtype=value.dtype, device="meta")
        places.append(place_of(like, place_end(places[-1]) if places else 0))
    return places
