"""An exported graph in our terms: named inputs and outputs, phases, places; the loss begins backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import CaptureError
from graphopt.graph.draft import infer
from graphopt.graph.provenance import MARKS
from graphopt.graph.sizes import Symbols
from graphopt.graph.torch_internals import Exported
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, Signature, TrainingGraph


@dataclass(frozen=True)
class Names:
    """What the tensors of a traced module are to the user.

    ``parameters``, ``buffers``: public names by attribute. ``batch``: names of the batch's tensors. ``outputs``: what
    each of the module's results is; None for one that is there only to start backward.
    """

    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    batch: Sequence[str]
    outputs: Sequence[Output | None]

    def public(self, kind: str, name: str) -> str:
        """The public name of what `Exported` calls ``(kind, name)``."""
        if kind == "batch":
            return self.batch[int(name)]
        return (self.parameters if kind == "parameter" else self.buffers)[name]

    def output(self, kind: str, name: str) -> Output | None:
        """What the result ``(kind, name)`` of `Exported` is. Raises CaptureError for what must not be written."""
        if kind == "output":
            return self.outputs[int(name)]
        if kind == "buffer":
            return Output(OutputKind.BUFFER, self.public(kind, name))
        if kind.endswith("gradient"):
            return Output(OutputKind.GRADIENT, self.public(kind.removesuffix(" gradient"), name))
        raise CaptureError(f"the model writes into its {kind} {self.public(kind, name)!r} in place; clone it first")


def training_graph(
    exported: Exported,
    module: nn.Module,
    names: Names,
    sizes: Mapping[str, int],
    *,
    requires_grad: Iterable[str] = (),
    guards: Iterable[Any] = (),
) -> TrainingGraph:
    """The graph that was exported from ``module``.

    Args:
        exported: the graph of AOTAutograd.
        module: what was traced: gradients get the layout of its parameters.
        names: what its tensors are.
        sizes: the batch size, and other free sizes, that it was traced with.
        requires_grad: names of parameters and batch tensors that require grad, for ``signature.tree``.
        guards: further sympy conditions on the graph's symbols.

    Raises:
        CaptureError: the graph holds what a training graph cannot: a write into a parameter or batch tensor, a
            higher-order operator, a sparse gradient.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    ones: list[fx.Node] = []
    differential: set[fx.Node] = set()  # tangents and all that backward computes
    constants: dict[str, torch.Tensor] = {}
    descriptors = iter(exported.inputs)
    for node in exported.module.graph.nodes:
        if node.op == "placeholder":
            kind, name = next(descriptors)
            if kind == "tangent":
                output = names.outputs[int(name)]
                if output is None or output.kind is OutputKind.LOSS:
                    ones.append(node)  # the gradient of the loss by itself, made below
                    continue
                input_ = Input(InputKind.TANGENT, output.name)
            else:
                input_ = Input(_INPUT_KINDS[kind], names.public(kind, name))
            prefix = {"tangent": "tangent_", "batch": "batch_"}.get(kind, "")
            copies[node] = graph.placeholder(prefix + input_.name.replace(".", "_"))
            copies[node].target = copies[node].name  # an identifier, which the name of a parameter need not be
            _set_meta(copies[node], node, Phase.INPUT)
            inputs.append(input_)
            if kind == "tangent":
                differential.add(copies[node])
            continue
        for tangent in [t for t in ones if t in node.all_input_nodes]:
            copies[tangent] = _ones(graph, tangent)
            ones.remove(tangent)
        if node.op == "output":
            results = node.args[0]
            continue
        if node.op == "get_attr":
            constants[str(node.target)] = _constant(exported.module, str(node.target))
        elif node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the step holds {node.target}, a higher-order operator that has no flat form")
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        backward = node.meta.get("partitioner_tag", "is_forward").endswith("backward")
        backward = backward or any(n in differential for n in copies[node].all_input_nodes)
        if backward:
            differential.add(copies[node])
        _set_meta(copies[node], node, Phase.BACKWARD if backward else Phase.FORWARD)
    pairs: list[tuple[Output, fx.Node]] = []
    for (kind, name), result in zip(exported.outputs, results, strict=True):
        output = names.output(kind, name) if result is not None else None
        if output is not None:
            laid_out = kind == "parameter gradient"
            value = _laid_out(graph, copies[result], module.get_parameter(name)) if laid_out else copies[result]
            pairs.append((output, value))
    pairs.sort(key=lambda pair: _ORDER.index(pair[0].kind))
    graph.output(tuple(node for _, node in pairs)).meta["phase"] = Phase.OUTPUT
    conditions = tuple(dict.fromkeys([*guards, *exported.guards])) if exported.symbols else ()
    signature = Signature(
        tuple(inputs),
        tuple(output for output, _ in pairs),
        Symbols(exported.symbols, sizes, conditions),
        tree={"requires_grad": list(requires_grad)},
    )
    return TrainingGraph(graph, signature, constants)


_INPUT_KINDS = {"parameter": InputKind.PARAMETER, "buffer": InputKind.BUFFER, "batch": InputKind.BATCH}
_ORDER = [OutputKind.LOSS, OutputKind.BUFFER, OutputKind.OUTPUT, OutputKind.GRADIENT]


def _ones(graph: fx.Graph, tangent: fx.Node) -> fx.Node:
    """The gradient of the loss by itself: a constant one. (A second, detached loss has no gradient.)"""
    value = tangent.meta["val"]
    node = graph.call_function(
        torch.ops.aten.full.default, (list(value.shape), 1.0), {"dtype": value.dtype, "device": value.device}
    )
    _set_meta(node, tangent, Phase.BACKWARD)
    return node


def _laid_out(graph: fx.Graph, gradient: fx.Node, parameter: torch.Tensor) -> fx.Node:
    """The gradient in the layout of its parameter, into which autograd copies it too (AccumulateGrad): fused updates
    count on it, and a norm over another layout is summed in another order."""
    value = gradient.meta["val"]
    if value.layout is not torch.strided:
        raise CaptureError(f"the gradient of a parameter of shape {list(parameter.shape)} is sparse")
    layouts = {f: torch.empty_like(parameter, device="meta", memory_format=f) for f in _formats(parameter)}
    wanted = next((f for f, like in layouts.items() if like.stride() == parameter.stride()), None)
    if wanted is None or value.stride() == parameter.stride():
        return gradient
    node = graph.call_function(torch.ops.aten.clone.default, (gradient,), {"memory_format": wanted})
    node.meta = {**gradient.meta, "phase": Phase.BACKWARD}
    node.meta["val"] = infer(node)
    return node


def _formats(tensor: torch.Tensor) -> list[torch.memory_format]:
    several = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *several.get(tensor.dim(), [])]


def _set_meta(node: fx.Node, origin: fx.Node, phase: Phase) -> None:
    place = origin.meta.get("custom") or {}
    node.meta = {
        "val": origin.meta.get("val"), "phase": phase,
        "module": place.get("module", ""), "source": place.get("source", ""),
        **{key: place[key] for key in MARKS if key in place},
    }  # fmt: skip


def _constant(module: fx.GraphModule, target: str) -> torch.Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"the step holds {target}, a {type(value).__name__}; only tensors can be constants")
    return value
