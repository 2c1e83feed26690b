"""The Inductor scheme: the whole captured step compiled by ``torch.compile``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import Lowered
from graphopt.graph.training_graph import Output, TrainingGraph
from graphopt.schemes.flat import Flat


@dataclass(frozen=True)
class Inductor(Flat):
    """The flat graph through Inductor: fused kernels after a compilation that takes seconds to minutes.

    Random numbers are eager's (``fallback_random``); sums may be taken in another order, so results differ from eager's
    by rounding.
    """

    name: ClassVar[str] = "inductor"

    def lowered(self, graph: TrainingGraph) -> Lowered:
        """See `Flat.lowered`; compilation happens at the first call."""
        module, outputs = copying_module(graph)
        compiled = torch.compile(module, fullgraph=True, options={"fallback_random": True})
        return Lowered(compiled, outputs, module.code)


def copying_module(graph: TrainingGraph) -> tuple[fx.GraphModule, tuple[Output, ...]]:
    """``graph`` as a module that copies new parameters, buffers and state into its inputs and returns the rest."""
    draft = graph.draft()
    outputs, results = [], []
    for output, result, input_ in zip(graph.outputs, draft.results, overwritten(graph), strict=True):
        if input_ is None:
            outputs.append(output)
            results.append(result)
        elif result is not None:
            with draft.graph.inserting_before(draft.output):
                draft.graph.call_function(torch.ops.aten.copy_.default, (draft.node(input_), result))
    draft.output.args = (tuple(results),)
    return fx.GraphModule(dict(graph.constants), draft.graph), tuple(outputs)
