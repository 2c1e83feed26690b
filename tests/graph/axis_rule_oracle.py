"""The truth about axis rules, operator by operator: it is run with an axis permuted wherever the rule sees it.

A rule says which dimensions of operands and results are the same axis. If the indices of an axis that nothing freezes
are permuted in all operands, the results must be the former ones, permuted in their own dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.graph.axes import Axes, Axis, Dim, analyse
from graphopt.graph.axes.axis import Form
from graphopt.graph.op_rules import RULES, is_random, rule
from graphopt.graph.training_graph import Input, InputKind, Phase, Signature, TrainingGraph


@dataclass(frozen=True)
class Call:
    """An operator and concrete arguments. ``kernel`` runs in its place where it has none here."""

    operator: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    kernel: Callable[..., Any] | None = None

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """The results with other tensors in the place of its own, in their order."""
        rest = iter(tensors)
        other = lambda v: next(rest).clone() if isinstance(v, torch.Tensor) else v
        args, kwargs = pytree.tree_map(other, (self.args, self.kwargs))
        with torch.no_grad():
            return (self.kernel or self.operator)(*args, **kwargs)

    def key(self) -> Any:
        """The operator and its arguments, with shapes and types in the place of tensors."""
        shown = lambda v: (v.dtype, tuple(v.shape), v.stride()) if isinstance(v, torch.Tensor) else v
        return self.operator, repr(pytree.tree_map(shown, (self.args, self.kwargs)))

    def tensors(self) -> list[torch.Tensor]:
        """Its tensors in order."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, torch.Tensor)]


@dataclass(frozen=True)
class Seen:
    """What the analysis says of a call: the dimensions of each operand and of each result (None where it is none)."""

    call: Call
    node: fx.Node
    axes: Axes
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...] | None, ...]
    values: tuple[torch.Tensor | None, ...]

    def all_axes(self) -> tuple[Axis, ...]:
        """All axes of operands and results."""
        dims = (d for t in (*self.operands, *self.results) for d in t or ())
        return tuple(dict.fromkeys(a for d in dims for a in d.axes()))


def entry_of(operator: Any) -> Any:
    """The key of the operator's entry in `RULES`: its overload, or its packet."""
    return operator if operator in RULES else operator.overloadpacket


def analysed(call: Call) -> Seen:
    """A graph of this one operator, all tensors of which are parameters, and its axes."""
    graph, placeholders = fx.Graph(), []

    def placeholder(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(placeholders)}")
        node.meta.update(val=value, phase=Phase.INPUT)
        placeholders.append(node)
        return node

    args, kwargs = pytree.tree_map(placeholder, (call.args, call.kwargs))
    node = graph.call_function(call.operator, args, kwargs)
    value = call.run(call.tensors())
    node.meta.update(val=tuple(value) if isinstance(value, list) else value, phase=Phase.FORWARD)
    graph.output(())
    inputs = tuple(Input(InputKind.PARAMETER, n.name) for n in placeholders)
    axes = analyse(TrainingGraph(graph, Signature(inputs, ())))
    found = axes.of(node)
    several = isinstance(value, (tuple, list))
    dims, values = (found, value) if several else ((found,), (value,))
    is_tensor = [isinstance(v, torch.Tensor) for v in values]
    return Seen(
        call, node, axes,
        tuple(axes.of(n) for n in placeholders),
        tuple(d if t else None for d, t in zip(dims, is_tensor)),
        tuple(v if t else None for v, t in zip(values, is_tensor)),
    )  # fmt: skip


def permutable(axis: Axis) -> bool:
    """Whether the analysis says that the indices of the axis may be permuted (a softmax keeps them from shrinking)."""
    return not axis.reason or axis.reason.startswith("a softmax")


def permuted(tensor: torch.Tensor, dims: tuple[Dim, ...], chosen: dict[Axis, torch.Tensor]) -> torch.Tensor:
    """The tensor with these indices of axes in its dimensions; the same memory format."""
    result = tensor
    for d, dim in enumerate(dims):
        if any(axis in chosen for axis in dim.axes()):
            result = result.index_select(d, dim.indices(chosen))
    return torch.empty_like(tensor).copy_(result) if result is not tensor else tensor


