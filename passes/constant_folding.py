"""Constant folding: what depends on no input is computed once, and multiplying by one is not computed at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.graph.op_rules import is_pure, operand
from graphopt.graph.sizes import expression, nbytes
from graphopt.graph.storages import is_view, tensors, viewed
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._rewriting import CONSTANT_PREFIX, Rewriting
from graphopt.passes._storage import UNDEFINED, Storages, geometry, is_contiguous

aten = torch.ops.aten

LITERALS = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
"""What a trace wraps around a tensor that the traced code made from numbers, such as ``torch.tensor(2.0)``."""

FILLED = {
    aten.full.default: "fill_value", aten.full_like.default: "fill_value", aten.scalar_tensor.default: "s",
    aten.new_full.default: "fill_value", aten.ones.default: 1, aten.ones_like.default: 1, aten.new_ones.default: 1,
}  # fmt: skip
"""Operators that fill a tensor with one number: the name of the argument that holds it, or the number."""

NEUTRAL = {
    aten.mul.Tensor: (("self", "other"), ("other", "self")), aten.mul.Scalar: (("self", "other"),),
    aten.div.Tensor: (("self", "other"),), aten.div.Scalar: (("self", "other"),),
    aten.pow.Tensor_Scalar: (("self", "exponent"),),
}  # fmt: skip
"""Operators that give back their first operand where the second is one, and the pairs of names that can be those."""


@dataclass(frozen=True)
class ConstantFolding(Pass):
    """Compute operators on constants once, and drop products, quotients and powers with one.

    - An operator whose operands are numbers and constants (`full`, `arange`, `torch.tensor(2.0)` in the model's
      code, and what is computed from them) becomes a constant. Legal because pure operators give the same bits each
      time; it is the operator itself that runs, on its device. ``limit``: constants of more bytes are left to be
      computed in each step.
    - ``x * 1``, ``x / 1`` and ``x ** 1`` are ``x`` if type and layout stay the same, for real numbers, NaN,
      infinities and signed zeros included. (Not for complex ones, whose product with one makes NaN of infinities.)
      The one may be a number, a constant, or a fill of any size seen through views.

    Not identities, and left alone: ``x + 0.0`` (turns -0.0 into 0.0) and ``x * 0`` (NaN and infinities stay NaN).
    Left alone too: symbolic sizes, random operators, undefined memory, results in storages of outputs (the caller
    would hold the constant itself), and tensors that are attributes of the model (it may change them later).

    ::

        %full = aten.full([], 1.0)
        %div = aten.div.Scalar(%full, 4)      becomes  %folded_0 = constant folded_0
        %mul = aten.mul.Tensor(%x, %div)               %mul = aten.mul.Tensor(%x, %folded_0)
        %mul_1 = aten.mul.Tensor(%mul, 1.0)
        return %mul_1                                  return %mul

    >>> from graphopt.graph.capture import capture
    >>> class Scaled(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x * (torch.arange(3.0) + 1).sqrt() * 1.0
    >>> graph = capture(Scaled(), torch.randn(4, 3), backward=False)
    >>> for change in ConstantFolding()(graph).changes:
    ...     print(change.what)
    folded aten.sqrt into a constant of 12 bytes
    removed aten.mul.Tensor: the other operand is 1
    """

    limit: int = 1 << 16

    name: ClassVar[str] = "constant_folding"
    tier: ClassVar[Tier] = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        rewriting, storages = Rewriting(self.name, graph), Storages(graph)
        known = self._evaluate(graph)
        unchanged = self._unchanged(graph, known, storages, rewriting)
        folded = self._folded(graph, known, unchanged, storages, rewriting)
        for node in graph.nodes:
            name = operator_text(node.target)
            if node in unchanged:
                rewriting.replace(node, unchanged[node], f"removed {name}: the other operand is 1")
            elif node in folded:
                constant = rewriting.add_constant(known[node].clone(), like=node)
                rewriting.replace(node, constant, f"folded {name} into a constant of {known[node].nbytes} bytes")
        return rewriting.finish()

    def _evaluate(self, graph: TrainingGraph) -> dict[fx.Node, Any]:
        """Values of the nodes that depend on no input, as far as they are small enough."""
        known: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(CONSTANT_PREFIX):
                known[node] = graph.constants[str(node.target)]
            if node.op != "call_function":
                continue
            operands = node.all_input_nodes
            if node.target in LITERALS and operands[0].op == "get_attr":
                values = {operands[0]: graph.constants[str(operands[0].target)]}
            else:
                values = known
            if all(operand in values for operand in operands) and self._may_evaluate(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known

    def _may_evaluate(self, node: fx.Node) -> bool:
        made = tensors(node.meta.get("val"))
        sizes = [nbytes(t) for t in made]
        return (
            bool(made)
            and all(isinstance(size, int) and size <= self.limit for size in sizes)
            and all(_is_here(t.device) for t in made)
            and all(isinstance(expression(s), int) for t in made for s in t.shape)
            and is_pure(node)
            and getattr(node.target, "overloadpacket", None) not in UNDEFINED
        )

    def _unchanged(
        self, graph: TrainingGraph, known: dict[fx.Node, Any], storages: Storages, rewriting: Rewriting
    ) -> dict[fx.Node, fx.Node]:
        """Products, quotients and powers with one, and the operand that each gives back."""
        same: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            source = _other_than_one(node, known) if node.target in NEUTRAL and node not in known else None
            if source is None:
                continue
            source = same.get(source, source)
            why = storages.why_not(node, source)
            if why:
                rewriting.refuse(node, f"{operator_text(node.target)} with 1", why)
            else:
                storages.merge(node, source)
                same[node] = source
        return same

    def _folded(
        self,
        graph: TrainingGraph,
        known: dict[fx.Node, Any],
        unchanged: dict[fx.Node, fx.Node],
        storages: Storages,
        rewriting: Rewriting,
    ) -> set[fx.Node]:
        """The nodes that become constants: those that are read by what is not folded itself."""
        chosen: set[fx.Node] = set()
        needed = {result for result in graph.results if result is not None}
        for node in reversed(graph.nodes):
            if node in unchanged:
                needed.add(unchanged[node])
                continue
            if node in known and node not in needed:
                continue
            if node in known and node.op == "call_function" and _fits(node, known[node]):
                if not storages.has_output(node):
                    chosen.add(node)
                    continue
                rewriting.refuse(node, operator_text(node.target), "an output would be the constant itself")
            needed.update(node.all_input_nodes)
        return chosen


def _other_than_one(node: fx.Node, known: dict[fx.Node, Any]) -> fx.Node | None:
    """The operand that a product, quotient or power with one gives back; None if it does not."""
    lies = geometry(node)
    if lies is None or node.meta["val"].is_complex():
        return None
    for first, second in NEUTRAL[node.target]:  # type: ignore[index]
        source = operand(node, first)
        if isinstance(source, fx.Node) and geometry(source) == lies and _uniform(operand(node, second), known) == 1:
            return source
    return None


def _is_here(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _fits(node: fx.Node, value: Any) -> bool:
    """Whether a value can stand for the node as a constant: a contiguous tensor of the type that was captured."""
    fake = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not is_contiguous(node) or (is_view(node) and not value.is_contiguous()):
        return False
    return (value.dtype, value.shape, value.stride()) == (fake.dtype, fake.shape, fake.stride())


def _keeps_elements(node: fx.Node) -> bool:
    """Whether a view shows elements as they are, not as another type, conjugated or negated."""
    if not is_view(node):
        return False
    value, source = node.meta.get("val"), viewed(node).meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    return (value.dtype, value.is_neg(), value.is_conj()) == (source.dtype, source.is_neg(), source.is_conj())


def _uniform(value: Any, known: dict[fx.Node, Any]) -> Any:
    """The number that all elements of an argument are, None if they differ or are not known."""
    while isinstance(value, fx.Node) and value not in known and _keeps_elements(value):
        value = viewed(value)
    if not isinstance(value, fx.Node):
        return value
    if value in known:
        tensor = known[value]
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            return None
        first = tensor.reshape(-1)[0]
        return first.item() if bool((tensor == first).all()) else None
    filled = FILLED.get(value.target)  # type: ignore[call-overload]
    filled = operand(value, filled) if isinstance(filled, str) else filled
    return None if isinstance(filled, fx.Node) else filled
