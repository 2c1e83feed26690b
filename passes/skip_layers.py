"""Skip layers: a forward graph without some of its residual layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import PassError
from graphopt.graph.depth import Run, leave_out, stages
from graphopt.graph.op_rules import flops
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Saving, Tier, place


@dataclass(frozen=True)
class SkipLayers(Pass):
    """Leave runs of layers out: ``v = u + f(u)`` becomes ``v = u``.

    ``layers``: paths of the modules around the runs (`graphopt.graph.depth.stages` lists them). The result computes
    another function, that of the model without these modules; it is well formed as u and v lie on the same axes. Random
    operators of a layer go with it, as they would with the module, and so do new values of its buffers. Inputs stay,
    read or not. The graph is a forward graph; its backward is derived from the result.

    ::

        %linear = aten.linear(%x, %w, %b)   # removed
        %add = aten.add(%x, %linear)        # removed
        %relu = aten.relu(%add)             # aten.relu(%x)

    >>> import torch
    >>> from graphopt.graph.forward import capture_forward
    >>> class Residual(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body = torch.nn.Linear(4, 4)
    ...
    ...     def forward(self, x):
    ...         return x + self.body(x)
    >>> graph = capture_forward(torch.nn.Sequential(Residual(), Residual(), torch.nn.Linear(4, 2)), torch.randn(3, 4))
    >>> result = SkipLayers(["0"])(graph)
    >>> print(result.changes[0].what, len(graph), len(result.graph))
    left 0 out: 2 operators 5 3
    """

    name: ClassVar[str] = "skip_layers"
    tier: ClassVar[Tier] = Tier.EXACT
    drops_outputs: ClassVar[bool] = True
    drops_draws: ClassVar[bool] = True
    layers: tuple[str, ...]

    def __init__(self, layers: Iterable[str]):
        """``layers``: any iterable of paths."""
        object.__setattr__(self, "layers", tuple(layers))

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class. A path that is no run is refused; a graph with a backward is an error of the caller."""
        known: dict[str, list[Run]] = {}
        for stage in stages(graph.axes, alike="parameters"):
            for run in stage.runs:
                known.setdefault(run.module, []).append(run)
        runs = [run for path in dict.fromkeys(self.layers) for run in known.get(path, ())]
        why = f"no run of layers with one entry and one exit on the same axes; there are {', '.join(known) or 'none'}"
        refusals = tuple(Refusal(self.name, path, path, "", why) for path in self.layers if path not in known)
        if not runs:
            return PassResult(graph, (), refusals)
        if any(node.meta.get("phase") == "backward" for node in graph.nodes):
            raise PassError("graph: it has a backward; skip layers of the forward graph and derive its backward anew")
        evaluate = graph.symbols.evaluate
        changes = [
            Change(
                self.name, f"left {run.module} out: {len(run.nodes)} operators", run.module, place(run.exit)[1],
                Saving(flops=sum(evaluate(flops(node)) for node in run.nodes)),
            )
            for run in runs
        ]  # fmt: skip
        return PassResult(leave_out(graph, runs), tuple(changes), refusals)
