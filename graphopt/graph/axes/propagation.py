"""One walk over a graph that gives every tensor dimension its factor, by the axis rules of the operators."""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes.factors import ONE, Factor, Factors, find
from graphopt.graph.axes.hidden_states import hidden_states
from graphopt.graph.op_rules.axis_rules import default_rule
from graphopt.graph.op_rules.queries import rule
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph

Dims = tuple[Factor, ...]


class Tag:
    """What an axis was seen to be, as bits. Kinds follow from several of them together."""

    BATCH = 1
    VOCABULARY = 2
    CLASSES = 4
    CHANNEL = 8
    FEATURE = 16  # of the weight of a linear layer or an embedding
    KERNEL_HEIGHT = 32
    KERNEL_WIDTH = 64
    KERNEL_DEPTH = 128
    SPATIAL = 256
    IN_BATCHES = 512  # kept in both operands of a product of two activations
    CONTRACTED = 1024  # summed over in such a product
    KEPT = 2048  # kept in one operand of it
    HEADS = 4096
    HEAD_SIZE = 8192
    SEQUENCE = 16384
    INPUT = 32768
    OUTPUT = 65536
    STATISTICS = 131072
    SOFTMAX = 262144


_PRIMES = tuple(10**n + k for n, k in ((6, 3), (9, 7), (12, 39), (15, 37), (18, 3), (21, 117), (24, 7), (27, 103)))
"""What free sizes count as. Far apart, so that any number says which of them it is made of (see `expression_of`)."""


