"""The Inductor scheme: forward and backward of the captured step compiled by ``torch.compile``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.cost_model.work import Mode
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.halves import cut_update
from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.torch_internals import COMPILE_ERRORS
from graphopt.graph.training_graph import Output, OutputKind, TrainingGraph
from graphopt.schemes.ahead import Ahead
from graphopt.schemes.base import Prepared
from graphopt.schemes.flat import Flat


@dataclass(frozen=True)
class Inductor(Flat):
    """Forward and backward through Inductor: fused kernels after a compilation that takes seconds to minutes.

    The update runs flat behind it: hyper-parameters are numbers, and Inductor would compile anew for each of them.

    Random numbers are eager's (``fallback_random``); sums may be taken in another order, so results differ from eager's
    by rounding.
    """

    kind: ClassVar[str] = "inductor"
    mode: ClassVar[Mode] = "compiled"
    compiles: ClassVar[bool] = True
    compiles_ahead: ClassVar[bool] = True

    def ahead(self, prepared: Prepared, size: int) -> Ahead | None:
        """See `Scheme.ahead`. Not on a GPU, whose memory another process would take."""
        no_cache = os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1"
        if no_cache or any(device.type != "cpu" for device in prepared.layout.devices):
            return None
        try:
            graph = self.form.of(prepared).graph
            frozen = [n for n, p in prepared.task.model.named_parameters() if not p.requires_grad]
            return Ahead(graph, size, frozen)
        except (GraphoptError, OSError):  # it is compiled here then, which says what is wrong
            return None

    def lowered(self, graph: TrainingGraph) -> Lowered:
        """See `Flat.lowered`; compilation happens at the first call."""
        halves = cut_update(graph)
        module, outputs = copying_module(halves.first)
        compiled = torch.compile(module, fullgraph=True, options={"fallback_random": True})
        update = lower(halves.second)
        first_inputs, second_inputs = halves.positions(graph.inputs)
        saved = [i for i, o in enumerate(outputs) if o.kind is OutputKind.SAVED]
        own = len(outputs) - len(saved)  # saved values stand behind them

        def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
            try:
                results = compiled(*(inputs[i] for i in first_inputs))
            except COMPILE_ERRORS as error:  # raised before anything was run
                first_line = str(error).strip().partition("\n")[0]
                raise CaptureError(f"Inductor cannot compile the step: {first_line}") from error
            return (*results[:own], *update.run(*(results[i] for i in saved), *(inputs[i] for i in second_inputs)))

        return Lowered(run, (*outputs[:own], *update.outputs), module.code + update.code)


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
    for node in draft.graph.nodes:  # Inductor may choose other strides than eager, for which a view need not exist
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    return fx.GraphModule(dict(graph.constants), draft.graph), tuple(outputs)
