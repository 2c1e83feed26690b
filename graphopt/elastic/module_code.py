"""Python code of a subnet: a forward graph as the source of a method, of operators of PyTorch and nothing else.

`Body` writes one graph. Where train and eval mode differ in nothing but dropout and batch norm, one method serves both,
with ``self.training`` in those calls (`methods`); else each mode has its own.
"""

from __future__ import annotations

import importlib.util
import keyword
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import ElasticError
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph

aten = torch.ops.aten

_SIGNS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/",
    operator.mod: "%", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.and_: "&", operator.or_: "|", operator.pow: "**",
}  # fmt: skip
"""Arithmetic of sizes."""

_PLAIN = {
    aten.view.default: "torch.reshape",  # as `graphopt.graph.lowering` has it: real strides may differ from fake ones
    aten.linear.default: "F.linear",
    **{getattr(aten, f"conv{d}d").default: f"F.conv{d}d" for d in (1, 2, 3)},
    **{getattr(aten, f"conv{d}d").padding: f"F.conv{d}d" for d in (1, 2, 3)},
    aten.scaled_dot_product_attention.default: "F.scaled_dot_product_attention",
    aten.relu.default: "F.relu",
    aten.gelu.default: "F.gelu",
    aten.silu.default: "F.silu",
    aten.dropout.default: "F.dropout",
}
"""Operators with a name of their own whose binding takes the operator's arguments; the others are called as such."""

_NORM_IN_TRAINING = aten._native_batch_norm_legit_functional.default
_NORM_IN_EVAL = aten._native_batch_norm_legit_no_training.default
_NORMS: tuple[Any, ...] = (_NORM_IN_TRAINING, _NORM_IN_EVAL)
_ATTENTION = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
"""Arguments of attention behind queries, keys and values, with what they are by default."""

_RESERVED = {"self", "torch", "nn", "F", "aten", "getattr", "float"}


@dataclass(frozen=True)
class Names:
    """What the inputs of a graph are called in code: expressions of parameters, buffers and constants by their name in
    the graph, of the batch's tensors in order. ``folded``: nodes that have become parameters, with their names, and
    nodes that those were computed from, with an empty one."""

    tensors: Mapping[str, str]
    batch: Sequence[str]
    folded: Mapping[fx.Node, str] = field(default_factory=dict)


