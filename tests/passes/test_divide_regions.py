"""Graphs divided by regions: all processors together, in one process, against the graph as it was."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from textwrap import dedent
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graphopt.errors import PassError
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes import DivideRegions
from graphopt.passes._conversions import Conversions
from graphopt.passes._strategies import Strategies
from graphopt.passes.divide_regions import along
from tests.helpers import body
from tests.passes.lockstep import assert_equals_whole
from tests.passes.test_shard_axes import Residual, Transformer, captured, classes, rows, token_loss


class Images(nn.Module):
    """Convolutions, then fully connected layers with dropout: AlexNet, small."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(32, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 16), nn.ReLU(),
            nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Block(nn.Module):
    """A transformer block; ``groups`` heads of keys and values for four of queries."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups)
        self.out, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        h = self.first(x)
        q, k, v = (layer(h).view(b, t, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != 4)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, 16))
        return x + self.down(F.gelu(self.up(self.second(x))))


def words(n: int = 7) -> torch.Tensor:
    return torch.randint(11, (n, 6))


MODELS = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)), (rows(7, 5), classes()),
        F.cross_entropy,
    ),
    "images": lambda: (Images(), (rows(7, 3, 8, 8), classes()), F.cross_entropy),
    "block": lambda: (Block(), (rows(7, 6, 16), rows(7, 6, 16)), F.mse_loss),
    "grouped": lambda: (Block(2), (rows(7, 6, 16), rows(7, 6, 16)), F.mse_loss),
    "tied": lambda: (Transformer(), (words(), words()), token_loss),
    "residual": lambda: (Residual(), (rows(7, 3, 8, 8), classes()), F.cross_entropy),
}  # fmt: skip


@cache
def model(name: str) -> tuple[TrainingGraph, list[Any]]:
    torch.manual_seed(1)
    net, batch, loss = MODELS[name]()
    return captured(net, batch, loss)  # type: ignore[no-any-return]


@cache
def table(name: str, processors: int) -> Strategies:
    return Strategies(model(name)[0], processors)


def collectives(graph: TrainingGraph, phase: str = "") -> list[str]:
    """The names of the collectives, in order."""
    return [
        n.target._opname
        for n in graph.nodes
        if "c10d" in str(n.target) and "wait" not in str(n.target) and n.meta["phase"].startswith(phase)
    ]


def divide(name: str, processors: int, axes: Sequence[str]) -> TrainingGraph:
    """The model divided along as much as can be of these axes; it must equal the whole."""
    return assert_equals_whole(*model(name), processors, along(table(name, processors), axes))


def lies(graph: TrainingGraph) -> dict[str, str]:
    """How each output lies, by its name."""
    return dict(zip(map(str, graph.outputs), graph.signature.tree["placements"]["outputs"]))


def test_text_of_a_column_and_a_row_of_a_perceptron() -> None:
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    graph, values = captured(net, (rows(6, 5), rows(6, 4)), F.mse_loss)
    divided = assert_equals_whole(graph, values, 2, along(Strategies(graph, 2), ["0.hidden"]))
    assert body(divided) == dedent(
        """\
        %mul_1 = mul(%processor_index, 4)
        %add = add(%mul_1, 4)
        %sym_size_int = aten.sym_size.int(%batch_0, 0)
        %mul = mul(4, %sym_size_int)
        %slice_tensor = aten.slice.Tensor(%_0_weight, 0, %mul_1, %add)
        %t = aten.t(%slice_tensor)
        %mm = aten.mm(%batch_0, %t)
        %relu = aten.relu(%mm)
        %detach = aten.detach(%relu)
        %slice_tensor_1 = aten.slice.Tensor(%_2_weight, 1, %mul_1, %add)
        %t_1 = aten.t(%slice_tensor_1)
        %mm_1 = aten.mm(%relu, %t_1)
        %all_reduce_default = _c10d_functional.all_reduce(%mm_1, sum, graphopt)
        %wait_tensor_default = _c10d_functional.wait_tensor(%all_reduce_default)
        %mse_loss = aten.mse_loss(%wait_tensor_default, %batch_1, reduction=2)
        %div_scalar = aten.div.Scalar(%mse_loss, %mul)
        %full_default = aten.full([], 1.0, dtype=float64, device=cpu)
        %div_scalar_1 = aten.div.Scalar(%full_default, %mul)
        %mse_loss_backward = aten.mse_loss_backward(%div_scalar_1, %wait_tensor_default, %batch_1, 2)
        %t_2 = aten.t(%mse_loss_backward)
        %mm_2 = aten.mm(%t_2, %relu)
        %t_3 = aten.t(%mm_2)
        %t_4 = aten.t(%t_1)
        %mm_3 = aten.mm(%mse_loss_backward, %t_4)
        %t_5 = aten.t(%t_3)
        %detach_1 = aten.detach(%detach)
        %threshold_backward = aten.threshold_backward(%mm_3, %detach_1, 0)
        %t_6 = aten.t(%threshold_backward)
        %mm_4 = aten.mm(%t_6, %batch_0)
        %t_7 = aten.t(%mm_4)
        %t_8 = aten.t(%t_7)
        return %div_scalar, %t_8, %t_5"""
    )
    assert collectives(divided) == ["all_reduce"]


def test_the_hidden_axis_of_a_perceptron() -> None:
    divided = divide("perceptron", 4, ["0.hidden"])
    assert collectives(divided) == ["all_reduce"]
    assert lies(divided) == {
        "loss loss": "replicated", "gradient 0.weight": "sharded 0", "gradient 0.bias": "sharded 0",
        "gradient 3.weight": "sharded 1", "gradient 3.bias": "replicated",
    }  # fmt: skip
    assert list(divided.input_nodes(InputKind.PLACE)) == ["processor.index"]
    assert divided.symbols.hints == {"batch": 7}


def test_batch_for_convolutions_and_hidden_axes_for_what_is_fully_connected() -> None:
    """One weird trick (Krizhevsky 2014): the features of all rows are gathered, and their gradients handed back."""
    found = along(table("images", 2), ["classifier.1.hidden", "classifier.4.hidden", "batch"])
    whole = {n.name for n in table("images", 2).graph.nodes if n.meta.get("module", "").startswith("classifier")}
    regimes = {name: regime for name, regime in found.items() if regime != "batch" or name not in whole}
    divided = assert_equals_whole(*model("images"), 2, regimes)
    names = collectives(divided)
    assert names.count("all_gather_into_tensor") >= 1 and "all_reduce" in names
    words = lies(divided)
    assert words["gradient features.0.weight"] == "partial sum"
    assert words["gradient classifier.1.weight"] == "sharded 0"
    assert list(divided.input_nodes(InputKind.BATCH)) == ["0", "1"]
    assert divided.signature.tree["placements"]["inputs"]["0"] == "sharded 0"


@pytest.mark.parametrize("name", ["block", "grouped"])
def test_heads_and_hidden_axes_of_a_transformer_block(name: str) -> None:
    """Megatron's split (Shoeybi et al. 2019): two all-reduces forward and as many backward."""
    axes = ["q.heads", "up.hidden"]
    divided = divide(name, 2, axes)
    assert collectives(divided, "forward") == ["all_reduce"] * 2
    assert collectives(divided, "backward") == ["all_reduce"]  # the other's readers are linear: weights of the norm
    assert lies(divided)["gradient k.weight"] == "sharded 0" and lies(divided)["gradient out.weight"] == "sharded 1"
    assert len(collectives(divide(name, 2, [*axes, "batch"]))) > 3


