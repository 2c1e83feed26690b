"""`Terms`: what a choice takes from the step that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphopt.cost_model.measured import Measurement
from graphopt.schemes import Runner, Scheme
from graphopt.schemes.base import UnderWay


@dataclass(frozen=True)
class Terms:
    """What a choice takes from the step that it belongs to.

    Attributes:
        build: the runner of a scheme, made at the first call.
        start_cost: seconds that the first step of a scheme takes more than any other, 0 where it is of no account.
        ahead: begins the compilation of a scheme in another process, or gives the one that was begun; None where
            there is none.
        remaining: how many steps are still to come after so many at this size.
        keep: takes what was measured: scheme and measurement.
        parts: batches of one step.
        timed: whether clocks show the time of a step without waiting for the device.
    """

    build: Callable[[Scheme], Runner]
    start_cost: Callable[[Scheme], float]
    remaining: Callable[[int], float]
    keep: Callable[[Mapping[str, Measurement]], None]
    ahead: Callable[[Scheme], UnderWay | None] = lambda _: None
    parts: int = 1
    timed: bool = True