class Body:
    """The lines of one graph.

    Args:
        graph: the forward graph of a subnet.
        names: of its inputs.
        training: the mode that it is of.
        in_eval: write a graph of train mode as it is in eval mode, without dropout.

    ``counters``: lines that count the batches that norms have seen; ``imports``: lines of imports that they need;
    ``results``: expressions of the outputs in order, without those that are new values of buffers.
    """

    def __init__(self, graph: TrainingGraph, names: Names, *, training: bool, in_eval: bool = False):
        self.graph, self.names, self.training, self.in_eval = graph, names, training, in_eval
        self.lines: list[str] = []
        self.counters: list[str] = []
        self.imports: set[str] = set()
        self._used: dict[str, int] = defaultdict(int, dict.fromkeys(_RESERVED, 1))
        self._expressions: dict[fx.Node, str] = {}
        self._comment = ""
        self._inputs()
        writes = self._writes()
        dying = self._last_uses()
        for node in graph.nodes:
            if node.op == "get_attr":
                self._expressions[node] = names.tensors[str(node.target)]
            elif node.op == "call_function" and node not in names.folded and node not in self._counting:
                line = self._line(node)
                freed = [self._expressions[n] for n in dying[node]]
                freed = sorted({e for e in freed if e.isidentifier() and e not in self._arguments})
                if line:
                    self._say(node)
                    self.lines.append(line + (f"; del {', '.join(freed)}" if freed else ""))
        for old, new in writes:
            self.lines.append(f"{self._expressions[old]}.copy_({self._expressions[new]}.detach())")
        pairs = zip(graph.outputs, graph.results, strict=True)
        self.results = [self.value(r) for o, r in pairs if o.kind is not OutputKind.BUFFER]

    # -- inputs and new values of buffers -----------------------------------------------------------------------------

    def _inputs(self) -> None:
        rest = iter(self.names.batch)
        self._arguments = {name.partition("[")[0] for name in self.names.batch}
        for name in self._arguments:
            self._used[name] += 1
        for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            if given.kind is InputKind.BATCH:
                self._expressions[node] = next(rest)
            elif given.name in self.names.tensors:
                self._expressions[node] = self.names.tensors[given.name]
        for node, name in self.names.folded.items():
            if name:
                self._expressions[node] = self.names.tensors[name]

    def _writes(self) -> list[tuple[fx.Node, fx.Node]]:
        """New values of buffers that no batch norm writes in place; counters go to a list of their own."""
        buffers = self.graph.input_nodes(InputKind.BUFFER)
        self._counting: set[fx.Node] = set()
        found = []
        for name, new in self.graph.output_nodes(OutputKind.BUFFER).items():
            assert new is not None
            if new.target is getitem and new.args[0].target is _NORM_IN_TRAINING and new.args[1] in (3, 4):  # type: ignore[union-attr]
                continue
            old = buffers[name]
            counts = new.target is aten.add.Tensor and new.args == (old, 1) and list(new.users) == [self._output]
            if counts:
                self._counting.add(new)
                self.counters.append(f"{self._expressions[old]}.add_(1)")
            else:
                found.append((old, new))
        return found

    @property
    def _output(self) -> fx.Node:
        return self.graph.nodes[-1]

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_function":
                last[node] = node
                for source in node.all_input_nodes if not self._of_norm(node) else ():
                    last[source] = node
        kept = set(self._output.all_input_nodes)
        for node in reversed(self.graph.nodes):  # what is another name for a value lives as long as that does
            alias = self._alias(node)
            if alias is not None:
                last[alias] = max(last.get(alias, node), last.get(node, node), key=self._order.__getitem__)
                kept |= {alias} if node in kept else set()
        dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, at in last.items():
            if (
                node not in kept
                and node.op == "call_function"
                and self._alias(node) is None
                and not self._of_norm(node)
            ):
                dying[at].append(node)
        return dying

    @property
    def _order(self) -> dict[fx.Node, int]:
        return self.__dict__.setdefault("_orders", {n: i for i, n in enumerate(self.graph.nodes)})

    def _alias(self, node: fx.Node) -> fx.Node | None:
        """The node whose value this one is another name for, in the code."""
        if node.op != "call_function":
            return None
        if self.in_eval and node.target is aten.dropout.default:
            return node.args[0]  # type: ignore[return-value]
        if self._of_norm(node) and node.args[1] == 0:
            return node.args[0]  # type: ignore[return-value]
        return None

    @staticmethod
    def _of_norm(node: fx.Node) -> bool:
        """Whether a node takes one of the results of a batch norm: in code, 0 is all of it and 3 and 4 are buffers."""
        source = node.args[0] if node.target is getitem else None
        return isinstance(source, fx.Node) and source.target in _NORMS

    # -- operators ------------------------------------------------------------------------------------------------

    def _line(self, node: fx.Node) -> str:
        target = node.target
        if target in _NORMS:
            return self._assigned(node, "batch_norm", self._batch_norm(node))
        alias = self._alias(node)
        if alias is not None:
            self._expressions[node] = self._expressions[alias]
            return ""
        if self._of_norm(node):
            norm, index = node.args
            if index in (3, 4):
                self._expressions[node] = self.value(norm.args[index])  # type: ignore[union-attr, index]
            elif node.users:
                raise ElasticError(f"extract: {node.name} reads the statistics of a batch, which F.batch_norm keeps")
            return ""
        if target is getitem:
            if not node.users:
                return ""
            return self._assigned(node, "part", f"{self.value(node.args[0])}[{self.value(node.args[1])}]")
        if target is aten.sym_size.int:
            source, dim = node.args
            if source.op == "placeholder":  # type: ignore[union-attr]
                self._expressions[node] = f"{self.value(source)}.size({dim})"
                return ""
            return self._assigned(node, "size", f"{self.value(node.args[0])}.size({node.args[1]})")
        if target in _SIGNS:
            left, right = map(self.value, node.args)
            return self._assigned(node, "size", f"({left} {_SIGNS[target]} {right})")  # type: ignore[index]
        if not isinstance(target, torch._ops.OpOverload):
            raise ElasticError(f"extract: {node.name} calls {target}, which has no form in code")
        stem = target._schema.name.partition("::")[2]
        return self._assigned(node, stem, f"{self._function(target)}({', '.join(self._operands(node))})")

    def _batch_norm(self, node: fx.Node) -> str:
        x, weight, bias, mean, variance = map(self.value, node.args[:5])
        momentum, eps = map(self.value, node.args[-2:])
        by_batch = node.target is _NORM_IN_TRAINING and bool(node.args[5])
        mode = "self.training" if by_batch is self.training else str(by_batch)
        return f"F.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, {mode}, {momentum}, {eps})"

    def _operands(self, node: fx.Node) -> list[str]:
        if node.target is aten.dropout.default:  # in a graph of eval mode it drops whatever the mode is
            return [self.value(node.args[0]), self.value(node.args[1]), "self.training" if self.training else "True"]
        if node.target is aten.scaled_dot_product_attention.default:
            return self._attention(node)
        return [self.value(a) for a in node.args] + [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]

    def _attention(self, node: fx.Node) -> list[str]:
        values = [self.value(a) for a in node.args[:3]]
        for name, default in _ATTENTION.items():
            given = operand(node, name)
            if name == "dropout_p" and given != 0 and self.training:
                values += [] if self.in_eval else [f"dropout_p={given!r} if self.training else 0.0"]
            elif given != default:
                values.append(f"{name}={self.value(given)}")
        return values

    def _function(self, target: Any) -> str:
        if target in _PLAIN:
            return _PLAIN[target]
        name = target._schema.name.partition("::")[2]
        if target.namespace == "aten":
            return f"aten.{name}.{target._overloadname}"
        self.imports.add(_import(target.namespace))
        return f"torch.ops.{target.namespace}.{name}.{target._overloadname}"

    def _assigned(self, node: fx.Node, stem: str, value: str) -> str:
        name = stem.strip("_") or "value"
        name = name + "_" if keyword.iskeyword(name) else name
        self._used[name] += 1
        if self._used[name] > 1:
            name = f"{name}_{self._used[name] - 1}"
        self._expressions[node] = name
        return f"{name} = {value}"

    def _say(self, node: fx.Node) -> None:
        """A comment where the code of another module of the model begins."""
        module = node.meta.get("module", "")
        if module and module != self._comment:
            self._comment = module
            self.lines.append(f"# {module}")

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self, value: Any) -> str:
        """An argument as an expression."""
        if isinstance(value, fx.Node):
            return self._expressions[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, float) and value - value != 0:
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if value is None or isinstance(
            value, (bool, int, float, complex, str, torch.dtype, torch.memory_format, torch.layout)
        ):
            return repr(value)
        raise ElasticError(f"extract: {value!r} in the graph has no form in code")


