"""A graph of AOTAutograd as a `TrainingGraph`, and back.

AOTAutograd traces a piece that Dynamo gives it (forward and backward, or forward alone) into one functional graph of
ATen operators. The loss may lie outside of the piece: then tangents of its outputs are inputs. What passes need besides
is which nodes are backward, the free sizes and where in the model a node comes from; the way back puts together what
torch's partitioners expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError
from graphopt.graph.provenance import line_of
from graphopt.graph.sizes import Symbols
from graphopt.graph.storages import is_view, viewed
from graphopt.graph.torch_internals import fake_mode_of, hint_of
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, Signature, TrainingGraph
from graphopt.integrations.aot import overwritten_inputs, position_in_piece

_TAGS = {Phase.FORWARD: "is_forward", Phase.BACKWARD: "is_backward"}
"""What tells torch's partitioners where a node belongs (``meta["partitioner_tag"]``)."""


@dataclass(frozen=True)
class Constant:
    """A result of a graph that is no node of it: a number, or None where an input has no gradient."""

    value: Any


@dataclass(frozen=True)
class Joint:
    """A graph of AOTAutograd in our terms.

    ``results``: all that it gives, in order: positions among the outputs of ``graph``, or constants. ``overwritten``:
    names of placeholders that get a new value once forward has run.
    """

    graph: TrainingGraph
    results: tuple[int | Constant, ...]
    overwritten: frozenset[str]

    def why_not(self, rewritten: TrainingGraph) -> str:
        """Why ``rewritten`` must not stand in place of ``graph``; empty if it may.

        An input that is overwritten after forward has another value in backward. Passes, for which inputs stay what
        they are, may have removed the copy that backward read.
        """
        found = _read_by_backward(rewritten, self.overwritten) - _read_by_backward(self.graph, self.overwritten)
        return f"backward would read {', '.join(sorted(found))} after it was overwritten" if found else ""

    def complete(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """All results, of which ``values`` are those that ``graph`` gives."""
        return tuple(r.value if isinstance(r, Constant) else values[r] for r in self.results)


def as_training_graph(
    module: fx.GraphModule, forward_outputs: int | None = None, inputs: Sequence[Input] = ()
) -> Joint:
    """``module`` as a training graph, made of copies of its nodes.

    Args:
        module: a joint graph, a graph of forward alone, or a half that was cut from a joint one.
        forward_outputs: how many of its results are forward's, the others being gradients; None: all are.
        inputs: what the inputs of the piece are to the user, in Dynamo's order.

    Raises:
        CaptureError: it holds what a training graph cannot: higher-order operators, sizes that data decide, regions
            that are recomputed by the user's wish (those decide themselves what is kept).
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    found: list[Input] = []
    constants: dict[str, torch.Tensor] = {}
    mode = fake_mode_of([n.meta.get("val") for n in module.graph.nodes])
    phases = _phases(module.graph)
    # AOTAutograd makes views that forward returns last of all; torch's partitioners count on forward coming first.
    for node in sorted(phases, key=lambda n: phases[n] is Phase.BACKWARD):
        _check(node)
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        source = line_of(node.meta.get("stack_trace") or "")
        copy.meta.update(phase=phases[node], module=_module(node), source=source)
        if node.op == "placeholder":
            found.append(_input(node, inputs, found))
        elif node.op == "get_attr":
            constants[str(node.target)] = value = _constant(module, str(node.target))
            if copy.meta.get("val") is None:
                copy.meta["val"] = mode.from_tensor(value) if mode is not None else value
    ending = module.graph.find_nodes(op="output")[0]
    results: list[int | Constant] = []
    nodes: list[fx.Node] = []
    outputs: list[Output] = []
    for position, value in enumerate(pytree.arg_tree_leaves(*ending.args)):
        results.append(len(nodes) if isinstance(value, fx.Node) else Constant(value))
        if isinstance(value, fx.Node):
            nodes.append(copies[value])
            outputs.append(_output(position, forward_outputs, found))
    graph.output(tuple(nodes)).meta = {**ending.meta, "phase": Phase.OUTPUT}
    required = [o.name for o in outputs if o.kind is OutputKind.GRADIENT]
    signature = Signature(tuple(found), tuple(outputs), _symbols(module), tree={"requires_grad": required})
    return Joint(TrainingGraph(graph, signature, constants), tuple(results), _overwritten(module))


def as_module(joint: Joint, rewritten: TrainingGraph) -> fx.GraphModule:
    """``rewritten``, a graph with the inputs and outputs of ``joint``, in the form in which AOTAutograd gave that."""
    draft = rewritten.draft()
    draft.output.args = (joint.complete(draft.results),)
    for node in draft.graph.nodes:
        tag = _TAGS.get(node.meta.get("phase"))
        if tag is not None and not str(node.meta.get("partitioner_tag", "")).startswith("must_be"):
            node.meta["partitioner_tag"] = tag
    return fx.GraphModule(dict(draft.constants), draft.graph)


def path_of(source: str) -> str:
    """The path of a submodule, parameter or input by the expression with which Dynamo reaches it.

    >>> path_of("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    >>> path_of("L['self'].layers[0]"), path_of("L['x']")
    ('layers.0', 'x')
    """
    for dictionary in ("._modules", "._parameters", "._buffers"):
        source = source.replace(dictionary, "")
    parts = source.replace("[", ".").replace("]", "").replace("'", "").replace('"', "").split(".")
    return ".".join(part for part in parts if part not in ("", "L", "G", "self", "_orig_mod"))


def _check(node: fx.Node) -> None:
    """Raise CaptureError for a node that no training graph holds."""
    if node.op not in ("placeholder", "get_attr", "call_function"):
        raise CaptureError(f"it holds {node.format_node()}")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureError(f"it holds {node.target}, a higher-order operator that has no flat form")
    if "recompute" in node.meta:
        raise CaptureError("it holds a checkpointed region, which itself decides what is kept for backward")
    if node.op == "call_function" and "val" not in node.meta:
        raise CaptureError(f"the shape of {node} is not known")


def _is_tangent(node: fx.Node) -> bool:
    """Whether AOTAutograd calls an input so; its partitioners look for the name too."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def _phases(graph: fx.Graph) -> dict[fx.Node, Phase]:
    """The phase of each node but the output: backward is what AOTAutograd says, and all that depends on tangents."""
    phases: dict[fx.Node, Phase] = {}
    differential: set[fx.Node] = set()
    for node in graph.nodes:
        tagged = str(node.meta.get("partitioner_tag", "")).endswith("backward")
        if node.op == "output":
            continue
        if node.op == "placeholder":
            phases[node] = Phase.INPUT
            differential.update([node] if _is_tangent(node) else [])
        elif tagged or not differential.isdisjoint(node.all_input_nodes):
            phases[node] = Phase.BACKWARD
            differential.add(node)
        else:
            phases[node] = Phase.FORWARD
    return phases


def _module(node: fx.Node) -> str:
    """Path of the module that a forward node was traced in, or the forward node that it is the backward of."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    innermost = next(reversed(list(stack.values())), ("",))
    return path_of(str(innermost[0]))


def _input(node: fx.Node, inputs: Sequence[Input], taken: Sequence[Input]) -> Input:
    name = str(node.target)
    if _is_tangent(node):
        return Input(InputKind.TANGENT, name)
    position = position_in_piece(node)
    if position is not None and position < len(inputs) and inputs[position].name not in {i.name for i in taken}:
        return inputs[position]
    random = "seed" in name or "rng_state" in name
    return Input(InputKind.RANDOM if random else InputKind.BATCH, name)


def _output(position: int, forward_outputs: int | None, inputs: Sequence[Input]) -> Output:
    index = -1 if forward_outputs is None else position - forward_outputs
    if index < 0:
        return Output(OutputKind.OUTPUT, str(position))
    return Output(OutputKind.GRADIENT, inputs[index].name if index < len(inputs) else str(position))


def _constant(module: fx.GraphModule, target: str) -> torch.Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor) or fake_mode_of(value) is not None:
        raise CaptureError(f"it holds {target}, a {type(value).__name__}; only tensors with data can be constants")
    return value


def _symbols(module: fx.GraphModule) -> Symbols:
    """The free sizes of a graph by torch's names for them. It is Dynamo that watches over their range of validity."""
    hints: dict[sympy.Symbol, Any] = {}
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            strided = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
            sizes = [*leaf.shape, *(leaf.stride() if strided else ())] if isinstance(leaf, torch.Tensor) else [leaf]
            for size in sizes:
                if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                    hints.update((s, hint_of(s, size)) for s in size.node.expr.free_symbols)
    if unknown := [str(symbol) for symbol, hint in hints.items() if hint is None]:
        raise CaptureError(f"it has sizes that data decide ({', '.join(unknown)})")
    return Symbols({str(s): s for s in hints}, {str(s): hint for s, hint in hints.items()})


def _overwritten(module: fx.GraphModule) -> frozenset[str]:
    """Names of the placeholders that the graph writes to, or AOTAutograd once forward has run."""
    found = {node.name for node in overwritten_inputs(module.graph)}
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            found.update(_root(operand).name for operand in node.all_input_nodes[:1])
    return frozenset(found)


def _read_by_backward(graph: TrainingGraph, names: frozenset[str]) -> set[str]:
    """Which of these placeholders backward reads, also through views."""
    read = (o for n in graph.nodes if n.meta.get("phase") == Phase.BACKWARD for o in n.all_input_nodes)
    return {root.name for root in map(_root, read)} & names


def _root(node: fx.Node) -> fx.Node:
    while is_view(node):
        node = viewed(node)
    return node
