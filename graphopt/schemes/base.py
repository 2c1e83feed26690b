"""`Scheme`: one way to run a training step on given processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from graphopt.cost_model import Estimate, Machine
from graphopt.errors import CaptureError
from graphopt.graph.batch import BatchLayout
from graphopt.schemes.task import Task

Machines = Callable[[int], Machine | None]
"""The calibrated machine for a number of threads of torch; None where there is none."""


class UnderWay(Protocol):
    """What takes a while in another process: whether it is ``done``, and whether it has ``failed`` then."""

    @property
    def done(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def close(self) -> None:
        """End it."""
        ...


class Stale(Exception):
    """What a runner has just built is of a step that was captured before an optimizer changed. Never reaches a user:
    the step is planned anew."""


class Runner(Protocol):
    """A step that runs: takes the tensors of a batch in the layout's order, gives the detached loss.

    Raises CaptureError at its first call where the step turns out to have no such form, and `Stale` where what it
    builds at a call is; then nothing was run.
    """

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def fresh(self) -> bool:
        """Whether what was built still fits the optimizers (options, groups); False asks for a new build."""
        ...

    def close(self) -> None:
        """Give back what it holds besides memory: processes, recordings. It is not called afterwards."""
        ...


def fitting(built: Runner) -> Runner:
    """A runner that was built a moment ago, to be run now. Raises Stale where it does not fit the optimizers."""
    if not built.fresh():
        raise Stale
    return built


@dataclass(frozen=True)
class Prepared:
    """What `Scheme` objects build from: the task, the layout of the batch, and the optimised step.

    ``step`` is None where the step could not be captured; then only schemes that need no graph are feasible.
    """

    task: Task
    layout: BatchLayout
    step: Any = None  # graphopt.schemes.flat.CapturedStep
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def variant(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives (the step captured or assembled in another way), made once and kept with the step.

        Raises the CaptureError that ``make`` raised, without another try.
        """
        kept = self._kept if self.step is None else self.step.variants
        if key not in kept:
            try:
                kept[key] = make()
            except CaptureError as error:
                kept[key] = error
        if isinstance(kept[key], CaptureError):
            raise kept[key]
        return kept[key]

    def has_variant(self, key: Hashable) -> bool:
        """Whether `variant` would give this one at once."""
        kept = self._kept if self.step is None else self.step.variants
        return key in kept and not isinstance(kept[key], CaptureError)


@dataclass(frozen=True)
class Scheme(ABC):
    """One way to run a step. Subclasses set ``kind``, say when they cannot run (`why_not`), what a step costs
    (`estimate`), and `build` a runner.

    A scheme must compute what eager computes; one that may round differently says so.

    ``required``: training stops with the error where this scheme cannot run, instead of going on with another one.
    """

    kind: ClassVar[str]
    needs_graph: ClassVar[bool] = True
    required: bool = field(default=False, kw_only=True)
    compiles: ClassVar[bool] = False  # its first step takes seconds, so that it is tried only where they pay back
    compiles_ahead: ClassVar[bool] = False  # most of that can be done in another process (`ahead`)

    @property
    def name(self) -> str:
        """Of the kind and the options that are not the defaults: ``eager, 1 thread``. Unique among candidates."""
        return self.kind

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """Why this scheme cannot run a batch of ``size``; None if it can."""
        if self.needs_graph and prepared.step is None:
            return "the step could not be captured as a graph"
        return None

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """The price of one step at batch ``size``; None where it cannot be priced, for one without a calibration."""
        return None

    def start_seconds(self, prepared: Prepared) -> float:
        """Seconds that `build` should take where that is more than moments (another capture), 0 once it is made."""
        return 0.0

    def ahead(self, prepared: Prepared, size: int) -> UnderWay | None:
        """Start now, in another process, what makes the first step at this size start sooner; None: that cannot
        be."""
        return None

    @abstractmethod
    def build(self, prepared: Prepared) -> Runner:
        """A runner for batches of this layout."""
