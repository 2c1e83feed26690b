"""`Situation`: all that is known for one state of model and optimizers and one layout of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.choice import Choice, Landscape, Prices, Records
from graphopt.choice.first_capture import has_to_pay
from graphopt.choice.prices import UNCALIBRATED
from graphopt.choice.starts import Starts
from graphopt.choice.terms import Terms
from graphopt.cost_model.measured import Measurement
from graphopt.errors import VerificationError
from graphopt.graph.batch import BatchLayout
from graphopt.plan import Candidate, Crossover, GraphFacts, Plan
from graphopt.schemes import SCHEMES, ModelWatch, Prepared, Runner, Scheme, Task, candidates
from graphopt.schemes.data_parallel import data_parallel
from graphopt.schemes.flat import CapturedStep
from graphopt.schemes.hybrid import hybrid
from graphopt.schemes.world.candidates import candidates_in_world
from graphopt.schemes.world.eager import EagerInWorld
from graphopt.settings import Settings

Check = Callable[[Scheme, Prepared, Sequence[torch.Tensor]], str | None]

MOMENTS = 0.3
"""Seconds up to which a start is not worth a thought."""


def schemes_for(task: Task, prepared: Prepared, settings: Settings) -> tuple[Scheme, ...]:
    """The schemes that settings let choose from, best guess first, each name once."""
    found, world = settings.schemes, task.world
    if found is None and world is not None:
        found = candidates_in_world(world, task, prepared, precision=settings.precision, batch_norm=settings.batch_norm)
    if found is None:
        counts = tuple(dict.fromkeys((torch.get_num_threads(), 1)))
        saving = settings.memory is not None
        found = candidates(task, prepared, threads=counts, precision=settings.precision, saving_memory=saving)
        if (settings.processors or 1) > 1:
            first, *others = found
            given = settings.processors or 1, settings.batch_norm
            owner, reduced = data_parallel(*given)
            found = (first, owner, hybrid(*given), *others, reduced)
    return tuple({scheme.name: scheme for scheme in found}.values())


class CaptureNow(Exception):
    """A candidate is to run for which the step has to be captured first. Never reaches a user."""


@dataclass
class Situation:
    """Captured steps, runners and choices by batch size, of one model as ``watch`` saw it and one batch layout.

    Attributes:
        failed: why the step cannot be a graph.
        notes: for all plans.
        waiting: whether the capture waits until it is known to pay back.
        capture_seconds: what captures for other shapes of the batch took, where those are many: then so does this one.
        check: what is wrong with the form of the step that a scheme is about to run, tried on batches like ``sample``;
            None: forms are not verified.
    """

    task: Task
    watch: ModelWatch
    layout: BatchLayout
    settings: Settings
    records: Records
    prices: Prices
    run_so_far: Callable[[], int]
    steps: list[CapturedStep] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    failed: str | None = None
    notes: list[str] = field(default_factory=list)
    waiting: bool = False
    capture_seconds: float | None = None
    check: Check | None = None
    sample: Sequence[torch.Tensor] = ()

    def __post_init__(self) -> None:
        self.landscape = Landscape(self._price)
        self._prepared: dict[int, Prepared] = {}
        self._schemes: dict[int, tuple[Scheme, ...]] = {}
        self._runners: dict[tuple[str, int], Runner] = {}
        self._admitting: dict[int, int] = {}
        self._hashes: dict[int, str] = {}
        self._by_name: dict[str, Scheme] = {}
        self._starts = Starts(self.prices, self.landscape)

    def fresh(self) -> bool:
        """Whether all that was built still fits the optimizers."""
        return all(runner.fresh() for runner in self._runners.values())

    def close(self) -> None:
        """Give back what runners hold."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
        self._starts.close()

    def admitting(self, size: int) -> int | None:
        """The index of a captured step that is valid at a batch size, None if there is none."""
        if size not in self._admitting:
            found = next((i for i, step in enumerate(self.steps) if step.admits(size)), None)
            if found is None:
                return None
            self._admitting[size] = found
        return self._admitting[size]

    # -- a new batch size -------------------------------------------------------------------------------------------

    def choose(self, size: int) -> Choice:
        """A choice for a batch size at which nothing was run yet; capture goes before."""
        index = self.admitting(size)
        prepared = self._prepare(index)
        plan = Plan(size, [], "", "", notes=list(self.notes), over_sizes=self._crossovers, landscape=self.landscape)
        feasible, late = self._candidates(plan, prepared, index, size)
        if self.waiting and index is None:
            few = f"steps={self.settings.steps}" if self.capture_seconds is None else "batches come in many shapes"
            plan.notes.append(f"{few}: eager runs first, a capture has to pay back")
        if index is not None:
            step = self.steps[index]
            plan.graph = lambda: GraphFacts.of(step.before, step.graph, size, step.seconds)
            plan.passes = step.result
            plan.valid_where = tuple(step.graph.symbols.rename(g) for g in step.graph.symbols.guards)
        if len(feasible) < 2 <= len(plan.candidates):  # who names one scheme need not be told
            plan.notes.append("fewer than two candidates are feasible: there is nothing to choose from")
        if len(feasible) > 1 and index is not None:
            self._recall(index)
        terms = Terms(
            build=lambda scheme: self._runner(scheme, index),
            start_cost=lambda scheme: self._start_cost(scheme, prepared, size),
            ahead=lambda scheme: self._starts.ahead(scheme, prepared, size),
            remaining=self.remaining,
            keep=lambda measured: self._keep(index, size, measured),
            parts=self.task.accumulate,
            timed=all(device.type == "cpu" for device in self.layout.devices),
        )
        choice = Choice(plan, feasible, late, self._incumbent(size, feasible), self.landscape, terms)
        self.choices[size] = choice
        return choice

    def _candidates(
        self, plan: Plan, prepared: Prepared, index: int | None, size: int
    ) -> tuple[dict[str, Scheme], list[str]]:
        """The feasible candidates by name, and those to be tried only when their start pays back."""
        feasible: dict[str, Scheme] = {}
        late, unpriced, too_large = [], False, {}
        given = self._given(prepared, index)
        for scheme in given:
            why_not = self.failed if scheme.needs_graph and index is None else scheme.why_not(prepared, size)
            candidate = Candidate(scheme.name, why_not)
            plan.candidates.append(candidate)
            if why_not is not None:
                continue
            if self.settings.memory is not None:
                peak = self.prices.peak_bytes(scheme, prepared, size)
                if peak is not None and peak > self.settings.memory:
                    candidate.why_not = (
                        f"it needs {peak:,} bytes at its peak, memory={self.settings.memory:,} allows less"
                    )
                    too_large[scheme.name] = peak, scheme
                    continue
            if len(given) > 1:
                candidate.estimate = self.prices.of(scheme, prepared, size)
            if scheme.compiles and candidate.estimate is None:
                if self.settings.schemes is None:
                    candidate.lost = "not tried: without a price nobody knows whether its compilation pays back"
                    unpriced = True
                    continue
            elif (self.waiting and scheme.needs_graph) or self._start_cost(scheme, prepared, size) > MOMENTS:
                late.append(scheme.name)
            unpriced = unpriced or (candidate.estimate is None and scheme.needs_graph)
            feasible[scheme.name] = scheme
        if not feasible:
            self._stand_in(plan, feasible, too_large)
        unpriced = unpriced and len(given) > 1 and self.task.world is None
        if unpriced and self.prices.machine(torch.get_num_threads()) is None:
            plan.notes.append(UNCALIBRATED)
        self._by_name |= feasible
        return feasible, late

    def _given(self, prepared: Prepared, index: int | None) -> tuple[Scheme, ...]:
        if self.waiting and index is None:
            return SCHEMES["eager"], SCHEMES["flat"]
        key = -1 if index is None else index
        if key not in self._schemes:
            self._schemes[key] = schemes_for(self.task, prepared, self.settings)
        return self._schemes[key]

    def _stand_in(self, plan: Plan, feasible: dict[str, Scheme], too_large: Mapping[str, tuple[int, Scheme]]) -> None:
        """Where nothing is feasible: the candidate that needs the least memory, or eager."""
        if too_large:
            name = min(too_large, key=lambda name: too_large[name][0])
            feasible[name] = too_large[name][1]
            plan.candidate(name).why_not = None
            plan.notes.append(
                f"no candidate fits memory={self.settings.memory:,}; {name} needs the least, {too_large[name][0]:,}"
            )
            return
        eager = self.eager
        if eager.name not in {candidate.scheme for candidate in plan.candidates}:
            plan.candidates.append(Candidate(eager.name))
        feasible[eager.name] = eager

    @property
    def eager(self) -> Scheme:
        """What stands in where no candidate can run."""
        world = self.task.world
        return SCHEMES["eager"] if world is None else EagerInWorld(world.size)

    def _incumbent(self, size: int, feasible: Mapping[str, Scheme]) -> str:
        """Who runs at the nearest batch size, or the first candidate."""
        settled = {known: choice.plan.chosen for known, choice in self.choices.items() if choice.run is not None}
        near = sorted(settled, key=lambda known: max(known, size) / min(known, size))
        return next((settled[known] for known in near if settled[known] in feasible), next(iter(feasible)))

    # -- what choices ask for ---------------------------------------------------------------------------------------

    def _prepare(self, index: int | None) -> Prepared:
        key = -1 if index is None else index
        if key not in self._prepared:
            self._prepared[key] = Prepared(self.task, self.layout, None if index is None else self.steps[index])
        return self._prepared[key]

    def _runner(self, scheme: Scheme, index: int | None) -> Runner:
        """A runner, one for all batch sizes of a captured step. Raises VerificationError for a wrong one."""
        if scheme.needs_graph and index is None:
            raise CaptureNow
        place = scheme.name, -1 if index is None or not scheme.needs_graph else index
        if place not in self._runners:
            prepared = self._prepare(index)
            if self.check is not None and (wrong := self.check(scheme, prepared, self.sample)):
                raise VerificationError(f"verification: {wrong}")
            self._runners[place] = scheme.build(prepared)
        return self._runners[place]

    def runner(self, scheme: str, size: int) -> Runner:
        """The runner of a feasible candidate for batches of a size; for measuring it by hand.

        Raises:
            KeyError: no candidate of this name was feasible so far.
        """
        return self._runner(self._by_name[scheme], self.admitting(size))

    def compiles(self, scheme: str) -> bool:
        """Whether a candidate of this name takes long to start."""
        given = (one for schemes in self._schemes.values() for one in schemes)
        return any(one.compiles for one in given if one.name == scheme)

    def discard(self, scheme: str) -> None:
        """This scheme cannot run: its runners are closed."""
        for place in [place for place in self._runners if place[0] == scheme]:
            self._runners.pop(place).close()

    def _price(self, name: str, size: int) -> tuple[float, float, float] | None:
        index = self.admitting(size)
        scheme = self._by_name.get(name)
        if scheme is None or (scheme.needs_graph and index is None):
            return None
        found = self.prices.of(scheme, self._prepare(index), size)
        return None if found is None else (found.seconds, *found.interval)

    def _start_cost(self, scheme: Scheme, prepared: Prepared, size: int) -> float:
        if scheme.needs_graph and prepared.step is None and self.capture_seconds:
            return self.capture_seconds
        built = any(name == scheme.name for name, _ in self._runners)
        return self._starts.cost(scheme, prepared, size, built=built)

    def remaining(self, run: int = 0) -> float:
        """Steps to come: what ``steps=`` leaves, or as many as there were so far. Those that it leaves are of all
        shapes of batches; where there are many, no more than so far are expected to be of this one."""
        if self.settings.steps is None:
            return run
        left = max(self.settings.steps - self.run_so_far(), 0)
        return left if self.capture_seconds is None else min(run, left)

    @property
    def may_wait(self) -> bool:
        """Whether steps may run in eager mode before one is captured: nothing was asked for that needs a graph."""
        asked = self.settings
        free = asked.schemes is None and asked.memory is None and (asked.processors or 1) == 1
        return free and self.task.world is None

    def has_to_pay(self) -> bool:
        """Whether eager steps are measured before it is known that a capture pays back: the user said that there are
        few, or batches come in many shapes."""
        if not self.may_wait:
            return False
        few = self.settings.steps is not None and has_to_pay(self.task.model, self.remaining())
        return self.capture_seconds is not None or few

    def _crossovers(self) -> list[Crossover]:
        settled = {size: c.plan.chosen for size, c in self.choices.items() if c.run is not None}
        return self.landscape.crossovers(settled, [name for name, s in self._by_name.items() if not s.compiles])

    # -- between processes ------------------------------------------------------------------------------------------

    def _hash(self, index: int) -> str:
        if index not in self._hashes:
            step = self.steps[index]
            outside = [type(o).__name__ for o in self.task.optimizers] if step.whole.outside else []
            self._hashes[index] = ":".join([step.before.hash(), *outside])
        return self._hashes[index]

    def _recall(self, index: int) -> None:
        """Take over what an earlier process measured of this graph."""
        if index in self._hashes:
            return
        for scheme, size, measured in self.records.read(self._hash(index)):
            if size not in self.landscape.measured_at(scheme):
                self.landscape.add(scheme, size, measured, "stored")

    def _keep(self, index: int | None, size: int, measured: Mapping[str, Measurement]) -> None:
        if index is not None and len(measured) > 1:
            self.records.keep(self._hash(index), [(name, size, found) for name, found in measured.items()])
