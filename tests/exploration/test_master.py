"""The master on simulated workers: who is busy, what is proposed, what a restart knows."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulated_engine import SimulatedEngine
from graphopt.exploration.durations import Durations
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.engines import Died, Ready, Reported
from graphopt.exploration.events import model_event
from graphopt.exploration.generator import GeneratorSetup
from graphopt.exploration.history import History, Trial
from graphopt.exploration.limits import Limits
from graphopt.exploration.master import Master
from graphopt.exploration.outcome import Objectives, Outcome
from graphopt.exploration.pool import Model
from graphopt.exploration.proposers import as_proposer
from graphopt.exploration.study_file import Event
from tests.exploration.searches import mixed_space, simulated, small_space

SPACE = small_space()


def score(point):
    return float(sum(i * (k + 1) for k, i in enumerate(point)) % 7)


def keys(history):
    return [trial.key for trial in history.trials]


def spread(number):
    """Durations of trials from 0.5 to 2."""
    return 0.5 + 1.5 * ((number * 7919) % 101) / 100


def use(engine):
    """The share of the time in which workers were busy."""
    return sum(engine.busy) / (engine.slots * engine.now())


TENFOLD = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0]
EVENLY = [10 ** (i / 7) for i in range(8)]


@pytest.mark.parametrize(
    "speeds, window, least",
    [(TENFOLD, None, 0.95), (TENFOLD, 16, 0.93), (EVENLY, 16, 0.93), ([1.0] * 8, 16, 0.95), ([1.0] * 8, None, 0.95)],
)
def test_workers_are_busy_though_one_is_ten_times_slower(speeds, window, least):
    """F11: nobody waits for the slowest; in a reproducible search, by the default window. Trials differ fourfold."""
    history, engine = simulated(
        SPACE, score, trials=500, proposer="evolve", speeds=speeds, window=window,
        seconds=lambda number: 20 * spread(number),
    )  # fmt: skip
    assert len(history.done()) == 500
    assert use(engine) >= least


def test_a_window_that_is_too_short_makes_the_fast_wait():
    _, engine = simulated(SPACE, score, trials=200, proposer="evolve", speeds=TENFOLD, window=4, seconds=spread)
    assert use(engine) < 0.7


@given(
    st.lists(st.sampled_from([0.3, 1.0, 2.5, 10.0]), min_size=1, max_size=10),
    st.integers(0, 5),
    st.lists(st.integers(1, 120), max_size=3),
)
@settings(max_examples=12)
def test_a_reproducible_search_is_the_same_whoever_runs_it(speeds, kills, losses):
    """Any number and speed of workers, workers killed, the master lost at any write and begun again."""
    options = {"trials": 60, "proposer": "anneal_plain", "window": 10, "seconds": spread}
    expected, _ = simulated(SPACE, score, **options)
    dies = lambda slot, number, attempt: kills > 0 and attempt == 0 and number % (kills + 2) == 1
    kept = []
    for loss in losses:
        simulated(SPACE, score, **options, speeds=speeds, dies=dies, kept=kept, stop_after=loss)
    history, _ = simulated(SPACE, score, **options, speeds=speeds[::-1], dies=dies, kept=kept)
    assert keys(history) == keys(expected)
    assert [t.metrics for t in history.trials] == [t.metrics for t in expected.trials]
    ends = [event.number for event in kept if event.kind == "end"]
    assert len(ends) == len(set(ends)) == 60  # no result is lost, none is there twice


def test_a_reproducible_search_with_the_surrogate_is_the_same_after_a_loss():
    space = mixed_space()
    options = {"trials": 50, "window": 8, "seconds": spread, "speeds": [1.0, 4.0, 2.0]}
    expected, _ = simulated(space, lambda point: float(sum(point)), **options)
    kept = []
    simulated(space, lambda point: float(sum(point)), **options, kept=kept, stop_after=70)
    history, _ = simulated(space, lambda point: float(sum(point)), **options, kept=kept)
    assert keys(history) == keys(expected)


def test_without_it_results_are_used_as_soon_as_they_are_there():
    _, free = simulated(SPACE, score, trials=40, speeds=[1.0, 5.0], seconds=spread)
    _, bound = simulated(SPACE, score, trials=40, speeds=[1.0, 5.0], seconds=spread, window=16)
    assert max(request.models - request.results for request in free.requests) <= 5
    assert [request.results for request in bound.requests] == [
        Limits(window=16).usable(r.models) for r in bound.requests
    ]


def test_the_next_model_is_ready_before_a_trainer_asks():
    """Requests take a tenth of a second: with a queue nobody notices."""
    _, engine = simulated(SPACE, score, trials=200, speeds=[1.0] * 4, seconds=lambda number: 1.0)
    assert use(engine) > 0.97


def test_a_worker_that_is_killed_again_and_again_does_not_stop_the_study():
    history, _ = simulated(
        SPACE, score, trials=30, speeds=[1.0, 1.0], dies=lambda slot, number, attempt: number == 5, proposer="random"
    )
    states = {trial.number: trial.state for trial in history.trials}
    assert states.pop(5) == "failed" and set(states.values()) == {"done"}
    assert "killed" in history.trials[5].cause and history.trials[5].attempts == 4


def test_a_trial_that_hangs_is_stopped_after_a_multiple_of_what_is_expected():
    """Expected: its predicted step, times what others took for theirs."""
    cost = lambda sizes, hp: {"step_seconds": float(sizes["k0"])}
    history, engine = simulated(
        SPACE, score, trials=40, speeds=[1.0, 1.0], predictor=cost, budget={"step_seconds": 9.0}, proposer="random",
        seconds=lambda number: 10_000.0 if number == 20 else 30.0,
    )  # fmt: skip
    trial = history.trials[20]
    assert trial.state == "failed" and "it hung" in trial.cause
    assert 70 < trial.seconds < 800 and engine.now() < 3000
    assert sum(t.state == "done" for t in history.trials) == 39


def test_trials_that_were_stopped_early_do_not_say_what_others_take():
    """Most are stopped after a second; those that survive take half a minute, and do not hang."""

    def ends(point):
        return Outcome("done", {"score": 1.0}, "", 30.0) if point[0] == 2 else Outcome("pruned", {}, "early", 1.0)

    history, _ = simulated(SPACE, ends, trials=60, speeds=[1.0, 1.0], proposer="random")
    states = [trial.state for trial in history.trials]
    assert states.count("done") > 5 and states.count("pruned") > 20 and "failed" not in states


class ReportThenDeath(SimulatedEngine):
    """The first attempt of each trial reports and dies, and the master hears of both at once."""

    def __init__(self, setup):
        super().__init__(setup, lambda number, point: (Outcome("done", {"score": 1.0}), 1.0), speeds=[1.0])
        self.decided = []

    def start(self, slot, task):
        if task.attempt:
            return super().start(slot, task)
        return self._happened.extend(
            [Reported(slot, task.number, 1, 0.5, 1), Died(slot, task.number, "SIGKILL", True), Ready(slot)]
        )

    def decide(self, slot, goes_on):
        self.decided.append(slot)


def test_nobody_is_told_of_a_report_whose_process_is_gone():
    engine = ReportThenDeath(GeneratorSetup(SPACE, as_proposer("random"), 0, {}, None, 0.9, learns=True))
    history = History(SPACE, Objectives("score"))
    Master(engine, history, Limits(trials=3), 0, lambda events: None, ASHA()).run()
    assert [trial.state for trial in history.trials] == ["done"] * 3
    assert [trial.attempts for trial in history.trials] == [2] * 3
    assert engine.decided == []


def test_a_later_attempt_does_not_change_what_was_reported_at_a_rung():
    """It begins in the middle, from its checkpoint, and its first report is beyond rungs that it has passed."""
    history, kept = History(SPACE, Objectives("score")), []
    engine = SimulatedEngine(
        GeneratorSetup(SPACE, as_proposer("random"), 0, {}, None, 0.9, learns=False), None, speeds=[1]
    )
    master = Master(engine, history, Limits(trials=3), 0, kept.extend, ASHA())
    history.apply(model_event(Model(0, "a", (0,) * 6, 0)))
    history.apply(Event("start", 0, {"worker": 0}))
    assert master.decide_now(0, 3, 0.3, 3)
    history.apply(Event("died", 0, {"killed": True, "cause": ""}))
    history.apply(Event("start", 0, {"worker": 0}))
    assert master.decide_now(0, 5, 0.9, 3) and master.decide_now(0, 9, 0.8, 9)
    assert history.trials[0].rungs == {3: 0.3, 9: 0.8} and [event.kind for event in kept] == ["report"] * 2


@pytest.mark.parametrize("window", [1, 3, 16])
def test_which_results_are_used_is_a_function_of_numbers(window):
    """Those that a model uses are a prefix of one order, which all models share; none is used before it may be."""
    limits = Limits(window=window)
    order = list(islice(limits.order(), 300))
    assert len(set(order)) == 300
    for models in range(200):
        used = order[: limits.usable(models)]
        assert sorted(used) == [number for number in range(models) if limits.uses(models, number)]
        assert all(models - number > window * (4 if limits.patient(number) else 1) for number in used)
    assert sum(map(limits.patient, range(400))) == 400 * limits.patient_share


def test_slow_workers_are_those_for_which_others_would_wait():
    def slow(seconds, window=16):
        durations = Durations(Limits(), alike=False)
        for worker, took in enumerate(seconds):
            durations.add(Trial(worker, "", (), {}, {}, state="done", seconds=took, worker=worker))
        return durations.slow(range(len(seconds) + 1), window, 0.25)

    assert slow([1.0] * 8) == set() and slow([]) == set()
    assert slow([10.0] + [1.0] * 7) == {0}
    assert slow([10.0, 10.0, 1.0, 1.0], window=100) == set()
    assert slow([5.0] * 7 + [0.5]) == {0, 1, 2, 3}  # no more than do a quarter of all trials
