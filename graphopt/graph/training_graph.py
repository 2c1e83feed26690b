"""`TrainingGraph`: one training step as a flat graph of ATen operators with a signature.

The graph is a pure function: every input and output is named and of a kind, new values of parameters, buffers and
optimizer state are outputs, nothing is written in place (lowering decides what can be). It is immutable to its
users: a rewrite works on a `Draft` and ends in a new `TrainingGraph`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.sizes import Symbols

if TYPE_CHECKING:
    import networkx

    from graphopt.cost_model import Estimate
    from graphopt.graph.axes import Axes
    from graphopt.graph.draft import Draft
    from graphopt.visualize.page import Page


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
    PLACE = "place"  # of a processor: where its part of a sharded axis lies in the whole, Python numbers


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
        self.derived: dict[Hashable, Any] = {}  # what floors above compute of the graph once; it dies with the graph
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

    @cached_property
    def axes(self) -> Axes:
        """The identities of all tensor dimensions; see `graphopt.graph.axes.analyse`."""
        from graphopt.graph.axes import analyse

        return analyse(self)

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
        from graphopt.graph.digest import digest

        return digest(self)

    # -- text and files -----------------------------------------------------------------------------------------

    def text(self, *, source: bool = True, axes: bool = False) -> str:
        """The graph as text: one line a node with its operator, shape, module path and source line; with ``axes``, the
        sizes in shapes with the names of their axes (``embed=64``)."""
        from graphopt.graph.text import render

        return render(self, source=source, axes=axes)

    def __str__(self) -> str:
        return self.text(axes=True)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph to ``path`` (a zip of JSON and safetensors, no pickle)."""
        from graphopt.graph.serialize import save

        save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> TrainingGraph:
        """Read a graph written by `save`. No code of the file is run. Raises LoadError if it does not fit."""
        from graphopt.graph.serialize import load

        return load(path)

    # -- pictures and other tools -------------------------------------------------------------------------------

    def show(self, path: str | PathLike[str] | None = None, **options: Any) -> Page:
        """The graph as a page to look at and to search; see `graphopt.show`."""
        from graphopt.visualize.show import show

        return show(self, path, **options)

    def to_networkx(self, price: Estimate | None = None) -> networkx.MultiDiGraph:
        """The graph as a networkx multigraph: a node for each operator, input and constant, an edge for each operand.

        Attributes of nodes: ``position`` (in the order of execution), ``op``, ``arguments``, ``type``, ``axes``,
        ``phase``, ``module``, ``source``, ``flops`` and ``bytes`` (at the sizes of the price, or of the capture),
        ``input`` and ``output`` (what the signature says), ``placement`` in divided graphs, and ``seconds`` where a
        price is given. Those of edges: ``operand`` (which one of the reader) and ``type``. All are strings and numbers.

        Raises ValueError where ``price`` is that of another graph.
        """
        from graphopt.graph.networkx_export import to_networkx

        return to_networkx(self, price)

    def write_graphml(self, path: str | PathLike[str], price: Estimate | None = None) -> None:
        """Write `to_networkx` as GraphML, for Gephi, yEd or ``networkx.read_graphml``."""
        from graphopt.graph.networkx_export import write_graphml

        write_graphml(self, path, price)

    def write_dot(self, path: str | PathLike[str], price: Estimate | None = None) -> None:
        """Write the graph for Graphviz, with the attributes of `to_networkx` and a box around each module."""
        from graphopt.graph.networkx_export import write_dot

        write_dot(self, path, price)

    # -- rewriting ----------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """A mutable copy to rewrite; `Draft.finish` makes it a graph again."""
        from graphopt.graph.draft import Draft

        return Draft(self)
