"""The trainer's work: build the net of a task, run the user's trial on it, and say how that ended."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.exploration.context import Context, Invalid, Pruned
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.outcome import Objectives, Outcome, failure
from graphopt.exploration.search_space import Point, SearchSpace, net_of
from graphopt.exploration.seeding import seeded

__all__ = ["Task", "Trainer", "TrainerSetup"]

_CURVE = 50  # points of a curve that are kept


@dataclass(frozen=True)
class Task:
    """A model to be trained. See `Context` for its fields."""

    number: int
    point: Point
    seed: int
    attempt: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    effort: float = 1.0
    final: bool = False


@dataclass(frozen=True)
class TrainerSetup:
    """All that a trainer needs, sent to it once. ``folder``: where trials have theirs."""

    space: SearchSpace
    nets: Any
    trial: Callable[..., Any]
    objectives: Objectives
    stopping: ASHA | None
    folder: Path
    keep_folders: bool = False


Tell = Callable[[int, float, int | None], bool]
"""Reports (step, value, rung) to the master; False ends the trial. Only reports with a rung wait for an answer."""


class Trainer:
    """Runs tasks, one after the other."""

    def __init__(self, setup: TrainerSetup):
        self._setup = setup

    def run(self, task: Task, tell: Tell) -> Outcome:
        """How the trial of ``task`` ended. Raises KeyboardInterrupt and the like alone."""
        setup = self._setup
        folder = setup.folder / f"{'final' if task.final else 'trial'}-{task.number}"
        curve: list[tuple[int, float]] = []

        def told(step: int, value: float, rung: int | None) -> bool:
            curve.append((step, value))
            if len(curve) >= 2 * _CURVE:
                del curve[1::2]
            return tell(step, value, rung)

        context = Context(
            task.number, task.seed, folder, task.attempt, dict(task.predicted), task.effort, task.final,
            setup.stopping, told,
        )  # fmt: skip
        start = time.perf_counter()
        try:
            with seeded(task.seed):
                net = net_of(setup.nets, setup.space, task.point)
                returned = setup.trial(net, setup.space.hyper_parameters(task.point), context)
            outcome = setup.objectives.outcome(returned, task.predicted, time.perf_counter() - start)
        except Pruned as end:
            last = {setup.objectives.main: curve[-1][1]} if curve else {}
            outcome = Outcome("pruned", last, f"stopped early {end}".strip(), time.perf_counter() - start)
        except Invalid as end:
            outcome = Outcome("invalid", {}, str(end), time.perf_counter() - start)
        except (Exception, SystemExit) as error:  # whatever a trial of the user raises is a result; sys.exit() too
            outcome = failure(error, time.perf_counter() - start)
        if not setup.keep_folders:
            shutil.rmtree(folder, ignore_errors=True)
        kept = tuple(curve[:: max(1, len(curve) // _CURVE)])
        return Outcome(outcome.state, outcome.metrics, outcome.cause, outcome.seconds, outcome.out_of_memory, kept)
