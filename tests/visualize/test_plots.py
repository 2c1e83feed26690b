"""Figures, by the data in them."""

import numpy as np
import pytest
import torch

import graphopt.elastic
from graphopt.choice import Landscape
from graphopt.cost_model import estimate
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.memory import peak
from graphopt.elastic import Candidate as SubnetCandidate
from graphopt.elastic import Choice
from graphopt.errors import GraphoptError
from graphopt.exploration import linear
from graphopt.plan import Candidate, Crossover, Plan
from graphopt.visualize.plots import memory, pareto, predicted_against_measured, roofline, step_times
from tests.cost_model.machines import BANDWIDTH, RATE, simple
from tests.visualize.steps import head_only


def seconds(name: str, size: int) -> float:
    """Two schemes that cross at 40: one dear to start, one dear by sample."""
    return {"flat": 1e-3 + 1e-5 * size, "eager": 2e-4 + 3e-5 * size}[name]


def price(name: str, size: int) -> tuple[float, float, float] | None:
    if name == "inductor":
        return None
    return seconds(name, size), 0.8 * seconds(name, size), 1.3 * seconds(name, size)


@pytest.fixture
def plan() -> Plan:
    landscape = Landscape(price)
    for name in ("flat", "eager"):
        for size in (8, 64):
            landscape.add(
                name, size, Measurement(seconds(name, size), 0.9 * seconds(name, size), 1.2 * seconds(name, size), 9)
            )
    candidates = [Candidate(name, measurement=landscape.measured_at(name)[64], predicted=(*price(name, 64), "priced"))
                  for name in ("flat", "eager")]  # fmt: skip
    found = Plan(64, [*candidates, Candidate("inductor", "not here")], "flat", "a test", landscape=landscape)
    found.over_sizes = lambda: [Crossover(40, "eager", "flat")]
    return found


def lines(figure) -> dict[str, np.ndarray]:
    (ax,) = figure.axes
    return {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}


def test_step_times_are_those_of_the_landscape(plan):
    sizes = [4, 8, 16, 32, 64, 128]
    figure = step_times(plan, sizes)
    found = lines(figure)
    for name in ("flat", "eager"):
        expected = [plan.landscape.belief(name, n).seconds for n in sizes]
        np.testing.assert_allclose(found[name], np.column_stack([sizes, expected]))
    (ax,) = figure.axes
    measured = {c.get_label(): c for c in ax.containers}
    for name in ("flat", "eager"):
        points, _, (bars,) = measured[f"{name}, measured"].lines
        np.testing.assert_allclose(points.get_xydata(), [[n, seconds(name, n)] for n in (8, 64)])
        np.testing.assert_allclose(
            [b[:, 1] for b in bars.get_segments()], [[0.9 * seconds(name, n), 1.2 * seconds(name, n)] for n in (8, 64)]
        )
    (crossover,) = [line for line in ax.lines if (line.get_gid() or "").startswith("crossover")]
    assert set(crossover.get_xdata()) == {40} and "inductor" not in found


def test_step_times_per_sample_and_of_some_schemes(plan):
    found = lines(step_times(plan, [8, 64], schemes=["flat"], per_sample=True))
    np.testing.assert_allclose(found["flat"], [[n, seconds("flat", n) / n] for n in (8, 64)])
    assert "eager" not in found


def test_step_times_reach_beyond_what_was_measured(plan):
    x = lines(step_times(plan))["flat"][:, 0]
    assert x.min() == 2 and x.max() == 256 and {8, 64} <= set(x)


def test_plans_without_times_say_so(plan):
    plan.landscape = None
    with pytest.raises(GraphoptError, match="one batch size only"):
        step_times(plan)
    empty = Plan(8, [Candidate("flat")], "flat", "", landscape=Landscape(lambda name, size: None))
    with pytest.raises(GraphoptError, match="nothing is known"):
        step_times(empty)
    with pytest.raises(GraphoptError, match="no candidate has both"):
        predicted_against_measured(empty)


def test_memory_is_the_liveness_curve_before_and_after():
    result = head_only()
    found = lines(memory(result, {"batch": 64}))
    for graph, label in ((result.before, "captured"), (result.graph, "after passes")):
        expected = peak(graph, {"batch": 64})
        np.testing.assert_array_equal(found[label][:, 1], expected.timeline)
        assert np.all(np.diff(found[label][:, 0]) >= 0)
        assert found[f"{label}, peak"][0, 1] == expected.total
    assert found["after passes, peak"][0, 1] < found["captured, peak"][0, 1]
    # an operator that both hold stands at one place
    place = {n.name: i for i, n in enumerate(m for m in result.before.nodes if m.op not in ("placeholder", "output"))}
    after = [n.name for n in result.graph.nodes if n.op not in ("placeholder", "output")]
    at = dict(zip(after, found["after passes"][:, 0]))
    loss = next(n for n in after if n.startswith("nll_loss_forward"))
    assert at[loss] == place[loss]


