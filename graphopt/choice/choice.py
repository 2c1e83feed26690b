"""`Choice`: who runs batches of one size: what is measured, when it is decided, and when it is looked at again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from graphopt.choice.contenders import contenders
from graphopt.choice.landscape import Belief, Landscape
from graphopt.choice.opening import opening
from graphopt.choice.pace import WINDOW, Pace
from graphopt.choice.payback import HORIZON, allowance, time_for_another, worth_a_start
from graphopt.choice.race import ROUNDS, WIDENED, Race, measurement
from graphopt.choice.rechecks import Rechecks
from graphopt.choice.terms import Terms
from graphopt.choice.verdict import say_drift, say_expected, slower, verdict
from graphopt.dumps import write_plan
from graphopt.plan import Plan, duration
from graphopt.schemes import Runner, Scheme
from graphopt.schemes.base import UnderWay

log = logging.getLogger("graphopt")


class Choice:
    """The scheme for one batch size.

    Args:
        plan: which this fills in.
        schemes: the feasible candidates by name, best guess first.
        late: those among them that are tried only when their start pays back.
        incumbent: who gets ties; the scheme that runs at the nearest batch size, or the first.
        landscape: what is known so far.
        terms: see `Terms`.

    Attributes:
        run: the runner of the chosen scheme; None while candidates are measured.
        runs_user_code: whether that is the user's model and not a graph of it.
        pace: the seconds of its steps.
    """

    def __init__(
        self,
        plan: Plan,
        schemes: Mapping[str, Scheme],
        late: Sequence[str],
        incumbent: str,
        landscape: Landscape,
        terms: Terms,
    ):
        self.plan, self.size = plan, plan.batch_size
        self.schemes = dict(schemes)
        self.run: Runner | None = None
        self.runs_user_code = False
        self.pace = Pace(parts=terms.parts)
        self._landscape, self._terms = landscape, terms
        self._late = list(late) if len(late) < len(schemes) else []
        self._waiting: list[str] = []
        self._race: Race | None = None
        self._confirming: Belief | None = None
        self._built: dict[str, Runner] = {}
        self._elapsed, self._calls, self._steps = 0.0, 0, 0
        self._rechecks = Rechecks()
        self._weigh_at = 0
        self._under_way: UnderWay | None = None
        self._open(incumbent)

    # -- what runs --------------------------------------------------------------------------------------------------

    @property
    def turn(self) -> str:
        """The scheme that runs the next batch."""
        return self._race.turn if self._race is not None else self.plan.chosen

    @property
    def needs_graph(self) -> bool:
        """Whether that scheme runs a graph; else it runs the user's own code."""
        return self.schemes[self.turn].needs_graph

    @property
    def compiling(self) -> bool:
        """Whether a candidate is being compiled in another process, to be tried when that is done."""
        return self._under_way is not None

    @property
    def decided(self) -> bool:
        """Whether nothing is being measured."""
        return self._race is None

    @property
    def has_others(self) -> bool:
        """Whether another candidate is there, should the one whose turn it is fail."""
        return len(self.schemes) > 1

    @property
    def steps(self) -> int:
        """How many steps were run at this size, those of a window that is not full left out."""
        return self._steps + self.pace.steps

    def runner(self) -> Runner:
        """The runner whose turn it is, built if need be."""
        if self.turn not in self._built:
            self._built[self.turn] = self._terms.build(self.schemes[self.turn])
        return self._built[self.turn]

    @property
    def built(self) -> bool:
        """Whether `runner` has nothing left to build."""
        return self.turn in self._built

    def fresh(self) -> bool:
        """Whether what runs next still fits the optimizers."""
        if self.run is not None:
            return self.run.fresh()
        return all(runner.fresh() for runner in self._built.values())

    # -- opening ----------------------------------------------------------------------------------------------------

    def _open(self, incumbent: str) -> None:
        beliefs = {name: self._landscape.belief(name, self.size) for name in self.schemes}
        say_expected(self.plan, beliefs)
        names = [name for name in self.schemes if name not in self._late]
        found = opening(names, beliefs, incumbent, others_wait=bool(self._late))
        self._lose(found.lost)
        if found.expected is not None:
            self._choose(found.first[0], "predicted from other batch sizes", found.expected.seconds, pause=WINDOW)
        elif not found.rounds:
            self._choose(found.first[0], "the only feasible candidate")
        else:
            self._start(found.first, rounds=found.rounds)
        self._confirming = found.confirms
        if found.confirms is not None:
            self.plan.reason = f"{found.confirms.source}, to be confirmed"

    def _start(self, names: Sequence[str], *, rounds: int = ROUNDS, bounded: bool = True) -> None:
        bound = allowance(self._terms.remaining(max(self.steps, HORIZON))) if bounded else None
        self._race = Race(names, rounds=rounds, allowance=bound)
        self._steps += self.pace.steps
        self.pace = Pace(parts=self._terms.parts)
        self._elapsed, self._calls = 0.0, 0
        self.run = None
        self.plan.chosen, self.plan.reason = names[0], "measuring"

    # -- deciding ---------------------------------------------------------------------------------------------------

    def ran(self, seconds: float) -> None:
        """The scheme whose turn it was ran one batch in so many seconds."""
        self._elapsed += seconds
        self._calls += 1
        if self._calls < self._terms.parts:
            return
        seconds, self._elapsed, self._calls = self._elapsed, 0.0, 0
        race = self._race
        if race is None:  # the first step of a scheme that was chosen without a race
            self.plan.candidate(self.plan.chosen).start_seconds = seconds
            self._steps += 1
            self.run = self._built[self.plan.chosen]
            return
        self._steps += 1
        if race.warming:
            self.plan.candidate(race.turn).start_seconds = seconds
        race.record(seconds)
        if race.over:
            self._decide(race)

    def _decide(self, race: Race) -> None:
        confirming, self._confirming, self._race = self._confirming, None, None
        chosen = race.chosen()
        assert chosen is not None  # the last candidate never fails: eager stands in
        if confirming is not None and race.samples[chosen]:
            self._confirm(chosen, race.samples[chosen][0], confirming)
            return
        measured = {name: measurement(samples) for name, samples in race.samples.items() if samples}
        for name, found in measured.items():
            self._landscape.add(name, self.size, found)
            candidate = self.plan.candidate(name)
            candidate.seconds, candidate.measurement, candidate.lost = list(race.samples[name]), found, ""
        self._terms.keep(measured)
        self._lose(race.lost)
        unseen = [name for name in race.lost if not race.samples[name] and name in self.schemes]
        self._waiting = [name for name in dict.fromkeys([*self._waiting, *unseen]) if name not in measured]
        if chosen not in measured:
            self._choose(chosen, "the only feasible candidate")
            return
        self._choose(chosen, verdict(self.plan, chosen, measured), measured[chosen].seconds)
        self._weigh_late()

    def _confirm(self, chosen: str, seconds: float, belief: Belief) -> None:
        """One step says whether what was measured before still holds."""
        room = WIDENED[1]
        if not belief.low / room <= seconds <= belief.high * room:
            note = f"a step took {duration(seconds)}, not {duration(belief.seconds)} as {belief.source}: measured again"
            self.plan.notes.append(note)
            self._measure_again(chosen)
            return
        for name in self.schemes:
            known = self._landscape.measured_at(name).get(self.size)
            if known is not None:
                self.plan.candidate(name).measurement = known
                if name != chosen:
                    self.plan.candidate(name).lost = slower(known.seconds / belief.seconds, chosen)
        self._choose(chosen, f"{belief.source} measurements, confirmed by a step", belief.seconds)
        self._weigh_late()

    def _choose(self, name: str, reason: str, seconds: float | None = None, *, pause: int | None = None) -> None:
        plan = self.plan
        plan.chosen, plan.reason = name, reason
        plan.candidate(name).lost = ""
        self._steps += self.pace.steps
        watched = seconds if self._terms.timed else None
        self.pace = Pace(
            watched, parts=self._terms.parts, pause=pause or self._rechecks.pause, watching=self._terms.timed
        )
        self.run = self._built.get(name)  # None: built by the next step
        self.runs_user_code = not self.schemes[name].needs_graph
        self._rechecks.decided(name)
        log.info("batch size %d: %s, %s", plan.batch_size, name, reason)
        write_plan(plan)

    def _lose(self, why: Mapping[str, str]) -> None:
        for name, reason in why.items():
            if name in self.schemes:
                self.plan.candidate(name).lost = reason

    # -- looking again ----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """A window of steps is full: measure again where the machine has changed, or what pays by now."""
        if self._under_way is not None:  # which slows the machine down, but not for long
            if self._under_way.done:
                self._under_way = None
                self._weigh_late()
            return
        ratio = self.pace.drifted()
        if ratio is not None and len(self.schemes) - len(self._late) > 1:
            say_drift(self.plan, self.steps, ratio)
            self._rechecks.drifted(self.plan.chosen)
            self._measure_again(self.plan.chosen)
        elif ratio is not None:
            self.pace.expected = self.pace.seconds  # nothing to choose from
        elif (former := self._rechecks.due(self.pace.steps)) is not None and former in self.schemes:
            self._start([self.plan.chosen, former])
        elif self.steps >= self._weigh_at:
            self._weigh_at = self.steps + max(self.steps // 4, WINDOW)
            self._weigh_late()
            if self._race is None and self._waiting:
                self._try_waiting()

    def _try_waiting(self) -> None:
        """Measure a candidate for which there was no time before, once the steps since then have made up for it."""
        seconds = self.pace.seconds or 0.0
        if time_for_another(self.steps, seconds):
            self._start([self.plan.chosen, self._waiting.pop(0)])

    def _measure_again(self, first: str) -> None:
        """A race of all that was measured here, or may be."""
        names = [name for name in self.schemes if name not in self._late and name != first]
        beliefs = {name: self._landscape.belief(name, self.size) for name in (first, *names)}
        names.sort(key=lambda name: known.seconds if (known := beliefs[name]) is not None else float("inf"))
        for name in self.schemes:
            self._landscape.forget(name, self.size)
        entrants, _ = contenders([first, *names], dict.fromkeys(self.schemes))
        self._start(entrants)

    def _weigh_late(self) -> None:
        """Try a candidate that is dear to start where the steps to come pay it back."""
        others = [name for name in self.schemes if name not in self._late]
        cost = lambda name: self._terms.start_cost(self.schemes[name])
        remaining = self._terms.remaining(self.steps)
        name = worth_a_start(self._late, others, self.plan, self._landscape, cost, remaining)
        if name is None:
            return
        self._under_way = self._terms.ahead(self.schemes[name])
        if self._under_way is not None and not self._under_way.done:
            self.plan.candidate(name).lost = "is compiled in another process, to be tried when that is done"
            return
        self._under_way = None
        self._late.remove(name)
        self._start([self.plan.chosen, name], bounded=False)  # its cost was weighed

    # -- failures ---------------------------------------------------------------------------------------------------

    def fail(self, name: str, why: str) -> bool:
        """A candidate cannot run; another one takes its place. False if none is left: then `replace` has to follow."""
        self.plan.candidate(name).why_not = why
        self.schemes.pop(name)
        self._late = [n for n in self._late if n != name]
        self._waiting = [n for n in self._waiting if n != name]
        self._built.pop(name, None)
        self._elapsed, self._calls = 0.0, 0
        self.run = None
        if not self.schemes:
            self._race = None
            return False
        if self._race is not None:
            self._race.fail(name, why)
            if self._race.over:
                if self._race.running:
                    self._decide(self._race)
                else:
                    self._race = self._confirming = None
                    self._open(next(iter(self.schemes)))
            return True
        self._late = [] if len(self._late) == len(self.schemes) else self._late
        self._open(next(iter(n for n in self.schemes if n not in self._late)))
        return True

    def replace(self, scheme: Scheme) -> None:
        """Run by this scheme, where no candidate is left."""
        self.schemes = {scheme.name: scheme}
        self._choose(scheme.name, "the only feasible candidate")
