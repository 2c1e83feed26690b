"""`locate`: at which operator a wrong pass went wrong, by the values that both graphs compute.

A pass copies a graph and keeps the names of what it copies, so most operators of the graph after it stand for one of
the graph before; what replaces an operand or an output of one of these stands for what was there. From an output that
differs the search goes up through operands as long as one of them differs from what it stands for. Where all of them
agree, the operators in between are the fault: usually those that one rewrite made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.graph.lowering import binding
from graphopt.graph.text import node_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import Change
from graphopt.verify import ROOM, distance


@dataclass(frozen=True)
class Location:
    """Where a pass went wrong.

    Attributes:
        node: the first operator after the pass that gives something else. stands_for: the one before the pass.
        difference: by how much, as a sentence.
        after: the operators between the last values that agree and that one, as text. before: what was there.
        module, source: of that place in the user's model, may be empty.
        changes: what the pass says that it did there, as far as it can be told.
    """

    node: str
    stands_for: str
    difference: str
    after: tuple[str, ...]
    before: tuple[str, ...]
    module: str = ""
    source: str = ""
    changes: tuple[str, ...] = ()


def locate(
    before: TrainingGraph, after: TrainingGraph, arguments: Sequence[Any], changes: Sequence[Change] = (), seed: int = 0
) -> Location | None:
    """The first operators of ``after`` that compute something else than what they stand for in ``before``.

    Args:
        before, after: the graph that a pass was given and what it made of it, with the same inputs.
        arguments: of the inputs, which are not changed.
        changes: what the pass says that it did.
        seed: of the random numbers that both draw.

    Returns:
        None where no output differs on these arguments.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        old = evaluate(before, arguments)
        torch.manual_seed(seed)
        new = evaluate(after, arguments)
    mates = _mates(before, after)

    def off(node: fx.Node) -> str | None:
        return differs(new[node], old[mates[node]])

    wrong = next((n for n in after.results if n is not None and n in mates and off(n)), None)
    if wrong is None:
        return None
    order = {node: place for place, node in enumerate(after.nodes)}
    while True:
        made, border = _made(wrong, mates)
        if not (further := [n for n in border if off(n)]):
            break
        wrong = min(further, key=order.__getitem__)
    mate = mates[wrong]
    here = sorted({*made, wrong}, key=order.__getitem__)
    there = _gone(mate, set(mates.values()))
    module, source = wrong.meta.get("module", ""), wrong.meta.get("source", "")
    return Location(
        wrong.name, mate.name, str(off(wrong)), tuple(node_text(n, after.symbols) for n in here),
        tuple(node_text(n, before.symbols) for n in there), module, source, _told(changes, [*here, *there]),
    )  # fmt: skip


def _told(changes: Sequence[Change], nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """What a pass says that it did to these operators: by those that it names, else by their place in the model."""
    names = {node.name for node in nodes}
    found = [c.what for c in changes if names.intersection(c.nodes) or names.intersection(re.findall(r"\w+", c.what))]
    if not found:
        places = {(node.meta.get("module", ""), node.meta.get("source", "")) for node in nodes} - {("", "")}
        found = [c.what for c in changes if (c.module, c.source) in places]
    return tuple(dict.fromkeys(found))


def evaluate(graph: TrainingGraph, arguments: Sequence[Any]) -> dict[fx.Node, Any]:
    """The values of all nodes, computed one by one."""
    values: dict[fx.Node, Any] = dict(zip(graph.placeholders, arguments, strict=True))
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = graph.constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = binding(node.target)(*args, **kwargs)
    return values


def differs(ours: Any, theirs: Any) -> str | None:
    """How a value differs from another one by more than rounding, as a sentence; None if it does not."""
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)) and len(ours) == len(theirs):
        return next(filter(None, (differs(a, b) for a, b in zip(ours, theirs, strict=True))), None)
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return None if type(ours) is type(theirs) and ours == theirs else f"it is {ours!r}, was {theirs!r}"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"it is {ours.dtype} {list(ours.shape)}, was {theirs.dtype} {list(theirs.shape)}"
    if not ours.is_floating_point() or not ours.numel():
        return None if torch.equal(ours, theirs) else "its elements differ"
    error, scale = distance(ours, theirs.double()), float(theirs.abs().nan_to_num().max())
    if error <= ROOM * torch.finfo(ours.dtype).eps * scale + torch.finfo(ours.dtype).tiny:
        return None
    return f"it is off by {error:.3g} (values up to {scale:.3g})"


def _mates(before: TrainingGraph, after: TrainingGraph) -> dict[fx.Node, fx.Node]:
    """What nodes of ``after`` stand for in ``before``."""
    named = {node.name: node for node in before.nodes}
    same = {
        node: other
        for node in after.nodes
        if node.op != "output" and (other := named.get(node.name)) is not None
        and (other.op, str(other.target)) == (node.op, str(node.target))
    }  # fmt: skip
    found = dict(same)
    pairs = [pair for node, other in same.items() for pair in zip(_operands(node), _operands(other))]
    old = dict(zip(before.outputs, before.results, strict=True))
    pairs += [(result, old.get(output)) for output, result in zip(after.outputs, after.results, strict=True)]
    for node, other in pairs:
        if isinstance(node, fx.Node) and isinstance(other, fx.Node) and _type(node) == _type(other):
            found.setdefault(node, other)
    return found


def _operands(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def _type(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (value.dtype, [str(s) for s in value.shape]) if isinstance(value, torch.Tensor) else type(value)


def _made(node: fx.Node, mates: Mapping[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes above one that stand for nothing, up to those that do; and these."""
    made: list[fx.Node] = []
    border: list[fx.Node] = []
    stack, seen = list(node.all_input_nodes), set[fx.Node]()
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in mates:
            border.append(one)
        else:
            made.append(one)
            stack += one.all_input_nodes
    return made, border


def _gone(node: fx.Node, kept: set[fx.Node]) -> list[fx.Node]:
    """A node of the graph before, with those above it that nothing stands for any more, in order."""
    found, stack = {node}, list(node.all_input_nodes)
    while stack:
        one = stack.pop()
        if one not in found and one not in kept:
            found.add(one)
            stack += one.all_input_nodes
    return [n for n in node.graph.nodes if n in found]
