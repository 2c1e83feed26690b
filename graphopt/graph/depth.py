"""Depth: runs of layers that can be left out of a forward pass, found on its graph.

A run leads from one tensor u to one tensor v on the same axes, and nothing but v leaves it: ``v = u + f(u)``, with
what follows until the next run begins (``LayerNorm(u + f(u))``, ``relu(u + f(u))``). With v replaced by u the layers of
f are dead and every shape still fits, by construction: not sizes are compared, but identities. Tensors that only enter
f (an attention mask, the encoder's output in a decoder) do not matter.

Legal width and legal depth cannot get into each other's way: both speak of the same axes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import takewhile
from operator import add, getitem, mul
from typing import Any, Literal

import sympy
import torch
from torch import fx

from graphopt.errors import AxisError
from graphopt.graph.ancestry import ancestors
from graphopt.graph.axes import Axes
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import is_pure, rule
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.training_graph import InputKind, OutputKind, Phase, TrainingGraph


@dataclass(frozen=True)
class Run:
    """Layers that can be left out together: let every reader of ``exit`` read ``entry``.

    ``nodes``: the operators that are dead then, ``exit`` among them, in order. ``module``: the path of the module
    around them. ``structure``: equal for runs that are alike (see `stages`).
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    module: str
    structure: str

    def __str__(self) -> str:
        return f"{self.module}: {self.entry} -> {self.exit} ({len(self.nodes)} operators)"


@dataclass(frozen=True)
class Stage:
    """Runs of the same structure one behind the other, on the same axes: any of them can be left out."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The path of the module around them all."""
        return _around(run.module for run in self.runs)


def stages(axes: Axes, *, alike: Literal["operators", "parameters"] = "operators") -> tuple[Stage, ...]:
    """The runs of the graph of ``axes``, in order, grouped by structure.

    A run of a stage may hold several sums: where attention and MLP alternate, both are one run. A stage has one run
    where no neighbour is like it.

    Args:
        axes: of a forward or joint graph.
        alike: what runs of one stage have in common: all operators, or the layers among them and the parameters. The
            latter is the same in train and eval mode (stochastic depth gives each layer operators of its own), and for
            blocks that shift their windows and blocks that do not.

    Raises AxisError if ``axes`` is no `Axes`.
    """
    if not isinstance(axes, Axes):
        raise AxisError(f"axes: expected Axes (see graphopt.graph.axes.analyse), got {type(axes).__name__}")
    search = _Search(axes, alike)
    found = [stage for chain in search.chains() for stage in _grouped(chain, search.order)]
    wider = Counter(_with_sum(run) for stage in found for run in stage.runs)
    return tuple(Stage(tuple(_named(run, wider) for run in stage.runs)) for stage in found)


def _with_sum(run: Run) -> str:
    """The path of the module around the layers of a run and its sum: the block, where the sum is taken inside of it."""
    return _around(
        [run.module, *(n.meta.get("module", "") for n in run.nodes if n.target is torch.ops.aten.add.Tensor)]
    )


def _named(run: Run, wider: Counter[str]) -> Run:
    path = _with_sum(run)
    return replace(run, module=path) if path and wider[path] == 1 else run


def leave_out(graph: TrainingGraph, runs: Iterable[Run]) -> TrainingGraph:
    """``graph`` without these runs: every reader of their exits reads their entries.

    ``graph`` is a forward graph, the one that the runs were found on. New values of buffers that only a left-out layer
    computes are no outputs any more; inputs stay, whether they are read or not.

    Raises AxisError for a graph with a backward (derive that from the result), or runs of another graph.
    """
    if any(n.meta.get("phase") == Phase.BACKWARD for n in graph.graph.nodes):
        raise AxisError("graph: it has a backward; leave runs out of the forward graph and derive its backward anew")
    draft = graph.draft()
    leave_out_of(draft, runs)
    return draft.finish()


