"""`load_target`: the model and the batch that a command is told by ``module:function``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from graphopt.errors import BatchError, GraphoptError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss
from graphopt.graph.capture import capture
from graphopt.passes import GradientLiveness, PassResult, Pipeline
from graphopt.schemes import Task
from graphopt.schemes.captured_step import capture_task
from graphopt.scripts import module_of
from graphopt.step import PASSES

FORM = (
    "(model, batch), (model, batch, loss), (model, batch, loss, optimizer), (model, batch, optimizer) for a model that "
    "returns its own loss, or a dict with those keys"
)


@dataclass(frozen=True)
class Target:
    """What a user's function gives: a model, an example batch, and what trains it."""

    name: str
    model: nn.Module
    batch: Any
    loss: Callable[..., Any] | str | None = None
    optimizer: Any = None

    def captured(self) -> PassResult:
        """The step as a graph, and what the passes of `optimize` did to it."""
        if self.loss is None and self.optimizer is None:
            with self.asking_for_the_loss():
                return Pipeline((GradientLiveness(), *PASSES))(capture(self.model, self.batch))
        loss = ModelLoss if self.loss is None else self.loss
        return capture_task(Task(self.model, loss, as_optimizers(self.optimizer)), self.batch, PASSES).result

    @contextmanager
    def asking_for_the_loss(self) -> Iterator[None]:
        """Without a loss the model is called with the whole batch. Where it rejects that, the error asks whether a loss
        was meant, which takes the target out of the batch."""
        try:
            yield
        except BatchError as error:
            if self.loss is not None or self.optimizer is not None:
                raise
            raise BatchError(
                f"{error}. {self.name} gives no loss, so that the model is called with the whole batch; for one with a "
                "target give (model, batch, loss)"
            ) from error


def load_target(text: str) -> Target:
    """The target that ``module:function`` or ``path/file.py:function`` gives.

    The function is called without arguments and gives a model and a batch, with a loss and an optimizer where the step
    has them (`FORM`). The working directory counts as a place of modules.

    Raises:
        GraphoptError: there is no such module or function, or it gives something else.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise GraphoptError(f"expected module:function or file.py:function, got {text!r}")
    function = getattr(module_of(place), name, None)
    if not callable(function):
        raise GraphoptError(f"{place} has no function {name!r}")
    given = function()
    if isinstance(given, Mapping):
        if unknown := set(given) - {"model", "batch", "loss", "optimizer"}:
            raise GraphoptError(f"{text} gave unknown keys {sorted(map(str, unknown))}; expected {FORM}")
        values = dict(given)
    elif isinstance(given, (tuple, list)) and 2 <= len(given) <= 4:
        values = dict(zip(("model", "batch", "loss", "optimizer"), given))
        if len(given) == 3 and isinstance(given[2], Optimizer):
            values = {"model": given[0], "batch": given[1], "optimizer": given[2]}
    else:
        raise GraphoptError(f"{text} gave {type(given).__name__}; expected {FORM}")
    if not isinstance(values.get("model"), nn.Module) or values.get("batch") is None:
        raise GraphoptError(f"{text} gave no model or no batch; expected {FORM}")
    return Target(text, **values)
