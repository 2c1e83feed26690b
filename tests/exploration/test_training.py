"""The ready-made trial and the default predictor, on real nets."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.cost_model import Machine
from graphopt.errors import BudgetTooTight, ExplorationError
from graphopt.exploration import ASHA, CostModelPredictor, ModelFunction, Training, choice, explore, log
from graphopt.exploration.context import Context
from graphopt.exploration.fingerprints import digest_of, fingerprints
from graphopt.exploration.outcome import Objectives
from graphopt.exploration.search_space import search_space

INLINE = {"on": "inline", "progress": False}


def data(rows, seed=0):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :4].sum(1) > x[:, 4:].prod(1)).long()


def build(width, layers):
    """A perceptron."""
    sizes = [8, *[width] * layers]
    parts = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], 2))


def training(**options):
    return Training(nn.functional.cross_entropy, torch.optim.SGD, data(256), data(256, 1), **{"epochs": 3, **options})


def test_the_common_case_needs_no_trial_function():
    study = explore(
        build(16, 1), training(), hyper_parameters={"lr": log(1e-4, 1.0, steps=9), "batch": choice(16, 64)}, trials=12,
        retrain=3, effort=3.0, **INLINE,
    )  # fmt: skip
    assert study.counts() == {"done": 12} and study.objectives.names == ("accuracy",)
    best = study.best()
    assert best.final["accuracy"] > 0.8 and best.hyper_parameters["lr"] > 0.01
    assert best.metrics["parameters"] == 8 * 16 + 16 + 16 * 2 + 2 and best.metrics["step_seconds"] > 0
    assert len(best.curve) == 3
    assert isinstance(study.build(best), nn.Sequential)


def test_each_trial_starts_from_the_given_weights():
    model = build(4, 1)
    before = [p.clone() for p in model.parameters()]
    seen = []

    def trial(net, hp, context):
        seen.append([p.clone() for p in net.parameters()])
        return training(epochs=1)(net, hp, context)

    explore(model, trial, hyper_parameters={"lr": log(0.01, 0.1, steps=3)}, maximize="accuracy", trials=3, **INLINE)
    assert all(
        torch.equal(a, b) for parameters in [*seen, list(model.parameters())] for a, b in zip(parameters, before)
    )


def test_an_attempt_goes_on_from_its_checkpoint(tmp_path):
    class Stop(Exception):
        pass

    def stop_at(epoch):
        def tell(step, value, rung):
            if step == epoch:
                raise Stop
            return True

        return tell

    def run(folder, tell, net):
        return training()(net, {"lr": 0.1}, Context(0, 5, tmp_path / folder, tell=tell))

    torch.manual_seed(1)
    state = build(8, 1).state_dict()

    def fresh():
        net = build(8, 1)
        net.load_state_dict(state)
        return net

    whole, halved = fresh(), fresh()
    expected = run("whole", None, whole)
    with pytest.raises(Stop):
        run("halved", stop_at(2), halved)
    again = fresh()
    result = run("halved", None, again)
    assert result["accuracy"] == expected["accuracy"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    # An epoch that was kept is told again: whoever decides may not have heard of it.
    reports = []
    run("whole", lambda step, value, rung: reports.append((step, value)) or True, fresh())
    assert reports == [(3, expected["accuracy"])]


def test_batches_of_one_row_are_trained_on():
    hyper_parameters, context = {"lr": 0.1, "batch": 1}, Context(0, 5, Path("nowhere"))
    context.save = lambda state: None
    net = build(4, 1)
    before = [p.clone() for p in net.parameters()]
    measured = training(epochs=1)(net, hyper_parameters, context)
    assert measured["step_seconds"] > 0 and not torch.equal(before[0], next(net.parameters()))


def test_peak_memory_is_that_of_the_trial_alone(monkeypatch):
    """A device whose memory was used by a trial before, of which the counter still knows."""
    peak = [1000]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 10))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    context = Context(0, 5, Path("nowhere"))
    context.save = lambda state: None
    assert training(epochs=1, device="cuda")(build(4, 1), {"lr": 0.1}, context)["peak_bytes"] == 10


def test_the_cost_model_keeps_the_budget():
    """Nets are captured and priced, and none beyond the budget is built for training."""
    built = []

    class Watched(Training):
        def __call__(self, net, hyper_parameters, context):
            built.append(sum(p.numel() for p in net.parameters()))
            return super().__call__(net, hyper_parameters, context)

    trial = Watched(nn.functional.cross_entropy, torch.optim.SGD, data(64), data(64, 1), epochs=1)
    space = ModelFunction(build, width=(4, 16, 256), layers=(1, 2))
    predictor = CostModelPredictor(space, trial, Machine.named("H100"))
    predicted = predictor({"width": 256, "layers": 2}, {"batch": 32})
    value, low, high = predicted["step_seconds"]
    assert 0 < low < value < high
    # Parameters, gradients and what the step keeps.
    assert predicted["parameters"] == 8 * 256 + 256 + 256 * 256 + 256 + 256 * 2 + 2
    assert predicted["peak_bytes"][0] > 2 * 4 * predicted["parameters"]
    assert predictor({"width": 256, "layers": 2}, {"batch": 64})["flops"] == 2 * predicted["flops"]
    study = explore(
        space, trial, hyper_parameters={"lr": log(0.01, 0.1, steps=3)}, budget={"parameters": 500.0},
        predictor=predictor, trials=8, **INLINE,
    )  # fmt: skip
    assert study.counts()["done"] == 8 == len(built) and max(built) <= 500 and study.history.refused > 0
    with pytest.raises(BudgetTooTight, match="width=4"):
        explore(space, trial, budget={"parameters": 10.0}, predictor=predictor, trials=8, **INLINE)


def test_early_stopping_of_training():
    study = explore(
        build(8, 1), training(epochs=9), hyper_parameters={"lr": log(1e-4, 1.0, steps=20)}, trials=15,
        stop=ASHA(1, 3, 9), **INLINE,
    )  # fmt: skip
    assert study.counts()["pruned"] >= 5 and study.best().metrics["accuracy"] > 0.75


def test_data_and_model_are_part_of_a_study():
    space, objectives = search_space(None, {"lr": log(0.1, 1)}), Objectives("accuracy")

    def of(model, trial):
        return fingerprints(space, model, trial, objectives)

    model = build(4, 1)
    same = of(model, training())
    assert of(model, training()) == same
    changed = nn.Sequential(*model)
    assert of(changed, training()) == same
    other = training()
    other.data[0][100, 3] += 1
    assert of(model, other)["trial and data"] != same["trial and data"]
    assert of(model, training(epochs=4))["trial and data"] != same["trial and data"]
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert of(model, training())["model"] != same["model"]


class Smooth:
    """A loss, and a trial, with settings."""

    def __init__(self, by, kept=None):
        self.by, self.kept, self._calls = by, kept, 0

    def __call__(self, *arguments):
        return nn.functional.cross_entropy(*arguments, label_smoothing=self.by)


PAIRS = {
    "partial": [partial(nn.functional.cross_entropy, label_smoothing=by) for by in (0.1, 0.1, 0.2)],
    "module": [nn.CrossEntropyLoss(label_smoothing=by) for by in (0.1, 0.1, 0.2)],
    "instance": [Smooth(by) for by in (0.1, 0.1, 0.2)],
    "tensor": [Smooth(0.1, {"w": torch.full((2,), by)}) for by in (0.1, 0.1, 0.2)],
    "method": [Smooth(by).__call__ for by in (0.1, 0.1, 0.2)],
    "class": [torch.optim.SGD, torch.optim.SGD, torch.optim.AdamW],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_partials_and_objects_count_by_what_is_in_them(kind):
    """As a trial, and as the loss of a `Training`: two that are alike, and another."""
    one, same, other = PAIRS[kind]
    if kind == "instance":
        same._calls = 7  # what changes as it is used
    for of in (digest_of, lambda loss: digest_of(Training(loss, torch.optim.SGD, data(8), data(8)))):
        assert of(one) == of(same) != of(other)


def test_bad_input():
    x, y = data(8)
    for options in ({"epochs": 0}, {"batch": 1.5}):
        with pytest.raises(ExplorationError, match=next(iter(options))):
            training(**options)
    for pair in ((x, y[:4]), (x[:0], y[:0]), (x,)):
        with pytest.raises(ExplorationError, match="data"):
            Training(nn.functional.cross_entropy, torch.optim.SGD, pair, (x, y))
