"""Schemes that train for real and take as long as a test says: each advances a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import SGD

from graphopt.choice import Records
from graphopt.cost_model import Estimate
from graphopt.schemes import Eager, Prepared, Runner, Scheme, Task
from graphopt.situation import Settings
from graphopt.step import PASSES
from graphopt.training_step import TrainingStep
from tests.training import cross_entropy, mlp


@dataclass
class Clock:
    """Seconds that pass only when somebody says so. ``log`` lists who ran."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """An eager step that takes the seconds of its scheme."""

    def __init__(self, scheme: Fake, runner: Runner):
        self.scheme, self.runner, self.closed = scheme, runner, False

    def __call__(self, tensors: Any) -> torch.Tensor:
        if self.scheme.fails is not None:
            raise self.scheme.fails
        loss = self.runner(tensors)
        clock, size = self.scheme.clock, int(tensors[0].shape[0])
        clock.now += self.scheme.takes(size, clock.log.count(self.scheme.label))
        clock.log.append(self.scheme.label)
        return loss

    def fresh(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True, eq=False)
class Fake(Scheme):
    """A scheme of given times.

    ``takes``: seconds by batch size and the number of steps that it ran before. ``price``: expected seconds by size.
    ``start``: seconds of its first step besides, of a compiler; ``building``: of a capture.
    ``peak``: bytes. ``graph``: whether the step is captured for it, which takes a test long.
    """

    label: str
    clock: Clock
    takes: Callable[[int, int], float]
    price: Callable[[int], float] | None = None
    start: float = 0.0
    building: float = 0.0
    peak: int = 1000
    graph: bool = False
    fails: Exception | None = None
    priced: list[int] = field(default_factory=list)

    kind = "fake"

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    @property
    def needs_graph(self) -> bool:  # type: ignore[override]
        return self.graph

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return self.start > 0

    def estimate(self, prepared: Prepared, size: int, machines: Any) -> Estimate | None:
        self.priced.append(size)
        if self.price is None:
            return None
        seconds = self.price(size)
        made: Any = FakePrice(seconds, (0.8 * seconds, 1.25 * seconds), self.start, self.peak)
        return made

    def start_seconds(self, prepared: Prepared) -> float:
        return self.building

    def build(self, prepared: Prepared) -> Runner:
        self.clock.now += self.start + self.building
        return FakeRunner(self, Eager().build(prepared))


@dataclass
class FakePrice:
    """What a choice reads of an `Estimate`."""

    seconds: float
    interval: tuple[float, float]
    compile_seconds: float
    peak_bytes: int

    @property
    def terms(self) -> Mapping[str, float]:
        return {"compute": self.seconds}

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}


class Training:
    """A small model trained by fakes, with a clock of its own."""

    def __init__(self, *, records: Records | None = None, accumulate: int = 1, **settings: Any):
        self.clock = Clock()
        self.fakes: dict[str, Fake] = {}
        self._settings, self._records, self._accumulate = settings, records, accumulate
        self._step: TrainingStep | None = None

    def add(self, label: str, takes: Any, **options: Any) -> Fake:
        """A candidate; ``takes`` in seconds, or a function of batch size and number of steps before."""
        made = Fake(label, self.clock, takes if callable(takes) else lambda *_: takes, **options)
        self.fakes[label] = made
        return made

    @property
    def step(self) -> TrainingStep:
        """The step by all candidates added so far."""
        if self._step is None:
            torch.manual_seed(0)
            model = mlp()
            task = Task(model, cross_entropy, (SGD(model.parameters(), lr=0.1),), accumulate=self._accumulate)
            settings = Settings(schemes=tuple(self.fakes.values()), **self._settings)
            self._step = TrainingStep(
                task, ((1, 1), (1,)), settings, PASSES, clock=self.clock, machines=lambda _: None,
                records=self._records or Forgetful(),
            )  # fmt: skip
        return self._step

    def run(self, steps: int, size: int = 8) -> list[str]:
        """Run steps; who ran them."""
        before = len(self.clock.log)
        for _ in range(steps):
            self.step(torch.randn(size, 4), torch.randint(3, (size,)))
        return self.clock.log[before:]

    @property
    def plan(self) -> Any:
        return self.step.plan


class Forgetful(Records):
    """Keeps nothing."""

    def read(self, graph: str) -> list[Any]:
        return []

    def keep(self, graph: str, rows: Any) -> None:
        pass
