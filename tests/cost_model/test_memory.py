"""Peak memory: counted by hand on tiny graphs, and against the allocations that torch's profiler sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from benchmarks import zoo
from benchmarks.measure import eager_step, peak_bytes
from graphopt.cost_model.blocks import stored_bytes
from graphopt.cost_model.kernel_sizes import shapes
from graphopt.cost_model.memory import Memory, peak
from graphopt.errors import GraphoptError
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase, TrainingGraph
from graphopt.schemes.flat import CapturedStep, capture_task
from graphopt.schemes.task import Task
from graphopt.step import PASSES
from tests.helpers import Step, traced
from tests.training import Net, images

aten = torch.ops.aten
ROW = (4, 8)  # 128 bytes


def with_outputs(graph: TrainingGraph, *outputs: Output) -> TrainingGraph:
    """The graph with other kinds of outputs."""
    return TrainingGraph(graph.graph, replace(graph.signature, outputs=outputs), graph.constants)


# -- counted by hand ------------------------------------------------------------------------------------------------


def test_a_value_is_freed_after_its_last_use() -> None:
    def function(step: Step, x: Any) -> Any:
        a = aten.exp.default(x)
        b = aten.sin.default(a)  # a and b: 256 bytes
        return aten.sum.default(aten.cos.default(b))  # b and cos, then cos and the sum

    found = peak(traced(function, ROW))
    assert (found.own, found.total) == (256, 128 + 256)
    assert found.node is not None and found.node.name == "sin"
    assert found.timeline.tolist() == [256, 256, 256, 128 + 4]
    assert found.parts == {"batch": 128, "activations": 256}


def test_a_view_keeps_its_storage() -> None:
    def function(step: Step, x: Any) -> Any:
        a = aten.exp.default(x)
        v = aten.view.default(a, [32])
        b = aten.sin.default(x)
        c = aten.cos.default(b)  # a by its view, b, c
        return aten.add.Tensor(c, aten.view.default(v, [4, 8]))

    found = peak(traced(function, ROW))
    assert (found.own, found.node and found.node.name) == (3 * 128, "cos")
    # Added after cos: a, c and the sum.
    assert (found.timeline - 128).tolist() == [128, 128, 256, 256, 256, 128]


def test_results_that_nobody_reads_go_at_once() -> None:
    def function(step: Step, x: Any) -> Any:
        normed = step.call(aten.native_layer_norm.default, x, [8], None, None, 1e-5)
        y = step.item(normed, 0)
        return aten.exp.default(y)

    found = peak(traced(function, ROW))
    # Mean and 1/std of 4 rows live until the list of results is taken apart; then y, then y and its exponential.
    assert (found.timeline - 128).tolist() == [128 + 32, 128, 128]
    assert found.own == 256


def test_a_parameter_is_updated_in_place() -> None:
    def function(step: Step, p: Any, x: Any) -> Any:
        with step.phase(Phase.UPDATE):
            scaled = aten.mul.Tensor(x, 2.0)
            return aten.add.Tensor(p, scaled)

    graph = traced(function, ROW, ROW, kinds=[InputKind.PARAMETER, InputKind.BATCH])
    assert peak(graph).own == 256  # the sum is returned beside its operand
    graph = with_outputs(graph, Output(OutputKind.PARAMETER, "p"))
    found = peak(graph)
    assert (found.own, found.timeline[-1]) == (128, 256)
    assert found.parts == {"parameters": 128, "batch": 128, "update": 128}


def test_constants_are_there_before() -> None:
    def function(step: Step, x: Any) -> Any:
        return aten.mul.Tensor(x, step.constant(torch.ones(4, 8)))

    found = peak(traced(function, ROW))
    assert found.parts == {"batch": 128, "constants": 128, "activations": 128}
    assert found.own == 128


def test_a_graph_that_allocates_nothing_has_no_node() -> None:
    found = peak(traced(lambda step, x: aten.view.default(x, [32]), ROW))
    assert (found.own, found.total, found.node) == (0, 128, None)


def gradients(step: Step, p: Any, x: Any) -> Any:
    """Two gradients, one after the other, each from two terms."""
    found = []
    with step.phase(Phase.BACKWARD):
        for _ in range(2):
            found.append(aten.add.Tensor(aten.exp.default(x), aten.sin.default(x)))
    return tuple(found)


def test_eager_adds_gradients_in_place_and_keeps_them() -> None:
    graph = traced(gradients, ROW, ROW, kinds=[InputKind.PARAMETER, InputKind.BATCH])
    graph = with_outputs(graph, Output(OutputKind.GRADIENT, "p"), Output(OutputKind.GRADIENT, "q"))
    assert peak(graph, mode="flat").own == 4 * 128  # the first gradient; exp, sin and their sum
    found = peak(graph, mode="eager")
    assert found.own == 3 * 128  # the first gradient; exp and sin
    assert found.parts["gradients"] == 2 * 128 and found.timeline[-1] == 2 * 128 + 2 * 128


def test_eager_frees_what_an_autograd_node_saved_after_its_last_operator() -> None:
    def function(step: Step, x: Any) -> Any:
        a, b = aten.exp.default(x), aten.sin.default(x)
        with step.phase(Phase.BACKWARD):
            g = aten.cos.default(x)
            of_b = aten.mul.Tensor(g, a)
            of_a = aten.mul.Tensor(g, b)
        return of_b, of_a

    graph = traced(function, ROW)
    assert peak(graph, mode="flat").own == 4 * 128  # a is gone when the gradient of a is made
    assert peak(graph, mode="eager").own == 5 * 128


def test_eager_holds_the_factors_of_a_formula_until_it_is_computed() -> None:
    def function(step: Step, x: Any) -> Any:
        with step.phase(Phase.BACKWARD):
            g = aten.cos.default(x)
            factor = aten.mul.Tensor(aten.exp.default(x), 2.0)  # of saved values only
            return aten.mul.Tensor(g, factor)

    graph = traced(function, ROW)
    assert peak(graph, mode="flat").own == 3 * 128
    assert peak(graph, mode="eager").own == 4 * 128  # g, the exponential, the factor and the product


# -- against the profiler -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model with what it needs for a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[torch.Tensor, ...]
    loss: Callable[..., torch.Tensor] = F.cross_entropy
    clip: float | None = None

    def captured(self) -> CapturedStep:
        task = Task(self.model, self.loss, (self.optimizer,), parse_clip(self.clip))
        return capture_task(task, self.batch, PASSES)

    def measured(self, mode: str) -> int:
        """Bytes that the profiler sees live at most, beyond those that were there before."""
        if mode == "flat":
            make = dict(loss=self.loss, optimizer=self.optimizer, clip=self.clip, schemes="flat")
            step = graphopt.optimize(self.model, self.batch, **make)
        elif self.clip is None:
            step = eager_step(self.model, self.optimizer, self.loss)
        else:
            step = self._clipping
        for _ in range(2):
            step(*self.batch)
        return peak_bytes(lambda: step(*self.batch))

    def _clipping(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        assert self.clip is not None
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 9)
    )


def rows(size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(size, 64), torch.randint(9, (size,))


CASES: dict[str, Callable[[], Case]] = {
    "sgd": lambda: _case(perceptron(), rows(64), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adamw foreach": lambda: _case(perceptron(), rows(3), lambda p: torch.optim.AdamW(p, foreach=True)),
    "adamw fused": lambda: _case(perceptron(), rows(3), lambda p: torch.optim.AdamW(p, fused=True)),
    "adam loop": lambda: _case(perceptron(), rows(3), lambda p: torch.optim.Adam(p, foreach=False)),
    "clipped": lambda: _case(perceptron(), rows(3), lambda p: torch.optim.AdamW(p, foreach=True), clip=0.1),
    "tied": lambda: _case(Tied(), (torch.randint(50, (6, 5)), torch.randint(50, (6,))), torch.optim.SGD),
    "convolutions": lambda: _case(Net(0.2), images(32), lambda p: torch.optim.SGD(p, lr=0.1)),
    "digits_cnn": lambda: _of_zoo("digits_cnn"),
    "ft_transformer": lambda: _of_zoo("ft_transformer"),
}


def _case(model: nn.Module, batch: tuple[torch.Tensor, ...], make: Callable[..., Any], **more: Any) -> Case:
    return Case(model, make(model.parameters()), batch, **more)


def _of_zoo(name: str) -> Case:
    found = zoo.case(name)
    model = found.build()
    assert found.loss is not None
    return Case(model, torch.optim.AdamW(model.parameters()), found.batch(8), found.loss)  # type: ignore[arg-type]


class Tied(nn.Module):
    """An embedding that is the output layer too: its gradients meet."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.layer(self.embedding(tokens))).mean(1), self.embedding.weight)


