"""What the cost model tells the gate of subnets, against what it tells of nets that are captured one by one."""

import pickle

import pytest
import torch
from torch import nn

from graphopt.cost_model import Machine
from graphopt.exploration import CostModelPredictor, ElasticPredictor, Training, explore, log
from graphopt.exploration.predictor import for_trial
from tests.exploration.test_elastic import data, space

MACHINE = Machine.named("H100")


def trial():
    return Training(nn.functional.cross_entropy, torch.optim.AdamW, data(32, 0), data(32, 1), epochs=1, batch=16)


def test_subnets_are_priced_as_nets_that_are_captured():
    """Counts are equal. Seconds are the same but for the number of launches, which is all that such small nets take."""
    elastic = ElasticPredictor(space(), trial(), MACHINE)
    single = CostModelPredictor(space(), trial(), MACHINE)
    for choice, near in ((space().full, 0.15), (space().choice({"width": 0.5}), 0.25)):
        for hp in ({"batch": 8, "weight_decay": 0.0}, {"batch": 32, "weight_decay": 0.1}):
            one, other = elastic(dict(choice), hp), single(dict(choice), hp)
            assert (one["parameters"], one["flops"]) == (other["parameters"], other["flops"])
            for mine, theirs in zip(one["step_seconds"], other["step_seconds"]):
                assert mine == pytest.approx(theirs, rel=near)


def test_it_says_the_same_where_it_is_unpickled():
    elastic = ElasticPredictor(space(), trial(), MACHINE)
    before = elastic(dict(space().smallest), {"batch": 8})
    assert pickle.loads(pickle.dumps(elastic))(dict(space().smallest), {"batch": 8}) == before


def test_counts_need_no_measured_machine(monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the machine was measured")

    monkeypatch.setattr(Machine, "current", never)
    full = for_trial(space(), trial(), {"flops"})(dict(space().full), {})
    study = explore(
        space(), trial(), hyper_parameters={"lr": log(1e-3, 1e-1, steps=3)}, budget={"flops": 0.7 * full["flops"]},
        trials=6, on="inline", progress=False,
    )  # fmt: skip
    assert study.history.refused > 0
    assert all(t.predicted["flops"][0] <= 0.7 * full["flops"] for t in study.trials("done"))


def test_prices_are_for_the_threads_that_trials_have(monkeypatch):
    seen = []
    monkeypatch.setattr(Machine, "current", lambda: seen.append(torch.get_num_threads()) or MACHINE)
    before = torch.get_num_threads()
    for_trial(space(), trial(), {"step_seconds"}, threads=3)
    for_trial(space(), trial(), {"peak_bytes"}, threads=2)
    for_trial(space(), trial(), {"peak_bytes"})
    assert seen == [3, 2, before] and torch.get_num_threads() == before
