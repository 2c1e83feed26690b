"""A digest of what a training graph computes, equal for graphs that differ only in names and order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from graphopt.graph.ancestry import ancestors
from graphopt.graph.op_rules import is_random
from graphopt.graph.text import shape_text
from graphopt.graph.training_graph import TrainingGraph


def digest(graph: TrainingGraph) -> str:
    """The digest as hexadecimal digits; see `TrainingGraph.hash`."""
    digests: dict[fx.Node, str] = {}
    random_count = 0

    def of(value: Any) -> str:
        return digests[value] if isinstance(value, fx.Node) else repr(value)

    live = ancestors(r for r in graph.results if r is not None)
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        digests[node] = _sha(str(input_), shape_text(node.meta.get("val"), graph.symbols))
    for node in graph.nodes:
        if node.op == "get_attr":
            digests[node] = _sha(repr(graph.constants[str(node.target)].tolist()))
        elif node.op == "call_function" and node in live:
            order = ""
            if is_random(node):
                order, random_count = str(random_count), random_count + 1
            leaves = pytree.tree_leaves((node.args, node.kwargs))
            parts = [str(node.target), order, *map(of, leaves)]
            digests[node] = _sha(*parts, _structure(node.args), _structure(node.kwargs))
    pairs = zip(graph.outputs, graph.results, strict=True)
    outputs = sorted(f"{o} {digests[r] if r is not None else None}" for o, r in pairs)
    return _sha(str(sum(n.op == "call_function" for n in live)), *outputs)


def _structure(value: Any) -> str:
    """Nesting of an argument, without its leaves."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_structure(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_structure(v)}" for k, v in value.items()) + "}"
    return "."


def _sha(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()
