"""`ShrinkAxes`: a forward graph with smaller axes, on slices of the tensors it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.axes import Axis
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import bytes_moved
from graphopt.graph.resize import Resizer, cuts_of
from graphopt.graph.torch_internals import fake_mode_of
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Saving, Tier

_SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class ShrinkAxes(Pass):
    """Shrink axes of a forward graph (`graphopt.capture_forward`): the first so many indices remain.

    Inputs stay what they are, full-size and shared: the graph slices parameters and buffers, so gradients of a backward
    that is derived from it (`graphopt.with_backward`) are full-size, zero beside the slice. New values of buffers are
    scattered into the old ones. Numbers in arguments, constants and metadata follow.

    Legal because an axis is a group of dimensions of which the analysis knows every place; an axis that is not free is
    refused with its reason. The result is another, smaller function of the same weights: the one other passes keep.

    Before::

        %linear = aten.linear(%x, %up)          # f32[batch, 0.hidden=8]
        %linear_1 = aten.linear(%linear, %down)

    After, with ``sizes=(("0.hidden", 6),)``::

        %slice = aten.slice(%up, 0, 0, 6)
        %slice_1 = aten.slice(%down, 1, 0, 6)
        %linear = aten.linear(%x, %slice)       # f32[batch, 0.hidden=6]
        %linear_1 = aten.linear(%linear, %slice_1)

    Args:
        sizes: ``((name of the axis, size), ...)``.
    """

    name: ClassVar[str] = "shrink_axes"
    tier: ClassVar[Tier] = Tier.REORDERS
    sizes: tuple[tuple[str, int], ...]

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        axes, refusals = graph.axes, []
        resizer = Resizer(axes)
        chosen: dict[Axis, torch.Tensor] = {}
        for name, size in self.sizes:
            try:
                axis = axes.free_group(name)
            except AxisError as error:
                refusals.append(Refusal(self.name, name, why=str(error)))
                continue
            why = resizer.refusal(axis)
            if not why and not (type(size) is int and 1 <= size <= axis.size):
                why = f"it can have from 1 to {axis.size} indices, got {size!r}"
            if why:
                refusals.append(Refusal(self.name, name, why=why))
            elif size < axis.size:
                chosen[axis] = torch.arange(size)
        if not chosen:
            return PassResult(graph, (), tuple(refusals))
        draft = Draft(graph)
        resizer.resize(draft, chosen)
        parts = self._slice_inputs(graph, draft, cuts_of(axes, chosen))
        self._scatter_outputs(graph, draft, parts)
        after = draft.finish()
        what = ", ".join(f"{axis.name} from {axis.size} to {len(kept)}" for axis, kept in chosen.items())
        saving = Saving(
            graph.flops() - after.flops(), _moved(graph) - _moved(after), graph.bytes_kept() - after.bytes_kept()
        )
        return PassResult(after, (Change(self.name, what, saving=saving),), tuple(refusals))

    def _slice_inputs(self, graph: TrainingGraph, draft: Draft, cuts: Any) -> dict[str, list[tuple[int, Any]]]:
        """Slices behind the inputs; gives for each buffer the dimensions and indices that it was cut at."""
        parts: dict[str, list[tuple[int, Any]]] = {}
        first = next(node for node in draft.graph.nodes if node.op != "placeholder")
        for given, node in zip(graph.inputs, graph.placeholders, strict=True):
            if given.kind is InputKind.BATCH or given.name not in cuts:
                continue
            copy = draft.node(node)
            readers = list(copy.users)
            copy.meta["val"] = node.meta["val"]
            part = copy
            for dim, kept in cuts[given.name].items():
                if kept.equal(torch.arange(len(kept))):
                    part = draft.add(_SLICE, part, dim, 0, len(kept), like=first, phase=first.meta["phase"])
                else:
                    indices = self._constant(draft, first, f"kept_{copy.name}_{dim}", kept)
                    operator = torch.ops.aten.index_select.default
                    part = draft.add(operator, part, dim, indices, like=first, phase=first.meta["phase"])
                parts.setdefault(given.name, []).append((dim, kept))
            for reader in readers:
                reader.replace_input_with(copy, part)
        return parts

    @staticmethod
    def _constant(draft: Draft, before: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
        draft.constants[name] = value
        with draft.graph.inserting_before(before):
            node = draft.graph.create_node("get_attr", name)
        mode = fake_mode_of([n.meta.get("val") for n in draft.placeholders])
        assert mode is not None
        node.meta = {**before.meta, "val": mode.from_tensor(value, static_shapes=True)}
        return node

    @staticmethod
    def _scatter_outputs(graph: TrainingGraph, draft: Draft, parts: dict[str, list[tuple[int, Any]]]) -> None:
        """New values of buffers as wide as the buffers: one dimension each (running statistics)."""
        buffers = {n: draft.node(node) for n, node in graph.input_nodes(InputKind.BUFFER).items()}
        results = draft.results
        for i, output in enumerate(graph.outputs):
            if output.kind is not OutputKind.BUFFER or output.name not in parts:
                continue
            value, old = results[i], buffers[output.name]
            assert value is not None
            if len(parts[output.name]) > 1:
                raise AxisError(f"buffer {output.name}: its new value is a slice of several dimensions")
            ((dim, kept),) = parts[output.name]
            if kept.equal(torch.arange(len(kept))):
                operator, where = torch.ops.aten.slice_scatter.default, (dim, 0, len(kept))
                results[i] = draft.add(operator, old, value, *where, like=value, before=draft.output)
            else:
                indices = next(
                    n for n in draft.graph.nodes if n.op == "get_attr" and n.target == f"kept_{old.name}_{dim}"
                )
                operator = torch.ops.aten.index_copy.default
                results[i] = draft.add(operator, old, dim, indices, value, like=value, before=draft.output)
        draft.output.args = (tuple(results),)


def _moved(graph: TrainingGraph) -> int:
    return sum(graph.symbols.evaluate(bytes_moved(node)) for node in graph.nodes if node.op == "call_function")
