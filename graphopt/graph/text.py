"""A training graph as readable text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.graph.sizes import Symbols
from graphopt.graph.training_graph import Phase, TrainingGraph

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def dtype_text(dtype: torch.dtype) -> str:
    """A short name of a dtype: ``f32``."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def shape_text(value: Any, symbols: Symbols, dims: Sequence[Any] = ()) -> str:
    """The type of a node's value: ``f32[batch, 64]``; tuples in parentheses, numbers by their value or expression.

    ``dims``: what `Axes.of` says of the node; sizes then come with the names of their axes: ``f32[batch, embed=64]``.
    """
    if isinstance(value, torch.Tensor):
        sizes = [symbols.rename(s) for s in value.shape]
        if dims:
            sizes = [s if str(d) == s or not _is_named(d) else f"{d}={s}" for s, d in zip(sizes, dims, strict=True)]
        return f"{dtype_text(value.dtype)}[{', '.join(sizes)}]"
    if isinstance(value, (tuple, list)):
        each = dims or [()] * len(value)
        return f"({', '.join(shape_text(v, symbols, d) for v, d in zip(value, each, strict=True))})"
    if isinstance(value, torch.SymInt):
        return symbols.rename(value)
    if isinstance(value, (float, torch.SymFloat)):
        return "float"
    return type(value).__name__ if value is not None else "none"


def _is_named(dim: Any) -> bool:
    return any(axis.name for axis in dim.axes())


def operator_text(target: Any) -> str:
    """An operator's name as people write it: ``aten.mm``, ``aten.add.Scalar``, ``getitem``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def argument_text(value: Any) -> str:
    """One argument: nodes as ``%name``, lists in brackets."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(argument_text(v) for v in value)}]"
    return str(value).removeprefix("torch.")


def node_text(node: fx.Node, symbols: Symbols, *, source: bool = True, dims: Sequence[Any] = ()) -> str:
    """One operator as a line: ``%mm: f32[batch, 10] = aten.mm(%x, %t)  # fc  model.py:12``. ``dims`` as in
    `shape_text`."""
    arguments = [argument_text(a) for a in node.args]
    arguments += [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
    name = operator_text(node.target) if node.op == "call_function" else f"constant {node.target}"
    call = f"{name}({', '.join(arguments)})" if node.op == "call_function" else name
    line = f"%{node.name}: {shape_text(node.meta.get('val'), symbols, dims)} = {call}"
    where = "  ".join(w for w in (node.meta.get("module", ""), node.meta.get("source", "")) if w)
    return f"{line}  # {where}" if source and where else line


def render(graph: TrainingGraph, *, source: bool = True, axes: bool = False) -> str:
    """The whole graph: inputs by kind, operators by phase, outputs. ``axes``: with the names of axes."""
    symbols = graph.symbols

    def dims(node: fx.Node) -> Sequence[Any]:
        return graph.axes.of(node) if axes else ()

    lines = ["inputs:"]
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        lines.append(f"  %{node.name}: {shape_text(node.meta.get('val'), symbols, dims(node))}  # {input_}")
    phase = None
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        if node.op == "call_function" and node.meta.get("phase") != phase:
            phase = node.meta.get("phase")
            lines.append(f"{Phase(phase)}:" if phase else "operators:")
        lines.append("  " + node_text(node, symbols, source=source, dims=dims(node)))
    lines.append("outputs:")
    for output, result in zip(graph.outputs, graph.results, strict=True):
        lines.append(f"  {argument_text(result)}  # {output}")
    if symbols.guards:
        lines.append("valid where:")
        lines += [f"  {symbols.rename(guard)}" for guard in symbols.guards]
    return "\n".join(lines)