def leave_out_of(draft: Draft, runs: Iterable[Run]) -> None:
    """`leave_out` in a draft of the forward graph on which the runs were found; others may have been left out before.

    Random operators of a run go with it. Raises AxisError for runs of another graph.
    """
    order = {node: i for i, node in enumerate(draft.origin.graph.nodes)}
    gone: set[fx.Node] = set()
    chosen = list(runs)
    for run in chosen:
        if run.exit not in order:
            raise AxisError(f"runs: {run} is no run of this graph")
    for run in sorted(chosen, key=lambda r: order[r.exit]):
        gone.update(run.nodes)
        entry = run.entry
        while entry in draft.left_out:
            entry = draft.left_out[entry]
        draft.left_out[run.exit] = entry
        draft.node(run.exit).replace_all_uses_with(draft.node(entry))
    _keep_statistics(draft, gone)
    _keep_sizes(draft, gone)
    copies = {draft.node(node) for node in gone}
    for node in reversed(draft.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and (node in copies or is_pure(node)):
            draft.graph.erase_node(node)


def _keep_statistics(draft: Draft, gone: set[fx.Node]) -> None:
    """Buffers that layers which are gone give a new value have no new value any more: statistics, whatever computes
    them, the counter beside them, and what else a module writes all of whose other operators are gone."""
    for node in gone:
        for user in node.users if node.target is _BATCH_NORM else ():
            if user.target is getitem and user.args[1] in _STATISTICS:
                draft.node(user).replace_all_uses_with(draft.node(node.args[user.args[1]]))  # type: ignore[index, arg-type]
    copies = {draft.node(node) for node in gone}
    inside = _computed_from(draft, copies)
    left, right = _paths(gone), _paths(_live(draft) - copies)
    silent = left - right  # modules of which nothing else is left
    old = [
        o.kind is OutputKind.BUFFER
        and r is not None
        and (r.op == "placeholder" or r in inside or o.name.rpartition(".")[0] in silent)
        for o, r in zip(draft.signature.outputs, draft.results, strict=True)
    ]
    modules = {o.name.rpartition(".")[0] for o, same in zip(draft.signature.outputs, old, strict=True) if same}
    draft.keep_outputs(
        [
            not same and not (o.kind is OutputKind.BUFFER and o.name.rpartition(".")[0] in modules)
            for o, same in zip(draft.signature.outputs, old, strict=True)
        ]
    )


def _keep_sizes(draft: Draft, gone: set[fx.Node]) -> None:
    """What reads a free size off a tensor that is gone reads it off an input."""
    inputs: dict[sympy.Symbol, fx.Node] = {}
    for node in gone:
        for user in node.users:
            copy = draft.node(user)
            if copy.users and user not in gone and is_size(user):
                copy.replace_all_uses_with(size_of_inputs(draft, expression(user.meta["val"]), copy, inputs))


def size_of_inputs(draft: Draft, size: Expr, like: fx.Node, inputs: dict[sympy.Symbol, fx.Node]) -> Any:
    """A size as an argument: a number, or nodes that compute it from sizes of inputs."""
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Symbol):
        if size not in inputs:
            last = draft.placeholders[-1]
            source, dim = _input_of_size(draft.placeholders, size)  # type: ignore[misc]
            inputs[size] = draft.add(torch.ops.aten.sym_size.int, source, dim, like=like, after=last)
        return inputs[size]
    parts = [size_of_inputs(draft, part, like, inputs) for part in size.args]
    operator = add if isinstance(size, sympy.Add) else mul
    return reduce(lambda a, b: draft.add(operator, a, b, like=like), parts)


def _input_of_size(placeholders: Iterable[fx.Node], symbol: sympy.Symbol) -> tuple[fx.Node, int] | None:
    for node in placeholders:
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if expression(size) == symbol:
                return node, dim
    return None


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a free size that inputs tell too, by sums and products of theirs: it says nothing about
    the values of a tensor that it is read off."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and _of_inputs(expression(value), node.graph)


def _of_inputs(size: Expr, graph: fx.Graph) -> bool:
    if isinstance(size, sympy.Symbol):
        return _input_of_size(graph.find_nodes(op="placeholder"), size) is not None
    if isinstance(size, (sympy.Add, sympy.Mul)):
        return all(_of_inputs(expression(part), graph) for part in size.args)
    return isinstance(size, int)


_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
_STATISTICS = (3, 4)
"""Positions of the running statistics among a batch norm's operands, and of their new values among its results."""


def _computed_from(draft: Draft, gone: set[fx.Node]) -> set[fx.Node]:
    """The nodes of a draft that are gone, or read a value of one; sizes are none (inputs tell them too)."""
    found: set[fx.Node] = set()
    for node in draft.graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue
        own = node in gone and node.target is not getitem  # a run may read a result of what stays
        if own or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _live(draft: Draft) -> set[fx.Node]:
    """The operators of a draft that results other than new values of buffers are computed from."""
    pairs = zip(draft.signature.outputs, draft.results, strict=True)
    return ancestors(r for o, r in pairs if r is not None and o.kind is not OutputKind.BUFFER)


def _paths(nodes: Iterable[fx.Node]) -> set[str]:
    """The paths of the modules of operators, and of the modules around those."""
    found: set[str] = set()
    for path in {n.meta.get("module", "") for n in nodes if n.op == "call_function"}:
        parts = path.split(".")
        found.update(".".join(parts[: i + 1]) for i in range(len(parts)) if path)
    return found


