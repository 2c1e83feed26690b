"""Regions of a forward graph that was traced before autograd and autocast: their markers become plain operators.

Such a trace notes where the model switches gradients or autocast on and off. A training graph is flat and means the
same wherever it runs: a region without gradients detaches what leaves it, a region of autocast holds its casts.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import CaptureError
from graphopt.graph.draft import infer
from graphopt.graph.torch_internals import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD_ENABLED, Exported, fake_mode_of

aten = torch.ops.aten
Options = tuple[str, torch.dtype, bool, bool]
"""Of a region of autocast: type of device, dtype, whether it is enabled, whether it keeps casts of weights."""


def flatten_regions(exported: Exported) -> list[str]:
    """Replace the markers in a graph of `export_forward` by operators, in place.

    Returns the names of the nodes that detach what leaves a region without gradients. Raises CaptureError for an
    operator under autocast that has no functional form.
    """
    graph = exported.module.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        if node.args[0].target is aten.lift_fresh_copy.default:  # `torch.tensor` detaches the constant that it makes
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _hold_casts(graph)
    detached = _detach_regions(exported)
    for node in reversed(graph.nodes):
        if node.target is aten.sym_size.int and not node.users:
            graph.erase_node(node)
    graph.lint()
    return detached


def _detach_regions(exported: Exported) -> list[str]:
    """Put ``aten.detach`` on what leaves a region without gradients and would have one; gives the names of those."""
    graph = exported.module.graph
    kinds = [kind for kind, _ in exported.inputs]
    placeholders = zip(graph.find_nodes(op="placeholder"), kinds, strict=True)
    reached = {node for node, kind in placeholders if kind != "buffer" and _differentiable(node)}
    inside: set[fx.Node] = set()  # of a region, and would have a gradient without it
    detached: dict[fx.Node, fx.Node] = {}

    def outside(node: fx.Node) -> fx.Node:
        if node not in inside or not isinstance(node.meta["val"], torch.Tensor):
            return node
        if node not in detached:
            with graph.inserting_after(node):
                detached[node] = graph.call_function(aten.detach.default, (node,))
            detached[node].meta = dict(node.meta)
        return detached[node]

    enabled = True
    for node in list(graph.nodes):
        if node.target is SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif node.op == "output":
            results = zip(node.args[0], exported.outputs, strict=True)  # type: ignore[arg-type]
            node.args = (tuple(outside(r) if kind == "output" else r for r, (kind, _) in results),)  # type: ignore[arg-type]
        elif node.op == "call_function" and not enabled:
            if _differentiable(node) and not (reached | inside).isdisjoint(node.all_input_nodes):
                inside.add(node)
        elif node.op == "call_function":
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), outside)
            stops = node.target is aten.detach.default or not _differentiable(node)
            if not stops and not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
    return [node.name for node in detached.values()]


def _differentiable(node: fx.Node) -> bool:
    """Whether autograd could give a gradient to what the node gives."""
    tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return any(t.is_floating_point() or t.is_complex() for t in tensors)


def _hold_casts(graph: fx.Graph) -> None:
    """Give each operator in a region of autocast the casts that autocast would make for it."""
    regions: list[tuple[fx.Node, Options]] = []
    for node in list(graph.nodes):
        if node.target is ENTER_AUTOCAST:
            regions.append((node, node.args))  # type: ignore[arg-type]
        elif node.target is EXIT_AUTOCAST:
            regions = [(enter, options) for enter, options in regions if enter is not node.args[0]]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and regions:
            _cast_operands(node, [options for _, options in regions])
    for target in (EXIT_AUTOCAST, ENTER_AUTOCAST):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)


@dataclass(frozen=True, eq=False)
class _Call:
    """An operator that ran below autocast, on fake tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        words = [f"{v.dtype} {list(v.shape)}" if isinstance(v, torch.Tensor) else str(v) for v in leaves]
        return f"{self.target}({', '.join(words)})"


class _Log(TorchDispatchMode):
    """Notes every operator that reaches dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # questions, such as for the device
            self.calls.append(_Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _calls(node: fx.Node, regions: list[Options]) -> list[_Call]:
    """What ``node`` comes to below autocast, run on the values of its operands."""
    with ExitStack() as stack:
        for options in regions:
            stack.enter_context(_autocast(options))
        log = stack.enter_context(_Log())
        infer(node)
    return log.calls


def _words(calls: list[_Call]) -> list[str]:
    return [str(call) for call in calls]


def _plain_words(node: fx.Node) -> list[str] | None:
    """What ``node`` comes to without autocast; None if it cannot run so, as its operands are of several dtypes."""
    try:
        return _words(_calls(node, []))
    except RuntimeError:
        return None


def _autocast(options: Options) -> torch.autocast:
    device, dtype, enabled, _ = options
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _cast_operands(node: fx.Node, regions: list[Options]) -> None:
    """Let ``node`` read casts of its operands; where autocast acts inside of a composite operator, take it apart.

    What autocast does is seen by running it on fake tensors: torch has no table of it to read.
    """
    calls = _calls(node, regions)
    if _words(calls) == _plain_words(node):
        return
    operands = {id(o.meta.get("val")) for o in node.all_input_nodes}
    casts = [c for c in calls if c.target is aten._to_copy.default and id(c.args[0]) in operands]
    waiting = list(casts)
    made: list[fx.Node] = []

    def cast(operand: fx.Node) -> fx.Node:
        found = next((c for c in waiting if c.args[0] is operand.meta.get("val")), None)
        if found is None:
            return operand
        waiting.remove(found)
        with node.graph.inserting_before(node):
            made.append(node.graph.call_function(found.target, (operand,), found.kwargs))
        made[-1].meta = {**node.meta, "val": infer(made[-1])}
        return made[-1]

    before = node.args, node.kwargs
    node.args, node.kwargs = fx.node.map_arg(before, cast)
    if _words([c for c in calls if c not in casts]) != _plain_words(node):
        node.args, node.kwargs = before
        for copy in reversed(made):
            node.graph.erase_node(copy)
        _take_apart(node, regions)


def _take_apart(node: fx.Node, regions: list[Options]) -> None:
    """Put the operators that a composite one comes to under autocast in its place."""
    operands = list(node.all_input_nodes)

    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        with ExitStack() as stack:
            for options in regions:
                stack.enter_context(_autocast(options))
            return node.target(*args, **kwargs)  # type: ignore[operator]

    mode = fake_mode_of([o.meta.get("val") for o in operands])
    with mode if mode is not None else nullcontext(), torch.no_grad():
        parts = make_fx(run)(*(o.meta["val"] for o in operands)).graph
    if any(n.op == "get_attr" or getattr(n.target, "is_mutable", False) for n in parts.nodes):
        raise CaptureError(f"{node.target} has no functional form under autocast")
    copies = dict(zip(parts.find_nodes(op="placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "call_function":
                copies[part] = node.graph.node_copy(part, copies.__getitem__)
                copies[part].meta = {**node.meta, "val": part.meta["val"]}
    results = fx.node.map_arg(next(iter(reversed(parts.nodes))).args[0], copies.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
