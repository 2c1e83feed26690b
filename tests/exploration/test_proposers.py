"""What every proposer keeps to, and how good they are on spaces made by a formula."""

import importlib.util

import numpy as np
import pytest

from benchmarks.exploration import picked, search
from benchmarks.exploration_spaces import elastic, interactions
from graphopt.errors import ExplorationError
from graphopt.exploration.gate import Gate
from graphopt.exploration.pool import Model, Pool, Result
from graphopt.exploration.proposers import PROPOSERS, answer, as_proposer
from graphopt.exploration.ranking import best_first, pareto_front, pareto_ranks
from graphopt.exploration.sieve import Request
from tests.exploration.searches import mixed_space, simulated, small_space

NAMES = [
    *PROPOSERS,
    pytest.param(
        "optuna:TPESampler",
        marks=pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs Optuna"),
    ),
]


def pool_of(space, results, seed=0, bad=()):
    """A pool of so many models drawn by chance, with results in another order; those in ``bad`` failed."""
    random, pool = np.random.default_rng(seed), Pool(space)
    while len(pool.models) < results + 5:
        point = space.sample(random)
        if pool.number_of(space.key(point)) is None:
            pool.add_model(Model(len(pool.models), space.key(point), point, 0))
    for number in random.permutation(results).tolist():
        good = number not in bad
        score = (float(sum(pool.models[number].point)),) if good else None
        pool.add_result(Result(number, "done" if good else "failed", score))
    return pool


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_follows_from_seed_request_and_prefix(name):
    space = mixed_space()
    full = pool_of(space, 40)
    # One replica has answered before and holds more rows; the other was just started with the prefix.
    used, veteran = full.view(45, 36), as_proposer(name)
    for number in range(3):
        answer(veteran, 7, Request(number, 2, 45, 28), full.view(45, 28), Gate(space))
    short = Pool(space)
    for model in full.models:
        short.add_model(model)
    for result in full.results[:36]:
        short.add_result(result)
    request = Request(9, 3, 45, 36)
    one, other = (
        answer(p, 7, request, v, Gate(space)) for p, v in ((veteran, used), (as_proposer(name), short.view(45, 36)))
    )
    assert [c.key for c in one.models] == [c.key for c in other.models] and len(one.models) == 3
    if name != "anneal":  # which may well come to the same
        another = answer(as_proposer(name), 8, request, used, Gate(space))
        assert [c.key for c in one.models] != [c.key for c in another.models]


@pytest.mark.parametrize("name", NAMES)
def test_no_model_is_tried_twice_and_a_small_space_ends(name):
    if name.startswith("optuna"):
        pytest.skip("slow when nearly all models are known")
    space = mixed_space()
    everything = len(list(space.all_points()))
    history, _ = simulated(space, lambda point: float(sum(point)), trials=10_000, proposer=name, speeds=[1, 3])
    assert len(history.trials) == len({trial.key for trial in history.trials}) == everything
    assert history.nothing == {"exhausted": True, "nearest": None, "needs": {}, "why": ""}


@pytest.mark.parametrize("name", ["anneal", "anneal_plain", "evolve"])
def test_trials_without_a_score_are_never_parents(name):
    space, bad = small_space(), set(range(0, 40, 2))
    pool = pool_of(space, 40, bad=bad)
    parents = set()
    for number in range(40):
        found = answer(as_proposer(name), 1, Request(number, 2, 45, 40), pool.view(45, 40), Gate(space))
        parents |= {candidate.parent for candidate in found.models}
    assert len(parents - {None}) >= 2 and not parents & bad


def test_annealing_and_evolution_learn():
    """Gains over random search in the same seeds; the full comparison is in benchmarks/exploration.py."""
    names = ("random", "evolve", "anneal_plain", "anneal")
    for make, trials, seeds in ((interactions, 120, (11, 12, 13)), (elastic, 80, (11, 12))):
        means = {}
        for name in names:
            means[name] = np.mean([picked(make(seed), search(make(seed), name, trials, seed)[0]) for seed in seeds])
        assert max(means, key=means.get) == "anneal", means
        if make is interactions:  # the other is too short for the difference to show without a surrogate
            assert min(means, key=means.get) == "random", means


def test_several_objectives_are_ranked():
    scores = np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    assert pareto_front(scores) == [0, 1, 3]
    assert pareto_ranks(scores, 5).tolist() == [0, 0, 1, 0, 2]
    assert set(best_first(scores, 3)) == {0, 1, 3} and best_first(scores, 5)[3:] == [2, 4]
    rng = np.random.default_rng(0)
    many = rng.integers(0, 6, (60, 3)).astype(float)
    slow = [i for i, a in enumerate(many) if not any((b >= a).all() and (b > a).any() for b in many)]
    assert pareto_front(many) == slow


def test_a_proposer_of_the_users_own():
    class Highest:
        name = "highest"

        def propose(self, request, view, sieve, random):
            for point in view.space.all_points():
                if len(sieve.chosen) < request.count:
                    sieve.take(point)

    history, _ = simulated(small_space(), lambda point: 1.0, trials=9, proposer=Highest())
    assert [trial.point for trial in history.trials] == list(small_space().all_points())[:9]


def test_what_is_wrong_is_named():
    with pytest.raises(ExplorationError, match="anneal, anneal_plain, evolve, random, 'optuna:CLASS'"):
        as_proposer("annealing")
    if importlib.util.find_spec("optuna") is None:
        with pytest.raises(ExplorationError, match=r"pip install 'graphopt\[optuna\]'"):
            as_proposer("optuna:TPESampler")
