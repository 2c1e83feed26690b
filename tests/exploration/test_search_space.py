"""Points, keys and moves."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import ExplorationError
from graphopt.exploration import ModelFunction, choice, integer, linear, log
from graphopt.exploration.hyper_parameters import HyperParameter
from graphopt.exploration.search_space import Knob, SearchSpace, net_of, search_space
from tests.exploration.searches import mixed_space

SPACE = mixed_space()
SEEDS = st.integers(0, 2**32 - 1)


def meaning(space, point):
    """What a trial of a point would be given: sizes that count, and hyper-parameters."""
    counts = space.active(point)
    sizes = {k.name: k.range.values[i] for k, i, c in zip(space.knobs, point, counts) if c and k.kind == "net"}
    return sizes, space.hyper_parameters(point)


@given(SEEDS, SEEDS)
def test_points_have_the_same_key_exactly_if_they_mean_the_same(one, other):
    a, b = (tuple(int(np.random.default_rng(s).integers(k.size)) for k in SPACE.knobs) for s in (one, other))
    a = (*a[:3], *b[3:]) if one % 2 else a  # often alike
    assert (SPACE.key(a) == SPACE.key(b)) == (meaning(SPACE, a) == meaning(SPACE, b))
    assert meaning(SPACE, SPACE.canonical(a)) == meaning(SPACE, a)
    assert SPACE.canonical(SPACE.canonical(a)) == SPACE.canonical(a)


@given(SEEDS)
def test_a_move_gives_another_trial_of_the_space(seed):
    random = np.random.default_rng(seed)
    point = SPACE.sample(random)
    for kind in ("net", "hp", None):
        other = SPACE.move(point, random, kind)
        assert SPACE.key(other) != SPACE.key(point)
        assert all(0 <= i < k.size for i, k in zip(other, SPACE.knobs))
        changed = [k.kind for k, a, b in zip(SPACE.knobs, point, other) if a != b]
        assert kind is None or set(changed) == {kind}


def test_moves_reach_every_point():
    random, known = np.random.default_rng(0), {SPACE.landmarks()[0]}
    for _ in range(12):
        known |= {SPACE.move(point, random) for point in list(known) for _ in range(8)}
    everything = set(SPACE.all_points())
    assert known <= everything and len(known) > 0.95 * len(everything)
    assert len({SPACE.key(point) for point in everything}) == len(everything)


@given(SEEDS)
def test_levels_tell_trials_apart_and_lie_as_far_as_their_values(seed):
    random = np.random.default_rng(seed)
    points = [SPACE.sample(random) for _ in range(8)]
    rows = SPACE.levels(points)
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            assert (a == b) == bool((rows[i] == rows[j]).all())
            for k, (place, apart) in enumerate(zip(SPACE.free, SPACE.distances)):
                knob, counts = SPACE.knobs[place], (SPACE.active(a)[place], SPACE.active(b)[place])
                found = apart[rows[i, k], rows[j, k]]
                if all(counts) and knob.range.ordered:
                    assert found == pytest.approx(abs(a[place] - b[place]) / (knob.size - 1))
                elif all(counts):
                    assert found == float(a[place] != b[place])
                elif not any(counts):  # its value makes no difference
                    assert found == 0.0


def test_many_values_of_an_ordered_knob_share_levels():
    space = SearchSpace([Knob("lr", "hp", log(1e-5, 1, steps=501)), Knob("kind", "hp", choice(*map(str, range(50))))])
    assert [apart.shape for apart in space.distances] == [(33, 33), (50, 50)]
    levels = space.levels([(i, 49) for i in range(501)])
    assert levels[0].tolist() == [0, 49] and levels[-1].tolist() == [32, 49]
    assert (np.diff(levels[:, 0]) >= 0).all() and len(np.unique(levels[:, 0])) == 33


@given(SEEDS)
def test_neighbours_differ_in_one_knob(seed):
    random = np.random.default_rng(seed)
    point = SPACE.sample(random)
    around = SPACE.neighbours(point, random)
    counts = SPACE.active(point)
    assert (
        len(set(around)) == len(around) == sum(knob.size - 1 for knob, counted in zip(SPACE.knobs, counts) if counted)
    )
    for other in around:
        assert SPACE.key(other) != SPACE.key(point) and SPACE.canonical(other) == other
    few = SearchSpace([Knob("lr", "hp", log(1e-5, 1, steps=501))]).neighbours((250,), random)
    assert {(248,), (249,), (251,), (252,)} <= set(few) and len(few) <= 8


def test_a_space_is_the_same_in_another_process():
    copy = pickle.loads(pickle.dumps(SPACE))
    point = SPACE.sample(np.random.default_rng(3))
    assert (copy.digest, copy.key(point)) == (SPACE.digest, SPACE.key(point))
    other = SearchSpace([Knob(k.name, k.kind, choice(*k.range.values, 99)) for k in SPACE.knobs[:1]])
    assert other.digest != SearchSpace(SPACE.knobs[:1]).digest


def test_hyper_parameters_that_do_not_count_are_not_given():
    point = SPACE.point({"depth": 1}, {"optimizer": "adam", "lr": 0.001})
    assert SPACE.hyper_parameters(point) == {"optimizer": "adam", "lr": 0.001}
    assert SPACE.hyper_parameters(SPACE.point({}, {"optimizer": "sgd"}))["momentum"] == 0.9
    with pytest.raises(ExplorationError, match="depth=7"):
        SPACE.point({"depth": 7}, {})


def test_values_of_ranges():
    assert linear(0, 1, steps=5).values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert integer(3, 3).values == (3,)
    assert len(set(log(1e-9, 1.00001e-9, steps=50).values)) == 50
    assert not choice(3, 1, 2).ordered and choice(1, 2, 3).ordered and not choice(True, False).ordered


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: log(0, 1), "0 < low"),
        (lambda: linear(1, 0), "low < high"),
        (lambda: linear(float("nan"), 1), "finite"),
        (lambda: linear(0, 1, steps=1), "steps"),
        (lambda: integer(1.5, 3), "integer"),
        (lambda: choice(), "at least one"),
        (lambda: choice(1, 1), "twice"),
        (lambda: choice(object()), "give a name"),
        (lambda: choice(float("inf")), "finite"),
        (lambda: SearchSpace([Knob("a", "hp", choice(1, 2, when={"b": 1}))]), "'b'"),
        (lambda: SearchSpace([Knob("a", "hp", choice(1, 2, when={"a": 1}))]), "circle"),
        (lambda: SearchSpace([Knob("b", "hp", choice(1, 2)), Knob("a", "hp", choice(1, 2, when={"b": 3}))]), "never 3"),
        (lambda: SearchSpace([Knob("a", "hp", choice(1))] * 2), "two"),
        (lambda: search_space(None, {}), "nothing to explore"),
        (lambda: search_space(None, {"lr": 0.1}), "'lr'"),
        (lambda: search_space(lambda: 0, {}), "ModelFunction"),
        (lambda: search_space(3, {}), "int"),
        (lambda: ModelFunction(print), "at least one dimension"),
    ],
)
def test_what_is_wrong_is_named(make, told):
    with pytest.raises(ExplorationError, match=told):
        make()


class Dimension:
    def __init__(self, name, choices):
        self.name, self.choices = name, choices


class Supernet:
    """Anything with these names is a space of subnets."""

    dimensions = (Dimension("width", (4, 8)), Dimension("depth", (1, 2, 3)))

    def choice(self, sizes):
        return dict(sizes)

    def extract(self, choice):
        return ("subnet", choice)


def test_nets_come_from_any_kind_of_space():
    space = search_space(Supernet(), {"lr": log(1e-3, 1e-1)})
    point = space.landmarks()[1]
    assert net_of(Supernet(), space, point) == ("subnet", {"width": 4, "depth": 1})
    made = ModelFunction(dict, width=(4, 8), depth=HyperParameter((1, 2)))
    space = search_space(made, None)
    assert net_of(made, space, space.landmarks()[0]) == {"width": 8, "depth": 2}
    assert net_of(None, space, point) is None
