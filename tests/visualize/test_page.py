"""The data of a page is the graph's, and the file needs nothing else."""

import json
import re
from collections import defaultdict
from html import escape

import pytest
import torch

import graphopt
from graphopt.cost_model import estimate
from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import InputKind
from graphopt.passes import ShardAxes
from graphopt.plan import Candidate, Plan
from graphopt.visualize.page import Page, asset
from tests.cost_model.machines import simple
from tests.helpers import traced
from tests.visualize.steps import head_only, large, model


def read(html: str) -> dict:
    """The data in a page."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def page() -> Page:
    return graphopt.show(head_only(), machine=simple(), sizes={"batch": 16}, title="head only")


def test_sums_are_those_of_both_graphs(page):
    result, data = head_only(), page.data
    price = {
        "after": estimate(result.graph, simple(), {"batch": 16}),
        "before": estimate(result.before, simple(), {"batch": 16}),
    }
    for side, graph, gone in (("after", result.graph, "removed"), ("before", result.before, "added")):
        ops = [op for op in data["ops"] if op.get("st") != gone]
        facts = data["facts"][side]
        if side == "after":  # where an operator changed, its figures are those after
            assert sum(op.get("f", 0) for op in ops) == graph.flops({"batch": 16}) == facts["flops"]
            assert sum(op.get("s", 0) for op in ops) == pytest.approx(price[side].node_seconds.sum())
        assert facts["operators"] == len(graph) and facts["flops"] == graph.flops({"batch": 16})
        assert facts["seconds"] == price[side].seconds and facts["peak bytes"] == price[side].peak_bytes
        flag = 2 if side == "after" else 1
        saved = [row for row in data["saved"] if row["sides"] & flag]
        assert sum(row["bytes"] for row in saved) == graph.bytes_kept({"batch": 16}) == facts["bytes kept"]


def test_every_result_of_an_operator_that_is_kept_is_counted():
    """Batch norm keeps its mean and its inverse deviation beside its output: three storages of one operator."""
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Tanh(), torch.nn.Flatten())
    graph = graphopt.capture(net, (torch.randn(4, 2, 5, 5), torch.randn(4, 27)), loss=torch.nn.functional.mse_loss)
    data = graphopt.show(graph).data
    makers = [row["op"] for row in data["saved"]]
    assert len(makers) > len(set(makers))
    assert sum(row["bytes"] for row in data["saved"]) == graph.bytes_kept() == data["facts"]["after"]["bytes kept"]


def test_every_node_is_found_by_name(page):
    result = head_only()
    names = {name for op in page.data["ops"] for name in (op["n"], *op.get("also", []))}
    for graph in (result.before, result.graph):
        assert {node.name for node in graph.nodes if node.op != "output"} <= names


def test_operators_say_where_they_are_from(page):
    ops = {op["n"]: op for op in page.data["ops"]}
    head = next(op for op in ops.values() if op["o"] == "addmm" and op.get("m") == "3")
    assert head["t"] == "f32[batch, classes=4]" and head["c"] == 0
    assert any(op.get("src", "").endswith(f"steps.py:{line}") for op in ops.values() for line in range(20, 40))
    removed = [op for op in ops.values() if op.get("st") == "removed"]
    assert removed and all(op["why"][0] in ("gradient_liveness", "no_ops", "common_subexpressions", "constant_folding",
                                            "selective_saving", "dead_code") for op in removed)  # fmt: skip
    for op in removed:
        if op["why"][1] is not None:
            assert page.data["changes"][op["why"][1]]["pass"] == op["why"][0]
    assert any("new parameter 3.weight" in op.get("out", []) for op in ops.values())


def test_axes_list_who_carries_them(page):
    graph, data = head_only().graph, page.data
    carriers = defaultdict(set)
    for node in graph.nodes:
        if node.op != "output" and "val" in node.meta:
            flat = list(graph.axes.of(node))
            while flat:
                dim = flat.pop()
                if isinstance(dim, tuple):
                    flat += dim
                else:
                    for axis in dim.axes():
                        carriers[axis.name].add(node.name)
    for k, axis in enumerate(data["axes"]):
        shown = {name for op in data["ops"] if k in op.get("a", []) and op.get("st") != "removed"
                 for name in (op["n"], *op.get("also", []))}  # fmt: skip
        assert carriers[axis["name"]] <= shown, axis["name"]
    assert {"batch", "classes"} <= {axis["name"] for axis in data["axes"]}


def test_sums_of_gradients_and_updates_stand_in_their_modules(page):
    data = page.data

    def path(op):
        found, g = [], op["g"]
        while g >= 0:
            found.append(data["groups"][g])
            g = found[-1]["parent"]
        return found

    sums = [op for op in data["ops"] if op["c"] == 1 and op["o"] == "add.Tensor" and not op.get("m")]
    assert sums and {path(op)[0]["path"] for op in sums} <= {"1", "2"}
    updates = [op for op in data["ops"] if op["c"] == 2 and "new parameter 3.bias" in op.get("out", [])]
    assert updates and all(group["kind"] in ("update", "module") for group in path(updates[0]))
    assert path(updates[0])[-2]["kind"] == "update"


def test_page_asks_no_network_and_ends_no_script(page):
    html = page.html
    assert "{{" not in re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.findall(r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=""", html)
    assert "default-src 'none'" in html and "url(" not in html.split("<script", 1)[0]
    assert read(html) == json.loads(json.dumps(page.data))


