"""The whole step as one graph: accumulated gradients, clipping and the optimizers' update behind a joint graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from graphopt.errors import OptimizerError
from graphopt.graph.draft import Draft
from graphopt.graph.functional_trace import Guard
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.torch_internals import fake_mode_of
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, TrainingGraph
from graphopt.graph.update import (
    UpdateTrace,
    check_ownership,
    initialize_state,
    splice,
    supported,
    trace_clip,
    trace_update,
)


@dataclass(frozen=True)
class WholeStep:
    """A graph with its update. ``guards``: what the update assumes of hyper-parameters. ``outside``: why the
    optimizers could not be put into the graph (they run as they are, on its gradients), None if they are in it."""

    graph: TrainingGraph
    guards: tuple[Guard, ...] = ()
    outside: str | None = None


def as_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """One optimizer or a list of them as a tuple. Raises OptimizerError for anything else."""
    found = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
    for one in found:
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                f"optimizer: expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}"
            )
    return found


def with_update(
    joint: TrainingGraph,
    model: nn.Module,
    optimizer: Any,
    *,
    clip: Any = None,
    accumulated: bool = False,
    fused: bool = False,
) -> WholeStep:
    """Put accumulation, clipping and update behind the gradients of ``joint``.

    With ``accumulated`` the gradients so far become inputs (`InputKind.GRADIENT`) that the new ones are added to.
    With ``fused`` the optimizers' fused implementations are recorded whatever their options say. Optimizer state that
    the first step would make is made now. Raises OptimizerError if an optimizer owns no parameter of the model or two
    own the same one.
    """
    optimizers, bound = as_optimizers(optimizer), parse_clip(clip)
    names = {id(p): name for name, p in model.named_parameters()}
    owners = check_ownership(optimizers, names)
    parameters = joint.input_nodes(InputKind.PARAMETER)
    draft = joint.draft()
    parts = _Parts(draft, list(joint.inputs), list(joint.outputs), draft.results)
    gradients = {
        name: draft.node(node)
        for name, node in joint.output_nodes(OutputKind.GRADIENT).items()
        if node is not None and name in parameters
    }
    order = {name: position for position, name in enumerate(names.values())}
    gradients = {name: gradients[name] for name in sorted(gradients, key=order.__getitem__)}
    mode = fake_mode_of([n.meta.get("val") for n in joint.placeholders])
    assert mode is not None
    if accumulated:
        gradients = _accumulate(parts, gradients)
    if bound is not None and gradients:
        trace = trace_clip(bound, {name: node.meta["val"] for name, node in gradients.items()}, mode)
        made = parts.splice(trace, gradients, {})
        gradients = {output.name: node for output, node in made}
    for position, output in enumerate(parts.outputs):
        if output.kind is OutputKind.GRADIENT and output.name in gradients:
            parts.results[position] = gradients[output.name]
    outside = next((f"{why}" for why in map(supported, optimizers) if why), None)
    owned = frozenset(owners) if optimizers else None
    if not optimizers or outside:
        return WholeStep(parts.finish(owned=None), outside=outside)
    trainable = {name: p for name, p in model.named_parameters() if name in owners and name in gradients}
    for one in optimizers:
        initialize_state(one, list(trainable.values()))
    like = {name: node.meta["val"] for name, node in gradients.items()}
    trace = trace_update(optimizers, names, mode, trainable=trainable, gradients=like, fused=fused)
    for output, node in parts.splice(trace, gradients, {n: draft.node(p) for n, p in parameters.items()}):
        parts.outputs.append(output)
        parts.results.append(node)
    return WholeStep(parts.finish(owned=owned), trace.guards)


@dataclass
class _Parts:
    """A draft whose signature grows."""

    draft: Draft
    inputs: list[Input]
    outputs: list[Output]
    results: list[fx.Node | None]

    def splice(
        self, trace: UpdateTrace, gradients: dict[str, fx.Node], parameters: dict[str, fx.Node]
    ) -> list[tuple[Output, fx.Node]]:
        added, made = splice(
            self.draft.graph, trace, gradients=gradients, parameters=parameters, constants=self.draft.constants
        )
        self.inputs += [input_ for input_, _ in added]
        return made

    def finish(self, owned: frozenset[str] | None) -> TrainingGraph:
        self.draft.output.args = (tuple(self.results),)
        self.draft.signature = replace(
            self.draft.signature, inputs=tuple(self.inputs), outputs=tuple(self.outputs), owned=owned
        )
        return self.draft.finish()


def _accumulate(parts: _Parts, gradients: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Add each gradient to the one accumulated so far, in autograd's order: ``accumulated + new``."""
    place: Sequence[fx.Node] = parts.draft.placeholders
    total = {}
    for name, node in gradients.items():
        with parts.draft.graph.inserting_after(place[-1]):
            input_ = parts.draft.graph.placeholder("accumulated_" + name.replace(".", "_"))
        input_.meta = {**node.meta, "phase": Phase.INPUT}
        place = [input_]
        parts.inputs.append(Input(InputKind.GRADIENT, name))
        total[name] = parts.draft.add(torch.ops.aten.add.Tensor, input_, node, like=node, before=parts.draft.output)
    return total
