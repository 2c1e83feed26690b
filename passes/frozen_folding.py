"""Frozen folding: a frozen convolution and the eval-mode batch norm behind it become one convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.graph.op_rules import bytes_moved, operand, operand_names
from graphopt.graph.sizes import nbytes
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._rewriting import Rewriting
from graphopt.passes._storage import geometry

aten = torch.ops.aten

NORMS = {
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
    aten.native_batch_norm.default,
}
"""Batch norms with fixed statistics (the last one only where its argument ``training`` is off)."""


@dataclass(frozen=True)
class FrozenFolding(Pass):
    """Fold an eval-mode batch norm into the weight and bias of the convolution it follows.

    With fixed statistics a batch norm is an affine map of each channel, ``y = (c - mean) * s + beta`` with
    ``s = gamma / sqrt(var + eps)``, and convolution is linear: ``y = conv(x, W * s) + (bias - mean) * s + beta``.
    The folded weight is computed *in the graph*, from the parameters as they are in each step, so that a later
    ``load_state_dict`` or assignment is followed. It costs a few operators on tensors of the weight's size
    and saves reading and writing the whole activation.

    Legal where the batch norm is the only reader of the convolution's result; rounding differs. Refused, with the
    reason:

    - something else reads that result, for example a backward operator: then it must be computed anyway;
    - a parameter of the two is trained, or is not an input of the graph;
    - dtypes are mixed (autocast), or the convolution is transposed;
    - folding would move more bytes than it saves at the batch size of the capture.

    ::

        %convolution = aten.convolution(%x, %w, ...)
        %norm = aten._native_batch_norm_legit_no_training(%convolution, %gamma, %beta, %mean, %var, 0.1, 1e-05)
        %getitem = getitem(%norm, 0)

    becomes::

        %add = aten.add.Tensor(%var, 1e-05)
        %rsqrt = aten.rsqrt(%add)
        %mul = aten.mul.Tensor(%rsqrt, %gamma)
        %view = aten.view(%mul, [-1, 1, 1, 1])
        %mul_1 = aten.mul.Tensor(%w, %view)
        %neg = aten.neg(%mean)
        %mul_2 = aten.mul.Tensor(%neg, %mul)
        %add_1 = aten.add.Tensor(%mul_2, %beta)
        %convolution = aten.convolution(%x, %mul_1, %add_1, ...)

    >>> from torch import nn
    >>> from graphopt.graph.capture import capture
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval().requires_grad_(False)
    >>> result = FrozenFolding()(capture(model, torch.randn(4, 3, 32, 32), backward=False))
    >>> for change in result.changes:
    ...     print(change.what)
    folded a batch norm into the weight of %convolution
    """

    name: ClassVar[str] = "frozen_folding"
    tier: ClassVar[Tier] = Tier.REORDERS

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        rewriting = Rewriting(self.name, graph)
        for norm in graph.nodes:
            if norm.target not in NORMS or ("training" in operand_names(norm) and operand(norm, "training")):
                continue
            convolution = operand(norm, "input")
            if convolution.target is not aten.convolution.default:
                continue
            why = _why_not(graph, convolution, norm)
            if why:
                rewriting.refuse(norm, f"batch norm after %{convolution.name}", why)
            else:
                _fold(rewriting, convolution, norm)
        return rewriting.finish()


def _why_not(graph: TrainingGraph, convolution: fx.Node, norm: fx.Node) -> str:
    """Why the two stay as they are; empty if they can be folded."""
    inputs = dict(zip(graph.placeholders, graph.inputs))
    trained = _trained(graph)
    for name, value in _parameters(convolution, norm).items():
        if value is None:
            continue
        if value not in inputs or inputs[value].kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            return f"{name} is not a parameter or buffer"
        if inputs[value].name in trained:
            return f"{name} is trained"
        if value.meta["val"].dtype != convolution.meta["val"].dtype:
            return f"{name} has another dtype"
    readers = [user for user in convolution.users if user is not norm]
    if readers:
        return f"%{readers[0].name} reads %{convolution.name}"
    parts = _parts(norm)
    statistics = [user for i, part in parts.items() if i > 0 for user in part.users]
    if statistics or 0 not in parts:
        return "its saved statistics are read" if statistics else "nobody reads it"
    if operand(convolution, "transposed"):
        return "the convolution is transposed"
    if geometry(parts[0]) != geometry(convolution):
        return "it changes dtype or layout"
    weight = nbytes(operand(convolution, "weight").meta["val"])
    evaluate = graph.symbols.evaluate
    if 2 * evaluate(weight) >= evaluate(bytes_moved(norm)):
        return "a folded weight would move more bytes than the batch norm does"
    return ""


def _parts(norm: fx.Node) -> dict[int, fx.Node]:
    """The results of a batch norm that have a node, by index."""
    return {user.args[1]: user for user in norm.users if user.target is getitem}  # type: ignore[misc]


def _parameters(convolution: fx.Node, norm: fx.Node) -> dict[str, fx.Node | None]:
    """What the folded weight and bias are computed from."""
    own = {f"the convolution's {name}": operand(convolution, name) for name in ("weight", "bias")}
    return own | {f"its {name}": operand(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}


def _trained(graph: TrainingGraph) -> set[str]:
    """Names of the parameters that have a gradient or a new value."""
    return {o.name for o in graph.outputs if o.kind in (OutputKind.GRADIENT, OutputKind.PARAMETER)}


def _fold(rewriting: Rewriting, convolution: fx.Node, norm: fx.Node) -> None:
    """Replace the two by one convolution."""

    def add(op: Callable[..., Any], *args: Any) -> fx.Node:
        return rewriting.add(op, *args, like=convolution, before=norm)

    def given(node: fx.Node, name: str) -> fx.Node | None:
        value = operand(node, name)
        return None if value is None else rewriting.at(value)

    weight, bias = given(convolution, "weight"), given(convolution, "bias")
    gamma, beta = given(norm, "weight"), given(norm, "bias")
    mean, variance = given(norm, "running_mean"), given(norm, "running_var")

    scale = add(aten.rsqrt.default, add(aten.add.Tensor, variance, operand(norm, "eps")))
    if gamma is not None:
        scale = add(aten.mul.Tensor, scale, gamma)
    kernel = operand(convolution, "weight").meta["val"]
    per_channel = add(aten.view.default, scale, [kernel.shape[0]] + [1] * (kernel.dim() - 1))
    folded_weight = add(aten.mul.Tensor, weight, per_channel)
    centre = add(aten.neg.default, mean) if bias is None else add(aten.sub.Tensor, bias, mean)
    folded_bias = add(aten.mul.Tensor, centre, scale)
    if beta is not None:
        folded_bias = add(aten.add.Tensor, folded_bias, beta)
    others = fx.node.map_arg(convolution.args[3:], rewriting.at)
    folded = add(aten.convolution.default, given(convolution, "input"), folded_weight, folded_bias, *others)
    parts = _parts(norm)
    dead = [part for i, part in parts.items() if i > 0]
    what = f"folded a batch norm into the weight of %{convolution.name}"
    rewriting.replace(parts[0], folded, what, also=dead)
