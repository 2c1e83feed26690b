"""`with_backward`: forward and backward of a captured, perhaps rewritten, forward graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import CaptureError
from graphopt.graph.exported import Names, training_graph
from graphopt.graph.provenance import mark
from graphopt.graph.sizes import expression
from graphopt.graph.step_module import active_autocast, autocast
from graphopt.graph.torch_internals import current_trace_meta, export_joint, preserve_node_meta
from graphopt.graph.training_graph import InputKind, Output, OutputKind, Phase, TrainingGraph


def with_backward(
    forward: TrainingGraph, *, gradients: str | Collection[str] = "wanted", watched: Collection[str] = ()
) -> TrainingGraph:
    """Derive the joint graph of a forward graph by tracing the graph itself, as `graphopt.capture` traces a model.

    Of the inputs only shapes, dtypes and devices are needed, which the metadata of the placeholders tells: neither the
    model nor values of its parameters. Metadata of other nodes is not read but for their places.

    Args:
        forward: of `capture_forward`, or made of one by a rewrite that kept metadata.
        gradients: ``"wanted"``: of parameters and batch tensors that required grad at capture; ``"all"``: of every
            floating-point one; or the names of the parameters wanted.
        watched: names of nodes of ``forward`` whose gradients shall be found in the result.

    Returns:
        The graph that `graphopt.capture` gives for the same model: forward, backward, and gradients as outputs. A free
        batch size stays free, with the guards of ``forward``. Nodes keep their module path and source line. Their
        ``meta["origin"]`` is the name of the node of ``forward`` that they compute, or that they are the backward of;
        sums of gradients that autograd makes have none. ``meta["gradient_of"]`` has the names of the ``watched`` nodes
        whose whole gradient a node is.

    Raises:
        CaptureError: ``forward`` has a backward already or runs through a `torch.autograd.Function` whose backward it
            does not hold, ``gradients`` names what it does not have, or an operator has no derivative.

    Example:
        >>> import torch, graphopt
        >>> from graphopt.graph.forward import capture_forward
        >>> net, batch = torch.nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(3, (5,)))
        >>> forward = capture_forward(net, batch, loss=torch.nn.functional.cross_entropy)
        >>> joint = with_backward(forward)
        >>> joint.hash() == graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy).hash()
        True
    """
    _check(forward)
    module = _GraphModule(forward, _wanted(forward, gradients), frozenset(watched))
    batch = list(forward.input_nodes(InputKind.BATCH).items())
    tensors = [module.example(node, requires_grad=name in module.wanted) for name, node in batch]
    symbols = forward.symbols
    known = {symbol: name for name, symbol in symbols.symbols.items()}
    sizes = [list(map(expression, node.meta["val"].shape)) for _, node in batch]
    free = [{d: known[size] for d, size in enumerate(shape) if size in known} for shape in sizes]
    without = autocast(active_autocast({t.device.type for t in [*tensors, *module.parameters()]}), enabled=False)
    try:
        with preserve_node_meta(), torch.enable_grad(), without:
            exported = export_joint(module, tensors, free, compiling=False)
            _name_gradients(exported.module.graph)
    except CaptureError:
        raise
    except Exception as error:  # an operator of the graph was run on other operands than at capture
        first_line = str(error).strip().partition("\n")[0]
        raise CaptureError(f"no backward for the graph at {module.place}: {first_line}") from error
    renamed = {symbols.symbols[name]: symbol for name, symbol in exported.symbols.items()}
    guards = [guard.xreplace(renamed) for guard in symbols.guards if guard.free_symbols <= set(renamed)]
    return training_graph(
        exported, module, module.names, symbols.hints,
        requires_grad=forward.signature.tree.get("requires_grad", ()), guards=guards,
    )  # fmt: skip


def _check(forward: Any) -> None:
    if not isinstance(forward, TrainingGraph):
        raise CaptureError(f"forward: expected a TrainingGraph, got {type(forward).__name__}")
    kinds = {i.kind for i in forward.inputs} - {InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH}
    results = {o.kind for o in forward.outputs} - {OutputKind.LOSS, OutputKind.OUTPUT, OutputKind.BUFFER}
    later = any(n.meta.get("phase") in (Phase.BACKWARD, Phase.UPDATE) for n in forward.nodes)
    if kinds or results or later:
        raise CaptureError(f"forward: {forward!r} has a backward or an update already; expected one of capture_forward")
    if own := forward.signature.tree.get("own_backward"):
        raise CaptureError(f"forward: it runs through {', '.join(own)}, whose own backward no graph of operators holds")


def _wanted(forward: TrainingGraph, gradients: str | Collection[str]) -> set[str]:
    """Names of the parameters and batch tensors that get a gradient."""
    parameters, batch = (forward.input_nodes(kind) for kind in (InputKind.PARAMETER, InputKind.BATCH))
    required = set(forward.signature.tree.get("requires_grad", ()))
    if gradients == "wanted":
        return required & {*parameters, *batch}
    if gradients == "all":
        values = {name: node.meta["val"] for name, node in {**parameters, **batch}.items()}
        return {name for name, value in values.items() if value.is_floating_point() or value.is_complex()}
    if isinstance(gradients, str):
        raise CaptureError(f"gradients: expected 'wanted', 'all' or names of parameters, got {gradients!r}")
    if unknown := set(gradients) - set(parameters):
        raise CaptureError(f"gradients: {sorted(map(str, unknown))} are no parameters of the graph")
    return set(gradients) | (required & set(batch))


class _GraphModule(nn.Module):
    """Runs a forward graph on parameters and buffers of its own, which have no values yet, and on a flat batch.

    New values of buffers are results behind the others, but for those that batch norm writes into its buffers.
    """

    def __init__(self, graph: TrainingGraph, wanted: set[str], watched: frozenset[str]):
        super().__init__()
        self.origin, self.wanted, self.watched, self.place = graph, wanted, watched, ""
        self.attributes: dict[fx.Node, str] = {}
        public: dict[InputKind, dict[str, str]] = {kind: {} for kind in InputKind}
        for index, (input_, node) in enumerate(zip(graph.inputs, graph.placeholders, strict=True)):
            key = f"{input_.kind[0]}{index}"
            public[input_.kind][key] = input_.name
            if input_.kind is InputKind.BATCH:
                continue
            self.attributes[node] = key
            if input_.kind is InputKind.PARAMETER:
                self.register_parameter(key, nn.Parameter(self.example(node), requires_grad=input_.name in wanted))
            else:
                self.register_buffer(key, self.example(node))
        self.in_place = _in_place_norms(graph)
        self.border = set(graph.signature.tree.get("no_grad", ()))
        self.no_grad = _without_gradients(graph, self.border)
        written = {new for news in self.in_place.values() for new in news}
        pairs = [(o, r) for o, r in zip(graph.outputs, graph.results, strict=True) if r is not None]
        pairs = [(output, result) for output, result in pairs if result not in written]
        self.results = sorted(pairs, key=lambda pair: pair[0].kind is OutputKind.BUFFER)
        outputs: list[Output | None] = [output for output, _ in self.results]
        parameters, buffers, batch = (public[k] for k in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH))
        self.names = Names(parameters, buffers, tuple(batch.values()), outputs)

    def example(self, node: fx.Node, requires_grad: bool = False) -> torch.Tensor:
        """A tensor such as ``node`` gives, at the sizes of the capture, without values."""
        value, size = node.meta["val"], self.origin.symbols.evaluate
        shape, strides = [size(s) for s in value.shape], [size(s) for s in value.stride()]
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device, requires_grad=requires_grad)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: dict[fx.Node, Any] = {}
        batch, source = iter(tensors), ""
        for node in self.origin.nodes:
            if node.op == "placeholder":
                values[node] = getattr(self, self.attributes[node]) if node in self.attributes else next(batch)
            elif node.op == "get_attr":
                values[node] = self.origin.constants[str(node.target)]
            elif node.op == "call_function":
                source = node.meta.get("source", "")
                self.place = f"{node.name} ({node.target}) {source}".strip()
                mark(node.meta.get("module", ""), source, origin=node.name)
                with torch.set_grad_enabled(node not in self.no_grad):
                    values[node] = self._call(node, *fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
            if node.name in self.watched and isinstance(values[node], torch.Tensor) and values[node].requires_grad:
                values[node].register_hook(_named(node.name))
        ends_in_loss = Output(OutputKind.LOSS, "loss") in self.names.outputs
        mark("", "" if ends_in_loss else source)  # as `StepModule` leaves it
        results = [values[node] for _, node in self.results]
        return tuple(r.clone() if r._is_view() else r for r in results)  # as `StepModule` does

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node in self.in_place:
            _, _, _, mean, variance, *_ = args
            return (*torch.ops.aten._native_batch_norm_legit.default(*args, **kwargs), mean, variance)
        if node in self.no_grad and node.name in self.border:
            return args[0]  # made without gradients, as in the region
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _named(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that puts a view behind a gradient while it is traced, marked with what it is the gradient of."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        before = current_trace_meta().get("custom")
        mark("", "", gradient_of=name)
        try:
            return torch.ops.aten.alias.default(gradient)
        finally:
            current_trace_meta()["custom"] = before

    return hook


def _name_gradients(graph: fx.Graph) -> None:
    """Take the views of `_named` out again; what they are views of gets their names."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        if (name := (node.meta.get("custom") or {}).get("gradient_of")) is None:
            continue
        (source,) = node.args
        place = source.meta.get("custom") or {}
        source.meta["custom"] = {**place, "gradient_of": (*place.get("gradient_of", ()), name)}
        node.replace_all_uses_with(source)
        graph.erase_node(node)


