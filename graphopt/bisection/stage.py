"""`Stage`: a step after some of its passes, as a check sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from graphopt.errors import GraphoptError
from graphopt.graph.assemble import WholeStep
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import Pass
from graphopt.schemes import Task
from graphopt.step import TrainingStep, optimize
from graphopt.verify import fresh_batch, run_graph, run_step


@dataclass(frozen=True)
class Stage:
    """A training step after some of its passes.

    Attributes:
        name: of the last pass; ``capture`` before the first one.
        task: model, loss and optimizers; they must not be changed.
        batch: the example.
        joint: forward, loss and backward, after the passes behind gradient liveness.
        whole: the whole step, with its update, after all of them.
        passes: those behind gradient liveness that have run.
    """

    name: str
    task: Task
    batch: Any
    joint: TrainingGraph
    whole: WholeStep
    passes: tuple[Pass, ...] = ()

    @property
    def graph(self) -> TrainingGraph:
        """The graph of the whole step."""
        return self.whole.graph

    def values(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        """Loss, gradients and new buffers, by ``loss``, ``gradient <name>`` and ``new buffer <name>``: of the example
        batch, or of a random one that looks like it. Changes nothing."""
        batch = self.batch if seed is None else fresh_batch(self.batch, seed)
        return run_graph(self.joint, self.task.model, batch, seed=seed or 0).values

    def outputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """All outputs of the whole step by kind and name (``new parameter 0.weight``), of a random batch and random
        optimizer state. Changes nothing."""
        return run_step(self.whole, self.task, self.batch, seed=seed).values

    def step(self) -> TrainingStep:
        """A step to train with: flat code on copies of model and optimizers (``step.task.model``), with gradient
        liveness and the passes so far.

        Raises:
            GraphoptError: the model or an optimizer cannot be copied.
        """
        task = self.task
        try:
            model, loss, optimizers = copy.deepcopy((task.model, task.loss, task.optimizers))
        except (RuntimeError, TypeError) as error:
            raise GraphoptError(f"bisect: {type(task.model).__name__} cannot be copied: {error}") from error
        made = optimize(
            model, self.batch, loss=loss, optimizer=list(optimizers), clip=task.clip, accumulate=task.accumulate,
            schemes="flat", passes=self.passes,
        )  # fmt: skip
        assert isinstance(made, TrainingStep)
        return made


Check: TypeAlias = Callable[[Stage], str | bool | None]
"""A check of a user's own: None or True: all right; False or a sentence: it is not. An exception counts as wrong."""


def ask(check: Check, stage: Stage) -> str | None:
    """What a check has against a stage, None if nothing.

    Raises:
        GraphoptError: the check gave something that is neither a sentence, True, False nor None.
    """
    try:
        found = check(stage)
    except Exception as error:  # an assertion, or what the user came for: a step that raises
        return f"the check raised {type(error).__name__}: {error}"
    if found is None or found is True:
        return None
    if found is False:
        return "the check says no"
    if not isinstance(found, str):
        raise GraphoptError(f"check: expected None, True, False or a sentence, got {type(found).__name__}")
    return found