def test_odd_names_stay_data():
    bad = "</script><script>alert(1)</script>{{scripts}}{{data}}{{style}}"

    def step(step, x):
        return torch.ops.aten.exp.default(x)

    graph = traced(step, (2,), kinds=[InputKind.BATCH])
    next(n for n in graph.nodes if n.op == "call_function").meta |= {"module": bad, "source": bad}
    html = graphopt.show(graph, title=bad).html
    assert bad not in html.replace("{{scripts}}", "", 0).split("<script", 1)[0]
    assert [op.get("src") for op in read(html)["ops"]] == [None, bad]
    assert f"<title>{escape(bad)}</title>" in html
    assert html.count(asset("main.js")) == html.count(asset("page.css")) == 1


def test_notebooks_get_a_frame(page):
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and "<html" not in frame and "allow-scripts" in frame


def test_without_a_machine_there_are_no_seconds():
    data = graphopt.show(head_only().graph).data
    assert not any("s" in op for op in data["ops"]) and "seconds" not in data["facts"]["after"]
    assert not data["compared"] and not any("st" in op for op in data["ops"])


def test_what_can_be_shown(tmp_path):
    result = head_only()
    pair = graphopt.show((result.before, result.graph)).data
    alone = result.graph.show(tmp_path / "graph.html", title="alone")
    assert read((tmp_path / "graph.html").read_text())["title"] == alone.data["title"] == "alone"
    assert [op["n"] for op in pair["ops"]] == [op["n"] for op in graphopt.show(result).data["ops"]]
    plan = Plan(16, [Candidate("flat"), Candidate("eager", "it may not")], "flat", "a test", passes=result)
    data = plan.show().data
    assert data["plan"]["chosen"] == "flat" and data["sizes"] == {"batch": 16}
    with pytest.raises(GraphoptError, match=r"no graph to show: it has a hook"):
        Plan(16, [Candidate("eager", "it has a hook")], "eager", "").show()
    with pytest.raises(GraphoptError, match=r"expected a TrainingGraph.*got int"):
        graphopt.show(3)
    with pytest.raises(GraphoptError, match="unknown name"):
        graphopt.show(result, sizes={"rows": 3})


def test_a_training_step_shows_its_plan():
    net = model()
    step = graphopt.optimize(
        net,
        (8, 6),
        loss=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
        schemes="flat",
    )
    step(torch.randn(8, 6), torch.randint(4, (8,)))
    data = graphopt.show(step).data
    assert data["compared"] and data["plan"]["chosen"] == "flat" and data["facts"]["before"]["operators"] > 0


def test_divided_steps_show_collectives_and_placements():
    net = torch.nn.Linear(3, 2)
    graph = graphopt.capture(net, (torch.randn(4, 3), torch.randn(4, 2)), loss=torch.nn.functional.mse_loss)
    data = graphopt.show(ShardAxes(processors=2)(graph)).data
    collectives = [op for op in data["ops"] if op["k"] == "collective" and op["o"].endswith("all_reduce")]
    assert len(collectives) == 3 and all(op["st"] == "added" for op in collectives)
    assert data["placements"]["processors"] == 2
    assert {"sharded 0", "replicated", "partial sum"} <= {op.get("p") for op in data["ops"]}


def classifier(batch: int = 6, **options):
    """A step of a small network with all parameters trained by AdamW."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    capturing = {name: options.pop(name) for name in ("clip", "accumulate") if name in options}
    return graphopt.capture(
        net, (torch.randn(batch, 4), torch.randint(2, (batch,))), loss=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.AdamW(net.parameters(), **options), **capturing,
    )  # fmt: skip


@pytest.mark.parametrize("make", [
    lambda: classifier(fused=True, clip=1.0),
    lambda: classifier(foreach=True, accumulate=2),
    lambda: classifier(batch=1, foreach=False),
    lambda: graphopt.capture(torch.nn.Identity(), (torch.randn(3, 2),), backward=False),
    lambda: graphopt.capture(model(), (torch.randn(3, 6),)),
    lambda: graphopt.capture_forward(torch.nn.LSTM(4, 8, num_layers=2), (torch.randn(3, 5, 4),)),
], ids=["fused", "foreach", "batch of one", "no operators", "without a loss", "forward of an LSTM"])  # fmt: skip
def test_steps_of_every_kind(make):
    graph = make()
    data = graphopt.show(graph, machine=simple()).data
    names = {name for op in data["ops"] for name in (op["n"], *op.get("also", []))}
    assert names == {node.name for node in graph.nodes if node.op != "output"}
    assert sum(op.get("f", 0) for op in data["ops"]) == graph.flops()
    assert str(graph) and graph.to_networkx().number_of_nodes() == len(names)


def test_large_graphs_stay_small_enough():
    page = graphopt.show(large())
    assert len(page.data["ops"]) > 3000
    assert len(page.html) < 4 * 2**20
