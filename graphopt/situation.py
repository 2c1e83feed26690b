"""`Situation`: all that is known for one state of model and optimizers and one layout of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphopt.choice import Choice, Landscape, Prices, Records
from graphopt.choice.choice import close
from graphopt.choice.prices import UNCALIBRATED
from graphopt.choice.terms import Terms
from graphopt.cost_model.measured import Measurement
from graphopt.errors import GraphoptError
from graphopt.graph.batch import BatchLayout
from graphopt.plan import Candidate, Crossover, GraphFacts, Plan
from graphopt.schemes import EXACT, SCHEMES, ModelWatch, Prepared, Runner, Scheme, Task, candidates
from graphopt.schemes.data_parallel import data_parallel
from graphopt.schemes.flat import CapturedStep
from graphopt.schemes.hybrid import hybrid

UNKNOWN_START = 30.0
"""Seconds that a compiler is taken to need where there is no price of it."""


MOMENTS = 0.3
"""Seconds up to which a start is not worth a thought."""


@dataclass(frozen=True)
class Settings:
    """What `optimize` was asked for beside the task: which schemes, and what bounds them.

    ``schemes`` is None for ``"auto"``. ``memory`` in bytes, ``steps`` in whole training steps.
    """

    schemes: tuple[Scheme, ...] | None = None
    processors: int | None = None
    steps: int | None = None
    precision: str | None = None
    batch_norm: str = "synchronized"
    memory: int | None = None


@dataclass
class Situation:
    """Captured steps, runners and choices by batch size, of one model as ``watch`` saw it and one batch layout.

    Attributes:
        failed: why the step cannot be a graph.
        notes: for all plans.
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

    def __post_init__(self) -> None:
        self.landscape = Landscape(self._price)
        self._prepared: dict[int, Prepared] = {}
        self._schemes: dict[int, tuple[Scheme, ...]] = {}
        self._runners: dict[tuple[str, int], Runner] = {}
        self._admitting: dict[int, int] = {}
        self._hashes: dict[int, str] = {}
        self._by_name: dict[str, Scheme] = {}

    def fresh(self) -> bool:
        """Whether all that was built still fits the optimizers."""
        return all(runner.fresh() for runner in self._runners.values())

    def close(self) -> None:
        """Give back what runners hold."""
        for runner in self._runners.values():
            close(runner)
        self._runners.clear()

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
        plan = Plan(size, [], "", "", notes=list(self.notes), over_sizes=self._crossovers)
        feasible, late = self._candidates(plan, prepared, index, size)
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
            remaining=self._remaining,
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
            elif self._start_cost(scheme, prepared, size) > MOMENTS:
                late.append(scheme.name)
            unpriced = unpriced or (candidate.estimate is None and scheme.needs_graph)
            feasible[scheme.name] = scheme
        if not feasible:
            self._stand_in(plan, feasible, too_large)
        if unpriced and len(given) > 1 and self.prices.machine(torch.get_num_threads()) is None:
            plan.notes.append(UNCALIBRATED)
        self._by_name |= feasible
        return feasible, late

    def _given(self, prepared: Prepared, index: int | None) -> tuple[Scheme, ...]:
        key = -1 if index is None else index
        if key not in self._schemes:
            found = self.settings.schemes
            if found is None:
                threads = torch.get_num_threads()
                counts = tuple(dict.fromkeys((threads, 1)))
                found = candidates(
                    self.task, prepared, threads=counts, precision=self.settings.precision,
                    saving_memory=self.settings.memory is not None,
                )  # fmt: skip
                if (self.settings.processors or 1) > 1:
                    first, *others = found
                    given = self.settings.processors or 1, self.settings.batch_norm
                    owner, reduced = data_parallel(*given)
                    found = (first, owner, hybrid(*given), *others, reduced)
            self._schemes[key] = tuple({scheme.name: scheme for scheme in found}.values())
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
        eager = SCHEMES["eager"]
        if eager.name not in {candidate.scheme for candidate in plan.candidates}:
            plan.candidates.append(Candidate(eager.name))
        feasible[eager.name] = eager

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
        """A runner, one for all batch sizes of a captured step."""
        place = scheme.name, -1 if index is None or not scheme.needs_graph else index
        if place not in self._runners:
            self._runners[place] = scheme.build(self._prepare(index))
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
            close(self._runners.pop(place))

    def _price(self, name: str, size: int) -> tuple[float, float, float] | None:
        index = self.admitting(size)
        scheme = self._by_name.get(name)
        if scheme is None or (scheme.needs_graph and index is None):
            return None
        found = self.prices.of(scheme, self._prepare(index), size)
        return None if found is None else (found.seconds, *found.interval)

    def _start_cost(self, scheme: Scheme, prepared: Prepared, size: int) -> float:
        seconds = 0.0 if any(name == scheme.name for name, _ in self._runners) else scheme.start_seconds(prepared)
        if scheme.compiles and len(self.landscape.measured_at(scheme.name)) < 2:  # then it is compiled for free sizes
            found = self.prices.of(scheme, prepared, size)
            seconds += UNKNOWN_START if found is None else found.compile_seconds
        return seconds

    def _remaining(self, run: int) -> float:
        """Steps to come: what ``steps=`` leaves, or as many as there were so far."""
        return run if self.settings.steps is None else max(self.settings.steps - self.run_so_far(), 0)

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


def as_schemes(schemes: str | Sequence[str | Scheme]) -> tuple[Scheme, ...] | None:
    """The schemes that a user named, None for ``"auto"``.

    Raises:
        GraphoptError: an unknown name, or something that is no scheme.
    """
    if isinstance(schemes, str):
        if schemes == "auto":
            return None
        schemes = EXACT if schemes == "exact" else (schemes,)
    found = []
    for one in schemes if isinstance(schemes, Iterable) else (schemes,):
        if not isinstance(one, (str, Scheme)):
            raise GraphoptError(f"schemes: expected names or Scheme objects, got {one!r}")
        if isinstance(one, str) and one not in SCHEMES:
            known = "'auto', 'exact', " + ", ".join(SCHEMES)
            raise GraphoptError(f"schemes: unknown name {one!r}; expected {known}, or a Scheme")
        found.append(SCHEMES[one] if isinstance(one, str) else one)
    if not found:
        raise GraphoptError("schemes: got none; expected 'auto' or at least one")
    return tuple(found)
