"""`GraphSteps`: sets of subnets that come again, each as one step of `graphopt.optimize`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from graphopt.elastic.choice import Choice
from graphopt.elastic.kept import Kept
from graphopt.elastic.several import Several, inputs_of
from graphopt.elastic.space import Space
from graphopt.graph.batch import ModelLoss
from graphopt.schemes import Scheme, Task
from graphopt.schemes.world.candidates import schemes_in_world
from graphopt.settings import Settings, as_schemes
from graphopt.step import PASSES
from graphopt.training_step import TrainingStep
from graphopt.world_step import WorldStep

MOST = 64
"""Sets that get a graph: each takes a capture, and memory for its code."""


class GraphSteps:
    """Steps of `graphopt.optimize` for the sets of subnets of a space, made when a set comes for the second time.

    Args:
        space: the supernet.
        task: the step: model, loss, optimizers, clipping, and the world or the local workers that share it.
        schemes, processors, batch_norm: as in `graphopt.optimize`.

    Raises:
        GraphoptError: schemes that there are not, or that do not fit the number of processors.
    """

    def __init__(
        self,
        space: Space,
        task: Task,
        schemes: str | Sequence[str | Scheme],
        processors: int | None,
        batch_norm: str,
    ):
        self._space, self._task = space, task
        found = (
            as_schemes(schemes, processors, batch_norm)
            if task.world is None
            else schemes_in_world(schemes, task.world, batch_norm)
        )
        self._settings = Settings(found, processors, batch_norm=batch_norm)
        self._seen: Kept[bool] = Kept()
        self._steps: dict[Hashable, tuple[Several, TrainingStep]] = {}

    def of(
        self, choices: Sequence[Choice], batch: Any, loss: Callable[..., Any] | str, combine: str
    ) -> tuple[Several, TrainingStep] | None:
        """The step of these subnets in the present state of the model, with the model that it is a step of; None where
        they come for the first time, or too many other sets came before."""
        state = self._space.subnet(self._space.full, batch=inputs_of(batch, loss)).origin
        key = combine, id(state), tuple(choice.key() for choice in choices)
        if key not in self._steps:
            if key not in self._seen or len(self._steps) == MOST:
                self._seen[key] = True
                return None
            several = Several(self._space, choices, loss, combine, batch)
            task = replace(self._task, model=several, loss=ModelLoss)
            kind = TrainingStep if task.world is None else WorldStep
            self._steps[key] = several, kind(task, batch, self._settings, PASSES, verify=False)
        return self._steps[key]
