"""Depth: the runs that are found, and that leaving them out is what leaving out their modules is."""

import copy
from itertools import chain, combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import TrainingGraph, capture
from graphopt.errors import AxisError
from graphopt.graph.axes import analyse
from graphopt.graph.depth import Stage, leave_out, stages
from graphopt.graph.forward import capture_forward
from graphopt.graph.training_graph import InputKind, OutputKind
from tests.structures import STRUCTURES, Structure


def found(model: nn.Module, *batch: torch.Tensor) -> tuple[TrainingGraph, tuple[Stage, ...]]:
    """The forward graph of a model, and its stages."""
    graph = capture_forward(model, batch)
    return graph, stages(analyse(graph))


def modules(staged: tuple[Stage, ...]) -> list[list[str]]:
    return [[run.module for run in stage.runs] for stage in staged]


def outputs(graph: TrainingGraph, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What the graph computes from the model's tensors."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {str(i): t for i, t in enumerate(batch)}
    values = [given[i.name] if i.kind is InputKind.BATCH else state[i.name] for i in graph.inputs]
    results = torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), graph.graph)).run(*values)
    return [r for r, o in zip(results, graph.outputs, strict=True) if o.kind is OutputKind.OUTPUT]


class PreNorm(nn.Module):
    """A transformer's layer: two sums, the norms inside."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PostNorm(PreNorm):
    """The norms behind the sums."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class Parallel(PreNorm):
    """Both branches start from the same tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        return x + self.attention(y, y, y, need_weights=False)[0] + self.mlp(y)


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class Layers(nn.Module):
    def __init__(self, stem: nn.Module, layers: list[nn.Module], head: nn.Module):
        super().__init__()
        self.stem, self.layers, self.head = stem, nn.Sequential(*layers), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.stem(x)))


TOKENS = (torch.randn(5, 7, 4),)
IMAGES = (torch.randn(3, 3, 6, 6),)


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, Parallel])
def test_layers_of_a_transformer_are_one_stage(kind: type[nn.Module]) -> None:
    model = Layers(nn.Linear(4, 12), [kind() for _ in range(4)], nn.Linear(12, 3)).eval()
    graph, staged = found(model, *TOKENS)
    assert modules(staged) == [["layers.0", "layers.1", "layers.2", "layers.3"]]
    assert staged[0].name == "layers"
    for chosen in chain.from_iterable(combinations(range(4), n) for n in (1, 2, 4)):
        smaller = leave_out(graph, [staged[0].runs[i] for i in chosen])
        shorter = copy.deepcopy(model)
        shorter.layers = nn.Sequential(*(layer for i, layer in enumerate(model.layers) if i not in chosen))
        torch.testing.assert_close(outputs(smaller, model, TOKENS)[0], shorter(*TOKENS), rtol=0, atol=0)


def test_stages_of_a_resnet_begin_behind_a_change_of_width() -> None:
    layers: list[nn.Module] = [Residual(8, 8), Residual(8, 8), Residual(8, 16), Residual(16, 16), Residual(16, 16)]
    model = Layers(nn.Conv2d(3, 8, 3), layers, nn.Flatten()).train()
    graph, staged = found(model, *IMAGES)
    assert modules(staged) == [["layers.0", "layers.1"], ["layers.3", "layers.4"]]
    smaller = leave_out(graph, [staged[0].runs[1], staged[1].runs[0]])
    shorter = copy.deepcopy(model)
    shorter.layers = nn.Sequential(*(layer for i, layer in enumerate(model.layers) if i not in (1, 3)))
    torch.testing.assert_close(outputs(smaller, model, IMAGES)[0], shorter(*IMAGES), rtol=0, atol=0)
    updated = {o.name for o in smaller.outputs if o.kind is OutputKind.BUFFER}
    assert "layers.1.norm1.running_mean" not in updated
    assert "layers.0.norm1.running_mean" in updated


class Counting(nn.Module):
    """A layer that keeps a running mean of what is inside of it, one of its input, and how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12)
        for name, shape in (("mean", (12,)), ("before", (12,)), ("calls", ())):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
        self.before.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.calls += 1
        return x + self.down(h)


def test_what_a_layer_keeps_goes_with_it() -> None:
    model = Layers(nn.Linear(4, 12), [Counting() for _ in range(3)], nn.Linear(12, 3))
    graph, staged = found(model, *TOKENS)
    smaller = leave_out(graph, [staged[0].runs[1]])
    kept = {o.name for o in smaller.outputs if o.kind is OutputKind.BUFFER}
    assert kept == {f"layers.{i}.{name}" for i in (0, 2) for name in ("mean", "before", "calls")}
    assert not [n for n in smaller.nodes if n.meta.get("module", "").startswith("layers.1")]


def test_a_joint_graph_has_the_same_runs() -> None:
    model = Layers(nn.Linear(4, 12), [PreNorm(), PreNorm()], nn.Linear(12, 3))
    forward, joint = capture_forward(model, TOKENS), capture(model, TOKENS)
    assert modules(stages(analyse(joint))) == modules(stages(analyse(forward))) == [["layers.0", "layers.1"]]
    with pytest.raises(AxisError, match="backward"):
        leave_out(joint, stages(analyse(joint))[0].runs)


class Forked(nn.Module):
    """Something inside of the branch is read outside of it, or the sum joins what one did not come from."""

    def __init__(self, kind: str):
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "leak":
            y = self.a(x)
            return (x + self.b(y)) * y.mean()
        if self.kind == "cousins":
            return self.a(x) + self.b(x)
        return x + x.sigmoid() * 2  # nothing to leave out


@pytest.mark.parametrize("kind", ["leak", "cousins", "no layer"])
def test_what_is_no_run(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Forked(kind), nn.Linear(4, 3))
    assert found(model, torch.randn(5, 4))[1] == ()


def test_equal_sizes_are_no_equal_axes() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    assert found(Plain(), torch.randn(5, 4))[1] == ()


@pytest.mark.parametrize("known", [s for s in STRUCTURES if s.depth], ids=lambda s: s.name)
def test_structures(known: Structure) -> None:
    model = known.build().eval()
    graph, staged = found(model, *known.batch)
    assert {m for stage in modules(staged) for m in stage} == set(known.depth)
    runs = [run for stage in staged for run in stage.runs]
    for n in range(1, len(runs) + 1):
        for chosen in combinations(runs, n):
            shorter = copy.deepcopy(model)
            for run in chosen:
                shorter.set_submodule(run.module, nn.Identity())
            got = outputs(leave_out(graph, chosen), model, known.batch)[0]
            torch.testing.assert_close(got, shorter(*known.batch), rtol=0, atol=0)


def test_structures_hold_runs() -> None:
    assert sum(bool(s.depth) for s in STRUCTURES) >= 3


def test_bad_input() -> None:
    model = Layers(nn.Linear(4, 12), [PreNorm(), PreNorm()], nn.Linear(12, 3))
    graph, staged = found(model, *TOKENS)
    with pytest.raises(AxisError, match="expected Axes"):
        stages(graph)  # type: ignore[arg-type]
    other, _ = found(model, *TOKENS)
    with pytest.raises(AxisError, match="no run of this graph"):
        leave_out(other, staged[0].runs)
