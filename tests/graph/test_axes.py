"""`analyse`: what it gives, names, reasons, errors. What it finds in models is tested by structures and the zoo."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import TrainingGraph, capture
from graphopt.errors import AxisError
from graphopt.graph.axes import Axes, Kind, analyse
from graphopt.graph.forward import capture_forward
from graphopt.graph.training_graph import InputKind
from tests.helpers import traced

aten = torch.ops.aten
PARAMETER = InputKind.PARAMETER


class Layer(nn.Module):
    """A small transformer layer on tokens, with classes at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 12), nn.Parameter(torch.randn(7, 12))
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


BATCH = (torch.randint(11, (5, 7)), torch.randint(5, (5,)))


def layer() -> TrainingGraph:
    return capture(Layer(), BATCH, loss=F.cross_entropy)


def test_kinds_names_and_sizes() -> None:
    graph = layer()
    found = {g.name: (g.kind, str(g.size), g.free) for g in graph.axes.groups()}
    assert found == {
        "vocab": (Kind.VOCABULARY, "11", False),
        "embed": (Kind.EMBEDDING, "12", True),
        "seq": (Kind.SEQUENCE, "7", False),
        "qkv.heads": (Kind.HEADS, "3", True),
        "qkv.head_size": (Kind.HEAD_SIZE, "4", True),
        "up.hidden": (Kind.HIDDEN, "20", True),
        "classes": (Kind.CLASSES, "5", False),
        "batch": (Kind.BATCH, str(next(iter(graph.symbols.symbols.values()))), False),
    }


def test_places_of_a_group_are_all_its_carriers() -> None:
    places = set(layer().axes.group("embed").places)
    assert places == {
        ("table.weight", 1), ("positions", 1), ("norm.weight", 0), ("norm.bias", 0), ("qkv.weight", 1),
        ("out.weight", 0), ("out.bias", 0), ("up.weight", 1), ("down.weight", 0), ("down.bias", 0), ("head.weight", 1),
    }  # fmt: skip


def test_every_group_says_whether_it_may_be_changed_and_why_not() -> None:
    for group in layer().axes.groups():
        assert group.free != bool(group.reason)
        assert group.shardable or not group.free
    groups = {g.name: g for g in layer().axes.groups()}
    assert "targets name" in groups["classes"].reason and groups["classes"].shardable
    assert "data name" in groups["vocab"].reason
    assert not groups["seq"].shardable
    assert any("layer_norm" in what for what in groups["embed"].statistics)


def test_of_gives_dims_that_know_their_size() -> None:
    graph = layer()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert [str(d.size) for d in graph.axes.of(node)] == [str(s) for s in value.shape], node


def test_indices_of_a_product_move_whole_blocks() -> None:
    graph = layer()
    axes = graph.axes
    heads = next(g for g in axes.groups() if g.kind is Kind.HEADS)
    dim = axes.of(axes.carriers()["out.weight"])[1]
    assert dim.indices({heads: torch.tensor([2, 0])}).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert dim.count({heads: 2}) == 8
    fused = axes.of(axes.carriers()["qkv.weight"])[0]
    assert fused.indices({heads: torch.tensor([1])}).tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]


def test_text_and_file_carry_the_names(tmp_path: Path) -> None:
    graph = layer()
    assert "f32[batch, seq=7, up.hidden=20]" in str(graph)
    assert "up.hidden" not in graph.text()
    graph.save(tmp_path / "graph")
    assert str(TrainingGraph.load(tmp_path / "graph")) == str(graph)


def test_names_are_the_same_in_another_process_and_capture() -> None:
    program = textwrap.dedent("""
        from tests.graph.test_axes import layer
        print([(g.name, g.places) for g in layer().axes.groups()])
    """)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str([(g.name, g.places) for g in layer().axes.groups()])


def test_explain_tells_groups_and_what_is_fixed() -> None:
    text = layer().axes.explain()
    for word in ("embed", "up.hidden", "vocab", "classes that the targets name", "table.weight", "11x12", "free"):
        assert word in text


def test_batch_tensors_share_the_batch_and_equal_sizes_share_nothing() -> None:
    square = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    axes = analyse(capture(square, (torch.randn(5, 5), torch.randn(5, 5)), loss=F.mse_loss))
    batch = axes.group("batch")
    assert {p.name for p in batch.places} == {"0", "1"} and all(p.dim == 0 for p in batch.places)
    assert [(g.size, g.free, len(g.places)) for g in axes.groups() if g.free] == [(5, True, 3)]


