"""The hybrid scheme: what it computes, when it runs, and that its regions follow the size of the batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost_model import Link
from graphopt.errors import AxisError, GraphoptError
from graphopt.graph.batch import flatten
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._strategies import BATCH
from graphopt.schemes import DataParallel, Hybrid, Prepared, Task, regions, regions_solver
from graphopt.schemes import hybrid as module
from graphopt.schemes.captured_step import capture_task
from graphopt.step import PASSES
from tests.cost_model.machines import simple
from tests.schemes.pairs import pair
from tests.schemes.trials import assert_trains_like_eager

NEAR, FAR = simple(link=Link(1e-6, 1e8)), simple(link=Link(1e-2, 1e4))
"""Processors with a link as fast as their memory, and with one that is no use."""


class SmallAlexNet(nn.Module):
    """Convolutions, normalised; dropout; linear layers with most of the parameters."""

    def __init__(self, width=128):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(72, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def batch(size):
    return torch.randn(size, 3, 12, 12), torch.randint(5, (size,))


def prepared(model=None, size=6, **options):
    torch.manual_seed(0)
    model = SmallAlexNet() if model is None else model
    task = Task(model, F.cross_entropy, (torch.optim.SGD(model.parameters(), lr=0.05),), **options)
    return Prepared(task, flatten(batch(size))[1], capture_task(task, batch(size), PASSES))


def regimes(regions, name):
    """The regimes of the operators whose name begins so."""
    return {regime for node, regime in regions.regimes.items() if node.startswith(name)}


def test_fifty_steps_in_regions_are_those_of_eager():
    scheme = Hybrid(2, machine=NEAR)
    even, odd = (scheme.regions(prepared(), size) for size in (6, 5))
    assert regimes(even, "convolution") == {BATCH}
    assert BATCH not in regimes(even, "addmm") and len(regimes(even, "addmm")) == 3
    assert odd.kind == "hybrid" and odd.regimes != even.regimes  # of which one processor has more rows
    batches = [batch(5 if i % 3 == 2 else 6) for i in range(50)]
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
    assert_trains_like_eager(scheme, SmallAlexNet(), sgd, batches)


def test_what_others_do_as_well_is_left_to_them():
    narrow = prepared(SmallAlexNet(width=8))
    assert "data parallel" in Hybrid(2, machine=NEAR).why_not(narrow, 6)
    linear = prepared(nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 5)))
    assert "costs more than it saves" in Hybrid(2, machine=FAR).why_not(linear, 6)
    assert Hybrid(2, machine=NEAR).why_not(prepared(), 6) is None


def test_what_it_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(module, "kept", lambda threads: None)
    assert "calibrate" in Hybrid(2).why_not(prepared(), 6)
    monkeypatch.setattr(module, "kept", lambda threads: simple())
    assert "calibrate" in Hybrid(2).why_not(prepared(), 6)  # alone, without other processors
    monkeypatch.setattr(module, "kept", lambda threads: NEAR)
    assert Hybrid(2).why_not(prepared(), 6) is None
    assert "batch_norm" in Hybrid(2, "local").why_not(prepared(), 6)
    assert "accumulated" in Hybrid(2).why_not(prepared(accumulate=2), 6)
    with pytest.raises(GraphoptError, match="processors"):
        Hybrid(1)


def test_regions_are_chosen_once_and_sizes_with_the_same_regions_share_a_graph():
    scheme, step = Hybrid(2, machine=NEAR), prepared(size=8)
    assert scheme.regions(step, 8) is scheme.regions(step, 8)
    graphs = {}
    for size in (4, 5, 6, 7, 8):
        key = tuple(scheme.regions(step, size).regimes.items())
        graphs.setdefault(key, set()).add(id(scheme.divided(step, size)))
    assert 1 < len(graphs) < 5 and all(len(same) == 1 for same in graphs.values())


def test_only_the_graphs_of_the_sizes_run_last_are_kept(monkeypatch):
    scheme, step = Hybrid(2, machine=NEAR), prepared(size=8)
    monkeypatch.setattr(module, "MOST", 1)
    runner = scheme.build(step)
    jobs = []
    for size in (8, 7, 7, 8):
        runner(batch(size))
        ((_, kept),) = runner._steps.values()
        jobs.append(weakref.ref(kept._whole.lowered.run._job))
        assert list(runner._divided) == [size]
        del kept
    gc.collect()
    assert [job() is not None for job in jobs] == [False, False, False, True] and jobs[1]() is jobs[2]()
    with monkeypatch.context() as hot:
        hot.setattr(Hybrid, "regions", lambda *_: pytest.fail("regions were looked up by a size that is known"))
        runner(batch(8))
    runner.close()
    step.task.pools.close()


def test_an_axis_that_cannot_be_divided_is_a_reason(monkeypatch):
    def refuse(*_):
        raise AxisError("7 heads must stay 7")

    monkeypatch.setattr(module, "choose_regions", refuse)
    assert "7 heads must stay 7" in Hybrid(2, machine=NEAR).why_not(prepared(), 6)


def test_both_searches_share_one_budget(monkeypatch):
    now = [0.0]

    def solve(*given, seconds, **options):  # takes all that it may
        now[0] += seconds
        return regions_solver.solve(*given, seconds=seconds, **options)

    monkeypatch.setattr(regions, "solve", solve)
    monkeypatch.setattr(regions, "perf_counter", lambda: now[0])
    strategies = Hybrid(2, machine=NEAR)._strategies(prepared())
    assert BATCH in strategies.axes
    regions.choose_regions(strategies, NEAR, 6, seconds=4.0)
    assert now == [4.0]


def test_its_price_has_communication_and_no_price_without_a_link():
    scheme, step = Hybrid(2, machine=NEAR), prepared()
    price = scheme.estimate(step, 6, lambda threads: NEAR)
    assert price.seconds == pytest.approx(sum(price.terms.values()))
    assert price.terms["communication"] > 0 and price.terms["optimizer"] > 0
    slower = scheme.estimate(step, 6, lambda threads: simple(link=Link(1e-3, 1e8)))
    assert slower.terms["communication"] > price.terms["communication"]
    assert scheme.estimate(step, 6, lambda threads: simple()) is None


def test_parts_of_one_row_have_a_price():
    step = prepared()
    assert DataParallel(2).estimate(step, 2, lambda threads: NEAR).sizes["batch"] == 1


def test_a_graph_that_holds_up_to_some_size_only_is_sent_to_workers(tmp_path):
    step = prepared(size=8)  # convolutions take other kernels from 16 images on
    assert not step.step.graph.symbols.admits({"batch": 16})
    for scheme in (DataParallel(2), Hybrid(2, machine=NEAR)):
        graph = scheme.divided(step, 8).graphs[1]
        graph.save(tmp_path / "part")
        assert TrainingGraph.load(tmp_path / "part").symbols.admits({"batch": 4, "batch.total": 8})


def test_it_is_a_candidate_where_processors_are_given():
    _, step, *_, data = pair("perceptron", schemes="auto", processors=2)
    step(*data(4))
    candidate = step.plan.candidate("hybrid on 2")
    assert candidate.why_not is not None  # small: data parallel, or not calibrated
    step.close()
    assert isinstance(graphopt.schemes.Hybrid(3), Hybrid)


def test_names_tell_options_apart():
    assert Hybrid(3, threads=2).name == "hybrid on 3, 2 threads each"
