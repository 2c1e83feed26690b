"""`load_target`: the model and the batch that a command is told by ``module:function``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphopt.errors import GraphoptError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss
from graphopt.graph.capture import capture
from graphopt.passes import GradientLiveness, PassResult, Pipeline
from graphopt.schemes import Task
from graphopt.schemes.captured_step import capture_task
from graphopt.scripts import module_of
from graphopt.step import PASSES

FORM = "(model, batch), (model, batch, loss), (model, batch, loss, optimizer), or a dict with those keys"


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
            return Pipeline((GradientLiveness(), *PASSES))(capture(self.model, self.batch))
        loss = ModelLoss if self.loss is None else self.loss
        return capture_task(Task(self.model, loss, as_optimizers(self.optimizer)), self.batch, PASSES).result


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
    else:
        raise GraphoptError(f"{text} gave {type(given).__name__}; expected {FORM}")
    if not isinstance(values.get("model"), nn.Module) or values.get("batch") is None:
        raise GraphoptError(f"{text} gave no model or no batch; expected {FORM}")
    return Target(text, **values)