# -- sums of a tensor with what was computed from it ----------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    entry: fx.Node
    exit: fx.Node
    nodes: frozenset[fx.Node]
    tail: tuple[Any, ...] = ()  # the operators behind the sum that belong to it


class _Search:
    """The search for residual sums of the forward pass. ``order``: the position of each node; ``live``: what loss and
    outputs are computed from. Values that only backward or running statistics read do not hold a layer in place."""

    def __init__(self, axes: Axes, alike: str = "operators"):
        self.axes, self.alike = axes, alike
        graph = axes.graph
        self.parameters = {node: name for name, node in graph.input_nodes(InputKind.PARAMETER).items()}
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        results = zip(graph.outputs, graph.results, strict=True)
        self.results = {n for o, n in results if n is not None and o.kind in (OutputKind.LOSS, OutputKind.OUTPUT)}
        self.live = ancestors(self.results)
        self.adds = {node for node, *_ in axes.sums() if node in self.live}

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The readers of ``node`` that count."""
        return [u for u in node.users if u in self.live]

    def sums(self) -> list[_Sum]:
        """The residual sums, in the order of their exits."""
        found = []
        for node in sorted(self.adds, key=self.order.__getitem__):
            users = self.users(node)
            term = len(users) == 1 and users[0] in self.adds and node not in self.results
            if term and self.residual(users[0], self.terms(users[0])) and not self.residual(node, node.all_input_nodes):
                continue  # a term of a longer sum
            result = self.residual(node, self.terms(node)) or self.residual(node, node.all_input_nodes)
            if result is not None:
                found.append(result)
        return found

    def terms(self, node: fx.Node) -> list[fx.Node]:
        """What a sum of sums adds up."""
        terms: list[fx.Node] = []
        for source in node.all_input_nodes:
            inside = source in self.adds and len(self.users(source)) == 1 and source not in self.results
            terms += self.terms(source) if inside else [source]
        return terms

    def residual(self, node: fx.Node, terms: Sequence[fx.Node]) -> _Sum | None:
        """The sum as one of its terms and what was computed from that one; None if it is no such sum."""
        entry = min(terms, key=self.order.__getitem__)
        if len(terms) < 2 or not _same(self.axes, entry, node):
            return None
        between = self.between(entry, node)
        if not all(t in between for t in terms if t is not entry) or not self.results.isdisjoint(between - {node}):
            return None
        if any(u not in between and not is_size(u) for n in between - {node} if not is_size(n) for u in self.users(n)):
            return None
        dead = self.dead(node, entry)
        return _Sum(entry, node, frozenset(dead)) if any(map(_is_layer, dead)) else None

    def between(self, entry: fx.Node, last: fx.Node) -> set[fx.Node]:
        """The nodes on the ways from ``entry`` to ``last``, with ``last``."""
        limit = self.order[entry]
        above = ancestors([last], lambda n: self.order[n] > limit and n.op == "call_function")
        below = {entry}
        for node in sorted(above, key=self.order.__getitem__):
            if any(source in below for source in node.all_input_nodes):
                below.add(node)
        return below - {entry}

    def dead(self, last: fx.Node, entry: fx.Node) -> set[fx.Node]:
        """What nothing reads any more when ``last`` is replaced by ``entry``."""
        dead: set[fx.Node] = {last}
        waiting = set(last.all_input_nodes)
        while waiting:
            node = max(waiting, key=self.order.__getitem__)
            waiting.discard(node)
            if (
                node is not entry
                and node.op == "call_function"
                and all(u in dead or is_size(u) for u in self.users(node))
            ):
                dead.add(node)
                waiting.update(node.all_input_nodes)
        return dead

    # -- chains of them -------------------------------------------------------------------------------------------

    def chains(self) -> list[list[Run]]:
        """Runs that follow each other, the exit of one the entry of the next."""
        chains: list[list[_Sum]] = []
        for found in self.sums():
            if chains and (prolonged := self.prolonged(chains[-1][-1], until=found.entry)) is not None:
                chains[-1][-1:] = [prolonged, found]
            else:
                chains.append([found])
        for chain in chains:  # the last one ends like those before it
            for tail in sorted({s.tail for s in chain[:-1]}, key=len, reverse=True):
                if tail and (prolonged := self.prolonged(chain[-1], tail=tail)) is not None:
                    chain[-1] = prolonged
                    break
        return [[self.run(s) for s in chain] for chain in chains]

    def prolonged(self, found: _Sum, *, until: fx.Node | None = None, tail: Sequence[Any] | None = None) -> _Sum | None:
        """The run with what follows its sum, to a node or by a list of operators: no layers, and each the only reader
        of the one before. None where that does not lead there, or to other axes."""
        passed: list[Any] = []
        at, nodes = found.exit, set(found.nodes)
        while at is not until and len(passed) < (_TAIL if tail is None else len(tail)):
            users = self.users(at)
            if len(users) != 1 or at in self.results or _is_layer(users[0]):
                return None
            at = users[0]
            if tail is not None and at.target != tail[len(passed)]:
                return None
            nodes.add(at)
            passed.append(at.target)
        arrived = at is until if until is not None else True
        return (
            _Sum(found.entry, at, frozenset(nodes), tuple(passed))
            if arrived and _same(self.axes, found.entry, at)
            else None
        )

    def run(self, found: _Sum) -> Run:
        """The sum as a run."""
        nodes = tuple(sorted(found.nodes, key=self.order.__getitem__))
        layers = [n.meta.get("module", "") for n in nodes if _is_layer(n)]
        structure = _structure(found.entry, nodes) if self.alike == "operators" else self.layers(nodes)
        return Run(found.entry, found.exit, nodes, _around(layers), structure)

    def layers(self, nodes: Sequence[fx.Node]) -> str:
        """A digest of the layers in a run and of the parameters that its operators read, in the order of use."""
        words: list[Any] = []
        for node in nodes:
            words += [str(node.target)] if _is_layer(node) else []
            read = [source for source in node.all_input_nodes if source in self.parameters]
            words += [(self.parameters[source].rpartition(".")[2], _sizes(source)) for source in read]
        return _digest(words)


_LAYERS = {"contraction", "convolution", "attention", "recurrent", "pooling", "resampling", "transform"}
_TAIL = 8
"""How many operators (norm, activation) may stand between two runs of a chain."""


def _is_layer(node: fx.Node) -> bool:
    known = rule(node)
    return known is not None and known.family in _LAYERS


def _same(axes: Axes, a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors lie on the same axes, and are of the same type."""
    u, v = a.meta["val"], b.meta["val"]
    return type(u) is type(v) and u.dtype == v.dtype and axes.of(a) == axes.of(b)


