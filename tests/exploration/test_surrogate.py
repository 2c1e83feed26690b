"""The surrogate: what it learns from results, and that it knows what it does not know."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from graphopt.exploration import choice, linear
from graphopt.exploration.search_space import Knob, SearchSpace
from graphopt.exploration.surrogate import Posterior, Surrogate, choose_kernel, first_kernel, rows_to_keep
from tests.exploration.searches import mixed_space

BITS = SearchSpace([Knob(f"b{i}", "net", choice(0, 1)) for i in range(6)])
LINE = SearchSpace([Knob(f"x{i}", "hp", linear(0, 1, steps=21)) for i in range(4)])


def drawn(space, count, seed=0):
    random = np.random.default_rng(seed)
    points = [space.sample(random) for _ in range(count)]
    return points, space.levels(points)


def fitted(space, rows, scores):
    return Surrogate(choose_kernel(space.distances, rows, scores), space.distances, rows, scores)


def correlation(space, score, train, test=60):
    """Of what is expected of points that were not seen, with what is true of them."""
    points, rows = drawn(space, train + test)
    scores = np.array([score(point) for point in points])
    scores = (scores - scores.mean()) / scores.std()
    mean, _ = fitted(space, rows[:train], scores[:train]).predict(rows[train:])
    return np.corrcoef(mean, scores[train:])[0, 1]


@pytest.mark.parametrize("space", [BITS, LINE, mixed_space()], ids=["bits", "line", "mixed"])
def test_the_gradient_is_that_of_the_value(space):
    random = np.random.default_rng(1)
    _, rows = drawn(space, 30)
    posterior = Posterior(space.distances, rows, random.normal(size=30))
    for _ in range(3):
        at = random.normal(size=2 * len(space.free) + 3)
        step = check_grad(lambda p: posterior(p)[0], lambda p: posterior(p)[1], at)
        assert step < 1e-4 * (1 + np.abs(posterior(at)[1]).max())


def test_effects_that_add_up_and_those_that_do_not():
    assert correlation(LINE, lambda p: p[0] - 2 * p[1] + 0.5 * p[2], 25) > 0.97
    assert correlation(LINE, lambda p: -((p[0] - 12) ** 2) - (p[1] - 4) ** 2, 40) > 0.97
    assert correlation(BITS, lambda p: 1.0 if p[0] == p[1] else -1.0, 40) > 0.9


def test_what_matters_and_how_far_it_reaches_is_learned():
    points, rows = drawn(LINE, 80)
    x = np.array(points) / 20
    score = lambda x: np.sin(9 * x[:, 0]) + 0.3 * x[:, 1]
    kernel = choose_kernel(LINE.distances, rows, score(x))
    assert kernel.weights[0] > 2 * kernel.weights[2:].max()
    assert kernel.reaches[0] < 0.5 * kernel.reaches[1]
    noisy = choose_kernel(LINE.distances, rows, np.random.default_rng(0).normal(size=80))
    assert kernel.noise < 0.02 < 0.3 < noisy.noise


def test_of_few_results_little_is_believed():
    _, rows = drawn(LINE, 2)
    kernel, prior = choose_kernel(LINE.distances, rows, np.array([-1.0, 1.0])), first_kernel(4)
    assert np.allclose(kernel.weights, prior.weights, atol=0.05)
    assert kernel.noise == pytest.approx(prior.noise, rel=0.5)


def test_certainty_is_near_what_was_seen():
    _, rows = drawn(LINE, 30)
    scores = rows[:, 0] / 10 - 1.0
    surrogate = fitted(LINE, rows, scores)
    _, at = surrogate.predict(rows)
    seen = {tuple(row) for row in rows}
    _, far = surrogate.predict(np.array([row for row in drawn(LINE, 60, 1)[1] if tuple(row) not in seen]))
    assert at.max() < far.max() and (at >= 0).all()
    # Scores that are twice as large are twice as uncertain, as far as results and not the prior say so.
    wide = Surrogate(surrogate._kernel, LINE.distances, rows, 100 * scores).predict(rows)
    same = Surrogate(surrogate._kernel, LINE.distances, rows, 50 * scores).predict(rows)
    assert np.allclose(wide[0], 2 * same[0]) and np.allclose(wide[1], 2 * same[1], rtol=0.1)


def test_pending_trials_are_what_is_expected_of_them():
    _, rows = drawn(LINE, 20)
    surrogate = fitted(LINE, rows, rows[:, 0] / 10 - 1.0)
    far = np.full((1, 4), 20)
    before, after = surrogate.predict(far), surrogate.with_pending(far).predict(far)
    assert after[1] < 0.7 * before[1] and after[0] == pytest.approx(before[0], abs=0.05)
    assert surrogate.with_pending(rows[:0]) is surrogate


def test_rows_that_are_kept():
    scores = np.random.default_rng(0).normal(size=1000)
    kept = rows_to_keep(scores, 90)
    assert len(kept) == len(set(kept.tolist())) == 90
    assert set(np.argsort(-scores)[:30].tolist()) <= set(kept.tolist()) and set(range(970, 1000)) <= set(kept.tolist())
