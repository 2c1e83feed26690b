"""A trace adds up to the price it is made of, in the order of the schedule, and in Chrome's format."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import graphopt
from graphopt.cost_model import Link, Machine, estimate
from graphopt.errors import CostModelError, GraphoptError
from graphopt.passes import BucketGradients, ShardAxes
from graphopt.visualize import timeline
from graphopt.visualize.timeline import COMMUNICATION, COMPUTATION
from tests.cost_model.machines import simple
from tests.visualize.steps import head_only


@pytest.fixture(scope="module")
def divided():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    batch = torch.randn(8, 32), torch.randint(4, (8,))
    graph = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy)
    return BucketGradients()(ShardAxes(processors=2)(graph)).graph


def complete(trace: dict) -> dict[tuple[int, int], list[dict]]:
    """The events of each processor and thread in order of time; they must not overlap."""
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    for events in found.values():
        events.sort(key=lambda e: e["ts"])
        for a, b in zip(events, events[1:]):  # noqa: RUF007
            assert a["ts"] + a["dur"] <= b["ts"] * (1 + 1e-9) + 1e-6
    return found


def assert_adds_up(trace: dict, price) -> None:
    """All computation lies side by side and ends at the seconds of the estimate."""
    for (_, thread), events in complete(trace).items():
        if thread == COMPUTATION:
            assert events[0]["ts"] == pytest.approx(0)
            assert sum(e["dur"] for e in events) == pytest.approx(price.seconds * 1e6)
            assert events[-1]["ts"] + events[-1]["dur"] == pytest.approx(price.seconds * 1e6)


@pytest.mark.parametrize("machine", [simple(touch=1e-10, largest=64), Machine.named("H100")], ids=["cpu", "gpu"])
@pytest.mark.parametrize("mode", ["flat", "eager", "compiled"])
def test_one_processor_adds_up_to_its_price(machine, mode, tmp_path):
    graph = head_only().graph
    trace = timeline(graph, tmp_path / "trace.json", machine=machine, sizes={"batch": 64}, mode=mode)
    assert_adds_up(trace, estimate(graph, machine, {"batch": 64}, mode=mode))
    assert json.loads((tmp_path / "trace.json").read_text()) == trace
    assert {e["pid"] for e in trace["traceEvents"]} == {0}


@pytest.mark.parametrize("busy", [0.0, 0.5])
@pytest.mark.parametrize("bandwidth", [1e6, 1e9])
def test_communication_runs_beside_computation(divided, bandwidth, busy):
    machine = simple(link=Link(1e-6, bandwidth, busy=busy))
    trace = timeline(divided, machine=machine)
    price = estimate(divided, machine, processors=2)
    assert_adds_up(trace, price)
    found = complete(trace)
    assert set(found) == {(p, t) for p in (0, 1) for t in (COMPUTATION, COMMUNICATION)}
    sent = found[0, COMMUNICATION]
    assert len(sent) == len(price.work.transfers) > 0
    for event, transfer in zip(sorted(sent, key=lambda e: e["ts"]), price.work.transfers):
        nbytes = event["args"]["bytes"]
        assert event["dur"] == pytest.approx(machine.link.seconds(transfer.collective, nbytes, 2) * 1e6)
    waits = [e for e in found[0, COMPUTATION] if e["name"] == "wait for communication"]
    ends = [pytest.approx(e["ts"] + e["dur"]) for e in sent]
    assert waits and all(w["ts"] + w["dur"] in ends for w in waits)  # a wait ends with a collective


def test_events_say_what_they_are():
    graph = head_only().graph
    price = estimate(graph, simple())
    events = {e["args"].get("node"): e for e in timeline(graph, machine=simple())["traceEvents"] if e["ph"] == "X"}
    head = next(n for n in price.work.nodes if n.meta.get("module") == "3" and "addmm" in n.name)
    about = events[head.name]["args"]
    assert about["module"] == "3" and about["family"] == "gemm" and about["type"] == "f32[batch, 4]"
    assert about["flops"] == 2 * 8 * 16 * 4


def test_what_makes_no_trace(divided):
    with pytest.raises(GraphoptError, match="3 graphs for 2 processors"):
        timeline([divided] * 3, machine=simple(), processors=2)
    with pytest.raises(GraphoptError, match="expected a TrainingGraph"):
        timeline([], machine=simple())
    with pytest.raises(CostModelError, match="no link"):
        timeline(divided, machine=replace(simple(), link=None))