# -- structures ------------------------------------------------------------------------------------------------------


def _structure(entry: fx.Node, nodes: Sequence[fx.Node]) -> str:
    """A digest of the operators, how they are connected, and the sizes they work on."""
    numbers: dict[fx.Node, Any] = {entry: "entry"}
    words = []
    for i, node in enumerate(n for n in nodes if not isinstance(n.meta.get("val"), torch.SymInt)):
        sources = tuple(numbers.get(s) or _sizes(s) for s in node.all_input_nodes)
        words.append((str(node.target), _sizes(node), sources))
        numbers[node] = i + 1
    return _digest(words)


def _sizes(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(str(expression(s)) for s in value.shape) if isinstance(value, torch.Tensor) else ()


def _digest(words: Any) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def _grouped(chain: Sequence[Run], order: dict[fx.Node, int]) -> list[Stage]:
    """The chain as stages: the shortest pattern of structures that repeats most is one run of a stage."""
    result: list[Stage] = []
    at = 0
    structures = [run.structure for run in chain]
    while at < len(chain):
        period, times = max(
            ((p, _repeats(structures, at, p)) for p in range(1, (len(chain) - at) // 2 + 1)),
            key=lambda pair: (pair[0] * pair[1] if pair[1] > 1 else 0, -pair[0]),
            default=(1, 1),
        )
        if times < 2:
            period, times = 1, 1
        blocks = [chain[at + i * period : at + (i + 1) * period] for i in range(times)]
        result.append(Stage(tuple(_joined(block, order) for block in blocks)))
        at += period * times
    return result


def _repeats(structures: Sequence[str], at: int, period: int) -> int:
    pattern = structures[at : at + period]
    times = 1
    while structures[at + times * period : at + (times + 1) * period] == pattern:
        times += 1
    return times


def _joined(runs: Sequence[Run], order: dict[fx.Node, int]) -> Run:
    if len(runs) == 1:
        return runs[0]
    nodes = tuple(sorted({n for run in runs for n in run.nodes}, key=order.__getitem__))
    structure = _digest([run.structure for run in runs])
    return Run(runs[0].entry, runs[-1].exit, nodes, _around(run.module for run in runs), structure)


def _around(paths: Any) -> str:
    """The path of the innermost module that holds all of ``paths``."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
