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
from tests.elastic.pairs import adamw, assert_same_training, pair, sgd
from tests.elastic.supernets import attentive


def losses_of(step):
    return torch.stack([loss for _, loss in step.last])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("name", ["convolutional", "attentive"])
def test_graphs_train_as_autograd_does(name, combine, make):
    how = {"strategy": Recurring(sets=2), "combine": combine, "clip": 1.0}
    plain, shared = pair(name, make, how, {"schemes": "flat"})
    for i in range(6):
        assert_same_training(plain, shared, i)
        torch.testing.assert_close(losses_of(shared.step), losses_of(plain.step), rtol=1e-10, atol=1e-12)
        assert (shared.step.plan is not None) == (i >= 2)  # a set is a graph from its second time on
    assert shared.step.plan.chosen == "flat"


@pytest.mark.parametrize("name", ["convolutional", "attentive"])
def test_two_processors_train_as_one_does(name):
    how = {"strategy": Recurring(sets=1), "subnets": 3}
    plain, shared = pair(name, adamw, how, {"schemes": [DataParallel(2)], "processors": 2})
    for i in range(4):
        assert_same_training(plain, shared, i)
    assert shared.step.plan.chosen == "data parallel on 2, owner", shared.step.plan.explain()
    shared.step.close()


def test_the_state_of_the_model_is_part_of_the_set():
    plain, shared = pair("convolutional", sgd, {"strategy": Recurring(sets=1)}, {"schemes": "flat"})
    for i, mode in enumerate([True, True, False, False, True]):
        for side in (plain, shared):
            side.space.model.train(mode)
        assert_same_training(plain, shared, i)
    assert shared.step.plan is not None


def test_subnets_that_never_come_again_make_no_graphs(monkeypatch):
    monkeypatch.setattr(graph_steps, "MOST", 1)
    plain, shared = pair("attentive", sgd, {"strategy": Recurring(sets=2)}, {"schemes": "flat"})
    made = []
    for i in range(5):
        assert_same_training(plain, shared, i)
        made.append(shared.step.plan is not None)
    assert made == [False, False, True, False, True]  # one set has a graph, the other one none


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
    _, shared = pair(
        "attentive", sgd, {"strategy": Recurring(sets=1), "distillation": InPlaceDistillation(0.5, ramp=0)},
        {"schemes": "flat"},
    )  # fmt: skip
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
    space, *_ = attentive()
    with pytest.raises(error, match=words):
        ElasticStep(space, F.cross_entropy, torch.optim.SGD(space.model.parameters(), lr=0.1), **how)
