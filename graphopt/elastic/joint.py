"""`joint`: forward and backward of a subnet, quickly.

To derive a backward means to trace one. But two subnets that differ in sizes of axes only have the same operators in
their backward, and one that has fewer layers has some of them (`elastic.left_out`). So the backward of the whole
net is traced once, layers are taken out of it, and what is left is resized: numbers that are sizes in disguise (the
backward of a mean divides by how many) are explained by `scalar_literals`, which traces twice more. That is done when a
second subnet is asked for. The first one is traced by itself, and so is what cannot be resized (a size of 1, which
changes broadcasting; a head size, by which kernels are chosen).

Kernel sizes change the operators, so each combination of them is a net of its own in this; and so is each pattern of
layers whose backward cannot be told from that of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphopt.elastic.axis_sizes import correspond
from graphopt.elastic.choice import Choice
from graphopt.elastic.depths import left_out
from graphopt.elastic.kept import Kept
from graphopt.elastic.left_out import Inseparable, LayeredJoint, LeftOut
from graphopt.elastic.subnet import Subnet
from graphopt.elastic.supergraph import Supergraph
from graphopt.elastic.transformations import is_transformed
from graphopt.errors import AxisError
from graphopt.graph.axes import Axis, Dim, Kind
from graphopt.graph.depth import Run
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
        found = subnet.derived["joint"] = _joints(subnet).of(subnet)
    return found


def layered(subnet: Subnet) -> LayeredJoint:
    """The joint graph of the net with all layers and full axes that a subnet is a part of; kept."""
    joints = _joints(subnet)
    return joints.stem(joints.with_all_layers(subnet.pattern)).layered


def _joints(subnet: Subnet) -> Joints:
    found: Joints = subnet.origin.derived.setdefault("joints", Joints(subnet.origin))
    return found


class Joints:
    """The joint graphs of a supergraph's subnets."""

    def __init__(self, supergraph: Supergraph):
        self.supergraph = supergraph
        self._asked: Kept[bool] = Kept()
        self._stems: Kept[_Stem] = Kept()

    def of(self, subnet: Subnet) -> TrainingGraph:
        """The joint graph of one of them."""
        if is_transformed(subnet):  # by functions of the weight at this very size
            return with_backward(subnet.graph)
        whole = self.with_all_layers(subnet.pattern)
        for pattern in {whole.key(): whole, subnet.pattern.key(): subnet.pattern}.values():
            before, self._asked[pattern.key()] = pattern.key() in self._asked, True
            if not before:
                continue
            try:
                return self.stem(pattern).of(subnet) or with_backward(subnet.graph)
            except Inseparable:
                continue
        return with_backward(subnet.graph)

    def stem(self, pattern: Choice) -> _Stem:
        """The joint graph of a pattern, made for smaller subnets of it."""
        if pattern.key() not in self._stems:
            self._stems[pattern.key()] = _Stem(self.supergraph, self.supergraph.subnet(pattern))
        return self._stems[pattern.key()]

    def with_all_layers(self, pattern: Choice) -> Choice:
        """The pattern with the layers that it leaves out, and those at their full kernels."""
        handles = self.supergraph.handles
        full = {n: handles[n].full for n in pattern if n in handles and (handles[n].first or n in pattern.inactive)}
        values = {**pattern, **full}
        return Choice(values, self.supergraph.inactive(values))


class _Stem:
    """The joint graph of a subnet with all axes at their full size, to take layers out of and to resize."""

    def __init__(self, supergraph: Supergraph, base: Subnet):
        self.supergraph, self.base = supergraph, base
        handles = supergraph.handles
        self._depths = {n: h for n, h in handles.items() if h.first and n in base.pattern}
        self._gone = {run.exit for run in self._missing(base.pattern)}
        runs = [run for handle in self._depths.values() for run in left_out(handle, ())]
        self.layered = LayeredJoint(base.graph, [run for run in runs if run.exit not in self._gone])
        self._left_out: Kept[LeftOut] = Kept()

    def of(self, subnet: Subnet) -> TrainingGraph | None:
        """The joint graph of a smaller subnet; None where it has to be traced.

        Raises Inseparable where layers cannot be taken out."""
        sizes = subnet.chosen
        if any(axis.kind is Kind.HEAD_SIZE or len(indices) < 2 for axis, indices in sizes.items()):
            return None
        draft = Draft(self.layered.graph)
        runs = [run for run in self._missing(subnet.pattern) if run.exit not in self._gone]
        if runs:
            self._without(runs).take_out(draft)
        if sizes:
            if self._resizing is None or any(axis not in self._resizing.twins for axis in sizes):
                return None
            try:
                chosen = {self._resizing.twins[axis]: kept for axis, kept in sizes.items()}
                self._resizing.resizer.resize(draft, chosen, checked=False)
            except AxisError:
                return None
        return draft.finish()

    def _missing(self, pattern: Choice) -> list[Run]:
        return [run for name, handle in self._depths.items() for run in left_out(handle, pattern[name])]

    def _without(self, runs: Sequence[Run]) -> LeftOut:
        key = tuple(run.exit for run in runs)
        if key not in self._left_out:
            self._left_out[key] = self.layered.without(runs)
        return self._left_out[key]

    @cached_property
    def _resizing(self) -> _Resizing | None:
        """None where operators of the backward depend on sizes: then each subnet is traced."""
        try:
            return _Resizing.of(self.supergraph, self.base.graph, self.layered.graph)
        except AxisError:
            return None


@dataclass(frozen=True)
class _Resizing:
    """A joint graph's `Resizer`; ``twins``: its axes by those of the supergraph."""

    resizer: Resizer
    twins: Mapping[Axis, Axis]

    @classmethod
    def of(cls, supergraph: Supergraph, forward: TrainingGraph, joint: TrainingGraph) -> _Resizing:
        """Raises AxisError as `scalar_literals` does."""
        inside = correspond(supergraph.axes, forward.axes)
        wanted = [inside[axis] for axis in supergraph.elastic_axes() if axis in inside]
        scalars = scalar_literals(forward, joint, forward.axes, only=wanted)
        between = correspond(forward.axes, joint.axes)
        resizer = Resizer(joint.axes, [_translated(scalar, between) for scalar in scalars])
        return cls(resizer, correspond(supergraph.axes, joint.axes))


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
