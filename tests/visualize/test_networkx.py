"""A graph in networkx, GraphML and DOT: everything is there, and it re-reads."""

import json
import shutil
import subprocess

import networkx
import pytest
import torch

import graphopt
from graphopt.cost_model import estimate
from graphopt.passes import ShardAxes
from tests.cost_model.machines import simple
from tests.visualize.steps import head_only


def test_every_node_and_operand_is_there():
    graph = head_only().graph
    found = graph.to_networkx()
    nodes = [node for node in graph.nodes if node.op != "output"]
    assert list(found.nodes) == [node.name for node in nodes]
    for node in nodes:
        operands = []
        torch.fx.map_arg((node.args, node.kwargs), operands.append)
        read = sorted((about["operand"], source) for source, _, about in found.in_edges(node.name, data=True))
        assert read == list(enumerate(n.name for n in operands))
    assert networkx.is_directed_acyclic_graph(found)


def test_attributes_agree_with_the_graph():
    graph = head_only().graph
    price = estimate(graph, simple(), {"batch": 32})
    attributes = dict(graph.to_networkx(price).nodes(data=True))
    assert sum(a.get("flops", 0) for a in attributes.values()) == graph.flops({"batch": 32}) == price.flops
    assert sum(a.get("bytes", 0) for a in attributes.values()) == price.bytes_moved
    assert sum(a.get("seconds", 0) for a in attributes.values()) == pytest.approx(price.node_seconds.sum())
    head = next(a for a in attributes.values() if a["op"] == "aten.addmm" and a["module"] == "3")
    assert head["type"] == "f32[batch, 4]" and head["axes"] == "batch, classes" and head["phase"] == "forward"
    assert {a.get("input") for a in attributes.values()} >= {"parameter 3.weight", "batch 0"}
    assert "new parameter 3.weight" in {a.get("output") for a in attributes.values()}


def test_price_of_another_graph_is_refused():
    result = head_only()
    price = estimate(result.before, simple())
    with pytest.raises(ValueError, match="another graph"):
        result.graph.to_networkx(price)


def test_graphml_reads_again(tmp_path):
    graph = head_only().graph
    graph.write_graphml(tmp_path / "step.graphml", estimate(graph, simple()))
    found, expected = networkx.read_graphml(tmp_path / "step.graphml"), graph.to_networkx(estimate(graph, simple()))
    assert set(found.nodes) == set(expected.nodes) and found.number_of_edges() == expected.number_of_edges()
    for name, attributes in expected.nodes(data=True):
        assert found.nodes[name] == attributes


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz (dot) to read the file")
def test_dot_reads_again(tmp_path):
    graph = head_only().graph
    graph.write_dot(tmp_path / "step.dot")
    run = subprocess.run(["dot", "-Tdot_json", tmp_path / "step.dot"], capture_output=True, text=True, check=True)
    read = json.loads(run.stdout)
    expected = graph.to_networkx()
    nodes = {one["name"]: one for one in read["objects"] if "op" in one}
    assert set(nodes) == set(expected.nodes) and len(read["edges"]) == expected.number_of_edges()
    for name, attributes in expected.nodes(data=True):
        assert {key: nodes[name].get(key, "") for key in attributes} == {
            key: str(value) for key, value in attributes.items()
        }
    assert {one["label"] for one in read["objects"] if one["name"].startswith("cluster")} >= {"3", "1.inner"}


def test_names_with_quotes_stay_whole():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module('a"b\\', torch.nn.Linear(2, 2))

        def forward(self, x):
            return getattr(self, 'a"b\\')(x)

    graph = graphopt.capture(Odd(), (torch.randn(3, 2),))
    from graphopt.graph.networkx_export import dot_text

    assert 'module="a\\"b\\\\"' in dot_text(graph)


def test_placements_of_a_divided_graph():
    net = torch.nn.Linear(3, 2)
    graph = graphopt.capture(net, (torch.randn(4, 3), torch.randn(4, 2)), loss=torch.nn.functional.mse_loss)
    found = ShardAxes(processors=2)(graph).graph.to_networkx()
    placements = {name: about.get("placement") for name, about in found.nodes(data=True)}
    by_input = {about["input"]: about["placement"] for _, about in found.nodes(data=True) if "input" in about}
    assert by_input["batch 0"] == "sharded 0" and by_input["parameter weight"] == "replicated"
    assert "partial sum" in placements.values()
    assert "_c10d_functional.all_reduce" in {about["op"] for _, about in found.nodes(data=True)}