@pytest.mark.parametrize("processors", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_axis_at_a_time_and_all_together(name: str, processors: int) -> None:
    axes = table(name, processors).axes
    divide(name, processors, axes if processors == 2 else axes[::-1])
    if processors == 2:
        for axis in axes:
            divide(name, processors, [axis])


def test_batch_norm_along_channels_stays_one_operator_and_along_the_batch_is_made_of_sums() -> None:
    channels = divide("residual", 2, ["stem.channel"])
    assert any("batch_norm_legit_functional" in str(n.target) for n in channels.nodes)
    assert lies(channels)["new buffer norm.running_mean"] == "sharded 0"
    batch = divide("residual", 2, ["batch"])
    assert not any("batch_norm_legit_functional" in str(n.target) for n in batch.nodes)
    strategy = next(
        s
        for n in table("residual", 2).graph.nodes
        if "batch_norm_legit_functional" in str(n.target)
        for s in table("residual", 2).of(n)
        if s.regime == "batch"
    )
    assert strategy.inner == (64, 64)


def test_a_piece_that_is_not_one_run_of_indices() -> None:
    """Heads of a fused projection: 3 x heads x size."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    graph, values = captured(Fused(), (rows(5, 6, 8), rows(5, 6, 8)), F.mse_loss)
    divided = assert_equals_whole(graph, values, 2, along(Strategies(graph, 2), ["qkv.heads"]))
    assert lies(divided)["gradient qkv.weight"] == "sharded 0 as 3x2"


def test_a_conversion_is_made_once_for_all_readers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.first(x))
            return self.second(h.exp()) + self.second(h.sin())

    graph, values = captured(Twice(), (rows(6, 4), classes(6)))
    divided = assert_equals_whole(graph, values, 2, {"tanh": "first.hidden", "addmm": "first.hidden"})
    assert collectives(divided) == ["all_gather_into_tensor"]


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from([2, 4]), st.integers(0, 2**20))
def test_any_regimes_of_the_table_give_the_whole(name: str, processors: int, seed: int) -> None:
    draw = random.Random(seed)
    often = draw.random()
    found, regimes = table(name, processors), {}
    for node in found.graph.nodes:
        strategies = found.of(node) if node.op == "call_function" else ()
        if len(strategies) > 1 and draw.random() < often:
            regimes[node.name] = draw.choice(strategies).regime
    if any(regimes.values()):
        assert_equals_whole(*model(name), processors, regimes)


def _never(what: str) -> Any:
    """`Conversions.convert` that leaves one kind of conversion out."""
    known = Conversions._converted

    def converted(self: Conversions, value: Any, lies: Any, wanted: Any, reader: Any) -> Any:
        kind = f"{type(lies.placement).__name__} {type(wanted.placement).__name__}"
        return value if kind == what else known(self, value, lies, wanted, reader)

    return converted


LEFT_OUT = {
    "Partial Replicated": ["addmm_1"],
    "Replicated Partial": ["addmm_1"],
    "Replicated Sharded": ["addmm"],
    "Sharded Replicated": ["addmm"],
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_conversion_left_out_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    regimes = dict.fromkeys(LEFT_OUT[what], "0.hidden")
    assert_equals_whole(*model("perceptron"), 2, regimes)
    monkeypatch.setattr(Conversions, "_converted", _never(what))
    with pytest.raises((AssertionError, RuntimeError)):
        assert_equals_whole(*model("perceptron"), 2, regimes)


def refusal(graph: TrainingGraph, regimes: dict[str, Any], processors: int = 2) -> str:
    """Why the graph is not divided; it must be the same object then."""
    result = DivideRegions(processors, regimes)(graph)
    assert result.graph is graph and not result.changes
    return result.refusals[0].why


def test_what_is_refused() -> None:
    graph, _ = model("perceptron")
    assert "there is no node nothing" in refusal(graph, {"nothing": "batch"})
    assert "no axis 'width'" in refusal(graph, {"addmm": "width"})
    assert "is to stay whole" in refusal(graph, {"addmm": None})
    assert "3 processors do not divide its size 8" in refusal(graph, {"addmm": "0.hidden"}, 3)
    assert "depends on all" in refusal(graph, {"_log_softmax": "classes"}, 3)
    assert "not linear" in refusal(graph, {"relu": "sums of self"})
    divided = DivideRegions(2, {"addmm": "0.hidden"})(graph).graph
    assert "divided already" in refusal(divided, {"addmm": "0.hidden"})
    with pytest.raises(PassError, match="processors: expected an int of at least 2, got 1"):
        DivideRegions(1, {})


def test_a_saved_graph_is_the_same(tmp_path: Any) -> None:
    divided = divide("images", 2, table("images", 2).axes)
    divided.save(tmp_path / "graph.zip")
    loaded = TrainingGraph.load(tmp_path / "graph.zip")
    assert loaded.hash() == divided.hash() and loaded.signature.tree == divided.signature.tree


def test_every_node_has_its_place_in_the_model() -> None:
    for node in divide("images", 2, table("images", 2).axes).nodes:
        if node.op == "call_function":
            assert node.meta["phase"] in ("forward", "backward") and "val" in node.meta


def test_a_batch_of_fixed_size_can_be_divided_along_other_axes() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    graph, values = captured(net, (rows(1, 4), classes(1)))
    found = Strategies(graph, 2)
    assert found.axes == ("0.hidden", "input")
    assert_equals_whole(graph, values, 2, along(found, found.axes))
