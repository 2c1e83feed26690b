"""`Draft`: a training graph under construction."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add, mul
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.sizes import expression
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.graph.training_graph import Input, Phase, TrainingGraph


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
            if isinstance(node.meta.get("val"), torch.SymInt) and expression(node.meta["val"]) == symbol:
                return node
            shape = getattr(node.meta.get("val"), "shape", ())
            if dims := [i for i, s in enumerate(shape) if expression(s) == symbol]:
                made = self.add(torch.ops.aten.sym_size.int, node, dims[0], like=node, after=inputs[-1])
                made.meta["phase"] = Phase.FORWARD
                return made
        raise PassError(f"no input has the size {symbol}")

    def add_input(self, input_: Input, val: Any) -> fx.Node:
        """A new input behind the others, with this value as its metadata."""
        with self.graph.inserting_after(self.placeholders[-1]):
            node = self.graph.placeholder(re.sub(r"\W+", "_", "_".join(filter(None, (input_.name, input_.field)))))
        node.target = node.name  # unique and an identifier
        node.meta.update(val=val, phase=Phase.INPUT, module="", source="")
        self.signature = replace(self.signature, inputs=(*self.signature.inputs, input_))
        return node

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
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = fake_mode_of((args, kwargs)) or fake_mode_of([n.meta.get("val") for n in node.graph.nodes])
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with mode, without_guards(mode):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def infer_or_copy(draft: Draft, node: fx.Node) -> None:
    """Infer the metadata of a draft's node whose operands changed. A view that their strides do not allow becomes a
    copy, as in eager's ``reshape``: the kernel of an attention, and so the strides of what it gives, depends on whether
    sizes are equal."""
    try:
        node.meta["val"] = infer(node)
    except (ValueError, RuntimeError):
        if node.target not in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            raise
        source, size = node.args
        whole = draft.add(torch.ops.aten.clone.default, source, like=node, memory_format=torch.contiguous_format)
        node.target, node.args = torch.ops.aten._unsafe_view.default, (whole, size)
        node.meta["val"] = infer(node)