_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


def _in_place_norms(graph: TrainingGraph) -> dict[fx.Node, list[fx.Node]]:
    """Batch norms that can write into their running statistics as eager does, with the nodes that are then the buffers
    themselves: those are what eager's backward is given. Not where an old value is read by anything else."""
    found: dict[fx.Node, list[fx.Node]] = {}
    held = {node: name for name, node in graph.input_nodes(InputKind.BUFFER).items()}
    for node in graph.graph.find_nodes(op="call_function", target=_BATCH_NORM):
        old = [o for o in node.args[3:5] if o in held and len(o.users) == 1]
        new = [u for index in (3, 4) for u in node.users if u.args[1] == index]
        if len(old) == len(new) == 2:
            found[node] = new
            held.update(zip(new, [held[o] for o in old], strict=True))
    written = {name for name, node in graph.output_nodes(OutputKind.BUFFER).items() if node in held}
    return {node: new for node, new in found.items() if written.issuperset(held[n] for n in new)}


def _without_gradients(graph: TrainingGraph, border: set[str]) -> set[fx.Node]:
    """What was computed in regions without gradients: whose values reach nothing but their ``border``, where they are
    detached by nodes of these names, and new values of buffers. Includes the nodes that detach."""
    returned = {r for o, r in zip(graph.outputs, graph.results, strict=True) if o.kind is not OutputKind.BUFFER}
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node in returned:
            continue
        users = [user for user in node.users if user.op != "output"]
        detaches = node.target is torch.ops.aten.detach.default and node.name in border
        if detaches or (node.users and found.issuperset(users)):
            found.add(node)
    return found
