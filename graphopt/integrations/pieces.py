"""`Piece`: what happened to one graph that Dynamo gave us; `optimized` runs the passes on it.

A piece is never worse off for being here. A graph that is none of ours, and a pass that fails on it, leave it as it
was; a warning in the log ``graphopt`` names the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import fx

from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.torch_internals import disable_dispatch_modes
from graphopt.graph.training_graph import Input, InputKind, TrainingGraph
from graphopt.integrations.joint import Joint, as_module, as_training_graph
from graphopt.passes import Pass, PassResult
from graphopt.plan import pass_lines
from graphopt.visualize.page import Page
from graphopt.visualize.show import show

log = logging.getLogger("graphopt")


@dataclass(frozen=True)
class Piece:
    """One graph between two graph breaks, before and after the passes.

    Attributes:
        name: Dynamo's number of the piece and the line where it begins.
        result: the graph after the passes with their changes and refusals; None for a piece that is left alone.
        why_not: why it is left alone; empty otherwise.
        dropped: passes that failed on it, each with the reason.
        trains: whether it has a backward.
    """

    name: str
    result: PassResult | None
    why_not: str = ""
    dropped: tuple[str, ...] = ()
    trains: bool = True

    @property
    def before(self) -> TrainingGraph | None:
        """The graph that AOTAutograd traced."""
        return None if self.result is None else self.result.before or self.result.graph

    def explain(self) -> str:
        """What the passes did to the piece, for a person."""
        if self.result is None or self.before is None:
            return f"piece {self.name}: left to torch, {self.why_not}"
        before, after = self.before, self.result.graph
        kept = f", {before.bytes_kept():,} -> {after.bytes_kept():,} bytes kept for backward" if self.trains else ""
        lines = [
            f"piece {self.name}, as traced -> after passes: {len(before)} -> {len(after)} operators{kept}",
            *pass_lines(self.result),
            *(f"  left out for this piece: {reason}" for reason in self.dropped),
        ]
        return "\n".join(lines)

    def show(self, path: str | PathLike[str] | None = None, **options: Any) -> Page:
        """The piece as a page to look at, with what the passes removed; arguments as `graphopt.show`.

        Raises GraphoptError for a piece that is left alone.
        """
        if self.result is None:
            raise GraphoptError(f"piece {self.name}: it is left to torch and has no graph of ours, {self.why_not}")
        return show(self.result, path, **{"title": f"piece {self.name}", **options})


_recordings: list[list[Piece]] = []


@contextmanager
def recording() -> Iterator[list[Piece]]:
    """The pieces that are compiled in the block, in their order; wherever ``torch.compile`` is called from.

    >>> import torch, graphopt.integrations
    >>> graphopt.integrations.register()
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> with graphopt.integrations.recording() as pieces:
    ...     torch.compile(net, backend="graphopt")(torch.randn(5, 4)).sum().backward()
    >>> print(pieces[0].explain())
    piece ...: ... -> ... operators, ... -> ... bytes kept for backward
    passes:
      no_ops: ...
    """
    pieces: list[Piece] = []
    _recordings.append(pieces)
    try:
        yield pieces
    finally:
        _recordings[:] = [other for other in _recordings if other is not pieces]


def optimized(
    module: fx.GraphModule, forward_outputs: int, *, name: str, inputs: Sequence[Input], passes: Sequence[Pass]
) -> fx.GraphModule:
    """The graph of AOTAutograd after the passes; ``module`` itself, unchanged, where nothing was to be done.

    Args:
        module: a joint graph, or a graph of forward alone.
        forward_outputs: how many of its results are forward's.
        name: of the piece, for reports.
        inputs: what the inputs of the piece are to the user.
        passes: run in this order; one that fails is left out.
    """
    with disable_dispatch_modes():  # AOTAutograd's, under which constants would be computed as fake tensors
        try:
            joint = as_training_graph(module, forward_outputs, inputs)
        except CaptureError as error:
            _report(Piece(name, None, str(error)), logging.WARNING)
            return module
        result, dropped = _run(joint, name, passes)
        trains = any(i.kind is InputKind.TANGENT for i in joint.graph.inputs)
        _report(Piece(name, result, dropped=dropped, trains=trains), logging.INFO)
        return as_module(joint, result.graph) if result.graph is not joint.graph else module


def _run(joint: Joint, name: str, passes: Sequence[Pass]) -> tuple[PassResult, tuple[str, ...]]:
    """The passes that succeed on a piece, one after the other, and why others did not."""
    result, dropped = PassResult(joint.graph), []
    for one in passes:
        try:
            after = one(result)
            why_not = joint.why_not(after.graph)
        except Exception as error:  # a pass met a graph of a kind that it was not made for; the user's training goes on
            why_not = f"{type(error).__name__}: {error}"
            log.debug("pass %s on piece %s", one.name, name, exc_info=True)
        if why_not:
            first_line = why_not.partition("\n")[0]
            dropped.append(f"{one.name}, {first_line}")
            log.warning("pass %s is left out for piece %s: %s", one.name, name, first_line)
            continue
        result = after
    return result, tuple(dropped)


def _report(piece: Piece, level: int) -> None:
    log.log(level, "%s", piece.explain())
    for recorded in _recordings:
        recorded.append(piece)
