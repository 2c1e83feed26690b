"""Lowering: a training graph becomes one flat Python function without autograd.

The code is straight-line: one call an operator, values freed after their last use, new parameters, buffers and
optimizer state written in place. Operators are called through torch's own Python bindings where they have one, which
costs about half of a call through ``torch.ops``.
"""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.graph.in_place import InPlace, decide, overwritten
from graphopt.graph.torch_internals import in_grad_mode
from graphopt.graph.training_graph import Output, TrainingGraph

_IN_TORCH = frozenset(
    """
    _foreach_abs _foreach_add _foreach_add_ _foreach_addcdiv _foreach_addcdiv_ _foreach_addcmul _foreach_addcmul_
    _foreach_div _foreach_div_ _foreach_lerp _foreach_lerp_ _foreach_mul _foreach_mul_ _foreach_neg _foreach_neg_
    _foreach_norm _foreach_sqrt _foreach_sqrt_ _foreach_sub _foreach_sub_ _fused_adagrad_ _fused_adam_ _fused_adamw_
    _fused_sgd_ t _log_softmax _native_batch_norm_legit _softmax abs add addcdiv addcmul addmm
    baddbmm bernoulli bmm convolution cos div embedding erf exp full full_like gt le lerp log lt mm mul
    native_dropout native_group_norm native_layer_norm neg permute pow relu rsqrt select sigmoid sin sqrt sub tanh
    transpose unsqueeze where zeros_like
    """.split()  # noqa: SIM905
)
"""Operators called as ``torch.<name>``: the binding takes the schema's own arguments in order."""

_IN_TENSOR = frozenset(
    ["add_", "addcdiv_", "addcmul_", "lerp_", "clone", "div_", "expand", "mul_", "sqrt_", "sub_", "sum"]
)
"""Operators called as ``torch.Tensor.<name>``."""

_ASKS_GRAD_MODE = frozenset(["mkldnn_rnn_layer"])
"""Operators whose kernel gives what its backward needs (oneDNN's workspace) in grad mode only."""


@dataclass(frozen=True)
class Lowered:
    """A flat function. ``run(*inputs)`` takes the graph's inputs in order, writes new parameters, buffers and state
    into them, and returns a tuple of the remaining outputs (``outputs``). ``code`` is its Python source. A boxed one is
    called as ``run([*inputs])`` and empties that list, so that inputs which the caller holds no more are freed after
    their last use.

    It must run without autograd recording (`torch.no_grad`), else it would try to record what it writes.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    outputs: tuple[Output, ...]
    code: str


def lower(graph: TrainingGraph, *, in_place: bool = True, boxed: bool = False) -> Lowered:
    """Lower ``graph`` to flat Python. With ``in_place=False`` nothing is written and every output is returned;
    ``boxed`` is explained at `Lowered`."""
    decisions = decide(graph) if in_place else InPlace()
    emitter = _Emitter(graph, decisions, boxed)
    returned = [i for i, input_ in enumerate(overwritten(graph)) if input_ is None or not in_place]
    code = emitter.function([graph.results[i] for i in returned])
    name = f"<graphopt step {next(_numbers)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # readable tracebacks
    namespace: dict[str, Any] = dict(emitter.globals)
    exec(compile(code, name, "exec"), namespace)
    return Lowered(namespace["step"], tuple(graph.outputs[i] for i in returned), code)


_numbers = count()


def binding(target: Any) -> Callable[..., Any]:
    """The cheapest callable for an operator."""
    if not isinstance(target, torch._ops.OpOverload):
        return target
    if target is torch.ops.aten.view.default:
        # Some kernels give other strides than their fake ones, for which a view need not exist: eager, which went
        # through `reshape`, copies there. Where it exists, this is a view.
        return torch.reshape
    name = target._schema.name.removeprefix("aten::")
    if target.namespace == "aten" and name in _ASKS_GRAD_MODE:
        return in_grad_mode(target._op)
    if target.namespace == "aten" and name in _IN_TORCH:
        return getattr(torch, name)
    if target.namespace == "aten" and name in _IN_TENSOR:
        return getattr(torch.Tensor, name)
    if target is torch.ops.aten.sym_size.int:
        return torch.Tensor.size
    return target._op


class _Emitter:
    """Writes the source of one graph and collects the objects it refers to."""

    def __init__(self, graph: TrainingGraph, decisions: InPlace, boxed: bool):
        self.graph = graph
        self.decisions = decisions
        self.boxed = boxed
        self.globals: dict[str, Any] = {}
        self._global_names: dict[Any, str] = {}

    def function(self, returned: Sequence[fx.Node | None]) -> str:
        inputs = ", ".join(self.name(p) for p in self.graph.placeholders)
        lines = [f"def step({inputs}):"]
        if self.boxed:
            lines = ["def step(inputs_):", f"    [{inputs}] = inputs_", "    inputs_.clear()"]
        dying = self._last_uses(returned)
        for node in self.graph.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            line = self.line(node)
            if line:
                lines.append("    " + line)
            if dying[node]:
                lines.append(f"    del {', '.join(dying[node])}")
        for input_, value in self.decisions.copies:
            lines.append(f"    {self.name(input_)}.copy_({self.name(value)})")
        results = ", ".join("None" if r is None else self.name(r) for r in returned)
        lines.append(f"    return ({results}{',' if returned else ''})")
        return "\n".join(lines) + "\n"

    def line(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return f"{self.name(node)} = {self.global_name('constant', self.graph.constants[str(node.target)])}"
        void = node in self.decisions.void
        if node in self.decisions.same or (void and node.target is getitem):
            return ""
        if node.target is getitem:
            source, index = node.args
            if not node.users:
                return ""
            return f"{self.name(node)} = {self.value(source)}[{index!r}]"
        target = self.decisions.calls.get(node, node.target)
        arguments = [self.value(a) for a in node.args]
        arguments += [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        call = f"{self.global_name(getattr(target, '__name__', 'f'), binding(target))}({', '.join(arguments)})"
        return f"{self.name(node)} = {call}" if node.users and not void else call

    def name(self, node: fx.Node) -> str:
        name = self.decisions.resolve(node).name
        return name if name.isidentifier() else "_" + name

    def value(self, value: Any) -> str:
        """An argument as source."""
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.value(v) for v in value)
            return f"[{inner}]"
        if isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and _finite(value)):
            return repr(value)
        return self.global_name("c", value)

    def global_name(self, stem: str, value: Any) -> str:
        """A name under which the function finds ``value``."""
        key = id(value)
        if key not in self._global_names:
            stem = "".join(c if c.isalnum() else "_" for c in stem).strip("_") or "f"
            name = f"{stem}_{len(self.globals)}_"
            self._global_names[key] = name
            self.globals[name] = value
        return self._global_names[key]

    def _last_uses(self, returned: Sequence[fx.Node | None]) -> dict[fx.Node, list[str]]:
        """For each node the local names that nobody reads after it."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.graph.nodes:
            if node.op == "output":
                continue
            for operand in node.all_input_nodes:
                last[self.decisions.resolve(operand)] = node
        keep = {self.decisions.resolve(r) for r in returned if r is not None}
        keep |= {self.decisions.resolve(v) for _, v in self.decisions.copies}
        dying: dict[fx.Node, list[str]] = defaultdict(list)
        for value, node in last.items():
            ours = value.op == "call_function" or (self.boxed and value.op == "placeholder")
            if ours and value not in keep and value not in self.decisions.void:
                dying[node].append(self.name(value))
        return dying


def _finite(value: float) -> bool:
    return value - value == 0
