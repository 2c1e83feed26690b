"""The table of strategies: which regimes operators have, how operands and results then lie, why others have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.passes import Strategies
from graphopt.passes._placement import Partial, Replicated, Sharded
from graphopt.passes._strategies import is_sums
from tests.passes.test_shard_axes import captured, classes, rows


def table(net: nn.Module, batch: Any, loss: Any = F.cross_entropy, processors: int = 2, **options: Any) -> Strategies:
    return Strategies(captured(net, batch, loss)[0], processors, **options)


def node_of(found: Strategies, name: str) -> fx.Node:
    return next(n for n in found.graph.nodes if n.name == name)


def text(found: Strategies, name: str) -> list[str]:
    """The strategies of a node but the whole one, a line each: ``0.hidden: bias sharded 0, x replicated -> sharded 1``,
    with operands in order."""
    lines = []
    whole, *others = found.of(node_of(found, name))
    assert whole.regime is None and set(whole.operands.values()) <= {Replicated()}
    for strategy in others:
        operands = ", ".join(f"{n.name} {p}" for n, p in strategy.operands.items())
        results = strategy.results if isinstance(strategy.results, tuple) else (strategy.results,)
        lines.append(f"{strategy.regime}: {operands} -> {', '.join(map(str, results))}")
    return lines


def test_a_perceptron() -> None:
    found = table(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (rows(7, 5), classes()))
    assert found.axes == ("0.hidden", "batch")
    assert found.refused == {
        "input": "2 processors do not divide its size 5", "classes": "2 processors do not divide its size 3"
    }  # fmt: skip
    assert text(found, "addmm") == [
        "0.hidden: _0_bias sharded 0, batch_0 replicated, t sharded 1 -> sharded 1",
        "batch: _0_bias replicated, batch_0 sharded 0, t replicated -> sharded 0",
    ]
    assert text(found, "addmm_1") == [
        "0.hidden: _2_bias partial sum, relu sharded 1, t_1 sharded 0 -> partial sum",
        "batch: _2_bias replicated, relu sharded 0, t_1 replicated -> sharded 0",
    ]
    assert text(found, "nll_loss_forward") == [
        "batch: _log_softmax sharded 0, batch_1 sharded 0 -> partial sum, partial sum"
    ]
    assert text(found, "mm_1") == [
        "0.hidden: t_3 replicated, relu sharded 1 -> sharded 1",
        "batch: t_3 sharded 1, relu sharded 0 -> partial sum",
    ]


def test_what_is_drawn_and_positions_are_whole() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.layer(x), 0.5) * torch.arange(x.shape[0])[:, None]

    found = table(Places(), (rows(7, 4), torch.randint(8, (7,))))
    drawn = [n for n in found.graph.nodes if "native_dropout.default" in str(n.target) or "arange" in str(n.target)]
    assert len(drawn) == 2 and all(len(found.of(n)) == 1 for n in drawn)
    assert all("positions in the whole" in found.why_not(n, "batch") for n in drawn)


def test_what_is_not_linear_in_summands() -> None:
    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = out.sum(0)
        return (total * total).sum() + (total + 5).sum() + (total * target.sum(0)).sum() + (-total).exp().sum()

    found = table(nn.Linear(4, 8), (rows(6, 4), rows(6, 8)), loss)
    products = [n for n in found.graph.nodes if n.target is torch.ops.aten.mul.Tensor and n.meta["phase"] == "forward"]
    square, other = ([s.regime for s in found.of(n) if is_sums(s.regime)] for n in products)
    assert square == [] and other == ["sums of self", "sums of other"]
    forward = {n.target: n for n in reversed(found.graph.nodes) if n.op == "call_function"}
    plus = next(n for n in found.graph.nodes if n.target is torch.ops.aten.add.Tensor and 5 in n.args)
    assert not any(is_sums(s.regime) for n in (plus, forward[torch.ops.aten.exp.default]) for s in found.of(n))
    assert any(is_sums(s.regime) for s in found.of(forward[torch.ops.aten.neg.default]))


def test_normalised_axes_are_not_divided_by_the_norm() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = table(net, (rows(6, 4), classes(6)))
    norm = next(n for n in found.graph.nodes if "native_layer_norm.default" in str(n.target))
    assert [s.regime for s in found.of(norm)] == [None, "batch"]
    assert "depends on all rows" in found.why_not(norm, "0.hidden")
    with pytest.raises(PassError, match="each row of its result"):
        found.in_regime(norm, "0.hidden")


def test_a_gradient_that_does_not_depend_on_what_is_divided_is_whole() -> None:
    """Along input channels the gradient of a convolution's bias is that of the whole."""
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 3))
    found = table(net, (rows(5, 2, 2, 2), classes(5)))
    backward = next(n for n in found.graph.nodes if "convolution_backward" in str(n.target))
    strategy = found.in_regime(backward, "0.channel")
    assert strategy.results == (Sharded(1), Sharded(1), Replicated())
    assert found.in_regime(backward, "batch").results == (Sharded(0), Partial(), Partial())


def test_axes_that_are_asked_for() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert table(net, (rows(6, 4), classes(6)), axes=["0.hidden"]).axes == ("0.hidden",)
    assert table(net, (rows(6, 4), classes(6)), processors=3).refused["0.hidden"].startswith("3 processors")
    with pytest.raises(PassError, match="no axis 'width'; there are "):
        table(net, (rows(6, 4), classes(6)), axes=["width"])


def test_a_graph_whose_batch_is_split_has_other_axes() -> None:
    """Each row is learned from the one before: pieces of the batch are no axes to divide."""

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out[: out.shape[0] - 2], target[2:])

    found = table(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (rows(6, 4), classes(6)), loss)
    assert found.axes == ("0.hidden", "input")
    assert found.refused["batch"].startswith("the batch is split at slice")
