"""Blocks of memory of a training step: which value is stored where, and between which operators it lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from graphopt.graph.in_place import InPlace, decide, overwritten
from graphopt.graph.sizes import Expr, nbytes
from graphopt.graph.storages import is_view, tensors, viewed
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph

Mode: TypeAlias = Literal["flat", "eager"]
BytesOf: TypeAlias = Callable[[fx.Node], Sequence[Expr]]

PERSISTENT: Mapping[InputKind, str] = {
    InputKind.PARAMETER: "parameters",
    InputKind.BUFFER: "buffers",
    InputKind.STATE: "optimizer state",
    InputKind.BATCH: "batch",
    InputKind.TANGENT: "tangents",
    InputKind.GRADIENT: "gradients so far",
    InputKind.HYPER: "hyper-parameters",
    InputKind.RANDOM: "random state",
    InputKind.SAVED: "saved",
}
"""Parts of the memory that is there before the step."""


@dataclass
class Block:
    """Memory that comes with operator ``born`` (-1: it is there before the step) and goes after operator ``dies``."""

    nbytes: Expr
    part: str
    born: int
    dies: int


def stored_bytes(node: fx.Node) -> list[Expr]:
    """Bytes of the storages of the tensors in a node's value, by ``meta["val"]``."""
    return [nbytes(t) for t in tensors(node.meta.get("val"))]


def blocks_of(graph: TrainingGraph, order: Sequence[fx.Node], mode: Mode, bytes_of: BytesOf) -> list[Block]:
    """All blocks of a step. ``order``: its operators as they run."""
    return _Blocks(graph, order, mode, bytes_of).blocks


Path: TypeAlias = tuple[int, ...]


class _Blocks:
    """Walks a graph once. A value is a name for one block (or for several: ``held`` by position in nested lists); a
    block goes when the last name for it does."""

    def __init__(self, graph: TrainingGraph, order: Sequence[fx.Node], mode: Mode, bytes_of: BytesOf):
        self.graph, self.order, self.mode, self.bytes_of = graph, order, mode, bytes_of
        self.decisions = decide(graph)
        self.position = {node: k for k, node in enumerate(order)}
        self.blocks: list[Block] = []
        self.held: dict[fx.Node, dict[Path, Block]] = {}
        for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
            self.held[node] = self._new(node, PERSISTENT[input_.kind], -1)
        for node in order:
            self.held[node] = self._storage(node)
        self._lives()

    def _new(self, node: fx.Node, part: str, born: int) -> dict[Path, Block]:
        sizes = self.bytes_of(node)
        dies = len(self.order) if born < 0 else born
        found = {p: Block(s, part, born, dies) for p, s in zip(_paths(node.meta.get("val")), sizes, strict=True)}
        self.blocks += found.values()
        return found

    def _storage(self, node: fx.Node) -> dict[Path, Block]:
        """The blocks that the value of ``node`` lives in; made here, unless it looks at others."""
        home = self.decisions.homes.get(node)
        if home is not None:
            return self.held[home]
        if node.op == "get_attr":
            return self._new(node, "constants", -1)
        if node.target is getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            return {p[1:]: block for p, block in self.held[source].items() if p[:1] == (index,)}
        if is_view(node):
            block = self.held[viewed(node)].get(())
            return dict.fromkeys(_paths(node.meta["val"]), block) if block is not None else {}
        if node in self.decisions.void:
            return {}
        made = self._new(node, self._part(node), self.position[node])
        written = {u.args[1] for u in node.users if u.target is getitem and u in self.decisions.homes}
        for path in [p for p in made if p[:1] and p[0] in written]:  # batch norm's running statistics
            self.blocks.remove(made.pop(path))
        return made

    def _part(self, node: fx.Node) -> str:
        return "update" if node.meta.get("phase") == Phase.UPDATE else "activations"

    def _lives(self) -> None:
        name = self.decisions.resolve
        last = {node: self.position[node] for node in self.order}
        for node in self.order:
            for operand in node.all_input_nodes:
                last[name(operand)] = self.position[node]
        end = len(self.order)
        inputs = overwritten(self.graph)
        returned = [r for r, input_ in zip(self.graph.results, inputs, strict=True) if r is not None and input_ is None]
        for value in [*returned, *(v for _, v in self.decisions.copies)]:
            last[name(value)] = end
        for node in self.order:
            for block in self.held[node].values():
                block.dies = max(block.dies, last[name(node)])
        for value in self._gradients():
            for block in self.held[value].values():
                block.part = "gradients" if block.born >= 0 else block.part

    def _gradients(self) -> Iterator[fx.Node]:
        """Values of backward that the update reads or the step returns."""
        for output, result in zip(self.graph.outputs, self.graph.results, strict=True):
            if output.kind is OutputKind.GRADIENT and result is not None:
                yield result
        for node in self.order:
            if node.meta.get("phase") == Phase.BACKWARD and any(
                u.meta.get("phase") == Phase.UPDATE for u in node.users
            ):
                yield node


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where the tensors of a node's value are in its nested lists, in order."""
    if isinstance(value, torch.Tensor):
        yield path
    elif isinstance(value, (tuple, list)):
        for i, element in enumerate(value):
            yield from _paths(element, (*path, i))
