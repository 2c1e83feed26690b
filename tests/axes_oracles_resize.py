"""Oracles of resizing, by execution in float64.

*Model*: a resized graph with sliced parameters gives the outputs and gradients of the module that was built at that
size and loaded with the same numbers. *Mask*: where no statistics run over an axis, zeros in the place of its indices
in all parameters give the outputs that leaving them out gives. *Backward*: the joint graph derived from a resized graph
gives the gradients that autograd finds in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import AxisError, CaptureError, GraphoptError
from graphopt.graph.axes import Axes, Axis, Kind, analyse
from graphopt.graph.batch import flatten
from graphopt.graph.differentiate import with_backward
from graphopt.graph.forward import capture_forward
from graphopt.graph.lowering import binding
from graphopt.graph.op_rules.arguments import operand, operand_names
from graphopt.graph.op_rules.queries import is_random
from graphopt.graph.resize import indices, resize, take
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from tests.structures import rescaled, tensors

TOLERANCE = 1e-6
"""Of the largest value of a tensor: what another order of summation may change in a deep model."""

Numbers = Mapping[str, Tensor]


def double(value: Any) -> Any:
    """Floating-point tensors of any nesting in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def compute(graph: TrainingGraph, values: dict[fx.Node, Any]) -> None:
    """Add the values of all operators to those of the inputs; what would be float32 is float64."""
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = double(graph.constants[str(node.target)])
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            values[node] = binding(node.target)(*args, **kwargs)


