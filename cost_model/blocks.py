"""Blocks of memory of a training step: which value is stored where, and between which operators it lives.

Both ways of running a step free a value after its last use and write new parameters, buffers and state in place. What
eager PyTorch does otherwise than a flat function is in `_EagerBlocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from graphopt.cost_model.kernel_sizes import Sizes, is_tensor
from graphopt.cost_model.workspace import unseen_results
from graphopt.graph.in_place import decide, overwritten
from graphopt.graph.sizes import Expr, nbytes
from graphopt.graph.storages import is_view, storage_root, tensors, viewed
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph

Mode: TypeAlias = Literal["flat", "eager"]
BytesOf: TypeAlias = Callable[[fx.Node], Sequence[Expr]]
Path: TypeAlias = tuple[int, ...]
"""Where a tensor is in the nested lists of a node's value."""

aten = torch.ops.aten

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
    InputKind.PLACE: "place",
}
"""Parts of the memory that is there before the step."""


@dataclass(eq=False)
class Block:
    """Memory that comes with operator ``born`` (-1: it is there before the step) and goes after operator ``dies``."""

    nbytes: Expr
    part: str
    born: int
    dies: int
    node: fx.Node  # whose value it holds first


def stored_bytes(node: fx.Node) -> list[Expr]:
    """Bytes of the storages of the tensors in a node's value, by ``meta["val"]``."""
    return [nbytes(t) for t in tensors(node.meta.get("val"))]


def blocks_of(
    graph: TrainingGraph, order: Sequence[fx.Node], mode: Mode, bytes_of: BytesOf, sizes: Sizes
) -> list[Block]:
    """All blocks of a step. ``order``: its operators as they run."""
    kind = _EagerBlocks if mode == "eager" else _Blocks
    return kind(graph, order, bytes_of, sizes).blocks


class _Blocks:
    """Those of the function that `lower` writes. A value is a name for one block, or for several by their path; a block
    goes when the last name for it does."""

    def __init__(self, graph: TrainingGraph, order: Sequence[fx.Node], bytes_of: BytesOf, sizes: Sizes):
        self.graph, self.order, self.bytes_of, self.sizes = graph, order, bytes_of, sizes
        self.decisions = decide(graph)
        self.position = {node: k for k, node in enumerate(order)}
        self.blocks: list[Block] = []
        self.held: dict[fx.Node, dict[Path, Block]] = {}
        for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
            self.held[node] = self._new(node, PERSISTENT[input_.kind], -1)
        self.last = self._last_uses()
        for node in order:
            self.held[node] = self._storage(node)
            for block in self.held[node].values():
                block.dies = max(block.dies, self.last[self.decisions.resolve(node)])
        for value in self._gradients():
            for block in self.held[value].values():
                block.part = "gradients" if block.born >= 0 else block.part

    def _new(self, node: fx.Node, part: str, born: int) -> dict[Path, Block]:
        dies = len(self.order) if born < 0 else born
        unseen = unseen_results(node, self.sizes)
        paths = _paths(node.meta.get("val"))
        found = {
            p: Block(unseen.get(p, size), part, born, dies, node)
            for p, size in zip(paths, self.bytes_of(node), strict=True)
        }
        self.blocks += found.values()
        return found

    def _storage(self, node: fx.Node) -> dict[Path, Block]:
        """The blocks that the value of ``node`` lives in; made here, unless it is written into or looks at others."""
        home = self._home(node)
        if home is not None:
            return self.held[home]
        if node.op == "get_attr":
            return self._new(node, "constants", -1)
        if node.target is getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            return {path[1:]: block for path, block in self.held[source].items() if path[:1] == (index,)}
        if is_view(node):
            block = self.held[viewed(node)].get(())
            return dict.fromkeys(_paths(node.meta["val"]), block) if block is not None else {}
        if node in self.decisions.void:
            return {}
        part = "update" if _phase(node) == Phase.UPDATE else "activations"
        made = self._new(node, part, self.position[node])
        written = {user.args[1] for user in node.users if user.target is getitem and self._home(user) is not None}
        for path in [p for p in made if p[:1] and p[0] in written]:  # such as batch norm's running statistics
            self.blocks.remove(made.pop(path))
        return made

    def _home(self, node: fx.Node) -> fx.Node | None:
        """The value into whose memory ``node`` is written."""
        return self.decisions.homes.get(node)

    def _last_uses(self) -> dict[fx.Node, int]:
        """The operator after which nobody holds a value any more; the end, for what is returned."""
        name = self.decisions.resolve
        last = {node: k for k, node in enumerate(self.order)}
        for k, node in enumerate(self.order):
            for operand in node.all_input_nodes:
                last[name(operand)] = k
        inputs = overwritten(self.graph)
        returned = [r for r, input_ in zip(self.graph.results, inputs, strict=True) if r is not None and input_ is None]
        for value in [*returned, *(value for _, value in self.decisions.copies)]:
            last[name(value)] = len(self.order)
        return last

    def _gradients(self) -> Iterator[fx.Node]:
        """Values of backward that the update reads or the step returns."""
        for output, result in zip(self.graph.outputs, self.graph.results, strict=True):
            if output.kind is OutputKind.GRADIENT and result is not None:
                yield result
        for node in self.order:
            if _phase(node) == Phase.BACKWARD and any(_phase(user) == Phase.UPDATE for user in node.users):
                yield node


