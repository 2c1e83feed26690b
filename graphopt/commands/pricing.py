"""Plans of a step before it is run: by prices alone, or by a few real steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphopt.choice import Landscape, Prices
from graphopt.commands.common import Bar, resized, task_of
from graphopt.cost_model import Estimate, Machine
from graphopt.cost_model.machine import kept
from graphopt.errors import GraphoptError
from graphopt.graph.batch import flatten, normalise
from graphopt.plan import Candidate, GraphFacts, Plan
from graphopt.schemes import Prepared, Scheme
from graphopt.schemes.captured_step import capture_task
from graphopt.settings import Settings
from graphopt.situation import schemes_for
from graphopt.step import PASSES, optimize
from graphopt.visualize.target import Target

MOST_STEPS = 400
"""Steps at one batch size after which measuring ends, decided or not; a race takes about a hundred."""


class Pricing:
    """What the schemes of a step should take at any batch size; nothing is run.

    Args:
        found: the step.
        settings: which schemes.
        machine: that prices are of; None: the calibration of this one.
    """

    def __init__(self, found: Target, settings: Settings, machine: Machine | None):
        self.found, self.settings, self.task = found, settings, task_of(found)
        self._device = None if machine is None else torch.device(machine.device)
        self._prices = Prices(kept if machine is None else lambda threads: machine)
        self._prepared: list[tuple[Prepared, dict[str, Scheme]]] = []
        self._landscape, self._costs = Landscape(self._price), Landscape(self._cost)
        self._chosen: dict[int, str] = {}

    def plan(self, size: int) -> Plan:
        """The plan for a batch size, by price.

        Raises:
            GraphoptError: no scheme has a price.
        """
        prepared, schemes = self._at(size)
        candidates = [self._candidate(scheme, prepared, size) for scheme in schemes.values()]
        step, chosen = prepared.step, self._cheapest(candidates)
        self._chosen[size] = chosen.scheme
        _reasons(candidates, chosen)
        return Plan(
            size, candidates, chosen.scheme, "by price, nothing was run",
            graph=lambda: GraphFacts.of(step.before, step.graph, size, step.seconds), passes=step.result,
            valid_where=tuple(step.graph.symbols.rename(g) for g in step.graph.symbols.guards),
            over_sizes=lambda: self._costs.crossovers(self._chosen, self._weighed()), landscape=self._landscape,
        )  # fmt: skip

    def _at(self, size: int) -> tuple[Prepared, dict[str, Scheme]]:
        """A captured step that holds for a batch size, and its schemes by name."""
        for known in self._prepared:
            if known[0].step.admits(size):
                return known
        batch = resized(self.found.batch, size)
        layout = flatten(batch)[1]
        if self._device is not None:  # as if it lay on the device of the machine that is asked about
            layout = replace(layout, devices=(self._device,) * len(layout.devices))
        prepared = Prepared(self.task, layout, capture_task(self.task, batch, PASSES))
        made = prepared, {scheme.name: scheme for scheme in schemes_for(self.task, prepared, self.settings)}
        self._prepared.append(made)
        return made

    def _candidate(self, scheme: Scheme, prepared: Prepared, size: int) -> Candidate:
        candidate = Candidate(scheme.name, scheme.why_not(prepared, size))
        if candidate.why_not is not None:
            return candidate
        candidate.estimate = found = self._prices.of(scheme, prepared, size)
        if found is None:
            candidate.lost = "has no price"
            return candidate
        candidate.predicted = found.seconds, *found.interval, "priced"
        if self.settings.memory is not None and found.peak_bytes > self.settings.memory:
            candidate.why_not = f"it needs {found.peak_bytes:,} bytes at its peak, {self.settings.memory:,} are allowed"
        return candidate

    def _cheapest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one with the least seconds a step, a compilation shared among the steps to come; without their number
        nobody knows whether it pays back."""
        able = [(c, c.estimate) for c in candidates if c.why_not is None]
        priced = [(found.seconds + self._share(found), c) for c, found in able if found is not None]
        if not priced:
            raise GraphoptError(
                "no scheme has a price: this machine is not calibrated; run `graphopt calibrate` (a minute), name a "
                "processor (--machine H100), or let real steps be timed (--measure)"
                if not any(c.estimate for c in candidates)
                else f"no scheme can run: {'; '.join(str(c.why_not) for c in candidates if c.why_not)}"
            )

        return min(priced, key=lambda pair: pair[0])[1]

    def _share(self, found: Estimate) -> float:
        """What a step bears of the compilation before the first one."""
        steps = self.settings.steps
        return found.compile_seconds / steps if steps else math.inf if found.compile_seconds else 0.0

    def _weighed(self) -> list[str]:
        """Schemes between which batch sizes decide."""
        names = dict.fromkeys(name for _, schemes in self._prepared for name in schemes)
        costs = {name: self._cost(name, max(self._chosen)) for name in names}
        return [name for name, cost in costs.items() if cost is not None and cost[0] < math.inf]

    def _estimate(self, name: str, size: int) -> Estimate | None:
        prepared, schemes = self._at(size)
        if name not in schemes or schemes[name].why_not(prepared, size) is not None:
            return None
        return self._prices.of(schemes[name], prepared, size)

    def _price(self, name: str, size: int) -> tuple[float, float, float] | None:
        found = self._estimate(name, size)
        return None if found is None else (found.seconds, *found.interval)

    def _cost(self, name: str, size: int) -> tuple[float, float, float] | None:
        """The price with the share of the compilation."""
        found = self._estimate(name, size)
        if found is None:
            return None
        share = self._share(found)
        return found.seconds + share, found.interval[0] + share, found.interval[1] + share


def _reasons(candidates: Sequence[Candidate], chosen: Candidate) -> None:
    """Say of the others why they are not chosen."""
    assert chosen.estimate is not None
    for one in candidates:
        if one is chosen or one.why_not is not None or one.estimate is None:
            continue
        gain = chosen.estimate.seconds - one.estimate.seconds
        if one.estimate.compile_seconds and gain > 0:
            one.break_even = one.estimate.compile_seconds / gain
            one.lost = f"pays its compilation back after {one.break_even:,.0f} steps"
        else:
            one.lost = f"{one.estimate.seconds / chosen.estimate.seconds:.2f} times the price"


def measured_plans(found: Target, sizes: Sequence[int], options: dict[str, Any], told: Bar) -> list[Plan]:
    """The plans that real steps lead to, a batch size after the other. Trains the target's model, which is of this
    process only."""
    step = optimize(found.model, normalise(found.batch), loss=found.loss, optimizer=found.optimizer, **options)
    plans = []
    try:
        for size in sizes:
            told(f"batch size {size}")
            decide(step, resized(found.batch, size), size)
            plans.append(step.plan)
    finally:
        step.close()
    return plans


def decide(step: Any, batch: Any, size: int) -> None:
    """Run steps until the scheme for a batch size is decided on."""
    for _ in range(MOST_STEPS):
        step(batch)
        if step.situation.choices[size].decided:
            return
