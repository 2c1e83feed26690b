"""`Scheme`: one way to run a training step on given processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from graphopt.cost_model import Estimate, Machine
from graphopt.graph.batch import BatchLayout
from graphopt.schemes.task import Task


class Runner(Protocol):
    """A step that runs: takes the tensors of a batch in the layout's order, gives the detached loss."""

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def fresh(self) -> bool:
        """Whether what was built still fits the optimizers (options, groups); False asks for a new build."""
        ...


@dataclass(frozen=True)
class Prepared:
    """What `Scheme` objects build from: the task, the layout of the batch, and the optimised step.

    ``step`` is None where the step could not be captured; then only schemes that need no graph are feasible.
    """

    task: Task
    layout: BatchLayout
    step: Any = None  # graphopt.schemes.flat.CapturedStep


@dataclass(frozen=True)
class Scheme(ABC):
    """One way to run a step. Subclasses set ``name``, say when they cannot run (`why_not`) and `build` a runner.

    A scheme must compute what eager computes; those of the default set give the same bits.
    """

    name: ClassVar[str]
    needs_graph: ClassVar[bool] = True
    compiles: ClassVar[bool] = False  # its first step takes seconds, so that it is tried only where they pay back

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """Why this scheme cannot run a batch of ``size``; None if it can."""
        if self.needs_graph and prepared.step is None:
            return "the step could not be captured as a graph"
        return None

    def estimate(self, prepared: Prepared, size: int, machines: Callable[[int], Machine | None]) -> Estimate | None:
        """The price of one step of ``size``; None where this scheme has none.

        ``machines`` gives the calibrated machine for a number of threads, None if there is none.
        """
        return None

    def start_seconds(self, prepared: Prepared) -> float:
        """Seconds that `build` should take where that is more than moments (another capture), 0 once it is made."""
        return 0.0

    @abstractmethod
    def build(self, prepared: Prepared) -> Runner:
        """A runner for batches of this layout."""