def test_memory_of_one_graph():
    graph = head_only().graph
    np.testing.assert_array_equal(lines(memory(graph))["step"][:, 1], peak(graph).timeline)


def test_roofline_holds_every_operator_with_flops_under_the_roof():
    graph = head_only().graph
    machine = simple(launch=dict.fromkeys(simple().launch, 0.0))
    figure = roofline(graph, machine, {"batch": 64})
    (ax,) = figure.axes
    points = np.concatenate([c.get_offsets().data for c in ax.collections])
    found = estimate(graph, machine, {"batch": 64})
    flops, moved = found.counts.flops, found.counts.bytes
    shown = (flops > 0) & (moved > 0) & (found.node_seconds > 0)
    expected = np.column_stack([flops[shown] / moved[shown], flops[shown] / found.node_seconds[shown]])
    np.testing.assert_allclose(points[np.lexsort(points.T)], expected[np.lexsort(expected.T)])
    assert np.all(points[:, 1] <= np.minimum(RATE, BANDWIDTH * points[:, 0]) * 1.001)
    roof = lines(figure)["roof of simple"]
    np.testing.assert_allclose(roof[:, 1], np.minimum(RATE, BANDWIDTH * roof[:, 0]))


def test_predicted_against_measured(plan):
    figure = predicted_against_measured([plan, plan])
    (ax,) = figure.axes
    for container in ax.containers:
        points = container.lines[0].get_xydata()
        name = container.get_label()
        np.testing.assert_allclose(points, [[seconds(name, 64), seconds(name, 64)]] * 2)
    assert "1.00 (median)" in ax.get_title(loc="left")


def test_figures_can_be_written(plan, tmp_path):
    for number, figure in enumerate((step_times(plan), memory(head_only()), roofline(head_only(), simple()))):
        figure.savefig(tmp_path / f"{number}.svg")
        assert (tmp_path / f"{number}.svg").stat().st_size > 5000


# -- fronts of subnets ------------------------------------------------------------------------------------------------


def candidates(rows) -> list[SubnetCandidate]:
    return [SubnetCandidate(Choice({"width": i}), {"flops": c, "parameters": 1.0}, q) for i, (c, q) in enumerate(rows)]


def test_pareto_draws_the_front_of_candidates():
    figure = pareto(
        candidates([(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (4.0, 0.9)]), quality="accuracy", budget=2.5
    )
    found, (ax,) = lines(figure), figure.axes
    np.testing.assert_array_equal(found["front (3)"], [[1.0, 0.5], [2.0, 0.8], [3.0, 0.9]])
    np.testing.assert_array_equal(np.sort(found["beaten (2)"], axis=0), [[2.0, 0.4], [4.0, 0.9]])
    (step,) = [line for line in ax.lines if line.get_gid() == "front"]
    assert step.get_drawstyle() == "steps-post" and step.get_xydata()[-1].tolist() == [4.0, 0.9]
    assert set(found["budget"][:, 0]) == {2.5}
    assert ax.get_xlabel() == "FLOPs" and ax.get_ylabel() == "accuracy"


def test_pareto_of_a_selection_marks_the_choice():
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    space = graphopt.elastic.space(net, torch.randn(16, 8))
    selection = space.select({"parameters": 300})
    found = lines(pareto(selection))
    assert found["chosen"].tolist() == [[selection.best.prices["parameters"], selection.best.quality]]
    assert set(found["budget"][:, 0]) == {300}
    front = [[one.prices["parameters"], one.quality] for one in selection.front]
    np.testing.assert_allclose(found[f"front ({len(front)})"], front)


def test_pareto_of_a_search(tmp_path):
    """The loss shall be small: the front falls with the seconds."""
    study = graphopt.explore(
        None, search_trial, hyper_parameters={"x": linear(0, 1)}, minimize=("loss", "seconds"), trials=8,
        progress=False, on="inline", store=tmp_path / "s.db", seed=0,
    )  # fmt: skip
    found = lines(pareto(study))
    best = {(t.metrics["seconds"], t.metrics["loss"]) for t in study.pareto()}
    (name,) = [name for name in found if name.startswith("front (")]
    assert {tuple(row) for row in found[name]} == best
    assert np.all(np.diff(found[name][:, 1]) < 0)
    with pytest.raises(GraphoptError, match="no trial of this study has both"):
        pareto(study, cost="flops")


def search_trial(net, hyper_parameters, context):
    x = hyper_parameters["x"]
    return {"loss": (x - 0.7) ** 2, "seconds": 1 + x}


def test_pareto_of_nothing_says_so():
    with pytest.raises(GraphoptError, match="no candidates"):
        pareto([])
    with pytest.raises(GraphoptError, match="no price 'speed'"):
        pareto(candidates([(1.0, 1.0)]), cost="speed")