@pytest.mark.parametrize("mode", ["flat", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_peak_is_what_the_profiler_sees(name: str, mode: str) -> None:
    case = CASES[name]()
    captured = case.captured()
    found = peak(captured.graph if mode == "flat" else captured.before, mode=mode)  # type: ignore[arg-type]
    measured = case.measured(mode)
    # Not counted: numbers on their way into an operator, and the kernels' copies of biases.
    assert found.own == pytest.approx(measured, rel=0, abs=256)
    held = [*case.model.parameters(), *case.model.buffers(), *case.batch]
    held += [t for state in case.optimizer.state.values() for t in state.values()]
    held += [*captured.graph.constants.values()]
    before = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
    assert found.total - found.own == pytest.approx(before, abs=64)


# -- at other sizes -------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "perceptron": (perceptron, rows),
    "convolutions": (Net, images),
}


@pytest.fixture(scope="module", params=MODELS)
def captures(request: pytest.FixtureRequest) -> Callable[[int], CapturedStep]:
    """Captures of one model by batch size."""
    build, batch = MODELS[request.param]
    found: dict[int, CapturedStep] = {}

    def captured(size: int) -> CapturedStep:
        if size not in found:
            found[size] = _case(build(), batch(size), torch.optim.Adam).captured()
        return found[size]

    return captured


@pytest.mark.parametrize("mode", ["flat", "eager"])
def test_another_batch_is_priced_as_a_fresh_capture(captures: Callable[[int], CapturedStep], mode: Any) -> None:
    def price(captured: CapturedStep, sizes: dict[str, int] | None) -> Any:
        found = peak(captured.graph if mode == "flat" else captured.before, sizes, mode)
        return found.total, found.own, found.parts, str(found.node), found.timeline.tolist()

    for size in (9, 40):
        assert price(captures(4), {"batch": size}) == price(captures(size), None)


@given(sizes=st.lists(st.integers(2, 5000), min_size=2, max_size=2))
@pytest.mark.parametrize("mode", ["flat", "eager"])
def test_peak_grows_with_the_batch(captures: Callable[[int], CapturedStep], mode: Any, sizes: list[int]) -> None:
    graph = captures(4).graph if mode == "flat" else captures(4).before
    small, large = (peak(graph, {"batch": size}, mode) for size in sorted(sizes))
    assert small.total <= large.total and small.own <= large.own
    for found in (small, large):
        assert sum(found.parts.values()) == found.total
        assert (found.timeline <= found.total).all()


def test_nothing_but_the_loss_is_left(captures: Callable[[int], CapturedStep]) -> None:
    graph = captures(4).graph
    found = peak(graph)
    assert found.timeline[-1] == found.total - found.own + 4
    captured = captures(4).before
    found = peak(captured, mode="eager")
    parameters = sum(sum(stored_bytes(n)) for n in captured.input_nodes(InputKind.PARAMETER).values())
    assert found.timeline[-1] == found.total - found.own + 4 + parameters  # the gradients


def test_widths_may_be_free() -> None:
    """Shapes and bytes as expressions of a symbol that the graph does not have."""
    width = sympy.Symbol("width", positive=True, integer=True)

    def function(step: Step, x: Any, w: Any) -> Any:
        return aten.convolution.default(aten.exp.default(x), w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def free(node: Any) -> list[Sequence[Any]]:
        return [[width if size == 16 else size for size in shape] for shape in shapes(node)]

    def nbytes(node: Any) -> list[Any]:
        return [4 * sympy.prod(shape) for shape in free(node)]

    at_16 = traced(function, (2, 16, 6, 6), (16, 16, 3, 3))
    at_32 = traced(function, (2, 32, 6, 6), (32, 32, 3, 3))
    memory = Memory(at_16, "flat", nbytes, shapes_of=free)
    for size, graph in ((16, at_16), (32, at_32)):
        assert memory.at({width: size}).parts == peak(graph).parts


def test_pricing_two_thousand_operators_takes_less_than_a_millisecond() -> None:
    def function(step: Step, x: Any) -> Any:
        for _ in range(500):
            x = aten.neg.default(aten.view.default(aten.sin.default(aten.exp.default(x)), [4, 8]))
        return x

    n = sympy.Symbol("n", positive=True, integer=True)
    graph = traced(function, ROW)
    memory = Memory(graph, "flat", lambda node: [8 * n * 4] if stored_bytes(node) else [])
    seconds = []
    for size in range(1, 30):
        start = perf_counter()
        found = memory.at({n: size})
        seconds.append(perf_counter() - start)
        assert found.own == 2 * 32 * size
    assert len(graph) == 2000 and min(seconds) < 1e-3


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_sizes_are_refused(captures: Callable[[int], CapturedStep]) -> None:
    graph = captures(4).graph
    memory = Memory(graph)
    (symbol,) = graph.symbols.symbols.values()
    for value in (0, -3, 2.5, True):
        with pytest.raises(GraphoptError, match="positive integer"):
            memory.at({symbol: value})  # type: ignore[dict-item]
    with pytest.raises(GraphoptError, match="no size given"):
        memory.at({})
    with pytest.raises(GraphoptError, match="62 bits"):
        memory.at({symbol: 2**60})
    with pytest.raises(GraphoptError, match="unknown name"):
        peak(graph, {"width": 3})
    with pytest.raises(GraphoptError, match="positive integer"):
        peak(graph, {"batch": 0})


def test_an_unknown_mode_is_refused() -> None:
    graph = traced(lambda step, x: aten.exp.default(x), ROW)
    with pytest.raises(GraphoptError, match="'flat' or 'eager', got 'lazy'"):
        Memory(graph, "lazy")  # type: ignore[arg-type]
