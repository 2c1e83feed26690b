"""`TrainingGraph`: one training step as a flat graph of ATen operators with a signature.

The graph is a pure function: every input and output is named and of a kind, new values of parameters, buffers and
optimizer state are outputs, nothing is written in place (lowering decides what can be). It is immutable to its
users: a rewrite works on a `Draft` and ends in a new `TrainingGraph`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import reduce
from operator import add, mul
from os import PathLike
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.errors import PassError
from graphopt.graph.sizes import Symbols, expression


class InputKind(StrEnum):
    """What an input of a training graph is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    BATCH = "batch"
    TANGENT = "tangent"  # gradient of an output, where there is no loss
    GRADIENT = "gradient"  # gradient accumulated so far (`.grad`)
    STATE = "state"  # of the optimizer, one tensor a parameter
    HYPER = "hyper-parameter"  # of the optimizer or of clipping, a Python number or a tensor
    RANDOM = "random state"
    SAVED = "saved"  # of a backward half: what its forward half kept


class OutputKind(StrEnum):
    """What an output of a training graph is."""

    LOSS = "loss"
    OUTPUT = "output"
    GRADIENT = "gradient"
    PARAMETER = "new parameter"
    BUFFER = "new buffer"
    STATE = "new state"
    SAVED = "saved"  # of a forward half: what its backward half reads


class Phase(StrEnum):
    """The part of the step a node belongs to (``node.meta["phase"]``)."""

    INPUT = "input"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    OUTPUT = "output"


@dataclass(frozen=True)
class Input:
    """One input. ``name``: path of the parameter or buffer, of the batch leaf, or of the optimizer group; ``field``:
    which state or hyper-parameter of it (``exp_avg``, ``lr``, ``betas.0``), empty otherwise."""

    kind: InputKind
    name: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{'.' + self.field if self.field else ''}"


@dataclass(frozen=True)
class Output:
    """One output. ``name``: path of the parameter, buffer or batch leaf whose gradient or new value it is, or of the
    model's output leaf; ``field``: which optimizer state, empty otherwise."""

    kind: OutputKind
    name: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{'.' + self.field if self.field else ''}"