def run(graph: TrainingGraph, numbers: Numbers, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """The results of a forward graph by name, without new values of buffers; autograd records if it is on."""
    rest = iter(batch)
    values: dict[fx.Node, Any] = {}
    for given, node in zip(graph.inputs, graph.placeholders, strict=True):
        values[node] = next(rest) if given.kind is InputKind.BATCH else numbers[given.name]
    compute(graph, values)
    pairs = zip(graph.outputs, graph.results, strict=True)
    return {f"{o.kind} {o.name}": values[r] for o, r in pairs if r is not None and o.kind is not OutputKind.BUFFER}


def gradients(results: Sequence[Tensor], of: Numbers) -> dict[str, Tensor]:
    """Gradients of a sum of all results with weights that differ from one element to the next; zero where none."""
    total = sum((r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    found = torch.autograd.grad(total, list(of.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(of.items(), found, strict=True)}


def far(name: str, a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> str:
    """Says how two values differ by more than rounding; empty if they do not. ``tolerance``: of the largest value."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape:
        return f"{name} has the shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if not a.is_floating_point() or not a.numel():
        return "" if a.equal(b) else f"{name} differs"
    scale = max(1e-6, float(b.abs().nan_to_num(0, 0, 0).max()))
    if torch.allclose(a / scale, b / scale, tolerance, tolerance, equal_nan=True):
        return ""
    return f"{name} differs by {float((a - b).abs().max() / scale):.1e} of its largest value"


def first(problems: Any) -> str:
    return next(filter(None, problems), "")


def leaves(numbers: Numbers, names: Any) -> dict[str, Tensor]:
    """The tensors with these names as leaves of a new autograd graph."""
    return {n: numbers[n].detach().clone().requires_grad_() for n in names}


def against_module(graph: TrainingGraph, numbers: Numbers, small: nn.Module, batch: Sequence[Tensor]) -> str:
    """Whether the graph is ``small``, which is loaded with ``numbers``: outputs and gradients of all its parameters."""
    trained = [n for n, p in small.named_parameters() if p.requires_grad]
    given = leaves(numbers, trained)
    ours = run(graph, {**numbers, **given}, batch)
    with torch.no_grad():
        for name, tensor in tensors(small).items():
            tensor.copy_(numbers[name])
    result = small(*batch)
    theirs = [result] if isinstance(result, Tensor) else list(result)
    if problem := first(far(n, a, b) for (n, a), b in zip(ours.items(), theirs, strict=True)):
        return problem
    parameters = dict(small.named_parameters())
    mine, right = (
        gradients(list(ours.values()), given),
        gradients(theirs, {n: parameters[n] for n in trained}),
    )
    return first(far(f"gradient of {n}", mine[n], right[n]) for n in trained)


def backward_agrees(graph: TrainingGraph, numbers: Numbers, batch: Sequence[Tensor]) -> str:
    """Whether the joint graph that is derived from ``graph`` has the gradients that autograd finds in it."""
    joint = with_backward(graph)
    wanted = [n for n in joint.output_nodes(OutputKind.GRADIENT) if n in graph.input_nodes(InputKind.PARAMETER)]
    given = leaves(numbers, wanted)
    results = run(graph, {**numbers, **given}, batch)
    right = gradients(list(results.values()), given)
    weights = {n: torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape) for n, r in results.items()}
    tangents = {f"tangent {n.partition(' ')[2]}": weight for n, weight in weights.items()}
    got = run_joint(joint, numbers, batch, tangents)
    return first(far(f"gradient of {n}", got[n], right[n]) for n in wanted if got[n] is not None)


def run_joint(
    joint: TrainingGraph, numbers: Numbers, batch: Sequence[Tensor], tangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients that a joint graph gives, by the name of what they are of."""
    rest = iter(batch)
    values: dict[fx.Node, Any] = {}
    for given, node in zip(joint.inputs, joint.placeholders, strict=True):
        if given.kind is InputKind.BATCH:
            values[node] = next(rest)
        else:
            values[node] = tangents[str(given)] if given.kind is InputKind.TANGENT else numbers[given.name]
    with torch.no_grad():
        compute(joint, values)
    gradient = joint.output_nodes(OutputKind.GRADIENT)
    return {n: values[node] for n, node in gradient.items() if node is not None}


_COUNTING = {"mean", "amax", "amin", "max", "min", "std", "var", "std_mean", "var_mean", "norm", "linalg_vector_norm",
             "logsumexp", "prod"}  # fmt: skip


def maskable(axes: Axes, axis: Axis) -> bool:
    """Whether zeros say the same as absence: not where a mean counts indices, a maximum sees them, a norm of zeros
    divides, or attention scales by how many there are."""
    if axis.statistics or axis.kind is Kind.HEAD_SIZE:
        return False
    for node in axes.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_opname", "") in _COUNTING:
            dims = axes.of(node.args[0])
            over = operand(node, "dim") if "dim" in operand_names(node) else None
            over = range(len(dims)) if over in (None, []) else [over] if isinstance(over, int) else over
            if any(axis in dims[d].axes() for d in over):
                return False
    return True


def masked(axes: Axes, numbers: Numbers, keep: Mapping[Axis, Tensor]) -> dict[str, Tensor]:
    """The numbers with zeros wherever an index stands that does not remain."""
    result = dict(numbers)
    for name, rows in indices(axes, keep=keep).items():
        if name not in numbers or not numbers[name].is_floating_point():
            continue
        mask = torch.ones((), dtype=numbers[name].dtype)
        for dim, chosen in enumerate(rows):
            if chosen is not None:
                line = torch.zeros(numbers[name].shape[dim], dtype=mask.dtype)
                line[chosen] = 1
                mask = mask * line.view([-1 if d == dim else 1 for d in range(len(rows))])
        result[name] = numbers[name] * mask
    return result


def kept(axis: Axis, size: int, seed: int = 0) -> Tensor:
    """``size`` indices of an axis at random, in order."""
    generator = torch.Generator().manual_seed(seed + int(axis.size))
    return torch.randperm(int(axis.size), generator=generator)[:size].sort().values


@dataclass
class Resizing:
    """What `check_resizing` found. ``refused`` and ``wrong``: groups by name, and why."""

    tried: int = 0
    resized: int = 0
    masks: int = 0
    backward: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = Counter(self.refused.values())
        lines = [
            f"{self.resized} of {self.tried} resized, {self.masks} masks and {self.backward} backward graphs agree"
        ]
        lines += [f"refused {count}: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines + [f"WRONG {name}: {problem}" for name, problem in self.wrong.items()])


def check_resizing(
    model: nn.Module, batch: Any, *, loss: Any = None, limit: int | None = None, values: bool = True
) -> Resizing:
    """Halve every free group of a model's forward graph (``limit``: so many of them, evenly), then all of them at once.

    With ``values``, the resized graphs are run, masks are compared where `maskable`, and the backward of the graph with
    all groups resized is compared with autograd's. Float64, eval mode, parameters spread (`rescaled`). Where the model
    has no float64 form, shapes alone are compared.
    """
    model = rescaled(model, 1).double().eval()
    given = [t.double() if t.is_floating_point() else t for t in flatten(batch)[0]]
    try:
        graph = capture_forward(model, double(batch), loss=loss)
    except GraphoptError:  # operators without a float64 kernel (grouped products of experts)
        graph, values = capture_forward(model.float(), batch, loss=loss), False
    axes, numbers, report = analyse(graph), {n: t.detach() for n, t in tensors(model).items()}, Resizing()
    values = values and not any(is_random(n) for n in graph.nodes)
    free = [g for g in axes.groups() if g.free and g.size > 1]
    single = free[:: max(1, -(-len(free) // limit))] if limit else free
    jobs = {g.name: [g] for g in single}
    if len(free) > 1:
        jobs["all groups"] = free
    for name, group in jobs.items():
        report.tried += 1
        keep = {g: kept(g, int(g.size) // 2) for g in group}
        try:
            small = resize(graph, axes, keep=keep)
        except AxisError as error:
            report.refused[name] = str(error)
            continue
        report.resized += 1
        if not values:
            continue
        sliced = take(numbers, indices(axes, keep=keep))
        with torch.no_grad():
            ours = run(small, sliced, given)
            if all(maskable(axes, axis) for axis in group):
                right = run(graph, masked(axes, numbers, keep), given)
                report.masks += 1
                if problem := first(far(n, ours[n], right[n]) for n in ours):
                    report.wrong[name] = f"mask: {problem}"
        if name == "all groups" or len(jobs) == 1:
            try:
                problem = backward_agrees(small, sliced, given)
                report.backward += 1
            except CaptureError as error:
                problem, report.refused["backward"] = "", str(error)
            if problem:
                report.wrong[name] = f"backward: {problem}"
    return report