def _import(namespace: str) -> str:
    """The line that makes the operators of a namespace known, if a module of that name does."""
    if importlib.util.find_spec(namespace) is None:
        return f"# the operators torch.ops.{namespace} must be known"
    return f"import {namespace}"


def nested(structure: Any, imports: set[str]) -> str:
    """A nesting of `Expression`s as an expression. Dataclasses and named tuples are made by their classes, which are
    imported; raises ElasticError for others."""
    kind = type(structure)
    if isinstance(structure, Expression) or structure is None or isinstance(structure, (bool, int, str)):
        return str(structure) if isinstance(structure, Expression) else repr(structure)
    if isinstance(structure, (float, complex, torch.dtype)):
        return repr(structure)
    if isinstance(structure, torch.device):
        return f'torch.device("{structure}")'
    if kind in (list, tuple):
        inside = ", ".join(nested(v, imports) for v in structure)
        return f"[{inside}]" if kind is list else f"({inside}{',' if len(structure) == 1 else ''})"
    if kind is dict:
        return "{" + ", ".join(f"{k!r}: {nested(v, imports)}" for k, v in structure.items()) + "}"
    if "<" in kind.__qualname__ or kind.__module__ == "__main__":
        raise ElasticError(f"extract: the model returns a {kind.__qualname__}, which no other process can import")
    imports.add(f"from {kind.__module__} import {kind.__qualname__.partition('.')[0]}")
    called = kind.__qualname__
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return f"{called}({', '.join(nested(v, imports) for v in structure)})"
    if isinstance(structure, dict):
        items = structure.items()
    elif is_dataclass(structure):
        items = vars(structure).items()
    else:
        raise ElasticError(f"extract: the model returns a {kind.__qualname__}, which has no form in code")
    return f"{called}({', '.join(f'{k}={nested(v, imports)}' for k, v in items)})"


@dataclass(frozen=True)
class Expression:
    """A piece of code that stands for a tensor in a nesting."""

    text: str

    def __str__(self) -> str:
        return self.text


def methods(signature: str, bodies: Mapping[bool, tuple[Body, str]], in_eval: Body | None) -> list[str]:
    """The lines of the methods of a class.

    Args:
        signature: arguments behind ``self``.
        bodies: by mode (whether it is training) the body and the expression that it returns.
        in_eval: the body of train mode, written as it is in eval mode.
    """
    if len(bodies) == 2 and in_eval is not None and _code(in_eval) == _code(bodies[False][0]):
        body, result = bodies[True]
        return [f"def forward(self{signature}):", *_indented(_with_counters(body)), f"    return {result}"]
    arguments = ", ".join(part.partition("=")[0].strip() for part in signature.split(",") if part.strip(" *"))
    lines = [f"def forward(self{signature}):"]
    if len(bodies) == 2:
        lines += [
            f"    if self.training:\n        return self._forward_in_training({arguments})",
            f"    return self._forward_in_eval({arguments})",
        ]
    else:
        only = next(iter(bodies))
        mode, other = ("training", "eval") if only else ("eval", "train")
        lines += [
            f"    if self.training is not {only}:",
            f'        raise RuntimeError("this subnet was captured in {mode} mode only, not in {other} mode")',
            f"    return self._forward_in_{mode}({arguments})",
        ]
    for training, (body, result) in bodies.items():
        name = "training" if training else "eval"
        head = f"def _forward_in_{name}(self{', ' if arguments else ''}{arguments}):"
        lines += ["", head, *_indented(_with_counters(body)), f"    return {result}"]
    return lines


def _code(body: Body) -> list[str]:
    return [line for line in (*body.lines, *body.results) if not line.startswith("#")]


def _with_counters(body: Body) -> list[str]:
    if not body.counters:
        return body.lines
    return [*body.lines, "if self.training:", *_indented(body.counters)]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