@dataclass(frozen=True)
class Signature:
    """Kinds and names of a graph's inputs and outputs in order, its free sizes, and what it was captured from.

    ``owned``: parameters that an optimizer of this step updates; None where the step has no optimizer. ``tree``:
    facts about the calling convention that capture records for whoever binds the graph (JSON-able).
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    symbols: Symbols = field(default_factory=Symbols)
    owned: frozenset[str] | None = None
    tree: Mapping[str, Any] = field(default_factory=dict)


class TrainingGraph:
    """A training step as one graph of ATen operators. See the module's docstring; made by `graphopt.capture`.

    Each node carries ``meta["val"]`` (a fake tensor, a symbolic or plain number, or a tuple of those),
    ``meta["phase"]`` (a `Phase`), ``meta["module"]`` (path of the module, may be empty) and ``meta["source"]``
    (``file.py:line`` of the user's code, may be empty).
    """

    def __init__(self, graph: fx.Graph, signature: Signature, constants: Mapping[str, torch.Tensor] | None = None):
        """Takes ownership of ``graph``; its placeholders and its output tuple must match ``signature`` in order."""
        self._graph = graph
        self._signature = signature
        self._constants = dict(constants or {})
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(signature.inputs):
            raise PassError(f"graph has {len(placeholders)} placeholders, its signature {len(signature.inputs)} inputs")
        if len(self.results) != len(signature.outputs):
            raise PassError(f"graph has {len(self.results)} results, its signature {len(signature.outputs)} outputs")
        self._placeholders = tuple(placeholders)

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The fx graph. Read only: change a `draft()` instead."""
        return self._graph

    @property
    def signature(self) -> Signature:
        """Kinds and names of inputs and outputs, free sizes, owned parameters."""
        return self._signature

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes in execution order, placeholders first, the output node last."""
        return tuple(self._graph.nodes)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs in order."""
        return self._signature.inputs

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs in order."""
        return self._signature.outputs

    @property
    def placeholders(self) -> tuple[fx.Node, ...]:
        """The nodes of the inputs, aligned with `inputs`."""
        return self._placeholders

    @property
    def results(self) -> tuple[fx.Node | None, ...]:
        """The nodes that give the outputs, aligned with `outputs`."""
        return tuple(next(iter(reversed(self._graph.nodes))).args[0])  # type: ignore[arg-type]

    @property
    def constants(self) -> Mapping[str, torch.Tensor]:
        """Tensors that the model's code made at capture, by the target of their ``get_attr`` nodes."""
        return self._constants

    @property
    def symbols(self) -> Symbols:
        """The free sizes (usually ``batch``), their values at capture and the guards: the range of validity."""
        return self._signature.symbols

    def input_nodes(self, kind: InputKind) -> dict[str, fx.Node]:
        """Placeholders of one kind by name (``name.field`` where there is a field)."""
        pairs = zip(self.inputs, self._placeholders, strict=True)
        return {i.name + ("." + i.field if i.field else ""): n for i, n in pairs if i.kind is kind}

    def output_nodes(self, kind: OutputKind) -> dict[str, fx.Node | None]:
        """Result nodes of one kind by name (``name.field`` where there is a field)."""
        pairs = zip(self.outputs, self.results, strict=True)
        return {o.name + ("." + o.field if o.field else ""): n for o, n in pairs if o.kind is kind}

    def __len__(self) -> int:
        """Number of operators (placeholders, constants and the output are none)."""
        return sum(n.op == "call_function" for n in self._graph.nodes)

    def __repr__(self) -> str:
        phases = ", ".join(
            f"{sum(n.meta.get('phase') == p for n in self.nodes)} {p}"
            for p in (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)
        )
        return f"TrainingGraph({len(self)} operators: {phases}; {len(self.inputs)} inputs, {len(self.outputs)} outputs)"

    # -- counting -----------------------------------------------------------------------------------------------

    def flops(self, sizes: Mapping[str, int] | None = None, *, phase: Phase | None = None) -> int:
        """Floating point operations of one step (a multiply-add counts two), at ``sizes`` or those of the capture."""
        from graphopt.graph.op_rules import flops

        chosen = (n for n in self._graph.nodes if phase is None or n.meta.get("phase") == phase)
        return sum(self.symbols.evaluate(flops(n), sizes) for n in chosen)

    def bytes_kept(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes kept for backward: distinct storages made by forward and read by backward, without the inputs."""
        from graphopt.graph.storages import kept_for_backward

        return sum(self.symbols.evaluate(s.nbytes, sizes) for s in kept_for_backward(self))

    def hash(self) -> str:
        """A digest of what the graph computes as a DAG: equal for graphs that differ only in names and order.

        Inputs and outputs count by kind, name and shape; random operators also by their order; the number of
        operators that outputs depend on counts too, so that a graph with twins differs from one without.
        """
        return _digest(self)

    # -- text and files -----------------------------------------------------------------------------------------

    def text(self, *, source: bool = True) -> str:
        """The graph as text: one line a node with its operator, shape, module path and source line."""
        from graphopt.graph.text import render

        return render(self, source=source)

    def __str__(self) -> str:
        return self.text()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph to ``path`` (a zip of JSON and safetensors, no pickle)."""
        from graphopt.graph.serialize import save

        save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> TrainingGraph:
        """Read a graph written by `save`. No code of the file is run. Raises LoadError if it does not fit."""
        from graphopt.graph.serialize import load

        return load(path)

    # -- rewriting ----------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """A mutable copy to rewrite; `Draft.finish` makes it a graph again."""
        return Draft(self)


class Draft:
    """A mutable copy of a training graph. Edit through ``graph`` (an `fx.Graph`) and the helpers, then `finish`.

    ``node(n)`` gives the copy of a node of the original graph.
    """

    def __init__(self, origin: TrainingGraph):
        self.origin = origin
        self.graph = fx.Graph()
        self.constants = dict(origin.constants)
        self._copies: dict[fx.Node, fx.Node] = {}
        for node in origin.graph.nodes:
            copy = self.graph.node_copy(node, lambda n: self._copies[n])
            if node.op == "output":
                copy.meta = dict(node.meta)
            self._copies[node] = copy
        self.signature = origin.signature

    def node(self, original: fx.Node) -> fx.Node:
        """The copy of ``original`` in this draft."""
        return self._copies[original]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(iter(reversed(self.graph.nodes)))

    @property
    def results(self) -> list[fx.Node | None]:
        """The nodes of the outputs, a copy of the list."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The nodes of the inputs."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def add(
        self,
        op: Callable[..., Any],
        *args: Any,
        like: fx.Node,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        phase: Phase | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert ``op(*args, **kwargs)`` and infer its metadata on fake tensors.

        Placed before or after the given node, else right before ``like``. Module path, source line and phase are
        those of ``like`` unless ``phase`` is given.
        """
        place = self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(before or like)
        with place:
            node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = infer(node)
        node.meta["phase"] = phase or like.meta["phase"]
        node.meta["module"] = like.meta.get("module", "")
        node.meta["source"] = like.meta.get("source", "")
        return node

    def size(self, value: Any, like: fx.Node) -> int | fx.Node:
        """A size as an argument for `add`: an int, or a node that computes it from the sizes the graph has already.

        Raises PassError for an expression that is no sum or product of free sizes and integers.
        """
        expr = expression(value)
        if isinstance(expr, int):
            return expr
        if isinstance(expr, sympy.Symbol):
            return self._symbol(expr)
        if not isinstance(expr, (sympy.Add, sympy.Mul)):
            raise PassError(f"cannot write the size {self.origin.symbols.rename(expr)} as operators")
        operator = add if isinstance(expr, sympy.Add) else mul
        parts = [self.size(a, like) for a in expr.args]
        return reduce(lambda a, b: self.add(operator, a, b, like=like), parts)

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        """The node that reads a free size off an input; made where there is none yet."""
        inputs = self.placeholders
        for node in self.graph.nodes:
            if node.target is torch.ops.aten.sym_size.int and expression(node.meta["val"]) == symbol:
                return node
        for node in inputs:
            shape = getattr(node.meta.get("val"), "shape", ())
            if dims := [i for i, s in enumerate(shape) if expression(s) == symbol]:
                made = self.add(torch.ops.aten.sym_size.int, node, dims[0], like=node, after=inputs[-1])
                made.meta["phase"] = Phase.FORWARD
                return made
        raise PassError(f"no input has the size {symbol}")

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new``; ``old`` is erased."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def keep_outputs(self, keep: Sequence[bool]) -> None:
        """Drop the outputs whose flag is False from the results and the signature."""
        kept = [(r, o) for r, o, k in zip(self.results, self.signature.outputs, keep, strict=True) if k]
        self.output.args = (tuple(r for r, _ in kept),)
        self.signature = replace(self.signature, outputs=tuple(o for _, o in kept))

    def finish(self) -> TrainingGraph:
        """The draft as an immutable graph; the draft must not be used afterwards. Lints the graph."""
        try:
            self.graph.lint()
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise PassError(f"the rewritten graph is not well formed: {first_line}") from error
        for node in self.graph.nodes:
            if node.op == "call_function" and ("val" not in node.meta or "phase" not in node.meta):
                raise PassError(f"{node.format_node()} has no metadata; make nodes with Draft.add")
        return TrainingGraph(self.graph, self.signature, self.constants)


def infer(node: fx.Node) -> Any:
    """The value a node has on fake tensors: runs its operator on the ``meta["val"]`` of its arguments."""
    from graphopt.graph.torch_internals import fake_mode_of

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = fake_mode_of((args, kwargs)) or fake_mode_of([n.meta.get("val") for n in node.graph.nodes])
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _digest(graph: TrainingGraph) -> str:
    from graphopt.graph.op_rules import is_random
    from graphopt.graph.text import shape_text

    digests: dict[fx.Node, str] = {}
    random_count = 0

    def of(value: Any) -> str:
        return digests[value] if isinstance(value, fx.Node) else repr(value)

    live = _live(graph)
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


def _live(graph: TrainingGraph) -> set[fx.Node]:
    """Nodes that an output depends on."""
    live: set[fx.Node] = set()
    stack = [r for r in graph.results if r is not None]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _structure(value: Any) -> str:
    """Nesting of an argument, without its leaves."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_structure(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_structure(v)}" for k, v in value.items()) + "}"
    return "."


def _sha(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()
