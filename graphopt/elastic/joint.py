"""`joint`: forward and backward of a subnet, quickly.

To derive a backward means to trace one. But two subnets that differ in sizes of axes only have the same operators in
their backward. So for each pattern of layers and kernels the backward is traced once, at the full sizes of axes, and
then resized: numbers that are sizes in disguise (the backward of a mean divides by how many) are explained by
`scalar_literals`, which traces twice more. That is done for a pattern that is asked for the second time; the first
subnet of a pattern, and what cannot be resized (a size of 1, which changes broadcasting; a head size, by which kernels
are chosen), are traced by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from graphopt.elastic.axis_sizes import correspond
from graphopt.elastic.kept import Kept
from graphopt.elastic.subnet import Subnet
from graphopt.elastic.supergraph import Supergraph
from graphopt.elastic.transformations import is_transformed
from graphopt.errors import AxisError
from graphopt.graph.axes import Axis, Dim, Kind
from graphopt.graph.differentiate import with_backward
from graphopt.graph.draft import Draft
from graphopt.graph.resize import Resizer
from graphopt.graph.scalar_literals import Scalar, scalar_literals
from graphopt.graph.training_graph import TrainingGraph


def joint(subnet: Subnet) -> TrainingGraph:
    """The joint graph of a subnet: `with_backward` of its forward graph; kept.

    Raises CaptureError where an operator has no derivative.
    """
    found = subnet.derived.get("joint")
    if found is None:
        joints = subnet.origin.derived.setdefault("joints", Joints(subnet.origin))
        found = subnet.derived["joint"] = joints.of(subnet)
    return found


class Joints:
    """The joint graphs of a supergraph's subnets."""

    def __init__(self, supergraph: Supergraph):
        self.supergraph = supergraph
        self._asked: Kept[bool] = Kept()
        self._patterns: Kept[_Pattern | None] = Kept()

    def of(self, subnet: Subnet) -> TrainingGraph:
        """The joint graph of one of them."""
        if is_transformed(subnet):  # by functions of the weight at this very size
            return with_backward(subnet.graph)
        key = subnet.pattern.key()
        if key not in self._patterns and key in self._asked:
            try:
                self._patterns[key] = _Pattern(self.supergraph, self.supergraph.subnet(subnet.pattern))
            except AxisError:  # the operators of the backward depend on sizes: each subnet is traced
                self._patterns[key] = None
        self._asked[key] = True
        pattern = self._patterns[key] if key in self._patterns else None  # noqa: SIM401  (it has no get)
        resized = pattern.resized(subnet.chosen) if pattern is not None else None
        return resized if resized is not None else with_backward(subnet.graph)


class _Pattern:
    """The joint graph of a pattern of layers at the full sizes of axes, ready to be resized."""

    def __init__(self, supergraph: Supergraph, base: Subnet):
        self.joint = with_backward(base.graph)
        forward = base.graph.axes
        self.twins = correspond(supergraph.axes, self.joint.axes)
        inside = correspond(supergraph.axes, forward)
        wanted = [inside[axis] for axis in supergraph.elastic_axes() if axis in inside]
        scalars = scalar_literals(base.graph, self.joint, forward, only=wanted)
        between = correspond(forward, self.joint.axes)
        self.resizer = Resizer(self.joint.axes, [_translated(scalar, between) for scalar in scalars])

    def resized(self, chosen: Mapping[Axis, torch.Tensor]) -> TrainingGraph | None:
        """The joint graph at other sizes; None where it has to be traced."""
        if any(axis not in self.twins or axis.kind is Kind.HEAD_SIZE or len(i) < 2 for axis, i in chosen.items()):
            return None
        draft = Draft(self.joint)
        try:
            self.resizer.resize(draft, {self.twins[axis]: kept for axis, kept in chosen.items()}, checked=False)
        except AxisError:
            return None
        return draft.finish()


def _translated(scalar: Scalar, twins: Mapping[Axis, Axis]) -> Scalar:
    """The scalar in terms of the axes of the joint graph. Raises AxisError where they are others."""
    if scalar.dim is None:
        return scalar
    missing = next((axis for axis in scalar.dim.axes() if axis not in twins), None)
    if missing is not None:
        raise AxisError(f"{scalar}: {missing!r} is no axis of the joint graph")
    return replace(scalar, dim=_replaced(scalar.dim, twins))


def _replaced(dim: Dim, twins: Mapping[Axis, Axis]) -> Dim:
    axis = twins[dim.axis] if dim.axis is not None else None
    return Dim(dim.form, tuple(_replaced(part, twins) for part in dim.parts), axis)