class Propagation(Factors):
    """The analysis at work: what axis rules see. See `Factors` for merging and refining.

    ``unknown_nodes`` are the nodes whose operators have no rule, ``adds`` the forward sums of two activations,
    ``hidden`` the outputs that are hidden states (`hidden_states`).
    """

    one = ONE

    def __init__(self, graph: TrainingGraph):
        super().__init__()
        self.graph = graph
        self.dims: dict[fx.Node, Any] = {}
        self.activations: set[fx.Node] = set()
        self.unknown_nodes: list[fx.Node] = []
        self.statistics_of: list[tuple[Factor, str]] = []
        self.adds: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self.hidden: dict[str, fx.Node] = {}
        self.expressions: dict[int, Expr] = {}
        self._evaluated: dict[sympy.Expr, int] = {}
        symbols = list(graph.symbols.symbols.values())
        self.primes = dict(zip(symbols, _PRIMES, strict=False))

    # -- sizes ----------------------------------------------------------------------------------------------------

    def sizes(self, node: fx.Node, index: int | None = None) -> tuple[int, ...]:
        """The sizes of the node's tensor (of result ``index``) as ints, free sizes as primes."""
        value = node.meta["val"]
        if index is not None:
            value = value[index]
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple([s if type(s) is int else self.size(s) for s in value.shape])

    def size(self, value: Any) -> int:
        """One size as an int."""
        expr = expression(value)
        if isinstance(expr, int):
            return expr
        found = self._evaluated.get(expr)
        if found is None:
            for symbol in expr.free_symbols:
                if symbol not in self.primes:
                    if len(self.primes) == len(_PRIMES):
                        raise AxisError(f"graph: it has more than {len(_PRIMES)} free sizes")
                    self.primes[symbol] = _PRIMES[len(self.primes)]
            found = self._evaluated[expr] = int(expr.xreplace({s: sympy.Integer(p) for s, p in self.primes.items()}))
            self.expressions.setdefault(found, expr)
        return found

    def expression_of(self, size: int) -> Expr:
        """The size that an int stands for, as an expression of free sizes: the reverse of `size`."""
        if size in self.expressions:
            return self.expressions[size]
        for symbol, prime in sorted(self.primes.items(), key=lambda pair: -pair[1]):
            times = (size + prime // 2) // prime
            if times:
                return self.expression_of(times) * symbol + self.expression_of(size - times * prime)
        return size

    def number(self, value: Any) -> int | None:
        """An argument that is a number, as an int with free sizes as primes; None for a tensor's value."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, (int, torch.SymInt)):
            return value if isinstance(value, int) else self.size(value)
        return None

    def constant(self, node: fx.Node) -> int | None:
        """The one integer that a constant tensor of the graph holds, behind copies of it; None for any other node."""
        while node.op == "call_function" and node.target in _COPIES:
            node = node.args[0]  # type: ignore[assignment]
        value = self.graph.constants.get(str(node.target)) if node.op == "get_attr" else None
        plain = value is not None and value.numel() == 1 and not value.is_floating_point() and value.dtype != torch.bool
        return int(value) if value is not None and plain else None

    # -- reading --------------------------------------------------------------------------------------------------

    def of(self, node: Any) -> Dims:
        """The dimensions of a node's tensor; none for a number."""
        if not isinstance(node, fx.Node):
            return ()
        found = self.dims[node]
        return () if isinstance(found, list) else found

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether the node's value is one tensor."""
        return isinstance(node.meta["val"], torch.Tensor)

    # -- for rules ------------------------------------------------------------------------------------------------

    def meet(self, a: Factor, b: Factor) -> Factor:
        """``a`` and ``b`` broadcast against each other: the same dimension unless one has size 1."""
        if a is b or b is ONE:
            return a
        if a is ONE:
            return b
        self.unify(a, b)
        return a

    def broadcast(self, a: Dims, b: Dims) -> Dims:
        """The dimensions of two shapes broadcast against each other, aligned at the right."""
        if len(a) < len(b):
            a, b = b, a
        if not b:
            return a
        lead = len(a) - len(b)
        return a[:lead] + tuple([x if x is y else self.meet(x, y) for x, y in zip(a[lead:], b)])

    def repeated(self, node: fx.Node, dims: Dims) -> Any:
        """These dimensions for each result of the node."""
        value = node.meta["val"]
        return [dims for _ in value] if isinstance(value, (list, tuple)) else dims

    def fresh(self, node: fx.Node, frozen: str = "", index: int | None = None) -> Any:
        """New dimensions for the node's result, or for each of them."""
        value = node.meta["val"]
        if index is None and isinstance(value, (list, tuple)):
            return [self.fresh(node, frozen, i) for i in range(len(value))]
        return tuple([self.new(s, frozen) for s in self.sizes(node, index)])

    def freeze_operands(self, node: fx.Node, reason: str) -> None:
        """Freeze all dimensions of all operands but the batch."""
        for source in node.all_input_nodes:
            found = self.dims.get(source, ())
            for dims in found if isinstance(found, list) else [found]:
                for factor in dims or ():
                    self.freeze(factor, reason)

    def unknown(self, node: fx.Node) -> Any:
        """Nothing is known of the operator: all axes it touches freeze, and it is reported."""
        self.unknown_nodes.append(node)
        self.binding = True
        reason = f"no rule for {node.target} ({node.name})"
        self.freeze_operands(node, reason)
        return self.fresh(node, reason)

    def reduced(self, factor: Factor, node: fx.Node) -> None:
        """The dimension is summed, averaged or otherwise reduced by the node. All but sums are statistics of it."""
        operator = getattr(node.target, "_opname", str(node.target))
        if operator not in ("sum", "einsum"):
            self.statistics(factor, operator.replace("_", " "), node)

    def statistics(self, factor: Factor, what: str, node: fx.Node) -> None:
        """The result depends on all indices of the dimension together: leaving some out is another function."""
        if factor is not ONE and self.binding:
            self.statistics_of.append((factor, f"{what} at {node.name}"))
            self.tag(factor, Tag.SOFTMAX if what == "softmax" else Tag.STATISTICS)

    def feature(self, factor: Factor) -> None:
        """A dimension of a linear layer's weight."""
        self.tag(factor, Tag.FEATURE)

    def channel(self, factor: Factor) -> None:
        """A channel dimension of a convolution's weight."""
        self.tag(factor, Tag.CHANNEL)

    def kernel(self, factor: Factor, position: int, rank: int) -> None:
        """A spatial dimension of a convolution's weight: the last is the width, before it height, then depth."""
        names = (Tag.KERNEL_WIDTH, Tag.KERNEL_HEIGHT, Tag.KERNEL_DEPTH)
        self.tag(factor, names[min(2, rank - 1 - position)])
        self.freeze(factor, "kernel positions: may be cropped around their centre, not left out one by one")

    def spatial(self, factor: Factor, reason: str) -> None:
        """Positions of an image or signal."""
        self.tag(factor, Tag.SPATIAL)
        if reason:
            self.freeze(factor, reason)

    def vocabulary(self, factor: Factor, node: fx.Node) -> None:
        """Rows of an embedding: data name them."""
        self.tag(factor, Tag.VOCABULARY)
        self.freeze(factor, f"rows that the data name ({node.name})")

    def classes(self, factor: Factor, node: fx.Node) -> None:
        """Classes: targets name them."""
        self.tag(factor, Tag.CLASSES)
        self.freeze(factor, f"classes that the targets name ({node.name})")

    def contracted(
        self,
        left: fx.Node,
        right: fx.Node,
        inner: Factor,
        kept: Iterable[Factor],
        batch: Iterable[Factor],
        node: fx.Node,
    ) -> None:
        """A product over ``inner``: of two activations, or of one with a weight."""
        if left in self.activations and right in self.activations:
            if node.meta.get("phase") == Phase.FORWARD:
                self.tag(inner, Tag.CONTRACTED)
                for f in kept:
                    self.tag(f, Tag.KEPT)
                for f in batch:
                    self.tag(f, Tag.IN_BATCHES)
        elif node.meta.get("phase") == Phase.FORWARD:
            for f in (inner, *(self.of(right)[-1:] if right not in self.activations else self.of(left)[-2:-1])):
                self.tag(f, Tag.FEATURE)

    def attended(
        self, queries: Factor, keys: Factor, sizes: Iterable[Factor], heads: Iterable[Factor], node: fx.Node
    ) -> None:
        """The axes of one attention."""
        for f in (queries, keys):
            self.tag(f, Tag.SEQUENCE)
        self.tag(keys, Tag.SOFTMAX)
        for f in sizes:
            self.tag(f, Tag.HEAD_SIZE)
        for f in heads:
            self.tag(f, Tag.HEADS)

    # -- the walk -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Give every node its dimensions."""
        self._inputs()
        dims = self.dims
        for node in self.graph.graph.nodes:
            if node.op == "call_function":
                if not self.activations.isdisjoint(node.all_input_nodes):
                    self.activations.add(node)
                if node.target is getitem:
                    source = dims[node.args[0]]
                    dims[node] = source[node.args[1]] if isinstance(source, list) else ()
                    continue
                self.at = node
                self.binding = node.meta.get("phase") in _BINDING
                dims[node] = self._apply(node)
            elif node.op == "get_attr":
                dims[node] = tuple([self.new(s) for s in self.sizes(node)])
        self.binding = True
        self._results()
        self.settle()

    def _apply(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return ()
        found = rule(node)
        axes = (found.axes if found is not None else None) or default_rule(found.family if found else "")
        if axes is None:
            return self.unknown(node)
        result = axes(self, node)
        if node.target is _ADD and node.meta.get("phase") == Phase.FORWARD:
            a, b = node.args[:2]
            if a in self.activations and b in self.activations:
                self.adds.append((node, a, b))  # type: ignore[arg-type]
        return result

    def _inputs(self) -> None:
        graph, symbols = self.graph, self.graph.symbols
        fixed = {size: name for name, size in symbols.hints.items() if name == "batch" and name not in symbols.symbols}
        free = fixed | {self.size(symbol): name for name, symbol in symbols.symbols.items()}
        shared: dict[str, Factor] = {}
        named: dict[str, Dims] = {}
        for given, node in zip(graph.inputs, graph.placeholders, strict=True):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                self.dims[node] = ()
                continue
            like = named.get(given.name) if given.kind in _LIKE_PARAMETERS else None
            if like is not None and tuple(f.size for f in like) == self.sizes(node):
                self.dims[node] = like
                continue
            dims = [self.new(s) for s in self.sizes(node)]
            if given.kind in (InputKind.BATCH, InputKind.TANGENT):
                self.activations.add(node)
            if given.kind is InputKind.BATCH:
                for d, f in enumerate(dims):
                    name = free.get(f.size, "")
                    if name and f is not ONE and (name != "batch" or d == 0):
                        f = dims[d] = shared.setdefault(name, f)
                    if name == "batch" and d == 0:
                        self.tag(f, Tag.BATCH)
                        continue
                    integers = not value.dtype.is_floating_point
                    self.tag(f, Tag.INPUT | (Tag.SEQUENCE if name or (integers and d == 1) else 0))
                    self.freeze(f, f"dimension {d} of the input {given.name}")
            elif given.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                named[given.name] = tuple(dims)
            self.dims[node] = tuple(dims)

    def _results(self) -> None:
        """Gradients and new values are like what they are of; what the user sees keeps its order, but hidden states."""
        self.hidden = hidden_states(self.graph, self.activations)
        inputs = {(i.kind, i.name, i.field): n for i, n in zip(self.graph.inputs, self.graph.placeholders, strict=True)}
        outputs = {}
        for given, node in zip(self.graph.outputs, self.graph.results, strict=True):
            if node is None:
                continue
            self.at = node
            if given.kind is OutputKind.OUTPUT:
                outputs[given.name] = node
                for d, f in enumerate(() if given.name in self.hidden else self.of(node)):
                    if not find(f).tags & Tag.BATCH:
                        self.tag(f, Tag.OUTPUT)
                        self.freeze(f, f"dimension {d} of the output {given.name}")
                continue
            for kind in _SOURCES.get(given.kind, ()):
                source = inputs.get((kind, given.name, given.field))
                if source is not None and len(self.of(source)) == len(self.of(node)):
                    for a, b in zip(self.of(source), self.of(node), strict=True):
                        self.unify(a, b)
        for name, node in self.graph.input_nodes(InputKind.TANGENT).items():
            if name in outputs:
                self.at = node
                self.broadcast(self.of(node), self.of(outputs[name]))


_BINDING = (Phase.FORWARD, Phase.INPUT)
"""Whether indices mean something is decided by forward. Its derivative and the update follow: an operator of theirs
that mixes positions (``as_strided`` on a gradient) says nothing new."""
_COPIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
_ADD = torch.ops.aten.add.Tensor
_LIKE_PARAMETERS = (InputKind.STATE, InputKind.GRADIENT)
_SOURCES = {
    OutputKind.GRADIENT: (InputKind.PARAMETER, InputKind.BATCH),
    OutputKind.PARAMETER: (InputKind.PARAMETER,),
    OutputKind.BUFFER: (InputKind.BUFFER,),
    OutputKind.STATE: (InputKind.STATE,),
}
