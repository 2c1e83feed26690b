"""Sets of subnets that come again, as steps of `graphopt.optimize`: what they compute, and when they are made."""

import copy

import pytest
import torch
from torch.nn import functional as F

import graphopt.elastic
from graphopt.elastic import graph_steps
from graphopt.elastic.distillation import InPlaceDistillation
from graphopt.elastic.sampling import Fixed, Recurring
from graphopt.elastic.step import ElasticStep
from graphopt.elastic.transformations import Identity, Linear
from graphopt.errors import ElasticError, GraphoptError
from graphopt.schemes import DataParallel
from tests.elastic.pairs import adamw, assert_same_training, pair, sgd, spaces


def test_graphs_train_as_autograd_does():
    how = {"strategy": Recurring(sets=2), "combine": "sum", "clip": 1.0}
    plain, shared = pair(adamw, how, {"schemes": "flat"})
    for i in range(5):
        assert_same_training(plain, shared, i)
        assert (shared.step.plan is not None) == (i >= 2)  # a set is a graph from its second time on
    assert shared.step.plan.chosen == "flat"


def test_two_processors_train_as_one_does():
    how = {"strategy": Recurring(sets=1), "subnets": 3}
    plain, shared = pair(adamw, how, {"schemes": [DataParallel(2)], "processors": 2})
    for i in range(4):
        assert_same_training(plain, shared, i)
    assert shared.step.plan.chosen == "data parallel on 2, owner", shared.step.plan.explain()
    shared.step.close()


def test_the_state_of_the_model_is_part_of_the_set():
    plain, shared = pair(sgd, {"strategy": Recurring(sets=1), "subnets": 2}, {"schemes": "flat"})
    made = []
    for i, mode in enumerate([True, True, False, False, True]):
        for side in (plain, shared):
            side.space.model.train(mode)
        assert_same_training(plain, shared, i)
        made.append(shared.step.plan is not None)
    assert made == [False, True, False, True, True]


def test_sets_beyond_the_limit_run_by_autograd(monkeypatch):
    monkeypatch.setattr(graph_steps, "MOST", 1)
    plain, shared = pair(sgd, {"strategy": Recurring(sets=2), "subnets": 3}, {"schemes": "flat"})
    made = []
    for i in range(5):
        assert_same_training(plain, shared, i)
        made.append(shared.step.plan is not None)
    assert made == [False, False, True, False, True]


def test_transformations_are_trained_in_graphs_too():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 6).double(), torch.randint(3, (6,))
    results = []
    for schemes in (None, "flat"):
        model = copy.deepcopy(net)
        torch.manual_seed(1)
        space = graphopt.elastic.space(model, x, layers={"0": [Identity(), Linear()]})
        optimizer = torch.optim.SGD([*model.parameters(), *space.layers.parameters()], lr=0.1)
        every = [space.full, space.smallest, space.choice({space.dimensions[0].name: space.dimensions[0].smallest})]
        step = ElasticStep(space, F.cross_entropy, optimizer, strategy=Fixed(every), subnets=3, schemes=schemes)
        for _ in range(3):
            step(x, y)
        assert (step.plan is None) == (schemes is None)
        results.append([*model.state_dict().values(), *space.layers.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_with_a_teacher_is_no_graph():
    how = {"strategy": Recurring(sets=1), "distillation": InPlaceDistillation(0.5, ramp=0)}
    _, shared = pair(sgd, how, {"schemes": "flat"})
    for _ in range(3):
        shared.step(*shared.batch)
    assert shared.step.plan is None


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"schemes": "fast"}, GraphoptError, "unknown name 'fast'"),
        ({"schemes": "data parallel"}, GraphoptError, "processors"),
        ({"processors": 2}, ElasticError, "schemes='auto'"),
        ({"processors": 0}, ElasticError, "positive"),
        ({"batch_norm": "none"}, ElasticError, "batch_norm"),
    ],
)
def test_bad_arguments(how, error, words):
    space, *_ = spaces(0.3)
    with pytest.raises(error, match=words):
        ElasticStep(space, F.cross_entropy, torch.optim.SGD(space.model.parameters(), lr=0.1), **how)