@pytest.mark.parametrize("size", [1, 5])
def test_a_fixed_batch_is_the_batch_too(size: int) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(size, 4) * 2 if x.shape[0] == size else x

    graph = capture_forward(nn.Sequential(Fixed(), nn.Linear(4, 3)), (torch.randn(size, 4),))
    assert [g.kind for g in analyse(graph).groups() if g.name == "batch"] == ([Kind.BATCH] if size > 1 else [])


def test_two_groupings_without_common_factors_freeze_and_name_both() -> None:
    graph = traced(
        lambda step, x, w: (aten.view.default(aten.mm.default(x, w), [5, 2, 3]), aten.view.default(w, [4, 3, 2])),
        (5, 4), (4, 6), kinds=(InputKind.BATCH, PARAMETER),
    )  # fmt: skip
    reasons = [g.reason for g in analyse(graph).groups() if ("w", 1) in g.places]
    assert reasons and all("view_1 views" in r and "split so by view" in r for r in reasons)


def test_a_tensor_shifted_against_itself_keeps_its_order() -> None:
    def differences(step: object, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = aten.mm.default(x, w)
        later = aten.slice.Tensor(y, 1, 1, 9)
        return aten.sum.dim_IntList(aten.sub.Tensor(later, aten.slice.Tensor(y, 1, 0, 8)), [1])

    axes = analyse(traced(differences, (5, 4), (4, 9), kinds=(InputKind.BATCH, PARAMETER)))
    found = [g for g in axes.groups() if ("w", 1) in g.places]
    assert not axes.contradictions and found and all("shifted" in g.reason for g in found if g.size > 1)


@torch.library.custom_op("graphopt_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1) * 2


@mystery.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class WithUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(self.b(torch.ops.graphopt_tests.mystery(self.a(x)))))


def test_an_unknown_operator_freezes_what_it_touches_and_is_named() -> None:
    model = WithUnknown().requires_grad_(False)
    axes = analyse(capture_forward(model, torch.randn(5, 4)))
    assert [u.operator for u in axes.unknown] == ["graphopt_tests.mystery.default"] and len(axes.unknown[0].nodes) == 1
    by_place = {place: g for g in axes.groups() for place in g.places}
    for place in (("a.weight", 0), ("b.weight", 1)):
        assert not by_place[place].free and "mystery" in by_place[place].reason
    assert by_place["b.weight", 0].free
    assert "mystery" in axes.explain()
    with pytest.raises(AxisError, match="mystery"):
        analyse(capture_forward(model, torch.randn(5, 4)), strict=True)


def test_strict_raises_on_contradictions() -> None:
    def two(step: object, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a, b = aten.view.default(x, [5, 6]), aten.view.default(y, [5, 6])
        return aten.mm.default(aten.add.Tensor(a, b), w)

    # 2 x 3 meets 3 x 2, both of parameters
    graph = traced(two, (5, 2, 3), (5, 3, 2), (6, 4), kinds=(PARAMETER, PARAMETER, PARAMETER))
    axes = analyse(graph)
    assert len(axes.contradictions) == 1 and "no common factors" in axes.contradictions[0]
    assert all(g.reason for g in axes.groups() if g.size in (2, 3, 6))
    with pytest.raises(AxisError, match="no common factors"):
        analyse(graph, strict=True)


@pytest.mark.parametrize("bad", [None, nn.Linear(2, 2), "graph"])
def test_what_is_no_graph(bad: object) -> None:
    with pytest.raises(AxisError, match="expected a TrainingGraph"):
        analyse(bad)  # type: ignore[arg-type]


def test_a_graph_without_metadata() -> None:
    graph = traced(lambda step, x: aten.exp.default(x), (5, 4))
    next(n for n in graph.nodes if n.op == "call_function").meta.pop("val")
    with pytest.raises(AxisError, match="exp has no metadata"):
        analyse(graph)


def test_questions_about_what_is_not_there() -> None:
    axes: Axes = layer().axes
    with pytest.raises(AxisError, match="no axis 'width'; there are seq, embed, vocab"):
        axes.group("width")
    with pytest.raises(AxisError, match="no operator or input of this graph"):
        axes.of(layer().nodes[3])


def test_the_example_of_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "axes.md").read_text()
    code, output = page.split("```python\n")[1].split("```")[0], page.split("```\n")[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == output


@pytest.mark.parametrize(("index", "sizes"), [(-1, [5]), (0, [5]), (-2, [4]), (1, [4])])
def test_a_constant_index_sets_one_position_apart(index: int, sizes: list[int]) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) * y[:, [index]]

    axes = analyse(capture_forward(Picks(), torch.randn(5, 4)))
    assert [g.size for g in axes.groups() if g.free] == sizes
