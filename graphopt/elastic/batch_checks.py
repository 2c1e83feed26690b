"""Lines of an extracted subnet that refuse batch sizes for which the model would run other code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.elastic.called import same_calls
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.modes import in_mode
from graphopt.errors import BatchError, CaptureError, ElasticError
from graphopt.graph.batch import BatchLayout
from graphopt.graph.forward import capture_forward
from graphopt.graph.sizes import expression
from graphopt.graph.storages import is_view
from graphopt.graph.storages import tensors as tensors_of
from graphopt.graph.training_graph import TrainingGraph

if TYPE_CHECKING:
    from graphopt.elastic.space import Space


def checks_of(space: Space, state: ModeState, batch: list[str], training: bool) -> list[str]:
    """Lines that refuse batch sizes for which the model would run other code."""
    symbols, layout = state.graph.symbols, state.layout
    if True not in layout.batched:
        return []
    size = f"{batch[layout.batched.index(True)]}.size(0)"
    if "batch" not in symbols.symbols:
        only = symbols.hints["batch"]
        return [f"if {size} != {only}:", f'    raise ValueError("the model was captured for batches of {only}")']
    guards = [g for g in symbols.guards if g.free_symbols == {symbols.symbols["batch"]}]
    other = next((n for n in range(2, _PROBED) if not symbols.admits({"batch": n})), None)
    if other is None or _same_code(space, layout, other, training):
        return []  # the guards are torch's own: which kernel it would choose
    text = " and ".join(symbols.rename(g) for g in guards)
    if "(" in text or not guards:
        raise ElasticError(f"extract: the code of the model depends on its batch size: {text}")
    return [
        f"batch = {size}",
        f"if not ({text}):",
        f'    raise ValueError("the model was captured for batches where {text}")',
    ]


def check_of_one(space: Space, states: Mapping[bool, ModeState], batch: list[str]) -> list[str]:
    """Lines that refuse a batch of 1 in the modes in which the model would run other code for it; the same in both, so
    that both can still be one function."""
    layout = next(iter(states.values())).layout
    refused = [
        training
        for training, state in states.items()
        if True in layout.batched
        and "batch" in state.graph.symbols.symbols
        and not state.graph.symbols.admits({"batch": 1})
        and not _same_code(space, layout, 1, training)
    ]
    if not refused:
        return []
    mode = "" if len(refused) == len(states) else " and self.training" if refused[0] else " and not self.training"
    return [
        f"if {batch[layout.batched.index(True)]}.size(0) == 1{mode}:",
        '    raise ValueError("for a batch of 1 the model runs other code")',
    ]


_PROBED = 130
"""Up to which batch size it is asked whether a guard excludes one."""


def _same_code(space: Space, layout: BatchLayout, size: int, training: bool) -> bool:
    """Whether the model runs the same code for batches of another size; asked once for each mode."""
    with in_mode(space.model, training):
        here = space.subnet(space.full).origin.graph
        if ("same code", size) not in here.derived:
            usual = next(n for n in (7, *range(2, _PROBED)) if here.symbols.admits({"batch": n}))
            same = same_calls(space.model, layout, usual, size) or _same_graph(space, here, layout, size)
            here.derived["same code", size] = same
        return bool(here.derived["same code", size])


def _same_graph(space: Space, here: TrainingGraph, layout: BatchLayout, size: int) -> bool:
    """The same, of the graphs that are captured; that takes seconds."""
    try:
        there = capture_forward(space.model, layout.restore(layout.example(size)), free=space.free)
    except (BatchError, CaptureError):
        return False
    return here.hash() == there.hash() if size > 1 else _operators(here) == _operators(there)


def _operators(graph: TrainingGraph) -> list[Any]:
    """What a graph computes for a batch of 1: operators but views and copies, with their numbers and shapes, and the
    shapes of results. (Which views and copies there are depends on strides, which a dimension of 1 leaves open.)"""
    batch = graph.symbols.symbols.get("batch")

    def number(value: Any) -> Any:
        found = expression(value)
        found = found if isinstance(found, int) or batch is None else found.subs(batch, 1)
        return int(found) if isinstance(found, int) or found.is_number else "free"

    def argument(value: Any) -> Any:
        value = value.meta["val"] if isinstance(value, fx.Node) else value
        if isinstance(value, (bool, float, str)) or not isinstance(value, (int, torch.SymInt)):
            return "tensor" if isinstance(value, (torch.Tensor, tuple, list)) else repr(value)
        return number(value)

    found: list[Any] = []
    for node in graph.nodes:
        moves = is_view(node) or node.target in _COPIES
        if node.op == "call_function" and not moves and not isinstance(node.meta["val"], torch.SymInt):
            arguments = [argument(a) for a in pytree.tree_leaves((node.args, node.kwargs))]
            found.append((node.target, arguments, [[number(s) for s in t.shape] for t in tensors_of(node.meta["val"])]))
    results = [r.meta["val"].shape for r in graph.results if r is not None]
    return [*found, [[number(s) for s in shape] for shape in results]]


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten._unsafe_view.default}
