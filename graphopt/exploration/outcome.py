"""What became of a trial, and what a trial may return."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import ExplorationError
from graphopt.exploration.pool import finite_number

__all__ = ["Objectives", "Outcome", "failure", "is_out_of_memory"]

_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: ``done``; ``pruned``: stopped early; ``invalid``: it gave no score that can be compared; ``failed``.
        metrics: numbers by name, as the trial returned them.
        cause: why, where the state is not ``done``.
        seconds: of the trial's own work.
        out_of_memory: whether memory ran out: the process is replaced.
        curve: some of the (step, value) that it reported.
    """

    state: str
    metrics: dict[str, float] = field(default_factory=dict)
    cause: str = ""
    seconds: float = 0.0
    out_of_memory: bool = False
    curve: tuple[tuple[int, float], ...] = ()


class Objectives:
    """Names of metrics and their directions, the main one first.

    >>> objectives = Objectives("accuracy", ("step_seconds",))
    >>> objectives.scores({"accuracy": 0.9, "step_seconds": 0.02})
    (0.9, -0.02)
    """

    def __init__(self, maximize: str | Sequence[str] = (), minimize: str | Sequence[str] = ()):
        up, down = ((names,) if isinstance(names, str) else tuple(names) for names in (maximize, minimize))
        if not up and not down:
            up = ("score",)
        self.signs = {name: 1.0 for name in up} | {name: -1.0 for name in down}
        if len(self.signs) != len(up) + len(down):
            raise ExplorationError(f"maximize and minimize: a metric is named twice in {up} and {down}")
        if not all(isinstance(name, str) and name for name in self.signs):
            raise ExplorationError(f"maximize and minimize: expected names of metrics, got {list(self.signs)!r}")
        self.names = tuple(self.signs)

    @staticmethod
    def from_signs(signs: Mapping[str, float]) -> Objectives:
        """Objectives from ``signs``: 1 for the larger the better, -1 for the smaller, the main one first."""
        found = Objectives(
            [name for name, sign in signs.items() if sign > 0], [name for name, sign in signs.items() if sign < 0]
        )
        found.signs, found.names = dict(signs), tuple(signs)
        return found

    @property
    def main(self) -> str:
        """The first: what ``best`` and early stopping go by."""
        return self.names[0]

    def scores(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The values of all objectives, the larger the better."""
        return tuple(sign * metrics[name] for name, sign in self.signs.items())

    def outcome(self, returned: Any, known: Mapping[str, float], seconds: float) -> Outcome:
        """What a trial that ended by itself returned, checked. ``known`` stands for objectives that it did not measure
        (predictions): they are metrics as well."""
        if finite_number(returned) or isinstance(returned, (float, bool, str, type(None))):
            if finite_number(returned):
                returned = {self.main: returned}
            else:
                return Outcome("invalid", {}, f"the trial returned {returned!r}; expected a finite number", seconds)
        if not isinstance(returned, Mapping):
            what = type(returned).__name__
            return Outcome("invalid", {}, f"the trial returned a {what}; expected a number or numbers by name", seconds)
        metrics = {name: known[name] for name in self.names if name in known}
        for name, value in returned.items():
            if not isinstance(name, str) or not finite_number(value):
                return Outcome(
                    "invalid", {}, f"the trial returned {name!r}: {value!r}; expected a finite number", seconds
                )
            metrics[name] = float(value)
        if missing := [name for name in self.names if name not in metrics]:
            return Outcome("invalid", metrics, f"the trial returned no {missing[0]!r}", seconds)
        return Outcome("done", metrics, "", seconds)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")
    )


def failure(error: BaseException, seconds: float) -> Outcome:
    """The outcome of a trial that raised."""
    lines = traceback.format_exception(error)
    short = "".join(lines).rstrip().splitlines()[-_LINES:]
    if is_out_of_memory(error):
        return Outcome("failed", {}, f"out of memory: {error}", seconds, out_of_memory=True)
    return Outcome("failed", {}, f"{type(error).__name__}: {error}\n" + "\n".join(short), seconds)