class _EagerBlocks(_Blocks):
    """Those of eager PyTorch.

    - Gradients stay until the step ends (they are outputs of the graph as captured); clipping writes into them.
    - An autograd node frees what it saved, and its incoming gradient, after its last operator.
    - Gradients that meet are added in place.
    - Dropout on the CPU keeps its mask as numbers, not as booleans.
    - An optimizer that loops over parameters still holds the last one's denominator while it makes the next.
    """

    def __init__(self, graph: TrainingGraph, order: Sequence[fx.Node], bytes_of: BytesOf, sizes: Sizes):
        self._clipped = dict(_clipped(graph))
        super().__init__(graph, order, bytes_of, sizes)
        self._hold_locals()

    def _new(self, node: fx.Node, part: str, born: int) -> dict[Path, Block]:
        found = super()._new(node, part, born)
        if node.target is aten.native_dropout.default:
            found[(1,)].nbytes = found[(0,)].nbytes
        return found

    def _home(self, node: fx.Node) -> fx.Node | None:
        if _is_sum(node):
            old = node.args[0]
            assert isinstance(old, fx.Node)
            block = self.held[old].get(())
            if block is None or storage_root(old) is not old:
                return None  # a view: the tensor it looks at holds the memory too
            return old if block.dies <= self.position[node] else None
        if node in self._clipped:
            return self._clipped[node]
        if node.target is aten.div.Tensor and _phase(node) == Phase.UPDATE:
            return None  # ``sqrt / correction`` makes a tensor
        return super()._home(node)

    def _last_uses(self) -> dict[fx.Node, int]:
        last = super()._last_uses()
        ends = {k: group[-1] for group in _autograd_nodes(self.order) for k in group}
        return {node: ends.get(k, k) for node, k in last.items()}

    def _hold_locals(self) -> None:
        """Python variables of an optimizer's loop: bound until the next parameter binds them."""
        before: dict[Any, Block] = {}
        for k, node in enumerate(self.order):
            if _phase(node) == Phase.UPDATE and node.target in (aten.sqrt.default, aten.div.Tensor):
                block = self.held[node].get(())
                if block is None or block.born != k or any(user.target is aten.div.Tensor for user in node.users):
                    continue
                if node.target in before:
                    before[node.target].dies = max(before[node.target].dies, k)
                before[node.target] = block


def _phase(node: fx.Node) -> Any:
    return node.meta.get("phase")


def _clipped(graph: TrainingGraph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Gradients made from others by the update's operators (clipping), each with the one it is made from."""
    for output, result in zip(graph.outputs, graph.results, strict=True):
        if output.kind is not OutputKind.GRADIENT or result is None or _phase(result) != Phase.UPDATE:
            continue
        if result.target is getitem:
            lists, index = result.args
            yield result, lists.args[0][index]  # type: ignore[union-attr, index, misc]
        elif result.args and isinstance(result.args[0], fx.Node):
            yield result, result.args[0]


def _is_sum(node: fx.Node) -> bool:
    """Whether this adds two gradients that reached the same value."""
    if node.target is not aten.add.Tensor or _phase(node) != Phase.BACKWARD or node.kwargs:
        return False
    old, new = node.args
    if not is_tensor(old) or not is_tensor(new):
        return False
    return bool(_phase(old) == _phase(new) == Phase.BACKWARD and old.meta["val"].shape == new.meta["val"].shape)


def _autograd_nodes(order: Sequence[fx.Node]) -> Iterator[list[int]]:
    """Runs of operators that one autograd node makes: neighbours in backward that read the same incoming gradient, and
    those before them that prepare a factor from saved values only."""
    group: list[int] = []
    incoming: fx.Node | None = None
    for k, node in enumerate(order):
        if _phase(node) != Phase.BACKWARD or is_view(node) or node.op != "call_function":
            continue
        whole = _is_sum(node) or "backward" in str(node.target)  # an autograd node of its own
        made = {order[i] for i in group} if incoming is None else set()
        roots = [storage_root(operand) for operand in node.all_input_nodes]
        outside = [r for r in roots if _phase(r) == Phase.BACKWARD and r not in made]
        joins = incoming in roots if incoming is not None else bool(made)
        if whole or not joins:
            if len(group) > 1:
                yield group
            group, incoming = [], None
        if not whole:
            group.append(k)
            incoming = incoming or next(iter(outside), None)
    if len(group) > 1:
        yield group


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where the tensors of a node's value are in its nested lists, in order."""
    if isinstance(value, torch.Tensor):
        yield path
    elif isinstance(value, (tuple, list)):
        for i, element in enumerate(value):
            yield from _paths(element, (*path, i))
