"""What dividing the batch puts into a graph, and what it refuses: no process is started here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.cost_model.kernels import Family, kernels
from graphopt.errors import PassError
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes import DeadCode, NoOps, ShardAxes


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


class Of(nn.Module):
    """A layer and a function of what it gives."""

    def __init__(self, function: Any):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3).double(), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x))


def captured(function: Any, loss: Any = torch.sum, **options: Any) -> TrainingGraph:
    """A step of `Of` on seven rows; ``loss`` of its output alone."""
    return graphopt.capture(
        Of(function), (rows(7, 4), rows(7, 3)), loss=lambda o, t: loss(o) + (o * 0).sum(), **options
    )


def collectives(graph: TrainingGraph, phase: str | None = None) -> list[str]:
    """The module path of each all-reduce."""
    found = [n for n in graph.nodes if "all_reduce" in str(n.target)]
    return [n.meta["module"] for n in found if phase is None or n.meta["phase"] == phase]


def sharded(graph: TrainingGraph, **options: Any) -> TrainingGraph:
    result = ShardAxes(2, **options)(graph)
    assert not result.refusals, result.refusals
    return result.graph


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def test_one_collective_a_gradient_and_two_a_batch_norm_and_two_a_loss() -> None:
    graph = graphopt.capture(net(), (rows(7, 2, 6, 6), torch.randint(3, (7,))), loss=F.cross_entropy)
    divided = sharded(graph)
    assert Counter(collectives(divided, "forward")) == {"1": 2, "": 2}
    assert Counter(collectives(divided, "backward")) == {"0": 2, "1": 2, "4": 2}
    local = sharded(graph, batch_norm="local")
    assert Counter(collectives(local, "forward")) == {"": 2}
    assert Counter(collectives(local, "backward")) == {"0": 2, "1": 2, "4": 2}


def test_a_collective_stands_right_behind_the_node_that_gives_its_operand() -> None:
    divided = sharded(graphopt.capture(net(), (rows(7, 2, 6, 6), torch.randint(3, (7,))), loss=F.cross_entropy))
    for node in divided.nodes:
        if "all_reduce" in str(node.target):
            assert node.prev is node.args[0] and node.next.target is torch.ops._c10d_functional.wait_tensor.default
            assert list(node.users) == [node.next]
            assert list(node.args[0].users) == [node], "the partial value is read besides"


def test_tied_weights_are_added_before_they_are_reduced() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.tanh(self.a(x)))

    graph = graphopt.capture(Tied(), (rows(7, 4), rows(7, 4)), loss=F.mse_loss)
    assert len(collectives(sharded(graph), "backward")) == 1


def test_an_accumulated_gradient_is_added_to_what_is_reduced() -> None:
    graph = graphopt.capture(nn.Linear(4, 3).double(), (rows(7, 4), rows(7, 3)), loss=F.mse_loss, accumulate=2)
    divided = sharded(graph)
    assert len(collectives(divided)) == 3
    for node in divided.nodes:
        if "all_reduce" in str(node.target):
            assert not set(node.args[0].all_input_nodes) & set(divided.input_nodes(InputKind.GRADIENT).values())


def test_the_update_runs_on_whole_gradients() -> None:
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.AdamW(model.parameters())
    graph = graphopt.capture(model, (rows(7, 4), rows(7, 3)), loss=F.mse_loss, optimizer=optimizer, clip=1.0)
    divided = sharded(graph)
    assert len(collectives(divided)) == 3 and not collectives(divided, "update")
    assert divided.signature.owned == graph.signature.owned


def test_the_signature_says_how_inputs_and_outputs_lie() -> None:
    graph = graphopt.capture(nn.Linear(4, 3).double(), (rows(7, 4),), gradients="all")
    divided = sharded(graph)
    placed = divided.signature.tree["placements"]
    assert placed["inputs"] == {"0": "sharded 0", "output": "sharded 0"} or set(placed["inputs"].values()) == {
        "sharded 0"
    }
    words = dict(zip(map(str, divided.outputs), placed["outputs"]))
    assert {w for o, w in words.items() if o.startswith("output")} == {"sharded 0"}
    assert words["gradient weight"] == words["gradient bias"] == "replicated"
    assert words["gradient 0"] == "sharded 0"


def test_places_are_inputs_and_sizes() -> None:
    graph = graphopt.capture(
        nn.Sequential(nn.Linear(4, 3), nn.Dropout()).double(), (rows(7, 4), rows(7, 3)), loss=F.mse_loss
    )
    divided = sharded(graph)
    assert list(divided.input_nodes(InputKind.PLACE)) == ["batch.total", "batch.begin"]
    assert divided.inputs[: len(graph.inputs)] == graph.inputs
    assert divided.symbols.hints == {"batch": 7, "batch.total": 14}
    assert divided.flops({"batch": 3, "batch.total": 9}) == graph.flops({"batch": 3})


def test_other_passes_keep_the_collectives() -> None:
    divided = sharded(graphopt.capture(net(), (rows(7, 2, 6, 6), torch.randint(3, (7,))), loss=F.cross_entropy))
    assert collectives(DeadCode()(NoOps()(divided)).graph) == collectives(divided)


def test_a_collective_is_priced_once() -> None:
    divided = sharded(graphopt.capture(nn.Linear(4, 3).double(), (rows(7, 4), rows(7, 3)), loss=F.mse_loss))
    found = {n: list(kernels(n, 1)) for n in divided.nodes if "c10d" in str(n.target)}
    for node, (kernel,) in found.items():
        waits = "wait" in str(node.target)
        assert kernel.family is (Family.NONE if waits else Family.COMMUNICATION)
        assert waits == (kernel.bytes == 0)
    assert len(found) == 2 * len(collectives(divided)) == 6


def test_every_node_has_its_place_in_the_model() -> None:
    graph = graphopt.capture(net(), (rows(7, 2, 6, 6), torch.randint(3, (7,))), loss=F.cross_entropy)
    divided = sharded(graph)
    modules = {n.meta["module"] for n in graph.nodes if n.op == "call_function"}
    for node in divided.nodes:
        if node.op == "call_function":
            assert node.meta["phase"] in ("forward", "backward") and node.meta["module"] in modules
            assert node.meta["val"] is not None


def test_a_saved_graph_is_the_same(tmp_path: Any) -> None:
    divided = sharded(graphopt.capture(net(), (rows(7, 2, 6, 6), torch.randint(3, (7,))), loss=F.cross_entropy))
    divided.save(tmp_path / "graph.zip")
    loaded = TrainingGraph.load(tmp_path / "graph.zip")
    assert loaded.hash() == divided.hash() and loaded.signature.tree == divided.signature.tree
    assert loaded.symbols.hints == divided.symbols.hints


REFUSED = {
    "softmax": (lambda o: F.softmax(o, 0), "depends on all rows"),
    "pairs": (lambda o: o @ o.t(), "every pair of rows"),
    "cumsum": (lambda o: o.cumsum(0), "in order"),
    "flip": (lambda o: o.flip(0) + o, "moves positions"),
    "roll": (lambda o: o.roll(1, 0) * o, "moves positions"),
    "first": (lambda o: o[0], "split"),
    "sort": (lambda o: o.sort(0).values, "in order"),
    "median": (lambda o: o.median(0).values, "positions"),
    "drawn": (lambda o: o * torch.bernoulli(torch.sigmoid(o)), "random"),
    "logsumexp": (lambda o: o.logsumexp(0), "logsumexp"),
    "norm": (lambda o: o / o.norm(dim=0), "norm"),
    "own cat": (lambda o: torch.cat([o, o.new_ones(2, 3)]) * 2, "more than rows"),
    "permutation": (lambda o: o[torch.randperm(o.shape[0])], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_do_is_refused(name: str) -> None:
    function, why = REFUSED[name]
    graph = captured(function)
    result = ShardAxes(2)(graph)
    assert result.graph is graph and not result.changed
    (refusal,) = result.refusals
    assert why in refusal.why, refusal.why


def test_attention_with_dropout_inside_is_refused() -> None:
    def attend(o: torch.Tensor) -> torch.Tensor:
        heads = o[:, None, :, None].expand(-1, 2, -1, 4)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads, 0.5)[0]

    result = ShardAxes(2)(captured(attend))
    assert "draws" in result.refusals[0].why


def test_a_batch_of_fixed_size_is_refused() -> None:
    graph = graphopt.capture(nn.Linear(4, 3).double(), (rows(1, 4), rows(1, 3)), loss=F.mse_loss)
    (refusal,) = ShardAxes(2)(graph).refusals
    assert refusal.why == "its size is fixed at 1"


def test_a_divided_graph_is_not_divided_again() -> None:
    divided = sharded(captured(torch.tanh))
    result = ShardAxes(2)(divided)
    assert result.graph is divided and "already" in result.refusals[0].why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processors": 1}, "processors: expected an int of at least 2, got 1"),
        ({"processors": 2, "axis": "hidden"}, "axis: only 'batch'"),
        ({"processors": 2, "batch_norm": "global"}, "batch_norm: expected 'synchronized' or 'local', got 'global'"),
    ],
)
def test_options_that_mean_nothing(options: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        ShardAxes(**options)
