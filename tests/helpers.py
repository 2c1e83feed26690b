"""Hand-made graphs and the one check that every test of a pass makes: `traced`, `body`, `run`, `assert_rewrite`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.graph.draft import infer
from graphopt.graph.sizes import Symbols
from graphopt.graph.text import argument_text, operator_text
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, Signature, TrainingGraph
from graphopt.passes import Pass, PassResult, Tier


class _Tracer(fx.Tracer):
    """Names nodes after their operator: ``exp`` rather than ``exp_default``."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, *rest: Any) -> fx.Node:
        name = getattr(getattr(target, "overloadpacket", None), "__name__", name)
        return super().create_node(kind, target, args, kwargs, name, *rest)


class Step:
    """The operators of a graph under construction: the first argument of a function given to `traced`.

    Operators on values are called as they are (``aten.exp(x)``); those without one by ``step.call``.
    """

    def __init__(self) -> None:
        self.tracer = _Tracer()
        self.tracer.graph = fx.Graph()
        self.phases: dict[fx.Node, Phase] = {}
        self.constants: dict[str, torch.Tensor] = {}

    def call(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Proxy:
        """An operator without operands, such as ``aten.full.default``."""
        return self.tracer.create_proxy("call_function", operator, args, kwargs)

    def item(self, value: fx.Proxy, index: int) -> fx.Proxy:
        """One result of an operator with several."""
        return self.tracer.create_proxy("call_function", getitem, (value, index), {})

    def constant(self, value: torch.Tensor) -> fx.Proxy:
        """A constant of the graph."""
        name = f"constant{len(self.constants)}"
        self.constants[name] = value
        return self.tracer.create_proxy("get_attr", name, (), {})

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """What is called inside belongs to this phase; otherwise to forward."""
        before = set(self.tracer.graph.nodes)
        yield
        self.phases.update({n: phase for n in self.tracer.graph.nodes if n not in before})


def traced(function: Callable[..., Any], *examples: Any, kinds: Sequence[InputKind] = ()) -> TrainingGraph:
    """The graph of exactly the overloads that ``function(step, *inputs)`` calls, dead ones included.

    Examples: tensors or shapes, one an input; inputs are named as the arguments. Outputs are named ``0``, ``1`` ...
    """
    step = Step()
    names = list(inspect.signature(function).parameters)[1:]
    proxies = [step.tracer.create_proxy("placeholder", name, (), {}) for name in names]
    returned = function(step, *proxies)
    returned = returned if isinstance(returned, tuple) else (returned,)
    graph = step.tracer.graph
    graph.output(tuple(r.node if isinstance(r, fx.Proxy) else r for r in returned))
    values = [torch.randn(e) if isinstance(e, tuple) else e for e in examples]
    with FakeTensorMode() as mode:
        for node in graph.nodes:
            if node.op == "placeholder":
                value = values.pop(0)
                fake = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                node.meta = {"val": fake, "phase": Phase.INPUT}
            elif node.op == "get_attr":
                value = mode.from_tensor(step.constants[str(node.target)])
                node.meta = {"val": value, "phase": step.phases.get(node, Phase.FORWARD)}
            elif node.op == "call_function":
                node.meta = {"val": infer(node), "phase": step.phases.get(node, Phase.FORWARD)}
    inputs = [Input(kind, name) for kind, name in zip(kinds or [InputKind.BATCH] * len(names), names, strict=True)]
    outputs = [Output(OutputKind.OUTPUT, str(i)) for i in range(len(returned))]
    return TrainingGraph(graph, Signature(tuple(inputs), tuple(outputs)), step.constants)


def body(graph: TrainingGraph) -> str:
    """The operators of a graph, one a line, without types and places: ``%mm = aten.mm(%x, %w)``."""
    lines = []
    for node in graph.nodes:
        arguments = [argument_text(a) for a in node.args]
        arguments += [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_function":
            lines.append(f"%{node.name} = {operator_text(node.target)}({', '.join(arguments)})")
        elif node.op == "get_attr":
            lines.append(f"%{node.name} = constant {node.target}")
    return "\n".join([*lines, f"return {', '.join(argument_text(r) for r in graph.results)}"])


def run(graph: TrainingGraph, values: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of a graph, computed operator by operator."""
    root = torch.nn.Module()
    for name, value in graph.constants.items():
        root.register_buffer(name, value.clone())
    return fx.Interpreter(root, graph=graph.graph).run(*values)


def random_values(graph: TrainingGraph, *, special: bool = True) -> list[Any]:
    """Values for the inputs of a graph; with ``special`` some of the floats are -0.0, infinite or NaN."""
    return [_random_like(n.meta["val"], graph.symbols, special) for n in graph.placeholders]


def _random_like(value: Any, symbols: Symbols, special: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = ([symbols.evaluate(n) for n in numbers] for numbers in (value.shape, value.stride()))
    made = torch.empty_strided(shape, stride, dtype=value.dtype)
    if value.dtype == torch.bool:
        return made.random_(2)
    if not (value.is_floating_point() or value.is_complex()):
        return made.random_(0, 3)
    made.normal_()
    if special and made.numel() > 3:
        chosen = torch.randint(8, made.shape)
        for code, number in enumerate((-0.0, float("inf"), float("nan"))):
            made.masked_fill_(chosen == code, number)
    return made


def assert_same_bits(got: Sequence[Any], expected: Sequence[Any]) -> None:
    """Tensors are equal bit for bit (signed zeros and NaNs count), in dtype, shape and strides too."""
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected)):
        if not isinstance(b, torch.Tensor):
            assert type(a) is type(b) and a == b, f"result {i} is {a}, expected {b}"
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), f"result {i}"
        bits = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b)]
        assert torch.equal(*bits), f"result {i} differs: {a} and {b}"


def assert_rewrite(
    rewriter: Pass,
    graph: TrainingGraph,
    expected: str | None = None,
    *,
    refused: str | None = None,
    special: bool = True,
) -> PassResult:
    """What every pass must do, on one graph. Gives the result for further checks.

    - Structure: the result reads as ``expected`` (None: the pass leaves the graph alone).
    - Meaning: results are the same bits on random inputs (a close match for passes that reorder arithmetic), and
      the random state afterwards is the same.
    - The graph given is not changed, and a second run of the pass has nothing left to do.
    - The savings of the changes add up to the difference between the graphs.
    - ``refused``: a part of the reason of a refusal; without it there must be none.
    """
    before = body(graph)
    result = assert_keeps_meaning(rewriter, graph, special=special)
    expected = before if expected is None else textwrap.dedent(expected).strip()
    assert body(result.graph) == expected, f"got\n{body(result.graph)}\nexpected\n{expected}"
    if refused is None:
        assert not result.refusals, result.refusals
    else:
        assert any(refused in r.why for r in result.refusals), result.refusals
    return result


def assert_keeps_meaning(rewriter: Pass, graph: TrainingGraph, *, special: bool = True) -> PassResult:
    """The part of `assert_rewrite` that holds for any graph; an exact pass must not keep more bytes either."""
    before, flops, kept = body(graph), graph.flops(), graph.bytes_kept()
    result = rewriter(graph)
    assert body(graph) == before, "the pass changed the graph it was given"
    assert result.changed == (result.graph is not graph)

    exact = rewriter.tier is Tier.EXACT
    values = random_values(graph, special=special and exact)
    torch.manual_seed(0)
    wanted = run(graph, values)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    got = run(result.graph, values)
    assert torch.equal(torch.get_rng_state(), state), "the pass changed what is drawn"
    if exact:
        assert_same_bits(got, wanted)
    else:
        torch.testing.assert_close(got, wanted)

    again = rewriter(result.graph)
    assert not again.changed, [c.what for c in again.changes]
    saved = result.saving
    assert saved.flops == flops - result.graph.flops()
    assert saved.bytes_kept == kept - result.graph.bytes_kept()
    assert saved.bytes_kept >= 0 or not exact
    return result
