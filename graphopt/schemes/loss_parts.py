"""Whether the loss of a batch follows from the losses of its parts, and with which share of each.

The forward graph is read along the batch axis (`graph.axes`) by the table of operator rules. Up to the loss samples
must not meet; there a mean or a sum is taken over them, and what follows must be linear in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import getitem

import torch
from torch import fx

from graphopt.graph.ancestry import ancestors
from graphopt.graph.axes import Axis, Dim, Form
from graphopt.graph.batch import BatchLayout
from graphopt.graph.literals.roles import Role, role_of
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.op_rules import is_random, linear_sets, operand, operand_names, operand_nodes, reductions, rule
from graphopt.graph.sizes import expression
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase, Signature, TrainingGraph


@dataclass(frozen=True)
class LossParts:
    """How the loss of a batch is made of those of its parts: their sum, or a mean weighted by the number of samples or,
    with ``targets``, of the targets that are not ``ignore_index``.

    ``targets`` computes the targets of the loss from the tensors of a batch at ``inputs``.
    """

    is_mean: bool
    targets: Lowered | None = None
    inputs: tuple[int, ...] = ()
    ignore_index: int = -100

    def of(self, parts: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int]) -> list[float]:
        """The share of each part, by which its loss is multiplied. ``parts``: the tensors of each."""
        if not self.is_mean:
            return [1.0] * len(parts)
        counts = list(sizes)
        if self.targets is not None:
            for k, part in enumerate(parts):
                (targets,) = self.targets.run(*(part[i] for i in self.inputs))
                counts[k] = int((targets != self.ignore_index).sum())
        whole = sum(counts)
        return [count / whole for count in counts] if whole else [0.0] * len(parts)


class _State(Enum):
    """What a value of the forward pass is with respect to the batch."""

    FREE = "depends on no sample"
    SAMPLES = "one of each sample"
    NUMBER = "the batch size, or a number made of it"
    SUM = "a sum over samples"
    MEAN = "a mean over samples"
    COUNTED = "a mean over targets that are not ignored"


_REDUCED = {_State.SUM, _State.MEAN, _State.COUNTED}
_SIZES = {Role.RESULT, Role.RESULT_LAST, Role.OPERAND_LAST, Role.TOLD, Role.COPIES, Role.LENGTH}


class _Refused(Exception):
    """The reason why parts do not make up the whole."""


def loss_parts(graph: TrainingGraph, layout: BatchLayout) -> LossParts | str:
    """How the loss of a joint ``graph`` is made of those of parts of the batch, or why it is not."""
    try:
        return _Walk(graph, layout).run()
    except _Refused as refused:
        return str(refused)


class _Walk:
    """One walk over the forward nodes that the loss depends on."""

    def __init__(self, graph: TrainingGraph, layout: BatchLayout):
        self.graph, self.layout = graph, layout
        self.states: dict[fx.Node, _State] = {}
        self.counting: fx.Node | None = None
        symbol = graph.symbols.symbols.get("batch")
        if symbol is None:
            raise _Refused("the batch size is fixed in the captured step")
        self.symbol = symbol
        self.batch = self._batch_axis()

    def _batch_axis(self) -> Axis:
        found: dict[Axis, None] = {}
        for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            if given.kind is InputKind.BATCH and self.layout.batched[self.layout.names.index(given.name)]:
                dim = self.graph.axes.of(node)[0]
                if dim.form is not Form.AXIS or dim.axis is None:
                    raise _Refused(f"the batch is cut into pieces or groups ({dim})")
                found[dim.axis] = None
        if len(found) != 1:
            raise _Refused("the tensors of the batch have no batch axis in common")
        (axis,) = found
        if axis.frozen:
            raise _Refused(f"the place of a sample in the batch means something: {axis.frozen}")
        return axis

    def run(self) -> LossParts:
        graph = self.graph
        (loss,) = (r for o, r in zip(graph.outputs, graph.results, strict=True) if o.kind is OutputKind.LOSS)
        assert loss is not None
        for node in graph.nodes:
            if node.op == "call_function" and is_random(node):
                raise _Refused(f"{_place(node)} draws random numbers, others for parts than for the whole")
        needed = ancestors([loss])
        for given, node in zip(graph.inputs, graph.placeholders, strict=True):
            batched = given.kind is InputKind.BATCH and self.layout.batched[self.layout.names.index(given.name)]
            self.states[node] = _State.SAMPLES if batched else _State.FREE
        for node in graph.nodes:
            if node in needed and node.op != "placeholder":
                self.states[node] = self._state(node)
        changed = [o.name for o in graph.outputs if o.kind is OutputKind.BUFFER]
        if changed:
            raise _Refused(f"the step changes buffers ({changed[0]}), which would happen once for each part")
        state = self.states[loss]
        if state not in _REDUCED:
            raise _Refused("the loss is no mean or sum over the batch")
        found = LossParts(is_mean=state is not _State.SUM)
        return self._counted(found) if state is _State.COUNTED else found

    # -- one operator -------------------------------------------------------------------------------------------

    def _state(self, node: fx.Node) -> _State:
        if node.op == "get_attr":
            return _State.FREE
        given = {self.states[n] for n in node.all_input_nodes}
        if not isinstance(node.meta["val"], (torch.Tensor, list, tuple)):
            depends = self.symbol in getattr(expression(node.meta["val"]), "free_symbols", ())
            if given & _REDUCED or (_State.SAMPLES in given and not depends and not _is_size(node)):
                raise _Refused(f"{_place(node)} makes a number of values")
            return _State.NUMBER if depends else _State.FREE
        if _State.SAMPLES in given:
            if given & _REDUCED:
                raise _Refused(f"at {_place(node)} samples meet a value of the whole batch")
            return self._of_samples(node)
        if given & _REDUCED:
            return self._of_reduced(node)
        if _State.NUMBER in given:
            self._check_numbers(node)
            return _State.SAMPLES if self._has_batch(node, None) else _State.FREE
        return _State.FREE

    def _of_samples(self, node: fx.Node) -> _State:
        if node.target is not getitem and rule(node) is None:
            raise _Refused(f"nothing is known of {_place(node)}")
        found = reductions(node)
        if found is None:
            raise _Refused(f"it is not known what {_place(node)} reduces")
        over = [r for r in found if any(self._is_batch(node, name, d) for name, d in r.places)]
        if not over:
            self._check_numbers(node)
            if not self._has_batch(node, None):
                raise _Refused(f"{_place(node)} picks samples of the batch")
            if any(self._axes_of(dims).count(self.batch) > 1 for dims in self._results(node)):
                raise _Refused(f"at {_place(node)} samples meet each other")
            return _State.SAMPLES
        first = [r for r in over if r.result == 0]
        if len(first) != 1 or first[0].kept or first[0].kind not in ("sum", "mean") or self._has_batch(node, 0):
            raise _Refused(f"{_place(node)} takes statistics of the whole batch")
        if first[0].count == "data":
            if self.counting not in (None, node) or "ignore_index" not in operand_names(node):
                raise _Refused(f"{_place(node)} divides by a number that the data say")
            self.counting = node
            return _State.COUNTED
        return _State.SUM if first[0].kind == "sum" else _State.MEAN

    def _of_reduced(self, node: fx.Node) -> _State:
        reduced = {n for n in operand_names(node) for s in operand_nodes(node, n) if self.states[s] in _REDUCED}
        kinds = {self.states[s] for n in reduced for s in operand_nodes(node, n)} & _REDUCED
        if len(kinds) != 1:
            raise _Refused(f"{_place(node)} joins sums and means over the batch that are divided by different numbers")
        (kind,) = kinds
        if node.target is getitem:
            if node.args[1] != 0:
                raise _Refused(f"{_place(node)} uses the number of targets")
            return kind
        together = next((s for s in linear_sets(node) if reduced <= s), None)
        if together is None:
            raise _Refused(
                f"{_place(node)} is not linear in a {'sum' if kind is _State.SUM else 'mean'} over the batch"
            )
        if kind is _State.SUM and together - reduced:
            raise _Refused(f"{_place(node)} joins a sum over the batch with what does not depend on it")
        numbers = [n for n in node.all_input_nodes if self.states[n] is _State.NUMBER]
        if not numbers:
            return kind
        divides = node.target in (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar)
        if kind is _State.SUM and divides and numbers == [operand(node, "other")]:
            if not getattr(expression(numbers[0].meta["val"]) / self.symbol, "free_symbols", ()):
                return _State.MEAN  # a sum over samples, divided by a multiple of their number
        raise _Refused(f"{_place(node)} depends on the size of the batch")

    def _check_numbers(self, node: fx.Node) -> None:
        """The batch size may be a size of what an operator makes, not a value that it computes with."""
        for argument in operand_names(node):
            if any(self.states[n] is _State.NUMBER for n in operand_nodes(node, argument)):
                kinds = [str(a.real_type) for a in node.target._schema.arguments if a.name == argument]  # type: ignore[union-attr]
                if role_of(node, argument, "int" not in kinds[0].lower()) not in _SIZES:
                    raise _Refused(f"{_place(node)} depends on the size of the batch")

    # -- axes -----------------------------------------------------------------------------------------------------

    def _is_batch(self, node: fx.Node, name: str, dim: int) -> bool:
        base, _, index = name.partition(".")
        nodes = operand_nodes(node, base)
        source = nodes[int(index)] if index else nodes[0]
        return any(axis is self.batch for axis in self.graph.axes.of(source)[dim].axes())

    def _has_batch(self, node: fx.Node, result: int | None) -> bool:
        """Whether the value (``result`` of it) has the batch axis."""
        found = self._results(node)
        return any(
            self.batch in self._axes_of(dims) for dims in (found if result is None else found[result : result + 1])
        )

    def _results(self, node: fx.Node) -> Sequence[Sequence[Dim]]:
        """The dimensions of each tensor that a node gives."""
        dims = self.graph.axes.of(node)
        return dims if isinstance(node.meta["val"], (list, tuple)) else (dims,)

    def _axes_of(self, dims: Sequence[Dim]) -> list[Axis]:
        return [axis for dim in dims for axis in dim.axes()]

    # -- targets that are counted ---------------------------------------------------------------------------------

    def _counted(self, found: LossParts) -> LossParts:
        assert self.counting is not None
        node = self.counting
        if operand(node, "weight") is not None:
            raise _Refused(f"{_place(node)} has class weights")
        target = operand(node, "target")
        needed = ancestors([target])
        inputs = [
            (given, n) for given, n in zip(self.graph.inputs, self.graph.placeholders, strict=True) if n in needed
        ]
        if any(given.kind is not InputKind.BATCH for given, _ in inputs):
            raise _Refused(f"the targets of {_place(node)} are computed by the model")
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for n in self.graph.nodes:
            if n in needed:
                copies[n] = part.node_copy(n, lambda m: copies[m])
        part.output((copies[target],)).meta["phase"] = Phase.OUTPUT
        signature = Signature(
            tuple(given for given, _ in inputs), (Output(OutputKind.OUTPUT, "targets"),), self.graph.symbols
        )
        targets = lower(TrainingGraph(part, signature, self.graph.constants), in_place=False)
        positions = tuple(self.layout.names.index(given.name) for given, _ in inputs)
        return replace(found, targets=targets, inputs=positions, ignore_index=operand(node, "ignore_index"))


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int or not isinstance(node.target, torch._ops.OpOverload)


def _place(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    where = node.meta.get("module") or node.meta.get("source") or node.name
    return f"{name} ({where})"