def shuffles(size: int) -> tuple[torch.Tensor, ...]:
    """A rotation and an exchange of two: what commutes with both commutes with all permutations."""
    if size < 2:
        return ()
    exchanged = torch.arange(size)
    exchanged[:2] = torch.tensor([1, 0])
    return (exchanged,) if size == 2 else (exchanged, torch.arange(size).roll(1))


def commutes(seen: Seen, axis: Axis, places: set[int] | None = None) -> bool:
    """Whether permuting the axis in the operands (those in ``places`` only) permutes the results as their dims say."""
    for order in shuffles(int(axis.size)):
        chosen = {axis: order}
        tensors = [
            permuted(t, dims, chosen) if places is None or i in places else t
            for i, (t, dims) in enumerate(zip(seen.call.tensors(), seen.operands, strict=True))
        ]
        again = seen.call.run(tensors)
        again = again if isinstance(again, (tuple, list)) else (again,)
        for before, dims, after in zip(seen.values, seen.results, again, strict=True):
            if before is not None and dims is not None:
                if not _close(after, permuted(before, dims, chosen)):
                    return False
    return True


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    near = {torch.bfloat16: 0.05, torch.float32: 1e-4}.get(a.dtype, 1e-7)
    return torch.allclose(a, b, near, near, equal_nan=True)


def assert_true(call: Call) -> Seen:
    """Check the axis rule of the operator on this call; see the module."""
    seen = analysed(call)
    what = f"{call.operator}: {text_of(seen)}"
    assert rule(seen.node) is not None, f"{call.operator} has no entry"
    assert not seen.axes.unknown and not seen.axes.contradictions, (what, seen.axes.contradictions)
    for value, dims in zip((*call.tensors(), *seen.values), (*seen.operands, *seen.results), strict=True):
        if value is not None:
            assert dims is not None and tuple(d.count({}) for d in dims) == value.shape, (what, tuple(value.shape))
    if is_random(seen.node) or "empty" in str(call.operator):
        return seen
    for axis in filter(permutable, seen.all_axes()):
        assert commutes(seen, axis), f"{what}: the results do not follow the axis of size {axis.size}"
    return seen


def text_of(seen: Seen) -> str:
    """``a B, B c -> a c``: the dimensions of operands and results, a letter an axis; a capital for one that is fixed.

    Products are ``a*b``, concatenations ``(a + b)``.
    """
    letters: dict[Axis, str] = {}

    def show(dim: Dim) -> str:
        if dim.axis is not None:
            letter = letters.setdefault(dim.axis, ascii_lowercase[len(letters)])
            return letter if permutable(dim.axis) else letter.upper()
        if not dim.parts:
            return "1"
        text = (" + " if dim.form is Form.CONCAT else "*").join(map(show, dim.parts))
        return f"({text})" if dim.form is Form.CONCAT else text

    sides = (", ".join(" ".join(map(show, t)) for t in ts if t is not None) for ts in (seen.operands, seen.results))
    return " -> ".join(sides)


class _Recorder(TorchDispatchMode):
    """Keeps the functional operators that run, with copies of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable and (entry_of(func) in RULES or torch.Tag.pointwise in func.tags):
            copied = pytree.tree_map_only(torch.Tensor, _copy, (args, kwargs))
            self.calls.append(Call(func, *copied))
        return func(*args, **kwargs)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return made.copy_(tensor) if 0 not in tensor.stride() else tensor.detach().clone()


def recorded(call: Call) -> list[Call]:
    """The operators that a call runs, and those of its backward with respect to all floats in its arguments; to the
    first one where torch does not differentiate all."""
    floating = [t for t in call.tensors() if t.is_floating_point() or t.is_complex()]
    for wanted in (floating, floating[:1], []):
        try:
            return _recorded(call, wanted)
        except (RuntimeError, ValueError, NotImplementedError):
            pass
    return []


def _recorded(call: Call, wanted: list[torch.Tensor]) -> list[Call]:
    leaf = lambda t: t.detach().clone().requires_grad_(any(t is w for w in wanted))
    args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (call.args, call.kwargs))
    with _Recorder() as recorder:
        found = pytree.tree_leaves(call.operator(*args, **kwargs))
        results = [r for r in found if isinstance(r, torch.Tensor) and r.requires_grad]
        if results:
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
            torch.autograd.grad(results, inputs, [torch.randn_like(r) for r in results], allow_unused=True)
    return recorder.calls
